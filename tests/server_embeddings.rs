//! Embeddings over HTTP, by the language model itself and by a model made for them.

use std::fs;
use std::path::Path;

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

#[test]
fn a_model_made_for_it_gives_the_vectors_that_transformers_computes() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/embedder");
    let expected = fs::read_to_string(folder.join("expected.json")).expect("it is a fixture");
    let expected: Value = serde_json::from_str(&expected).expect("it is JSON");
    let server = Server::start(&["--embedding-model", folder.to_str().expect("a name")]);
    let texts: Vec<&Value> = expected["texts"].as_array().expect("a list").iter().collect();
    let mut seen = 0;
    for (index, text) in texts.into_iter().enumerate().filter(|(_, text)| *text != "") {
        // by its name, and where none is said
        for body in [json!({"input": [text], "model": "embedder"}), json!({"input": text})] {
            let answer = server.post(PATH, &body).json();
            assert_eq!(answer["model"], "embedder", "{answer}");
            assert_eq!(answer["usage"]["prompt_tokens"], expected["tokens"][index]);
            let known = expected["mean"][index].as_array().expect("a vector");
            let found = vector(&answer, 0);
            assert_eq!(found.len(), known.len());
            for (found, known) in found.iter().zip(known) {
                let known = known.as_f64().expect("a number");
                assert!((found - known).abs() < 1e-4, "{text}: {found} is not {known}");
            }
        }
        seen += 1;
    }
    assert!(seen > 3);
    server.post(PATH, &json!({"input": ""})).refused(400, Some("input"), "empty");
    server.post(PATH, &json!({"input": [1, 2]})).refused(400, Some("input"), "must be text");
    let long = json!({"input": "cat ".repeat(100)});
    server.post(PATH, &long).refused(400, Some("input"), "");
    // the language model is still asked by its own name
    let own = server.post(PATH, &json!({"input": "x", "model": "strand-demo"})).json();
    assert_eq!(own["model"], "strand-demo");
    let models = server.get("/v1/models").json();
    assert_eq!(models["data"][1]["id"], "embedder", "{models}");
    assert_eq!(server.get("/v1/models/embedder").json()["embeddings"], "by a model made for them");
}
