//! A server of one's own, and the engine without one.
//!
//! The server is the program itself in a process of its own, as it is in use. The engine beside
//! it is given the same requests at the same pace without HTTP; both are asked in turn, so that
//! what else the machine does troubles both alike.

use std::env;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use clap::builder::PossibleValue;
use strand_engine::{EngineHandle, Event, Limits, Request, SamplingParams};

use super::super::disk::Folder;
use super::load::{Times, Work};
use crate::args::{BenchModelArgs, EngineArgs};

/// `strand serve` on a free port, ended when dropped.
pub struct OwnServer {
    child: Child,
    pub url: String,
}

impl OwnServer {
    /// Waits until it listens. `at_once`: requests that may wait there.
    pub fn start(args: &BenchModelArgs, folder: &Folder, at_once: usize) -> Result<Self> {
        if args.random_weights.is_some() {
            bail!("random weights have no tokenizer, and a server needs one; name a model");
        }
        let program = env::current_exe().context("cannot find this program to start it")?;
        let mut command = Command::new(program);
        command.arg("serve").args(&args.model).args(["--addr", "127.0.0.1:0"]);
        command.arg("--data-dir").arg(folder.path());
        command.args(["--max-queue", &at_once.to_string()]).args(flags(&args.engine));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().context("cannot start strand serve")?;
        let errors = child.stderr.take().expect("it is piped");
        let mut server = Self { child, url: String::new() };
        let (mut lines, mut said) = (BufReader::new(errors).lines(), String::new());
        for line in lines.by_ref().map_while(Result::ok) {
            if let Some(url) = line.strip_prefix("listening on ") {
                server.url = url.to_owned();
                break;
            }
            said.push_str(&line);
            said.push('\n');
        }
        if server.url.is_empty() {
            bail!("strand serve did not start:\n{}", said.trim_end());
        }
        // a log that nobody reads would stop it
        thread::spawn(move || lines.map_while(Result::ok).for_each(drop));
        Ok(server)
    }
}

impl Drop for OwnServer {
    fn drop(&mut self) {
        // one that has ended already can't be killed
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// What was asked of the engine, as another process is asked.
fn flags(args: &EngineArgs) -> Vec<String> {
    let name = |value: Option<PossibleValue>| {
        value.map(|value| value.get_name().to_owned()).unwrap_or_default()
    };
    let given = [
        ("--device", Some(args.device.to_string())),
        ("--gpu-memory-utilization", Some(args.gpu_memory_utilization.to_string())),
        ("--dtype", Some(name(args.dtype.to_possible_value()))),
        ("--kv-dtype", Some(name(args.kv_dtype.to_possible_value()))),
        ("--block-size", Some(args.block_size.to_string())),
        ("--kv-memory", args.kv_memory.map(|bytes| bytes.to_string())),
        ("--host-memory", args.host_memory.map(|bytes| bytes.to_string())),
        ("--max-num-seqs", Some(args.max_num_seqs.to_string())),
        ("--max-num-batched-tokens", Some(args.max_num_batched_tokens.to_string())),
        ("--max-model-len", args.max_model_len.map(|tokens| tokens.to_string())),
        ("--threads", args.threads.map(|threads| threads.to_string())),
    ];
    let pairs = given.into_iter().filter_map(|(flag, value)| Some([flag.to_owned(), value?]));
    let switches = args.deterministic.then(|| "--deterministic".to_owned());
    pairs.flatten().chain(switches).collect()
}

/// An answer of the engine itself.
pub async fn answer(engine: &EngineHandle, temperature: f32, work: Work) -> Result<Times, String> {
    let limits =
        Limits { max_tokens: Some(work.output_len), ignore_eos: true, ..Limits::default() };
    let sampling = SamplingParams { temperature, seed: work.seed, ..SamplingParams::default() };
    let request = Request { sampling, limits, ..Request::new(work.prompt) };
    let started = Instant::now();
    let mut events = engine.submit(request).map_err(|error| error.to_string())?;
    let mut times = Times::default();
    while let Some(event) = events.next().await {
        match event {
            Event::Token { text, .. } => {
                times.tokens += 1;
                // what has no text yet isn't seen over HTTP either
                if !text.is_empty() {
                    times.arrivals.push(started.elapsed().as_secs_f64());
                }
            }
            Event::Finished { .. } => {
                times.end = started.elapsed().as_secs_f64();
                return Ok(times);
            }
            Event::Failed(error) => return Err(error.to_string()),
            _ => {}
        }
    }
    Err(strand_engine::Error::Stopped.to_string())
}
