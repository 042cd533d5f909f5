//! What the server refuses, and how: the parameter by name, in OpenAI's shape.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::http::Server;

const CHAT: &str = "/v1/chat/completions";

fn chat(extra: Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

/// Parameters, and values that they can't have.
fn impossible() -> Vec<(&'static str, Value)> {
    vec![
        ("temperature", json!(-0.1)),
        ("temperature", json!(2.5)),
        ("temperature", json!("hot")),
        ("top_p", json!(1.1)),
        ("top_k", json!(-2)),
        ("min_p", json!(2)),
        ("presence_penalty", json!(3)),
        ("frequency_penalty", json!(-3)),
        ("repetition_penalty", json!(0)),
        ("n", json!(0)),
        ("n", json!(65)),
        ("n", json!(16384)),
        ("max_tokens", json!(0)),
        ("max_tokens", json!(-1)),
        ("max_completion_tokens", json!(1.5)),
        ("max_completion_tokens", json!(1e300)),
        ("top_logprobs", json!(21)),
        ("top_logprobs", json!(2)),
        ("logprobs", json!(3)),
        ("stop", json!(["a", "b", "c", "d", "e"])),
        ("stop", json!("")),
        ("stop", json!([3])),
        ("stop", json!(["x".repeat(2000)])),
        ("stop_token_ids", json!(["x"])),
        ("stop_token_ids", json!(vec![1; 5000])),
        ("min_tokens", json!(3)),
        ("min_tokens", json!(-1)),
        ("logit_bias", json!({"x": 1})),
        ("logit_bias.3", json!({"3": 101})),
        ("logit_bias", json!({"99999": 1})),
        ("logit_bias", json!([])),
        ("seed", json!("x")),
        ("priority", json!(1e12)),
        ("cache_salt", json!("a/b")),
        ("cache_salt", json!("")),
        ("cache_salt", json!("x".repeat(200))),
        ("stream_options", json!({"include_usage": true})),
        ("continue_final_message", json!(true)),
        ("messages", json!([])),
        ("messages", json!("Hi")),
        ("messages", json!(null)),
        ("messages[0]", json!(["Hi"])),
        ("messages[0].role", json!([{"content": "Hi"}])),
        ("messages[0].role", json!([{"role": "wizard", "content": "Hi"}])),
        ("messages[0].content", json!([{"role": "user"}])),
        ("messages[0].content", json!([{"role": "user", "content": null}])),
        ("messages[0].content", json!([{"role": "user", "content": 3}])),
        ("messages[0].content[0].type", json!([{"role": "user", "content": [{"text": "x"}]}])),
        (
            "messages[0].content[0].type",
            json!([{"role": "user", "content":
            [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]),
        ),
        ("messages[0].tool_call_id", json!([{"role": "tool", "content": "x"}])),
        ("messages[0].tool_calls[0].function", json!([{"role": "assistant", "tool_calls": [{}]}])),
    ]
}

#[test]
fn values_that_cannot_be_are_refused_by_name() {
    let server = Server::start(&[]);
    for (param, value) in impossible() {
        let name = param.split(['.', '[']).next().unwrap();
        for stream in [false, true] {
            let mut body = chat(json!({name: value}));
            if stream && name != "stream_options" {
                body["stream"] = json!(true);
            }
            let answer = server.post(CHAT, &body);
            assert_eq!(answer.status, 400, "{body} {answer:?}");
            let found = answer.json()["error"].clone();
            assert_eq!(found["param"], param, "{body} {found}");
            assert_eq!(found["type"], "invalid_request_error");
        }
    }
}

#[test]
fn what_clients_are_lax_about_is_taken() {
    let server = Server::start(&[]);
    let cases = [
        json!({"max_tokens": 2.0}),
        json!({"temperature": null, "stop": null, "n": null, "seed": null, "tools": null}),
        json!({"unknown": {"deep": [1, 2]}, "user": "me", "metadata": {}, "store": true}),
        json!({"top_p": 0, "top_k": -1}),
        json!({"seed": -1, "priority": -3}),
        json!({"model": ""}),
        json!({"model": null}),
        json!({"stream": false, "stream_options": null}),
        json!({"safety_identifier": "x", "prompt_cache_key": "x", "prompt_cache_retention": "24h"}),
        json!({"messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hi"}], "name": "Anna"},
            {"role": "assistant", "content": null,
             "tool_calls": [{"id": "1", "type": "function",
                             "function": {"name": "f", "arguments": "{\"a\": 1}"}}]},
            {"role": "tool", "tool_call_id": "1", "content": "3"},
        ]}),
    ];
    for case in cases {
        let answer = server.post(CHAT, &chat(case.clone()));
        assert_eq!(answer.status, 200, "{case} {answer:?}");
    }
}

