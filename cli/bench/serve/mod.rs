//! Load on a server that speaks OpenAI's protocol, as its clients feel it.
//!
//! Everything goes over HTTP and is streamed; times are those of this side. Against a server of
//! one's own the same load is put on the same engine without HTTP: the difference is the server.

pub mod args;
mod client;
mod load;
mod own;
mod plot;
mod report;

use std::fs;
use std::io::{self, Write};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use strand_engine::SamplingParams;

use super::disk::Folder;
use super::statistics::quantile;
use super::workload::Random;
use super::{Bench, merge};
use crate::answer::shortest;
use crate::args::CommonArgs;
use crate::{Outcome, UsageError};
use args::{Endpoint, ServeBenchArgs};
use client::{Client, Settings};
use load::{Pace, Run, Work, drive};
use own::OwnServer;
use report::Figures;

/// Ids that every vocabulary has.
const VOCABULARY: usize = 1000;

pub fn run(args: &ServeBenchArgs, common: &CommonArgs) -> Result<Outcome> {
    let sampling = SamplingParams { temperature: args.temperature, ..Default::default() };
    sampling.check(usize::MAX).map_err(UsageError)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start threads")?;
    let Some(url) = &args.url else { return runtime.block_on(of_our_own(args, common)) };
    runtime.block_on(against(url, args, common))
}

/// The load on a server that runs already.
async fn against(url: &str, args: &ServeBenchArgs, common: &CommonArgs) -> Result<Outcome> {
    let client = client(url, args).await?;
    let mut random = Random::new(args.model.seed);
    let run = measure(args, &mut random, |work| client.answer(work)).await?;
    let title = format!("{} at {url}", client.model);
    report(args, common, &title, &run, None)
}

/// The same load on a server of our own and, without HTTP, on an engine, in turn.
async fn of_our_own(args: &ServeBenchArgs, common: &CommonArgs) -> Result<Outcome> {
    let folder = Folder::new(common)?;
    let server = OwnServer::start(&args.model, &folder, args.num_requests)?;
    let client = client(&server.url, args).await?;
    let bench = Bench::start(&args.model, common, args.num_requests)?;
    let mut random = Random::new(args.model.seed);
    let (mut over_http, mut direct) = (Run::default(), Run::default());
    for _ in 0..args.repeats {
        let answer = |work| own::answer(&bench.engine, args.temperature, work);
        direct.add(measure(args, &mut random, answer).await?);
        over_http.add(measure(args, &mut random, |work| client.answer(work)).await?);
    }
    let title = format!("{} over HTTP", bench.model);
    report(args, common, &title, &over_http, Some(&Figures::of(&direct)))
}

/// One load, after a request to warm up.
async fn measure<F: Future<Output = Result<load::Times, String>>>(
    args: &ServeBenchArgs,
    random: &mut Random,
    answer: impl Fn(Work) -> F,
) -> Result<Run> {
    // connections are made and caches warm before the clock runs
    let warm_up = Work { output_len: 4, ..work(args, 0, random) };
    if let Err(why) = answer(warm_up).await {
        bail!("there is no answer: {why}");
    }
    let works = (0..args.num_requests).map(|index| work(args, index as u64, random)).collect();
    Ok(drive(pace(args), works, random, answer).await)
}

async fn client(url: &str, args: &ServeBenchArgs) -> Result<Client> {
    let settings = Settings {
        endpoint: args.endpoint,
        temperature: args.temperature,
        timeout: Duration::from_secs(args.timeout as u64),
    };
    let (key, model) = (args.api_key.clone(), args.served_model_name.clone());
    Client::new(url, key, model, settings).await
}

fn pace(args: &ServeBenchArgs) -> Pace {
    args.request_rate.map_or(Pace::AtATime(args.concurrency), Pace::ASecond)
}

