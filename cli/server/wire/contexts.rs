//! `/v1/contexts`: what is asked and what is answered.

use serde::Serialize;
use serde_json::Value;
use strand_engine::context::ReusePolicy;
use utoipa::ToSchema;

use super::chunks::checked_name;
use crate::server::body::FromFields;
use crate::server::error::ApiError;
use crate::server::lenient::{Fields, wrong_type};
use crate::server::library;
use crate::server::state::ServerLimits;

/// What a context is to be, as far as it was said.
#[derive(Debug, Default)]
pub struct ContextChange {
    pub name: Option<String>,
    pub policy: Option<ReusePolicy>,
    /// The empty text: none.
    pub system: Option<String>,
    pub blend_tokens: Option<usize>,
    /// All its chunks, in order.
    pub chunks: Option<Vec<Placed>>,
    /// Its conversation is forgotten.
    pub forgets: bool,
}

/// A chunk and whether it is switched on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placed {
    pub id: String,
    pub active: bool,
}

/// A context as lists have it.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ContextSummary {
    pub id: String,
    /// `context`
    pub object: &'static str,
    pub name: Option<String>,
    pub policy: String,
    pub created: u64,
    pub updated: u64,
    pub num_chunks: u64,
    pub num_messages: u64,
}

/// One context.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ContextObject {
    #[serde(flatten)]
    pub summary: ContextSummary,
    #[serde(flatten)]
    pub details: ContextDetails,
}

#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ContextDetails {
    pub system: Option<String>,
    pub blend_tokens: usize,
    /// Tokens of the anchor, the active chunks, the system text and the messages.
    pub used_tokens: usize,
    pub total_tokens: usize,
    pub chunks: Vec<PlacedChunk>,
    pub messages: Vec<Said>,
}

#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct PlacedChunk {
    pub id: String,
    pub name: String,
    pub active: bool,
    pub tokens: usize,
    /// First and last; null while it is switched off.
    pub position: Option<[usize; 2]>,
}

#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Said {
    pub role: &'static str,
    pub content: String,
}

/// Chunks of one context.
pub const CHUNKS: usize = 1024;
const SYSTEM_LEN: usize = 1 << 20;

impl FromFields for ContextChange {
    fn read(fields: &mut Fields, _: &ServerLimits) -> Result<Self, ApiError> {
        let policy = library::policy(fields.text("policy")?.as_deref(), "policy")?;
        let system = fields.text("system")?;
        if system.as_ref().is_some_and(|system| system.len() > SYSTEM_LEN) {
            let message = format!("system has more than {SYSTEM_LEN} bytes");
            return Err(ApiError::invalid("system", message));
        }
        let forgets = match fields.list("messages")? {
            None => false,
            Some(messages) if messages.is_empty() => true,
            Some(_) => {
                let message = "messages can be forgotten, as []; they are said by completions";
                return Err(ApiError::invalid("messages", message));
            }
        };
        Ok(Self {
            name: checked_name(fields.text("name")?)?,
            policy,
            system,
            blend_tokens: fields.count("blend_tokens", 0..=usize::MAX)?,
            chunks: fields.list("chunks")?.map(placed).transpose()?,
            forgets,
        })
    }
}

fn placed(list: Vec<Value>) -> Result<Vec<Placed>, ApiError> {
    if list.len() > CHUNKS {
        let message = format!("chunks has {} entries, at most {CHUNKS} are allowed", list.len());
        return Err(ApiError::invalid("chunks", message));
    }
    let entries = list.into_iter().enumerate().map(|(index, value)| {
        let path = format!("chunks[{index}]");
        match value {
            Value::String(id) => Ok(Placed { id, active: true }),
            object @ Value::Object(_) => {
                let mut fields = Fields::of_value(&path, object)?;
                let id = fields.required_text("id")?;
                Ok(Placed { id, active: fields.flag("active")?.unwrap_or(true) })
            }
            other => Err(wrong_type(&path, "an id or an object with one", &other)),
        }
    });
    entries.collect()
}
