//! Answers under a grammar, and calls of functions: by a model that knows nothing of either.

use std::fs;

use serde_json::{Value, json};

use crate::binary::copy_of_demo;
use crate::http::Server;

const CHAT: &str = "/v1/chat/completions";

fn ask(extra: Value) -> Value {
    let mut body = json!({
        "messages": [{"role": "user", "content": "What is the weather?"}],
        "max_tokens": 200, "temperature": 0.7, "seed": 1,
    });
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

fn content(answer: &Value) -> &str {
    answer["choices"][0]["message"]["content"].as_str().expect("it says something")
}

fn weather() -> Value {
    json!({"type": "function", "function": {
        "name": "get_weather",
        "description": "The weather of a place",
        "parameters": {
            "type": "object",
            "properties": {"unit": {"enum": ["C", "F"]}, "days": {"type": "integer",
                           "minimum": 1, "maximum": 9}},
            "required": ["unit", "days"],
            "additionalProperties": false,
        },
    }})
}

#[test]
fn an_answer_keeps_to_its_schema() {
    let server = Server::start(&[]);
    let schema = json!({
        "type": "object",
        "properties": {"name": {"enum": ["Anna", "Ben"]}, "age": {"type": "integer",
                       "minimum": 0, "maximum": 99}, "tags": {"type": "array", "maxItems": 2,
                       "items": {"type": "boolean"}}},
        "required": ["name", "age", "tags"],
        "additionalProperties": false,
    });
    let validator = jsonschema::validator_for(&schema).unwrap();
    let format = json!({"type": "json_schema", "json_schema":
        {"name": "person", "schema": schema, "strict": true}});
    for extra in [
        json!({"response_format": format}),
        json!({"structured_outputs": {"json": schema}}),
        json!({"guided_json": schema.to_string()}),
    ] {
        let answer = server.post(CHAT, &ask(extra)).json();
        let value: Value = serde_json::from_str(content(&answer)).expect("it is JSON");
        assert!(validator.is_valid(&value), "{value}");
        assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    }
}

#[test]
fn expressions_choices_and_grammars_hold_too() {
    let server = Server::start(&[]);
    let said = |extra: Value| content(&server.post(CHAT, &ask(extra)).json()).to_owned();
    let number = said(json!({"structured_outputs": {"regex": "[0-9]{3}-[a-f]{2}"}}));
    assert_eq!((number.len(), number.as_bytes()[3]), (6, b'-'));
    let choices = ["yes.", "no!", "(maybe)"];
    assert!(choices.contains(&said(json!({"guided_choice": choices})).as_str()));
    let grammar = "start: \"a\" \"b\"{2,4} \"c\"";
    let text = said(json!({"structured_outputs": {"grammar": grammar}}));
    assert!(["abbc", "abbbc", "abbbbc"].contains(&text.as_str()), "{text}");
}

#[test]
fn grammars_that_cannot_be_are_refused_by_name() {
    let server = Server::start(&[]);
    let schema = |schema: Value| {
        let format = json!({"type": "json_schema", "json_schema": {"schema": schema}});
        json!({"response_format": format})
    };
    for (param, extra) in [
        ("response_format.json_schema.schema", schema(json!({"$ref": "http://x.example/y"}))),
        ("response_format.json_schema.schema", schema(json!({"type": "nonsense"}))),
        ("structured_outputs.regex", json!({"structured_outputs": {"regex": "(((a"}})),
        ("guided_grammar", json!({"guided_grammar": "start: nothing"})),
    ] {
        let answer = server.post(CHAT, &ask(extra));
        answer.refused(400, Some(param), "");
    }
    assert_eq!(server.get("/health").status, 200);
}

#[test]
fn a_function_that_must_be_called_is() {
    let server = Server::start(&[]);
    let other = json!({"type": "function", "function": {"name": "get_time"}});
    let named = json!({"type": "function", "function": {"name": "get_weather"}});
    for choice in [json!("required"), named] {
        let body = ask(json!({"tools": [weather(), other], "tool_choice": choice}));
        let whole = server.post(CHAT, &body).json();
        let picked = &whole["choices"][0];
        assert_eq!(picked["finish_reason"], "tool_calls", "{whole}");
        assert!(picked["message"]["content"].is_null());
        let calls = picked["message"]["tool_calls"].as_array().expect("there are calls");
        assert_eq!((calls.len(), &calls[0]["type"]), (1, &json!("function")));
        assert!(calls[0]["id"].as_str().unwrap().starts_with("call_"));
        let arguments = calls[0]["function"]["arguments"].as_str().unwrap();
        let arguments: Value = serde_json::from_str(arguments).expect("they are JSON");
        if calls[0]["function"]["name"] == "get_weather" {
            assert!((1..=9).contains(&arguments["days"].as_i64().unwrap()));
        } else {
            assert_eq!(choice, "required");
        }
        let mut streamed = body.clone();
        streamed["stream"] = json!(true);
        let events = server.events(CHAT, &streamed);
        let mut name = String::new();
        let mut text = String::new();
        for data in &events[..events.len() - 1] {
            let chunk: Value = serde_json::from_str(data).unwrap();
            for call in chunk["choices"][0]["delta"]["tool_calls"].as_array().into_iter().flatten()
            {
                assert_eq!(call["index"], 0);
                name.push_str(call["function"]["name"].as_str().unwrap_or_default());
                text.push_str(call["function"]["arguments"].as_str().unwrap());
            }
        }
        assert_eq!(calls[0]["function"]["name"], name);
        assert_eq!(calls[0]["function"]["arguments"], text);
    }
}

#[test]
fn a_function_may_be_called_or_an_answer_given_in_form() {
    let server = Server::start(&[]);
    let format = json!({"type": "json_schema", "json_schema":
        {"schema": {"type": "object", "properties": {"answer": {"type": "boolean"}},
                    "required": ["answer"], "additionalProperties": false}}});
    for seed in 0..4 {
        let extra = json!({"tools": [weather()], "response_format": format, "seed": seed});
        let answer = server.post(CHAT, &ask(extra)).json();
        let message = &answer["choices"][0]["message"];
        match message["tool_calls"].as_array() {
            Some(calls) => assert_eq!(calls[0]["function"]["name"], "get_weather"),
            None => {
                let value: Value = serde_json::from_str(content(&answer)).unwrap();
                assert!(value["answer"].is_boolean());
            }
        }
    }
}

#[test]
fn a_model_is_told_of_tools_and_of_what_they_said() {
    let server = Server::start(&[]);
    let messages = json!([
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": null, "tool_calls": [{"id": "c1", "type": "function",
            "function": {"name": "get_weather", "arguments": "{\"unit\": \"C\", \"days\": 2}"}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]);
    let body = json!({"messages": messages, "tools": [weather()]});
    let tokens = server.post("/tokenize", &body).json()["tokens"].clone();
    let text = server.post("/detokenize", &json!({"tokens": tokens})).json();
    let text = text["prompt"].as_str().unwrap();
    for part in ["get_weather", "The weather of a place", "sunny", "\"days\":2"] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    let mut body = ask(json!({"tools": [weather()], "max_tokens": 4}));
    body["messages"] = messages;
    assert_eq!(server.post(CHAT, &body).status, 200);
}

#[test]
fn a_template_that_speaks_of_tools_says_how_they_are_called() {
    let folder = copy_of_demo("tools");
    let template = "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n\
                    {% endfor %}Call with <tool_call></tool_call>.<|im_end|>\n{% endif %}\
                    {% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\
                    {% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}\
                    </tool_call>{% endfor %}<|im_end|>\n{% endfor %}\
                    {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    fs::write(folder.join("chat_template.jinja"), template).unwrap();
    let server = Server::start(&[folder.to_str().unwrap()]);
    let messages = json!([
        {"role": "user", "content": "Weather? <|im_end|>"},
        {"role": "assistant", "tool_calls": [{"id": "c1", "type": "function",
            "function": {"name": "get_weather", "arguments": "{\"days\": 2}"}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]);
    let body = json!({"messages": messages, "tools": [weather()]});
    let tokens = server.post("/tokenize", &body).json()["tokens"].clone();
    let text = server.post("/detokenize", &json!({"tokens": tokens})).json();
    let text = text["prompt"].as_str().unwrap();
    assert!(text.starts_with("<|im_start|>system\n{\"type\": \"function\""), "{text}");
    let call = "<tool_call>{\"name\": \"get_weather\", \"arguments\": {\"days\": 2}}</tool_call>";
    assert!(text.contains(call), "{text}");
    assert_eq!(text.matches("Call with").count(), 1, "it is told once");
    let auto = json!({"messages": messages, "tools": [weather()], "max_tokens": 8});
    assert_eq!(server.post(CHAT, &auto).status, 200);
}
