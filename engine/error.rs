//! What can go wrong between a request and its answer.

use std::sync::Arc;

/// A request that can't be served, or an engine that can't be started.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    #[error("{name} is {value}, it must be at least {least}")]
    LimitTooSmall { name: &'static str, value: usize, least: usize },
    #[error("{name} is {value}, it must be at most {most}")]
    LimitTooLarge { name: &'static str, value: usize, most: usize },
    #[error("the prompt is empty, it needs at least one token")]
    EmptyPrompt,
    #[error("token id {token} is outside the vocabulary of {vocab_size}")]
    UnknownToken { token: u32, vocab_size: usize },
    #[error(
        "the prompt has {prompt_tokens} tokens, the model takes at most {max_model_len} \
         including at least one to generate; shorten it or raise --max-model-len"
    )]
    PromptTooLong { prompt_tokens: usize, max_model_len: usize },
    #[error(
        "prompt ({prompt_tokens} tokens) plus max_tokens ({max_tokens}) exceed the model's \
         length of {max_model_len}"
    )]
    TooManyTokens { prompt_tokens: usize, max_tokens: usize, max_model_len: usize },
    #[error(
        "the request needs {needed} KV blocks, the pool has {available}; \
         raise --kv-memory or shorten the request"
    )]
    PoolTooSmall { needed: usize, available: usize },
    #[error(
        "the KV pool of {pool_bytes} bytes holds {available} blocks, one sequence of \
         {max_model_len} tokens needs {needed}; raise --kv-memory or lower --max-model-len"
    )]
    PoolTooSmallForOneSequence {
        pool_bytes: u64,
        available: usize,
        needed: usize,
        max_model_len: usize,
    },
    #[error(
        "a KV pool of {pool_bytes} bytes is more than the {free} bytes of memory that are free; \
         lower --kv-memory"
    )]
    PoolBeyondMemory { pool_bytes: u64, free: u64 },
    #[error(
        "{asked} bytes for KV beside the pool are more than the {free} bytes of memory that are \
         free; lower --host-memory"
    )]
    HostBeyondMemory { asked: u64, free: u64 },
    #[error(
        "gpu_memory_utilization is {share}, it must be above 0 and at most 1: the share of the \
         GPU's memory to use"
    )]
    Utilization { share: f64 },
    #[error(
        "tenant_share is {share}, it must be above 0 and at most 1: the share of the pool to use"
    )]
    TenantShare { share: f64 },
    #[error("a GPU computes in bf16 or f16, not in f32; use --dtype bf16 or --device cpu")]
    NoF32,
    #[error(
        "on a GPU KV has the type of what is computed: {kv} KV beside {weights} weights can't be; \
         leave --kv-dtype out"
    )]
    KvOfAnotherType { weights: &'static str, kv: &'static str },
    #[error(
        "KV held as int8 can't be written as int8 again; use --kv-codec planes or raw, or another \
         --kv-dtype"
    )]
    Int8Twice,
    #[error("max_model_len {asked} exceeds the {supported} positions the model was made for")]
    LengthBeyondModel { asked: usize, supported: usize },
    #[error("{0}")]
    Sampling(String),
    #[error("the grammar can't be used: {reason}")]
    Grammar { reason: String },
    #[error("stop strings and grammars need a tokenizer, this model has none")]
    NoTokenizer,
    #[error("stop string {index} is empty")]
    EmptyStop { index: usize },
    #[error(
        "the active chunks take {chunks} tokens, the system text {header} and the last message \
         {message}, together more than the {room} there is room for; deactivate chunks, shorten \
         the texts, lower --max-tokens or raise --max-model-len"
    )]
    ContextTooLong { chunks: usize, header: usize, message: usize, room: usize },
    #[error("the kept context has a {what} that this program doesn't know: {value}")]
    NotAContext { what: &'static str, value: String },
    #[error("{name} can't be a chunk: it is {reason}")]
    NotAChunk { name: String, reason: String },
    #[error("No chunk found matching: {text}")]
    UnknownChunk { text: String },
    #[error(
        "Ambiguous chunk prefix: {text}. Matches: {}",
        matches.iter().map(|id| format!("{id}...")).collect::<Vec<_>>().join(", ")
    )]
    AmbiguousChunk { text: String, matches: Vec<String> },
    #[error("chunk {chunk}... has no KV to save; it must be encoded first")]
    NoKv { chunk: String },
    #[error(
        "the KV of chunk {chunk}... takes {bytes} bytes, the host holds {budget} in all; \
         raise --host-memory"
    )]
    HostTooSmall { chunk: String, bytes: u64, budget: u64 },
    #[error("nothing can be saved: {reason}")]
    NoStore { reason: String },
    #[error("over the {budget} bytes a minute that are written unasked")]
    WriteBudget { budget: u64 },
    #[error("chunk {chunk}... is not kept, so its KV is not written unasked; save it first")]
    NotKept { chunk: String },
    #[error(
        "log-probabilities of the prompt can't be asked for where chunks are switched off or \
         recomputed; use --reuse exact or independent"
    )]
    HiddenPromptLogprobs,
    #[error("the queue is full ({limit} requests wait); try again later")]
    QueueFull { limit: usize },
    #[error("the model produced a value that is not a number, first in {layer}")]
    NotANumber { layer: String },
    #[error(transparent)]
    Model(Arc<strand_models::Error>),
    #[error("tensor operation failed: {0}")]
    Tensor(Arc<candle_core::Error>),
    #[error(transparent)]
    Device(Arc<strand_kernels::Error>),
    #[error(transparent)]
    Store(Arc<crate::store::StoreError>),
    #[error("the code that reads and writes files has failed at this, and says where; try again")]
    FilesFailed,
    #[error("the engine has stopped")]
    Stopped,
}

impl From<crate::store::StoreError> for Error {
    fn from(error: crate::store::StoreError) -> Self {
        Self::Store(Arc::new(error))
    }
}

impl From<strand_models::Error> for Error {
    fn from(error: strand_models::Error) -> Self {
        Self::Model(Arc::new(error))
    }
}

impl From<strand_kernels::Error> for Error {
    fn from(error: strand_kernels::Error) -> Self {
        Self::Device(Arc::new(error))
    }
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        Self::Tensor(Arc::new(error))
    }
}

/// Refuses a limit below its least value, by name.
pub(crate) fn at_least(name: &'static str, value: usize, least: usize) -> Result<(), Error> {
    if value < least { Err(Error::LimitTooSmall { name, value, least }) } else { Ok(()) }
}

/// Refuses a limit above its largest value, by name.
pub(crate) fn at_most(name: &'static str, value: usize, most: usize) -> Result<(), Error> {
    if value > most { Err(Error::LimitTooLarge { name, value, most }) } else { Ok(()) }
}
