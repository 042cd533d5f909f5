//! What stands around the routes: metrics, quotas, pages of other sites, TLS, tokens, clients
//! that leave.

use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use jsonwebtoken::{EncodingKey, Header, encode};
use serde_json::{Value, json};
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use crate::binary::scratch;
use crate::http::{Server, until};

/// A metric's value, by its name and labels.
fn metric(server: &Server, name: &str) -> f64 {
    let text = server.get("/metrics").body;
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("{name} is not in {text}")).parse().expect("it is a number")
}

#[test]
fn metrics_count_what_happened() {
    let server = Server::start(&[]);
    let body = json!({"prompt": "The gate", "max_tokens": 7, "ignore_eos": true});
    for _ in 0..2 {
        assert_eq!(server.post("/v1/completions", &body).status, 200);
    }
    server.post("/v1/completions", &json!({"prompt": 3}));
    server.get("/nothing/at/all");
    assert_eq!(metric(&server, "vllm:generation_tokens_total"), 14.0);
    assert_eq!(metric(&server, "vllm:request_success_total{finished_reason=\"length\"}"), 2.0);
    assert_eq!(metric(&server, "vllm:time_to_first_token_seconds_count"), 2.0);
    assert_eq!(metric(&server, "vllm:inter_token_latency_seconds_count"), 12.0);
    assert_eq!(metric(&server, "vllm:num_requests_running"), 0.0);
    let answers = |labels: &str| metric(&server, &format!("strand:http_answers_total{{{labels}}}"));
    assert_eq!(answers("route=\"/v1/completions\",status=\"200\""), 2.0);
    assert_eq!(answers("route=\"/v1/completions\",status=\"400\""), 1.0);
    assert_eq!(answers("route=\"none\",status=\"404\""), 1.0);
    assert_eq!(metric(&server, "vllm:request_queue_time_seconds_count"), 2.0);
    assert_eq!(metric(&server, "strand:unknown_fields_total"), 0.0);
    let odd = json!({"prompt": "x", "max_tokens": 1, "user": "u", "best": 1, "worst": null});
    assert_eq!(server.post("/v1/completions", &odd).status, 200);
    assert_eq!(metric(&server, "strand:unknown_fields_total"), 2.0);
}

#[test]
fn toggles_count_what_changed() {
    let server = Server::start(&[]);
    let chunk = |text: &str| {
        let made = server.post("/v1/chunks", &json!({"content": text, "encode": false})).json();
        made["id"].as_str().expect("it is made").to_owned()
    };
    let (one, two) = (chunk("One."), chunk("Two."));
    let made = server.post("/v1/contexts", &json!({"chunks": [one, two]})).json();
    let at = format!("/v1/contexts/{}", made["id"].as_str().expect("it is made"));
    for (method, path, body, toggles) in [
        ("POST", format!("/chunks/{one}/deactivate"), json!({}), 1.0),
        ("POST", format!("/chunks/{one}/deactivate"), json!({}), 1.0),
        ("POST", format!("/chunks/{one}/activate"), json!({}), 2.0),
        ("PUT", format!("/chunks/{two}"), json!({"active": false}), 3.0),
        ("DELETE", format!("/chunks/{two}"), json!({}), 3.0),
        ("PATCH", String::new(), json!({"chunks": [{"id": one, "active": false}]}), 4.0),
    ] {
        let answer = server.send(method, &format!("{at}{path}"), &[], body.to_string().as_bytes());
        assert_eq!(answer.status, 200, "{answer:?}");
        assert_eq!(metric(&server, "strand:toggles_total"), toggles, "{method} {path}");
    }
}

/// Sends a request for a very long answer, and leaves when it runs.
fn leave(server: &Server, path: &str, extra: &Value) {
    let mut body = json!({"max_tokens": 3500, "ignore_eos": true, "n": 4});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    let mut stream = server.connect();
    stream.write_all(&server.request("POST", path, &[], body.to_string().as_bytes())).unwrap();
    until(|| metric(server, "vllm:num_requests_running") > 0.0);
    drop(stream);
    until(|| metric(server, "vllm:num_requests_running") == 0.0);
}

#[test]
fn a_client_that_leaves_frees_what_it_used() {
    let server = Server::start(&[]);
    let free = metric(&server, "strand:kv_blocks_free");
    for stream in [false, true] {
        let chat = json!({"messages": [{"role": "user", "content": "x"}], "stream": stream});
        leave(&server, "/v1/chat/completions", &chat);
        leave(&server, "/v1/completions", &json!({"prompt": ["x", "y"], "stream": stream}));
        let input = json!({"input": "x", "stream": stream, "max_output_tokens": 3500});
        leave(&server, "/v1/responses", &input);
    }
    assert_eq!(metric(&server, "strand:kv_blocks_free"), free);
    assert_eq!(metric(&server, "strand:request_cancelled_total"), 6.0);
}

#[test]
fn a_full_queue_says_so_at_once() {
    let server = Server::start(&["--max-queue", "1", "--max-num-seqs", "1"]);
    let body = json!({"prompt": "x", "max_tokens": 3500, "ignore_eos": true, "stream": true});
    let request = server.request("POST", "/v1/completions", &[], body.to_string().as_bytes());
    let mut runs = server.connect();
    runs.write_all(&request).unwrap();
    until(|| metric(&server, "vllm:num_requests_running") == 1.0);
    let mut waits = server.connect();
    waits.write_all(&request).unwrap();
    until(|| metric(&server, "vllm:num_requests_waiting") == 1.0);
    let refused = server.post("/v1/completions", &body);
    refused.refused(503, None, "queue is full");
    assert_eq!(refused.header("retry-after"), Some("1"));
    drop((runs, waits));
    until(|| metric(&server, "vllm:num_requests_running") == 0.0);
    assert_eq!(server.post("/v1/completions", &json!({"prompt": "x"})).status, 200);
}

