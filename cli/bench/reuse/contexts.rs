//! Switching between contexts that share half their chunks.
//!
//! Each stands in an order of its own, so that the shared chunks come first in some and last in
//! others. All are visited twice: the first visit encodes what no context before had, the second
//! is the switch.

use anyhow::Result;
use strand_engine::Reuse;
use strand_engine::context::{Chunk, Context, ReusePolicy};

use super::super::Bench;
use super::super::workload::Random;
use super::{ask, chunk, context};
use crate::args::ReuseBenchArgs;

/// The visits of one policy.
pub struct Switches {
    pub policy: ReusePolicy,
    pub first: Visits,
    pub again: Visits,
}

/// Questions asked in one context after the other.
#[derive(Default)]
pub struct Visits {
    /// To the first token.
    pub seconds: Vec<f64>,
    /// Over all of them.
    pub reuse: Reuse,
}

pub fn measure(
    bench: &Bench,
    args: &ReuseBenchArgs,
    policy: ReusePolicy,
    random: &mut Random,
) -> Result<Switches> {
    let vocab_size = bench.engine.plan().vocab_size;
    let mut chunks = |count: usize| -> Vec<Chunk> {
        (0..count).map(|_| chunk(random.prompt(args.context_chunk_len, vocab_size))).collect()
    };
    let shared = chunks(args.context_chunks / 2);
    let contexts: Vec<Context> = (0..args.contexts)
        .map(|number| {
            let own = chunks(args.context_chunks - shared.len());
            let mut all: Vec<&Chunk> = shared.iter().chain(&own).collect();
            all.rotate_left(number % args.context_chunks);
            context(policy, all)
        })
        .collect();
    let mut visit = || -> Result<Visits> {
        let mut visits = Visits::default();
        for context in &contexts {
            let question = random.prompt(args.question_len, vocab_size);
            let answer = ask(bench, context, question)?;
            visits.seconds.push(answer.first_token_seconds);
            visits.reuse.device += answer.reuse.device;
            visits.reuse.host += answer.reuse.host;
            visits.reuse.disk += answer.reuse.disk;
            visits.reuse.encoded += answer.reuse.encoded;
            visits.reuse.recomputed += answer.reuse.recomputed;
        }
        Ok(visits)
    };
    let (first, again) = (visit()?, visit()?);
    for entry in contexts.iter().flat_map(Context::entries) {
        bench.engine.erase(entry.chunk.id, None)?;
    }
    Ok(Switches { policy, first, again })
}
