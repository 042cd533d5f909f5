//! From one row of logits to one token: penalties, temperature, top-k, top-p, min-p, and a draw.
//!
//! Pure functions over slices. A draw depends on the seed, the index of the choice and the
//! position of the token alone, so it is the same in any batch and after any preemption.
//! Greedy decoding (temperature 0) takes the first of equal maxima.

use std::collections::HashMap;

/// How tokens are chosen. Spelt as in vLLM; `None` and the neutral values switch a step off.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy.
    pub temperature: f32,
    /// Keep the k most likely tokens.
    pub top_k: Option<u32>,
    /// Keep the smallest set whose probability reaches this, in (0, 1].
    pub top_p: f32,
    /// Keep tokens at least this likely relative to the most likely one, in [0, 1].
    pub min_p: f32,
    /// Divides (or multiplies, when negative) the logits of tokens seen in prompt or output.
    pub repetition_penalty: f32,
    /// Subtracted once from the logits of tokens in the output.
    pub presence_penalty: f32,
    /// Subtracted per occurrence in the output.
    pub frequency_penalty: f32,
    /// Added to single logits.
    pub logit_bias: Vec<(u32, f32)>,
    pub seed: u64,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: None,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}

impl SamplingParams {
    /// True when the tokens seen so far change the distribution.
    pub fn needs_history(&self) -> bool {
        self.repetition_penalty != 1.0
            || self.presence_penalty != 0.0
            || self.frequency_penalty != 0.0
    }

    /// Names the first value outside its range, with the range.
    pub fn check(&self, vocab_size: usize) -> Result<(), String> {
        let ranges = [
            ("temperature", self.temperature, 0.0, 100.0),
            ("top_p", self.top_p, f32::MIN_POSITIVE, 1.0),
            ("min_p", self.min_p, 0.0, 1.0),
            ("repetition_penalty", self.repetition_penalty, f32::MIN_POSITIVE, 100.0),
            ("presence_penalty", self.presence_penalty, -2.0, 2.0),
            ("frequency_penalty", self.frequency_penalty, -2.0, 2.0),
        ];
        for (name, value, low, high) in ranges {
            if !(low..=high).contains(&value) {
                let open = if low == f32::MIN_POSITIVE { "above 0 and at most" } else { "from" };
                let range = if low == f32::MIN_POSITIVE {
                    format!("{open} {high}")
                } else {
                    format!("{open} {low} to {high}")
                };
                return Err(format!("{name} is {value}, it must be {range}"));
            }
        }
        if self.top_k == Some(0) {
            return Err("top_k is 0, it must be at least 1 (leave it out to keep all)".into());
        }
        for &(token, bias) in &self.logit_bias {
            if token as usize >= vocab_size {
                return Err(format!(
                    "logit_bias names token {token}, the vocabulary has {vocab_size}"
                ));
            }
            if !bias.is_finite() {
                return Err(format!("logit_bias of token {token} is {bias}, it must be finite"));
            }
        }
        Ok(())
    }
}

/// What one draw depends on besides the logits.
#[derive(Debug, Clone, Default)]
pub struct DrawContext<'a> {
    /// Index of the choice (`n` > 1).
    pub choice: u32,
    /// How many tokens were generated before this one.
    pub position: u32,
    /// Prompt tokens; read only when `needs_history`.
    pub prompt: &'a [u32],
    /// Tokens generated so far; read only when `needs_history`.
    pub output: &'a [u32],
    /// Tokens that may not be chosen now (stop tokens before `min_tokens`).
    pub suppressed: &'a [u32],
    /// One bit a token, the lowest first: others are never chosen, even where all of these are
    /// suppressed. At least one bit is set.
    pub allowed: Option<&'a [u32]>,
}

/// Log-probability of one token and of the most likely ones, of the unchanged distribution.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    pub token: u32,
    pub logprob: f32,
    /// Most likely first; equal ones by id.
    pub top: Vec<(u32, f32)>,
}

/// Log-probabilities before sampling changes anything.
pub fn logprobs(logits: &[f32], token: u32, top_n: usize) -> TokenLogprobs {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&x| f64::from(x - max).exp()).sum();
    let log_sum = f64::from(max) + sum.ln();
    let of = |x: f32| (f64::from(x) - log_sum) as f32;
    let top = most_likely(logits, top_n).into_iter().map(|id| (id, of(logits[id as usize])));
    TokenLogprobs { token, logprob: of(logits[token as usize]), top: top.collect() }
}

