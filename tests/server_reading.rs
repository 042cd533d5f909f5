//! The fuzzer's corpus, read as every route would read it.

use std::fs;
use std::path::Path;

use strand::reading::{Body, Reading};

/// Bodies by the name of their file.
fn corpus() -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/requests");
    let files = fs::read_dir(folder).expect("the corpus is in the repository");
    let read = |file: fs::DirEntry| {
        let bytes = fs::read(file.path()).expect("it can be read");
        (file.file_name().to_string_lossy().into_owned(), bytes)
    };
    files.map(|file| read(file.expect("the folder can be listed"))).collect()
}

#[test]
fn whatever_is_in_a_body_it_is_read_or_refused() {
    let corpus = corpus();
    let mut taken = Vec::new();
    for (name, bytes) in &corpus {
        for body in Body::ALL {
            match body.read(bytes) {
                Reading::Taken { .. } => taken.push((name.as_str(), body)),
                Reading::Refused { status, message, .. } => {
                    assert_eq!(status, 400, "{name} as {body:?}: {message}");
                    assert!(!message.is_empty(), "{name} as {body:?}");
                }
            }
        }
    }
    // the corpus gets behind the first field
    for body in Body::ALL {
        assert!(taken.iter().any(|(_, found)| *found == body), "nothing is read as {body:?}");
    }
    for (name, body) in [
        ("chat.json", Body::Chat),
        ("tools.json", Body::Chat),
        ("text.json", Body::Text),
        ("tokens.json", Body::Text),
        ("response.json", Body::Response),
        ("chunk.json", Body::Chunk),
    ] {
        assert!(taken.contains(&(name, body)), "{name} is not read as {body:?}");
    }
}
