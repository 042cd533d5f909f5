//! Tokenizers, stop tokens and chat templates out of GGUF metadata.
//!
//! GGUF names a pre-tokenizer (`tokenizer.ggml.pre`) instead of describing it, so only the names
//! known here can be read; another one is refused, because guessing would give other ids.

use crate::chat_template::ChatTemplate;
use crate::error::Error;
use crate::tokenizer::Tokenizer;
use candle_core::quantized::gguf_file::Value;
use serde_json::{Value as Json, json};
use std::collections::{BTreeMap, BTreeSet, HashMap};

type Metadata = HashMap<String, Value>;

/// Builds the tokenizer that the metadata describe.
pub fn tokenizer_from_metadata(metadata: &Metadata) -> Result<Tokenizer, Error> {
    let vocabulary = Vocabulary::read(metadata)?;
    let model = string(metadata, "tokenizer.ggml.model")?;
    let parts = match model {
        "gpt2" => byte_level(metadata, &vocabulary)?,
        "llama" => sentence_pieces(metadata, &vocabulary)?,
        other => {
            let remedy = "gpt2 and llama are; use the model's tokenizer.json";
            return Err(unsupported("tokenizer.ggml.model", other, remedy));
        }
    };
    let file = json!({
        "version": "1.0",
        "added_tokens": vocabulary.added_tokens(),
        "normalizer": parts.normalizer,
        "pre_tokenizer": parts.pre_tokenizer,
        "post_processor": bos_processor(metadata, &vocabulary, parts.adds_bos)?,
        "decoder": parts.decoder,
        "model": parts.model,
    });
    Tokenizer::from_bytes(file.to_string().as_bytes())
}

/// The template the file carries, if it does.
pub fn chat_template_from_metadata(metadata: &Metadata) -> Result<Option<ChatTemplate>, Error> {
    let Some(Value::String(source)) = metadata.get("tokenizer.chat_template") else {
        return Ok(None);
    };
    let tokens = array(metadata, "tokenizer.ggml.tokens")?;
    let mut special_tokens = BTreeMap::new();
    for (name, key) in [
        ("bos_token", "bos_token_id"),
        ("eos_token", "eos_token_id"),
        ("unk_token", "unknown_token_id"),
        ("pad_token", "padding_token_id"),
        ("sep_token", "seperator_token_id"),
    ] {
        let id = token_id(metadata, key);
        if let Some(Value::String(token)) = id.and_then(|id| tokens.get(id as usize)) {
            special_tokens.insert(name.to_owned(), token.clone());
        }
    }
    ChatTemplate::new(source, &special_tokens).map(Some)
}

/// The tokens that end an answer: end of text, of turn, of message.
pub fn stop_tokens_from_metadata(metadata: &Metadata) -> Vec<u32> {
    let keys = ["eos_token_id", "eot_token_id", "eom_token_id"];
    let ids: BTreeSet<u32> = keys.iter().filter_map(|key| token_id(metadata, key)).collect();
    ids.into_iter().collect()
}

/// The parts of a `tokenizer.json` that differ between the two kinds.
struct Parts {
    normalizer: Json,
    pre_tokenizer: Json,
    decoder: Json,
    model: Json,
    /// Whether BOS is put first where the file doesn't say.
    adds_bos: bool,
}

struct Vocabulary<'a> {
    tokens: Vec<&'a str>,
    kinds: Vec<Kind>,
}

/// `llama_token_type`.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

impl<'a> Vocabulary<'a> {
    fn read(metadata: &'a Metadata) -> Result<Self, Error> {
        let tokens = strings(metadata, "tokenizer.ggml.tokens")?;
        let key = "tokenizer.ggml.token_type";
        let kinds = match metadata.contains_key(key) {
            false => vec![Kind::Normal; tokens.len()],
            true => array(metadata, key)?.iter().map(Kind::read).collect::<Result<_, _>>()?,
        };
        if kinds.len() != tokens.len() {
            let expected = format!("one for each of {} tokens", tokens.len());
            return Err(wrong(key, &format!("{} entries", kinds.len()), &expected));
        }
        Ok(Self { tokens, kinds })
    }

    fn ids(&self) -> HashMap<&'a str, u32> {
        (0..).zip(&self.tokens).map(|(id, &t)| (t, id)).collect()
    }

    /// The tokens that are looked for before anything else is done to a text.
    fn added_tokens(&self) -> Vec<Json> {
        let tokens = self.tokens.iter().zip(&self.kinds).enumerate();
        tokens
            .filter_map(|(id, (token, kind))| {
                let special = match kind {
                    Kind::Control | Kind::Unknown => true,
                    Kind::UserDefined => false,
                    Kind::Normal | Kind::Unused | Kind::Byte => return None,
                };
                Some(json!({
                    "id": id, "content": token, "single_word": false, "lstrip": false,
                    "rstrip": false, "normalized": false, "special": special,
                }))
            })
            .collect()
    }
}

