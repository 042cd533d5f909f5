//! Chunks over HTTP: made, found, moved between tiers, put before a question, and kept apart.

use std::fs;

use serde_json::{Value, json};
use strand_engine::ChunkId;

use crate::binary::scratch;
use crate::http::{Answer, Server};

/// Three people, and what their keys may do.
pub const KEYS: &str = "anna admin anna-key\nben admin ben-key\ncarl user carl-key\n";

const NOTE: &str = "Anna lives in Lisbon. The door of the harbour house is green.\n";

/// A server with a folder of its own, and these flags.
pub fn start(name: &str, flags: &[&str]) -> Server {
    let data = scratch("server-library").join(name);
    drop(fs::remove_dir_all(&data));
    start_again(name, flags)
}

/// The same folder in another process.
pub fn start_again(name: &str, flags: &[&str]) -> Server {
    let data = scratch("server-library").join(name);
    let data = ["--data-dir", data.to_str().expect("UTF-8")];
    Server::start(&[&data[..], flags].concat())
}

/// A server for three people.
pub fn start_with_keys(name: &str, flags: &[&str]) -> Server {
    let file = scratch("server-keys").join(format!("{name}.txt"));
    fs::create_dir_all(file.parent().expect("a folder")).expect("it can be made");
    fs::write(&file, KEYS).expect("it can be written");
    let keys = ["--api-keys-file", file.to_str().expect("UTF-8")];
    start(name, &[&keys[..], flags].concat())
}

/// A request of somebody.
pub fn call(server: &Server, who: &str, method: &str, path: &str, body: &Value) -> Answer {
    let key = format!("Authorization: Bearer {who}-key");
    let body = if body.is_null() { String::new() } else { body.to_string() };
    server.send(method, path, &[&key], body.as_bytes())
}

/// Makes a chunk; what is said of it.
pub fn make(server: &Server, content: &str) -> Value {
    let answer = server.post("/v1/chunks", &json!({"content": content}));
    assert_eq!(answer.status, 201, "{answer:?}");
    answer.json()
}

pub fn id_of(content: &str) -> String {
    ChunkId::of(content.as_bytes()).to_string()
}

/// A question over chunks, and its answer.
fn ask(server: &Server, chunks: &[&str], more: Value) -> Value {
    let mut body = json!({
        "messages": [{"role": "user", "content": "Where does Anna live?"}],
        "chunks": chunks, "temperature": 0, "max_tokens": 8,
        "logprobs": true, "top_logprobs": 5,
    });
    let more = more.as_object().expect("an object").clone();
    body.as_object_mut().expect("an object").extend(more);
    let answer = server.post("/v1/chat/completions", &body);
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json()
}

fn delete(server: &Server, path: &str) -> Answer {
    server.send("DELETE", path, &[], b"")
}

