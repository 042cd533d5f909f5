//! Rotary position embeddings: which frequencies a checkpoint was trained with.
//!
//! Only fixed frequencies are known here. Schemes whose frequencies depend on the length of the
//! prompt (dynamic NTK, LongRoPE) are refused by name: stored keys could not be reused with them.

use std::f64::consts::TAU;

use serde_json::Value;

use crate::error::Error;
use crate::keys::Keys;

/// What every supported architecture uses when its config names no base.
const DEFAULT_THETA: f64 = 10_000.0;

#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// The base of the geometric series of wavelengths.
    pub theta: f64,
    pub scaling: RopeScaling,
}

#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    Unscaled,
    /// Positions divided by a factor (position interpolation, arXiv:2306.15595).
    Linear {
        factor: f64,
    },
    /// Llama 3.1: long wavelengths stretched, short ones kept, a ramp in frequency between.
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_max_position_embeddings: usize,
    },
    /// "NTK by parts" with a temperature (YaRN, arXiv:2309.00071).
    Yarn(YarnScaling),
    /// One divisor per frequency, as GGUF files carry them (`rope_freqs.weight`).
    Factors(Vec<f32>),
}

#[derive(Debug, Clone, PartialEq)]
pub struct YarnScaling {
    pub factor: f64,
    pub original_max_position_embeddings: usize,
    /// Turns over the original length above which a frequency is kept.
    pub beta_fast: f64,
    /// Turns over the original length below which a frequency is fully interpolated.
    pub beta_slow: f64,
    /// Rounds the ramp's ends outward to whole dimensions.
    pub truncate: bool,
    /// Multiplies cos and sin, and so the attention scores by its square.
    pub attention_factor: f64,
}

impl RopeConfig {
    /// The rotation of pair `i` is `position * frequencies[i]`; cos and sin are multiplied by the
    /// second value. Length `head_dim / 2`.
    ///
    /// Unscaled: `theta^(-2i/d)` (RoFormer, arXiv:2104.09864).
    pub fn inverse_frequencies(&self, head_dim: usize) -> (Vec<f64>, f64) {
        let base: Vec<f64> = (0..head_dim / 2)
            .map(|pair| self.theta.powf(-((2 * pair) as f64) / head_dim as f64))
            .collect();
        match &self.scaling {
            RopeScaling::Unscaled => (base, 1.0),
            RopeScaling::Linear { factor } => (base.iter().map(|f| f / factor).collect(), 1.0),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => {
                let length = *original_max_position_embeddings as f64;
                let scaled = base.iter().map(|&frequency| {
                    let turns = length * frequency / TAU;
                    let keep = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    blend(frequency, frequency / factor, keep)
                });
                (scaled.collect(), 1.0)
            }
            RopeScaling::Yarn(yarn) => {
                let (low, high) = yarn.ramp(self.theta, head_dim);
                let scaled = base.iter().enumerate().map(|(pair, &frequency)| {
                    let keep = 1.0 - (pair as f64 - low) / (high - low);
                    blend(frequency, frequency / yarn.factor, keep)
                });
                (scaled.collect(), yarn.attention_factor)
            }
            RopeScaling::Factors(factors) => {
                let divided = base.iter().zip(factors).map(|(f, &by)| f / f64::from(by));
                (divided.collect(), 1.0)
            }
        }
    }

    /// Reads both spellings: `rope_theta` beside `rope_scaling {type or rope_type, ...}`, and
    /// `rope_parameters {rope_theta, rope_type, ...}`.
    pub(crate) fn take(keys: &mut Keys, max_positions: usize) -> Result<Self, Error> {
        refuse_partial_rotation(keys)?;
        let theta = keys.positive("rope_theta")?;
        let outer_length = keys.size("original_max_position_embeddings")?;
        let old = keys.object("rope_scaling")?;
        let new = keys.object("rope_parameters")?;
        let (place, map) = match (old, new) {
            (Some(old), Some(new)) if old != new => {
                let remedy = "it contradicts rope_scaling; keep one of the two";
                return Err(keys.unsupported("rope_parameters", &Value::Object(new), remedy));
            }
            (Some(old), _) => ("rope_scaling", old),
            (None, Some(new)) => ("rope_parameters", new),
            (None, None) => ("rope_parameters", serde_json::Map::new()),
        };
        let mut inner = Keys::new(place, map);
        refuse_partial_rotation(&mut inner)?;
        let theta = inner.positive("rope_theta")?.or(theta).unwrap_or(DEFAULT_THETA);
        if theta <= 1.0 {
            return Err(keys.invalid("rope_theta", &theta.into(), "expected a number above 1"));
        }
        let old_type = inner.text("type")?;
        let rope_type = inner.text("rope_type")?.or(old_type);
        let inner_length = inner.size("original_max_position_embeddings")?;
        let length = outer_length.or(inner_length).unwrap_or(max_positions);
        let scaling = match rope_type.as_deref() {
            None | Some("default") => RopeScaling::Unscaled,
            Some("linear") => RopeScaling::Linear { factor: inner.required_positive("factor")? },
            Some("llama3") => take_llama3(&mut inner, length)?,
            Some("yarn") => take_yarn(&mut inner, length, max_positions)?,
            Some(other) => {
                let remedy = "supported are default, linear, llama3 and yarn";
                return Err(inner.unsupported("rope_type", &other.into(), remedy));
            }
        };
        inner.finish(|key, _| key == "finetuned")?;
        Ok(RopeConfig { theta, scaling })
    }
}

