//! Spans of requests, as a collector gets them.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::{Arc, Mutex};
use std::thread;

use serde_json::json;

use crate::http::Server;

/// Takes whatever is sent to it, and answers that it was taken.
fn collector() -> (String, Arc<Mutex<Vec<u8>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
    let address = format!("http://{}", listener.local_addr().expect("it is bound"));
    let taken = Arc::new(Mutex::new(Vec::new()));
    let kept = taken.clone();
    thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let mut bytes = Vec::new();
            let mut piece = [0; 4096];
            while !is_whole(&bytes) {
                match stream.read(&mut piece) {
                    Ok(count) if count > 0 => bytes.extend_from_slice(&piece[..count]),
                    _ => break,
                }
            }
            kept.lock().expect("nobody panics with it").extend(bytes);
            let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
            drop(stream.write_all(answer));
        }
    });
    (address, taken)
}

/// A request with all of its body.
fn is_whole(bytes: &[u8]) -> bool {
    let text = String::from_utf8_lossy(bytes).to_lowercase();
    let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") else { return false };
    let length = text.split("content-length:").nth(1).and_then(|rest| rest.lines().next());
    let length: usize = length.and_then(|text| text.trim().parse().ok()).unwrap_or(0);
    bytes.len() >= end + 4 + length
}

#[test]
fn every_request_is_a_span_without_its_words() {
    let (address, taken) = collector();
    let mut server = Server::start_with(&[], &[("OTEL_EXPORTER_OTLP_ENDPOINT", &address)]);
    let body = json!({"prompt": "The swordfish gate", "max_tokens": 2});
    let answer = server.post("/v1/completions", &body);
    let id = answer.header("x-request-id").expect("it has one").to_owned();
    assert_eq!(server.get("/nowhere").status, 404);
    // told to stop, it sends what it has
    server.signal("TERM");
    assert_eq!(server.wait(), Some(0), "{}", server.log());
    let bytes = taken.lock().expect("nobody panics with it");
    let text = String::from_utf8_lossy(&bytes);
    assert!(text.starts_with("POST /v1/traces HTTP/1.1"), "{text}");
    for word in ["strand", "request", &id, "/v1/completions", "POST", "none"] {
        assert!(text.contains(word), "{word} is not in {text}");
    }
    assert!(!text.contains("swordfish"), "{text}");
}