#[test]
fn a_chunk_is_made_once_and_keeps_its_name() {
    let server = start("made", &[]);
    let body = json!({
        "content": NOTE, "name": "note.txt", "kind": "note", "metadata": {"from": "harbour"},
        "tags": ["a", "b"],
    });
    let answer = server.post("/v1/chunks", &body);
    assert_eq!(answer.status, 201, "{answer:?}");
    let made = answer.json();
    let id = id_of(NOTE);
    assert_eq!((made["id"].as_str(), made["object"].as_str()), (Some(id.as_str()), Some("chunk")));
    assert_eq!((made["name"].as_str(), made["kind"].as_str()), (Some("note.txt"), Some("note")));
    assert_eq!((&made["tiers"], &made["state"]), (&json!(["device"]), &json!("inactive")));
    assert_eq!((&made["encoded"], &made["outcome"]), (&made["tokens"], &json!("accepted")));
    assert_eq!(made["metadata"], json!({"from": "harbour"}));

    let again = server.post("/v1/chunks", &json!({"content": NOTE}));
    assert_eq!((again.status, &again.json()["name"]), (200, &json!("note.txt")));
    assert_eq!(again.json()["encoded"], 0, "it is there");
    let other = json!({"content": NOTE, "name": "other"});
    server.post("/v1/chunks", &other).refused(409, None, "keeps its name");
    let other = json!({"content": NOTE, "kind": "memory"});
    server.post("/v1/chunks", &other).refused(409, None, "keeps its name");

    let about = |body: Value| {
        let told = server.post("/v1/chunks", &body);
        assert_eq!(told.status, 200, "{told:?}");
        (told.json()["tags"].clone(), told.json()["metadata"].clone())
    };
    let (tags, metadata) = (json!(["a", "b"]), json!({"from": "harbour"}));
    assert_eq!(about(json!({"content": NOTE})), (tags, metadata.clone()), "they stay");
    let said = json!({"content": NOTE, "name": "note.txt", "tags": ["c"]});
    assert_eq!(about(said), (json!(["c"]), metadata), "what is said anew replaces the old");
    let said = json!({"content": NOTE, "tags": [], "metadata": {"n": 1}});
    assert_eq!(about(said), (json!([]), json!({"n": 1})));

    for name in [&id[..], &id[..12], &id[..40]] {
        let found = server.get(&format!("/v1/chunks/{name}")).json();
        assert_eq!((&found["id"], &found["content"]), (&json!(id), &json!(NOTE)));
    }
    let lazy = server.post("/v1/chunks", &json!({"content": "Other text.", "encode": false}));
    assert_eq!((lazy.status, &lazy.json()["tiers"]), (201, &json!([])));
    assert_eq!(lazy.json()["name"], lazy.json()["id"].as_str().expect("a text")[..16]);
    let gone = delete(&server, &format!("/v1/chunks/{id}"));
    assert_eq!(gone.json(), json!({"id": id, "object": "chunk.deleted", "deleted": true}));
    server.get(&format!("/v1/chunks/{id}")).refused(404, None, "there is no such chunk");
    let new = server.post("/v1/chunks", &json!({"content": NOTE, "name": "other"}));
    let told = new.json();
    assert_eq!((new.status, &told["encoded"]), (201, &told["tokens"]), "after erase it is new");
}

#[test]
fn a_file_of_a_form_is_a_chunk() {
    let server = start("form", &[]);
    let form = |parts: &[(&str, &str)]| {
        let part = |(head, text): &(&str, &str)| {
            format!("--X\r\nContent-Disposition: form-data; {head}\r\n\r\n{text}\r\n")
        };
        parts.iter().map(part).collect::<String>() + "--X--\r\n"
    };
    let send = |body: &str, more: &[&str]| {
        let headers = [&["Content-Type: multipart/form-data; boundary=X"][..], more].concat();
        server.send("POST", "/v1/chunks", &headers, body.as_bytes())
    };
    let body = form(&[
        ("name=\"file\"; filename=\"../up/note.txt\"", NOTE),
        ("name=\"tags\"", "a"),
        ("name=\"tags\"", "b"),
        ("name=\"metadata\"", "{\"n\": 1}"),
        ("name=\"kind\"", "memory"),
    ]);
    let foreign = send(&body, &["Origin: http://evil.example"]);
    foreign.refused(403, None, "forms of other pages");
    let made = send(&body, &[]);
    assert_eq!(made.status, 201, "{made:?}");
    let made = made.json();
    assert_eq!((&made["id"], &made["name"]), (&json!(id_of(NOTE)), &json!("note.txt")));
    assert_eq!((&made["tags"], &made["metadata"]), (&json!(["a", "b"]), &json!({"n": 1})));
    assert_eq!(made["kind"], "memory");
    send(&form(&[("name=\"name\"", "x")]), &[]).refused(400, Some("file"), "file is required");
    send("--Y\r\n", &[]).refused(400, None, "the form");
    let binary = form(&[("name=\"file\"; filename=\"x\"", "a\0b")]);
    send(&binary, &[]).refused(400, None, "binary file");
}

