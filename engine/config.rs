//! What was asked (`EngineConfig`) and what it means (`EnginePlan`).

use std::fmt;

use strand_kernels::{KvDtype, WeightDtype};
use strand_layers::gpu_attention::GpuSizes;
use strand_models::{GpuDecoder, ModelConfig};

use crate::device::Device;
use crate::error::{Error, at_least, at_most};
use crate::store::Codec;

/// What the user gave; `None` leaves the choice to [`EnginePlan::resolve`].
#[derive(Debug, Clone, PartialEq)]
pub struct EngineConfig {
    /// Where to compute.
    pub device: Device,
    /// On a GPU: a row's bits depend on nothing but what it sees. On the CPU they never do.
    pub deterministic: bool,
    /// Share of a GPU's memory that weights, workspaces and KV may take together.
    pub gpu_memory_utilization: f64,
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
    /// Of the pool and of the running sequences, what one tenant may take; `None`: all.
    pub tenant_share: Option<f64>,
    pub threads: Option<usize>,
    /// Bytes of KV kept beside the pool.
    pub host_memory: Option<u64>,
    /// How KV is written to the disk.
    pub kv_codec: Codec,
    /// Bytes that files of KV may take.
    pub disk_space: u64,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            device: Device::Cpu,
            deterministic: false,
            gpu_memory_utilization: 0.9,
            dtype: None,
            kv_dtype: None,
            block_size: 16,
            kv_memory: None,
            max_num_seqs: 256,
            max_num_batched_tokens: 1024,
            max_model_len: None,
            max_queue: 1024,
            tenant_share: None,
            threads: None,
            host_memory: None,
            kv_codec: Codec::default(),
            disk_space: 16 << 30,
        }
    }
}

impl EngineConfig {
    /// What a step on a GPU has of each at most.
    pub(crate) fn gpu_sizes(&self, positions: usize) -> GpuSizes {
        let (tokens, sequences) = (self.max_num_batched_tokens, self.max_num_seqs);
        GpuSizes { tokens, sequences, positions }
    }

    /// Refuses what no machine and no such model can do.
    fn check(&self, model: &ModelConfig) -> Result<(), Error> {
        for (name, value) in [
            ("block_size", self.block_size),
            ("max_num_seqs", self.max_num_seqs),
            ("max_num_batched_tokens", self.max_num_batched_tokens),
            ("max_queue", self.max_queue),
            ("threads", self.threads.unwrap_or(1)),
        ] {
            at_least(name, value, 1)?;
        }
        at_most("block_size", self.block_size, MAX_BLOCK_SIZE)?;
        at_most("threads", self.threads.unwrap_or(1), MAX_THREADS)?;
        at_least("max_model_len", self.max_model_len.unwrap_or(2), 2)?;
        let is_share = |share: f64| share > 0.0 && share <= 1.0;
        let share = self.gpu_memory_utilization;
        if !is_share(share) {
            return Err(Error::Utilization { share });
        }
        if let Some(share) = self.tenant_share.filter(|&share| !is_share(share)) {
            return Err(Error::TenantShare { share });
        }
        let supported = model.max_position_embeddings;
        match self.max_model_len {
            Some(asked) if asked > supported => Err(Error::LengthBeyondModel { asked, supported }),
            _ => Ok(()),
        }
    }
}

/// What the machine offers, passed in so that a plan is a pure function.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    pub free_memory: u64,
    pub threads: usize,
    /// The GPU that computes, if one does.
    pub gpu: Option<GpuFacts>,
}

/// A GPU as a plan sees it; memory in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GpuFacts {
    /// As `--device` spells it.
    pub device: String,
    pub free_memory: u64,
    pub total_memory: u64,
}

