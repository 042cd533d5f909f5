//! Tokenizers against Hugging Face's, over `tests/fixtures/templates` (made by
//! `tests/fixtures/make_templates.py`).

use crate::error::Error;
use crate::gguf_tokenizer::{
    chat_template_from_metadata, stop_tokens_from_metadata, tokenizer_from_metadata,
};
use crate::tokenizer::{IncrementalDecoder, Tokenizer};
use candle_core::quantized::gguf_file;
use serde_json::Value;
use std::collections::HashMap;
use std::path::PathBuf;

pub(crate) const FIXTURES: [&str; 8] =
    ["chatml", "thinking", "headers", "inst", "brackets", "folding", "openers", "prompts"];

pub(crate) fn fixture(name: &str, file: &str) -> PathBuf {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    root.join("../tests/fixtures/templates").join(name).join(file)
}

pub(crate) fn fixture_json(name: &str, file: &str) -> Value {
    let text = std::fs::read_to_string(fixture(name, file)).unwrap();
    serde_json::from_str(&text).unwrap()
}

pub(crate) fn tokenizer(name: &str) -> Tokenizer {
    Tokenizer::from_file(fixture(name, "tokenizer.json")).unwrap()
}

pub(crate) fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

/// A small generator of our own: the seed is the test (splitmix64).
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((bits ^ (bits >> 31)) % bound as u64) as usize
    }
}

#[test]
fn ids_and_text_equal_hugging_face_s() {
    for name in FIXTURES {
        let tokenizer = tokenizer(name);
        for case in fixture_json(name, "strings.json").as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            let what = format!("{name}: {text:?}");
            let plain = tokenizer.encode_plain(text).unwrap();
            assert_eq!(plain, ids(&case["ids"]), "{what}");
            assert_eq!(tokenizer.encode(text).unwrap(), ids(&case["raw"]), "{what}");
            let literal = tokenizer.encode_text(text).unwrap();
            assert_eq!(literal, ids(&case["literal"]), "{what}");
            let decoded = tokenizer.decode(&plain);
            assert_eq!(decoded, case["decoded"].as_str().unwrap(), "{what}");
        }
    }
}

#[test]
fn special_tokens_named_in_a_text_stay_text() {
    for name in FIXTURES {
        let tokenizer = tokenizer(name);
        let specials = (0..tokenizer.vocab_size() as u32).filter(|&id| tokenizer.is_special(id));
        let names: Vec<String> = specials.map(|id| tokenizer.token_text(id).unwrap()).collect();
        let text = format!("x{}y", names.join(" "));
        let count = |ids: Vec<u32>| ids.iter().filter(|&&id| tokenizer.is_special(id)).count();
        assert!(count(tokenizer.encode_plain(&text).unwrap()) >= names.len());
        assert_eq!(count(tokenizer.encode_text(&text).unwrap()), 0, "{name}");
        let decoded = tokenizer.decode(&tokenizer.encode_text(&text).unwrap());
        assert_eq!(decoded, text, "{name}");
    }
}

#[test]
fn bos_is_what_the_tokenizer_puts_first() {
    let bos = |name: &str| {
        let tokenizer = tokenizer(name);
        tokenizer.bos().iter().map(|&id| tokenizer.token_text(id)).collect::<Vec<_>>()
    };
    assert_eq!(bos("headers"), [Some("<|begin_of_text|>".to_owned())]);
    assert_eq!(bos("inst"), [Some("<s>".to_owned())]);
    assert!(bos("chatml").is_empty());
    assert!(bos("openers").is_empty());
}

/// Pushes joined equal the decoding of all ids, whatever the ids are.
#[test]
fn incremental_decoding_equals_decoding_at_once() {
    for name in FIXTURES {
        let tokenizer = tokenizer(name);
        let reference = tokenizers::Tokenizer::from_file(fixture(name, "tokenizer.json")).unwrap();
        let byte_level = matches!(name, "chatml" | "thinking" | "headers" | "openers" | "prompts");
        for seed in 0..300 {
            let mut random = Random(seed);
            let size = tokenizer.vocab_size() + 3;
            let count = random.below(40);
            let ids: Vec<u32> = (0..count).map(|_| random.below(size) as u32).collect();
            let text = incremental(&tokenizer, &ids);
            assert_eq!(text, tokenizer.decode(&ids), "{name}, seed {seed}");
            let expected = reference.decode(&ids, true).unwrap();
            // Hugging Face gives up a whole run of byte tokens when a part of it is broken.
            if byte_level || !expected.contains('\u{fffd}') {
                assert_eq!(text, expected, "{name}, seed {seed}");
            }
        }
    }
}

