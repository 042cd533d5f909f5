//! Erasing, checking and collecting: what keeps the folder right and within its budget.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime};

use super::error::StoreError;
use super::index::KvFile;
use super::kv_file::{KvReader, KvRecord, ReadError};
use super::now;
use super::store::{Quarantined, Store, open_file, open_named};
use crate::ChunkId;
use crate::cache::KvId;
use crate::tenant::SHARED;

/// What erasing removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Erased {
    /// Whether the index had the chunk.
    pub chunk: bool,
    pub files: usize,
    pub bytes: u64,
}

/// What a check of the store found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Verification {
    /// Chunks and files that were looked at, and the files' bytes.
    pub chunks: usize,
    pub files: usize,
    pub bytes: u64,
    pub problems: Vec<Problem>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Problem {
    /// The text is not what the chunk's id says; load the file again.
    Text(ChunkId),
    /// The row's file is gone; the row is removed.
    Missing { chunk: ChunkId, kv_id: KvId },
    /// The file was altered and is put aside.
    Damaged { chunk: ChunkId, quarantined: Quarantined },
    /// The index's own pages are damaged.
    Index(String),
}

/// What a collection removed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Collected {
    pub removed: Vec<KvFile>,
    pub freed_bytes: u64,
    /// Of the files that are left.
    pub kept_bytes: u64,
    /// Old files of the quarantine and of saves that failed.
    pub leftovers: usize,
}

/// How long a file stays in quarantine, and a temporary file where it is.
const KEEP_QUARANTINED: Duration = Duration::from_secs(7 * 86_400);
const KEEP_TEMPORARY: Duration = Duration::from_secs(3600);

impl Store {
    /// Removes the tenant's chunk, its files, those that it shares, and its place in every context.
    /// What other tenants have of the same content stays.
    ///
    /// Files first: interrupted, the chunk is still listed and can be erased again.
    pub fn erase(&self, chunk: ChunkId) -> Result<Erased, StoreError> {
        let mut files = self.kv_files()?;
        files.retain(|file| file.chunk == chunk);
        let mut erased = Erased::default();
        for file in &files {
            self.remove_kv(file.kv_id)?;
            erased.files += 1;
            erased.bytes += file.bytes;
        }
        self.sync_kv()?;
        // the tenant's own go with the chunk
        for file in files.iter().filter(|file| file.tenant == SHARED) {
            self.index.remove_file(file.kv_id)?;
        }
        self.erase_quarantined(chunk)?;
        erased.chunk = self.index.remove_chunk(chunk)?;
        // the log would keep the text
        self.index.checkpoint()?;
        Ok(erased)
    }

    /// The same for every tenant that has it.
    pub fn erase_everybodys(&self, chunk: ChunkId) -> Result<Erased, StoreError> {
        let mut all = Erased::default();
        for tenant in self.index.tenants_of(chunk)? {
            let erased = self.of_tenant(&tenant)?.erase(chunk)?;
            all.chunk |= erased.chunk;
            all.files += erased.files;
            all.bytes += erased.bytes;
        }
        Ok(all)
    }

    /// What was put aside holds a chunk's tokens too. A file that doesn't say whose it is goes as
    /// well: it may be this one's.
    fn erase_quarantined(&self, chunk: ChunkId) -> Result<(), StoreError> {
        let folder = self.folder.quarantined();
        let entries = fs::read_dir(&folder).map_err(|e| StoreError::io("list", &folder, e))?;
        for entry in entries {
            let path = entry.map_err(|error| StoreError::io("list", &folder, error))?.path();
            let header =
                open_file(&path).ok().map(|(source, length)| KvReader::open(source, length));
            let record = header.and_then(Result::ok).map(|reader| reader.record);
            let is_own = |record: KvRecord| {
                record.chunk == chunk && [self.tenant(), SHARED].contains(&&*record.tenant())
            };
            if record.is_none_or(is_own) {
                let removed = self.files.remove(&path);
                removed.map_err(|error| StoreError::io("remove", &path, error))?;
            }
        }
        Ok(())
    }

    /// Checks every byte of a chunk's files and its text, or of all the tenant has. Files that
    /// don't hold are put aside.
    pub fn verify(&self, chunk: Option<ChunkId>) -> Result<Verification, StoreError> {
        let mut found = Verification::default();
        if chunk.is_none() {
            found.problems.extend(self.index.damage()?.map(Problem::Index));
        }
        let wanted = |id: ChunkId| chunk.is_none_or(|chunk| chunk == id);
        for info in self.chunks()?.into_iter().filter(|info| wanted(info.id)) {
            let text = self.chunk(info.id)?.map(|chunk| chunk.text);
            if text.is_some_and(|text| ChunkId::of(text.as_bytes()) != info.id) {
                found.problems.push(Problem::Text(info.id));
            }
            found.chunks += 1;
        }
        for file in self.kv_files()?.into_iter().filter(|file| wanted(file.chunk)) {
            found.problems.extend(self.verify_file(&file)?);
            found.files += 1;
            found.bytes += file.bytes;
        }
        Ok(found)
    }

    pub(super) fn verify_file(&self, file: &KvFile) -> Result<Option<Problem>, StoreError> {
        let path = self.folder.kv_path(file.kv_id);
        let checked = open_file(&path)
            .map_err(ReadError::from)
            .and_then(|(source, length)| open_named(source, length, file.kv_id)?.verify());
        let Err(error) = checked else { return Ok(None) };
        let (chunk, kv_id) = (file.chunk, file.kv_id);
        Ok(Some(match self.unusable(kv_id, error)? {
            Some(quarantined) => Problem::Damaged { chunk, quarantined },
            None => Problem::Missing { chunk, kv_id },
        }))
    }

