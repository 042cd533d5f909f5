//! The life of a server: where it listens, what it endures, how it stops.

use std::fs;
use std::io::{Read, Write};
use std::time::Instant;

use serde_json::json;

use crate::binary::{scratch, strand};
use crate::http::{Server, read_answer};

#[test]
fn anybody_may_use_it_from_outside_only_when_that_is_said() {
    for address in ["0.0.0.0:0", "[::]:0"] {
        let run = strand(&["serve", "--addr", address]);
        run.refused(2, "--allow-no-key");
    }
    strand(&["serve", "--addr", "nonsense"]).refused(1, "cannot listen on nonsense");
    strand(&["serve", "--api-keys-file", "/nothing"]).refused(1, "cannot use the keys in /nothing");
    strand(&["serve", "--max-n", "0"]).refused(2, "--max-n");
}

#[test]
fn options_come_from_a_file_and_flags_count_more() {
    let file = scratch("serve-config").join("strand.toml");
    let text = "served-model-name = \"house\"\napi-key = [\"one\", \"two\"]\nmax_n = 2\n\
                max-body = \"1KiB\"\nmax-model-len = 64\n";
    fs::write(&file, text).unwrap();
    let server = Server::start(&["--config", file.to_str().unwrap(), "--max-body", "2KiB"]);
    let ask = |key: &str, body: &[u8]| {
        let key = format!("Authorization: Bearer {key}");
        server.send("POST", "/v1/completions", &[&key], body)
    };
    let body = json!({"prompt": "x", "max_tokens": 1, "n": 2}).to_string();
    for key in ["one", "two"] {
        let answer = ask(key, body.as_bytes());
        assert_eq!((answer.status, &answer.json()["model"]), (200, &json!("house")));
    }
    ask("three", body.as_bytes()).refused(401, None, "not known");
    let many = json!({"prompt": "x", "n": 3}).to_string();
    ask("one", many.as_bytes()).refused(400, Some("n"), "from 1 to 2");
    let long = json!({"prompt": "x", "max_tokens": 100}).to_string();
    ask("one", long.as_bytes()).refused(400, Some("max_tokens"), "64 tokens");
    assert_eq!(ask("one", &[b' '; 1500]).status, 400, "the flag's limit");
    ask("one", &[b' '; 3000]).refused(413, None, "2048 bytes");
    fs::write(&file, "max-nn = 2\n").unwrap();
    let run = strand(&["serve", "--config", file.to_str().unwrap()]);
    run.refused(2, "there is no option max-nn");
}

#[cfg(not(feature = "otel"))]
#[test]
fn who_names_a_collector_is_told_that_nothing_is_sent() {
    let collector = [("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")];
    let server = Server::start_with(&[], &collector);
    assert!(server.log().contains("without the feature otel"), "{}", server.log());
    assert_eq!(server.get("/health").status, 200);
}

#[test]
fn told_to_stop_it_ends_its_answers_and_then_itself() {
    let mut server = Server::start(&[]);
    let body = json!({"prompt": "The gate", "max_tokens": 400, "ignore_eos": true, "stream": true});
    let request = server.request("POST", "/v1/completions", &[], body.to_string().as_bytes());
    let mut stream = server.connect();
    stream.write_all(&request).unwrap();
    let mut first = [0; 1];
    stream.read_exact(&mut first).unwrap();
    server.signal("TERM");
    // what was begun is ended
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("data: [DONE]"), "{rest}");
    assert_eq!(server.wait(), Some(0), "{}", server.log());
}

#[test]
fn told_twice_it_ends_at_once() {
    let mut server = Server::start(&[]);
    let body = json!({"prompt": "The gate", "max_tokens": 4000, "ignore_eos": true, "n": 64,
                      "stream": true});
    let request = server.request("POST", "/v1/completions", &[], body.to_string().as_bytes());
    let mut stream = server.connect();
    stream.write_all(&request).unwrap();
    stream.read_exact(&mut [0; 1]).unwrap();
    server.signal("INT");
    server.signal("TERM");
    assert_eq!(server.wait(), Some(130), "{}", server.log());
}

#[test]
fn a_client_that_dawdles_is_dropped() {
    let server = Server::start(&["--read-timeout", "1"]);
    let started = Instant::now();
    let mut slow = server.connect();
    slow.write_all(b"POST /v1/completions HTTP/1.1\r\nHost: loc").unwrap();
    let mut answer = String::new();
    slow.read_to_string(&mut answer).unwrap();
    let mut body = server.connect();
    let request = server.request("POST", "/v1/completions", &["Content-Length: 9"], b"{");
    body.write_all(&request).unwrap();
    let answer = read_answer(body);
    answer.refused(408, None, "took more than 1 seconds");
    assert!(started.elapsed().as_secs() < 30);
}

#[test]
fn bodies_and_headers_have_limits() {
    let server = Server::start(&["--max-body", "1MiB"]);
    let large = vec![b' '; 48 << 20];
    server.send("POST", "/v1/completions", &[], &large).refused(413, None, "1048576 bytes");
    let within = format!("{{\"prompt\": \"x\", \"max_tokens\": 1{}}}", " ".repeat(1 << 19));
    assert_eq!(server.send("POST", "/v1/completions", &[], within.as_bytes()).status, 200);
    let header = format!("X-Long: {}", "x".repeat(1 << 20));
    assert_eq!(server.send("GET", "/health", &[&header], b"").status, 431);
    let many: Vec<String> = (0..10_000).map(|number| format!("X-{number}: x")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    assert_eq!(server.send("GET", "/health", &many, b"").status, 431);
    assert_eq!(server.get("/health").status, 200);
}

#[test]
fn a_request_cannot_hide_in_another() {
    let server = Server::start(&[]);
    let host = format!("Host: 127.0.0.1:{}\r\n", server.port);
    let hidden = "GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n";
    let post = "POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\n";
    for (name, head) in [
        ("two lengths", "Content-Length: 2\r\nContent-Length: 60\r\n"),
        ("a list of lengths", "Content-Length: 2, 60\r\n"),
        ("a length with a sign", "Content-Length: +2\r\n"),
        ("a length and chunks", "Content-Length: 2\r\nTransfer-Encoding: chunked\r\n"),
        ("chunks that are none", "Transfer-Encoding: xchunked\r\n"),
        ("chunks before others", "Transfer-Encoding: chunked, identity\r\n"),
        ("a blank in a name", "Content-Length : 2\r\n"),
        ("a folded header", "X: y\r\n Content-Length: 60\r\nContent-Length: 2\r\n"),
    ] {
        let bytes = format!("{post}{host}{head}Connection: close\r\n\r\n{{}}{hidden}");
        let answer = server.raw(bytes.as_bytes());
        assert!(!answer.contains("\"object\":\"list\""), "{name} hides a request: {answer}");
        assert!(!answer.starts_with("HTTP/1.1 200"), "{name} is answered: {answer}");
    }
    let plain = format!("{post}{host}Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n");
    let body = "1f\r\n{\"prompt\":\"x\",\"max_tokens\":1  }\r\n0\r\n\r\n";
    assert!(server.raw(format!("{plain}{body}").as_bytes()).starts_with("HTTP/1.1 200"));
    for garbage in ["\0\0\0", "GET\r\n\r\n", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "\u{16}\u{3}\u{1}"]
    {
        assert!(!server.raw(garbage.as_bytes()).starts_with("HTTP/1.1 200"));
    }
    assert_eq!(server.get("/health").status, 200);
}
