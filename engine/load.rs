//! From a model's files to a running engine.

use strand_kernels::Threads;
use strand_layers::kv_cache::{KvCache, KvCacheShape};
use strand_models::{Decoder, ModelFiles};

use crate::config::{EngineConfig, EnginePlan, Machine};
use crate::engine::Engine;
use crate::error::Error;
use crate::handle::{EngineHandle, ModelFacts};
use crate::model_runner::ModelRunner;

/// Packs the weights, allocates the KV pool and starts the engine's thread.
///
/// `progress` hears (bytes done, bytes in all) while weights are packed.
pub fn start(
    files: ModelFiles,
    config: &EngineConfig,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<EngineHandle, Error> {
    let (engine, facts) = load(files, config, progress)?;
    Ok(EngineHandle::spawn(engine, facts))
}

/// The engine alone, for callers that step it themselves.
pub fn load(
    files: ModelFiles,
    config: &EngineConfig,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(Engine<ModelRunner>, ModelFacts), Error> {
    let model = &files.config;
    let plan = EnginePlan::resolve(config, model, &Machine::this())?;
    let threads = Threads::new(plan.threads);
    let decoder =
        Decoder::load(model, &files.weights, plan.dtype, plan.max_model_len, &threads, progress)?;
    let shape = KvCacheShape {
        layers: model.num_hidden_layers,
        num_blocks: plan.num_blocks,
        block_size: plan.block_size,
        kv_heads: model.num_key_value_heads,
        head_dim: model.head_dim,
    };
    let kv_cache = KvCache::new(shape, plan.kv_dtype)?;
    let eos = files.generation.stop_token_ids.clone();
    let runner = ModelRunner::new(decoder, kv_cache);
    let engine = Engine::new(plan, runner, files.tokenizer.clone(), eos);
    let facts = ModelFacts {
        name: files.name,
        tokenizer: files.tokenizer,
        chat_template: files.chat_template,
        generation: files.generation,
        training: files.training,
    };
    Ok((engine, facts))
}