    /// Removes files of chunks that are gone, then, while all files together take more than
    /// `budget` bytes, those worth least; leased chunks stay. Old leftovers go too. Of all tenants.
    pub fn gc(&self, budget: Option<u64>) -> Result<Collected, StoreError> {
        let mut collected = Collected::default();
        let chunks = self.index.all_chunk_ids()?;
        let files = self.files_by_worth()?;
        let (kept, orphans): (Vec<KvFile>, Vec<KvFile>) =
            files.into_iter().partition(|file| has(&chunks, file));
        let all: u64 = kept.iter().map(|file| file.bytes).sum();
        let excess = self.least_worth(kept, budget.unwrap_or(u64::MAX))?;
        collected.kept_bytes = all - excess.iter().map(|file| file.bytes).sum::<u64>();
        let unwanted = [orphans, excess].concat();
        collected.freed_bytes = unwanted.iter().map(|file| file.bytes).sum();
        self.remove_files(&unwanted)?;
        collected.removed = unwanted;
        collected.leftovers = remove_old(&self.folder.quarantined(), KEEP_QUARANTINED, |_| true)?
            + remove_old(&self.folder.kv(), KEEP_TEMPORARY, |name| name.ends_with(".tmp"))?;
        self.sync_kv()?;
        self.index.count(&[("files removed", collected.removed.len() as u64)])?;
        Ok(collected)
    }

    /// Keeps all files within `budget` bytes for the sake of one that was just saved, which stays,
    /// as do leased chunks. Returns what was removed.
    pub fn make_room(&self, budget: u64, saved: KvId) -> Result<Vec<KvFile>, StoreError> {
        let (own, others): (Vec<KvFile>, Vec<KvFile>) =
            self.files_by_worth()?.into_iter().partition(|file| file.kv_id == saved);
        let own: u64 = own.iter().map(|file| file.bytes).sum();
        let unwanted = self.least_worth(others, budget.saturating_sub(own))?;
        if unwanted.is_empty() {
            return Ok(unwanted);
        }
        self.remove_files(&unwanted)?;
        self.sync_kv()?;
        self.index.count(&[("files removed", unwanted.len() as u64)])?;
        Ok(unwanted)
    }

    /// The least worth first.
    fn files_by_worth(&self) -> Result<Vec<KvFile>, StoreError> {
        let (now, mut files) = (now(), self.all_kv_files()?);
        files.sort_by(|a, b| worth(a, now).total_cmp(&worth(b, now)).then(a.kv_id.cmp(&b.kv_id)));
        Ok(files)
    }

    /// Of files by worth, those that are too many for a budget; leased chunks stay.
    fn least_worth(&self, files: Vec<KvFile>, budget: u64) -> Result<Vec<KvFile>, StoreError> {
        let leased: BTreeSet<(String, ChunkId)> = self.leases()?.into_iter().collect();
        let mut bytes: u64 = files.iter().map(|file| file.bytes).sum();
        let mut unwanted = Vec::new();
        for file in files.into_iter().filter(|file| !has(&leased, file)) {
            if bytes > budget {
                bytes -= file.bytes;
                unwanted.push(file);
            }
        }
        Ok(unwanted)
    }

    fn remove_files(&self, files: &[KvFile]) -> Result<(), StoreError> {
        for file in files {
            self.remove_kv(file.kv_id)?;
            self.index.remove_file(file.kv_id)?;
        }
        Ok(())
    }

    fn remove_kv(&self, id: KvId) -> Result<(), StoreError> {
        let path = self.folder.kv_path(id);
        match self.files.remove(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(StoreError::io("remove", &path, error))
            }
            _ => Ok(()),
        }
    }

    fn sync_kv(&self) -> Result<(), StoreError> {
        let kv = self.folder.kv();
        self.files.sync_folder(&kv).map_err(|error| StoreError::io("write", &kv, error))
    }
}

/// Whether a file is of one of these tenants' chunks.
fn has(chunks: &BTreeSet<(String, ChunkId)>, file: &KvFile) -> bool {
    match file.tenant.as_str() {
        SHARED => chunks.iter().any(|(_, chunk)| *chunk == file.chunk),
        tenant => chunks.contains(&(tenant.to_owned(), file.chunk)),
    }
}

/// What a byte of the file saves: tokens not computed again, times how often that is likely.
fn worth(file: &KvFile, now: u64) -> f64 {
    let days = now.saturating_sub(file.last_used) as f64 / 86_400.0;
    (1 + file.uses) as f64 * file.tokens as f64 / file.bytes.max(1) as f64 / (1.0 + days)
}

/// Removes files that are older than that; how many.
fn remove_old(
    folder: &Path,
    keep: Duration,
    wanted: impl Fn(&str) -> bool,
) -> Result<usize, StoreError> {
    let entries = fs::read_dir(folder).map_err(|error| StoreError::io("list", folder, error))?;
    let mut removed = 0;
    for entry in entries {
        let entry = entry.map_err(|error| StoreError::io("list", folder, error))?;
        let modified = entry.metadata().and_then(|metadata| metadata.modified());
        let age = modified.ok().and_then(|at| SystemTime::now().duration_since(at).ok());
        let is_old = age.is_some_and(|age| age > keep);
        if is_old && wanted(&entry.file_name().to_string_lossy()) {
            let path = entry.path();
            fs::remove_file(&path).map_err(|error| StoreError::io("remove", &path, error))?;
            removed += 1;
        }
    }
    Ok(removed)
}

#[cfg(test)]
mod tests;
