//! From a row's logits and hidden states to what the forward says of it.

use strand_layers::sampler::{self, DrawContext};

use crate::batch::{BatchRow, RowOutput, SampleRequest, Sampled};
use crate::error::Error;
use crate::grammar::PendingMask;

/// Reads a row's logits and hidden states in the order a batch asks for them; `None` where
/// one is not a number.
///
/// # Errors
/// The grammar can't say what may come next.
pub(crate) fn row_output<'a>(
    row: &BatchRow,
    rows: &mut impl Iterator<Item = &'a [f32]>,
    hidden: &mut impl Iterator<Item = Vec<f32>>,
) -> Result<Option<RowOutput>, Error> {
    let hidden: Vec<Vec<f32>> = hidden.take(row.hidden.len()).collect();
    let mut is_sound = hidden.iter().flatten().all(|value| value.is_finite());
    let mut output = RowOutput { id: row.id, sampled: None, prompt_logprobs: Vec::new(), hidden };
    let mut next_row = || {
        let logits = rows.next().expect("one row of logits for every row asked for");
        is_sound &= sampler::all_finite(logits);
        (logits, is_sound)
    };
    if let Some(wanted) = &row.prompt_logprobs {
        for &token in &wanted.next {
            output.prompt_logprobs.push(sampler::logprobs(next_row().0, token, wanted.top));
        }
    }
    if let Some(wanted) = &row.sample
        && let (logits, true) = next_row()
    {
        output.sampled = Some(choose(logits, wanted)?);
    }
    Ok(is_sound.then_some(output))
}

/// The token after a run, with what was asked to be told of it.
///
/// # Errors
/// The grammar can't say what may come next.
pub(crate) fn choose(logits: &[f32], wanted: &SampleRequest) -> Result<Sampled, Error> {
    let (prompt, generated) = wanted.history.split_at(wanted.prompt_len);
    let context = DrawContext {
        choice: wanted.choice,
        position: wanted.position,
        prompt,
        output: generated,
        suppressed: &wanted.suppressed,
        allowed: wanted.allowed.as_ref().map(PendingMask::wait).transpose()?,
    };
    let token = sampler::sample(&mut logits.to_vec(), &wanted.params, &context);
    let logprobs = wanted.logprobs.map(|top| sampler::logprobs(logits, token, top));
    Ok(Sampled { token, logprobs })
}