#[test]
fn texts_of_many_bytes_a_character_come_out_whole_while_they_stream() {
    let alphabet: Vec<char> = "a b\n你世界😀👩\u{200d}é\u{301}ßЖ🏳️🌈 \u{fffd}".chars().collect();
    for name in FIXTURES {
        let tokenizer = tokenizer(name);
        for seed in 0..200 {
            let mut random = Random(1000 + seed);
            let count = 1 + random.below(30);
            let text: String = (0..count).map(|_| alphabet[random.below(alphabet.len())]).collect();
            let ids = tokenizer.encode_plain(&text).unwrap();
            let decoded = tokenizer.decode(&ids);
            assert_eq!(incremental(&tokenizer, &ids), decoded, "{name}, seed {seed}");
            // Metaspace alone can't tell a blank it adds from one that was there; NFC composes.
            if !matches!(name, "inst" | "chatml" | "thinking") {
                assert_eq!(decoded, text, "{name}, seed {seed}");
            }
        }
    }
}

fn incremental(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let mut decoder = IncrementalDecoder::new(tokenizer.clone(), &[]);
    let mut text: String = ids.iter().map(|&id| decoder.push(id)).collect();
    text.push_str(&decoder.finish());
    text
}

#[test]
fn no_push_ends_inside_a_character() {
    let tokenizer = tokenizer("chatml");
    let ids = tokenizer.encode_plain("😀你").unwrap();
    assert!(ids.len() > 4, "the fixture's tokenizer spells emoji in bytes");
    let mut decoder = IncrementalDecoder::new(tokenizer.clone(), &[]);
    let pushes: Vec<String> = ids.iter().map(|&id| decoder.push(id)).collect();
    assert!(pushes.iter().all(|push| !push.contains('\u{fffd}')));
    assert_eq!(pushes.concat(), "😀你");
    assert_eq!(decoder.finish(), "");

    let mut decoder = IncrementalDecoder::new(tokenizer, &[]);
    assert_eq!(decoder.push(ids[0]), "");
    assert_eq!(decoder.finish(), "\u{fffd}");
    assert_eq!(decoder.finish(), "");
}

#[test]
fn a_continuation_keeps_the_blank_that_a_text_of_its_own_drops() {
    let tokenizer = tokenizer("brackets");
    let prompt = tokenizer.encode("Hello").unwrap();
    let ids = tokenizer.encode_plain("there").unwrap();
    let text = |prompt: &[u32]| {
        let mut decoder = IncrementalDecoder::new(tokenizer.clone(), prompt);
        ids.iter().map(|&id| decoder.push(id)).collect::<String>()
    };
    assert_eq!(text(&prompt), " there");
    assert_eq!(text(&[]), "there");
    // A special token is no text: behind BOS alone the text still begins.
    assert_eq!(text(tokenizer.bos()), "there");
}

#[test]
fn tokens_are_shown_with_specials_and_broken_bytes() {
    let tokenizer = tokenizer("chatml");
    let end = tokenizer.token_to_id("<|im_end|>").unwrap();
    assert!(tokenizer.is_special(end));
    assert_eq!(tokenizer.token_text(end).unwrap(), "<|im_end|>");
    assert_eq!(tokenizer.decode(&[end]), "");
    let first = tokenizer.encode_plain("😀").unwrap()[0];
    assert!(tokenizer.token_bytes(first).unwrap().starts_with(&[0xf0]));
    assert_eq!(tokenizer.token_text(first).unwrap(), "\u{fffd}");
    assert_eq!(tokenizer.token_text(1 << 30), None);
}

#[test]
fn what_is_no_tokenizer_is_refused() {
    assert!(matches!(Tokenizer::from_bytes(b"{}"), Err(Error::Tokenizer(_))));
    let missing = Tokenizer::from_file("no/such/tokenizer.json");
    assert!(matches!(missing, Err(Error::Io { .. })));
    let mut file = fixture_json("chatml", "tokenizer.json");
    file["decoder"] = serde_json::json!({"type": "WordPiece", "prefix": "##", "cleanup": true});
    let error = Tokenizer::from_bytes(file.to_string().as_bytes()).unwrap_err();
    assert!(error.to_string().contains("WordPiece"), "{error}");
}