impl Kind {
    fn read(value: &Value) -> Result<Self, Error> {
        match integer(value) {
            Some(1) => Ok(Self::Normal),
            Some(2) => Ok(Self::Unknown),
            Some(3) => Ok(Self::Control),
            Some(4) => Ok(Self::UserDefined),
            Some(5) => Ok(Self::Unused),
            Some(6) => Ok(Self::Byte),
            _ => {
                let found = format!("{value:?}");
                Err(wrong("tokenizer.ggml.token_type", &found, "a number from 1 to 6"))
            }
        }
    }
}

/// Byte-level BPE, as GPT-2 began it.
fn byte_level(metadata: &Metadata, vocabulary: &Vocabulary) -> Result<Parts, Error> {
    let pre = match metadata.get("tokenizer.ggml.pre") {
        None => "default",
        Some(_) => string(metadata, "tokenizer.ggml.pre")?,
    };
    let byte_level = |use_regex: bool| {
        json!({
            "type": "ByteLevel", "add_prefix_space": false,
            "trim_offsets": false, "use_regex": use_regex,
        })
    };
    let split = |regex: &str| {
        json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false},
            byte_level(false),
        ]})
    };
    // Whether a piece that is a token as it stands is taken without merging.
    let (pre_tokenizer, normalizer, whole_pieces) = match pre {
        "qwen2" => (split(QWEN2), json!({"type": "NFC"}), false),
        "llama-bpe" | "llama3" | "llama-v3" => (split(LLAMA3), Json::Null, true),
        "tekken" => (split(TEKKEN), Json::Null, true),
        "smollm" => {
            let digits = json!({"type": "Digits", "individual_digits": true});
            let steps = json!({"type": "Sequence", "pretokenizers": [digits, byte_level(true)]});
            (steps, Json::Null, false)
        }
        "gpt-2" | "gpt2" | "default" => (byte_level(true), Json::Null, false),
        other => {
            let remedy = "qwen2, llama-bpe, tekken, smollm and gpt-2 are; \
                          use the model's tokenizer.json";
            return Err(unsupported("tokenizer.ggml.pre", other, remedy));
        }
    };
    let merges = strings(metadata, "tokenizer.ggml.merges")?;
    Ok(Parts {
        normalizer,
        pre_tokenizer,
        decoder: byte_level(true),
        model: json!({
            "type": "BPE", "dropout": null, "unk_token": null,
            "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": false, "ignore_merges": whole_pieces,
            "vocab": vocabulary.ids(), "merges": merges,
        }),
        adds_bos: matches!(pre, "llama-bpe" | "llama3" | "llama-v3" | "tekken"),
    })
}

