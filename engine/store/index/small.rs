//! Rows of leases, statistics and fingerprints.

use std::fs::Metadata;
use std::path::Path;
use std::time::UNIX_EPOCH;

use rusqlite::{OptionalExtension, Row, Transaction, params};

use super::Index;
use crate::ChunkId;
use crate::store::error::StoreError;

/// What tells that a file is still the one that was hashed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileStamp {
    pub size: u64,
    /// Nanoseconds since 1970.
    pub modified: i64,
}

impl FileStamp {
    /// `None` where the system keeps no times: such a file is hashed every time.
    pub fn of(metadata: &Metadata) -> Option<Self> {
        let modified = metadata.modified().ok()?.duration_since(UNIX_EPOCH).ok()?;
        let modified = i64::try_from(modified.as_nanos()).ok()?;
        Some(Self { size: metadata.len(), modified })
    }
}

impl Index {
    /// The SHA-256 of the file, if it was remembered for this very stamp.
    pub fn fingerprint(
        &self,
        path: &Path,
        stamp: FileStamp,
    ) -> Result<Option<[u8; 32]>, StoreError> {
        let query = "SELECT sha256 FROM fingerprints WHERE path = ? AND size = ? AND modified = ?";
        let key = path.as_os_str().as_encoded_bytes();
        let parameters = params![key, stamp.size as i64, stamp.modified];
        self.sql(self.connection.query_row(query, parameters, |row| row.get(0)).optional())
    }

    pub fn put_fingerprint(
        &self,
        path: &Path,
        stamp: FileStamp,
        sha256: [u8; 32],
    ) -> Result<(), StoreError> {
        let query = "INSERT OR REPLACE INTO fingerprints (path, size, modified, sha256)
             VALUES (?, ?, ?, ?)";
        let key = path.as_os_str().as_encoded_bytes();
        let parameters = params![key, stamp.size as i64, stamp.modified, sha256];
        self.change(|transaction| transaction.execute(query, parameters)).map(drop)
    }

    /// Keeps a chunk's files from `gc` until then (seconds since 1970).
    pub fn put_lease(&self, chunk: ChunkId, expires: u64) -> Result<(), StoreError> {
        if self.chunk_info(chunk)?.is_none() {
            return Err(StoreError::UnknownChunk { text: chunk.short() });
        }
        let query = "INSERT OR REPLACE INTO leases (tenant, chunk, expires) VALUES (?, ?, ?)";
        let parameters = params![self.tenant, chunk.as_bytes(), expires as i64];
        self.change(|transaction| transaction.execute(query, parameters)).map(drop)
    }

    /// The chunks of all tenants whose leases hold at `now`; the others' rows are removed.
    pub fn leases(&self, now: u64) -> Result<Vec<(String, ChunkId)>, StoreError> {
        self.change(|transaction| {
            transaction.execute("DELETE FROM leases WHERE expires <= ?", [now as i64])?;
            let query = "SELECT tenant, chunk FROM leases ORDER BY tenant, chunk";
            let read = |row: &Row| Ok((row.get(0)?, ChunkId::from_bytes(row.get(1)?)));
            transaction.prepare(query)?.query_map([], read)?.collect()
        })
    }

    pub fn count(&self, counts: &[(&str, u64)]) -> Result<(), StoreError> {
        self.change(|transaction| count(transaction, counts))
    }

    /// Sorted by key.
    pub fn statistics(&self) -> Result<Vec<(String, u64)>, StoreError> {
        let query = "SELECT key, value FROM statistics ORDER BY key";
        self.sql(self.connection.prepare(query).and_then(|mut statement| {
            let read = |row: &Row| Ok((row.get(0)?, row.get::<_, i64>(1)? as u64));
            statement.query_map([], read)?.collect()
        }))
    }
}

/// Adds to counters.
pub(super) fn count(transaction: &Transaction, counts: &[(&str, u64)]) -> rusqlite::Result<()> {
    let mut statement = transaction.prepare(
        "INSERT INTO statistics (key, value) VALUES (?, ?)
         ON CONFLICT DO UPDATE SET value = value + excluded.value",
    )?;
    counts
        .iter()
        .try_for_each(|(key, more)| statement.execute(params![key, *more as i64]).map(drop))
}