impl YarnScaling {
    /// The temperature YaRN recommends for a stretch by `factor`, with an optional weight on the
    /// logarithm (equation 22 of the paper).
    pub fn recommended_attention_factor(factor: f64, weight: f64) -> f64 {
        if factor <= 1.0 { 1.0 } else { 0.1 * weight * factor.ln() + 1.0 }
    }

    /// The pairs between which frequencies pass from kept to interpolated.
    fn ramp(&self, theta: f64, head_dim: usize) -> (f64, f64) {
        let length = self.original_max_position_embeddings as f64;
        // The pair that makes `turns` full turns over the original length.
        let pair =
            |turns: f64| head_dim as f64 * (length / (turns * TAU)).ln() / (2.0 * theta.ln());
        let (mut low, mut high) = (pair(self.beta_fast), pair(self.beta_slow));
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, high) = (low.max(0.0), high.min((head_dim - 1) as f64));
        if low == high { (low, high + 0.001) } else { (low, high) }
    }
}

fn blend(kept: f64, stretched: f64, keep: f64) -> f64 {
    let keep = keep.clamp(0.0, 1.0);
    kept * keep + stretched * (1.0 - keep)
}

fn refuse_partial_rotation(keys: &mut Keys) -> Result<(), Error> {
    match keys.positive("partial_rotary_factor")? {
        Some(part) if part != 1.0 => {
            let remedy = "only rotation of the whole head is known";
            Err(keys.unsupported("partial_rotary_factor", &part.into(), remedy))
        }
        _ => Ok(()),
    }
}

fn take_llama3(keys: &mut Keys, length: usize) -> Result<RopeScaling, Error> {
    let factor = keys.required_positive("factor")?;
    let low_freq_factor = keys.required_positive("low_freq_factor")?;
    let high_freq_factor = keys.required_positive("high_freq_factor")?;
    if high_freq_factor <= low_freq_factor {
        let expected = format!("expected a number above low_freq_factor = {low_freq_factor}");
        return Err(keys.invalid("high_freq_factor", &high_freq_factor.into(), &expected));
    }
    Ok(RopeScaling::Llama3 {
        factor,
        low_freq_factor,
        high_freq_factor,
        original_max_position_embeddings: length,
    })
}

