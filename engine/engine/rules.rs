//! What a request's limits mean for this model and this pool; what can't be served is refused.

use super::Engine;
use crate::batch::Runner;
use crate::error::{Error, at_least, at_most};
use crate::request::{Request, longest_view, num_blocks};
use crate::sequence::Rules;

/// Most choices of one request.
const MAX_N: u32 = 128;

impl<R: Runner> Engine<R> {
    /// Checks a request against the model and the pool and resolves what it left open.
    pub(super) fn rules(&self, request: &Request) -> Result<Rules, Error> {
        let limits = &request.limits;
        let prompt_tokens = request.prompt_tokens();
        let max_model_len = self.plan.max_model_len;
        if prompt_tokens == 0 || request.prompt.iter().any(|s| s.tokens.is_empty()) {
            return Err(Error::EmptyPrompt);
        }
        let vocab_size = self.plan.vocab_size;
        let tokens = request.prompt.iter().flat_map(|segment| &segment.tokens);
        if let Some(&token) = tokens.into_iter().find(|&&token| token as usize >= vocab_size) {
            return Err(Error::UnknownToken { token, vocab_size });
        }
        if prompt_tokens >= max_model_len {
            return Err(Error::PromptTooLong { prompt_tokens, max_model_len });
        }
        at_least("max_tokens", limits.max_tokens.unwrap_or(1), 1)?;
        at_least("n", limits.n as usize, 1)?;
        let max_n = if limits.embed { 1 } else { self.plan.max_queue.min(MAX_N as usize) };
        at_most("n", limits.n as usize, max_n)?;
        at_most("segments", request.prompt.len(), usize::from(u16::MAX))?;
        // a chunk may have seen more than is shown now, and has its positions behind that
        let longest = longest_view(&request.prompt, self.plan.block_size);
        if longest > max_model_len {
            return Err(Error::PromptTooLong { prompt_tokens: longest, max_model_len });
        }
        for top in [limits.logprobs, limits.prompt_logprobs].into_iter().flatten() {
            at_most("logprobs", top as usize, vocab_size)?;
        }
        if let Some(max_tokens) = limits.max_tokens
            && max_tokens > max_model_len - prompt_tokens
        {
            return Err(Error::TooManyTokens { prompt_tokens, max_tokens, max_model_len });
        }
        if let Some(index) = limits.stop.iter().position(String::is_empty) {
            return Err(Error::EmptyStop { index });
        }
        if !limits.stop.is_empty() && self.tokenizer.is_none() {
            return Err(Error::NoTokenizer);
        }
        if limits.prompt_logprobs.is_some() && request.prompt.iter().any(|s| s.hidden > 0) {
            return Err(Error::HiddenPromptLogprobs);
        }
        request.sampling.check(vocab_size).map_err(Error::Sampling)?;
        let max_tokens = self.max_tokens(request)?;
        at_most("min_tokens", limits.min_tokens, max_tokens)?;
        if let Some(grammar) = &limits.grammar
            && grammar.vocab_size() != vocab_size
        {
            let reason = "it was compiled for another model".into();
            return Err(Error::Grammar { reason });
        }
        let ignores_eos = limits.ignore_eos && limits.grammar.is_none();
        let eos = if ignores_eos { &[][..] } else { &self.eos_token_ids };
        let stops = limits.stop_token_ids.iter().chain(eos).copied();
        Ok(Rules {
            max_tokens,
            min_tokens: limits.min_tokens,
            stop_token_ids: stops.filter(|&token| (token as usize) < vocab_size).collect(),
            logprobs: limits.logprobs.map(|top| top as usize),
            prompt_logprobs: limits.prompt_logprobs.map(|top| top as usize),
            embed: limits.embed,
        })
    }

    /// What was asked for, or all that the model's length and the pool leave.
    fn max_tokens(&self, request: &Request) -> Result<usize, Error> {
        let room = self.plan.max_model_len - request.prompt_tokens();
        let prompt_blocks = num_blocks(&request.prompt, self.plan.block_size);
        let last = request.prompt.last().map_or(0, |segment| segment.tokens.len());
        let before = prompt_blocks - last.div_ceil(self.plan.block_size);
        let needed = |tokens: usize| before + (last + tokens).div_ceil(self.plan.block_size);
        let available = self.plan.num_blocks;
        let least = request.limits.max_tokens.unwrap_or(1);
        if needed(least) > available {
            return Err(Error::PoolTooSmall { needed: needed(least), available });
        }
        let in_pool = (available - before) * self.plan.block_size - last;
        Ok(request.limits.max_tokens.unwrap_or(room.min(in_pool)))
    }
}
