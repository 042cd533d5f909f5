//! What tenants share where they are told to, and the room they leave each other.

use std::io::{Read, Write};
use std::net::TcpStream;

use serde_json::{Value, json};

use crate::binary::{scratch, strand};
use crate::http::{Server, until};
use crate::server_chunks::{call, id_of, start_again, start_with_keys};

const NOTE: &str = "Anna lives in Lisbon. The door of the harbour house is green.\n";

/// Tokens of the prompt whose KV was there.
fn cached(server: &Server, who: &str, salt: Value) -> u64 {
    let question = "Where does Anna live, and of what colour is the door of the harbour house?";
    let body = json!({
        "messages": [{"role": "user", "content": question.repeat(3)}], "max_tokens": 1,
        "cache_salt": salt,
    });
    let answer = call(server, who, "POST", "/v1/chat/completions", &body);
    assert_eq!(answer.status, 200, "{answer:?}");
    let cached = &answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"];
    cached.as_u64().expect("a number")
}

#[test]
fn the_kv_of_a_text_is_shared_only_where_that_is_said() {
    for (name, flags, is_shared) in
        [("parted", &[][..], false), ("shared", &["--share-kv"][..], true)]
    {
        let server = start_with_keys(name, flags);
        assert_eq!(cached(&server, "anna", Value::Null), 0);
        assert_eq!(cached(&server, "ben", Value::Null) > 0, is_shared, "{name}");
        assert!(cached(&server, "anna", Value::Null) > 0);
        // what a client parts stays its tenant's own
        assert_eq!(cached(&server, "anna", json!("x")), 0);
        assert_eq!(cached(&server, "ben", json!("x")), 0);
        assert!(cached(&server, "anna", json!("x")) > 0);
    }
}

#[test]
fn tenants_that_share_kv_have_chunks_of_their_own() {
    let server = start_with_keys("shared-chunks", &["--share-kv"]);
    let path = format!("/v1/chunks/{}", id_of(NOTE));
    let make = |who: &str| {
        // the name is part of what the model sees
        let tags = [format!("{who}'s")];
        let body = json!({"content": NOTE, "name": "note.txt", "tags": tags});
        let made = call(&server, who, "POST", "/v1/chunks", &body);
        assert_eq!(made.status, 201, "{made:?}");
        made.json()
    };
    let annas = make("anna");
    assert_eq!(annas["encoded"], annas["tokens"]);
    // who hasn't brought it finds nothing
    call(&server, "ben", "GET", &path, &Value::Null).refused(404, None, "no such chunk");
    let bens = make("ben");
    assert_eq!((&bens["encoded"], &bens["tags"]), (&json!(0), &json!(["ben's"])));
    let list = call(&server, "ben", "GET", "/v1/chunks", &Value::Null).json();
    assert_eq!(list["data"].as_array().map(Vec::len), Some(1));
    let save = call(&server, "anna", "POST", &format!("{path}/save"), &Value::Null);
    assert_eq!(save.json()["outcome"], "accepted");
    drop(server);

    let keys = scratch("server-keys").join("shared-chunks.txt");
    let flags = ["--api-keys-file", keys.to_str().expect("UTF-8"), "--share-kv"];
    let server = start_again("shared-chunks", &flags);
    let show = |who: &str| call(&server, who, "GET", &path, &Value::Null).json();
    assert_eq!(
        (&show("ben")["tiers"], &show("ben")["tags"]),
        (&json!(["disk"]), &json!(["ben's"]))
    );
    let restored = call(&server, "ben", "POST", &format!("{path}/restore"), &Value::Null).json();
    assert_eq!((&restored["outcome"], &restored["encoded"]), (&json!("accepted"), &json!(0)));
    assert_eq!(show("anna")["tiers"], json!(["device", "disk"]));
    // erased by one it is gone, and the other still has the text
    let erased = call(&server, "anna", "DELETE", &path, &Value::Null);
    assert_eq!(erased.status, 200, "{erased:?}");
    call(&server, "anna", "GET", &path, &Value::Null).refused(404, None, "no such chunk");
    assert_eq!((&show("ben")["tiers"], &show("ben")["content"]), (&json!([]), &json!(NOTE)));
    let again = call(&server, "ben", "POST", &format!("{path}/populate"), &Value::Null).json();
    assert_eq!(again["encoded"], again["tokens"]);
}

/// A streamed answer that takes as long as it may.
fn begin(server: &Server, who: &str, prompt: usize) -> TcpStream {
    let prompt = format!("{prompt} ").repeat(40);
    let body = json!({"prompt": prompt, "max_tokens": 350, "ignore_eos": true, "stream": true});
    let key = format!("Authorization: Bearer {who}-key");
    let mut stream = server.connect();
    let request = server.request("POST", "/v1/completions", &[&key], body.to_string().as_bytes());
    stream.write_all(&request).expect("it is taken");
    stream
}

/// A metric, as an admin sees it.
fn metric(server: &Server, name: &str) -> f64 {
    let text = call(server, "anna", "GET", "/metrics", &Value::Null).body;
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("{name} is not in {text}")).parse().expect("it is a number")
}

/// A pool of 51 blocks, and sequences of at most 32.
const SMALL: [&str; 4] = ["--kv-memory", "2MiB", "--max-model-len", "512"];

