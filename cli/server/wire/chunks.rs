//! `/v1/chunks`: what is asked and what is answered.

use serde::Serialize;
use serde_json::Value;
use strand_engine::context::{Chunk, ChunkKind};
use utoipa::ToSchema;

use crate::server::body::FromFields;
use crate::server::error::ApiError;
use crate::server::lenient::{Fields, wrong_type};
use crate::server::library::misses::Miss;
use crate::server::state::ServerLimits;

/// A chunk to be made.
#[derive(Debug, Default)]
pub struct NewChunk {
    pub content: Vec<u8>,
    /// Its own digits where it is not said.
    pub name: Option<String>,
    pub kind: Option<ChunkKind>,
    /// JSON.
    pub metadata: Option<String>,
    /// None: those that it has stay.
    pub tags: Option<Vec<String>>,
    /// Its KV is not computed before it is first asked for.
    pub is_lazy: bool,
}

#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ChunkObject {
    pub id: String,
    /// `chunk`
    pub object: &'static str,
    pub name: String,
    pub kind: &'static str,
    /// With the message it is wrapped in.
    pub tokens: Option<u32>,
    /// Of its text.
    pub bytes: u64,
    pub created: u64,
    pub tags: Vec<String>,
    pub metadata: Option<Value>,
    /// `active`: switched on in some context, else `inactive`.
    pub state: &'static str,
    /// Where its KV is, as encoded alone.
    pub tiers: Vec<&'static str>,
    /// Where one chunk is asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
}

/// The chunk, and what was done.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ChunkOutcome {
    #[serde(flatten)]
    pub chunk: ChunkObject,
    /// `accepted`, `clipped` or `refused`
    pub outcome: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<&'static str>,
    pub millis: f64,
    /// Bytes of KV that were computed, moved or written.
    pub bytes: u64,
    /// Of a pin, how long it lasts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds: Option<u64>,
    /// Tokens whose KV was computed for it.
    pub encoded: usize,
}

/// A page of a list.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Page<T> {
    /// `list`
    pub object: &'static str,
    pub data: Vec<T>,
    pub has_more: bool,
    pub first_id: Option<String>,
    pub last_id: Option<String>,
}

#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Deleted {
    pub id: String,
    pub object: &'static str,
    pub deleted: bool,
}

/// A chunk that an answer saw.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct SeenChunk {
    pub id: String,
    pub name: String,
    pub tokens: usize,
    /// `device`, `host`, `disk` or `encoded`
    pub source: &'static str,
    /// Why it had to be encoded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub miss: Option<Miss>,
}

impl SeenChunk {
    pub fn new(chunk: &Chunk, source: &'static str, miss: Option<Miss>) -> Self {
        let (id, name) = (chunk.id.to_string(), chunk.name.clone());
        Self { id, name, tokens: chunk.ids.len(), source, miss }
    }

    /// Its KV was on the disk, and computing it again was the faster way.
    pub fn was_computed(&mut self) {
        self.source = "encoded";
        self.miss = Some(Miss::Policy);
    }
}

impl ChunkOutcome {
    /// A chunk that was made, or found.
    pub fn made(chunk: ChunkObject, millis: f64, encoded: usize) -> Self {
        Self { chunk, outcome: "accepted", reason: None, millis, bytes: 0, seconds: None, encoded }
    }
}

impl<T> Page<T> {
    pub fn new(data: Vec<T>, has_more: bool, id: impl Fn(&T) -> String) -> Self {
        let name = |one: Option<&T>| one.map(&id);
        let (first_id, last_id) = (name(data.first()), name(data.last()));
        Self { object: "list", data, has_more, first_id, last_id }
    }
}

const TAGS: usize = 64;
const TAG_LEN: usize = 64;
const NAME_LEN: usize = 256;
const METADATA_LEN: usize = 16 << 10;

/// From JSON, where the content is text.
impl FromFields for NewChunk {
    fn read(fields: &mut Fields, _: &ServerLimits) -> Result<Self, ApiError> {
        let content = fields.required_text("content")?.into_bytes();
        Self::with_content(fields, content)
    }
}

impl NewChunk {
    pub fn with_content(fields: &mut Fields, content: Vec<u8>) -> Result<Self, ApiError> {
        Ok(Self {
            content,
            name: checked_name(fields.text("name")?)?,
            kind: kind(fields.text("kind")?)?,
            metadata: metadata(fields.value("metadata"))?,
            tags: tags(fields)?,
            is_lazy: !fields.flag("encode")?.unwrap_or(true),
        })
    }
}

pub fn checked_name(name: Option<String>) -> Result<Option<String>, ApiError> {
    let is_bad = |name: &String| name.is_empty() || name.chars().count() > NAME_LEN;
    if name.as_ref().is_some_and(|name| is_bad(name) || name.contains(char::is_control)) {
        let message = format!("name must have 1 to {NAME_LEN} letters, none of them a control");
        return Err(ApiError::invalid("name", message));
    }
    Ok(name)
}

pub fn kind(name: Option<String>) -> Result<Option<ChunkKind>, ApiError> {
    let parse = |name: String| {
        ChunkKind::parse(&name).ok_or_else(|| {
            let known = ChunkKind::ALL.map(ChunkKind::as_str).join(", ");
            ApiError::invalid("kind", format!("kind is {name:?}, it must be one of {known}"))
        })
    };
    name.map(parse).transpose()
}

pub fn metadata(value: Option<Value>) -> Result<Option<String>, ApiError> {
    let Some(value) = value else { return Ok(None) };
    if !value.is_object() {
        return Err(wrong_type("metadata", "an object", &value));
    }
    let text = value.to_string();
    if text.len() > METADATA_LEN {
        let message = format!("metadata has {} bytes, at most {METADATA_LEN} are kept", text.len());
        return Err(ApiError::invalid("metadata", message));
    }
    Ok(Some(text))
}

fn tags(fields: &mut Fields) -> Result<Option<Vec<String>>, ApiError> {
    let is_said = fields.peek("tags").is_some_and(|tags| !tags.is_null());
    let tags = fields.texts("tags")?;
    let is_bad = |tag: &String| {
        tag.is_empty() || tag.chars().count() > TAG_LEN || tag.contains(char::is_control)
    };
    if tags.len() > TAGS || tags.iter().any(is_bad) {
        let message = format!(
            "tags must be at most {TAGS}, each of 1 to {TAG_LEN} letters, none of them a control"
        );
        return Err(ApiError::invalid("tags", message));
    }
    Ok(is_said.then_some(tags))
}
