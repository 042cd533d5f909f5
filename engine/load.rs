//! From a model's files to a running engine.

use std::path::Path;
use std::sync::Arc;

use strand_kernels::gpu::Gpu;
use strand_kernels::{RotaryTable, Threads, numerics};
use strand_layers::gpu_attention::GpuSizes;
use strand_layers::gpu_kv_cache::GpuKvCache;
use strand_layers::kv_cache::{KvCache, KvCacheShape};
use strand_models::{
    Decoder, Fingerprint, GpuArithmetic, GpuDecoder, ModelConfig, ModelFiles, digest,
};

use crate::cache::{DiskFile, KvIdentity};
use crate::config::{EngineConfig, EnginePlan, Machine};
use crate::cpu_runner::CpuRunner;
use crate::device::{self, Opened};
use crate::engine::{DiskSetup, Engine, TierSetup};
use crate::error::Error;
use crate::gpu_runner::GpuRunner;
use crate::handle::{EngineHandle, ModelFacts};
use crate::io::{IoFiles, IoWorker};
use crate::model_runner::ModelRunner;
use crate::store::{Coding, FileStamp, KvShape, Store};

/// Packs the weights, allocates the KV pool and starts the engine's thread; with a store, those
/// that read and write its files too.
///
/// `progress` hears (bytes done, bytes in all) while weights are packed.
pub fn start(
    files: ModelFiles,
    config: &EngineConfig,
    store: Option<Store>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<EngineHandle, Error> {
    let loaded = load(files, config, store, progress)?;
    Ok(EngineHandle::spawn(loaded.engine, loaded.facts, loaded.files))
}

/// An engine for callers that step it themselves.
pub struct Loaded {
    pub engine: Engine<ModelRunner>,
    pub facts: ModelFacts,
    /// Who carries out the engine's [`IoJob`](crate::IoJob)s.
    pub files: Option<IoFiles>,
    /// Why it computes elsewhere than one might have expected, for people.
    pub note: Option<String>,
}

/// The engine alone, with what belongs to it.
pub fn load(
    files: ModelFiles,
    config: &EngineConfig,
    store: Option<Store>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Loaded, Error> {
    let Opened { gpu, note } = device::open(config.device)?;
    let (gpu, facts) = gpu.unzip();
    let weight_bytes = |dtype| files.weights.bytes(&files.config, dtype);
    let plan = EnginePlan::resolve(config, &files.config, weight_bytes, &Machine::this(facts))?;
    let (runner, rotary, numerics) = match &gpu {
        None => on_cpu(&files, &plan, progress)?,
        Some(gpu) => {
            let sizes = config.gpu_sizes(plan.max_model_len);
            on_gpu(gpu, &files, (&plan, sizes), progress)?
        }
    };
    let eos = files.generation.stop_token_ids.clone();
    let (tiers, io_files) = tiers(&files, &plan, store, (gpu, numerics, &rotary))?;
    let engine = Engine::new(plan, runner, files.tokenizer.clone(), eos, tiers);
    let facts = ModelFacts {
        name: files.name,
        tokenizer: files.tokenizer,
        chat_template: files.chat_template,
        generation: files.generation,
        training: files.training,
    };
    Ok(Loaded { engine, facts, files: io_files, note })
}

/// A model, its rotary table and the name of its arithmetic.
type Running = (ModelRunner, Arc<RotaryTable>, String);

fn on_cpu(
    files: &ModelFiles,
    plan: &EnginePlan,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Running, Error> {
    let threads = Threads::new(plan.threads);
    let (config, length) = (&files.config, plan.max_model_len);
    let decoder = Decoder::load(config, &files.weights, plan.dtype, length, &threads, progress)?;
    let kv_cache = KvCache::new(kv_shape(config, plan), plan.kv_dtype, &threads)?;
    let rotary = decoder.rotary().clone();
    let numerics = numerics(threads.isa(), plan.dtype, plan.kv_dtype);
    Ok((ModelRunner::Cpu(Box::new(CpuRunner::new(decoder, kv_cache))), rotary, numerics))
}

fn on_gpu(
    gpu: &Gpu,
    files: &ModelFiles,
    (plan, sizes): (&EnginePlan, GpuSizes),
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Running, Error> {
    let threads = Threads::new(plan.threads);
    let arithmetic = GpuArithmetic { dtype: plan.dtype, deterministic: plan.deterministic };
    let slots = plan.num_blocks * plan.block_size;
    let model = (&files.config, &files.weights);
    let decoder = GpuDecoder::load((gpu, &threads), model, arithmetic, (sizes, slots), progress)?;
    let kv_cache = GpuKvCache::new(gpu, kv_shape(&files.config, plan), plan.kv_dtype)?;
    let rotary = decoder.rotary().clone();
    let runner = GpuRunner::new(gpu.clone(), decoder, kv_cache, sizes)?;
    Ok((ModelRunner::Gpu(Box::new(runner)), rotary, device::numerics(gpu, plan)))
}

fn kv_shape(config: &ModelConfig, plan: &EnginePlan) -> KvCacheShape {
    KvCacheShape {
        layers: config.num_hidden_layers,
        num_blocks: plan.num_blocks,
        block_size: plan.block_size,
        kv_heads: config.num_key_value_heads,
        head_dim: config.head_dim,
    }
}

/// What the engine knows of its tiers, and who reads and writes the files.
fn tiers(
    files: &ModelFiles,
    plan: &EnginePlan,
    store: Option<Store>,
    (gpu, numerics, rotary): (Option<Gpu>, String, &Arc<RotaryTable>),
) -> Result<(TierSetup, Option<IoFiles>), Error> {
    let identity = KvIdentity {
        tokenizer: files.tokenizer_digest,
        numerics,
        rope: rope(&files.config),
        ..KvIdentity::default()
    };
    let host_memory = plan.host_memory;
    let Some(store) = store else {
        // Without files names are compared within this process alone, where the model is one.
        return Ok((TierSetup { identity, host_memory, disk: None }, None));
    };
    let model = files.fingerprint(&mut |path, bytes| fingerprint(&store, path, bytes));
    let identity = KvIdentity { model, ..identity };
    let known = store.all_kv_files()?.into_iter().map(|file| DiskFile {
        kv: file.kv_id,
        chunk: file.chunk,
        tenant: file.tenant,
        bytes: file.bytes,
    });
    let shape = KvShape {
        layers: files.config.num_hidden_layers,
        kv_heads: files.config.num_key_value_heads,
        head_dim: files.config.head_dim,
        dtype: plan.kv_dtype,
    };
    let worker = |store| IoWorker {
        store,
        disk_space: plan.disk_space,
        shape,
        coding: Coding { rotary: Some(rotary.clone()), threads: plan.threads, gpu: gpu.clone() },
    };
    let io_files = IoFiles { reader: worker(store.another()?), writer: worker(store) };
    let disk = Some(DiskSetup { codec: plan.kv_codec, files: known.collect() });
    Ok((TierSetup { identity, host_memory, disk }, Some(io_files)))
}

/// The digest of a file, remembered for as long as it is the same.
fn fingerprint(store: &Store, path: &Path, bytes: &[u8]) -> Fingerprint {
    let stamp = std::fs::metadata(path).ok().as_ref().and_then(FileStamp::of);
    // an index that can't answer costs time, no more
    let known = stamp.and_then(|stamp| store.fingerprint(path, stamp).ok().flatten());
    known.unwrap_or_else(|| {
        let digest = digest(bytes);
        if let Some(stamp) = stamp {
            drop(store.put_fingerprint(path, stamp, digest));
        }
        digest
    })
}

/// The rotation by its numbers, whatever they are called.
fn rope(config: &ModelConfig) -> String {
    let (frequencies, factor) = config.rope.inverse_frequencies(config.head_dim);
    let numbers = frequencies.iter().chain([&factor]);
    let bytes: Vec<u8> = numbers.flat_map(|number| number.to_bits().to_le_bytes()).collect();
    digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}