fn work(args: &ServeBenchArgs, index: u64, random: &mut Random) -> Work {
    Work {
        prompt: random.prompt(args.input_len, VOCABULARY),
        output_len: args.output_len,
        // servers take seeds as signed numbers of 64 bits
        seed: args.model.seed.wrapping_add(index) >> 1,
    }
}

/// `direct`: the same load without HTTP, where there is such a run.
fn report(
    args: &ServeBenchArgs,
    common: &CommonArgs,
    title: &str,
    run: &Run,
    direct: Option<&Figures>,
) -> Result<Outcome> {
    let figures = Figures::of(run);
    if let Some(path) = &args.plot {
        fs::write(path, plot::svg(title, run, &figures))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    print(args, common, title, &figures, direct)?;
    // some failures are a result; nothing but failures is none
    Ok(if figures.answered() > 0 { Outcome::Done } else { Outcome::Failed })
}

fn print(
    args: &ServeBenchArgs,
    common: &CommonArgs,
    title: &str,
    figures: &Figures,
    direct: Option<&Figures>,
) -> io::Result<()> {
    let mut out = io::stdout().lock();
    if !common.json {
        writeln!(out, "{title}: {}", described(args))?;
        writeln!(out, "{}", figures.to_text())?;
        writeln!(out, "first token: from sending the request to the first text of its answer;")?;
        writeln!(out, "between tokens: from one piece of text to the next, as they arrive")?;
        if let Some(direct) = direct {
            writeln!(out, "\nthe same on the engine itself\n{}", direct.to_text())?;
            let overhead = Overhead::of(figures, direct);
            writeln!(
                out,
                "HTTP: {:.3} x the tokens/s, {:+.2} ms to the first token (medians)",
                overhead.speed, overhead.first_milliseconds
            )?;
        }
        if let Some(note) = &args.model.vs {
            writeln!(out, "vs {note}")?;
        }
    }
    let mut line = describe(args, title);
    merge(&mut line, figures.to_json());
    if let Some(direct) = direct {
        let overhead = Overhead::of(figures, direct);
        let own = json!({
            "repeats": args.repeats,
            "direct": direct.to_json(),
            "speed_over_direct": overhead.speed,
            "added_first_token_milliseconds": overhead.first_milliseconds,
        });
        merge(&mut line, own);
    }
    writeln!(out, "{line}")
}

/// What HTTP costs.
struct Overhead {
    /// Tokens a second over those without it.
    speed: f64,
    /// Between the medians of both.
    first_milliseconds: f64,
}

impl Overhead {
    fn of(figures: &Figures, direct: &Figures) -> Self {
        let first = |figures: &Figures| quantile(&figures.first, 0.5).unwrap_or_default();
        Self {
            speed: figures.tokens_per_second() / direct.tokens_per_second(),
            first_milliseconds: (first(figures) - first(direct)) * 1e3,
        }
    }
}

/// What was asked for, in words.
fn described(args: &ServeBenchArgs) -> String {
    let (what, unit) = match args.endpoint {
        Endpoint::Completions => ("completions", "tokens"),
        Endpoint::Chat => ("chats", "words"),
    };
    let pace = match pace(args) {
        Pace::AtATime(count) => format!("{count} at a time"),
        Pace::ASecond(rate) => format!("{rate} a second at random times"),
    };
    format!(
        "{} {what} of {} {unit}, answers of {} tokens, {pace}",
        args.num_requests, args.input_len, args.output_len
    )
}

fn describe(args: &ServeBenchArgs, title: &str) -> Value {
    let endpoint = match args.endpoint {
        Endpoint::Completions => "completions",
        Endpoint::Chat => "chat",
    };
    let concurrency = args.request_rate.is_none().then_some(args.concurrency);
    json!({
        "bench": "serve",
        "server": title,
        "endpoint": endpoint,
        "requests": args.num_requests,
        "concurrency": concurrency,
        "request_rate": args.request_rate,
        "input_len": args.input_len,
        "output_len": args.output_len,
        "temperature": shortest(args.temperature),
        "seed": args.model.seed,
        "vs": args.model.vs,
    })
}
