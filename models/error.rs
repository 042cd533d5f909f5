//! What can go wrong between a name on the command line and a loaded model.
//!
//! Every variant names the file, tensor or key at fault with the value found there; where the
//! remedy is not plain from that, the text says it.

use std::path::PathBuf;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    // Where the model is.
    #[error("no model at {path}: {reason}")]
    NotAModel { path: PathBuf, reason: String },
    #[error("{text} is neither a folder, a .gguf file nor a hub id like Qwen/Qwen3-0.6B")]
    UnknownSource { text: String },
    #[error("cannot read {path}: {source}")]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{what} is not valid JSON: {source}")]
    Json { what: String, source: serde_json::Error },

    // What config.json (or the GGUF header) says.
    #[error("architecture {found} is not supported; supported are {supported}")]
    Architecture { found: String, supported: String },
    #[error("the model's config lacks {key}")]
    ConfigMissing { key: String },
    #[error("the model's config has {key} = {value}: {expected}")]
    ConfigInvalid { key: String, value: String, expected: String },
    #[error("the model's config has {key} = {value}, which is not supported: {remedy}")]
    ConfigUnsupported { key: String, value: String, remedy: String },

    // What the weights hold.
    #[error("{path} is damaged: {reason}; download or copy it again")]
    Damaged { path: PathBuf, reason: String },
    #[error("{index} names shard {shard} for tensor {tensor}, but that file is missing")]
    ShardMissing { index: PathBuf, shard: String, tensor: String },
    #[error("tensor {name} is missing from {place}")]
    TensorMissing { name: String, place: String },
    #[error("tensor {name} in {place} has shape {found:?}, the config asks for {expected:?}")]
    TensorShape { name: String, place: String, found: Vec<usize>, expected: Vec<usize> },
    #[error("tensor {name} in {place} has type {found}, supported are {supported}")]
    TensorType { name: String, place: String, found: String, supported: String },
    #[error(
        "tensors {first} and {second} differ although the config ties them; \
         set tie_word_embeddings to false to use both"
    )]
    TiedTensorsDiffer { first: String, second: String },

    #[error(
        "the checkpoint holds tensors the config doesn't declare: {}; \
         config.json belongs to another model or misses a setting",
        first_few(names)
    )]
    TensorsUnused { names: Vec<String> },

    // The hub.
    #[error(
        "{id} is not in the cache {cache} (file {file}) and HF_HUB_OFFLINE is set; \
         unset it to download the model"
    )]
    HubOffline { id: String, file: String, cache: PathBuf },
    #[error(
        "the hub refuses {id} (status {status}): the model is private, gated or does not exist; \
         accept its terms on its page and set HF_TOKEN"
    )]
    HubDenied { id: String, status: u16 },
    #[error("the hub has no model {id}; check the id's spelling")]
    HubNoModel { id: String },
    #[error("the hub's model {id} has no {file}; only safetensors checkpoints are taken from it")]
    HubNotFound { id: String, file: String },
    #[error("cannot download {file} of {id}: {reason}")]
    HubFailed { id: String, file: String, reason: String },

    // Text.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    #[error("chat template: {0}")]
    ChatTemplate(String),

    #[error("text {index} has {tokens} tokens, the embedding model takes at most {max}")]
    TextTooLong { index: usize, tokens: usize, max: usize },

    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    #[error(transparent)]
    Device(#[from] strand_kernels::Error),
}

/// The first names of a long list, and how many more there are.
fn first_few(names: &[String]) -> String {
    const SHOWN: usize = 4;
    let shown = names.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
    match names.len() {
        0..=SHOWN => shown,
        all => format!("{shown} and {} more", all - SHOWN),
    }
}

/// Refuses a tensor of another shape than the config asks for.
pub(crate) fn check_shape(
    name: &str,
    place: impl Fn() -> String,
    found: &[usize],
    expected: &[usize],
) -> Result<(), Error> {
    if found == expected {
        return Ok(());
    }
    let (name, place) = (name.to_string(), place());
    Err(Error::TensorShape { name, place, found: found.to_vec(), expected: expected.to_vec() })
}
