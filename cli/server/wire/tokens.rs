//! `/tokenize`, `/detokenize` and `/tokenizer_info`: what is asked and what is answered.

use std::collections::BTreeMap;

use serde::Serialize;
use utoipa::ToSchema;

use super::{chat, messages};
use crate::server::body::FromFields;
use crate::server::error::ApiError;
use crate::server::lenient::Fields;
use crate::server::prompt::Chat;
use crate::server::state::ServerLimits;
use crate::server::tools::Tools;

/// What is to be tokenized.
pub struct TokenizeRequest {
    pub model: Option<String>,
    pub said: Said,
    pub wants_texts: bool,
    pub add_special_tokens: bool,
}

pub enum Said {
    Text(String),
    Chat(Chat),
}

/// Tokens whose text is wanted.
pub struct DetokenizeRequest {
    pub model: Option<String>,
    pub tokens: Vec<u32>,
}

#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Tokenized {
    pub count: usize,
    pub max_model_len: usize,
    pub tokens: Vec<u32>,
    /// Where they were asked for.
    pub token_strs: Option<Vec<String>>,
}

#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Detokenized {
    pub prompt: String,
}

/// Enough for a client that works with token ids.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct TokenizerInfo {
    pub tokenizer_class: &'static str,
    pub vocab_size: usize,
    pub model_max_length: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chat_template: Option<String>,
    /// `bos_token`, `eos_token` and so on.
    #[serde(flatten)]
    pub special_tokens: BTreeMap<String, String>,
}

impl FromFields for TokenizeRequest {
    fn read(fields: &mut Fields, _: &ServerLimits) -> Result<Self, ApiError> {
        let marks = fields.marks();
        let said = match fields.text("prompt")? {
            Some(text) => Said::Text(text),
            None => {
                let messages = messages::read(fields, "messages")?;
                let ending = chat::ending(fields, &messages)?;
                let tools = Tools::read(fields)?.offered();
                Said::Chat(Chat { messages, tools, ending, marks })
            }
        };
        Ok(Self {
            model: fields.text("model")?,
            said,
            wants_texts: fields.flag("return_token_strs")?.unwrap_or(false),
            add_special_tokens: fields.flag("add_special_tokens")?.unwrap_or(true),
        })
    }
}

impl FromFields for DetokenizeRequest {
    fn read(fields: &mut Fields, _: &ServerLimits) -> Result<Self, ApiError> {
        let tokens = fields.tokens("tokens")?.ok_or_else(|| fields.missing("tokens"))?;
        Ok(Self { model: fields.text("model")?, tokens })
    }
}