#[test]
fn what_is_too_long_says_how_long_it_may_be() {
    let server = Server::start(&["--max-model-len", "64"]);
    let told = "maximum context length is 64 tokens";
    let long = server.post(CHAT, &chat(json!({"max_tokens": 64})));
    long.refused(400, Some("max_tokens"), told);
    assert_eq!(long.json()["error"]["code"], "context_length_exceeded");
    let text = "word ".repeat(100);
    let messages = json!([{"role": "user", "content": text}]);
    for stream in [false, true] {
        let body = chat(json!({"messages": messages, "stream": stream}));
        let answer = server.post(CHAT, &body);
        answer.refused(400, Some("messages"), told);
        assert_eq!(answer.json()["error"]["code"], "context_length_exceeded");
    }
    let completion = json!({"prompt": "Hi", "max_tokens": 100});
    server.post("/v1/completions", &completion).refused(400, Some("max_tokens"), told);
}

/// To tokenize eight million bytes takes longer than anybody waits.
#[test]
fn what_can_never_fit_is_refused_before_it_is_tokenized() {
    let server = Server::start(&[]);
    let text = "The gate is green. ".repeat(420_000);
    let started = Instant::now();
    for (path, param, body) in [
        (
            "/v1/chat/completions",
            "messages",
            chat(json!({"messages":
            [{"role": "user", "content": "x"}, {"role": "user", "content": text}]})),
        ),
        ("/v1/completions", "prompt", json!({"prompt": ["x", text]})),
        ("/v1/responses", "messages", json!({"input": text})),
        ("/v1/embeddings", "input", json!({"input": text})),
    ] {
        let answer = server.post(path, &body);
        answer.refused(400, Some(param), "maximum context length is 4096 tokens");
        answer.refused(400, Some(param), "at least");
        assert_eq!(answer.json()["error"]["code"], "context_length_exceeded");
    }
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
    // the length alone is told of any text
    let count = server.post("/tokenize", &json!({"prompt": "green ".repeat(20_000)})).json();
    assert!(count["count"].as_u64().is_some_and(|count| count >= 20_000), "{}", count["count"]);
}

#[test]
fn completions_refuse_what_they_do_not_do() {
    let server = Server::start(&[]);
    let cases = [
        ("prompt", json!({"prompt": null})),
        ("prompt", json!({"prompt": []})),
        ("prompt", json!({"prompt": ""})),
        ("prompt", json!({"prompt": [""]})),
        ("prompt", json!({"prompt": {"a": 1}})),
        ("prompt", json!({"prompt": [1, "x"]})),
        ("prompt", json!({"prompt": [99999]})),
        ("prompt", json!({"prompt": [-1]})),
        ("prompt", json!({"prompt": vec!["x"; 2000]})),
        ("best_of", json!({"prompt": "x", "best_of": 3})),
        ("suffix", json!({"prompt": "x", "suffix": "y"})),
        ("max_tokens", json!({"prompt": "x", "max_tokens": 0})),
        ("logprobs", json!({"prompt": "x", "logprobs": 21})),
        ("chunks", json!({"prompt": "x", "chunks": "x"})),
    ];
    for (param, body) in cases {
        let answer = server.post("/v1/completions", &body);
        assert_eq!(answer.status, 400, "{body:.80} {answer:?}");
        assert_eq!(answer.json()["error"]["param"], param, "{body:.80}");
    }
}

#[test]
fn another_model_is_not_found() {
    let server = Server::start(&["--served-model-name", "org/my-model"]);
    let answer = server.post(CHAT, &chat(json!({"model": "gpt-4"})));
    answer.refused(404, Some("model"), "gpt-4");
    assert_eq!(answer.json()["error"]["code"], "model_not_found");
    assert_eq!(server.post(CHAT, &chat(json!({"model": "org/my-model"}))).status, 200);
    let list = server.get("/v1/models").json();
    assert_eq!(list["data"][0]["id"], "org/my-model");
    assert_eq!(server.get("/v1/models/org/my-model").json(), list["data"][0]);
    server.get("/v1/models/org/other").refused(404, Some("model"), "org/other");
}

#[test]
fn bodies_that_are_no_json_are_refused() {
    let server = Server::start(&[]);
    let deep = format!("{{\"messages\": {}{}}}", "[".repeat(100_000), "]".repeat(100_000));
    let bodies: [&[u8]; 8] = [
        b"",
        b"[]",
        b"{\"messages\": ",
        b"{\"messages\": NaN}",
        b"{\"temperature\": 1e999}",
        b"{\"temperature\": Infinity}",
        b"{\"messages\": \"\xff\xfe\"}",
        deep.as_bytes(),
    ];
    for body in bodies {
        let answer = server.send("POST", CHAT, &[], body);
        assert_eq!(answer.status, 400, "{answer:?}");
        assert!(answer.json()["error"]["message"].is_string());
    }
    for header in ["Content-Type: text/plain", "Content-Type: multipart/form-data", "Content-Type:"]
    {
        let answer = server.send("POST", CHAT, &[header], b"{}");
        answer.refused(415, None, "application/json");
    }
    let packed = server.send("POST", CHAT, &["Content-Encoding: gzip"], b"{}");
    packed.refused(415, None, "Content-Encoding");
    assert_eq!(server.get("/health").status, 200);
}
