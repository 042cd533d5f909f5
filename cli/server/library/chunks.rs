//! A tenant's chunks: made, looked at and erased. Blocking.

use std::collections::BTreeSet;
use std::sync::Arc;

use anyhow::Error;
use strand_engine::context::{Chunk, ChunkKind, Context, ReusePolicy};
use strand_engine::store::{ChunkInfo, PutChunk, StoredChunk};
use strand_engine::{ChunkId, KvVariant, Tier, TiersOf};

use super::shelf::{Shelf, failed, no_chunk};
use super::{language, page, verbs};
use crate::server::error::ApiError;
use crate::server::query::Params;
use crate::server::state::Server;
use crate::server::wire::chunks::{ChunkObject, NewChunk, Page};
use crate::{chunk_file, placing};

/// A chunk that was asked to be made.
pub struct Made {
    pub id: ChunkId,
    /// The tenant did not have it before.
    pub is_new: bool,
    /// Tokens that were computed for it.
    pub encoded: usize,
}

/// Which chunks of a list are meant.
pub struct Filter {
    is_active: Option<bool>,
    /// `none`: those without KV.
    tier: Option<&'static str>,
    tag: Option<String>,
    params: Params,
}

impl Filter {
    pub fn read(params: Params) -> Result<Self, ApiError> {
        let state = params.word("state", &["active", "inactive"])?;
        let tier = params.word("tier", &["device", "host", "disk", "none"])?;
        let tag = params.text("tag").map(str::to_owned);
        Ok(Self { is_active: state.map(|state| state == "active"), tier, tag, params })
    }
}

/// A page of the tenant's chunks, in the order they were made.
pub fn list(
    server: &Server,
    shelf: &Shelf,
    filter: &Filter,
) -> Result<Page<ChunkObject>, ApiError> {
    let (mut infos, active) = {
        let rows = shelf.rows();
        let index = rows.index();
        (index.chunks().map_err(failed)?, index.active_chunks().map_err(failed)?)
    };
    infos.retain(|info| {
        let state = filter.is_active.is_none_or(|wanted| active.contains(&info.id) == wanted);
        state && filter.tag.as_ref().is_none_or(|tag| info.tags.contains(tag))
    });
    let Some(tier) = filter.tier else {
        // the others need not be tokenized
        let Page { data, has_more, .. } = page(infos, &filter.params, |info| info.id.to_string())?;
        let described = describe(server, shelf, data)?;
        return Ok(Page::new(described, has_more, |chunk| chunk.id.clone()));
    };
    let mut chunks = describe(server, shelf, infos)?;
    let is_there = |chunk: &ChunkObject| match tier {
        "none" => chunk.tiers.is_empty(),
        tier => chunk.tiers.contains(&tier),
    };
    chunks.retain(is_there);
    page(chunks, &filter.params, |chunk| chunk.id.clone())
}

/// Makes a chunk, or finds the one that this content is, whose tags and metadata are replaced
/// where they are said. What fails leaves nothing.
pub fn make(server: &Server, shelf: &Shelf, new: NewChunk) -> Result<Made, ApiError> {
    language(server)?;
    let id = ChunkId::of(&new.content);
    let known = shelf.rows().index().chunk_info(id).map_err(failed)?;
    let (name, kind) = match &known {
        Some(known) => {
            same_name(&new, known)?;
            (known.name.clone(), known.kind)
        }
        None => {
            check_quota(server, shelf, new.content.len() as u64)?;
            let name = new.name.clone().unwrap_or_else(|| id.short());
            (name, new.kind.unwrap_or(ChunkKind::File))
        }
    };
    let chunk = chunk_file::chunk(&server.engine, &name, kind, new.content);
    let chunk = Arc::new(chunk.map_err(refused)?);
    let encoded = match new.is_lazy {
        true => 0,
        false => verbs::encode(server, shelf, &chunk)?,
    };
    let tokens = u32::try_from(chunk.ids.len()).ok();
    let stored = StoredChunk::new(&name, kind, &chunk.text, tokens);
    let (tags, metadata) = (new.tags.clone().unwrap_or_default(), new.metadata.clone());
    let stored = StoredChunk { info: ChunkInfo { tags, metadata, ..stored.info }, ..stored };
    let is_new = {
        let rows = shelf.rows();
        let is_new = rows.index().put_chunk(&stored).map_err(failed)? == PutChunk::New;
        if !is_new {
            let (tags, metadata) = (new.tags.as_deref(), new.metadata.as_deref());
            rows.index().set_about(id, tags, metadata).map_err(failed)?;
        }
        is_new
    };
    shelf.put_at_hand(chunk);
    Ok(Made { id, is_new, encoded })
}

