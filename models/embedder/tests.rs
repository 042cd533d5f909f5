use std::path::PathBuf;

use serde_json::{Value, json};

use super::*;

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/embedder")
}

/// What transformers computes.
fn expected() -> (Vec<String>, Value) {
    let text = std::fs::read_to_string(fixture().join("expected.json")).expect("the fixture");
    let expected: Value = serde_json::from_str(&text).expect("the fixture is JSON");
    let texts = expected["texts"].as_array().expect("a list").iter();
    (texts.map(|text| text.as_str().expect("a text").to_string()).collect(), expected)
}

fn assert_close(found: &[f32], expected: &Value) {
    let expected = expected.as_array().expect("a vector");
    assert_eq!(found.len(), expected.len());
    for (&found, expected) in found.iter().zip(expected) {
        let expected = expected.as_f64().expect("a number");
        assert!((f64::from(found) - expected).abs() < 1e-5, "{found} {expected}");
    }
}

/// A copy of the fixture with one file changed.
struct Copy(PathBuf);

impl Copy {
    fn with(name: &str, file: &str, change: impl Fn(&str) -> Option<String>) -> Self {
        let folder = std::env::temp_dir().join(format!("strand-{name}-{}", std::process::id()));
        std::fs::create_dir_all(folder.join("1_Pooling")).expect("it can be made");
        for part in [
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "modules.json",
            "sentence_bert_config.json",
            "1_Pooling/config.json",
        ] {
            std::fs::copy(fixture().join(part), folder.join(part)).expect("copied");
        }
        let text = std::fs::read_to_string(folder.join(file)).unwrap_or_default();
        match change(&text) {
            Some(text) => std::fs::write(folder.join(file), text).expect("written"),
            None => std::fs::remove_file(folder.join(file)).expect("removed"),
        }
        Self(folder)
    }

    fn open(&self) -> Result<Embedder, Error> {
        Embedder::open(&self.0)
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).expect("it can be removed");
    }
}

#[test]
fn vectors_equal_those_of_transformers_alone_and_in_a_batch() {
    let embedder = Embedder::open(&fixture()).expect("the fixture is sound");
    assert_eq!((embedder.dim(), embedder.max_len()), (32, 40));
    let (texts, expected) = expected();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let all = embedder.embed(&texts).expect("they fit");
    for (index, &text) in texts.iter().enumerate() {
        let alone = embedder.embed(&[text]).expect("it fits");
        for found in [&all[index], &alone[0]] {
            assert_eq!(found.tokens as u64, expected["tokens"][index].as_u64().expect("a number"));
            assert_close(&found.vector, &expected["mean"][index]);
        }
    }
    assert_eq!(embedder.embed(&[]).expect("nothing to do"), []);
    // more than one forward takes
    let many = vec![texts[0]; 1000];
    let many = embedder.embed(&many).expect("they fit");
    assert_eq!(many.len(), 1000);
    assert_close(&many[999].vector, &expected["mean"][0]);
}

#[test]
fn the_first_token_pools_where_the_folder_says_so_and_nothing_normalizes_unasked() {
    let change =
        |text: &str| {
            let cls = text
                .replace("\"pooling_mode_cls_token\": false", "\"pooling_mode_cls_token\": true");
            Some(cls.replace(
                "\"pooling_mode_mean_tokens\": true",
                "\"pooling_mode_mean_tokens\": false",
            ))
        };
    let copy = Copy::with("cls", "1_Pooling/config.json", change);
    std::fs::remove_file(copy.0.join("modules.json")).expect("removed");
    let (texts, expected) = expected();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let found = copy.open().expect("it is sound").embed(&texts).expect("they fit");
    for (found, expected) in found.iter().zip(expected["cls"].as_array().expect("a list")) {
        assert_close(&found.vector, expected);
    }
}

#[test]
fn a_text_that_is_too_long_is_refused_and_not_cut() {
    let embedder = Embedder::open(&fixture()).expect("the fixture is sound");
    let long = "the cat ".repeat(20);
    let error = embedder.embed(&["a", &long]).expect_err("42 tokens").to_string();
    assert_eq!(error, "text 1 has 42 tokens, the embedding model takes at most 40");
}

#[test]
fn what_would_change_the_vectors_and_is_unknown_is_refused() {
    let says = |file: &str, change: &dyn Fn(&str) -> Option<String>| {
        let error = Copy::with("bad", file, change).open().err().expect("it is refused");
        error.to_string()
    };
    let replace = |from: &'static str, to: &'static str| {
        move |text: &str| {
            assert!(text.contains(from), "{from} in {text}");
            Some(text.replace(from, to))
        }
    };
    assert!(says("model.safetensors", &|_| None).contains("model.safetensors"));
    assert!(says("model.safetensors", &|_| Some("nothing".into())).contains("is damaged"));
    let roberta = replace("\"bert\"", "\"roberta\"");
    assert!(says("config.json", &roberta).contains("architecture roberta"));
    let heads = replace("\"num_attention_heads\": 4", "\"num_attention_heads\": 5");
    assert!(says("config.json", &heads).contains("hidden_size = 32"));
    let layers = replace("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3");
    assert!(says("config.json", &layers).contains("layer.2"));
    let wide = replace("\"vocab_size\": 64", "\"vocab_size\": 40");
    assert!(says("config.json", &wide).contains("outside the vocabulary of 40"));
    let act = replace("\"gelu\"", "\"swish\"");
    assert!(says("config.json", &act).contains("swish"));
    let dense = replace("models.Normalize", "models.Dense");
    assert!(says("modules.json", &dense).contains("Dense"));
    let max = replace("\"pooling_mode_max_tokens\": false", "\"pooling_mode_max_tokens\": true");
    assert!(says("1_Pooling/config.json", &max).contains("pooling_mode_max_tokens"));
    assert!(says("tokenizer.json", &|_| Some(json!({}).to_string())).contains("tokenizer.json"));
}
