//! Responses over HTTP and over a socket, as the official SDKs read them.

use std::fs;
use std::net::TcpStream;
use std::time::{SystemTime, UNIX_EPOCH};

use jsonwebtoken::{EncodingKey, Header, encode};
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::{Message, WebSocket, client};

use crate::binary::scratch;
use crate::http::{Server, until};

const PATH: &str = "/v1/responses";

/// Events of a stream, by their names.
fn events(server: &Server, body: &Value) -> Vec<Value> {
    let answer = server.post(PATH, body);
    let blocks = answer.body.split("\n\n").filter(|block| block.starts_with("event: "));
    let events = blocks.map(|block| {
        let (name, data) = block.split_once('\n').expect("a name and data");
        let data = data.strip_prefix("data: ").expect("data follows the name");
        let data: Value = serde_json::from_str(data).expect("it is JSON");
        assert_eq!(Some(data["type"].as_str().unwrap()), name.strip_prefix("event: "));
        data
    });
    events.collect()
}

fn text_of(response: &Value) -> &str {
    response["output"][0]["content"][0]["text"].as_str().expect("it says something")
}

#[test]
fn a_response_has_every_field_that_clients_read() {
    let server = Server::start(&[]);
    let body = json!({"model": "strand-demo", "input": "Hello", "instructions": "Be brief.",
                      "max_output_tokens": 5, "metadata": {"a": "b"}, "temperature": 0});
    let response = server.post(PATH, &body).json();
    assert_eq!(
        (&response["object"], &response["model"]),
        (&json!("response"), &json!("strand-demo"))
    );
    assert!(response["id"].as_str().unwrap().starts_with("resp_"));
    assert_eq!(response["metadata"], json!({"a": "b"}));
    assert_eq!((&response["tools"], &response["tool_choice"]), (&json!([]), &json!("auto")));
    assert_eq!(response["parallel_tool_calls"], true);
    let item = &response["output"][0];
    assert_eq!((&item["type"], &item["role"]), (&json!("message"), &json!("assistant")));
    assert_eq!(item["content"][0]["type"], "output_text");
    let usage = &response["usage"];
    let count = |name: &str| usage[name].as_u64().unwrap();
    assert_eq!(count("total_tokens"), count("input_tokens") + count("output_tokens"));
    assert!(usage["input_tokens_details"]["cached_tokens"].is_u64());
    assert!(usage["output_tokens_details"]["reasoning_tokens"].is_u64());
    let chat = json!({"max_tokens": 5, "temperature": 0, "messages": [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]});
    let chat = server.post("/v1/chat/completions", &chat).json();
    assert_eq!(chat["choices"][0]["message"]["content"], text_of(&response));
    let length = json!({"input": "Hello", "max_output_tokens": 1});
    let cut = server.post(PATH, &length).json();
    assert_eq!(cut["status"], "incomplete");
    assert_eq!(cut["incomplete_details"]["reason"], "max_output_tokens");
}

#[test]
fn events_tell_the_response_from_its_creation_to_its_end() {
    let server = Server::start(&[]);
    let body = json!({"input": [{"role": "user", "content": [{"type": "input_text",
        "text": "Where?"}]}], "max_output_tokens": 6, "stream": true,
        "top_logprobs": 2, "include": ["message.output_text.logprobs"]});
    let events = events(&server, &body);
    let names: Vec<&str> = events.iter().map(|event| event["type"].as_str().unwrap()).collect();
    assert_eq!(
        names[..4],
        [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added"
        ]
    );
    let end = &names[names.len() - 4..];
    assert_eq!(
        end[..3],
        ["response.output_text.done", "response.content_part.done", "response.output_item.done"]
    );
    assert!(end[3] == "response.completed" || end[3] == "response.incomplete");
    for (number, event) in events.iter().enumerate() {
        assert_eq!(event["sequence_number"], number);
    }
    let deltas = events.iter().filter(|event| event["type"] == "response.output_text.delta");
    let text: String = deltas.map(|event| event["delta"].as_str().unwrap()).collect();
    let response = &events.last().unwrap()["response"];
    assert_eq!(text_of(response), text);
    assert!(!response["output"][0]["content"][0]["logprobs"].as_array().unwrap().is_empty());
}

