//! Contexts over HTTP: chunks with flags, conversations that go on, restarts, tenants.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use serde_json::{Value, json};

use crate::http::{Answer, Server, until};
use crate::server_chunks::{call, id_of, make, start, start_again, start_with_keys};

const NOTE: &str = "Anna lives in Lisbon. The door of the harbour house is green.\n";
const OTHER: &str = "Bruno keeps the light. His boat is called Aurora.\n";

fn create(server: &Server, body: &Value) -> Value {
    let answer = server.post("/v1/contexts", body);
    assert_eq!(answer.status, 201, "{answer:?}");
    answer.json()
}

fn name_of(context: &Value) -> &str {
    context["id"].as_str().expect("an id")
}

/// Both chunks, and a context of them.
fn two(server: &Server) -> Value {
    make(server, NOTE);
    make(server, OTHER);
    create(server, &json!({"chunks": [id_of(NOTE), id_of(OTHER)]}))
}

fn say(text: &str, context: &str) -> Value {
    json!({
        "messages": [{"role": "user", "content": text}], "context": context, "temperature": 0,
        "max_tokens": 8, "logprobs": true, "top_logprobs": 5, "return_token_ids": true,
    })
}

fn ask(server: &Server, context: &str, text: &str) -> Value {
    let answer = server.post("/v1/chat/completions", &say(text, context));
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json()
}

fn show(server: &Server, id: &str) -> Value {
    server.get(&format!("/v1/contexts/{id}")).json()
}

fn send(server: &Server, method: &str, path: &str, body: &Value) -> Answer {
    let body = if body.is_null() { String::new() } else { body.to_string() };
    server.send(method, path, &[], body.as_bytes())
}

#[test]
fn a_context_is_made_changed_and_forgotten() {
    let server = start("context", &[]);
    make(&server, NOTE);
    make(&server, OTHER);
    let (note, other) = (id_of(NOTE), id_of(OTHER));
    let body = json!({
        "chunks": [note, {"id": other[..12], "active": false}], "name": "größe", "policy": "exact",
        "system": "Be brief.",
    });
    let made = create(&server, &body);
    let id = name_of(&made);
    assert!(id.len() == 36 && id.starts_with("ctx_"), "{id}");
    assert_eq!((&made["name"], &made["policy"]), (&json!("größe"), &json!("exact")));
    let chunks = &made["chunks"];
    assert_eq!((&chunks[0]["active"], &chunks[1]["active"]), (&json!(true), &json!(false)));
    assert_eq!(chunks[1]["position"], Value::Null);
    assert_eq!(chunks[0]["position"][0], 0, "the bundled model has no anchor");
    assert_eq!(show(&server, id), made);
    let listed = server.get("/v1/contexts").json();
    assert_eq!(
        (&listed["data"][0]["id"], &listed["data"][0]["num_chunks"]),
        (&json!(id), &json!(2))
    );

    let at = |tail: &str| format!("/v1/contexts/{id}{tail}");
    let on = server.post(&at(&format!("/chunks/{other}/activate")), &json!({})).json();
    assert!(on["chunks"][1]["position"][0].as_u64() > Some(0), "{on}");
    let off = server.post(&at(&format!("/chunks/{note}/deactivate")), &json!({})).json();
    assert_eq!(
        (&off["chunks"][0]["active"], &off["chunks"][1]["position"][0]),
        (&json!(false), &json!(0))
    );
    let third = make(&server, "A third text.");
    let third = third["id"].as_str().expect("an id");
    let put = send(&server, "PUT", &at(&format!("/chunks/{third}")), &json!({"position": 0}));
    let ids = |context: &Value| -> Vec<String> {
        let chunks = context["chunks"].as_array().expect("a list");
        chunks.iter().map(|chunk| chunk["id"].as_str().expect("an id").to_owned()).collect()
    };
    assert_eq!(ids(&put.json()), [third, &note, &other]);
    let removed = send(&server, "DELETE", &at(&format!("/chunks/{note}")), &Value::Null);
    assert_eq!(ids(&removed.json()), [third, &other]);
    send(&server, "DELETE", &at(&format!("/chunks/{note}")), &Value::Null).refused(
        404,
        None,
        "there is no such chunk",
    );
    let change = json!({
        "name": "new", "policy": "blend", "blend_tokens": 4, "system": "", "chunks": [note, other],
    });
    let changed = send(&server, "PATCH", &at(""), &change).json();
    assert_eq!((&changed["name"], &changed["policy"]), (&json!("new"), &json!("blend")));
    assert_eq!((&changed["blend_tokens"], &changed["system"]), (&json!(4), &Value::Null));
    assert_eq!(ids(&changed), [note.as_str(), other.as_str()]);
    assert_eq!(changed["chunks"][0]["active"], true);

    // a chunk that is erased leaves its contexts
    send(&server, "DELETE", &format!("/v1/chunks/{note}"), &Value::Null);
    assert_eq!(ids(&show(&server, id)), [other.as_str()]);
    let gone = send(&server, "DELETE", &at(""), &Value::Null);
    assert_eq!(gone.json(), json!({"id": id, "object": "context.deleted", "deleted": true}));
    server.get(&at("")).refused(404, None, "there is no such context");
}