/// The logit of a token that may not be chosen. Finite, so that there is a likeliest token even
/// where all are suppressed.
const SUPPRESSED: f32 = f32::MIN;

/// Chooses the next token. `logits` is scratch afterwards.
pub fn sample(logits: &mut [f32], params: &SamplingParams, context: &DrawContext) -> u32 {
    penalize(logits, params, context);
    for &(token, bias) in &params.logit_bias {
        logits[token as usize] = finite(logits[token as usize] + bias);
    }
    for &token in context.suppressed {
        logits[token as usize] = SUPPRESSED;
    }
    if let Some(allowed) = context.allowed {
        forbid_others(logits, allowed);
    }
    if params.temperature == 0.0 {
        return argmax(logits);
    }
    let candidates = candidates(logits, params);
    let total: f64 = candidates.iter().map(|c| c.1).sum();
    let mut left = uniform(params.seed, context.choice, context.position) * total;
    for &(id, weight) in &candidates {
        left -= weight;
        if left < 0.0 {
            return id;
        }
    }
    candidates.last().expect("at least the most likely token is kept").0
}

/// A token without a bit is below any that is suppressed, and has no weight.
fn forbid_others(logits: &mut [f32], allowed: &[u32]) {
    for (id, logit) in logits.iter_mut().enumerate() {
        if allowed[id / 32] >> (id % 32) & 1 == 0 {
            *logit = f32::NEG_INFINITY;
        }
    }
}

/// Penalties and biases may be as large as they like: infinite logits have no distribution.
fn finite(logit: f32) -> f32 {
    logit.clamp(f32::MIN, f32::MAX)
}

fn penalize(logits: &mut [f32], params: &SamplingParams, context: &DrawContext) {
    if !params.needs_history() {
        return;
    }
    let mut counts: HashMap<u32, (bool, u32)> = HashMap::new();
    for &token in context.prompt {
        counts.entry(token).or_default();
    }
    for &token in context.output {
        counts.entry(token).or_default().1 += 1;
    }
    for (token, (_, in_output)) in counts {
        let logit = &mut logits[token as usize];
        if *logit > 0.0 {
            *logit /= params.repetition_penalty;
        } else {
            *logit *= params.repetition_penalty;
        }
        if in_output > 0 {
            *logit -= params.presence_penalty + params.frequency_penalty * in_output as f32;
        }
        *logit = finite(*logit);
    }
}

/// The first of the largest.
pub fn argmax(logits: &[f32]) -> u32 {
    // Sixteen at a time, then who it was: a vocabulary takes longer than a small model's layer
    // when it is walked one by one.
    let (sixteens, rest) = logits.as_chunks::<16>();
    let mut lanes = [f32::NEG_INFINITY; 16];
    for sixteen in sixteens {
        for (lane, &logit) in lanes.iter_mut().zip(sixteen) {
            *lane = if logit > *lane { logit } else { *lane };
        }
    }
    let max = lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |max, &logit| max.max(logit));
    logits.iter().position(|&logit| logit == max).unwrap_or(0) as u32
}

/// Whether all are finite.
pub fn all_finite(logits: &[f32]) -> bool {
    // no way out early, so that it becomes vector code
    logits.iter().fold(true, |all, logit| all & logit.is_finite())
}

/// The tokens that may be drawn with their unnormalized weights, most likely first.
///
/// Order as in vLLM: temperature, then min-p, top-k and top-p on the scaled distribution.
fn candidates(logits: &[f32], params: &SamplingParams) -> Vec<(u32, f64)> {
    let max = logits[argmax(logits) as usize];
    let temperature = f64::from(params.temperature);
    let weight = |logit: f32| (f64::from(logit - max) / temperature).exp();
    let keep = params.top_k.map_or(logits.len(), |k| (k as usize).min(logits.len()));
    let sorted = params.top_k.is_some() || params.top_p < 1.0;
    let ids: Vec<u32> =
        if sorted { most_likely(logits, keep) } else { (0..logits.len() as u32).collect() };
    let floor = f64::from(params.min_p);
    let mut kept: Vec<(u32, f64)> = ids
        .into_iter()
        .map(|id| (id, weight(logits[id as usize])))
        .filter(|&(_, w)| w > 0.0 && w >= floor)
        .collect();
    if params.top_p < 1.0 {
        let goal = kept.iter().map(|c| c.1).sum::<f64>() * f64::from(params.top_p);
        let mut sum = 0.0;
        let enough = kept.iter().position(|c| {
            sum += c.1;
            sum >= goal
        });
        kept.truncate(enough.map_or(kept.len(), |last| last + 1));
    }
    kept
}

