//! Sampling options: the user's word, else the model's, else the neutral value.
//!
//! As vLLM does it, with one addition: a model whose generation_config says `do_sample: false`
//! is decoded greedily, and its numbers for sampling are not used. Pure but for [`any_seed`].

use std::hash::{BuildHasher, RandomState};

use strand_engine::{Limits, SamplingParams};
use strand_models::GenerationDefaults;

use crate::UsageError;
use crate::args::SamplingArgs;

/// How tokens are drawn. `seed` holds where the user gave none.
pub fn params(args: &SamplingArgs, model: &GenerationDefaults, seed: u64) -> SamplingParams {
    let greedy = GenerationDefaults {
        temperature: Some(0.0),
        repetition_penalty: model.repetition_penalty,
        ..GenerationDefaults::default()
    };
    let model = if model.do_sample == Some(false) { &greedy } else { model };
    let top_k = args.top_k.or(model.top_k).filter(|&k| k > 0);
    SamplingParams {
        temperature: args.temperature.or(model.temperature).unwrap_or(1.0),
        top_k,
        top_p: args.top_p.or(model.top_p).unwrap_or(1.0),
        min_p: args.min_p.or(model.min_p).unwrap_or(0.0),
        repetition_penalty: args.repetition_penalty.or(model.repetition_penalty).unwrap_or(1.0),
        presence_penalty: args.presence_penalty.unwrap_or(0.0),
        frequency_penalty: args.frequency_penalty.unwrap_or(0.0),
        logit_bias: Vec::new(),
        seed: args.seed.unwrap_or(seed),
    }
}

/// Where the answer ends and what it reports.
pub fn limits(args: &SamplingArgs) -> Limits {
    Limits {
        max_tokens: args.max_tokens,
        stop: args.stop.clone(),
        ignore_eos: args.ignore_eos,
        logprobs: args.logprobs,
        ..Limits::default()
    }
}

/// Refuses values out of range before anything is loaded.
pub fn check(args: &SamplingArgs) -> Result<(), UsageError> {
    if let Some(index) = args.stop.iter().position(String::is_empty) {
        return Err(UsageError(format!("--stop number {} is empty", index + 1)));
    }
    // Any vocabulary will do: no option names a token.
    let params = params(args, &GenerationDefaults::default(), 0);
    params.check(usize::MAX).map_err(UsageError)
}

/// A seed that no other run has had.
pub fn any_seed() -> u64 {
    // The standard library keys its hash maps from the system's entropy.
    RandomState::new().hash_one(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(do_sample: Option<bool>) -> GenerationDefaults {
        GenerationDefaults {
            do_sample,
            temperature: Some(0.7),
            top_k: Some(20),
            repetition_penalty: Some(1.1),
            ..GenerationDefaults::default()
        }
    }

    #[test]
    fn the_model_speaks_where_the_user_does_not() {
        let args = SamplingArgs { top_k: Some(0), ..SamplingArgs::default() };
        for do_sample in [None, Some(true)] {
            let found = params(&args, &model(do_sample), 5);
            assert_eq!(found.temperature, 0.7);
            assert_eq!(found.top_k, None, "0 keeps all");
            assert_eq!((found.top_p, found.repetition_penalty, found.seed), (1.0, 1.1, 5));
        }
    }

    #[test]
    fn a_model_that_does_not_sample_is_greedy_until_the_user_says_otherwise() {
        let greedy = params(&SamplingArgs::default(), &model(Some(false)), 0);
        assert_eq!((greedy.temperature, greedy.top_k), (0.0, None));
        assert_eq!(greedy.repetition_penalty, 1.1);
        let args =
            SamplingArgs { temperature: Some(0.5), seed: Some(3), ..SamplingArgs::default() };
        let asked = params(&args, &model(Some(false)), 0);
        assert_eq!((asked.temperature, asked.top_k, asked.seed), (0.5, None, 3));
    }

    #[test]
    fn without_a_word_from_anyone_tokens_are_drawn_as_they_come() {
        let found = params(&SamplingArgs::default(), &GenerationDefaults::default(), 0);
        assert_eq!(found, SamplingParams { temperature: 1.0, ..SamplingParams::default() });
    }

    #[test]
    fn values_out_of_range_are_refused_early() {
        let bad = SamplingArgs { temperature: Some(-1.0), ..SamplingArgs::default() };
        assert!(check(&bad).unwrap_err().0.starts_with("temperature is -1"));
        let bad = SamplingArgs { stop: vec![String::new()], ..SamplingArgs::default() };
        assert_eq!(check(&bad).unwrap_err().0, "--stop number 1 is empty");
        assert!(check(&SamplingArgs::default()).is_ok());
    }
}
