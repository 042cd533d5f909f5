//! Chat completions over HTTP: shapes as OpenAI's SDKs read them, whole and in events.

use serde_json::{Value, json};

use crate::http::Server;

fn user(text: &str) -> Value {
    json!([{"role": "user", "content": text}])
}

fn chunks(events: &[String]) -> Vec<Value> {
    let (done, chunks) = events.split_last().expect("there are events");
    assert_eq!(done, "[DONE]");
    chunks.iter().map(|data| serde_json::from_str(data).expect("every event is JSON")).collect()
}

#[test]
fn an_answer_has_every_field_that_clients_read() {
    let server = Server::start(&[]);
    let body = json!({"model": "strand-demo", "messages": user("Hello"), "max_tokens": 6});
    let answer = server.post("/v1/chat/completions", &body);
    assert_eq!(answer.status, 200, "{answer:?}");
    assert!(answer.header("x-request-id").is_some_and(|id| id.starts_with("req_")));
    let json = answer.json();
    assert!(json["id"].as_str().is_some_and(|id| id.starts_with("chatcmpl-")));
    assert_eq!(json["object"], "chat.completion");
    assert!(json["created"].is_u64() && json["model"] == "strand-demo");
    let choice = &json["choices"][0];
    assert_eq!((&choice["index"], &choice["message"]["role"]), (&json!(0), &json!("assistant")));
    assert!(choice["message"]["content"].is_string());
    assert!(choice["message"]["refusal"].is_null() && choice["logprobs"].is_null());
    assert!(["stop", "length"].contains(&choice["finish_reason"].as_str().unwrap()));
    let usage = &json["usage"];
    let count = |name: &str| usage[name].as_u64().expect("a number");
    assert_eq!(count("total_tokens"), count("prompt_tokens") + count("completion_tokens"));
    assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], 0);
    assert_eq!(json["strand"]["exactness"], "bitwise");
    assert_eq!(json["strand"]["reuse"]["encoded"], usage["prompt_tokens"]);
}

