//! From a MODEL argument to a running engine, with a progress bar when it takes long.
//!
//! The plan goes to standard error, only with -v.

use std::io::{self, Write};
use std::time::Instant;

use anyhow::Result;
use strand_engine::load::Loaded;
use strand_engine::store::Store;
use strand_engine::{EngineConfig, EngineHandle};
use strand_models::{ModelFiles, ModelSource};

use crate::args::{CommonArgs, EngineArgs};
use crate::progress::Progress;

/// The model that MODEL names; the bundled one for none.
pub fn source(model: Option<&str>) -> Result<ModelSource> {
    Ok(model.map_or(Ok(ModelSource::Demo), ModelSource::parse)?)
}

/// What the flags ask of the engine.
pub fn config(args: &EngineArgs) -> EngineConfig {
    EngineConfig {
        device: args.device,
        deterministic: args.deterministic,
        gpu_memory_utilization: args.gpu_memory_utilization,
        dtype: args.dtype.weights(),
        kv_dtype: args.kv_dtype.kv(),
        block_size: args.block_size,
        kv_memory: args.kv_memory,
        host_memory: args.host_memory,
        kv_codec: args.kv_codec,
        disk_space: args.disk_space,
        max_num_seqs: args.max_num_seqs,
        max_num_batched_tokens: args.max_num_batched_tokens,
        max_model_len: args.max_model_len,
        threads: args.threads,
        ..EngineConfig::default()
    }
}

/// Loads the model and starts its engine; with a store, KV comes from there and goes there.
pub fn start(
    source: &ModelSource,
    config: &EngineConfig,
    store: Option<Store>,
    common: &CommonArgs,
) -> Result<EngineHandle> {
    let Loaded { engine, facts, files, .. } = load(source, config, store, common)?;
    Ok(EngineHandle::spawn(engine, facts, files))
}

/// Loads the model alone.
pub fn load(
    source: &ModelSource,
    config: &EngineConfig,
    store: Option<Store>,
    common: &CommonArgs,
) -> Result<Loaded> {
    let started = Instant::now();
    let files = ModelFiles::open(source)?;
    let mut progress = Progress::loading();
    let loaded = strand_engine::load(files, config, store, &mut |done, total| {
        progress.update(done, total);
    })?;
    drop(progress);
    // only now: weights and KV come on pages of their own
    strand_kernels::keep_freed_memory();
    if let Some(note) = &loaded.note {
        crate::note(note);
    }
    if common.verbose {
        let seconds = started.elapsed().as_secs_f64();
        let (name, plan) = (&loaded.facts.name, loaded.engine.plan());
        drop(writeln!(io::stderr(), "{name} loaded in {seconds:.2} s: {plan}"));
    }
    Ok(loaded)
}