/// Ids of the `n` largest, largest first, equal ones by id.
fn most_likely(logits: &[f32], n: usize) -> Vec<u32> {
    let n = n.min(logits.len());
    if n == 0 {
        return Vec::new();
    }
    let order = |a: &u32, b: &u32| {
        logits[*b as usize].total_cmp(&logits[*a as usize]).then_with(|| a.cmp(b))
    };
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    if n < ids.len() {
        ids.select_nth_unstable_by(n - 1, order);
        ids.truncate(n);
    }
    ids.sort_unstable_by(order);
    ids
}

/// A number in [0, 1) from (seed, choice, position): SplitMix64's finalizer over each in turn.
///
/// Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014.
fn uniform(seed: u64, choice: u32, position: u32) -> f64 {
    let mix = |mut z: u64| {
        z = z.wrapping_add(0x9E37_79B9_7F4A_7C15);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    };
    let bits = mix(mix(mix(seed) ^ u64::from(choice)) ^ (u64::from(position) << 32));
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draw(logits: &[f32], params: &SamplingParams, position: u32) -> u32 {
        let context = DrawContext { position, ..DrawContext::default() };
        sample(&mut logits.to_vec(), params, &context)
    }

    #[test]
    fn the_first_of_the_largest_is_found_wherever_it_lies() {
        for len in [1, 15, 16, 17, 100] {
            for at in 0..len {
                let mut logits = vec![-3.0f32; len];
                logits[at..].fill(-2.0);
                assert_eq!(argmax(&logits), at as u32, "{len}");
                logits.fill(f32::NEG_INFINITY);
                assert_eq!(argmax(&logits), 0, "{len}");
                assert!(!all_finite(&logits));
                logits.fill(1.0);
                assert!(all_finite(&logits));
                logits[at] = f32::NAN;
                assert!(!all_finite(&logits), "{len}");
            }
        }
    }

    #[test]
    fn greedy_takes_the_first_of_equal_maxima() {
        assert_eq!(draw(&[1.0, 3.0, 3.0, -1.0], &SamplingParams::default(), 0), 1);
    }

    #[test]
    fn draws_follow_the_distribution() {
        let params = SamplingParams { temperature: 1.0, seed: 7, ..SamplingParams::default() };
        let logits = [0.1f32.ln(), 0.2f32.ln(), 0.7f32.ln()];
        let mut counts = [0u32; 3];
        for position in 0..20_000 {
            counts[draw(&logits, &params, position) as usize] += 1;
        }
        for (count, expected) in counts.iter().zip([0.1, 0.2, 0.7]) {
            assert!((f64::from(*count) / 20_000.0 - expected).abs() < 0.015, "{counts:?}");
        }
    }

    #[test]
    fn a_draw_depends_on_seed_choice_and_position_alone() {
        let at = |seed, choice, position| uniform(seed, choice, position);
        assert_eq!(at(1, 2, 3), at(1, 2, 3));
        assert_ne!(at(1, 2, 3), at(2, 2, 3));
        assert_ne!(at(1, 2, 3), at(1, 3, 3));
        assert_ne!(at(1, 2, 3), at(1, 2, 4));
    }

    #[test]
    fn top_k_top_p_and_min_p_keep_what_they_promise() {
        let logits = [4.0, 3.0, 2.0, 1.0, 0.0];
        let base = SamplingParams { temperature: 1.0, ..SamplingParams::default() };
        let ids = |params: SamplingParams| -> Vec<u32> {
            candidates(&logits, &params).into_iter().map(|c| c.0).collect()
        };
        assert_eq!(ids(SamplingParams { top_k: Some(2), ..base.clone() }), [0, 1]);
        // probabilities: .636 .234 .086 .032 .012
        assert_eq!(ids(SamplingParams { top_p: 0.6, ..base.clone() }), [0]);
        assert_eq!(ids(SamplingParams { top_p: 0.87, ..base.clone() }), [0, 1]);
        assert_eq!(ids(SamplingParams { min_p: 0.1, ..base.clone() }), [0, 1, 2]);
        assert_eq!(ids(base), [0, 1, 2, 3, 4]);
    }

    #[test]
    fn penalties_count_prompt_and_output_as_vllm_does() {
        let params = SamplingParams {
            repetition_penalty: 2.0,
            presence_penalty: 0.5,
            frequency_penalty: 0.25,
            ..SamplingParams::default()
        };
        let mut logits = vec![4.0, -4.0, 4.0, 4.0];
        let context = DrawContext { prompt: &[0, 1], output: &[2, 2], ..DrawContext::default() };
        penalize(&mut logits, &params, &context);
        assert_eq!(logits, [2.0, -8.0, 2.0 - 0.5 - 0.5, 4.0]);
    }

    #[test]
    fn extreme_penalties_biases_and_suppression_leave_a_token_to_choose() {
        let tiny = SamplingParams {
            temperature: 1.0,
            repetition_penalty: f32::MIN_POSITIVE,
            ..SamplingParams::default()
        };
        let seen = DrawContext { prompt: &[1, 2], ..DrawContext::default() };
        assert!([1, 2].contains(&sample(&mut [1.0, 4.0, 5.0], &tiny, &seen)));
        let bias = vec![(0, f32::MAX), (0, f32::MAX)];
        let pushed =
            SamplingParams { temperature: 1.0, logit_bias: bias, ..SamplingParams::default() };
        assert_eq!(draw(&[1.0, 2.0], &pushed, 0), 0);
        let all = DrawContext { suppressed: &[0, 1], ..DrawContext::default() };
        let drawn = SamplingParams { temperature: 1.0, ..SamplingParams::default() };
        assert!(sample(&mut [1.0, 2.0], &drawn, &all) < 2);
    }

    #[test]
    fn what_is_not_allowed_is_never_chosen_whatever_speaks_for_it() {
        let allowed = Some(&[0b1_0100][..]);
        let logits = [9.0, 8.0, 1.0, 7.0, 2.0];
        let greedy = SamplingParams::default();
        let context = DrawContext { allowed, ..DrawContext::default() };
        assert_eq!(sample(&mut logits.clone(), &greedy, &context), 4);
        let only_suppressed = DrawContext { suppressed: &[2, 4], ..context.clone() };
        assert_eq!(sample(&mut logits.clone(), &greedy, &only_suppressed), 2);
        let one_suppressed = DrawContext { suppressed: &[4], ..context.clone() };
        assert_eq!(sample(&mut logits.clone(), &greedy, &one_suppressed), 2);
        let drawn = SamplingParams {
            temperature: 100.0,
            top_k: Some(4),
            logit_bias: vec![(0, f32::MAX), (2, f32::MIN)],
            ..greedy
        };
        for position in 0..200 {
            let context = DrawContext { position, ..context.clone() };
            assert_eq!(sample(&mut logits.clone(), &drawn, &context), 4);
        }
    }

    #[test]
    fn logprobs_are_of_the_unchanged_distribution() {
        let found = logprobs(&[0.0, 0.0, f32::NEG_INFINITY], 1, 2);
        assert!((found.logprob - 0.5f32.ln()).abs() < 1e-6);
        assert_eq!(found.top.iter().map(|t| t.0).collect::<Vec<_>>(), [0, 1]);
    }

    #[test]
    fn values_out_of_range_are_named() {
        let bad = SamplingParams { top_p: 0.0, ..SamplingParams::default() };
        assert_eq!(bad.check(10).unwrap_err(), "top_p is 0, it must be above 0 and at most 1");
        let bad = SamplingParams { temperature: f32::NAN, ..SamplingParams::default() };
        assert!(bad.check(10).unwrap_err().starts_with("temperature is NaN"));
    }
}
