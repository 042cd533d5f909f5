//! Time to the first token and between tokens, by batch size and prompt length.
//!
//! A row sends its requests at once, each from a thread that notes when events arrive, so the
//! figures are what a client sees. Prompts are new in every run: no prefix is ever found again.

use std::io::{self, Write};
use std::thread;
use std::time::Instant;

use anyhow::{Result, anyhow, bail};
use serde_json::{Value, json};
use strand_engine::{Error, Event, EventStream, Limits, Request};

use super::statistics::quantile;
use super::workload::Random;
use super::{Bench, merge, peak_memory};
use crate::args::{CommonArgs, LatencyArgs};
use crate::{Outcome, byte_size};

/// Everything measured for one pair of batch size and prompt length, in seconds.
struct Row {
    batch_size: usize,
    prompt_len: usize,
    first_token: Vec<f64>,
    between_tokens: Vec<f64>,
}

pub fn run(args: &LatencyArgs, common: &CommonArgs) -> Result<Outcome> {
    let largest = args.batch_sizes.iter().copied().max().unwrap_or(1);
    let bench = Bench::start(&args.model, common, largest)?;
    let longest = args.prompt_lens.iter().max().unwrap_or(&0) + args.output_len;
    let room = bench.engine.plan().max_model_len;
    if longest > room {
        bail!(
            "the longest request has {longest} tokens, the model takes {room}; \
             lower --prompt-lens or --output-len"
        );
    }
    let mut random = Random::new(args.model.seed);
    measure(&bench, 1, 16, 4, &mut random)?; // to warm up
    let mut rows = Vec::new();
    for &prompt_len in &args.prompt_lens {
        for &batch_size in &args.batch_sizes {
            let (mut first_token, mut between_tokens) = (Vec::new(), Vec::new());
            for _ in 0..args.repeats {
                for times in measure(&bench, batch_size, prompt_len, args.output_len, &mut random)?
                {
                    first_token.extend(times.first());
                    between_tokens.extend(times.windows(2).map(|pair| pair[1] - pair[0]));
                }
            }
            rows.push(Row { batch_size, prompt_len, first_token, between_tokens });
        }
    }
    report(&bench, args, &rows)?;
    Ok(Outcome::Done)
}

/// Seconds from sending to each token, for each request.
fn measure(
    bench: &Bench,
    batch_size: usize,
    prompt_len: usize,
    output_len: usize,
    random: &mut Random,
) -> Result<Vec<Vec<f64>>> {
    let limits = Limits { max_tokens: Some(output_len), ignore_eos: true, ..Limits::default() };
    let vocab_size = bench.engine.plan().vocab_size;
    let requests: Vec<Request> = (0..batch_size)
        .map(|_| {
            let prompt = random.prompt(prompt_len, vocab_size);
            Request { limits: limits.clone(), ..Request::new(prompt) }
        })
        .collect();
    let started = Instant::now();
    thread::scope(|scope| {
        let mut watchers = Vec::new();
        for request in requests {
            let stream = bench.engine.submit(request)?;
            watchers.push(scope.spawn(move || watch(stream, started)));
        }
        let join = |watcher: thread::ScopedJoinHandle<Result<_, Error>>| {
            Ok(watcher.join().map_err(|_| anyhow!("a measuring thread panicked"))??)
        };
        watchers.into_iter().map(join).collect()
    })
}

fn watch(mut stream: EventStream, started: Instant) -> Result<Vec<f64>, Error> {
    let mut times = Vec::new();
    while let Some(event) = stream.next_blocking() {
        match event {
            Event::Token { .. } => times.push(started.elapsed().as_secs_f64()),
            Event::Finished { .. } => return Ok(times),
            Event::Failed(error) => return Err(error),
            Event::Prompt { .. } => {}
        }
    }
    Err(Error::Stopped)
}

fn report(bench: &Bench, args: &LatencyArgs, rows: &[Row]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    if !bench.json {
        writeln!(out, "model {}, {} runs a row, milliseconds", bench.model, args.repeats)?;
        writeln!(
            out,
            "{:>7} {:>7} {:>12} {:>12} {:>12} {:>12} {:>12}",
            "prompt", "batch", "first p50", "first p90", "between p50", "between p90", "tokens/s",
        )?;
        for row in rows {
            let ms = |values: &[f64], share| match quantile(values, share) {
                Some(seconds) => format!("{:.2}", seconds * 1e3),
                None => "-".to_owned(),
            };
            writeln!(
                out,
                "{:>7} {:>7} {:>12} {:>12} {:>12} {:>12} {:>12}",
                row.prompt_len,
                row.batch_size,
                ms(&row.first_token, 0.5),
                ms(&row.first_token, 0.9),
                ms(&row.between_tokens, 0.5),
                ms(&row.between_tokens, 0.9),
                row.speed().map_or("-".to_owned(), |speed| format!("{speed:.1}")),
            )?;
        }
        writeln!(out, "tokens/s: of the whole batch, from its first tokens on")?;
        writeln!(out, "peak memory {}", peak_memory().map_or("?".to_owned(), byte_size::format))?;
        if let Some(note) = &bench.vs {
            writeln!(out, "vs {note}")?;
        }
    }
    let mut line = bench.describe();
    let own = json!({
        "bench": "latency",
        "output_len": args.output_len,
        "repeats": args.repeats,
        "peak_memory_bytes": peak_memory(),
        "rows": rows.iter().map(Row::to_json).collect::<Vec<_>>(),
    });
    merge(&mut line, own);
    writeln!(out, "{line}")
}

impl Row {
    /// Tokens a second of the whole batch while it decodes.
    fn speed(&self) -> Option<f64> {
        let mean = self.between_tokens.iter().sum::<f64>() / self.between_tokens.len() as f64;
        (mean > 0.0).then(|| self.batch_size as f64 / mean)
    }

    fn to_json(&self) -> Value {
        let figures =
            |values: &[f64]| json!({"p50": quantile(values, 0.5), "p90": quantile(values, 0.9)});
        json!({
            "batch_size": self.batch_size,
            "prompt_len": self.prompt_len,
            "first_token_seconds": figures(&self.first_token),
            "between_tokens_seconds": figures(&self.between_tokens),
            "tokens_per_second": self.speed(),
        })
    }
}
