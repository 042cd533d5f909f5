//! A tenant's contexts: made, changed, forked and forgotten. Blocking.
//!
//! What is kept is what counts: a context is read for every request, and written after every
//! change, so that it is the same in the next process. One request at a time changes it.

use std::collections::HashMap;
use std::sync::Arc;

use strand_engine::ChunkId;
use strand_engine::context::{Context, Turn};
use strand_engine::store::{ContextInfo, StoredContext};

use super::chunks::over_quota;
use super::shelf::{Claim, Shelf, failed, no_chunk};
use super::{language, names};
use crate::server::error::ApiError;
use crate::server::state::{Server, now};
use crate::server::wire::contexts::{
    CHUNKS, ContextChange, ContextDetails, ContextObject, ContextSummary, Placed, PlacedChunk, Said,
};

/// A context that the tenant doesn't have, whoever else may. The words never differ.
pub fn no_context() -> ApiError {
    ApiError::not_found("there is no such context")
}

/// Claims a context for one request, if there is such a one.
pub fn claim(shelf: &Arc<Shelf>, id: &str) -> Result<Claim, ApiError> {
    // whether it is there first: another tenant's is never in use here
    info(shelf, id)?;
    shelf.claim(id)
}

fn info(shelf: &Shelf, id: &str) -> Result<ContextInfo, ApiError> {
    if !names::is_context(id) {
        return Err(no_context());
    }
    shelf.rows().index().context_info(id).map_err(failed)?.ok_or_else(no_context)
}

/// A context as it is kept, and as it lives.
pub fn load(
    server: &Server,
    shelf: &Shelf,
    id: &str,
) -> Result<(StoredContext, Context), ApiError> {
    let stored = shelf.rows().index().context(id).map_err(failed)?.ok_or_else(no_context)?;
    let chunks = stored.entries.iter().map(|entry| shelf.chunk(server, entry.chunk));
    let chunks = chunks.collect::<Result<_, _>>()?;
    let mut context = server.library.empty(None);
    context.resume(stored.clone(), chunks)?;
    Ok((stored, context))
}

fn keep(shelf: &Shelf, id: &str, label: Option<String>, context: &Context) -> Result<(), ApiError> {
    let stored = StoredContext { label, ..context.to_stored() };
    shelf.rows().index().put_context(id, &stored, now()).map_err(failed)
}

/// Makes a context.
pub fn make(
    server: &Server,
    shelf: &Shelf,
    change: ContextChange,
) -> Result<ContextObject, ApiError> {
    language(server)?;
    let mut context = server.library.empty(change.policy);
    let label = apply(server, shelf, change, &mut context, None)?;
    put_new(server, shelf, label, &context)
}

fn put_new(
    server: &Server,
    shelf: &Shelf,
    label: Option<String>,
    context: &Context,
) -> Result<ContextObject, ApiError> {
    let there = shelf.rows().index().num_contexts().map_err(failed)?;
    if there >= server.library.quota.contexts {
        let message = format!("there are {there} contexts, and no more are kept; delete some");
        return Err(over_quota(message));
    }
    let id = names::new_context();
    keep(shelf, &id, label, context)?;
    show(server, shelf, &id)
}

/// Changes what was said of a context; the name it has then.
fn apply(
    server: &Server,
    shelf: &Shelf,
    change: ContextChange,
    context: &mut Context,
    label: Option<String>,
) -> Result<Option<String>, ApiError> {
    if let Some(policy) = change.policy.filter(|policy| *policy != context.policy()) {
        context.set_policy(policy);
    }
    if let Some(rows) = change.blend_tokens {
        context.blend_tokens = rows;
    }
    if let Some(system) = change.system {
        context.conversation.set_system(Some(system).filter(|system| !system.is_empty()));
    }
    if change.forgets {
        context.conversation.clear();
    }
    if let Some(placed) = change.chunks {
        place_all(server, shelf, context, &placed)?;
    }
    Ok(change.name.or(label))
}

/// Puts these chunks into a context, and no others.
fn place_all(
    server: &Server,
    shelf: &Shelf,
    context: &mut Context,
    placed: &[Placed],
) -> Result<(), ApiError> {
    let mut wanted: Vec<(ChunkId, bool)> = Vec::new();
    for (index, Placed { id, active }) in placed.iter().enumerate() {
        let path = format!("chunks[{index}]");
        let id = names::chunk(shelf, id, &path)?;
        if wanted.iter().any(|(there, _)| *there == id) {
            return Err(ApiError::invalid(&path, format!("{path} is there twice")));
        }
        wanted.push((id, *active));
    }
    let is_wanted = |id: ChunkId| wanted.iter().any(|(wanted, _)| *wanted == id);
    while let Some(index) = context.entries().iter().position(|entry| !is_wanted(entry.chunk.id)) {
        context.remove(index);
    }
    for (to, (id, active)) in wanted.into_iter().enumerate() {
        let index = put(server, shelf, context, id, active)?;
        context.reorder(index, to);
    }
    Ok(())
}