fn take_yarn(keys: &mut Keys, length: usize, max_positions: usize) -> Result<RopeScaling, Error> {
    let factor = keys.positive("factor")?;
    let factor = factor.unwrap_or(max_positions as f64 / length as f64);
    let mscale = keys.positive("mscale")?;
    let all_dims = keys.positive("mscale_all_dim")?;
    let attention_factor = match (keys.positive("attention_factor")?, mscale, all_dims) {
        (Some(given), _, _) => given,
        (None, Some(mscale), Some(all_dims)) => {
            YarnScaling::recommended_attention_factor(factor, mscale)
                / YarnScaling::recommended_attention_factor(factor, all_dims)
        }
        _ => YarnScaling::recommended_attention_factor(factor, 1.0),
    };
    let beta_fast = keys.positive("beta_fast")?.unwrap_or(32.0);
    let beta_slow = keys.positive("beta_slow")?.unwrap_or(1.0);
    if beta_fast <= beta_slow {
        let expected = format!("expected a number above beta_slow = {beta_slow}");
        return Err(keys.invalid("beta_fast", &beta_fast.into(), &expected));
    }
    Ok(RopeScaling::Yarn(YarnScaling {
        factor,
        original_max_position_embeddings: length,
        beta_fast,
        beta_slow,
        truncate: keys.flag("truncate")?.unwrap_or(true),
        attention_factor,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str, max_positions: usize) -> Result<RopeConfig, Error> {
        RopeConfig::take(&mut Keys::parse("config.json", json)?, max_positions)
    }

    /// Expected: transformers 5.23, `ROPE_INIT_FUNCTIONS`, computed there in f32.
    fn check(json: &str, max_positions: usize, frequencies: &[f64], factor: f64) {
        let rope = parse(json, max_positions).unwrap();
        let (found, attention_factor) = rope.inverse_frequencies(2 * frequencies.len());
        assert_eq!(found.len(), frequencies.len());
        for (found, expected) in found.iter().zip(frequencies) {
            assert!((found - expected).abs() <= 1e-6 * expected, "{found} {expected}");
        }
        assert!((attention_factor - factor).abs() < 1e-12, "{attention_factor}");
    }

    #[test]
    fn unscaled_and_linear_frequencies_match_transformers() {
        let linear = [
            0.25,
            0.079056941,
            0.025,
            0.0079056947,
            0.0024999999,
            0.00079056947,
            0.00025000001,
            7.9056947e-05,
        ];
        let both = [
            r#"{"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4.0}}"#,
            r#"{"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 4}}"#,
        ];
        for json in both {
            check(json, 4096, &linear, 1.0);
        }
        let unscaled: Vec<f64> = linear.iter().map(|f| f * 4.0).collect();
        check("{}", 4096, &unscaled, 1.0);
        check(r#"{"rope_scaling": null}"#, 4096, &unscaled, 1.0);
    }

    #[test]
    fn llama3_frequencies_match_transformers() {
        let expected = [
            1.0,
            0.44036663,
            0.19392276,
            0.085397102,
            0.037606031,
            0.016560441,
            0.0072926651,
            0.0032114461,
            0.00042955671,
            1.9461639e-05,
            8.5702559e-06,
            3.7740544e-06,
            1.6619674e-06,
            7.3187493e-07,
            3.2229329e-07,
            1.419272e-07,
        ];
        let json = r#"{"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3",
            "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}}"#;
        check(json, 131072, &expected, 1.0);
    }

    #[test]
    fn yarn_frequencies_match_transformers() {
        let truncated = [
            1.0,
            0.56234133,
            0.31622776,
            0.17782794,
            0.1,
            0.050209042,
            0.02484647,
            0.012066896,
            0.0057142857,
            0.0026108704,
            0.001129385,
            0.00044456986,
            0.00025000001,
            0.00014058533,
            7.9056947e-05,
            4.4456985e-05,
        ];
        let json = r#"{"rope_scaling": {"type": "yarn", "factor": 4.0,
            "original_max_position_embeddings": 2048}}"#;
        check(json, 8192, &truncated, 1.138629436111989);
        let json = r#"{"rope_parameters": {"rope_type": "yarn", "attention_factor": 0.9,
            "factor": 4.0, "original_max_position_embeddings": 2048}}"#;
        check(json, 8192, &truncated, 0.9);
        let outer = r#"{"original_max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "yarn"}}"#;
        check(outer, 8192, &truncated, 1.138629436111989);

        let whole = [
            1.0,
            0.56234133,
            0.31622776,
            0.17782794,
            0.1,
            0.056234129,
            0.026607499,
            0.011270422,
            0.0042616189,
            0.0014058533,
            0.00079056947,
            0.00044456986,
            0.00025000001,
            0.00014058533,
            7.9056947e-05,
            4.4456985e-05,
        ];
        let json = r#"{"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "mscale": 1.2,
            "mscale_all_dim": 0.8, "truncate": false, "beta_fast": 16, "beta_slow": 2,
            "original_max_position_embeddings": 2048}}"#;
        check(json, 8192, &whole, 1.0499159215939338);
    }

    #[test]
    fn what_is_not_a_fixed_rotation_of_the_whole_head_is_refused_by_name() {
        let cases = [
            (r#"{"rope_scaling": {"type": "dynamic", "factor": 2.0}}"#, "dynamic"),
            (r#"{"rope_scaling": {"rope_type": "longrope"}}"#, "longrope"),
            (r#"{"rope_scaling": {"type": "mrope", "mrope_section": [1]}}"#, "mrope"),
            (r#"{"partial_rotary_factor": 0.5}"#, "partial_rotary_factor = 0.5"),
            (
                r#"{"rope_parameters": {"partial_rotary_factor": 0.25}}"#,
                "rope_parameters.partial_rotary_factor = 0.25",
            ),
            (r#"{"rope_theta": 0}"#, "rope_theta = 0"),
            (r#"{"rope_theta": 1.0}"#, "above 1"),
            (r#"{"rope_scaling": {"type": "linear"}}"#, "lacks rope_scaling.factor"),
            (r#"{"rope_scaling": {"type": "linear", "factor": -1}}"#, "factor = -1"),
            (
                r#"{"rope_scaling": {"type": "linear", "factor": 2, "bend": 3}}"#,
                "rope_scaling.bend = 3",
            ),
            (
                r#"{"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}"#,
                "rope_parameters.full_attention",
            ),
            (
                r#"{"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4,
                "high_freq_factor": 4}}"#,
                "high_freq_factor = 4",
            ),
        ];
        for (json, part) in cases {
            let text = parse(json, 4096).unwrap_err().to_string();
            assert!(text.contains(part), "{json}: {text}");
        }
    }

    #[test]
    fn gguf_factors_divide_the_frequencies() {
        let rope = RopeConfig { theta: 10_000.0, scaling: RopeScaling::Factors(vec![1.0, 4.0]) };
        assert_eq!(rope.inverse_frequencies(4).0, [1.0, 0.0025]);
    }
}
