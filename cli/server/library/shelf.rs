//! What one tenant has: the rows of its chunks and contexts, and its chunks as tokens.
//!
//! Blocking: rows are on the disk. Every question is about the tenant's own rows alone, so that
//! nobody can tell, in words or in time, what another tenant has.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use strand_engine::ChunkId;
use strand_engine::context::Chunk;
use strand_engine::store::{Index, Store, StoreError};

use super::misses::Memory;
use crate::server::auth::Tenant;
use crate::server::error::ApiError;
use crate::server::state::Server;

/// Tokens of chunks that are kept at hand, in bytes of their texts.
const AT_HAND: usize = 64 << 20;

pub struct Shelf {
    pub tenant: Tenant,
    rows: Mutex<Rows>,
    /// Chunks as this model's tokens.
    tokenized: Mutex<HashMap<ChunkId, Arc<Chunk>>>,
    /// Contexts that somebody changes, or is answered over, now.
    busy: Mutex<HashSet<String>>,
    memory: Mutex<Memory>,
}

/// Where a tenant's rows are.
pub enum Rows {
    Kept(Store),
    /// Gone with the server.
    Passing(Index),
}

impl Rows {
    pub fn index(&self) -> &Index {
        match self {
            Self::Kept(store) => store.index(),
            Self::Passing(index) => index,
        }
    }

    pub fn store(&self) -> Option<&Store> {
        match self {
            Self::Kept(store) => Some(store),
            Self::Passing(_) => None,
        }
    }
}

/// Nobody else changes the context while this is held.
pub struct Claim {
    shelf: Arc<Shelf>,
    id: String,
}

impl Drop for Claim {
    fn drop(&mut self) {
        lock(&self.shelf.busy).remove(&self.id);
    }
}

impl Shelf {
    pub fn new(tenant: Tenant, rows: Rows) -> Self {
        Self {
            tenant,
            rows: Mutex::new(rows),
            tokenized: Mutex::default(),
            busy: Mutex::default(),
            memory: Mutex::default(),
        }
    }

    /// The tenant's rows. One question at a time, none of them across an await.
    pub fn rows(&self) -> MutexGuard<'_, Rows> {
        lock(&self.rows)
    }

    /// What this process computed for the tenant.
    pub fn memory(&self) -> MutexGuard<'_, Memory> {
        lock(&self.memory)
    }

    /// A chunk as tokens.
    pub fn chunk(&self, server: &Server, id: ChunkId) -> Result<Arc<Chunk>, ApiError> {
        if let Some(chunk) = lock(&self.tokenized).get(&id) {
            return Ok(chunk.clone());
        }
        let stored = self.rows().index().chunk(id).map_err(failed)?.ok_or_else(no_chunk)?;
        let (template, tokenizer) = super::language(server)?;
        let chunk = Arc::new(Chunk::from_stored(stored, template, tokenizer)?);
        self.put_at_hand(chunk.clone());
        Ok(chunk)
    }

    pub fn put_at_hand(&self, chunk: Arc<Chunk>) {
        let mut tokenized = lock(&self.tokenized);
        let bytes: usize = tokenized.values().map(|chunk| chunk.text.len()).sum();
        if bytes + chunk.text.len() > AT_HAND {
            tokenized.clear();
        }
        tokenized.insert(chunk.id, chunk);
    }

    pub fn forget(&self, id: ChunkId) {
        lock(&self.tokenized).remove(&id);
        self.memory().forget(id);
    }

    /// Claims a context. One request at a time changes it.
    pub fn claim(self: &Arc<Self>, id: &str) -> Result<Claim, ApiError> {
        if !lock(&self.busy).insert(id.to_owned()) {
            let message = "the context is in use by another request; try again when that has ended";
            return Err(ApiError { retry_after: Some(1), ..ApiError::conflict(message) });
        }
        Ok(Claim { shelf: self.clone(), id: id.to_owned() })
    }
}

/// What is behind it is whole after every statement, also where a thread panicked.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A chunk that the tenant doesn't have, whoever else may. The words never differ.
pub fn no_chunk() -> ApiError {
    ApiError::not_found("there is no such chunk")
}

/// What the store refuses, in the engine's words.
pub fn failed(error: StoreError) -> ApiError {
    match error {
        StoreError::UnknownChunk { .. } => no_chunk(),
        other => strand_engine::Error::from(other).into(),
    }
}