/// Puts a chunk into a context, or switches the one that is there; its place.
fn put(
    server: &Server,
    shelf: &Shelf,
    context: &mut Context,
    id: ChunkId,
    active: bool,
) -> Result<usize, ApiError> {
    match place_of(context, id) {
        Some(index) => {
            context.set_active(index, active);
            Ok(index)
        }
        None if context.entries().len() >= CHUNKS => {
            let message = format!("a context has at most {CHUNKS} chunks; remove one");
            Err(ApiError::bad_request(message))
        }
        None => {
            context.load(shelf.chunk(server, id)?, active);
            Ok(context.entries().len() - 1)
        }
    }
}

fn place_of(context: &Context, id: ChunkId) -> Option<usize> {
    context.entries().iter().position(|entry| entry.chunk.id == id)
}

/// A change of one chunk in a context.
#[derive(Debug)]
pub enum Edit {
    /// What is said of the context itself.
    Change(Box<ContextChange>),
    /// Switched on or off.
    Switch {
        chunk: String,
        active: bool,
    },
    /// Put in, or elsewhere.
    Put {
        chunk: String,
        active: bool,
        position: Option<usize>,
    },
    Remove {
        chunk: String,
    },
}

/// Changes a context and keeps it.
pub fn edit(
    server: &Server,
    shelf: &Arc<Shelf>,
    id: &str,
    edit: Edit,
) -> Result<ContextObject, ApiError> {
    let _claim = claim(shelf, id)?;
    let (stored, mut context) = load(server, shelf, id)?;
    let mut label = stored.label.clone();
    let before = flags(&context);
    match edit {
        Edit::Change(change) => label = apply(server, shelf, *change, &mut context, label)?,
        Edit::Switch { chunk, active } => {
            let index = entry(shelf, &context, &chunk)?;
            context.set_active(index, active);
        }
        Edit::Put { chunk, active, position } => {
            let chunk = names::chunk(shelf, &chunk, "chunk")?;
            let index = put(server, shelf, &mut context, chunk, active)?;
            if let Some(to) = position {
                context.reorder(index, to);
            }
        }
        Edit::Remove { chunk } => {
            let index = entry(shelf, &context, &chunk)?;
            context.remove(index);
        }
    }
    keep(shelf, id, label, &context)?;
    let after = flags(&context);
    let is_other =
        |(chunk, flag): &(&ChunkId, &bool)| before.get(*chunk).is_some_and(|was| was != *flag);
    server.metrics.toggled(after.iter().filter(is_other).count());
    show(server, shelf, id)
}

/// Which chunks are switched on.
fn flags(context: &Context) -> HashMap<ChunkId, bool> {
    context.entries().iter().map(|entry| (entry.chunk.id, entry.active)).collect()
}

/// The place of a chunk that must be in the context.
fn entry(shelf: &Shelf, context: &Context, chunk: &str) -> Result<usize, ApiError> {
    let id = names::chunk(shelf, chunk, "chunk")?;
    place_of(context, id).ok_or_else(no_chunk)
}

/// A context of its own that is the same now. Chunks and KV are shared.
pub fn fork(
    server: &Server,
    shelf: &Arc<Shelf>,
    id: &str,
    name: Option<String>,
) -> Result<ContextObject, ApiError> {
    info(shelf, id)?;
    let (stored, context) = load(server, shelf, id)?;
    put_new(server, shelf, name.or(stored.label), &context)
}

pub fn forget(shelf: &Arc<Shelf>, id: &str) -> Result<(), ApiError> {
    let _claim = claim(shelf, id)?;
    let removed = shelf.rows().index().remove_context(id).map_err(failed)?;
    if removed { Ok(()) } else { Err(no_context()) }
}

/// Those that this server made, the one used last first.
pub fn list(shelf: &Shelf) -> Result<Vec<ContextSummary>, ApiError> {
    let mut infos = shelf.rows().index().contexts().map_err(failed)?;
    infos.retain(|info| names::is_context(&info.name));
    Ok(infos.into_iter().map(summary).collect())
}

pub fn show(server: &Server, shelf: &Shelf, id: &str) -> Result<ContextObject, ApiError> {
    let info = info(shelf, id)?;
    let (_, context) = load(server, shelf, id)?;
    Ok(ContextObject { summary: summary(info), details: details(server, &context)? })
}

fn summary(info: ContextInfo) -> ContextSummary {
    ContextSummary {
        id: info.name,
        object: "context",
        name: info.label,
        policy: info.policy,
        created: info.created,
        updated: info.updated,
        num_chunks: info.chunks,
        num_messages: info.turns,
    }
}

fn details(server: &Server, context: &Context) -> Result<ContextDetails, ApiError> {
    let (template, tokenizer) = language(server)?;
    let chunks =
        context.entries().iter().zip(context.positions()).map(|(entry, position)| PlacedChunk {
            id: entry.chunk.id.to_string(),
            name: entry.chunk.name.clone(),
            active: entry.active,
            tokens: entry.chunk.ids.len(),
            position: position.map(|(first, last)| [first, last]),
        });
    let said = |turn: &Turn| Said { role: turn.role.as_str(), content: turn.text.clone() };
    Ok(ContextDetails {
        system: context.conversation.system().map(str::to_owned),
        blend_tokens: context.blend_tokens,
        used_tokens: context.used_tokens(template, tokenizer)?,
        total_tokens: server.engine.plan().max_model_len,
        chunks: chunks.collect(),
        messages: context.conversation.turns().iter().map(said).collect(),
    })
}