#[test]
fn functions_are_called_and_their_output_is_read() {
    let server = Server::start(&[]);
    let tool = json!({"type": "function", "name": "look_up", "parameters": {"type": "object",
        "properties": {"word": {"enum": ["gate", "door"]}}, "required": ["word"],
        "additionalProperties": false}});
    let mut body = json!({"input": "Look it up", "tools": [tool], "tool_choice": "required",
                          "temperature": 0});
    let response = server.post(PATH, &body).json();
    let call = response["output"][0].clone();
    assert_eq!((&call["type"], &call["name"]), (&json!("function_call"), &json!("look_up")));
    let arguments: Value = serde_json::from_str(call["arguments"].as_str().unwrap()).unwrap();
    assert!(["gate", "door"].contains(&arguments["word"].as_str().unwrap()));
    body["stream"] = json!(true);
    let events = events(&server, &body);
    let deltas =
        events.iter().filter(|event| event["type"] == "response.function_call_arguments.delta");
    let told: String = deltas.map(|event| event["delta"].as_str().unwrap()).collect();
    assert_eq!(call["arguments"], told);
    let output =
        json!({"type": "function_call_output", "call_id": call["call_id"], "output": "shut"});
    let next = json!({"input": [{"role": "user", "content": "Look it up"}, call, output],
                      "tools": [tool], "max_output_tokens": 4});
    assert_eq!(server.post(PATH, &next).status, 200);
}

#[test]
fn what_a_response_cannot_do_is_refused_by_name() {
    let server = Server::start(&[]);
    for (param, body) in [
        ("input", json!({})),
        ("input", json!({"input": []})),
        ("input", json!({"input": 3})),
        ("input[0].type", json!({"input": [{"type": "computer_call"}]})),
        ("input[0].call_id", json!({"input": [{"type": "function_call_output"}]})),
        ("previous_response_id", json!({"input": "x", "previous_response_id": "resp_1"})),
        ("background", json!({"input": "x", "background": true})),
        ("conversation", json!({"input": "x", "conversation": "c"})),
        ("truncation", json!({"input": "x", "truncation": "auto"})),
        ("max_output_tokens", json!({"input": "x", "max_output_tokens": 0})),
        ("temperature", json!({"input": "x", "temperature": 9})),
        ("tools[0].type", json!({"input": "x", "tools": [{"type": "web_search"}]})),
        ("text.format.type", json!({"input": "x", "text": {"format": {"type": "xml"}}})),
    ] {
        let answer = server.post(PATH, &body);
        answer.refused(400, Some(param), "");
    }
}

type Socket = WebSocket<TcpStream>;

