//! `/v1/embeddings`: what is asked and what is answered.

use serde::Serialize;
use utoipa::ToSchema;

use super::completions::{Prompt, prompts};
use crate::server::body::FromFields;
use crate::server::error::ApiError;
use crate::server::lenient::Fields;
use crate::server::state::ServerLimits;

/// Texts whose vectors are wanted.
pub struct EmbeddingRequest {
    /// Empty: the one that is made for it, if there is one.
    pub model: String,
    pub texts: Vec<Prompt>,
    pub as_base64: bool,
    pub dimensions: Option<usize>,
}

/// Texts in one request.
const TEXTS: usize = 2048;

#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Embeddings {
    /// `list`
    pub object: &'static str,
    pub data: Vec<Embedding>,
    pub model: String,
    pub usage: EmbeddingUsage,
}

#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Embedding {
    /// `embedding`
    pub object: &'static str,
    pub index: usize,
    pub embedding: Vector,
}

/// Numbers, or their little-endian bytes in base64.
#[derive(Debug, Clone, Serialize, ToSchema)]
#[serde(untagged)]
pub enum Vector {
    Numbers(Vec<f32>),
    Base64(String),
}

#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct EmbeddingUsage {
    pub prompt_tokens: usize,
    pub total_tokens: usize,
}

impl FromFields for EmbeddingRequest {
    fn read(fields: &mut Fields, _: &ServerLimits) -> Result<Self, ApiError> {
        Ok(Self {
            model: fields.text("model")?.unwrap_or_default(),
            texts: prompts(fields, "input", TEXTS)?,
            as_base64: encoding(fields)?,
            dimensions: fields.count("dimensions", 1..=usize::MAX)?,
        })
    }
}

fn encoding(fields: &mut Fields) -> Result<bool, ApiError> {
    match fields.text("encoding_format")?.as_deref() {
        None | Some("float") => Ok(false),
        Some("base64") => Ok(true),
        Some(other) => {
            let message = format!("encoding_format is {other:?}, it must be float or base64");
            Err(ApiError::invalid("encoding_format", message))
        }
    }
}