#[test]
fn chunks_are_listed_in_pages_by_state_tier_and_tag() {
    let server = start("listed", &[]);
    let ids: Vec<String> = (0..5)
        .map(|n| {
            let tags: &[&str] = if n == 3 { &["odd"] } else { &[] };
            let text = format!("Text of chunk {n}.");
            let body = json!({"content": text, "tags": tags, "encode": n < 2});
            assert_eq!(server.post("/v1/chunks", &body).status, 201);
            id_of(&text)
        })
        .collect();
    let list = |query: &str| {
        let page = server.get(&format!("/v1/chunks{query}")).json();
        assert_eq!(page["object"], "list");
        let data = page["data"].as_array().expect("a list");
        let found: Vec<String> =
            data.iter().map(|chunk| chunk["id"].as_str().expect("an id").to_owned()).collect();
        assert_eq!(page["first_id"].as_str(), found.first().map(String::as_str));
        assert_eq!(page["last_id"].as_str(), found.last().map(String::as_str));
        (found, page["has_more"] == true)
    };
    assert_eq!(list(""), (ids.clone(), false));
    assert_eq!(list("?limit=2"), (ids[..2].to_vec(), true));
    let after = format!("?limit=2&after={}", ids[1]);
    assert_eq!(list(&after), (ids[2..4].to_vec(), true));
    assert_eq!(list(&format!("?after={}", ids[3])), (ids[4..].to_vec(), false));
    assert_eq!(list("?tier=device"), (ids[..2].to_vec(), false));
    assert_eq!(list("?tier=none&limit=1"), (ids[2..3].to_vec(), true));
    assert_eq!(list("?tag=odd"), (ids[3..4].to_vec(), false));
    assert_eq!(list("?state=active"), (vec![], false));
    let context = server.post("/v1/contexts", &json!({"chunks": [ids[4]]}));
    assert_eq!(context.status, 201, "{context:?}");
    assert_eq!(list("?state=active"), (ids[4..].to_vec(), false));
    assert_eq!(list("?state=inactive&limit=100"), (ids[..4].to_vec(), false));
    for (query, param) in [
        ("?limit=0", "limit"),
        ("?limit=101", "limit"),
        ("?limit=x", "limit"),
        ("?after=nobody", "after"),
        ("?state=on", "state"),
        ("?tier=gpu", "tier"),
    ] {
        server.get(&format!("/v1/chunks{query}")).refused(400, Some(param), param);
    }
}

#[test]
fn verbs_move_a_chunks_kv_and_say_what_came_of_it() {
    let server = start("verbs", &[]);
    let id = id_of(NOTE);
    let made = server.post("/v1/chunks", &json!({"content": NOTE, "encode": false})).json();
    let act = |verb: &str, body: &Value| {
        let answer = server.post(&format!("/v1/chunks/{id}/{verb}"), body);
        assert_eq!(answer.status, 200, "{answer:?}");
        let told = answer.json();
        assert_eq!(told["id"], id.as_str());
        assert!(told["millis"].as_f64().is_some_and(|millis| millis >= 0.0));
        told
    };
    let plain = json!({});
    let facts =
        |told: &Value| (told["outcome"].clone(), told["reason"].clone(), told["tiers"].clone());
    let is = |told: Value, outcome: &str, reason: Value, tiers: &[&str]| {
        assert_eq!(facts(&told), (json!(outcome), reason, json!(tiers)), "{told}");
        told
    };
    is(act("unload", &plain), "refused", json!("not_on_device"), &[]);
    is(act("restore", &plain), "refused", json!("no_kv"), &[]);
    is(act("pin", &plain), "refused", json!("not_on_device"), &[]);
    let told = is(act("populate", &plain), "accepted", Value::Null, &["device"]);
    assert_eq!(told["encoded"], made["tokens"]);
    let told = is(act("populate", &plain), "accepted", json!("already_populated"), &["device"]);
    assert_eq!((&told["encoded"], &told["bytes"]), (&json!(0), &json!(0)));
    let told = is(act("pin", &json!({"seconds": 60})), "accepted", Value::Null, &["device"]);
    assert_eq!(told["seconds"], 60);
    let told =
        is(act("pin", &json!({"seconds": 86400})), "clipped", json!("longest_pin"), &["device"]);
    assert_eq!(told["seconds"], 3600);
    let told = is(act("unload", &plain), "accepted", Value::Null, &["host"]);
    assert!(told["bytes"].as_u64().expect("bytes") > 0);
    let told = is(act("restore", &plain), "accepted", Value::Null, &["device", "host"]);
    assert_eq!(told["encoded"], 0, "its own rows came back");
    let told = is(act("save", &plain), "accepted", Value::Null, &["device", "host", "disk"]);
    assert!(told["bytes"].as_u64().expect("bytes") > 4096);
    drop(server);
    let server = start_again("verbs", &[]);
    let told = server.get(&format!("/v1/chunks/{id}")).json();
    assert_eq!((&told["tiers"], &told["content"]), (&json!(["disk"]), &json!(NOTE)));
    let told = server.post(&format!("/v1/chunks/{id}/restore"), &plain).json();
    assert_eq!((&told["outcome"], &told["encoded"]), (&json!("accepted"), &json!(0)));
}