/// A chunk keeps the name and the kind it was made with.
fn same_name(new: &NewChunk, known: &ChunkInfo) -> Result<(), ApiError> {
    let other_kind = new.kind.filter(|kind| *kind != known.kind).map(ChunkKind::as_str);
    let other_name = new.name.as_deref().filter(|name| *name != known.name);
    match other_name.or(other_kind) {
        None => Ok(()),
        Some(asked) => {
            let (name, kind) = (&known.name, known.kind.as_str());
            let message = format!(
                "this content is the {kind} {name} already, and a chunk keeps its name and kind; \
                 delete it to make it as {asked}"
            );
            Err(ApiError { code: Some("chunk_exists"), ..ApiError::conflict(message) })
        }
    }
}

fn check_quota(server: &Server, shelf: &Shelf, bytes: u64) -> Result<(), ApiError> {
    let quota = server.library.quota;
    let (chunks, has) = shelf.rows().index().chunk_totals().map_err(failed)?;
    let full = |message: String| Err(over_quota(message));
    if chunks >= quota.chunks {
        return full(format!("there are {chunks} chunks, and no more are kept; delete some"));
    }
    if has.saturating_add(bytes) > quota.chunk_bytes {
        let most = quota.chunk_bytes;
        return full(format!("the chunks have {has} bytes, and {bytes} more would be over {most}"));
    }
    Ok(())
}

pub fn over_quota(message: String) -> ApiError {
    ApiError { code: Some("quota_exceeded"), ..ApiError::conflict(message) }
}

fn refused(error: Error) -> ApiError {
    match error.downcast::<strand_engine::Error>() {
        Ok(error) => error.into(),
        Err(other) => ApiError::invalid("content", other.to_string()),
    }
}

/// A chunk in a context of its own: what it has seen is the anchor, as under every policy but
/// `mask` where it is the first.
pub fn alone(server: &Server, chunk: Arc<Chunk>) -> Context {
    let mut context = server.library.empty(Some(ReusePolicy::Independent));
    context.load(chunk, true);
    context
}

/// What is said of one chunk.
pub fn show(server: &Server, shelf: &Shelf, id: ChunkId) -> Result<ChunkObject, ApiError> {
    let info = shelf.rows().index().chunk_info(id).map_err(failed)?.ok_or_else(no_chunk)?;
    Ok(describe(server, shelf, vec![info])?.pop().expect("one for one"))
}

/// The same with its text.
pub fn show_all(server: &Server, shelf: &Shelf, id: ChunkId) -> Result<ChunkObject, ApiError> {
    let content = Some(shelf.chunk(server, id)?.text.clone());
    Ok(ChunkObject { content, ..show(server, shelf, id)? })
}

/// What is said of chunks in a list.
pub fn describe(
    server: &Server,
    shelf: &Shelf,
    infos: Vec<ChunkInfo>,
) -> Result<Vec<ChunkObject>, ApiError> {
    let active = shelf.rows().index().active_chunks().map_err(failed)?;
    let mut context = server.library.empty(Some(ReusePolicy::Independent));
    for info in &infos {
        context.load(shelf.chunk(server, info.id)?, true);
    }
    let salt = server.salt(&shelf.tenant, None);
    let tiers = placing::tiers(&server.engine, &context, &salt, KvVariant::Lossless)?;
    let described = infos.into_iter().zip(tiers);
    Ok(described.map(|(info, tiers)| object(info, &active, tiers)).collect())
}

fn object(info: ChunkInfo, active: &BTreeSet<ChunkId>, tiers: TiersOf) -> ChunkObject {
    let is_active = active.contains(&info.id);
    // what was put there was JSON
    let metadata = info.metadata.and_then(|text| serde_json::from_str(&text).ok());
    ChunkObject {
        id: info.id.to_string(),
        object: "chunk",
        name: info.name,
        kind: info.kind.as_str(),
        tokens: info.tokens,
        bytes: info.text_bytes,
        created: info.created,
        tags: info.tags,
        metadata,
        state: if is_active { "active" } else { "inactive" },
        tiers: tiers.list().into_iter().map(Tier::as_str).collect(),
        content: None,
    }
}

/// Removes a chunk from every tier, from the disk and from the tenant's contexts.
pub fn erase(server: &Server, shelf: &Shelf, id: ChunkId) -> Result<(), ApiError> {
    if !shelf.rows().index().keeps(&shelf.tenant.0, id).map_err(failed)? {
        return Err(no_chunk());
    }
    server.engine.erase(id, Some(&shelf.tenant.salt(None)))?;
    if let super::shelf::Rows::Passing(index) = &*shelf.rows() {
        index.remove_chunk(id).map_err(failed)?;
    }
    shelf.forget(id);
    Ok(())
}
