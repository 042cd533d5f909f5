//! Chunks and contexts of all tenants, and what a request wants to see of them.

pub mod chunks;
pub mod contexts;
pub mod misses;
pub mod names;
mod shelf;
pub mod sight;
pub mod verbs;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::Value;
use strand_engine::EngineHandle;
use strand_engine::context::{Context, Conversation, ReusePolicy};
use strand_engine::store::{Codec, Index, Store};
use strand_models::{ChatTemplate, Tokenizer};

use super::auth::{Principal, Tenant};
use super::error::ApiError;
use super::lenient::{Fields, wrong_type};
use super::options::{LibraryArgs, ServeArgs};
use super::query::Params;
use super::state::Server;
use super::wire::chunks::Page;
use super::wire::common::Common;
use crate::date;
pub use shelf::Shelf;
pub use sight::Sight;

/// What the server holds for its tenants.
pub struct Library {
    /// `None`: what is here is gone with the server.
    store: Option<Mutex<Store>>,
    shelves: Mutex<HashMap<Tenant, Arc<Shelf>>>,
    pub quota: Quota,
    pub codec: Codec,
    policy: ReusePolicy,
    blend_tokens: Option<usize>,
    anchor: Vec<u32>,
}

/// What one tenant may have.
#[derive(Debug, Clone, Copy)]
pub struct Quota {
    pub chunks: u64,
    /// Of all their texts.
    pub chunk_bytes: u64,
    pub contexts: u64,
}

impl Library {
    pub fn new(
        store: Option<Store>,
        engine: &EngineHandle,
        args: &ServeArgs,
    ) -> Result<Self, strand_engine::Error> {
        let LibraryArgs { max_chunks, max_chunk_bytes, max_contexts } = args.library;
        let language = engine.chat_template().zip(engine.tokenizer());
        let anchor = language.map(|(template, tokenizer)| Context::anchor_of(template, tokenizer));
        Ok(Self {
            store: store.map(Mutex::new),
            shelves: Mutex::default(),
            quota: Quota {
                chunks: max_chunks as u64,
                chunk_bytes: max_chunk_bytes,
                contexts: max_contexts as u64,
            },
            codec: args.engine.kv_codec,
            policy: args.reuse.policy(engine.training()),
            blend_tokens: args.reuse.blend_tokens,
            anchor: anchor.transpose()?.unwrap_or_default(),
        })
    }

    /// What a tenant has. Blocking, the first time.
    pub fn shelf(&self, tenant: &Tenant) -> Result<Arc<Shelf>, ApiError> {
        let mut shelves = self.shelves.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(shelf) = shelves.get(tenant) {
            return Ok(shelf.clone());
        }
        let rows = match &self.store {
            Some(store) => {
                let store = store.lock().unwrap_or_else(PoisonError::into_inner);
                shelf::Rows::Kept(store.of_tenant(&tenant.0).map_err(shelf::failed)?)
            }
            None => shelf::Rows::Passing(Index::in_memory(&tenant.0).map_err(shelf::failed)?),
        };
        let shelf = Arc::new(Shelf::new(tenant.clone(), rows));
        shelves.insert(tenant.clone(), shelf.clone());
        Ok(shelf)
    }

    /// A context without chunks, under a policy or the one that is usual here.
    pub fn empty(&self, policy: Option<ReusePolicy>) -> Context {
        let conversation = Conversation::of_strangers(date::today());
        let mut context =
            Context::new(policy.unwrap_or(self.policy), conversation, self.anchor.clone());
        if let Some(rows) = self.blend_tokens {
            context.blend_tokens = rows;
        }
        context
    }
}

/// What of the library a request wants to see: `context`, or `chunks` under `reuse`.
#[derive(Debug, Clone, Default)]
pub struct Selection {
    pub context: Option<String>,
    pub chunks: Option<Vec<String>>,
    pub reuse: Option<String>,
}

/// Chunks that one request may see.
const CHUNKS: usize = 1024;