#[test]
fn a_key_has_its_quota_and_others_theirs() {
    let flags = ["--api-key", "one,two", "--max-per-minute", "3", "--max-concurrent", "1"];
    let server = Server::start(&flags);
    let get = |key: &str| {
        server.send("GET", "/v1/models", &[&format!("Authorization: Bearer {key}")], b"")
    };
    for _ in 0..3 {
        assert_eq!(get("one").status, 200);
    }
    let refused = get("one");
    refused.refused(429, None, "too many requests");
    assert_eq!(refused.json()["error"]["code"], "rate_limit_exceeded");
    let wait: u32 = refused.header("retry-after").unwrap().parse().unwrap();
    assert!((1..=60).contains(&wait));
    let body = json!({"prompt": "x", "max_tokens": 3500, "ignore_eos": true, "stream": true});
    let key = "Authorization: Bearer two";
    let mut runs = server.connect();
    let body = body.to_string();
    runs.write_all(&server.request("POST", "/v1/completions", &[key], body.as_bytes())).unwrap();
    runs.read_exact(&mut [0; 1]).unwrap();
    get("two").refused(429, None, "being answered");
    drop(runs);
}

#[test]
fn pages_of_other_sites_get_nothing_unless_named() {
    let ask = |server: &Server, origin: &str, method: &str| {
        let origin = format!("Origin: {origin}");
        let wanted = [
            "Access-Control-Request-Method: POST",
            "Access-Control-Request-Headers: authorization",
        ];
        server.send(method, "/v1/models", &[&origin, wanted[0], wanted[1]], b"")
    };
    let allowed = |answer: &crate::http::Answer| {
        answer.header("access-control-allow-origin").map(str::to_owned)
    };
    let closed = Server::start(&[]);
    assert_eq!(allowed(&ask(&closed, "https://a.example", "GET")), None);
    let server = Server::start(&["--cors-origin", "https://a.example", "--api-key", "right"]);
    let preflight = ask(&server, "https://a.example", "OPTIONS");
    assert_eq!((preflight.status, allowed(&preflight)), (200, Some("https://a.example".into())));
    assert_eq!(preflight.header("access-control-allow-headers"), Some("authorization"));
    assert_eq!(preflight.header("access-control-allow-credentials"), None);
    for origin in ["https://b.example", "null", "https://a.example.evil.example"] {
        assert_eq!(allowed(&ask(&server, origin, "OPTIONS")), None, "{origin}");
        let answer = ask(&server, origin, "GET");
        assert_eq!((answer.status, allowed(&answer)), (401, None));
    }
}

#[test]
fn with_certificates_it_speaks_tls_and_nothing_else() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tls");
    let file = |name: &str| folder.join(name).to_str().unwrap().to_owned();
    let server = Server::start(&["--tls-cert", &file("cert.pem"), "--tls-key", &file("key.pem")]);
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(folder.join("cert.pem")).unwrap()).unwrap();
    let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from("localhost").unwrap();
    let client = ClientConnection::new(Arc::new(config), name).unwrap();
    let mut stream = StreamOwned::new(client, server.connect());
    stream.write_all(&server.request("GET", "/v1/models", &[], b"")).unwrap();
    let mut answer = String::new();
    drop(stream.read_to_string(&mut answer));
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(!server.raw(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n").contains("200"));
}

#[test]
fn tokens_of_an_issuer_are_keys() {
    let secret = "an issuer's secret of thirty-two bytes";
    let file = scratch("jwt").join("secret");
    fs::write(&file, format!("{secret}\n")).unwrap();
    let flags = ["--jwt-key", file.to_str().unwrap(), "--jwt-algorithm", "hs256"];
    let server = Server::start(&flags);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let status = |path: &str, claims: Value| {
        let key = EncodingKey::from_secret(secret.as_bytes());
        let token = encode(&Header::default(), &claims, &key).unwrap();
        server.send("GET", path, &[&format!("Authorization: Bearer {token}")], b"").status
    };
    let user = json!({"sub": "anna", "exp": now + 600});
    assert_eq!(status("/v1/models", user.clone()), 200);
    assert_eq!(status("/metrics", user), 403);
    assert_eq!(status("/metrics", json!({"sub": "a", "exp": now + 600, "role": "admin"})), 200);
    for claims in [
        json!({"sub": "anna"}),
        json!({"sub": "anna", "exp": now - 600}),
        json!({"sub": "anna", "exp": (now + 600).to_string()}),
        json!({"exp": now + 600}),
    ] {
        assert_eq!(status("/v1/models", claims.clone()), 401, "{claims}");
    }
    assert_eq!(server.get("/v1/models").status, 401, "a key is needed now");
}

#[test]
fn roles_part_what_users_and_admins_may_do() {
    let file = scratch("roles").join("keys");
    fs::write(&file, "anna user anna-key\nroot admin root-key\n").unwrap();
    let server = Server::start(&["--api-keys-file", file.to_str().unwrap()]);
    let get = |path: &str, key: &str| {
        server.send("GET", path, &[&format!("Authorization: Bearer {key}")], b"")
    };
    get("/metrics", "anna-key").refused(403, None, "role admin");
    assert_eq!(get("/metrics", "root-key").status, 200);
    assert_eq!(get("/v1/models", "anna-key").status, 200);
}
