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
    /// Of each request: from its first token to its last, over the tokens between.
    per_token: Vec<f64>,
    /// Of each pair of neighbouring tokens. Tokens that a busy machine delivers together have
    /// nothing between them, which the means above are free of.
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
            let mut row = Row::new(batch_size, prompt_len);
            for _ in 0..args.repeats {
                for times in measure(&bench, batch_size, prompt_len, args.output_len, &mut random)?
                {
                    row.add(&times);
                }
            }
            rows.push(row);
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
            let stream = bench.submit(request)?;
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
            Event::Prompt { .. } | Event::Embedding { .. } => {}
        }
    }
    Err(Error::Stopped)
}

fn report(bench: &Bench, args: &LatencyArgs, rows: &[Row]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    if !bench.json {
        writeln!(out, "model {}, {} runs a row, milliseconds", bench.model, args.repeats)?;
        let heads = ["prompt", "batch", "first p50", "p90", "token p50", "p90", "gap p50", "p90"];
        let heads = heads.map(|head| format!("{head:>10}"));
        writeln!(out, "{} {:>10}", heads.join(" "), "tokens/s")?;
        for row in rows {
            writeln!(out, "{}", row.to_text())?;
        }
        writeln!(out, "first: time to the first token; token: a request's mean after the first;")?;
        writeln!(out, "gap: between two neighbouring tokens as they arrive;")?;
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
    fn new(batch_size: usize, prompt_len: usize) -> Self {
        let (first_token, per_token, between_tokens) = (Vec::new(), Vec::new(), Vec::new());
        Self { batch_size, prompt_len, first_token, per_token, between_tokens }
    }

    /// Adds a request by the seconds at which its tokens came.
    fn add(&mut self, times: &[f64]) {
        self.first_token.extend(times.first());
        if let [first, .., last] = times {
            self.per_token.push((last - first) / (times.len() - 1) as f64);
        }
        self.between_tokens.extend(times.windows(2).map(|pair| pair[1] - pair[0]));
    }

    /// Tokens a second of the whole batch while it decodes.
    fn speed(&self) -> Option<f64> {
        let mean = self.per_token.iter().sum::<f64>() / self.per_token.len() as f64;
        (mean > 0.0).then(|| self.batch_size as f64 / mean)
    }

    fn to_text(&self) -> String {
        let mut cells = vec![self.prompt_len.to_string(), self.batch_size.to_string()];
        for values in [&self.first_token, &self.per_token, &self.between_tokens] {
            for share in [0.5, 0.9] {
                let seconds = quantile(values, share);
                cells.push(seconds.map_or("-".to_owned(), |s| format!("{:.2}", s * 1e3)));
            }
        }
        cells.push(self.speed().map_or("-".to_owned(), |speed| format!("{speed:.1}")));
        let cells: Vec<String> = cells.iter().map(|cell| format!("{cell:>10}")).collect();
        cells.join(" ")
    }

    fn to_json(&self) -> Value {
        let figures =
            |values: &[f64]| json!({"p50": quantile(values, 0.5), "p90": quantile(values, 0.9)});
        json!({
            "batch_size": self.batch_size,
            "prompt_len": self.prompt_len,
            "first_token_seconds": figures(&self.first_token),
            "per_token_seconds": figures(&self.per_token),
            "between_tokens_seconds": figures(&self.between_tokens),
            "tokens_per_second": self.speed(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_counts_by_the_times_of_its_tokens() {
        let mut row = Row::new(2, 8);
        row.add(&[1.0, 1.5, 1.5, 2.5]);
        row.add(&[2.0]);
        assert_eq!(row.first_token, [1.0, 2.0]);
        assert_eq!(row.per_token, [0.5]);
        assert_eq!(row.between_tokens, [0.5, 0.0, 1.0]);
        assert_eq!(row.speed(), Some(4.0));
        assert_eq!(Row::new(1, 8).speed(), None);
    }
}
