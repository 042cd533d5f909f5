//! The harness: workloads, clocks, and what is printed about them.
//!
//! Every bench prints a table for people and ends with one line of JSON, to standard output.
//! Workloads are a function of the seed. Nothing here changes how the engine works.

mod disk;
pub mod kernels;
mod kv_files;
pub mod latency;
pub mod recall;
pub mod reuse;
pub mod serve;
pub mod statistics;
pub mod throughput;
pub mod tiers;
mod workload;

use std::fs;
use std::io::{self, Write};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use strand_engine::store::Store;
use strand_engine::{
    EngineConfig, EngineHandle, Error, Event, EventStream, Exactness, Request, Reuse,
};
use strand_kernels::KvDtype;
use strand_models::{ModelSource, PRESETS, Recipe};

use crate::args::{BenchModelArgs, CommonArgs};
use crate::load;
use disk::Folder;
use kv_files::KvFiles;

/// What the flags ask of the engine, with room for so many requests at once.
fn config(args: &BenchModelArgs, max_queue: usize) -> EngineConfig {
    let config = load::config(&args.engine);
    EngineConfig { max_queue: max_queue.max(config.max_queue), ..config }
}

/// A started engine and how to name it in the results.
struct Bench {
    engine: EngineHandle,
    model: String,
    vs: Option<String>,
    seed: u64,
    /// Print the line of JSON alone.
    json: bool,
}

/// One answer, and how long its first token took.
struct Answer {
    /// From sending the request.
    first_token_seconds: f64,
    tokens: Vec<u32>,
    reuse: Reuse,
    exactness: Exactness,
}

impl Bench {
    /// `max_queue`: requests that will be sent at once.
    fn start(args: &BenchModelArgs, common: &CommonArgs, max_queue: usize) -> Result<Self> {
        let engine = load::start(&source(args)?, &config(args, max_queue), None, common)?;
        Ok(Self::new(engine, args, common))
    }

    /// With KV on the disk.
    fn start_in(
        folder: &Folder,
        args: &BenchModelArgs,
        common: &CommonArgs,
        max_queue: usize,
    ) -> Result<(Self, KvFiles)> {
        let store = Store::open(folder.path())?;
        let config = config(args, max_queue);
        let loaded = load::load(&source(args)?, &config, Some(store), common)?;
        let files = KvFiles::new(&loaded)?;
        let engine = EngineHandle::spawn(loaded.engine, loaded.facts, loaded.files);
        Ok((Self::new(engine, args, common), files))
    }

    /// Refuses to write KV to int8 files, as `flag` asks, where it is held as int8.
    fn check_int8_files(&self, flag: &str) -> Result<()> {
        ensure!(
            self.engine.plan().kv_dtype != KvDtype::Int8,
            "KV that is held as int8 is not written as int8 again; leave int8 out of {flag}"
        );
        Ok(())
    }

    fn new(engine: EngineHandle, args: &BenchModelArgs, common: &CommonArgs) -> Self {
        let model = match &args.random_weights {
            Some(name) => format!("{name} (random weights)"),
            None => engine.model_name().to_owned(),
        };
        let (vs, seed, json) = (args.vs.clone(), args.seed, common.json);
        Self { engine, model, vs, seed, json }
    }

    /// Sends a request; where the engine's door is full, waits for the step in progress.
    fn submit(&self, request: Request) -> Result<EventStream, Error> {
        loop {
            match self.engine.submit(request.clone()) {
                Err(Error::QueueFull { .. }) => drop(self.engine.stats()?),
                other => return other,
            }
        }
    }

    /// Sends a request and waits for its end; it must ask for a token or more.
    fn ask(&self, request: Request) -> Result<Answer> {
        let started = Instant::now();
        let mut stream = self.submit(request)?;
        let (mut first, mut tokens) = (None, Vec::new());
        while let Some(event) = stream.next_blocking() {
            match event {
                Event::Token { token, .. } => {
                    first.get_or_insert_with(|| started.elapsed().as_secs_f64());
                    tokens.push(token);
                }
                Event::Finished { reuse, exactness, .. } => {
                    // an answer may end before it has a token
                    let end = || started.elapsed().as_secs_f64();
                    let first_token_seconds = first.unwrap_or_else(end);
                    return Ok(Answer { first_token_seconds, tokens, reuse, exactness });
                }
                Event::Failed(error) => return Err(error.into()),
                Event::Prompt { .. } | Event::Embedding { .. } => {}
            }
        }
        Err(Error::Stopped.into())
    }

    /// What every bench says about itself.
    fn describe(&self) -> Value {
        let plan = self.engine.plan();
        json!({
            "model": self.model,
            "device": plan.device,
            "dtype": plan.dtype.name(),
            "kv_dtype": plan.kv_dtype.name(),
            "threads": plan.threads,
            "block_size": plan.block_size,
            "max_num_seqs": plan.max_num_seqs,
            "max_num_batched_tokens": plan.max_num_batched_tokens,
            "seed": self.seed,
            "vs": self.vs,
        })
    }
}

fn source(args: &BenchModelArgs) -> Result<ModelSource> {
    match &args.random_weights {
        Some(name) => random_weights(name, args.seed),
        None => load::source(args.model.as_deref()),
    }
}

fn random_weights(name: &str, seed: u64) -> Result<ModelSource> {
    let (shape, recipe) = match name.rsplit_once(':') {
        Some((shape, recipe)) if Recipe::parse(recipe).is_some() => (shape, Recipe::parse(recipe)),
        _ => (name, None),
    };
    let config_json = match PRESETS.iter().find(|preset| preset.0 == shape) {
        Some((_, text)) => (*text).to_owned(),
        None => fs::read_to_string(shape)
            .with_context(|| format!("{shape} is no preset, and no config.json to read"))?,
    };
    Ok(ModelSource::Random { config_json, seed, recipe })
}

/// Adds the fields of one object behind those of another.
fn merge(line: &mut Value, own: Value) {
    let (Value::Object(line), Value::Object(own)) = (line, own) else {
        unreachable!("both are objects")
    };
    line.extend(own);
}

/// Rows of two columns, the numbers aligned to the right.
fn print_table(out: &mut impl Write, rows: &[(&str, String)]) -> io::Result<()> {
    let names = rows.iter().map(|row| row.0.len()).max().unwrap_or(0);
    let values = rows.iter().map(|row| row.1.chars().count()).max().unwrap_or(0);
    for (name, value) in rows {
        writeln!(out, "{name:<names$}  {value:>values$}")?;
    }
    Ok(())
}

/// Most memory this process has held, in bytes, where the system tells.
fn peak_memory() -> Option<u64> {
    parse_peak(&fs::read_to_string("/proc/self/status").ok()?)
}

fn parse_peak(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peak_memory_is_read_from_the_status_file() {
        let status = "Name:\tstrand\nVmHWM:\t  2048 kB\nVmRSS:\t 1024 kB\n";
        assert_eq!(parse_peak(status), Some(2 << 20));
        assert_eq!(parse_peak("Name:\tstrand\n"), None);
    }

    #[test]
    fn tables_align_their_numbers() {
        let mut out = Vec::new();
        let rows = [("a", "1".to_owned()), ("long name", "23.5".to_owned())];
        print_table(&mut out, &rows).unwrap();
        assert_eq!(String::from_utf8(out).unwrap(), "a             1\nlong name  23.5\n");
    }
}