#[test]
fn odd_names_are_refused_and_find_nothing() {
    let server = start("odd", &[]);
    make(&server, NOTE);
    let id = id_of(NOTE);
    let names = [
        "..%2Fx".to_owned(),
        "%2E%2E%2F%2E%2E%2Fetc%2Fpasswd".to_owned(),
        format!("{}%00", &id[..12]),
        id.to_uppercase(),
        id[..11].to_owned(),
        format!("{id}0"),
        "0".repeat(65),
        "%D9%A1".repeat(64),
        "%EF%BC%91".repeat(12),
        "kv%5C..%5Cx00000".to_owned(),
        "%%%%%%%%%%%%".to_owned(),
        "000000000000'--".to_owned(),
        "a".repeat(10_000),
    ];
    for name in &names {
        for (method, tail) in [("GET", ""), ("DELETE", ""), ("POST", "/save"), ("POST", "/restore")]
        {
            let answer = server.send(method, &format!("/v1/chunks/{name}{tail}"), &[], b"");
            assert_eq!(answer.status, 400, "{method} {name} {answer:?}");
            assert!(answer.json()["error"]["message"].is_string());
        }
    }
    for name in ["../x", "x/../../y", "/", ""] {
        let answer = server.get(&format!("/v1/chunks/{name}"));
        assert_eq!(answer.status, 404, "{name} {answer:?}");
    }
    let zeros = "0".repeat(64);
    server.get(&format!("/v1/chunks/{zeros}")).refused(404, None, "there is no such chunk");
    let body = |value: Value| {
        let mut body = json!({"messages": [{"role": "user", "content": "x"}]});
        body["chunks"] = value;
        server.post("/v1/chat/completions", &body)
    };
    body(json!(["../x"])).refused(400, Some("chunks[0]"), "hex digits");
    body(json!([id, 3])).refused(400, Some("chunks[1]"), "must be a string");
    body(json!("x")).refused(400, Some("chunks"), "must be a list");
    body(json!([zeros])).refused(404, None, "there is no such chunk");
}

