//! The server on a GPU: chat whole and in events, and vectors, as the CPU answers.

use serde_json::{Value, json};

use crate::gpu::devices;
use crate::http::Server;

/// Of this size everywhere, so that the emulator has little to clear.
const SMALL: [&str; 6] = ["--kv-memory", "4MiB", "--max-model-len", "512", "--max-num-seqs", "4"];

fn server(device: &str) -> Server {
    Server::start(&[&SMALL[..], &["--device", device]].concat())
}

/// The text of an answer in events, and the reason of its end.
fn joined(events: &[String]) -> (String, Value) {
    let (done, chunks) = events.split_last().expect("there are events");
    assert_eq!(done, "[DONE]");
    let (mut text, mut reason) = (String::new(), Value::Null);
    for chunk in chunks {
        let chunk: Value = serde_json::from_str(chunk).expect("every event is JSON");
        let choice = &chunk["choices"][0];
        text.push_str(choice["delta"]["content"].as_str().unwrap_or_default());
        if !choice["finish_reason"].is_null() {
            reason = choice["finish_reason"].clone();
        }
    }
    (text, reason)
}

#[test]
fn gpu_serves_chat_whole_and_in_events_and_vectors() {
    for device in devices() {
        let (here, there) = (server("cpu"), server(&device.to_string()));
        let asked = |stream: bool| {
            let messages = json!([{"role": "user", "content": "Where does Anna live?"}]);
            json!({"messages": messages, "max_tokens": 6, "temperature": 0, "stream": stream})
        };
        let path = "/v1/chat/completions";
        let expected = here.post(path, &asked(false)).json();
        let whole = there.post(path, &asked(false)).json();
        assert_eq!(whole["choices"], expected["choices"]);
        assert_eq!(whole["usage"]["total_tokens"], expected["usage"]["total_tokens"]);
        let (text, reason) = joined(&there.events(path, &asked(true)));
        assert_eq!(whole["choices"][0]["message"]["content"], text.as_str());
        assert_eq!(whole["choices"][0]["finish_reason"], reason);

        let vectors = |server: &Server| -> Vec<Vec<f64>> {
            let texts = json!({"input": ["The harbour gate is open.", "Anna lives in Lisbon."]});
            let answer = server.post("/v1/embeddings", &texts);
            let data = answer.json()["data"].as_array().expect("two vectors").clone();
            let numbers = |entry: &Value| {
                let numbers = entry["embedding"].as_array().expect("numbers").iter();
                numbers.map(|number| number.as_f64().expect("a number")).collect()
            };
            data.iter().map(numbers).collect()
        };
        let alike = |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
        let (here, there) = (vectors(&here), vectors(&there));
        assert!(here.iter().zip(&there).all(|(a, b)| alike(a, b) > 0.999));
        assert!(alike(&there[0], &there[1]) < 0.999);
    }
}