/// The metadata of a GGUF file made from the same tokenizer.
fn metadata(name: &str) -> HashMap<String, gguf_file::Value> {
    let file = fixture_json(name, "tokenizer.json");
    let mut tokens: Vec<(u32, String)> = Vec::new();
    for (token, id) in file["model"]["vocab"].as_object().unwrap() {
        tokens.push((id.as_u64().unwrap() as u32, token.clone()));
    }
    for added in file["added_tokens"].as_array().unwrap() {
        let id = added["id"].as_u64().unwrap() as u32;
        tokens.push((id, added["content"].as_str().unwrap().to_owned()));
    }
    tokens.sort();
    tokens.dedup();
    assert!(tokens.iter().zip(0..).all(|((id, _), index)| *id == index));
    let tokens = tokens.into_iter().map(|(_, token)| gguf_file::Value::String(token));
    let mut metadata = HashMap::new();
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    metadata.insert(key("tokens"), gguf_file::Value::Array(tokens.collect()));
    for (name, value) in fixture_json(name, "gguf.json").as_object().unwrap() {
        let value = match value {
            Value::Array(items) if name.ends_with("scores") => gguf_file::Value::Array(
                items
                    .iter()
                    .map(|score| gguf_file::Value::F32(score.as_f64().unwrap() as f32))
                    .collect(),
            ),
            Value::Array(items) => gguf_file::Value::Array(
                items
                    .iter()
                    .map(|kind| gguf_file::Value::I32(kind.as_i64().unwrap() as i32))
                    .collect(),
            ),
            Value::Bool(flag) => gguf_file::Value::Bool(*flag),
            Value::Number(id) => gguf_file::Value::U32(id.as_u64().unwrap() as u32),
            other => gguf_file::Value::String(other.as_str().unwrap().to_owned()),
        };
        metadata.insert(name.clone(), value);
    }
    if metadata.contains_key("tokenizer.ggml.pre") {
        let merges = file["model"]["merges"].as_array().unwrap().iter();
        let merges = merges.map(|pair| {
            let [left, right] = [0, 1].map(|side| pair[side].as_str().unwrap());
            gguf_file::Value::String(format!("{left} {right}"))
        });
        metadata.insert(key("merges"), gguf_file::Value::Array(merges.collect()));
    }
    metadata
}

/// For the SentencePiece kind the merges are derived from scores alone.
#[test]
fn tokenizers_out_of_gguf_equal_hugging_face_s() {
    for name in FIXTURES.into_iter().filter(|&name| name != "inst") {
        let tokenizer = tokenizer_from_metadata(&metadata(name)).unwrap();
        for case in fixture_json(name, "strings.json").as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            let raw = tokenizer.encode(text).unwrap();
            assert_eq!(raw, ids(&case["raw"]), "{name}: {text:?}");
            let plain = tokenizer.encode_plain(text).unwrap();
            let decoded = tokenizer.decode(&plain);
            assert_eq!(decoded, case["decoded"].as_str().unwrap(), "{name}: {text:?}");
        }
    }
}

#[test]
fn gguf_carries_stop_tokens_and_the_template() {
    let mut metadata = metadata("headers");
    let tokenizer = tokenizer_from_metadata(&metadata).unwrap();
    let end = tokenizer.token_to_id("<|eot_id|>").unwrap();
    assert_eq!(stop_tokens_from_metadata(&metadata), [end]);
    assert!(chat_template_from_metadata(&metadata).unwrap().is_none());
    let source = gguf_file::Value::String("{{ bos_token }}|{{ eos_token }}".into());
    metadata.insert("tokenizer.chat_template".into(), source);
    let template = chat_template_from_metadata(&metadata).unwrap().unwrap();
    let text = template.render(&Default::default()).unwrap();
    assert_eq!(text, "<|begin_of_text|>|<|eot_id|>");
}

#[test]
fn gguf_that_would_be_read_wrongly_is_refused_by_name() {
    let refusal = |key: &str, value: Option<gguf_file::Value>| {
        let mut metadata = metadata("chatml");
        metadata.remove(key);
        metadata.extend(value.map(|value| (key.to_owned(), value)));
        tokenizer_from_metadata(&metadata).unwrap_err().to_string()
    };
    let text = |text: &str| Some(gguf_file::Value::String(text.into()));
    assert!(refusal("tokenizer.ggml.pre", text("poro-chat")).contains("poro-chat"));
    assert!(refusal("tokenizer.ggml.model", text("bert")).contains("bert"));
    assert!(refusal("tokenizer.ggml.model", text("llama")).contains("tokenizer.ggml.scores"));
    assert!(refusal("tokenizer.ggml.merges", None).contains("tokenizer.ggml.merges"));
    assert!(refusal("tokenizer.ggml.tokens", None).contains("tokenizer.ggml.tokens"));
    let short = Some(gguf_file::Value::Array(vec![gguf_file::Value::I32(1)]));
    assert!(refusal("tokenizer.ggml.token_type", short).contains("1 entries"));
}
