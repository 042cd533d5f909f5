//! What was asked (`EngineConfig`) and what it means (`EnginePlan`).

use std::fmt;

use strand_kernels::{KvDtype, WeightDtype};
use strand_models::ModelConfig;

use crate::error::Error;

/// What the user gave; `None` leaves the choice to [`EnginePlan::resolve`].
#[derive(Debug, Clone, PartialEq)]
pub struct EngineConfig {
    /// Of the weights and the products.
    pub dtype: Option<WeightDtype>,
    pub kv_dtype: Option<KvDtype>,
    pub block_size: usize,
    /// Bytes of KV kept for all sequences.
    pub kv_memory: Option<u64>,
    pub max_num_seqs: usize,
    pub max_num_batched_tokens: usize,
    pub max_model_len: Option<usize>,
    /// Requests that may wait.
    pub max_queue: usize,
    pub threads: Option<usize>,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            dtype: None,
            kv_dtype: None,
            block_size: 16,
            kv_memory: None,
            max_num_seqs: 256,
            max_num_batched_tokens: 1024,
            max_model_len: None,
            max_queue: 1024,
            threads: None,
        }
    }
}

/// What the machine offers, passed in so that a plan is a pure function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Machine {
    pub free_memory: u64,
    pub threads: usize,
}

/// What was decided. Immutable; printed at start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EnginePlan {
    pub dtype: WeightDtype,
    pub kv_dtype: KvDtype,
    pub block_size: usize,
    pub num_blocks: usize,
    /// Of one block, all layers, K and V.
    pub block_bytes: u64,
    pub max_num_seqs: usize,
    pub max_num_batched_tokens: usize,
    pub max_model_len: usize,
    pub max_queue: usize,
    pub threads: usize,
    pub vocab_size: usize,
}

/// Share of the free memory that KV takes when the user says nothing.
const KV_SHARE: f64 = 0.5;
/// A context longer than this is taken only when asked for: KV is paid for in advance.
const DEFAULT_MAX_MODEL_LEN: usize = 32_768;

impl EnginePlan {
    /// Decides everything the user left open; refuses what can't work, with the numbers.
    pub fn resolve(
        asked: &EngineConfig,
        model: &ModelConfig,
        machine: &Machine,
    ) -> Result<Self, Error> {
        for (name, value) in [
            ("block_size", asked.block_size),
            ("max_num_seqs", asked.max_num_seqs),
            ("max_num_batched_tokens", asked.max_num_batched_tokens),
            ("max_queue", asked.max_queue),
            ("threads", asked.threads.unwrap_or(1)),
        ] {
            at_least(name, value, 1)?;
        }
        at_least("max_model_len", asked.max_model_len.unwrap_or(2), 2)?;
        let supported = model.max_position_embeddings;
        if let Some(length) = asked.max_model_len.filter(|&length| length > supported) {
            return Err(Error::LengthBeyondModel { asked: length, supported });
        }
        let dtype = asked.dtype.unwrap_or(model.dtype);
        let kv_dtype = asked.kv_dtype.unwrap_or(match dtype {
            WeightDtype::F32 => KvDtype::F32,
            WeightDtype::F16 => KvDtype::F16,
            WeightDtype::Bf16 => KvDtype::Bf16,
        });
        let row = model.num_key_value_heads * model.head_dim * kv_dtype.size();
        let block_bytes = (2 * model.num_hidden_layers * asked.block_size * row) as u64;
        let wanted_len = asked.max_model_len.unwrap_or(supported.min(DEFAULT_MAX_MODEL_LEN));
        let blocks_of = |tokens: usize| tokens.div_ceil(asked.block_size);
        let pool_bytes = asked.kv_memory.unwrap_or_else(|| {
            let all = (asked.max_num_seqs * blocks_of(wanted_len)) as u64 * block_bytes;
            all.min((machine.free_memory as f64 * KV_SHARE) as u64)
        });
        let num_blocks = usize::try_from(pool_bytes / block_bytes).unwrap_or(usize::MAX);
        let max_model_len = match asked.max_model_len {
            // the default gives way to the memory there is, a user's word does not
            None => wanted_len.min(num_blocks * asked.block_size),
            Some(length) => length,
        };
        if max_model_len < 2 || num_blocks < blocks_of(max_model_len) {
            return Err(Error::PoolTooSmallForOneSequence {
                pool_bytes,
                available: num_blocks,
                needed: blocks_of(max_model_len.max(2)),
                max_model_len: max_model_len.max(2),
            });
        }
        Ok(Self {
            dtype,
            kv_dtype,
            block_size: asked.block_size,
            num_blocks,
            block_bytes,
            max_num_seqs: asked.max_num_seqs,
            max_num_batched_tokens: asked.max_num_batched_tokens,
            max_model_len,
            max_queue: asked.max_queue,
            threads: asked.threads.unwrap_or(machine.threads),
            vocab_size: model.vocab_size,
        })
    }
}

fn at_least(name: &'static str, value: usize, least: usize) -> Result<(), Error> {
    if value < least {
        return Err(Error::LimitTooSmall { name, value, least });
    }
    Ok(())
}

impl fmt::Display for EnginePlan {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let mib = (self.num_blocks as u64 * self.block_bytes) as f64 / (1 << 20) as f64;
        write!(
            f,
            "weights {}, kv {}: {} blocks of {} tokens ({mib:.0} MiB); \
             at most {} tokens a sequence, {} sequences, {} tokens a step; {} threads",
            self.dtype.name(),
            self.kv_dtype.name(),
            self.num_blocks,
            self.block_size,
            self.max_model_len,
            self.max_num_seqs,
            self.max_num_batched_tokens,
            self.threads,
        )
    }
}
