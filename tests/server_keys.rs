//! Who may do what: keys, roles, names of the host, paths that try to go around.

use std::fs;

use serde_json::json;

use crate::binary::scratch;
use crate::http::Server;

/// Paths that need no key. Every other one does, whatever is added.
const OPEN: [&str; 2] = ["/health", "/ready"];

/// Every method and path that the server says it has, with something in place of names.
fn routes(server: &Server, key: &str) -> Vec<(String, String)> {
    let document = server.send("GET", "/openapi.json", &[key], b"").json();
    let paths = document["paths"].as_object().expect("it has paths");
    let routes = paths.iter().flat_map(|(path, methods)| {
        let parts = path.split('/').map(|part| if part.starts_with('{') { "x" } else { part });
        let path = parts.collect::<Vec<_>>().join("/");
        let methods = methods.as_object().expect("methods").keys();
        methods.map(move |method| (method.to_uppercase(), path.clone())).collect::<Vec<_>>()
    });
    routes.collect()
}

#[test]
fn without_the_right_key_nothing_is_told() {
    let server = Server::start(&["--api-key", "right,other"]);
    let wrong = [
        vec![],
        vec!["Authorization: Bearer wrong"],
        vec!["Authorization: Bearer "],
        vec!["Authorization: Bearer"],
        vec!["Authorization: Basic right"],
        vec!["Authorization: right"],
        vec!["Authorization: Bearer right", "Authorization: Bearer right"],
        vec!["X-Api-Key: right"],
    ];
    let body = json!({"prompt": "x", "input": "x", "messages": [{"role": "user", "content": "x"}]})
        .to_string();
    let routes = routes(&server, "Authorization: Bearer right");
    assert!(routes.len() > 12, "{routes:?}");
    for (method, path) in &routes {
        for headers in &wrong {
            let answer = server.send(method, path, headers, body.as_bytes());
            if !OPEN.contains(&path.as_str()) {
                answer.refused(401, None, "key");
                assert_eq!(answer.json()["error"]["code"], "invalid_api_key");
                assert_eq!(answer.header("www-authenticate"), Some("Bearer"));
            } else {
                assert_eq!(answer.status, 200, "{path} {answer:?}");
            }
        }
        for key in ["right", "other"] {
            let header = format!("Authorization: Bearer {key}");
            let answer = server.send(method, path, &[&header], body.as_bytes());
            assert!(![401, 403, 500].contains(&answer.status), "{method} {path} {answer:?}");
        }
    }
}

#[test]
fn no_spelling_of_a_path_goes_around_the_key() {
    let server = Server::start(&["--api-key", "right"]);
    let body = json!({"messages": [{"role": "user", "content": "x"}]}).to_string();
    let key = "Authorization: Bearer right";
    for path in [
        "//v1/chat/completions",
        "/V1/chat/completions",
        "/%76%31/chat/completions",
        "/v1/../v1/chat/completions",
        "/health/../v1/chat/completions",
        "/health/v1/models",
        "/v1/chat/completions/",
        "/v1%2fmodels",
        "/invocations",
        "/",
        "/nothing",
        "/metrics/..%2f",
    ] {
        for method in ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"] {
            let without = server.send(method, path, &[], body.as_bytes());
            assert_eq!(without.status, 401, "{method} {path} {without:?}");
        }
        server.send("POST", path, &[key], body.as_bytes()).refused(404, None, "no such path");
    }
    server.send("GET", "/v1/models/%ff", &[key], b"").refused(400, None, "UTF-8");
    for method in ["PUT", "DELETE", "GET"] {
        let answer = server.send(method, "/v1/chat/completions", &[], b"");
        assert_eq!(answer.status, 401, "{answer:?}");
        let answer = server.send(method, "/v1/chat/completions", &[key], b"");
        answer.refused(405, None, "method");
    }
}

#[test]
fn a_hostile_host_changes_nothing_about_the_key() {
    let server = Server::start(&["--api-key", "right"]);
    for host in ["x/?", "a/v1", "", "127.0.0.1/health?", "evil.example"] {
        let host = format!("Host: {host}");
        for header in ["Authorization: Bearer right", "X: y"] {
            let answer = server.send("GET", "/v1/models", &[&host, header], b"");
            assert!([400, 403].contains(&answer.status), "{host} {answer:?}");
        }
    }
    let twice = server.send("GET", "/v1/models", &["Host: localhost", "Host: localhost"], b"");
    assert_eq!(twice.status, 400);
    let named = server.send(
        "GET",
        "/v1/models",
        &["Host: localhost:1", "Authorization: Bearer right"],
        b"",
    );
    assert_eq!(named.status, 200);
}

#[test]
fn keys_come_from_the_environment_and_from_a_file() {
    let file = scratch("keys").join("keys.txt");
    // the second line's key is `hashed`, as sha256sum prints it
    let digest = "1a06df824ed741b53c785079a6347f00eec5af82f9850775409ca69dff4068a6";
    fs::write(&file, format!("# keys\nanna user plain\nben admin {digest}\n")).unwrap();
    let file = file.to_str().unwrap();
    let variables = [("STRAND_API_KEY", "one,two"), ("STRAND_API_KEYS_FILE", file)];
    let server = Server::start_with(&[], &variables);
    let status = |key: &str| {
        let header = format!("Authorization: Bearer {key}");
        server.send("GET", "/v1/models", &[&header], b"").status
    };
    for key in ["one", "two", "plain", "hashed"] {
        assert_eq!(status(key), 200, "{key}");
    }
    for key in ["one,two", "Plain", digest, "anna"] {
        assert_eq!(status(key), 401, "{key}");
    }
}

#[test]
fn keys_and_prompts_are_not_in_the_log() {
    let server = Server::start(&["-v", "--api-key", "topsecretkey"]);
    let body = json!({"prompt": "swordfish", "max_tokens": 1, "user": "swordfish"});
    let key = "Authorization: Bearer topsecretkey";
    let answer = server.send("POST", "/v1/completions", &[key], body.to_string().as_bytes());
    assert_eq!(answer.status, 200);
    server.send("POST", "/x%0a%1b[31mred", &["Authorization: Bearer wrongsecret"], b"");
    let log = server.log();
    for secret in ["topsecretkey", "wrongsecret", "swordfish", "\u{1b}"] {
        assert!(!log.contains(secret), "{secret} is in {log}");
    }
}