/// What was decided. Immutable; printed at start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EnginePlan {
    /// As `--device` spells it.
    pub device: String,
    pub deterministic: bool,
    pub dtype: WeightDtype,
    /// Bytes of the weights.
    pub weight_bytes: u64,
    pub kv_dtype: KvDtype,
    pub block_size: usize,
    pub num_blocks: usize,
    /// Of one block, all layers, K and V.
    pub block_bytes: u64,
    pub max_num_seqs: usize,
    pub max_num_batched_tokens: usize,
    pub max_model_len: usize,
    pub max_queue: usize,
    /// What one tenant may take; `None`: all there is.
    pub tenant: Option<TenantLimits>,
    pub threads: usize,
    pub vocab_size: usize,
    /// Bytes of KV kept beside the pool.
    pub host_memory: u64,
    /// How KV is written that nobody asked to be written.
    pub kv_codec: Codec,
    /// Bytes that files of KV may take.
    pub disk_space: u64,
    /// So many keys cost attention as much as all products of a token cost.
    pub attention_scale: usize,
}

/// What one tenant may take at a time, so that others find room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TenantLimits {
    /// Of the pool. A sequence that is the tenant's only one has what it needs.
    pub blocks: usize,
    /// Sequences that run.
    pub seqs: usize,
}

impl TenantLimits {
    /// At least one of each.
    fn of(asked: &EngineConfig, num_blocks: usize) -> Option<Self> {
        let share = asked.tenant_share?;
        let of = |all: usize| ((all as f64 * share) as usize).max(1);
        Some(Self { blocks: of(num_blocks), seqs: of(asked.max_num_seqs) })
    }
}

/// A page entry counts its rows in 16 bits.
const MAX_BLOCK_SIZE: usize = u16::MAX as usize;
/// What a grid of a GPU has of blocks in its second direction.
const MAX_GPU_ROWS: usize = u16::MAX as usize;
/// More than any machine has; each takes a stack.
const MAX_THREADS: usize = 1024;
/// Share of the memory left beside the weights that KV takes when the user says nothing.
const KV_SHARE: f64 = 0.5;
/// Share of the memory left beside the pool that the host tier may fill.
const HOST_SHARE: f64 = 0.25;
/// A context longer than this is taken only when asked for: KV is paid for in advance.
const DEFAULT_MAX_MODEL_LEN: usize = 32_768;

impl EnginePlan {
    /// Decides everything the user left open; refuses what can't work, with the numbers.
    /// `weight_bytes` says what the weights take in a type.
    pub fn resolve(
        asked: &EngineConfig,
        model: &ModelConfig,
        weight_bytes: impl Fn(WeightDtype) -> u64,
        machine: &Machine,
    ) -> Result<Self, Error> {
        asked.check(model)?;
        if machine.gpu.is_some() {
            at_most("max_num_batched_tokens", asked.max_num_batched_tokens, MAX_GPU_ROWS)?;
            at_most("max_num_seqs", asked.max_num_seqs, MAX_GPU_ROWS)?;
        }
        let (dtype, kv_dtype) = types(asked, model, machine)?;
        let weight_bytes = weight_bytes(dtype);
        let supported = model.max_position_embeddings;
        let block_bytes = block_bytes(model, asked.block_size, kv_dtype);
        let wanted_len = asked.max_model_len.unwrap_or(supported.min(DEFAULT_MAX_MODEL_LEN));
        let blocks_of = |tokens: usize| tokens.div_ceil(asked.block_size);
        let budget = Budget::of(asked, model, machine, (weight_bytes, wanted_len));
        let pool_bytes = asked.kv_memory.unwrap_or_else(|| {
            let all = block_bytes
                .saturating_mul(asked.max_num_seqs as u64)
                .saturating_mul(blocks_of(wanted_len) as u64);
            // what a GPU has left keeps chunks; a computer's memory has other uses
            if machine.gpu.is_some() { budget.pool } else { all.min(budget.pool) }
        });
        if pool_bytes > budget.free {
            return Err(Error::PoolBeyondMemory { pool_bytes, free: budget.free });
        }
        let host_memory = host_memory(asked, machine, pool_bytes)?;
        // a KV row's number has 32 bits
        let addressable = u32::MAX as usize / asked.block_size;
        let num_blocks = usize::try_from(pool_bytes / block_bytes).unwrap_or(usize::MAX);
        let num_blocks = num_blocks.min(addressable);
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
            device: machine.gpu.as_ref().map_or("cpu", |gpu| &gpu.device).to_owned(),
            deterministic: asked.deterministic || machine.gpu.is_none(),
            dtype,
            weight_bytes,
            kv_dtype,
            block_size: asked.block_size,
            num_blocks,
            block_bytes,
            max_num_seqs: asked.max_num_seqs,
            max_num_batched_tokens: asked.max_num_batched_tokens,
            max_model_len,
            max_queue: asked.max_queue,
            tenant: TenantLimits::of(asked, num_blocks),
            threads: asked.threads.unwrap_or(machine.threads),
            vocab_size: model.vocab_size,
            host_memory,
            kv_codec: asked.kv_codec,
            disk_space: asked.disk_space,
            attention_scale: attention_scale(model),
        })
    }
}