impl Selection {
    pub fn read(fields: &mut Fields) -> Result<Self, ApiError> {
        let (context, reuse) = (fields.text("context")?, fields.text("reuse")?);
        policy(reuse.as_deref(), "reuse")?;
        let chunks = fields.list("chunks")?.map(chunk_ids).transpose()?;
        let refused = |param: &str, message: &str| Err(ApiError::invalid(param, message));
        match (&context, &chunks, &reuse) {
            (Some(_), Some(_), _) => refused("chunks", "a context has its own chunks"),
            (Some(_), _, Some(_)) => refused("reuse", "a context has its own policy"),
            _ => Ok(Self { context, chunks, reuse }),
        }
    }
}

fn chunk_ids(list: Vec<Value>) -> Result<Vec<String>, ApiError> {
    if list.len() > CHUNKS {
        let message = format!("chunks has {} ids, at most {CHUNKS} are allowed", list.len());
        return Err(ApiError::invalid("chunks", message));
    }
    let ids = list.into_iter().enumerate().map(|(index, id)| match id {
        Value::String(id) => Ok(id),
        other => Err(wrong_type(&format!("chunks[{index}]"), "a string", &other)),
    });
    ids.collect()
}

/// The policy of this name.
pub fn policy(name: Option<&str>, param: &str) -> Result<Option<ReusePolicy>, ApiError> {
    let parse = |name: &str| {
        ReusePolicy::parse(name).ok_or_else(|| {
            let known = ReusePolicy::ALL.map(ReusePolicy::as_str).join(", ");
            ApiError::invalid(param, format!("{param} is {name:?}, it must be one of {known}"))
        })
    };
    name.map(parse).transpose()
}

/// What a request wants to see, and what else matters to that.
#[derive(Debug)]
pub struct Wish {
    selection: Selection,
    salt: String,
    n: usize,
    max_tokens: Option<usize>,
}

impl Wish {
    pub fn new(server: &Server, principal: &Principal, common: &Common) -> Self {
        Self {
            selection: common.selection.clone(),
            salt: server.salt(&principal.tenant, common.cache_salt.as_deref()),
            n: common.n,
            max_tokens: common.sampling.max_tokens,
        }
    }
}

/// Finds what a request asks for; `None`: it asks for nothing. Blocking.
pub fn resolve(server: &Server, tenant: &Tenant, wish: &Wish) -> Result<Option<Sight>, ApiError> {
    let Selection { context, chunks, .. } = &wish.selection;
    if context.is_none() && chunks.is_none() {
        return Ok(None);
    }
    language(server)?;
    let shelf = server.library.shelf(tenant)?;
    let sight = match (context, chunks) {
        (Some(_), _) if wish.n > 1 => {
            return Err(ApiError::invalid(
                "n",
                "a context goes on with one answer; fork it for others",
            ));
        }
        (Some(id), _) => Sight::of_context(server, shelf, wish, id)?,
        (None, chunks) => {
            Sight::of_chunks(server, shelf, wish, chunks.as_deref().unwrap_or_default())?
        }
    };
    Ok(Some(sight))
}

/// Entries of a page, where nobody says how many.
const PAGE: usize = 20;
const LARGEST_PAGE: usize = 100;

/// The page of a list that is asked for, by `limit` and `after`.
pub fn page<T>(
    mut all: Vec<T>,
    params: &Params,
    id: impl Fn(&T) -> String,
) -> Result<Page<T>, ApiError> {
    let limit = params.count("limit", 1..=LARGEST_PAGE)?.unwrap_or(PAGE);
    if let Some(after) = params.text("after") {
        let found = all.iter().position(|one| id(one) == after);
        let found = found.ok_or_else(|| ApiError::invalid("after", "after is not in this list"))?;
        all.drain(..=found);
    }
    let has_more = all.len() > limit;
    all.truncate(limit);
    Ok(Page::new(all, has_more, id))
}

/// The template and the tokenizer that chunks are made with.
pub fn language(server: &Server) -> Result<(&ChatTemplate, &Tokenizer), ApiError> {
    let engine = &server.engine;
    engine.chat_template().zip(engine.tokenizer()).ok_or_else(|| {
        ApiError::bad_request("chunks and contexts need a model with a chat template and tokenizer")
    })
}
