//! How often the likeliest token on int8 KV is the likeliest on lossless KV.
//!
//! Answers are generated on the chunks' own KV. Then every token of them is asked for again, behind
//! the tokens before it, with the chunk from its int8 file: one miss does not make others.

use anyhow::{Result, bail};
use strand_engine::store::Codec;
use strand_engine::{Exactness, Request, Restore, Segment};

use super::super::Bench;
use super::samples::Sample;
use crate::args::TiersArgs;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Agreement {
    pub questions: usize,
    pub tokens: usize,
    /// The same with int8.
    pub agreeing: usize,
}

impl Agreement {
    pub fn measure(bench: &Bench, args: &TiersArgs, samples: &[Sample]) -> Result<Self> {
        let mut found = Self::default();
        for sample in samples {
            let chunk = sample.context.entries()[0].chunk.id;
            bench.engine.erase(chunk, None)?;
            let answers = answer_all(bench, args, sample)?;
            bench.engine.save(sample.context.segments_to(0), "", Codec::Int8)?;
            // the lossless rows would be taken where they are found
            bench.engine.forget(chunk, None)?;
            for (prompt, answer) in sample.questions.iter().zip(&answers) {
                found.questions += 1;
                for (place, &expected) in answer.iter().enumerate() {
                    let token = next(bench, sample, prompt, &answer[..place])?;
                    found.tokens += 1;
                    found.agreeing += usize::from(token == Some(expected));
                }
            }
            bench.engine.erase(chunk, None)?;
        }
        Ok(found)
    }

    pub fn share(&self) -> Option<f64> {
        (self.tokens > 0).then(|| self.agreeing as f64 / self.tokens as f64)
    }
}

fn request(sample: &Sample, prompt: Vec<Segment>) -> Request {
    let mut request = Request::new(Vec::new());
    request.prompt = prompt;
    request.limits.ignore_eos = sample.ignore_eos;
    request.restore = Restore::Always;
    request
}

/// The answers on KV as it was computed.
fn answer_all(bench: &Bench, args: &TiersArgs, sample: &Sample) -> Result<Vec<Vec<u32>>> {
    bench.ask(sample.context.encode(0))?; // a chunk without questions is saved too
    let answers = sample.questions.iter().map(|prompt| {
        let mut request = request(sample, prompt.clone());
        request.limits.max_tokens = Some(args.answer_len);
        Ok(bench.ask(request)?.tokens)
    });
    answers.collect()
}

/// The token behind the start of an answer on int8 KV; `None`: the answer ends there.
fn next(bench: &Bench, sample: &Sample, prompt: &[Segment], start: &[u32]) -> Result<Option<u32>> {
    let mut prompt = prompt.to_vec();
    prompt.last_mut().expect("a prompt ends in a question").tokens.extend(start);
    let mut request = request(sample, prompt);
    request.limits.max_tokens = Some(1);
    request.allow_lossy = true;
    let answer = bench.ask(request)?;
    if answer.exactness != Exactness::Approximate {
        bail!("the chunk's int8 file was not used");
    }
    Ok(answer.tokens.first().copied())
}
