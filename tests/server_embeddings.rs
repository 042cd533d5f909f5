//! Embeddings over HTTP, by the language model itself.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};

use crate::http::Server;

const PATH: &str = "/v1/embeddings";

fn vector(answer: &Value, index: usize) -> Vec<f64> {
    let entry = &answer["data"][index];
    assert_eq!((&entry["object"], &entry["index"]), (&json!("embedding"), &json!(index)));
    entry["embedding"].as_array().expect("numbers").iter().map(|x| x.as_f64().unwrap()).collect()
}

#[test]
fn texts_and_their_ids_have_the_same_vectors() {
    let server = Server::start(&[]);
    let texts = ["The harbour gate is open.", "Anna lives in Lisbon."];
    let ids: Vec<Value> = texts
        .iter()
        .map(|text| server.post("/tokenize", &json!({"prompt": text})).json()["tokens"].clone())
        .collect();
    let both = server.post(PATH, &json!({"model": "strand-demo", "input": texts})).json();
    assert_eq!((&both["object"], &both["model"]), (&json!("list"), &json!("strand-demo")));
    let by_ids = server.post(PATH, &json!({"input": ids})).json();
    assert_eq!(both, by_ids);
    let tokens: usize = ids.iter().map(|ids| ids.as_array().unwrap().len()).sum();
    assert_eq!(both["usage"], json!({"prompt_tokens": tokens, "total_tokens": tokens}));
    for (index, text) in texts.iter().enumerate() {
        let found = vector(&both, index);
        let length: f64 = found.iter().map(|x| x * x).sum();
        assert!((length - 1.0).abs() < 1e-4, "{length}");
        let one = server.post(PATH, &json!({"input": text})).json();
        assert_eq!(vector(&one, 0), found, "whatever is embedded beside it");
    }
    assert_ne!(vector(&both, 0), vector(&both, 1));
}

#[test]
fn base64_holds_the_same_numbers() {
    let server = Server::start(&[]);
    let ask = |format: &str| {
        let body = json!({"input": "The gate", "encoding_format": format});
        server.post(PATH, &body).json()
    };
    let text = ask("base64")["data"][0]["embedding"].as_str().expect("text").to_owned();
    let bytes = BASE64_STANDARD.decode(text).expect("base64");
    let numbers = bytes.chunks(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()));
    let expected = vector(&ask("float"), 0);
    assert_eq!(numbers.len(), expected.len());
    for (found, expected) in numbers.zip(expected) {
        assert!((f64::from(found) - expected).abs() < 1e-6);
    }
}

#[test]
fn what_cannot_be_embedded_is_refused_by_name() {
    let server = Server::start(&["--max-model-len", "32"]);
    for (param, body) in [
        ("input", json!({})),
        ("input", json!({"input": []})),
        ("input", json!({"input": 3})),
        ("input", json!({"input": ""})),
        ("encoding_format", json!({"input": "x", "encoding_format": "hex"})),
        ("dimensions", json!({"input": "x", "dimensions": 3})),
        ("input", json!({"input": "word ".repeat(100)})),
    ] {
        server.post(PATH, &body).refused(400, Some(param), "");
    }
    server.post(PATH, &json!({"model": "other", "input": "x"})).refused(
        404,
        Some("model"),
        "other",
    );
}
