//! Many random requests at once.
//!
//! The clock runs from the first request sent to the last answer ended, after one short request
//! to warm up. Prefill and decode are what the engine measured around its steps; their seconds
//! add up to the time spent in steps, and a step that did both is shared by token count.

use std::io::{self, Write};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use serde_json::{Value, json};
use strand_engine::{Event, Limits, Request, SamplingParams, Stats};

use super::workload::Random;
use super::{Bench, merge, peak_memory, print_table};
use crate::answer::shortest;
use crate::args::{CommonArgs, ThroughputArgs};
use crate::{Outcome, UsageError, byte_size};

struct Run {
    requests: usize,
    seconds: f64,
    prompt_tokens: usize,
    output_tokens: usize,
    /// What the engine counted during the run.
    prefill: Phase,
    decode: Phase,
    preemptions: u64,
    peak_memory: Option<u64>,
}

struct Phase {
    tokens: u64,
    seconds: f64,
}

impl Phase {
    fn speed(&self) -> f64 {
        self.tokens as f64 / self.seconds.max(f64::MIN_POSITIVE)
    }
}

pub fn run(args: &ThroughputArgs, common: &CommonArgs) -> Result<Outcome> {
    check(args)?;
    let bench = Bench::start(&args.model, common, args.num_seqs)?;
    let room = bench.engine.plan().max_model_len;
    let longest = args.max_input_len + args.max_output_len;
    if longest > room {
        bail!(
            "the longest request may have {longest} tokens, the model takes {room}; \
             lower --max-input-len or --max-output-len"
        );
    }
    let requests = requests(args, bench.engine.plan().vocab_size);
    answer(&bench, vec![warm_up(bench.engine.plan().vocab_size)])?;
    let before = bench.engine.stats()?;
    let count = requests.len();
    let prompt_tokens = requests.iter().map(Request::prompt_tokens).sum();
    let (seconds, output_tokens) = answer(&bench, requests)?;
    let after = bench.engine.stats()?;
    let run = Run {
        requests: count,
        seconds: seconds.as_secs_f64(),
        prompt_tokens,
        output_tokens,
        prefill: phase(&before, &after, |s| (s.prefill_tokens, s.prefill_seconds)),
        decode: phase(&before, &after, |s| (s.decode_tokens, s.decode_seconds)),
        preemptions: after.preemptions - before.preemptions,
        peak_memory: peak_memory(),
    };
    report(&bench, args, &run)?;
    Ok(Outcome::Done)
}

fn check(args: &ThroughputArgs) -> Result<()> {
    for (flag, low, high) in [
        ("input", args.min_input_len, args.max_input_len),
        ("output", args.min_output_len, args.max_output_len),
    ] {
        if low > high {
            let text = format!("--min-{flag}-len {low} exceeds --max-{flag}-len {high}");
            return Err(UsageError(text).into());
        }
    }
    let sampling = SamplingParams { temperature: args.temperature, ..Default::default() };
    sampling.check(usize::MAX).map_err(|text| UsageError(text).into())
}

/// All prompts first, then all answer lengths, as bench.py draws them.
fn requests(args: &ThroughputArgs, vocab_size: usize) -> Vec<Request> {
    let mut random = Random::new(args.model.seed);
    let within = |low: usize, high: usize, random: &mut Random| {
        random.within(low as u64, high as u64) as usize
    };
    let prompts: Vec<Vec<u32>> = (0..args.num_seqs)
        .map(|_| {
            let len = within(args.min_input_len, args.max_input_len, &mut random);
            random.prompt(len, vocab_size)
        })
        .collect();
    let request = |(index, prompt)| {
        let len = within(args.min_output_len, args.max_output_len, &mut random);
        let seed = args.model.seed.wrapping_add(index as u64);
        let sampling = SamplingParams { temperature: args.temperature, seed, ..Default::default() };
        let limits = Limits { max_tokens: Some(len), ignore_eos: true, ..Default::default() };
        Request { sampling, limits, ..Request::new(prompt) }
    };
    prompts.into_iter().enumerate().map(request).collect()
}