/// The patterns of the models' own tokenizer.json.
const QWEN2: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const LLAMA3: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const TEKKEN: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// SentencePiece's BPE: merges follow from the scores, unknown characters become bytes.
fn sentence_pieces(metadata: &Metadata, vocabulary: &Vocabulary) -> Result<Parts, Error> {
    let key = "tokenizer.ggml.scores";
    let scores: Option<Vec<f32>> =
        array(metadata, key)?.iter().map(|score| score.to_f32().ok()).collect();
    let scores = scores.filter(|scores| scores.len() == vocabulary.tokens.len());
    let scores = scores.ok_or_else(|| wrong(key, "an array", "one f32 for each token"))?;
    let prefixed = flag(metadata, "tokenizer.ggml.add_space_prefix").unwrap_or(true);
    let spaces = json!({"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"});
    let normalizer = match prefixed {
        true => json!({"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "\u{2581}"}, spaces,
        ]}),
        false => spaces,
    };
    let mut steps = vec![
        json!({"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefixed {
        steps.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let kinds = vocabulary.kinds.iter();
    let unknown = kinds.zip(&vocabulary.tokens);
    let unknown = unknown.filter(|(kind, _)| **kind == Kind::Unknown);
    let unknown = unknown.map(|(_, token)| *token).next();
    Ok(Parts {
        normalizer,
        pre_tokenizer: Json::Null,
        decoder: json!({"type": "Sequence", "decoders": steps}),
        model: json!({
            "type": "BPE", "dropout": null, "unk_token": unknown,
            "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocabulary.ids(), "merges": merges_by_score(vocabulary, &scores),
        }),
        adds_bos: true,
    })
}

/// Every way to split a token into two others is a merge; better tokens are made first. The
/// order is that of Hugging Face's converter (`generate_merges`), ties included.
fn merges_by_score(vocabulary: &Vocabulary, scores: &[f32]) -> Vec<[String; 2]> {
    struct Merge<'a> {
        score: f32,
        lengths: (usize, usize),
        left: &'a str,
        right: &'a str,
    }
    let ids = vocabulary.ids();
    let mut merges = Vec::new();
    for (&token, &score) in vocabulary.tokens.iter().zip(scores) {
        let mut splits: Vec<_> = token
            .char_indices()
            .skip(1)
            .filter_map(|(end, _)| {
                let (left, right) = token.split_at(end);
                Some((ids.get(left)?, ids.get(right)?, left, right))
            })
            .collect();
        splits.sort();
        merges.extend(splits.into_iter().map(|(_, _, left, right)| Merge {
            // Zero has one sign here, as in Python's comparison.
            score: score + 0.0,
            lengths: (left.chars().count(), right.chars().count()),
            left,
            right,
        }));
    }
    merges.sort_by(|a, b| b.score.total_cmp(&a.score).then(b.lengths.cmp(&a.lengths)));
    merges.into_iter().map(|merge| [merge.left.to_owned(), merge.right.to_owned()]).collect()
}

fn bos_processor(
    metadata: &Metadata,
    vocabulary: &Vocabulary,
    default: bool,
) -> Result<Json, Error> {
    let adds = flag(metadata, "tokenizer.ggml.add_bos_token").unwrap_or(default);
    let Some(id) = token_id(metadata, "bos_token_id").filter(|_| adds) else {
        return Ok(Json::Null);
    };
    let Some(bos) = vocabulary.tokens.get(id as usize) else {
        let expected = format!("an id below {}", vocabulary.tokens.len());
        let key = "tokenizer.ggml.bos_token_id";
        return Err(wrong(key, &id.to_string(), &expected));
    };
    let first = json!({"SpecialToken": {"id": bos, "type_id": 0}});
    let text = |name: &str| json!({"Sequence": {"id": name, "type_id": 0}});
    Ok(json!({
        "type": "TemplateProcessing",
        "single": [first, text("A")],
        "pair": [first, text("A"), text("B")],
        "special_tokens": {*bos: {"id": bos, "ids": [id], "tokens": [bos]}},
    }))
}

fn string<'a>(metadata: &'a Metadata, key: &str) -> Result<&'a str, Error> {
    match metadata.get(key) {
        Some(Value::String(text)) => Ok(text),
        Some(other) => Err(wrong(key, &format!("{other:?}"), "text is expected")),
        None => Err(Error::ConfigMissing { key: key.into() }),
    }
}

fn array<'a>(metadata: &'a Metadata, key: &str) -> Result<&'a [Value], Error> {
    match metadata.get(key) {
        Some(Value::Array(values)) => Ok(values),
        Some(other) => Err(wrong(key, &format!("{other:?}"), "an array is expected")),
        None => Err(Error::ConfigMissing { key: key.into() }),
    }
}

fn strings<'a>(metadata: &'a Metadata, key: &str) -> Result<Vec<&'a str>, Error> {
    let values = array(metadata, key)?.iter();
    values
        .map(|value| match value {
            Value::String(text) => Ok(text.as_str()),
            other => Err(wrong(key, &format!("{other:?}"), "texts are expected")),
        })
        .collect()
}

fn flag(metadata: &Metadata, key: &str) -> Option<bool> {
    metadata.get(key).and_then(|value| value.to_bool().ok())
}

fn token_id(metadata: &Metadata, name: &str) -> Option<u32> {
    let value = metadata.get(&format!("tokenizer.ggml.{name}"))?;
    integer(value).and_then(|id| u32::try_from(id).ok())
}

fn integer(value: &Value) -> Option<i64> {
    match *value {
        Value::U8(n) => Some(n.into()),
        Value::I8(n) => Some(n.into()),
        Value::U16(n) => Some(n.into()),
        Value::I16(n) => Some(n.into()),
        Value::U32(n) => Some(n.into()),
        Value::I32(n) => Some(n.into()),
        Value::U64(n) => i64::try_from(n).ok(),
        Value::I64(n) => Some(n),
        _ => None,
    }
}

fn wrong(key: &str, value: &str, expected: &str) -> Error {
    Error::ConfigInvalid { key: key.into(), value: value.into(), expected: expected.into() }
}

fn unsupported(key: &str, value: &str, remedy: &str) -> Error {
    Error::ConfigUnsupported { key: key.into(), value: value.into(), remedy: remedy.into() }
}