#[test]
fn what_a_context_cannot_be_is_refused() {
    let server = start("refused", &["--max-contexts", "2"]);
    let id = name_of(&two(&server)).to_owned();
    let note = id_of(NOTE);
    for (body, param) in [
        (json!({"chunks": "x"}), "chunks"),
        (json!({"chunks": [3]}), "chunks[0]"),
        (json!({"chunks": [{"active": true}]}), "chunks[0].id"),
        (json!({"chunks": [{"id": note, "active": 1}]}), "chunks[0].active"),
        (json!({"chunks": [note, note]}), "chunks[1]"),
        (json!({"chunks": ["../x"]}), "chunks[0]"),
        (json!({"policy": "none"}), "policy"),
        (json!({"name": "a\nb"}), "name"),
        (json!({"system": 3}), "system"),
        (json!({"messages": [{"role": "user", "content": "x"}]}), "messages"),
    ] {
        server.post("/v1/contexts", &body).refused(400, Some(param), "");
    }
    for name in ["x", "ctx_", "..%2Fx", &"0".repeat(36), &id.to_uppercase(), &format!("{id}0")] {
        for tail in ["", &format!("/chunks/{note}/activate"), "/fork"] {
            let method = if tail.is_empty() { "GET" } else { "POST" };
            let answer = send(&server, method, &format!("/v1/contexts/{name}{tail}"), &Value::Null);
            answer.refused(404, None, "there is no such context");
        }
    }
    let chat = |more: Value| {
        let mut body = say("x", &id);
        body.as_object_mut().expect("an object").extend(more.as_object().expect("one").clone());
        server.post("/v1/chat/completions", &body)
    };
    chat(json!({"n": 2})).refused(400, Some("n"), "one answer");
    let long = json!({"messages": [{"role": "user", "content": "word ".repeat(400_000)}]});
    chat(long).refused(400, Some("messages"), "has at least");
    chat(json!({"chunks": [note]})).refused(400, Some("chunks"), "its own chunks");
    chat(json!({"reuse": "exact"})).refused(400, Some("reuse"), "its own policy");
    chat(json!({"context": "ctx_0"})).refused(404, None, "there is no such context");
    let system = json!({"messages": [{"role": "system", "content": "x"}]});
    chat(system).refused(400, Some("messages[0]"), "its own");
    let text = json!({"prompt": "x", "context": id});
    server.post("/v1/completions", &text).refused(400, Some("context"), "");
    assert_eq!(show(&server, &id)["messages"], json!([]), "nothing was said");
    create(&server, &json!({}));
    server.post("/v1/contexts", &json!({})).refused(409, None, "no more are kept");
}

