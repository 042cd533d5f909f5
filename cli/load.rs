//! From a MODEL argument to a running engine, with a progress bar when it takes long.
//!
//! The bar and the plan go to standard error: the bar only in a terminal and only after a
//! second, the plan only with -v.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use anyhow::Result;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use strand_engine::{EngineConfig, EngineHandle};
use strand_models::{ModelFiles, ModelSource};

use crate::args::{CommonArgs, EngineArgs};

/// Loading that is faster than this is not worth a bar.
const QUIET: Duration = Duration::from_secs(1);

/// The model that MODEL names; the bundled one for none.
pub fn source(model: Option<&str>) -> Result<ModelSource> {
    Ok(model.map_or(Ok(ModelSource::Demo), ModelSource::parse)?)
}

/// What the flags ask of the engine.
pub fn config(args: &EngineArgs) -> EngineConfig {
    EngineConfig {
        dtype: args.dtype.weights(),
        kv_dtype: args.kv_dtype.kv(),
        block_size: args.block_size,
        kv_memory: args.kv_memory,
        max_num_seqs: args.max_num_seqs,
        max_num_batched_tokens: args.max_num_batched_tokens,
        max_model_len: args.max_model_len,
        threads: args.threads,
        ..EngineConfig::default()
    }
}

/// Loads the model and starts its engine.
pub fn start(
    source: &ModelSource,
    config: &EngineConfig,
    common: &CommonArgs,
) -> Result<EngineHandle> {
    let started = Instant::now();
    let files = ModelFiles::open(source)?;
    let mut progress = Progress::new();
    let engine = strand_engine::start(files, config, None, &mut |done, total| {
        progress.update(done, total);
    })?;
    progress.finish();
    if common.verbose {
        let seconds = started.elapsed().as_secs_f64();
        let (name, plan) = (engine.model_name(), engine.plan());
        drop(writeln!(io::stderr(), "{name} loaded in {seconds:.2} s: {plan}"));
    }
    Ok(engine)
}

struct Progress {
    started: Instant,
    in_terminal: bool,
    bar: Option<ProgressBar>,
}

impl Progress {
    fn new() -> Self {
        Self { started: Instant::now(), in_terminal: io::stderr().is_terminal(), bar: None }
    }

    fn update(&mut self, done: u64, total: u64) {
        if !self.in_terminal || self.started.elapsed() < QUIET {
            return;
        }
        let bar = self.bar.get_or_insert_with(|| {
            let template = "loading {wide_bar} {binary_bytes}/{binary_total_bytes} {eta}";
            let style = ProgressStyle::with_template(template).expect("the template is valid");
            let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
            bar.set_style(style);
            bar
        });
        bar.set_position(done);
    }

    fn finish(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}
