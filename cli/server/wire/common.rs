//! The fields that chat and text completions have in common.
//!
//! Names and meaning are OpenAI's; what OpenAI doesn't have is spelt as in vLLM.

use serde_json::Value;

use crate::args::SamplingArgs;
use crate::server::error::ApiError;
use crate::server::lenient::{self, Fields, wrong_type};
use crate::server::library::Selection;
use crate::server::state::ServerLimits;

/// What was asked for, in range. What depends on the model is left to the engine.
#[derive(Debug, Default)]
pub struct Common {
    pub model: Option<String>,
    pub n: usize,
    pub sampling: SamplingArgs,
    pub logit_bias: Vec<(u32, f32)>,
    pub min_tokens: usize,
    pub stop_token_ids: Vec<u32>,
    pub priority: i32,
    pub cache_salt: Option<String>,
    /// `None`: one answer as a whole.
    pub stream: Option<StreamOptions>,
    pub selection: Selection,
    pub return_token_ids: bool,
}

#[derive(Debug, Clone, Copy, Default)]
pub struct StreamOptions {
    /// A last event with the usage.
    pub include_usage: bool,
    /// The usage so far in every event.
    pub continuous_usage: bool,
}

/// Largest number of a list of token ids.
const TOKEN_IDS: usize = 1024;

impl Common {
    pub fn read(fields: &mut Fields, limits: &ServerLimits) -> Result<Self, ApiError> {
        let stream = stream(fields)?;
        Ok(Self {
            model: fields.text("model")?,
            n: fields.count("n", 1..=limits.n)?.unwrap_or(1),
            sampling: sampling(fields)?,
            logit_bias: logit_bias(fields)?,
            min_tokens: fields.count("min_tokens", 0..=usize::MAX)?.unwrap_or(0),
            stop_token_ids: stop_token_ids(fields)?,
            priority: fields
                .integer("priority", i32::MIN.into()..=i32::MAX.into())?
                .map_or(0, |priority| priority as i32),
            cache_salt: cache_salt(fields)?,
            stream,
            selection: Selection::read(fields)?,
            return_token_ids: fields.flag("return_token_ids")?.unwrap_or(false),
        })
    }
}

fn stream(fields: &mut Fields) -> Result<Option<StreamOptions>, ApiError> {
    let streams = fields.flag("stream")?.unwrap_or(false);
    let Some(mut options) = fields.object("stream_options")? else {
        return Ok(streams.then(StreamOptions::default));
    };
    if !streams {
        let message = "stream_options is allowed with stream: true alone";
        return Err(ApiError::invalid("stream_options", message));
    }
    Ok(Some(StreamOptions {
        include_usage: options.flag("include_usage")?.unwrap_or(false),
        continuous_usage: options.flag("continuous_usage_stats")?.unwrap_or(false),
    }))
}

pub fn sampling(fields: &mut Fields) -> Result<SamplingArgs, ApiError> {
    let stop = fields.texts("stop")?;
    check_stops(&stop)?;
    let penalty = |fields: &mut Fields, name| fields.number(name, -2.0..=2.0);
    // 0 and -1 keep every token, as in vLLM
    let top_k = fields.integer("top_k", -1..=i64::from(u32::MAX))?;
    Ok(SamplingArgs {
        temperature: fields.number("temperature", 0.0..=2.0)?,
        top_k: top_k.map(|k| k.max(0) as u32),
        // OpenAI allows 0, which leaves the likeliest token
        top_p: fields.number("top_p", 0.0..=1.0)?.map(|p| p.max(f32::MIN_POSITIVE)),
        min_p: fields.number("min_p", 0.0..=1.0)?,
        repetition_penalty: fields.number("repetition_penalty", 0.01..=100.0)?,
        presence_penalty: penalty(fields, "presence_penalty")?,
        frequency_penalty: penalty(fields, "frequency_penalty")?,
        stop,
        ignore_eos: fields.flag("ignore_eos")?.unwrap_or(false),
        seed: fields.integer("seed", i64::MIN..=i64::MAX)?.map(i64::cast_unsigned),
        ..SamplingArgs::default()
    })
}

fn check_stops(stops: &[String]) -> Result<(), ApiError> {
    let refused = |message: String| Err(ApiError::invalid("stop", message));
    if stops.len() > ServerLimits::STOPS {
        let (found, most) = (stops.len(), ServerLimits::STOPS);
        return refused(format!("stop has {found} strings, at most {most} are allowed"));
    }
    if stops.iter().any(String::is_empty) {
        return refused("stop has an empty string".to_owned());
    }
    if stops.iter().any(|stop| stop.len() > ServerLimits::STOP_LEN) {
        let most = ServerLimits::STOP_LEN;
        return refused(format!("stop has a string of more than {most} bytes"));
    }
    Ok(())
}

fn logit_bias(fields: &mut Fields) -> Result<Vec<(u32, f32)>, ApiError> {
    let Some(Value::Object(map)) = object(fields, "logit_bias")? else {
        return Ok(Vec::new());
    };
    check_len("logit_bias", map.len())?;
    let entries = map.iter().map(|(token, bias)| {
        let path = format!("logit_bias.{token}");
        let id = token.parse().map_err(|_| {
            ApiError::invalid("logit_bias", format!("logit_bias names {token:?}, no token id"))
        })?;
        Ok((id, lenient::number(&path, bias, -100.0..=100.0)?))
    });
    entries.collect()
}

fn object(fields: &mut Fields, name: &str) -> Result<Option<Value>, ApiError> {
    match fields.value(name) {
        Some(value) if !value.is_object() => Err(wrong_type(name, "an object", &value)),
        other => Ok(other),
    }
}

fn stop_token_ids(fields: &mut Fields) -> Result<Vec<u32>, ApiError> {
    let ids = fields.tokens("stop_token_ids")?.unwrap_or_default();
    check_len("stop_token_ids", ids.len())?;
    Ok(ids)
}

fn check_len(name: &str, found: usize) -> Result<(), ApiError> {
    if found > TOKEN_IDS {
        let message = format!("{name} has {found} entries, at most {TOKEN_IDS} are allowed");
        return Err(ApiError::invalid(name, message));
    }
    Ok(())
}

pub fn cache_salt(fields: &mut Fields) -> Result<Option<String>, ApiError> {
    let salt = fields.text("cache_salt")?;
    if let Some(salt) = &salt {
        let is_bad = |letter: char| letter.is_control() || ['@', '/', '\\'].contains(&letter);
        let most = ServerLimits::SALT_LEN;
        if salt.is_empty() || salt.chars().count() > most || salt.contains(is_bad) {
            let message = format!(
                "cache_salt must have 1 to {most} letters, none of them @, / or \\ or a control"
            );
            return Err(ApiError::invalid("cache_salt", message));
        }
    }
    Ok(salt)
}
