//! Rows of the files in `kv/`.

use rusqlite::{OptionalExtension, Row, Transaction, params};

use super::Index;
use super::chunks::{StoredChunk, insert_chunk};
use super::small::count;
use crate::ChunkId;
use crate::cache::KvId;
use crate::store::codec::Codec;
use crate::store::error::StoreError;

/// A file of KV that is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvFile {
    pub kv_id: KvId,
    /// Whose it is, as its salt says.
    pub tenant: String,
    pub chunk: ChunkId,
    pub codec: Codec,
    pub tokens: u64,
    /// Of the whole file.
    pub bytes: u64,
    /// Of the rows as the engine holds them.
    pub raw_bytes: u64,
    /// Seconds since 1970, also below.
    pub created: u64,
    pub last_used: u64,
    /// How often it was loaded.
    pub uses: u64,
}

const COLUMNS: &str =
    "kv_id, chunk, codec, tokens, bytes, raw_bytes, created, last_used, uses, tenant";

impl Index {
    /// Rows of files that were found.
    pub(in crate::store) fn put_files(&self, files: &[KvFile]) -> Result<(), StoreError> {
        self.change(|transaction| files.iter().try_for_each(|file| put(transaction, file)))
    }

    /// Rows of files that were written, and of the chunk they came with, if they did.
    pub(in crate::store) fn put_written(
        &self,
        files: &[KvFile],
        chunk: Option<&StoredChunk>,
    ) -> Result<(), StoreError> {
        self.change(|transaction| {
            chunk.map_or(Ok(false), |chunk| insert_chunk(transaction, &self.tenant, chunk))?;
            files.iter().try_for_each(|file| put(transaction, file))?;
            let bytes = files.iter().map(|file| file.bytes).sum();
            count(transaction, &[("files written", files.len() as u64), ("bytes written", bytes)])
        })
    }

    /// Of all tenants, in the order of their names.
    pub(in crate::store) fn files(&self) -> Result<Vec<KvFile>, StoreError> {
        let query = format!("SELECT {COLUMNS} FROM kv_files WHERE tenant NOT NULL ORDER BY kv_id");
        let rows = self.sql(self.connection.prepare(&query).and_then(|mut statement| {
            statement.query_map([], read)?.collect::<rusqlite::Result<Vec<_>>>()
        }))?;
        rows.into_iter().map(|(file, codec)| self.with_codec(file, &codec)).collect()
    }

    pub(in crate::store) fn file(&self, id: KvId) -> Result<Option<KvFile>, StoreError> {
        let query = format!("SELECT {COLUMNS} FROM kv_files WHERE kv_id = ? AND tenant NOT NULL");
        let row = self.connection.query_row(&query, [id.as_bytes()], read).optional();
        self.sql(row)?.map(|(file, codec)| self.with_codec(file, &codec)).transpose()
    }

    /// Counts a load. Not worth waiting for the disk: it may be lost, and nothing else with it.
    pub(in crate::store) fn touch_file(&self, id: KvId, now: u64) -> Result<(), StoreError> {
        let query = "UPDATE kv_files SET uses = uses + 1, last_used = ? WHERE kv_id = ?";
        let full = |level| self.sql(self.connection.pragma_update(None, "synchronous", level));
        full("normal")?;
        let touched = self
            .change(|transaction| transaction.execute(query, params![now as i64, id.as_bytes()]));
        full("full")?;
        touched.map(drop)
    }

    pub(in crate::store) fn remove_file(&self, id: KvId) -> Result<(), StoreError> {
        let query = "DELETE FROM kv_files WHERE kv_id = ?";
        self.change(|transaction| transaction.execute(query, [id.as_bytes()])).map(drop)
    }

    /// Rows that say nothing of a tenant: an older program's, of files that are gone.
    pub(in crate::store) fn remove_unowned(&self) -> Result<(), StoreError> {
        let query = "DELETE FROM kv_files WHERE tenant IS NULL";
        self.change(|transaction| transaction.execute(query, [])).map(drop)
    }

    fn with_codec(&self, file: KvFile, codec: &str) -> Result<KvFile, StoreError> {
        let codec = Codec::parse(codec).ok_or_else(|| self.bad_row("codec", codec))?;
        Ok(KvFile { codec, ..file })
    }
}

/// The row, and its codec's name, which is not yet in it.
fn read(row: &Row) -> rusqlite::Result<(KvFile, String)> {
    let number = |index: usize| row.get::<_, i64>(index).map(|number| number as u64);
    let file = KvFile {
        kv_id: KvId::from_bytes(row.get(0)?),
        tenant: row.get(9)?,
        chunk: ChunkId::from_bytes(row.get(1)?),
        codec: Codec::default(),
        tokens: number(3)?,
        bytes: number(4)?,
        raw_bytes: number(5)?,
        created: number(6)?,
        last_used: number(7)?,
        uses: number(8)?,
    };
    Ok((file, row.get(2)?))
}

/// One that is there keeps its age and uses.
fn put(transaction: &Transaction, file: &KvFile) -> rusqlite::Result<()> {
    transaction.execute(
        "INSERT INTO kv_files (kv_id, chunk, codec, tokens, bytes, raw_bytes, created, last_used,
                               uses, tenant)
         VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
         ON CONFLICT DO UPDATE SET
             tenant = excluded.tenant, chunk = excluded.chunk, codec = excluded.codec,
             tokens = excluded.tokens, bytes = excluded.bytes, raw_bytes = excluded.raw_bytes,
             last_used = excluded.last_used",
        params![
            file.kv_id.as_bytes(),
            file.chunk.as_bytes(),
            file.codec.as_str(),
            file.tokens as i64,
            file.bytes as i64,
            file.raw_bytes as i64,
            file.created as i64,
            file.last_used as i64,
            file.uses as i64,
            file.tenant
        ],
    )?;
    Ok(())
}