/// Bytes of KV kept beside a pool of so many.
fn host_memory(asked: &EngineConfig, machine: &Machine, pool_bytes: u64) -> Result<u64, Error> {
    let bytes = asked.host_memory.unwrap_or_else(|| {
        let pool = if machine.gpu.is_some() { 0 } else { pool_bytes };
        let left = machine.free_memory.saturating_sub(pool);
        (left as f64 * HOST_SHARE) as u64
    });
    let free = machine.free_memory;
    if bytes > free { Err(Error::HostBeyondMemory { asked: bytes, free }) } else { Ok(bytes) }
}

/// The types weights compute in and KV is stored in. A GPU has no products of f32.
fn types(
    asked: &EngineConfig,
    model: &ModelConfig,
    machine: &Machine,
) -> Result<(WeightDtype, KvDtype), Error> {
    let on_gpu = machine.gpu.is_some();
    if on_gpu && (asked.dtype == Some(WeightDtype::F32) || asked.kv_dtype == Some(KvDtype::F32)) {
        return Err(Error::NoF32);
    }
    let dtype = match asked.dtype.unwrap_or(model.dtype) {
        WeightDtype::F32 if on_gpu => WeightDtype::Bf16,
        dtype => dtype,
    };
    let kv_dtype = asked.kv_dtype.unwrap_or(match dtype {
        WeightDtype::F32 => KvDtype::F32,
        WeightDtype::F16 | WeightDtype::Quantized => KvDtype::F16,
        WeightDtype::Bf16 => KvDtype::Bf16,
    });
    if kv_dtype == KvDtype::Int8 && asked.kv_codec == Codec::Int8 {
        return Err(Error::Int8Twice);
    }
    let computed = if dtype == WeightDtype::Bf16 { KvDtype::Bf16 } else { KvDtype::F16 };
    if on_gpu && kv_dtype != computed {
        return Err(Error::KvOfAnotherType { weights: dtype.name(), kv: kv_dtype.name() });
    }
    Ok((dtype, kv_dtype))
}

/// Bytes where KV may lie.
struct Budget {
    /// More can't be had.
    free: u64,
    /// For the pool when the user says nothing.
    pool: u64,
}

impl Budget {
    fn of(
        asked: &EngineConfig,
        model: &ModelConfig,
        machine: &Machine,
        (weights, length): (u64, usize),
    ) -> Self {
        let Some(gpu) = &machine.gpu else {
            let left = machine.free_memory.saturating_sub(weights);
            return Self { free: machine.free_memory, pool: (left as f64 * KV_SHARE) as u64 };
        };
        let sizes = asked.gpu_sizes(length);
        let workspaces = GpuDecoder::workspace_bytes(model, sizes, asked.deterministic);
        let ours = weights.saturating_add(workspaces);
        let taken = gpu.total_memory.saturating_sub(gpu.free_memory);
        let share = (gpu.total_memory as f64 * asked.gpu_memory_utilization) as u64;
        Self {
            free: gpu.free_memory.saturating_sub(ours),
            pool: share.saturating_sub(taken).saturating_sub(ours),
        }
    }
}