fn connect(server: &Server, headers: &[(&'static str, &str)]) -> Result<Socket, u16> {
    let uri = format!("ws://127.0.0.1:{}{PATH}", server.port);
    let mut request = client::IntoClientRequest::into_client_request(uri).unwrap();
    for (name, value) in headers {
        request.headers_mut().insert(*name, value.parse().unwrap());
    }
    match client::client(request, server.connect()) {
        Ok((socket, _)) => Ok(socket),
        Err(tokio_tungstenite::tungstenite::HandshakeError::Failure(
            tokio_tungstenite::tungstenite::Error::Http(answer),
        )) => Err(answer.status().as_u16()),
        Err(other) => panic!("{other}"),
    }
}

fn say(socket: &mut Socket, message: &Value) {
    socket.send(Message::text(message.to_string())).expect("it is open");
}

fn hear(socket: &mut Socket) -> Value {
    loop {
        if let Message::Text(text) = socket.read().expect("it is open") {
            return serde_json::from_str(text.as_str()).expect("it is JSON");
        }
    }
}

/// Events up to the response's end, and the response.
fn answer(socket: &mut Socket) -> (Vec<Value>, Value) {
    let mut events = Vec::new();
    loop {
        let event = hear(socket);
        events.push(event.clone());
        if ["response.completed", "response.incomplete"].contains(&event["type"].as_str().unwrap())
        {
            return (events, event["response"].clone());
        }
    }
}

#[test]
fn a_socket_tells_the_same_events_and_goes_on_from_them() {
    let server = Server::start(&[]);
    let mut socket = connect(&server, &[]).expect("it is let in");
    let create = json!({"type": "response.create", "input": "Hello", "max_output_tokens": 5,
                        "temperature": 0, "stream_id": "lane"});
    say(&mut socket, &create);
    let (told, response) = answer(&mut socket);
    assert!(told.iter().all(|event| event["stream_id"] == "lane"));
    let body = json!({"input": "Hello", "max_output_tokens": 5, "temperature": 0, "stream": true});
    let streamed = events(&server, &body);
    let names = |events: &[Value]| -> Vec<Value> {
        events.iter().map(|event| event["type"].clone()).collect()
    };
    assert_eq!(names(&told), names(&streamed));
    let next = json!({"type": "response.create", "input": "And now?", "max_output_tokens": 5,
        "temperature": 0, "previous_response_id": response["id"]});
    say(&mut socket, &next);
    let (_, second) = answer(&mut socket);
    let whole = json!({"max_output_tokens": 5, "temperature": 0, "input": [
        {"role": "user", "content": "Hello"}, response["output"][0],
        {"role": "user", "content": "And now?"}]});
    assert_eq!(text_of(&server.post(PATH, &whole).json()), text_of(&second));
}

#[test]
fn a_socket_outlives_messages_that_make_no_sense() {
    let server = Server::start(&[]);
    let mut socket = connect(&server, &[]).expect("it is let in");
    for (message, param) in [
        (json!({"type": "response.create"}), Some("input")),
        (json!({"type": "nonsense"}), Some("type")),
        (json!([]), Some("type")),
        (
            json!({"type": "response.create", "input": "x", "previous_response_id": "resp_x"}),
            Some("previous_response_id"),
        ),
        (json!({"type": "response.create", "input": "x", "temperature": 9}), Some("temperature")),
    ] {
        say(&mut socket, &message);
        let event = hear(&mut socket);
        assert_eq!((&event["type"], &event["status"]), (&json!("error"), &json!(400)), "{event}");
        assert_eq!(event["error"]["param"].as_str(), param);
    }
    socket.send(Message::text("{")).unwrap();
    assert_eq!(hear(&mut socket)["type"], "error");
    let steer = json!({"type": "response.steer", "input": "x", "previous_response_id": "resp_x"});
    say(&mut socket, &steer);
    assert_eq!(hear(&mut socket)["type"], "response.steer.failed");
    say(&mut socket, &json!({"type": "response.create", "input": "Hi", "max_output_tokens": 2}));
    answer(&mut socket);
}

#[test]
fn a_socket_needs_the_key_and_no_foreign_page() {
    let server = Server::start(&["--api-key", "right", "--cors-origin", "https://good.example"]);
    let key = ("authorization", "Bearer right");
    assert_eq!(connect(&server, &[]).err(), Some(401));
    assert_eq!(connect(&server, &[("authorization", "Bearer wrong")]).err(), Some(401));
    assert_eq!(connect(&server, &[key, ("origin", "https://evil.example")]).err(), Some(403));
    assert!(connect(&server, &[key, ("origin", "https://good.example")]).is_ok());
    let plain = server.send("GET", PATH, &["Authorization: Bearer right"], b"");
    plain.refused(426, None, "WebSocket");
}

#[test]
fn a_socket_ends_when_its_token_does() {
    let secret = "an issuer's secret of thirty-two bytes";
    let file = scratch("socket-jwt").join("secret");
    fs::write(&file, secret).unwrap();
    let flags = ["--jwt-key", file.to_str().unwrap(), "--jwt-algorithm", "hs256"];
    let server = Server::start(&flags);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    // clocks may differ by a minute: this one is taken for some seconds more
    let claims = json!({"sub": "anna", "exp": now - 54});
    let key = EncodingKey::from_secret(secret.as_bytes());
    let token = encode(&Header::default(), &claims, &key).unwrap();
    let bearer = format!("Bearer {token}");
    let mut socket = connect(&server, &[("authorization", &bearer)]).expect("it is let in");
    let request = json!({"type": "response.create", "input": "Hi", "max_output_tokens": 1});
    say(&mut socket, &request);
    answer(&mut socket);
    let refused = || {
        say(&mut socket, &request);
        loop {
            let event = hear(&mut socket);
            match event["type"].as_str() {
                Some("error") => {
                    assert_eq!(event["status"], 401, "{event}");
                    return true;
                }
                Some("response.completed" | "response.incomplete") => return false,
                _ => {}
            }
        }
    };
    until(refused);
    let closed = loop {
        match socket.read().expect("it says why") {
            Message::Close(frame) => break frame.expect("with a code"),
            _ => continue,
        }
    };
    assert_eq!(u16::from(closed.code), 4401);
    assert_eq!(connect(&server, &[("authorization", &bearer)]).err(), Some(401));
}