#[test]
fn a_conversation_goes_on_and_is_there_after_a_restart() {
    let server = start("talk", &[]);
    let id = name_of(&two(&server)).to_owned();
    let first = ask(&server, &id, "Where does Anna live?");
    let said = first["choices"][0]["message"]["content"].clone();
    let seen = show(&server, &id);
    let messages = json!([
        {"role": "user", "content": "Where does Anna live?"},
        {"role": "assistant", "content": said},
    ]);
    assert_eq!(seen["messages"], messages);
    drop(server);

    // the same question asked of one that was never stopped, and of one that was
    let server = start_again("talk", &[]);
    assert_eq!(show(&server, &id)["messages"], messages);
    let fork = server.post(&format!("/v1/contexts/{id}/fork"), &json!({"name": "other"})).json();
    let second = ask(&server, &id, "What is the boat called?");
    let third = ask(&server, name_of(&fork), "What is the boat called?");
    assert_eq!(third["choices"], second["choices"]);
    let reuse =
        |answer: &Value, tier: &str| answer["strand"]["reuse"][tier].as_u64().expect("a count");
    let prompt = third["usage"]["prompt_tokens"].as_u64().expect("a count");
    // what opens the answer is no whole block
    assert!(reuse(&third, "encoded") < 8, "the fork shares all KV: {third}");
    assert_eq!(reuse(&third, "device") + reuse(&third, "encoded"), prompt);
    assert_eq!(show(&server, &id)["num_messages"], 4);
    assert_eq!(fork["name"], "other");
    let kept =
        send(&server, "POST", &format!("/v1/contexts/{}/fork", name_of(&fork)), &Value::Null);
    assert_eq!(kept.json()["messages"].as_array().map(Vec::len), Some(4));
}

#[test]
fn a_streamed_answer_is_kept_as_the_whole_one_is() {
    let server = start("streamed", &[]);
    let first = name_of(&two(&server)).to_owned();
    let second =
        name_of(&create(&server, &json!({"chunks": [id_of(NOTE), id_of(OTHER)]}))).to_owned();
    ask(&server, &first, "Where does Anna live?");
    let mut body = say("Where does Anna live?", &second);
    body["stream"] = true.into();
    let events = server.events("/v1/chat/completions", &body);
    let tells = |event: &&String| event.contains("\"strand\"");
    let end: Value =
        serde_json::from_str(events.iter().find(tells).expect("one tells")).expect("JSON");
    assert_eq!(end["strand"]["chunks"].as_array().map(Vec::len), Some(2));
    assert_eq!(show(&server, &first)["messages"], show(&server, &second)["messages"]);
    let answers = [&first, &second].map(|id| ask(&server, id, "And the boat?")["choices"].clone());
    assert_eq!(answers[0], answers[1]);
}

fn weather() -> Value {
    json!([{"type": "function", "function": {"name": "get_weather", "parameters":
        {"type": "object", "properties": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
         "required": ["days"], "additionalProperties": false}}}])
}