/// Keys whose scores and values cost as much arithmetic as a token's products: 2 operations a
/// parameter against 4 a layer, head and dimension.
fn attention_scale(model: &ModelConfig) -> usize {
    let width = model.num_attention_heads * model.head_dim * model.num_hidden_layers;
    (model.num_parameters() as usize / (2 * width).max(1)).max(1)
}

/// Bytes of a block in all layers, K and V; the largest number where no machine holds one.
fn block_bytes(model: &ModelConfig, block_size: usize, kv_dtype: KvDtype) -> u64 {
    let row = model.num_key_value_heads as u128 * kv_dtype.vector_bytes(model.head_dim) as u128;
    let rows = 2 * model.num_hidden_layers as u128 * block_size as u128;
    u64::try_from(rows * row).unwrap_or(u64::MAX)
}

impl EnginePlan {
    /// Bytes of a token's KV in all layers.
    pub fn token_bytes(&self) -> u64 {
        self.block_bytes / self.block_size as u64
    }
}

impl fmt::Display for EnginePlan {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let mib = |bytes: u64| format!("{:.0} MiB", bytes as f64 / f64::from(1 << 20));
        write!(
            f,
            "{}{}, weights {}, kv {}: {} of weights; {} blocks of {} tokens ({}); \
             at most {} tokens a sequence, {} sequences, {} tokens a step; {} threads",
            self.device,
            if self.deterministic && self.device != "cpu" { " (deterministic)" } else { "" },
            self.dtype.name(),
            self.kv_dtype.name(),
            mib(self.weight_bytes),
            self.num_blocks,
            self.block_size,
            mib(self.num_blocks as u64 * self.block_bytes),
            self.max_model_len,
            self.max_num_seqs,
            self.max_num_batched_tokens,
            self.threads,
        )?;
        match self.tenant {
            Some(TenantLimits { blocks, seqs }) => {
                write!(f, "; a tenant at most {blocks} blocks, {seqs} sequences")
            }
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use strand_models::{ModelFiles, ModelSource};

    use super::*;

    const MACHINE: Machine = Machine { free_memory: 1 << 30, threads: 2, gpu: None };

    fn model() -> ModelConfig {
        ModelFiles::open(&ModelSource::Demo).expect("it is part of the program").config
    }

    fn resolve(asked: EngineConfig, machine: &Machine) -> Result<EnginePlan, Error> {
        let model = model();
        let bytes = |dtype: WeightDtype| model.num_parameters() * dtype.size() as u64;
        EnginePlan::resolve(&asked, &model, bytes, machine)
    }

    fn message(asked: EngineConfig) -> String {
        resolve(asked, &MACHINE).expect_err("it can't work").to_string()
    }

    #[test]
    fn a_tenants_share_is_of_blocks_and_of_sequences() {
        let plan = |share| {
            let asked = EngineConfig { tenant_share: Some(share), ..EngineConfig::default() };
            resolve(asked, &MACHINE)
        };
        let half = plan(0.5).expect("it fits");
        let TenantLimits { blocks, seqs } = half.tenant.expect("it was asked for");
        assert_eq!((blocks, seqs), (half.num_blocks / 2, half.max_num_seqs / 2));
        assert!(half.to_string().ends_with(&format!("{blocks} blocks, {seqs} sequences")));
        let least = plan(1e-9).expect("it fits").tenant;
        assert_eq!(least, Some(TenantLimits { blocks: 1, seqs: 1 }));
        for share in [0.0, -1.0, 1.1, f64::NAN] {
            assert!(plan(share).expect_err("no share").to_string().contains("tenant_share"));
        }
    }

    #[test]
    fn numbers_beyond_any_machine_are_refused_and_not_computed_with() {
        let base = EngineConfig::default();
        let size = EngineConfig { block_size: usize::MAX, ..base.clone() };
        assert!(message(size).ends_with("it must be at most 65535"));
        let threads = EngineConfig { threads: Some(usize::MAX), ..base.clone() };
        assert!(message(threads).ends_with("it must be at most 1024"));
        let memory = EngineConfig { kv_memory: Some(1 << 50), ..base.clone() };
        assert!(message(memory).contains("more than the 1073741824 bytes of memory"));
        let seqs = EngineConfig { max_num_seqs: usize::MAX, ..base };
        assert!(resolve(seqs, &MACHINE).expect("as many as fit").num_blocks > 0);
    }

    #[test]
    fn the_pool_takes_half_of_what_the_weights_leave() {
        let weights = model().num_parameters() * model().dtype.size() as u64;
        let machine = Machine { free_memory: weights + (64 << 20), ..MACHINE };
        let plan = resolve(EngineConfig::default(), &machine).expect("it fits");
        let pool = plan.num_blocks as u64 * plan.block_bytes;
        assert!(pool <= 32 << 20 && pool + plan.block_bytes > 32 << 20, "{pool}");
    }

    /// A GPU of 8 GiB, of which another program has taken one.
    fn with_gpu() -> Machine {
        let (free_memory, total_memory) = (7 << 30, 8 << 30);
        let gpu = GpuFacts { device: "cuda:0".to_owned(), free_memory, total_memory };
        Machine { gpu: Some(gpu), ..MACHINE }
    }

    #[test]
    fn on_a_gpu_the_pool_takes_its_share_less_all_else() {
        let asked = EngineConfig { gpu_memory_utilization: 0.5, ..EngineConfig::default() };
        let plan = resolve(asked.clone(), &with_gpu()).expect("it fits");
        assert_eq!((plan.device.as_str(), plan.deterministic), ("cuda:0", false));
        let pool = plan.num_blocks as u64 * plan.block_bytes;
        let weights = model().num_parameters() * 2;
        let sizes = GpuSizes { tokens: 1024, sequences: 256, positions: 4096 };
        let workspaces = GpuDecoder::workspace_bytes(&model(), sizes, false);
        let expected = (4 << 30) - (1 << 30) - weights - workspaces;
        assert!(pool <= expected && pool + plan.block_bytes > expected, "{pool} of {expected}");
        // the host's memory is not the pool's
        assert_eq!(plan.host_memory, (1 << 30) / 4);
        let own = EngineConfig { kv_memory: Some(1 << 30), ..asked };
        let plan = resolve(own, &with_gpu()).expect("it fits");
        assert_eq!(plan.num_blocks as u64, (1 << 30) / plan.block_bytes);
    }

    #[test]
    fn what_a_gpu_cannot_compute_is_refused_by_name() {
        let base = EngineConfig::default();
        let refuses = |asked: EngineConfig, text: &str| {
            let message = resolve(asked, &with_gpu()).expect_err("it can't work").to_string();
            assert!(message.contains(text), "{message}");
        };
        let dtype = Some(WeightDtype::F32);
        refuses(EngineConfig { dtype, ..base.clone() }, "not in f32; use --dtype bf16");
        let kv_dtype = Some(KvDtype::F16);
        refuses(EngineConfig { kv_dtype, ..base.clone() }, "f16 KV beside bf16 weights");
        let kv_dtype = Some(KvDtype::Int8);
        refuses(EngineConfig { kv_dtype, ..base.clone() }, "int8 KV beside bf16 weights");
        refuses(EngineConfig { kv_memory: Some(7 << 30), ..base.clone() }, "lower --kv-memory");
        let max_num_batched_tokens = 65_536;
        refuses(EngineConfig { max_num_batched_tokens, ..base.clone() }, "at most 65535");
        for gpu_memory_utilization in [0.0, -1.0, 1.5, f64::NAN] {
            let asked = EngineConfig { gpu_memory_utilization, ..base.clone() };
            refuses(asked, "gpu_memory_utilization is");
        }
        let small = EngineConfig { gpu_memory_utilization: 0.12, ..base };
        refuses(small, "the KV pool of 0 bytes holds 0 blocks");
    }

    #[test]
    fn on_the_cpu_every_plan_is_deterministic() {
        let plan = resolve(EngineConfig::default(), &MACHINE).expect("it fits");
        assert_eq!((plan.device.as_str(), plan.deterministic), ("cpu", true));
    }
}