#[test]
fn what_is_too_large_or_no_text_leaves_nothing() {
    let flags = ["--max-body", "64KiB", "--max-model-len", "256", "--max-chunks", "2"];
    let server = start("limits", &[&flags[..], &["--max-chunk-bytes", "1KiB"]].concat());
    let post = |body: &Value| server.post("/v1/chunks", body);
    post(&json!({"content": "x".repeat(70_000)})).refused(413, None, "larger than 65536 bytes");
    let long = "word ".repeat(600);
    post(&json!({"content": &long[..1000]})).refused(400, Some("content"), "the model takes 256");
    post(&json!({"content": "a\u{0}b"})).refused(400, None, "binary file");
    post(&json!({"content": ""})).refused(400, None, "empty");
    post(&json!({"content": 3})).refused(400, Some("content"), "must be a string");
    post(&json!({})).refused(400, Some("content"), "content is required");
    for (name, value) in [
        ("name", json!("a\nb")),
        ("name", json!("")),
        ("name", json!("x".repeat(257))),
        ("kind", json!("poem")),
        ("tags", json!(["a\u{1b}"])),
        ("tags", json!(vec!["t"; 65])),
        ("metadata", json!([1])),
        ("metadata", json!({"x": "y".repeat(17_000)})),
        ("encode", json!("no")),
    ] {
        let mut body = json!({"content": NOTE});
        body[name] = value;
        assert_eq!(post(&body).json()["error"]["param"], name, "{name}");
    }
    assert_eq!(server.get("/v1/chunks").json()["data"], json!([]), "nothing was made");
    make(&server, NOTE);
    let more = json!({"content": "Another text. ".repeat(70), "encode": false});
    post(&more).refused(409, None, "would be over 1024");
    make(&server, "second");
    let third = post(&json!({"content": "third"}));
    third.refused(409, None, "no more are kept");
    assert_eq!(third.json()["error"]["code"], "quota_exceeded");
    assert_eq!(post(&json!({"content": "second"})).status, 200, "what is there needs no room");
}

#[test]
fn a_request_sees_its_chunks_and_says_where_their_kv_was() {
    let server = start("seen", &[]);
    let other = "The keeper of the light is called Bruno.\n";
    let (note, other) = (make(&server, NOTE), make(&server, other));
    let ids = [note["id"].as_str().expect("an id"), other["id"].as_str().expect("an id")];
    let tokens = |chunk: &Value| chunk["tokens"].as_u64().expect("tokens");
    let told = ask(&server, &ids, json!({}));
    let both = tokens(&note) + tokens(&other);
    assert_eq!(told["strand"]["reuse"]["device"], both, "{told}");
    assert_eq!(told["usage"]["prompt_tokens_details"]["cached_tokens"], both);
    assert_eq!(told["strand"]["exactness"], "bitwise");
    let seen = |id: &str, chunk: &Value| {
        let (name, tokens) = (&chunk["name"], &chunk["tokens"]);
        json!({"id": id, "name": name, "tokens": tokens, "source": "device"})
    };
    let expected = [seen(ids[0], &note), seen(ids[1], &other)];
    assert_eq!(told["strand"]["chunks"], json!(expected));

    // the same from every tier
    for (verb, source) in [("unload", "host"), ("save", "device")] {
        server.post(&format!("/v1/chunks/{}/{verb}", ids[0]), &json!({}));
        let again = ask(&server, &ids, json!({}));
        assert_eq!(again["strand"]["chunks"][0]["source"], source, "{verb}");
        assert_eq!(again["choices"], told["choices"], "{verb}");
    }
    drop(server);
    let server = start_again("seen", &["--restore", "always"]);
    let again = ask(&server, &ids, json!({}));
    assert_eq!(again["strand"]["chunks"][0]["source"], "disk");
    assert_eq!(again["strand"]["reuse"]["disk"], tokens(&note));
    assert_eq!(again["choices"], told["choices"]);
    // a stream tells the same at its end
    let body = json!({
        "messages": [{"role": "user", "content": "Where does Anna live?"}], "chunks": ids,
        "temperature": 0, "max_tokens": 8, "stream": true,
        "stream_options": {"include_usage": true},
    });
    let events = server.events("/v1/chat/completions", &body);
    let last: Value = serde_json::from_str(&events[events.len() - 2]).expect("JSON");
    assert_eq!(last["strand"]["chunks"][0]["source"], "device");
    // text completions see chunks too
    let body = json!({"prompt": "Anna", "chunks": ids, "max_tokens": 1, "temperature": 0});
    let text = server.post("/v1/completions", &body).json();
    assert_eq!(text["strand"]["chunks"].as_array().expect("a list").len(), 2, "{text}");
}

