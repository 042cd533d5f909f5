//! `/v1/completions`: what is asked and what is answered.

use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;

use super::common::Common;
use crate::server::body::FromFields;
use crate::server::error::ApiError;
use crate::server::lenient::{Fields, token, wrong_type};
use crate::server::logprobs::TextLogprobs;
use crate::server::state::ServerLimits;
use crate::server::usage::{Provenance, Usage};

/// A request, checked as far as it can be without the model.
pub struct TextRequest {
    pub common: Common,
    pub prompts: Vec<Prompt>,
    /// The prompt is part of the answer.
    pub echo: bool,
    /// Nothing is to be generated: the prompt alone is scored.
    pub prompt_only: bool,
    pub add_special_tokens: bool,
}

#[derive(Debug, PartialEq)]
pub enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
}

#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct TextCompletion {
    pub id: String,
    /// `text_completion`
    pub object: &'static str,
    pub created: u64,
    pub model: String,
    pub choices: Vec<TextChoice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Usage>)]
    pub usage: Option<Option<Usage>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub strand: Option<Provenance>,
}

#[derive(Debug, Clone, Default, Serialize, ToSchema)]
pub struct TextChoice {
    pub index: usize,
    pub text: String,
    pub logprobs: Option<TextLogprobs>,
    pub finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<u32>>,
}

impl TextChoice {
    /// Adds what follows of the same choice.
    pub fn append(&mut self, next: Self) {
        self.text.push_str(&next.text);
        if let Some(more) = next.logprobs {
            self.logprobs.get_or_insert_default().append(more);
        }
        if let Some(more) = next.token_ids {
            self.token_ids.get_or_insert_default().extend(more);
        }
        self.finish_reason = self.finish_reason.or(next.finish_reason);
    }
}

/// OpenAI's default.
const MAX_TOKENS: usize = 16;

impl FromFields for TextRequest {
    fn read(fields: &mut Fields, limits: &ServerLimits) -> Result<Self, ApiError> {
        let mut common = Common::read(fields, limits)?;
        let echo = fields.flag("echo")?.unwrap_or(false);
        let max_tokens = fields.count("max_tokens", 0..=usize::MAX)?.unwrap_or(MAX_TOKENS);
        let prompt_only = max_tokens == 0;
        if prompt_only && !echo {
            let message = "max_tokens is 0, which is allowed with echo: true alone";
            return Err(ApiError::invalid("max_tokens", message));
        }
        common.sampling.max_tokens = Some(max_tokens.max(1));
        let logprobs = fields.count("logprobs", 0..=ServerLimits::LOGPROBS)?;
        common.sampling.logprobs = logprobs.map(|count| count as u32);
        refuse_what_is_not_done(fields, common.n)?;
        Ok(Self {
            prompts: prompts(fields, "prompt", ServerLimits::PROMPTS)?,
            add_special_tokens: fields.flag("add_special_tokens")?.unwrap_or(true),
            common,
            echo,
            prompt_only,
        })
    }
}

/// Ignoring these would answer another question.
fn refuse_what_is_not_done(fields: &mut Fields, n: usize) -> Result<(), ApiError> {
    let best_of = fields.count("best_of", 1..=128)?;
    if best_of.is_some_and(|best_of| best_of != n) {
        let message = "best_of other than n is not supported; ask for n and choose by logprobs";
        return Err(ApiError::invalid("best_of", message));
    }
    if fields.text("suffix")?.is_some_and(|suffix| !suffix.is_empty()) {
        return Err(ApiError::invalid("suffix", "suffix is not supported"));
    }
    Ok(())
}

/// A string, strings, token ids or lists of them.
pub fn prompts(fields: &mut Fields, name: &str, most: usize) -> Result<Vec<Prompt>, ApiError> {
    let value = fields.value(name).ok_or_else(|| fields.missing(name))?;
    let wrong = |value: &Value| wrong_type(name, "text, token ids or a list of either", value);
    let values = match value {
        Value::String(text) => return Ok(vec![Prompt::Text(text)]),
        Value::Array(values) => values,
        other => return Err(wrong(&other)),
    };
    if values.first().is_some_and(Value::is_number) {
        return Ok(vec![Prompt::Tokens(tokens(name, &values)?)]);
    }
    if values.is_empty() || values.len() > most {
        let found = values.len();
        let message = format!("{name} is a list of {found}, it must have 1 to {most} entries");
        return Err(ApiError::invalid(name, message));
    }
    let each = values.into_iter().map(|value| match value {
        Value::String(text) => Ok(Prompt::Text(text)),
        Value::Array(values) => Ok(Prompt::Tokens(tokens(name, &values)?)),
        other => Err(wrong(&other)),
    });
    each.collect()
}

fn tokens(name: &str, values: &[Value]) -> Result<Vec<u32>, ApiError> {
    values.iter().map(|value| token(name, value)).collect()
}
