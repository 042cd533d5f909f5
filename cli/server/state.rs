//! What all requests share.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::http::HeaderValue;
use strand_engine::grammar::Grammars;
use strand_engine::{EngineHandle, Restore, tenant};

use super::auth::{Keys, Tenant};
use super::embeddings::EmbeddingModel;
use super::error::ApiError;
use super::hosts::Hosts;
use super::library::Library;
use super::metrics::Metrics;
use super::quota::Quotas;
use super::tools::Style;

/// The running server. Immutable; what changes is in the engine and behind its fields.
pub struct Server {
    pub engine: EngineHandle,
    pub model: ModelEntry,
    pub limits: ServerLimits,
    /// Made when the first grammar is asked for.
    pub grammars: OnceLock<Grammars>,
    /// A model made for embeddings.
    pub embedder: Option<EmbeddingModel>,
    pub keys: Keys,
    pub hosts: Hosts,
    /// Chunks and contexts of all tenants.
    pub library: Library,
    /// Sites whose pages may use this server.
    pub origins: Vec<HeaderValue>,
    pub quotas: Quotas,
    pub metrics: Metrics,
    /// When KV on the disk is loaded.
    pub restore: Restore,
    pub sharing: Sharing,
}

/// Who finds the KV of a text that several tenants bring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// Each their own.
    Parted,
    /// All of them, but for what a client parts itself.
    Shared,
}

/// The server as handlers get it.
pub type App = Arc<Server>;

/// The model under the name that clients know.
#[derive(Debug, Clone)]
pub struct ModelEntry {
    pub id: String,
    /// Seconds since 1970.
    pub created: u64,
    /// How it calls tools.
    pub style: Style,
    /// Its template doesn't speak of tools.
    pub needs_telling: bool,
}

/// What one request may ask for.
#[derive(Debug, Clone)]
pub struct ServerLimits {
    /// Bytes of a body.
    pub body: usize,
    /// What it may take to arrive.
    pub read_timeout: Duration,
    pub n: usize,
}

impl Server {
    /// What KV of a tenant's requests is found by; a client's own salt narrows it further.
    pub fn salt(&self, tenant: &Tenant, cache_salt: Option<&str>) -> String {
        match (self.sharing, cache_salt) {
            (Sharing::Shared, None) => tenant::salt(tenant::SHARED, None),
            _ => tenant.salt(cache_salt),
        }
    }
}

impl ServerLimits {
    /// Alternatives to a token.
    pub const LOGPROBS: usize = 20;
    pub const STOPS: usize = 4;
    /// Bytes of a stop string.
    pub const STOP_LEN: usize = 1024;
    /// Prompts in one request.
    pub const PROMPTS: usize = 128;
    /// Letters of a cache salt.
    pub const SALT_LEN: usize = 128;
}

impl ModelEntry {
    /// `template` is the source of its chat template.
    pub fn new(id: String, template: &str) -> Self {
        let needs_telling = !template.contains("tools");
        Self { id, created: now(), style: Style::of(template), needs_telling }
    }

    /// Refuses another model's name. None is the one there is.
    pub fn check(&self, asked: Option<&str>) -> Result<(), ApiError> {
        match asked {
            None | Some("") => Ok(()),
            Some(name) if name == self.id => Ok(()),
            Some(name) => Err(ApiError::unknown_model(name)),
        }
    }
}

/// Seconds since 1970.
pub fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}