#[test]
fn policies_are_a_requests_own() {
    let server = start("policies", &[]);
    let ids = [NOTE, "Bruno keeps the light.\n"].map(|text| {
        make(&server, text);
        id_of(text)
    });
    let ids = [ids[0].as_str(), ids[1].as_str()];
    for policy in ["exact", "independent", "blend", "mask"] {
        let first = ask(&server, &ids, json!({"reuse": policy}));
        let again = ask(&server, &ids, json!({"reuse": policy}));
        assert_eq!(first["choices"], again["choices"], "{policy}");
    }
    let body = json!({"messages": [{"role": "user", "content": "x"}], "reuse": "always"});
    server.post("/v1/chat/completions", &body).refused(400, Some("reuse"), "one of exact");
}

#[test]
fn a_miss_says_why() {
    let data = "misses";
    let server = start(data, &["--kv-codec", "int8"]);
    let ask_of = |server: &Server, text: &str, more: Value| {
        let told = ask(server, &[&id_of(text)], more);
        let chunk = &told["strand"]["chunks"][0];
        (chunk["source"].clone(), chunk["miss"].clone())
    };
    let encoded = |miss: &str| (json!("encoded"), json!(miss));
    let lazily = |text: &str| {
        let body = json!({"content": text, "encode": false});
        assert_eq!(server.post("/v1/chunks", &body).status, 201);
    };
    lazily(NOTE);
    assert_eq!(ask_of(&server, NOTE, json!({})), encoded("never_seen"));
    assert_eq!(ask_of(&server, NOTE, json!({})), (json!("device"), Value::Null));
    assert_eq!(ask_of(&server, NOTE, json!({"cache_salt": "s"})), encoded("salt"));
    assert_eq!(ask_of(&server, NOTE, json!({"cache_salt": "s"})), (json!("device"), Value::Null));
    // under exact it has seen what stands before it
    lazily("Bruno keeps the light.\n");
    let second = ask(
        &server,
        &[&id_of(NOTE), &id_of("Bruno keeps the light.\n")],
        json!({"reuse": "exact"}),
    );
    assert_eq!(second["strand"]["chunks"][1]["miss"], "never_seen");
    assert_eq!(ask_of(&server, "Bruno keeps the light.\n", json!({})), encoded("policy"));
    server.post(&format!("/v1/chunks/{}/save", id_of(NOTE)), &json!({}));
    drop(server);
    let server = start_again(data, &[]);
    assert_eq!(ask_of(&server, NOTE, json!({})), encoded("lossy_variant"));
    drop(server);
    let server = start_again(data, &["--dtype", "f32"]);
    assert_eq!(ask_of(&server, NOTE, json!({})), encoded("other_model"));
}

#[test]
fn what_left_all_tiers_was_evicted() {
    let flags = ["--kv-memory", "2MiB", "--host-memory", "0", "--data-dir", "/proc/nowhere"];
    let server = Server::start(&flags);
    assert!(server.log().contains("nothing is kept on disk"), "{}", server.log());
    make(&server, NOTE);
    let mut told = Value::Null;
    for n in 0..200 {
        let text = format!("Filler number {n} takes its place in the pool. ").repeat(8);
        assert_eq!(server.post("/v1/chunks", &json!({"content": text})).status, 201);
        told = server.get(&format!("/v1/chunks/{}", id_of(NOTE))).json();
        if told["tiers"] == json!([]) {
            break;
        }
    }
    assert_eq!(told["tiers"], json!([]), "the pool is smaller than that");
    let told = ask(&server, &[&id_of(NOTE)], json!({}));
    assert_eq!(told["strand"]["chunks"][0]["miss"], "evicted", "{told}");
    let save = server.post(&format!("/v1/chunks/{}/save", id_of(NOTE)), &json!({})).json();
    assert_eq!((&save["outcome"], &save["reason"]), (&json!("refused"), &json!("no_store")));
}

