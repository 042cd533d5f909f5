//! Chunks and contexts that a completion asks for.

use serde_json::Value;

use super::auth::Principal;
use super::error::ApiError;
use super::lenient::Fields;
use super::state::Server;

/// What of the library a request wants to see: `context`, or `chunks` under `reuse`.
#[derive(Debug, Default)]
pub struct Selection {
    pub context: Option<String>,
    pub chunks: Option<Vec<Value>>,
    pub reuse: Option<String>,
}

impl Selection {
    pub fn read(fields: &mut Fields) -> Result<Self, ApiError> {
        Ok(Self {
            context: fields.text("context")?,
            chunks: fields.list("chunks")?,
            reuse: fields.text("reuse")?,
        })
    }
}

/// Finds what a request asks for. `None`: it asks for nothing.
pub fn resolve(
    _server: &Server,
    _principal: &Principal,
    selection: &Selection,
) -> Result<Option<std::convert::Infallible>, ApiError> {
    let asked = [
        ("context", selection.context.is_some()),
        ("chunks", selection.chunks.is_some()),
        ("reuse", selection.reuse.is_some()),
    ];
    match asked.into_iter().find(|(_, asked)| *asked) {
        Some((name, _)) => Err(ApiError::invalid(name, "chunks are not served yet")),
        None => Ok(None),
    }
}