#[test]
fn a_flood_of_one_key_leaves_others_their_room() {
    let server = start_with_keys("flood", &[&SMALL[..], &["--tenant-share", "0.5"]].concat());
    let flood: Vec<TcpStream> = (0..8).map(|prompt| begin(&server, "anna", prompt)).collect();
    let waiting = || metric(&server, "vllm:num_requests_waiting");
    until(|| metric(&server, "vllm:num_requests_running") + waiting() == 8.0);
    let body = json!({"prompt": "b ".repeat(60), "max_tokens": 4, "ignore_eos": true});
    let answer = call(&server, "ben", "POST", "/v1/completions", &body);
    assert_eq!(answer.status, 200, "{answer:?}");
    assert!(waiting() >= 4.0, "he didn't wait until they had theirs");
    drop(flood);
    until(|| metric(&server, "strand:kv_blocks_free") == 51.0);
}

#[test]
fn a_flood_of_one_key_takes_no_idle_kv_of_others_but_beyond_its_share() {
    for (name, share, stays) in [("idle", "0.5", true), ("idle-not", "1", false)] {
        let flags = ["--host-memory", "0", "--tenant-share", share];
        let server = start_with_keys(name, &[&SMALL[..], &flags].concat());
        call(&server, "ben", "POST", "/v1/chunks", &json!({"content": NOTE}));
        for prompt in 0..12 {
            let body = json!({"prompt": format!("{prompt} ").repeat(90), "max_tokens": 1});
            let answer = call(&server, "anna", "POST", "/v1/completions", &body);
            assert_eq!(answer.status, 200, "{answer:?}");
        }
        let path = format!("/v1/chunks/{}", id_of(NOTE));
        let tiers = call(&server, "ben", "GET", &path, &Value::Null).json()["tiers"].clone();
        assert_eq!(tiers == json!(["device"]), stays, "{name}: {tiers}");
    }
}

#[test]
fn shares_of_what_is_shared_are_refused() {
    let run = strand(&["serve", "--share-kv", "--tenant-share", "0.5"]);
    run.refused(2, "--share-kv or --tenant-share");
    strand(&["serve", "--tenant-share", "2"]).refused(2, "--tenant-share");
}

#[test]
fn tokens_are_counted_by_key_when_they_were_used() {
    let server = start_with_keys("tokens", &["--max-tokens-per-minute", "60"]);
    let body = json!({"prompt": "x", "max_tokens": 120, "ignore_eos": true});
    let ask = |who: &str| call(&server, who, "POST", "/v1/completions", &body);
    assert_eq!(ask("anna").status, 200, "it has begun, and is not cut off");
    let refused = ask("anna");
    refused.refused(429, None, "too many tokens in a minute");
    let wait: u32 = refused.header("retry-after").unwrap().parse().unwrap();
    assert!((50..=120).contains(&wait), "{wait}");
    let chunk = json!({"content": NOTE});
    let embedding = json!({"input": "x"});
    for (path, body) in [("/v1/chunks", &chunk), ("/v1/embeddings", &embedding)] {
        call(&server, "anna", "POST", path, body).refused(429, None, "too many tokens");
        assert!(call(&server, "ben", "POST", path, body).status < 300, "others have theirs");
    }
    assert_eq!(call(&server, "anna", "GET", "/v1/models", &Value::Null).status, 200);
    // 31 tokens of a chunk, 2 of a text, and more than the rest
    assert_eq!(ask("ben").status, 200);
    ask("ben").refused(429, None, "too many tokens");
}

#[test]
fn an_address_that_guesses_keys_has_to_wait() {
    let server = start_with_keys("guesses", &["--max-wrong-per-minute", "3"]);
    let get = |who: &str| call(&server, who, "GET", "/v1/models", &Value::Null);
    for _ in 0..5 {
        assert_eq!(get("anna").status, 200, "a right key is no guess");
    }
    for guess in ["x", "y"] {
        get(guess).refused(401, None, "not known");
    }
    assert_eq!(server.get("/v1/models").status, 401);
    for who in ["z", "anna"] {
        let headers =
            [format!("Authorization: Bearer {who}-key"), "X-Forwarded-For: 192.0.2.9".into()];
        let headers: Vec<&str> = headers.iter().map(String::as_str).collect();
        let refused = server.send("GET", "/v1/models", &headers, b"");
        refused.refused(429, None, "of this address");
        let wait: u32 = refused.header("retry-after").unwrap().parse().unwrap();
        assert!((1..=60).contains(&wait), "{wait}");
    }
    assert_eq!(server.get("/health").status, 200, "which needs no key");
}

#[test]
fn without_keys_an_address_has_its_quota() {
    let server = Server::start(&["--max-concurrent", "1"]);
    let body = json!({"prompt": "x", "max_tokens": 3500, "ignore_eos": true, "stream": true});
    let mut runs = server.connect();
    let request = server.request("POST", "/v1/completions", &[], body.to_string().as_bytes());
    runs.write_all(&request).unwrap();
    runs.read_exact(&mut [0; 1]).unwrap();
    server.get("/v1/models").refused(429, None, "being answered");
    drop(runs);
    until(|| server.get("/v1/models").status == 200);
}
