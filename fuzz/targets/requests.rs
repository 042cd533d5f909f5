//! Bodies of requests, whatever is in them: read or refused, and never anything else.
#![no_main]

use libfuzzer_sys::fuzz_target;
use strand::reading::{Body, Reading};

fuzz_target!(|bytes: &[u8]| {
    for body in Body::ALL {
        if let Reading::Refused { status, message, .. } = body.read(bytes) {
            assert_eq!(status, 400, "{body:?}: {message}");
            assert!(!message.is_empty(), "{body:?} is refused without a reason");
        }
    }
});
