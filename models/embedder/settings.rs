//! What a folder of sentence-transformers says besides the weights.

use std::path::Path;

use candle_transformers::models::bert::Config;
use serde_json::Value;

use crate::error::Error;

/// Which hidden states a vector is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    Mean,
    /// That of the first token, `[CLS]`.
    First,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    pub dim: usize,
    pub max_len: usize,
    pub pooling: Pooling,
    /// Whether vectors have length 1.
    pub normalizes: bool,
    /// The token that fills up the shorter texts of a batch.
    pub padding: u32,
}

/// The network's config and what is done before and behind it.
pub fn read(folder: &Path) -> Result<(Config, Settings), Error> {
    let config = read_json(&folder.join("config.json"))?;
    let model_type = config["model_type"].as_str().unwrap_or("none");
    if model_type != "bert" {
        let (found, supported) = (model_type.to_string(), "bert".to_string());
        return Err(Error::Architecture { found, supported });
    }
    let config: Config = serde_json::from_value(config)
        .map_err(|source| Error::Json { what: "config.json of the embedder".into(), source })?;
    check(&config)?;
    let own = read_optional(&folder.join("sentence_bert_config.json"))?;
    let asked = own["max_seq_length"].as_u64().unwrap_or(u64::MAX) as usize;
    let settings = Settings {
        dim: config.hidden_size,
        max_len: asked.min(config.max_position_embeddings),
        pooling: pooling(&read_optional(&folder.join("1_Pooling/config.json"))?)?,
        normalizes: normalizes(&read_optional(&folder.join("modules.json"))?)?,
        padding: config.pad_token_id as u32,
    };
    Ok((config, settings))
}

/// Refuses numbers that the network can't be built with.
fn check(config: &Config) -> Result<(), Error> {
    let invalid = |key: &str, value: usize, expected: &str| {
        let (key, expected) = (key.to_string(), expected.to_string());
        Err(Error::ConfigInvalid { key, value: value.to_string(), expected })
    };
    let (hidden, heads) = (config.hidden_size, config.num_attention_heads);
    if heads == 0 || hidden == 0 || !hidden.is_multiple_of(heads) {
        return invalid("hidden_size", hidden, "a multiple of num_attention_heads, both above 0");
    }
    if config.pad_token_id >= config.vocab_size {
        return invalid("pad_token_id", config.pad_token_id, "a token of the vocabulary");
    }
    if config.max_position_embeddings == 0 {
        return invalid("max_position_embeddings", 0, "at least 1");
    }
    Ok(())
}

/// Absent, it is the mean.
fn pooling(config: &Value) -> Result<Pooling, Error> {
    let Some(config) = config.as_object() else { return Ok(Pooling::Mean) };
    let modes = config.iter().filter(|(key, on)| key.starts_with("pooling_mode_") && **on == true);
    let modes: Vec<&str> = modes.map(|(key, _)| key.as_str()).collect();
    match modes[..] {
        [] | ["pooling_mode_mean_tokens"] => Ok(Pooling::Mean),
        ["pooling_mode_cls_token"] => Ok(Pooling::First),
        _ => Err(Error::ConfigUnsupported {
            key: "1_Pooling/config.json".into(),
            value: modes.join(", "),
            remedy: "pooling is by the mean or by the first token".into(),
        }),
    }
}

/// Whether the last of the modules makes vectors of length 1. Others than these change them.
fn normalizes(modules: &Value) -> Result<bool, Error> {
    let mut found = false;
    for module in modules.as_array().into_iter().flatten() {
        let kind = module["type"].as_str().unwrap_or_default();
        match kind.rsplit('.').next() {
            Some("Transformer" | "Pooling") => {}
            Some("Normalize") => found = true,
            _ => {
                return Err(Error::ConfigUnsupported {
                    key: "modules.json".into(),
                    value: kind.to_string(),
                    remedy: "modules are Transformer, Pooling and Normalize".into(),
                });
            }
        }
    }
    Ok(found)
}

/// Its tokens must have a place in the model.
pub fn tokenizer(folder: &Path, vocab_size: usize) -> Result<tokenizers::Tokenizer, Error> {
    let path = folder.join("tokenizer.json");
    let bytes = read_file(&path)?;
    let failed = |reason: String| Error::Tokenizer(format!("{}: {reason}", path.display()));
    let encoder = tokenizers::Tokenizer::from_bytes(bytes).map_err(|e| failed(e.to_string()))?;
    let largest = encoder.get_vocab(true).into_values().max().unwrap_or(0);
    if largest as usize >= vocab_size {
        return Err(failed(format!("token {largest} is outside the vocabulary of {vocab_size}")));
    }
    Ok(encoder)
}

pub fn read_file(path: &Path) -> Result<Vec<u8>, Error> {
    std::fs::read(path).map_err(|source| Error::Io { path: path.to_owned(), source })
}

fn read_json(path: &Path) -> Result<Value, Error> {
    let what = || path.display().to_string();
    serde_json::from_slice(&read_file(path)?).map_err(|source| Error::Json { what: what(), source })
}

/// Null where there is no such file.
fn read_optional(path: &Path) -> Result<Value, Error> {
    if path.exists() { read_json(path) } else { Ok(Value::Null) }
}
