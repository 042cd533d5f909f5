//! Time to the first token of a question over chunks, by what is in the pool already.
//!
//! Each scene is a history that ends in the same question: nothing cached, everything cached, one
//! chunk switched off, the order reversed. The question is new each time, so its own tokens are
//! always computed; what the engine counted as reused and encoded is printed beside the time.

use std::io::{self, Write};
use std::time::Instant;

use anyhow::{Result, bail};
use serde_json::{Value, json};
use strand_engine::context::{Chunk, ChunkKind, Context, Conversation, ReusePolicy};
use strand_engine::{ChunkId, Error, Event, Request, Reuse, Segment};

use super::statistics::quantile;
use super::workload::Random;
use super::{Bench, merge, peak_memory};
use crate::Outcome;
use crate::args::{CommonArgs, ReuseBenchArgs};

/// What happened before the question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scene {
    Cold,
    Resident,
    OneOff,
    Reversed,
}

impl Scene {
    const ALL: [Self; 4] = [Self::Cold, Self::Resident, Self::OneOff, Self::Reversed];

    fn name(self) -> &'static str {
        match self {
            Self::Cold => "nothing cached",
            Self::Resident => "all chunks cached",
            Self::OneOff => "first chunk switched off",
            Self::Reversed => "order reversed",
        }
    }
}

struct Row {
    policy: ReusePolicy,
    scene: Scene,
    seconds: Vec<f64>,
    reuse: Reuse,
}

pub fn run(args: &ReuseBenchArgs, common: &CommonArgs) -> Result<Outcome> {
    let bench = Bench::start(&args.model, common, 1)?;
    let (tokens, room) = (
        args.num_chunks * args.chunk_len + args.question_len + 1,
        bench.engine.plan().max_model_len,
    );
    if tokens > room {
        bail!(
            "the longest request has {tokens} tokens, the model takes {room}; \
             lower --num-chunks or --chunk-len"
        );
    }
    let mut random = Random::new(args.model.seed);
    let vocab_size = bench.engine.plan().vocab_size;
    let chunks: Vec<Vec<u32>> =
        (0..args.num_chunks).map(|_| random.prompt(args.chunk_len, vocab_size)).collect();
    let mut rows = Vec::new();
    for policy in ReusePolicy::ALL {
        for scene in Scene::ALL {
            let mut row = Row { policy, scene, seconds: Vec::new(), reuse: Reuse::default() };
            // only what all chunks leave behind can be asked again without encoding them first
            let repeats = if scene == Scene::Resident { args.repeats } else { args.cold_repeats };
            for _ in 0..repeats {
                let mut question = || random.prompt(args.question_len, vocab_size);
                prepare(&bench, &chunks, policy, scene, question())?;
                let (seconds, reuse) = ask(&bench, arrange(&chunks, policy, scene), question())?;
                row.seconds.push(seconds);
                row.reuse = reuse;
            }
            rows.push(row);
        }
    }
    report(&bench, args, &rows)?;
    Ok(Outcome::Done)
}

fn chunk_id(tokens: &[u32]) -> ChunkId {
    let bytes: Vec<u8> = tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
    ChunkId::of(&bytes)
}

/// The chunks as they stand before the question.
fn arrange(chunks: &[Vec<u32>], policy: ReusePolicy, scene: Scene) -> Vec<Segment> {
    let mut context = Context::new(policy, Conversation::default(), Vec::new());
    let mut order: Vec<&Vec<u32>> = chunks.iter().collect();
    if scene == Scene::Reversed {
        order.reverse();
    }
    for tokens in order {
        let (name, text, kind) = (String::new(), String::new(), ChunkKind::File);
        let chunk = Chunk { id: chunk_id(tokens), name, kind, text, ids: tokens.clone() };
        context.load(chunk, true);
    }
    if scene == Scene::OneOff {
        context.set_active(0, false);
    }
    context.chunk_segments()
}

/// Leaves the pool with what the scene takes for granted: nothing, or the chunks in their order.
fn prepare(
    bench: &Bench,
    chunks: &[Vec<u32>],
    policy: ReusePolicy,
    scene: Scene,
    question: Vec<u32>,
) -> Result<()> {
    if scene != Scene::Resident {
        for chunk in chunks {
            bench.engine.erase(chunk_id(chunk))?;
        }
    }
    if scene != Scene::Cold {
        ask(bench, arrange(chunks, policy, Scene::Resident), question)?;
    }
    Ok(())
}

/// Seconds to the first token, and what was reused.
fn ask(bench: &Bench, mut segments: Vec<Segment>, question: Vec<u32>) -> Result<(f64, Reuse)> {
    segments.push(Segment::new(question));
    let mut request = Request::new(Vec::new());
    request.prompt = segments;
    request.limits.max_tokens = Some(1);
    request.limits.ignore_eos = true;
    let started = Instant::now();
    let mut stream = bench.engine.submit(request)?;
    let mut first = None;
    while let Some(event) = stream.next_blocking() {
        match event {
            Event::Token { .. } => first = Some(started.elapsed().as_secs_f64()),
            Event::Finished { reuse, .. } => {
                return Ok((first.expect("a token comes before the end"), reuse));
            }
            Event::Failed(error) => return Err(error.into()),
            Event::Prompt { .. } => {}
        }
    }
    Err(Error::Stopped.into())
}

fn report(bench: &Bench, args: &ReuseBenchArgs, rows: &[Row]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    if !bench.json {
        writeln!(
            out,
            "model {}, {} chunks of {} tokens, a question of {}",
            bench.model, args.num_chunks, args.chunk_len, args.question_len
        )?;
        let heads = format!("{:<12} {:<25}", "policy", "before the question");
        writeln!(
            out,
            "{heads} {:>12} {:>8} {:>8} {:>10}",
            "first token", "reused", "encoded", "x cold"
        )?;
        for row in rows {
            writeln!(out, "{}", row.to_text(rows))?;
        }
        writeln!(out, "first token: median in milliseconds; x cold: against nothing cached")?;
    }
    let mut line = bench.describe();
    let own = json!({
        "bench": "reuse",
        "num_chunks": args.num_chunks,
        "chunk_len": args.chunk_len,
        "question_len": args.question_len,
        "repeats": args.repeats,
        "cold_repeats": args.cold_repeats,
        "peak_memory_bytes": peak_memory(),
        "rows": rows.iter().map(|row| row.to_json(rows)).collect::<Vec<_>>(),
    });
    merge(&mut line, own);
    writeln!(out, "{line}")
}

impl Row {
    fn median(&self) -> f64 {
        quantile(&self.seconds, 0.5).expect("every row was measured")
    }

    /// How much sooner than with nothing cached under the same policy.
    fn speed_up(&self, rows: &[Row]) -> f64 {
        let cold = rows.iter().find(|row| row.policy == self.policy && row.scene == Scene::Cold);
        cold.expect("every policy has a cold row").median() / self.median()
    }

    fn to_text(&self, rows: &[Row]) -> String {
        format!(
            "{:<12} {:<25} {:>12.2} {:>8} {:>8} {:>10.1}",
            self.policy.as_str(),
            self.scene.name(),
            self.median() * 1e3,
            self.reuse.device,
            self.reuse.encoded,
            self.speed_up(rows)
        )
    }

    fn to_json(&self, rows: &[Row]) -> Value {
        json!({
            "policy": self.policy.as_str(),
            "scene": self.scene.name(),
            "first_token_seconds": self.seconds,
            "median_seconds": self.median(),
            "speed_up": self.speed_up(rows),
            "reused_tokens": self.reuse.device,
            "encoded_tokens": self.reuse.encoded,
        })
    }
}
