//! What a chat keeps on disk: its chunks' texts, and its context under a name.
//!
//! A store that can't be used is a reason, told by whoever needs it.

use std::collections::HashSet;

use anyhow::{Result, bail};
use strand_engine::context::{Chunk, Context};
use strand_engine::store::{ChunkInfo, KvFile, Store, StoreError, StoredChunk, StoredContext};
use strand_engine::{ChunkId, Error};

pub struct Keeper {
    store: Result<Store, String>,
    /// The name the context is kept under.
    name: Option<String>,
    /// What is kept under it now.
    kept: Option<StoredContext>,
    /// Chunks that are known to be in the store.
    texts: HashSet<ChunkId>,
}

impl Keeper {
    pub fn new(store: Result<Store, String>, name: Option<String>) -> Self {
        Self { store, name, kept: None, texts: HashSet::new() }
    }

    /// The store; an error that says why there is none.
    pub fn store(&self) -> Result<&Store> {
        match &self.store {
            Ok(store) => Ok(store),
            Err(reason) => bail!("nothing can be saved: {reason}"),
        }
    }

    /// Why there is no store; `None` where there is one.
    pub fn no_store(&self) -> Option<&str> {
        self.store.as_ref().err().map(String::as_str)
    }

    /// The context of this name and its chunks, in its order, if one was kept.
    pub fn kept_context(&mut self) -> Result<Option<(StoredContext, Vec<StoredChunk>)>> {
        let Some(name) = &self.name else { return Ok(None) };
        let store = self.store()?;
        let Some(context) = store.context(name)? else { return Ok(None) };
        let ids: Vec<ChunkId> = context.entries.iter().map(|entry| entry.chunk).collect();
        let chunks: Vec<StoredChunk> = ids
            .iter()
            .map(|&id| {
                let chunk = store.chunk(id)?;
                chunk.ok_or_else(|| StoreError::UnknownChunk { text: id.short() })
            })
            .collect::<Result<_, _>>()?;
        self.texts.extend(ids);
        self.kept = Some(context.clone());
        Ok(Some((context, chunks)))
    }

    /// A chunk of the store, if it is there.
    pub fn chunk(&self, id: ChunkId) -> Result<Option<StoredChunk>> {
        self.store.as_ref().map_or(Ok(None), |store| Ok(store.chunk(id)?))
    }

    /// A chunk of the store by its name or a prefix of its hash; `None` where there is none.
    pub fn find(&self, text: &str) -> Result<Option<StoredChunk>> {
        let Ok(store) = &self.store else { return Ok(None) };
        let named: Vec<ChunkInfo> =
            self.chunks()?.into_iter().filter(|chunk| chunk.name == text).collect();
        let id = match &named[..] {
            [one] => one.id,
            [] => match store.find_chunk(text) {
                Err(StoreError::UnknownChunk { .. }) => return Ok(None),
                found => found?,
            },
            _ => {
                let matches = named.iter().map(|chunk| chunk.id.short()).collect();
                return Err(Error::AmbiguousChunk { text: text.to_owned(), matches }.into());
            }
        };
        Ok(store.chunk(id)?)
    }

    /// All chunks of the store, without their texts.
    pub fn chunks(&self) -> Result<Vec<ChunkInfo>> {
        self.store.as_ref().map_or(Ok(Vec::new()), |store| Ok(store.chunks()?))
    }

    /// The KV files there are.
    pub fn kv_files(&self) -> Result<Vec<KvFile>> {
        self.store.as_ref().map_or(Ok(Vec::new()), |store| Ok(store.kv_files()?))
    }

    /// Keeps a chunk's text.
    pub fn keep_text(&mut self, chunk: &Chunk) -> Result<()> {
        if self.texts.contains(&chunk.id) {
            return Ok(());
        }
        let tokens = u32::try_from(chunk.ids.len()).ok();
        self.store()?.put_chunk(&StoredChunk::new(&chunk.name, chunk.kind, &chunk.text, tokens))?;
        self.texts.insert(chunk.id);
        Ok(())
    }

    /// A chunk has been erased from the store.
    pub fn forget(&mut self, id: ChunkId) {
        self.texts.remove(&id);
        // erasing took it out of the kept context as well
        self.kept = None;
    }

    /// Keeps the context as it is now, where it has a name and is not kept so already.
    pub fn keep(&mut self, context: &Context) -> Result<()> {
        if self.name.is_none() {
            return Ok(());
        }
        let now = context.to_stored();
        if self.kept.as_ref() == Some(&now) {
            return Ok(());
        }
        for entry in context.entries() {
            self.keep_text(&entry.chunk)?;
        }
        let name = self.name.as_ref().expect("looked at above");
        self.store()?.put_context(name, &now)?;
        self.kept = Some(now);
        Ok(())
    }
}