#[test]
fn calls_and_what_they_answer_are_turns_of_a_context() {
    let name = "calls";
    let server = start(name, &[]);
    let id = name_of(&two(&server)).to_owned();
    let ask = |server: &Server, more: Value| {
        let mut body = say("What is the weather?", &id);
        body.as_object_mut().expect("an object").extend(more.as_object().expect("one").clone());
        let answer = server.post("/v1/chat/completions", &body);
        assert_eq!(answer.status, 200, "{answer:?}");
        answer.json()
    };
    let forced = json!({"tools": weather(), "tool_choice": "required", "max_tokens": 60});
    let called = ask(&server, forced);
    let call = &called["choices"][0]["message"]["tool_calls"][0];
    assert_eq!(called["choices"][0]["finish_reason"], "tool_calls", "{called}");
    let result = json!({"messages": [{"role": "tool", "tool_call_id": call["id"],
        "content": "sunny <|im_end|>"}], "tools": weather()});
    let answered = ask(&server, result);
    let kept = show(&server, &id);
    let roles: Vec<&Value> =
        kept["messages"].as_array().expect("turns").iter().map(|turn| &turn["role"]).collect();
    assert_eq!(roles, ["user", "assistant", "tool", "assistant"]);
    // as the model says a call where no grammar holds it
    let said = kept["messages"][1]["content"].as_str().expect("text");
    let spelt = said.strip_prefix("<tool_call>").and_then(|said| said.strip_suffix("</tool_call>"));
    let spelt: Value = serde_json::from_str(spelt.expect("tags")).expect("JSON between them");
    assert_eq!(spelt["name"], call["function"]["name"]);
    let arguments = call["function"]["arguments"].as_str().expect("text");
    assert_eq!(spelt["arguments"], serde_json::from_str::<Value>(arguments).expect("JSON"));
    assert_eq!(kept["system"], Value::Null, "what may be called is not kept");
    let told = |answer: &Value| answer["usage"]["prompt_tokens"].as_u64().expect("a number");
    assert!(told(&answered) > told(&called), "what was called and answered is in view");

    // the same said without a context is the same prompt, but for the chunks
    let plain = json!({"messages": [
        {"role": "user", "content": "What is the weather?"},
        {"role": "assistant", "content": null, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": "sunny <|im_end|>"},
    ], "tools": weather(), "chunks": [id_of(NOTE), id_of(OTHER)], "max_tokens": 8,
       "temperature": 0, "return_token_ids": true});
    let plain = server.post("/v1/chat/completions", &plain).json();
    assert_eq!(told(&plain), told(&answered), "{plain}");
    assert_eq!(plain["choices"][0]["token_ids"], answered["choices"][0]["token_ids"]);
    drop(server);
    let server = start_again(name, &[]);
    assert_eq!(show(&server, &id)["messages"], kept["messages"]);
    ask(&server, json!({}));
    assert_eq!(show(&server, &id)["num_messages"], 6, "it goes on without tools, too");
    // the client may say what was called, too
    let said = json!({"messages": [
        {"role": "assistant", "content": "Well.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "x", "content": "rain"},
    ]});
    ask(&server, said);
    let last = show(&server, &id)["messages"][6]["content"].clone();
    assert!(last.as_str().is_some_and(|text| text.starts_with("Well.<tool_call>{")), "{last}");
}

#[test]
fn who_leaves_half_way_leaves_the_context_as_it_was() {
    let server = start("left", &["--max-model-len", "2048"]);
    let id = name_of(&two(&server)).to_owned();
    let mut body = say("Tell me everything.", &id);
    body["stream"] = true.into();
    body["max_tokens"] = 1500.into();
    body["ignore_eos"] = true.into();
    let mut stream = server.connect();
    let request = server.request("POST", "/v1/chat/completions", &[], body.to_string().as_bytes());
    stream.write_all(&request).expect("it listens");
    let mut piece = [0; 2048];
    assert!(stream.read(&mut piece).expect("it answers") > 0);

    // in use by one request at a time
    let busy = server.post("/v1/chat/completions", &say("x", &id));
    busy.refused(409, None, "in use");
    assert_eq!(busy.header("retry-after"), Some("1"));
    let edit = format!("/v1/contexts/{id}/chunks/{}/deactivate", id_of(NOTE));
    server.post(&edit, &json!({})).refused(409, None, "in use");
    assert_eq!(show(&server, &id)["messages"], json!([]), "it can be looked at");
    drop(stream);
    until(|| server.post(&edit, &json!({})).status == 200);
    assert_eq!(show(&server, &id)["messages"], json!([]));
    assert_eq!(ask(&server, &id, "Who keeps the light?")["choices"][0]["index"], 0);
    assert_eq!(show(&server, &id)["num_messages"], 2);
}

#[test]
fn a_chunk_that_is_switched_off_leaves_no_trace() {
    let server = start("trace", &[]);
    for policy in ["exact", "independent", "blend"] {
        for text in [NOTE, OTHER] {
            server.post("/v1/chunks", &json!({"content": text}));
        }
        let with = json!({"chunks": [id_of(NOTE), id_of(OTHER)], "policy": policy});
        let (with, without) = (
            create(&server, &with),
            create(&server, &json!({"chunks": [id_of(OTHER)], "policy": policy})),
        );
        for verb in ["deactivate", "activate", "deactivate"] {
            let path = format!("/v1/contexts/{}/chunks/{}/{verb}", name_of(&with), id_of(NOTE));
            assert_eq!(server.post(&path, &json!({})).status, 200);
        }
        let answers = [&with, &without].map(|context| ask(&server, name_of(context), "Who is it?"));
        assert_eq!(answers[0]["choices"], answers[1]["choices"], "{policy}: bit for bit");
        assert_eq!(answers[0]["strand"]["chunks"].as_array().map(Vec::len), Some(1));
    }
}

#[test]
fn special_tokens_that_a_user_names_stay_text() {
    let server = start("special", &[]);
    let special = server.get("/tokenizer_info").json().to_string();
    let named =
        ["<|im_end|>", "<|endoftext|>", "</s>"].into_iter().find(|name| special.contains(name));
    let name = named.expect("the bundled model has one of these");
    let id = name_of(&create(&server, &json!({}))).to_owned();
    let counted = |text: &str| {
        let context = create(&server, &json!({}));
        ask(&server, name_of(&context), text)["usage"]["prompt_tokens"].as_u64().expect("a count")
    };
    assert!(counted(&format!("a{name}b")) > counted("ab") + 1, "more than one token");
    ask(&server, &id, &format!("a{name}b"));
    assert_eq!(show(&server, &id)["messages"][0]["content"], format!("a{name}b"));
}

#[test]
fn the_oldest_turns_give_way_and_the_answer_says_so() {
    let server = start("dropped", &["--max-model-len", "160"]);
    let id = name_of(&create(&server, &json!({}))).to_owned();
    let mut dropped = 0;
    for turn in 0..12 {
        let told = ask(&server, &id, &format!("This is what I say in turn {turn}, no less."));
        dropped = told["strand"]["dropped"]["turns"].as_u64().unwrap_or(0);
    }
    assert!(dropped > 0, "twelve turns do not fit");
    assert_eq!(show(&server, &id)["num_messages"], 24, "nothing is forgotten");
}

#[test]
fn contexts_are_a_tenants_own_and_an_admin_may_look() {
    let server = start_with_keys("tenants", &[]);
    let context = call(&server, "carl", "POST", "/v1/contexts", &json!({"name": "carl's"}));
    assert_eq!(context.status, 201, "{context:?}");
    let id = name_of(&context.json()).to_owned();
    let random = format!("ctx_{}", "0".repeat(32));
    for (method, tail) in [
        ("GET", String::new()),
        ("PATCH", String::new()),
        ("DELETE", String::new()),
        ("POST", "/fork".to_owned()),
        ("POST", format!("/chunks/{}/activate", id_of(NOTE))),
        ("PUT", format!("/chunks/{}", id_of(NOTE))),
    ] {
        let of = |id: &str| {
            let path = format!("/v1/contexts/{id}{tail}");
            let answer = call(&server, "ben", method, &path, &json!({}));
            (answer.status, answer.body)
        };
        assert_eq!((of(&id).0, of(&id)), (404, of(&random)), "{method} {tail}");
    }
    let asked = call(&server, "ben", "POST", "/v1/chat/completions", &say("x", &id));
    asked.refused(404, None, "there is no such context");
    assert_eq!(call(&server, "ben", "GET", "/v1/contexts", &Value::Null).json()["data"], json!([]));
    let path = format!("/v1/contexts/{id}?tenant=carl");
    let seen = call(&server, "anna", "GET", &path, &Value::Null);
    assert_eq!((seen.status, &seen.json()["name"]), (200, &json!("carl's")));
    let path = "/v1/contexts?tenant=anna";
    call(&server, "carl", "GET", path, &Value::Null).refused(403, None, "admin");
    let path = "/v1/contexts?tenant=carl";
    assert_eq!(call(&server, "carl", "GET", path, &Value::Null).status, 200, "one's own");
}

#[test]
fn no_word_of_one_tenant_reaches_another() {
    let server = start_with_keys("canary", &[]);
    let ask = |who: &str, body: &Value| {
        let answer = call(&server, who, "POST", "/v1/chat/completions", body);
        assert_eq!(answer.status, 200, "{answer:?}");
        answer.body
    };
    thread::scope(|scope| {
        for who in ["anna", "ben", "carl"] {
            let (server, ask) = (&server, &ask);
            scope.spawn(move || {
                let canary = format!("canary{who}");
                let text = format!("The password is {canary}. {canary} opens the gate.\n");
                call(server, who, "POST", "/v1/chunks", &json!({"content": text}));
                let context =
                    json!({"chunks": [id_of(&text)], "system": format!("I am {canary}.")});
                let context = call(server, who, "POST", "/v1/contexts", &context).json();
                for turn in 0..12 {
                    let said = ask(
                        who,
                        &say(&format!("Turn {turn}: what is the password?"), name_of(&context)),
                    );
                    let others = ["anna", "ben", "carl"].into_iter().filter(|other| *other != who);
                    for other in others {
                        assert!(!said.contains(&format!("canary{other}")), "{who} reads: {said}");
                    }
                }
            });
        }
    });
}

#[test]
fn a_cache_salt_parts_what_a_tenant_shares() {
    let server = start("salt", &[]);
    let id = make(&server, NOTE)["id"].clone();
    let ask = |salt: Value| {
        let body = json!({
            "messages": [{"role": "user", "content": "Who?"}], "chunks": [id], "max_tokens": 1,
            "cache_salt": salt,
        });
        server.post("/v1/chat/completions", &body).json()["strand"]["reuse"]["device"].clone()
    };
    assert_ne!(ask(Value::Null), 0);
    assert_eq!(ask(json!("one")), 0);
    assert_ne!(ask(json!("one")), 0);
    assert_eq!(ask(json!("two")), 0);
}

/// Whether a whole answer came; the server may die at any moment.
fn is_answered(port: u16, request: &[u8]) -> bool {
    let mut answer = Vec::new();
    let asked = TcpStream::connect(("127.0.0.1", port)).and_then(|mut stream| {
        stream.write_all(request)?;
        stream.read_to_end(&mut answer)
    });
    asked.is_ok() && String::from_utf8_lossy(&answer).contains("\"finish_reason\"")
}

#[test]
fn killed_under_load_it_comes_back_with_what_was_kept() {
    let name = "killed";
    let mut server = start(name, &[]);
    for text in [NOTE, OTHER] {
        make(&server, text);
        server.post(&format!("/v1/chunks/{}/save", id_of(text)), &json!({}));
    }
    let body = json!({"chunks": [id_of(NOTE), id_of(OTHER)]});
    let ids: Vec<String> = (0..4).map(|_| name_of(&create(&server, &body)).to_owned()).collect();
    for round in 0..3 {
        // turns that were answered before the kill, by context
        let stopped = AtomicBool::new(false);
        let answered: Vec<u64> = thread::scope(|scope| {
            let ask = |id: &String| {
                let (server, stopped, id) = (&server, &stopped, id.clone());
                scope.spawn(move || {
                    let body = say("Say something.", &id).to_string();
                    let request =
                        server.request("POST", "/v1/chat/completions", &[], body.as_bytes());
                    let mut count = 0;
                    while !stopped.load(Ordering::Relaxed) {
                        count += u64::from(is_answered(server.port, &request));
                    }
                    count
                })
            };
            let threads: Vec<_> = ids.iter().map(ask).collect();
            until(|| {
                ids.iter().all(|id| show(&server, id)["num_messages"].as_u64() > Some(2 * round))
            });
            server.signal("KILL");
            stopped.store(true, Ordering::Relaxed);
            threads.into_iter().map(|thread| thread.join().expect("it ends")).collect()
        });
        server.wait();
        server = start_again(name, &[]);
        assert!(!server.log().contains("can't be used"), "{}", server.log());
        for (id, answered) in ids.iter().zip(answered) {
            let context = show(&server, id);
            let messages = context["messages"].as_array().expect("a list");
            assert!(messages.len() as u64 >= 2 * answered, "what was answered is there: {context}");
            let roles = messages.iter().map(|message| message["role"].as_str().expect("a role"));
            let expected = ["user", "assistant"].into_iter().cycle();
            assert!(roles.zip(expected).all(|(found, expected)| found == expected), "{context}");
            assert_eq!(messages.len() % 2, 0, "nothing is half made: {context}");
        }
        for text in [NOTE, OTHER] {
            let path = format!("/v1/chunks/{}/restore", id_of(text));
            let restored = server.post(&path, &json!({})).json();
            assert_eq!(
                (&restored["outcome"], &restored["encoded"]),
                (&json!("accepted"), &json!(0))
            );
        }
    }
}
