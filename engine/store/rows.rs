//! The rows of a store as its handle's tenant sees them: files, chunks, contexts and settings.

use std::path::Path;

use super::error::StoreError;
use super::index::{
    ChunkInfo, ContextInfo, FileStamp, KvFile, PutChunk, StoredChunk, StoredContext,
};
use super::kv_file::KvRecord;
use super::now;
use super::store::{Store, open_file, open_named};
use crate::ChunkId;
use crate::cache::KvId;
use crate::tenant::SHARED;

impl Store {
    /// Whether there is a file for it, as the index knows it.
    pub fn has(&self, id: KvId) -> Result<bool, StoreError> {
        Ok(self.index.file(id)?.is_some())
    }

    /// The tenant's files, and of those that tenants share the ones of its chunks.
    pub fn kv_files(&self) -> Result<Vec<KvFile>, StoreError> {
        let mut own = Vec::new();
        for file in self.index.files()? {
            let is_own = match file.tenant.as_str() {
                tenant if tenant == self.tenant() => true,
                tenant => tenant == SHARED && self.keeps(self.tenant(), file.chunk)?,
            };
            own.extend(is_own.then_some(file));
        }
        Ok(own)
    }

    /// What the tenant's files of a chunk say of themselves; those that say nothing are left out.
    pub fn kv_records(&self, chunk: ChunkId) -> Result<Vec<KvRecord>, StoreError> {
        let mut files = self.kv_files()?;
        files.retain(|file| file.chunk == chunk);
        let record = |file: KvFile| {
            let (source, length) = open_file(&self.folder.kv_path(file.kv_id)).ok()?;
            open_named(source, length, file.kv_id).ok().map(|reader| reader.record)
        };
        Ok(files.into_iter().filter_map(record).collect())
    }

    /// The files of all tenants.
    pub fn all_kv_files(&self) -> Result<Vec<KvFile>, StoreError> {
        self.index.files()
    }

    /// Keeps a chunk's text; one that is there keeps its name, kind and age.
    pub fn put_chunk(&self, chunk: &StoredChunk) -> Result<PutChunk, StoreError> {
        self.index.put_chunk(chunk)
    }

    pub fn chunk(&self, id: ChunkId) -> Result<Option<StoredChunk>, StoreError> {
        self.index.chunk(id)
    }

    /// Whether a chunk's text is kept for a tenant; for [`SHARED`], whether it is for any.
    pub fn keeps(&self, tenant: &str, id: ChunkId) -> Result<bool, StoreError> {
        self.index.keeps(tenant, id)
    }

    /// A chunk without its text.
    pub fn chunk_info(&self, id: ChunkId) -> Result<Option<ChunkInfo>, StoreError> {
        self.index.chunk_info(id)
    }

    /// In the order they were created.
    pub fn chunks(&self) -> Result<Vec<ChunkInfo>, StoreError> {
        self.index.chunks()
    }

    /// The chunk whose id starts so: a unique prefix of four or more hex digits.
    pub fn find_chunk(&self, prefix: &str) -> Result<ChunkId, StoreError> {
        self.index.find_chunk(prefix)
    }

    /// False where there is no such chunk.
    pub fn add_tag(&self, id: ChunkId, tag: &str) -> Result<bool, StoreError> {
        self.index.add_tag(id, tag)
    }

    /// Keeps a context under a name, replacing the one before; its chunks must be kept already.
    pub fn put_context(&self, name: &str, context: &StoredContext) -> Result<(), StoreError> {
        self.index.put_context(name, context, now())
    }

    pub fn context(&self, name: &str) -> Result<Option<StoredContext>, StoreError> {
        self.index.context(name)
    }

    /// The one used last comes first.
    pub fn contexts(&self) -> Result<Vec<ContextInfo>, StoreError> {
        self.index.contexts()
    }

    /// False where there was none.
    pub fn remove_context(&self, name: &str) -> Result<bool, StoreError> {
        self.index.remove_context(name)
    }

    /// The SHA-256 of a file, if it was remembered for this very stamp.
    pub fn fingerprint(
        &self,
        path: &Path,
        stamp: FileStamp,
    ) -> Result<Option<[u8; 32]>, StoreError> {
        self.index.fingerprint(path, stamp)
    }

    pub fn put_fingerprint(
        &self,
        path: &Path,
        stamp: FileStamp,
        sha256: [u8; 32],
    ) -> Result<(), StoreError> {
        self.index.put_fingerprint(path, stamp, sha256)
    }

    /// Keeps a chunk's files from [`Store::gc`] for so many seconds.
    pub fn lease(&self, chunk: ChunkId, seconds: u64) -> Result<(), StoreError> {
        self.index.put_lease(chunk, now().saturating_add(seconds).min(i64::MAX as u64))
    }

    /// The chunks of all tenants that have a lease now.
    pub fn leases(&self) -> Result<Vec<(String, ChunkId)>, StoreError> {
        self.index.leases(now())
    }

    /// Counters since the store was made: saves, bytes written, files put aside and removed.
    pub fn statistics(&self) -> Result<Vec<(String, u64)>, StoreError> {
        self.index.statistics()
    }
}