#[test]
fn the_same_prompt_again_is_found_in_the_pool() {
    let server = Server::start(&["--block-size", "4"]);
    let text = "The harbour gate is open on Mondays and closed on all other days.";
    let body = json!({"messages": user(text), "max_tokens": 4});
    let first = server.post("/v1/chat/completions", &body).json();
    let second = server.post("/v1/chat/completions", &body).json();
    assert_eq!(first["choices"], second["choices"]);
    let cached = second["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    assert!(cached > 0, "{second}");
    assert_eq!(second["strand"]["reuse"]["device"], cached);
    let salted = json!({"messages": user(text), "max_tokens": 4, "cache_salt": "mine"});
    let other = server.post("/v1/chat/completions", &salted).json();
    assert_eq!(other["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    assert_eq!(other["choices"], first["choices"]);
}

#[test]
fn events_joined_are_the_answer() {
    let server = Server::start(&[]);
    let body = |stream: bool| {
        json!({
            "messages": user("Tell me of Ünïcödé → 日本 🎉"), "max_tokens": 24, "stream": stream,
            "temperature": 0.9, "seed": 7, "n": 2, "logprobs": true, "top_logprobs": 2,
            "ignore_eos": true,
        })
    };
    let whole = server.post("/v1/chat/completions", &body(false)).json();
    let mut streamed = body(true);
    streamed["stream_options"] = json!({"include_usage": true});
    let chunks = chunks(&server.events("/v1/chat/completions", &streamed));
    for (index, chunk) in chunks.iter().enumerate() {
        assert_eq!(chunk["object"], "chat.completion.chunk");
        assert_eq!(chunk["id"], chunks[0]["id"]);
        let is_last = index + 1 == chunks.len();
        assert_eq!(chunk["usage"].is_null(), !is_last, "usage comes once, at the end");
    }
    for index in 0..2 {
        let deltas = chunks.iter().flat_map(|chunk| chunk["choices"].as_array().unwrap());
        let deltas: Vec<&Value> = deltas.filter(|choice| choice["index"] == index).collect();
        assert_eq!(deltas[0]["delta"]["role"], "assistant");
        assert!(deltas[1..].iter().all(|choice| choice["delta"].get("role").is_none()));
        let text: String =
            deltas.iter().filter_map(|choice| choice["delta"]["content"].as_str()).collect();
        let expected = &whole["choices"][index];
        assert_eq!(expected["message"]["content"], text);
        let (last, others) = deltas.split_last().unwrap();
        assert_eq!(last["finish_reason"], expected["finish_reason"]);
        assert!(others.iter().all(|choice| choice["finish_reason"].is_null()));
        let all = |choice: &Value| choice["logprobs"]["content"].as_array().cloned();
        let logprobs: Vec<Value> =
            deltas.iter().filter_map(|choice| all(choice)).flatten().collect();
        assert_eq!(Value::from(logprobs), expected["logprobs"]["content"]);
    }
    let last = chunks.last().unwrap();
    assert_eq!((&last["choices"], &last["usage"]["completion_tokens"]), (&json!([]), &json!(48)));
    assert_eq!(last["usage"]["prompt_tokens"], whole["usage"]["prompt_tokens"]);
}

#[test]
fn logprobs_have_an_entry_a_token_and_spell_the_text() {
    let server = Server::start(&[]);
    let body = json!({
        "messages": user("Hello"), "max_tokens": 40, "logprobs": true, "top_logprobs": 3,
        "temperature": 1.5, "seed": 3,
    });
    let json = server.post("/v1/chat/completions", &body).json();
    let choice = &json["choices"][0];
    let entries = choice["logprobs"]["content"].as_array().unwrap();
    assert_eq!(json["usage"]["completion_tokens"], entries.len());
    let bytes = |entry: &Value| entry["bytes"].as_array().cloned().unwrap_or_default();
    let bytes: Vec<u8> =
        entries.iter().flat_map(bytes).map(|byte| byte.as_u64().unwrap() as u8).collect();
    let text = String::from_utf8_lossy(&bytes);
    assert_eq!(choice["message"]["content"], text.as_ref());
    for entry in entries {
        assert_eq!(entry["top_logprobs"].as_array().unwrap().len(), 3);
        assert!(entry["logprob"].as_f64().unwrap() <= 0.0);
    }
}

#[test]
fn stop_strings_end_an_answer_and_are_no_part_of_it() {
    let server = Server::start(&[]);
    let ask = |stop: Value, stream: bool| {
        json!({"messages": user("Hello"), "max_tokens": 30, "ignore_eos": true,
               "temperature": 1.0, "seed": 5, "stop": stop, "stream": stream})
    };
    let path = "/v1/chat/completions";
    let content =
        |json: &Value| json["choices"][0]["message"]["content"].as_str().unwrap().to_owned();
    let free = content(&server.post(path, &ask(json!(null), false)).json());
    let letters: Vec<char> = free.chars().collect();
    let stop: String = letters[letters.len() / 2..letters.len() / 2 + 2].iter().collect();
    let expected = &free[..free.find(&stop).unwrap()];
    let stopped = server.post(path, &ask(json!([stop, "\u{1}never"]), false)).json();
    assert_eq!(content(&stopped), expected);
    assert_eq!(stopped["choices"][0]["finish_reason"], "stop");
    let events = chunks(&server.events(path, &ask(json!(stop), true)));
    let text: String = events
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str())
        .collect();
    assert_eq!(text, expected);
}

#[test]
fn what_was_generated_goes_on_where_it_ended() {
    let server = Server::start(&[]);
    let question = json!({"role": "user", "content": "Where does Anna live?"});
    let path = "/v1/chat/completions";
    let ask = |messages: Value, extra: Value| {
        let mut body = json!({"messages": messages, "max_tokens": 12, "temperature": 0,
                              "return_token_ids": true});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        server.post(path, &body).json()
    };
    let whole = ask(json!([question]), json!({}));
    let text = whole["choices"][0]["message"]["content"].as_str().unwrap();
    let (begun, rest) = text.split_at(text.find(' ').expect("it has words"));
    let messages = json!([question, {"role": "assistant", "content": begun}]);
    let flags = json!({"continue_final_message": true, "add_generation_prompt": false});
    let goes_on = ask(messages, flags);
    let found = goes_on["choices"][0]["message"]["content"].as_str().unwrap();
    assert_eq!(found, rest);
}

#[test]
fn a_breakpoint_ends_a_prefix_that_other_requests_find_to_the_token() {
    let server = Server::start(&[]);
    let ask = |question: &str| {
        let shared = "Anna Berg lives in Lisbon. The gate opens at nine";
        let content = json!([
            {"type": "text", "text": shared, "prompt_cache_breakpoint": {"mode": "explicit"}},
            {"type": "text", "text": question},
        ]);
        let body = json!({"messages": [{"role": "user", "content": content}], "max_tokens": 1});
        server.post("/v1/chat/completions", &body).json()
    };
    let first = ask("Where does she live?");
    let details = &first["usage"]["prompt_tokens_details"];
    assert_eq!(details["cached_tokens"], 0);
    assert_eq!(details["cache_write_tokens"], first["usage"]["prompt_tokens"]);
    let second = ask("When?");
    let cached = second["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    let text = "<|im_start|>user\nAnna Berg lives in Lisbon. The gate opens at nine";
    let shared = server.post("/tokenize", &json!({"prompt": text})).json();
    assert_eq!(shared["count"], cached);
}
