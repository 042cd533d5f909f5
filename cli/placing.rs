//! A context before a running engine: the prompt that fits, and where its chunks have their KV.

use strand_engine::context::{Context, Prompt};
use strand_engine::{EngineHandle, Error, KvVariant, TiersOf, num_blocks};
use strand_models::{ChatTemplate, Tokenizer};

/// Tokens that an answer is left where nobody says how long it may be.
pub fn answer_room(length: usize) -> usize {
    (length / 4).clamp(1, 1024)
}

/// The longest prompt that leaves room for an answer of `kept` tokens, in the model's length and
/// in the pool: the oldest turns are left out where they don't fit.
pub fn prompt(
    engine: &EngineHandle,
    context: &Context,
    (template, tokenizer): (&ChatTemplate, &Tokenizer),
    kept: usize,
) -> Result<Prompt, Error> {
    let plan = engine.plan();
    let mut room = plan.max_model_len.saturating_sub(kept);
    // Every turn starts a block of its own: short ones fill the pool before the length.
    loop {
        let prompt = context.prompt(template, tokenizer, room)?;
        let answers = kept.div_ceil(plan.block_size);
        let needed = num_blocks(&prompt.segments, plan.block_size) + answers;
        if needed <= plan.num_blocks {
            return Ok(prompt);
        }
        // A block holds at least one token: never more is dropped than must be.
        room = prompt.tokens().saturating_sub(needed - plan.num_blocks);
    }
}

/// Where all chunks of a context have their KV, in one question.
pub fn tiers(
    engine: &EngineHandle,
    context: &Context,
    salt: &str,
    accepted: KvVariant,
) -> Result<Vec<TiersOf>, Error> {
    let chunks = context.entries().len();
    if chunks == 0 {
        return Ok(Vec::new());
    }
    let mut tiers = engine.residency(context.all_chunks(), salt, accepted)?;
    Ok(tiers.split_off(tiers.len() - chunks))
}