#[test]
fn a_hash_is_no_key_to_another_tenants_chunk() {
    let server = start_with_keys("apart", &[]);
    let made = call(&server, "anna", "POST", "/v1/chunks", &json!({"content": NOTE}));
    assert_eq!(made.status, 201, "{made:?}");
    let (id, random) = (id_of(NOTE), id_of("nobody has this"));
    assert_eq!(
        call(&server, "anna", "POST", &format!("/v1/chunks/{id}/save"), &Value::Null).status,
        200
    );
    let question =
        |id: &str| json!({"messages": [{"role": "user", "content": "x"}], "chunks": [id]});
    for (method, tail) in [
        ("GET", ""),
        ("DELETE", ""),
        ("POST", "/populate"),
        ("POST", "/save"),
        ("POST", "/unload"),
        ("POST", "/restore"),
        ("POST", "/pin"),
    ] {
        let of = |id: &str| {
            let answer =
                call(&server, "ben", method, &format!("/v1/chunks/{id}{tail}"), &Value::Null);
            (answer.status, answer.body)
        };
        assert_eq!(of(&id), of(&random), "{method} {tail}");
        assert_eq!(of(&id[..16]), of(&id).clone(), "{method} {tail}");
        assert_eq!(of(&id).0, 404, "{method} {tail}");
    }
    for (path, body) in [
        ("/v1/chat/completions", &question as &dyn Fn(&str) -> Value),
        ("/v1/contexts", &|id: &str| json!({"chunks": [id]})),
    ] {
        let of = |id: &str| {
            let answer = call(&server, "ben", "POST", path, &body(id));
            (answer.status, answer.body)
        };
        assert_eq!((of(&id).0, of(&id)), (404, of(&random)), "{path}");
    }
    let list = call(&server, "ben", "GET", "/v1/chunks", &Value::Null);
    assert_eq!(list.json()["data"], json!([]));

    // the same text is new to whoever has not brought it
    let bens =
        call(&server, "ben", "POST", "/v1/chunks", &json!({"content": NOTE, "name": "ben's"}));
    assert_eq!(bens.status, 201, "{bens:?}");
    let (bens, annas) = (bens.json(), made.json());
    assert_eq!((&bens["encoded"], &bens["name"]), (&bens["tokens"], &json!("ben's")));
    assert_eq!(bens["tiers"], json!(["device"]), "not anna's file");
    assert_eq!(annas["encoded"], annas["tokens"]);
    assert_eq!(
        call(&server, "ben", "POST", &format!("/v1/chunks/{id}/save"), &Value::Null).status,
        200
    );
    let erased = call(&server, "ben", "DELETE", &format!("/v1/chunks/{id}"), &Value::Null);
    assert_eq!(erased.status, 200, "{erased:?}");
    let still = call(&server, "anna", "GET", &format!("/v1/chunks/{id}"), &Value::Null).json();
    assert_eq!((&still["tiers"], &still["content"]), (&json!(["device", "disk"]), &json!(NOTE)));
    drop(server);
    let file = scratch("server-keys").join("apart.txt");
    let server = start_again("apart", &["--api-keys-file", file.to_str().expect("UTF-8")]);
    let still =
        call(&server, "anna", "POST", &format!("/v1/chunks/{id}/restore"), &Value::Null).json();
    assert_eq!((&still["outcome"], &still["encoded"]), (&json!("accepted"), &json!(0)), "{still}");
}

#[test]
fn to_erase_and_to_save_take_an_admin() {
    let server = start_with_keys("roles", &[]);
    let made = call(&server, "carl", "POST", "/v1/chunks", &json!({"content": NOTE}));
    assert_eq!(made.status, 201, "{made:?}");
    let path = format!("/v1/chunks/{}", id_of(NOTE));
    for (method, tail) in [("DELETE", ""), ("POST", "/save")] {
        let answer = call(&server, "carl", method, &format!("{path}{tail}"), &Value::Null);
        answer.refused(403, None, "admin");
    }
    for tail in ["/populate", "/pin", "/unload", "/restore"] {
        let answer = call(&server, "carl", "POST", &format!("{path}{tail}"), &Value::Null);
        assert_eq!(answer.status, 200, "{answer:?}");
    }
}