fn warm_up(vocab_size: usize) -> Request {
    let limits = Limits { max_tokens: Some(4), ignore_eos: true, ..Default::default() };
    let prompt = Random::new(u64::MAX).prompt(16, vocab_size);
    Request { limits, ..Request::new(prompt) }
}

/// Sends all and waits for all; the time and the tokens made.
fn answer(bench: &Bench, requests: Vec<Request>) -> Result<(Duration, usize)> {
    let started = Instant::now();
    let streams: Result<Vec<_>, _> =
        requests.into_iter().map(|request| bench.submit(request)).collect();
    let mut tokens = 0;
    // One after the other: a stream keeps its events until they are read.
    for mut stream in streams? {
        let mut finished = false;
        while let Some(event) = stream.next_blocking() {
            match event {
                Event::Token { .. } => tokens += 1,
                Event::Finished { .. } => finished = true,
                Event::Failed(error) => return Err(error.into()),
                Event::Prompt { .. } | Event::Embedding { .. } => {}
            }
        }
        if !finished {
            bail!(strand_engine::Error::Stopped);
        }
    }
    Ok((started.elapsed(), tokens))
}

fn phase(before: &Stats, after: &Stats, of: impl Fn(&Stats) -> (u64, f64)) -> Phase {
    let ((tokens, seconds), (tokens_after, seconds_after)) = (of(before), of(after));
    Phase { tokens: tokens_after - tokens, seconds: seconds_after - seconds }
}

fn report(bench: &Bench, args: &ThroughputArgs, run: &Run) -> io::Result<()> {
    let mut out = io::stdout().lock();
    let all = (run.prompt_tokens + run.output_tokens) as f64 / run.seconds;
    let output = run.output_tokens as f64 / run.seconds;
    if !bench.json {
        let peak = run.peak_memory.map_or("unknown".to_owned(), byte_size::format);
        let mut rows = vec![
            ("model", bench.model.clone()),
            ("requests", run.requests.to_string()),
            ("prompt tokens", run.prompt_tokens.to_string()),
            ("output tokens", run.output_tokens.to_string()),
            ("seconds", format!("{:.2}", run.seconds)),
            ("prefill tokens/s (in prefill)", format!("{:.1}", run.prefill.speed())),
            ("decode tokens/s (in decode)", format!("{:.1}", run.decode.speed())),
            ("output tokens/s (wall clock)", format!("{output:.1}")),
            ("total tokens/s (wall clock)", format!("{all:.1}")),
            ("peak memory", peak),
            ("preemptions", run.preemptions.to_string()),
        ];
        rows.extend(bench.vs.iter().map(|note| ("vs", note.clone())));
        print_table(&mut out, &rows)?;
        writeln!(
            out,
            "Prefill and decode divide computed tokens by the seconds of the steps that computed \
             them;\na step that did both is shared by token count."
        )?;
    }
    let mut line = bench.describe();
    let own = json!({
        "bench": "throughput",
        "requests": run.requests,
        "input_len": [args.min_input_len, args.max_input_len],
        "output_len": [args.min_output_len, args.max_output_len],
        "temperature": shortest(args.temperature),
        "prompt_tokens": run.prompt_tokens,
        "output_tokens": run.output_tokens,
        "seconds": run.seconds,
        "prefill": phase_json(&run.prefill),
        "decode": phase_json(&run.decode),
        "output_tokens_per_second": output,
        "total_tokens_per_second": all,
        "peak_memory_bytes": run.peak_memory,
        "preemptions": run.preemptions,
    });
    merge(&mut line, own);
    writeln!(out, "{line}")
}

fn phase_json(phase: &Phase) -> Value {
    json!({
        "tokens": phase.tokens,
        "seconds": phase.seconds,
        "tokens_per_second": phase.speed(),
    })
}
