//! Rows of chunks: their text is always saved.

use std::collections::BTreeSet;

use rusqlite::{OptionalExtension, Row, Transaction, params};

use super::Index;
use crate::ChunkId;
use crate::context::ChunkKind;
use crate::store::error::StoreError;
use crate::tenant::SHARED;

/// A chunk without its text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChunkInfo {
    pub id: ChunkId,
    pub name: String,
    pub kind: ChunkKind,
    /// With the wrapper, by the tokenizer that loaded it last.
    pub tokens: Option<u32>,
    /// Seconds since 1970.
    pub created: u64,
    pub text_bytes: u64,
    /// Sorted.
    pub tags: Vec<String>,
    /// JSON, as it was given with the chunk.
    pub metadata: Option<String>,
}

/// A chunk as it is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredChunk {
    pub info: ChunkInfo,
    pub text: String,
}

/// What became of a chunk that was put into the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PutChunk {
    New,
    /// It keeps the name and kind it was first created with; these are they.
    Already(ChunkInfo),
}

impl StoredChunk {
    /// A chunk of this text, now.
    pub fn new(name: &str, kind: ChunkKind, text: &str, tokens: Option<u32>) -> Self {
        let info = ChunkInfo {
            id: ChunkId::of(text.as_bytes()),
            name: name.to_owned(),
            kind,
            tokens,
            created: super::super::now(),
            text_bytes: text.len() as u64,
            tags: Vec::new(),
            metadata: None,
        };
        Self { info, text: text.to_owned() }
    }
}

const COLUMNS: &str = "id, name, kind, tokens, created, length(CAST(text AS BLOB)), metadata";
/// Looks at the tenant's own rows alone: time tells nothing of others'.
pub(super) const BY_PREFIX: &str =
    "SELECT id FROM chunks WHERE tenant = ? AND id BETWEEN ? AND ? ORDER BY id";
/// Fewest digits that name a chunk.
const SHORTEST_PREFIX: usize = 4;
const LONGEST_PREFIX: usize = 64;

impl Index {
    pub fn put_chunk(&self, chunk: &StoredChunk) -> Result<PutChunk, StoreError> {
        let inserted = self.change(|transaction| insert_chunk(transaction, &self.tenant, chunk))?;
        if inserted {
            return Ok(PutChunk::New);
        }
        let there = self.chunk_info(chunk.info.id)?;
        Ok(there.map_or(PutChunk::New, PutChunk::Already))
    }

    pub fn chunk(&self, id: ChunkId) -> Result<Option<StoredChunk>, StoreError> {
        let Some(info) = self.chunk_info(id)? else { return Ok(None) };
        let query = "SELECT text FROM chunks WHERE tenant = ? AND id = ?";
        let parameters = params![self.tenant, id.as_bytes()];
        let text = self.connection.query_row(query, parameters, |row| row.get(0)).optional();
        Ok(self.sql(text)?.map(|text| StoredChunk { info, text }))
    }

    /// In the order they were created.
    pub fn chunks(&self) -> Result<Vec<ChunkInfo>, StoreError> {
        let query =
            format!("SELECT {COLUMNS} FROM chunks WHERE tenant = ? ORDER BY created, rowid");
        let rows = self.sql(self.connection.prepare(&query).and_then(|mut statement| {
            statement.query_map([&self.tenant], read)?.collect::<rusqlite::Result<Vec<_>>>()
        }))?;
        rows.into_iter().map(|row| self.info(row)).collect()
    }

    pub fn chunk_info(&self, id: ChunkId) -> Result<Option<ChunkInfo>, StoreError> {
        let query = format!("SELECT {COLUMNS} FROM chunks WHERE tenant = ? AND id = ?");
        let parameters = params![self.tenant, id.as_bytes()];
        let row = self.sql(self.connection.query_row(&query, parameters, read).optional())?;
        row.map(|row| self.info(row)).transpose()
    }

    pub fn keeps(&self, tenant: &str, id: ChunkId) -> Result<bool, StoreError> {
        let query = match tenant {
            SHARED => "SELECT EXISTS (SELECT 1 FROM chunks WHERE tenant <> ? AND id = ?)",
            _ => "SELECT EXISTS (SELECT 1 FROM chunks WHERE tenant = ? AND id = ?)",
        };
        let parameters = params![tenant, id.as_bytes()];
        self.sql(self.connection.query_row(query, parameters, |row| row.get(0)))
    }

    /// How many chunks there are, and the bytes of their texts.
    pub fn chunk_totals(&self) -> Result<(u64, u64), StoreError> {
        let query = "SELECT count(*), coalesce(sum(length(CAST(text AS BLOB))), 0)
             FROM chunks WHERE tenant = ?";
        let read = |row: &Row| Ok((row.get::<_, i64>(0)? as u64, row.get::<_, i64>(1)? as u64));
        self.sql(self.connection.query_row(query, [&self.tenant], read))
    }

    /// The chunks that are switched on in some context.
    pub fn active_chunks(&self) -> Result<BTreeSet<ChunkId>, StoreError> {
        let query = "SELECT DISTINCT chunk FROM context_chunks WHERE tenant = ? AND active";
        let read = |row: &Row| Ok(ChunkId::from_bytes(row.get(0)?));
        let mut statement = self.sql(self.connection.prepare(query))?;
        self.sql(statement.query_map([&self.tenant], read).and_then(Iterator::collect))
    }

    /// The ids of all tenants' chunks.
    pub(in crate::store) fn all_chunk_ids(
        &self,
    ) -> Result<BTreeSet<(String, ChunkId)>, StoreError> {
        let read = |row: &Row| Ok((row.get(0)?, ChunkId::from_bytes(row.get(1)?)));
        let mut statement = self.sql(self.connection.prepare("SELECT tenant, id FROM chunks"))?;
        self.sql(statement.query_map([], read).and_then(Iterator::collect))
    }

    /// The chunk whose id starts so: a unique prefix of four or more hex digits.
    pub fn find_chunk(&self, text: &str) -> Result<ChunkId, StoreError> {
        let unknown = || StoreError::UnknownChunk { text: text.to_owned() };
        let is_hex = text.bytes().all(|byte| byte.is_ascii_hexdigit());
        if !is_hex || !(SHORTEST_PREFIX..=LONGEST_PREFIX).contains(&text.len()) {
            return Err(unknown());
        }
        let (first, last) = (padded(text, b'0'), padded(text, b'f'));
        let matches: Vec<[u8; 32]> =
            self.sql(self.connection.prepare(BY_PREFIX).and_then(|mut statement| {
                let parameters = params![self.tenant, first, last];
                statement.query_map(parameters, |row| row.get(0))?.collect()
            }))?;
        match matches[..] {
            [] => Err(unknown()),
            [one] => Ok(ChunkId::from_bytes(one)),
            _ => Err(StoreError::AmbiguousChunk {
                text: text.to_owned(),
                matches: matches.iter().map(|id| ChunkId::from_bytes(*id).short()).collect(),
            }),
        }
    }

    /// False where there is no such chunk.
    pub fn add_tag(&self, id: ChunkId, tag: &str) -> Result<bool, StoreError> {
        if self.chunk_info(id)?.is_none() {
            return Ok(false);
        }
        self.change(|transaction| insert_tag(transaction, &self.tenant, id, tag))?;
        Ok(true)
    }

    /// Replaces what is said of a chunk, as far as it is said anew. False where there is none.
    pub fn set_about(
        &self,
        id: ChunkId,
        tags: Option<&[String]>,
        metadata: Option<&str>,
    ) -> Result<bool, StoreError> {
        if self.chunk_info(id)?.is_none() {
            return Ok(false);
        }
        self.change(|transaction| {
            if let Some(tags) = tags {
                let query = "DELETE FROM chunk_tags WHERE tenant = ? AND id = ?";
                transaction.execute(query, params![self.tenant, id.as_bytes()])?;
                tags.iter().try_for_each(|tag| insert_tag(transaction, &self.tenant, id, tag))?;
            }
            if let Some(metadata) = metadata {
                let query = "UPDATE chunks SET metadata = ? WHERE tenant = ? AND id = ?";
                transaction.execute(query, params![metadata, self.tenant, id.as_bytes()])?;
            }
            Ok(())
        })?;
        Ok(true)
    }

    /// Those that have a chunk's text or KV.
    pub fn tenants_of(&self, id: ChunkId) -> Result<Vec<String>, StoreError> {
        let query = "SELECT tenant FROM chunks WHERE id = ?1
                     UNION SELECT tenant FROM kv_files WHERE chunk = ?1 AND tenant NOT NULL";
        self.sql(self.connection.prepare(query).and_then(|mut statement| {
            statement.query_map([id.as_bytes()], |row| row.get(0))?.collect()
        }))
    }

    /// Also from the contexts that name it. False where there was none.
    pub fn remove_chunk(&self, id: ChunkId) -> Result<bool, StoreError> {
        let query = "DELETE FROM chunks WHERE tenant = ? AND id = ?";
        let removed = self.change(|transaction| {
            let key = params![self.tenant, id.as_bytes()];
            transaction.execute("DELETE FROM kv_files WHERE tenant = ? AND chunk = ?", key)?;
            transaction.execute(query, key)
        })?;
        Ok(removed == 1)
    }

    fn info(
        &self,
        (id, name, kind, tokens, created, text_bytes, metadata): Fields,
    ) -> Result<ChunkInfo, StoreError> {
        let kind = ChunkKind::parse(&kind).ok_or_else(|| self.bad_row("kind of chunk", kind))?;
        let id = ChunkId::from_bytes(id);
        let tags = self.tags(id)?;
        let (created, text_bytes) = (created as u64, text_bytes as u64);
        Ok(ChunkInfo { id, name, kind, tokens, created, text_bytes, tags, metadata })
    }

    fn tags(&self, id: ChunkId) -> Result<Vec<String>, StoreError> {
        let query = "SELECT tag FROM chunk_tags WHERE tenant = ? AND id = ? ORDER BY tag";
        self.sql(self.connection.prepare(query).and_then(|mut statement| {
            statement.query_map(params![self.tenant, id.as_bytes()], |row| row.get(0))?.collect()
        }))
    }
}

/// id, name, kind, tokens, created, bytes of text, metadata
type Fields = ([u8; 32], String, String, Option<u32>, i64, i64, Option<String>);

fn read(row: &Row) -> rusqlite::Result<Fields> {
    Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?, row.get(4)?, row.get(5)?, row.get(6)?))
}

/// The id of these hex digits and as many of another as it takes.
fn padded(digits: &str, with: u8) -> [u8; 32] {
    let digits = digits.bytes().chain(std::iter::repeat(with)).take(LONGEST_PREFIX);
    let value = |digit| char::from(digit).to_digit(16).expect("a hex digit") as u8;
    let values: Vec<u8> = digits.map(value).collect();
    std::array::from_fn(|byte| values[2 * byte] << 4 | values[2 * byte + 1])
}

/// Whether it is new; one that is there keeps its name, kind and age.
pub(super) fn insert_chunk(
    transaction: &Transaction,
    tenant: &str,
    chunk: &StoredChunk,
) -> rusqlite::Result<bool> {
    let info = &chunk.info;
    let inserted = transaction.execute(
        "INSERT INTO chunks (tenant, id, name, kind, text, tokens, created, metadata)
         VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
        params![
            tenant,
            info.id.as_bytes(),
            info.name,
            info.kind.as_str(),
            chunk.text,
            info.tokens,
            info.created as i64,
            info.metadata
        ],
    )?;
    transaction.execute(
        "UPDATE chunks SET tokens = coalesce(?, tokens) WHERE tenant = ? AND id = ?",
        params![info.tokens, tenant, info.id.as_bytes()],
    )?;
    info.tags.iter().try_for_each(|tag| insert_tag(transaction, tenant, info.id, tag))?;
    Ok(inserted == 1)
}

fn insert_tag(
    transaction: &Transaction,
    tenant: &str,
    id: ChunkId,
    tag: &str,
) -> rusqlite::Result<()> {
    let query = "INSERT INTO chunk_tags (tenant, id, tag) VALUES (?, ?, ?) ON CONFLICT DO NOTHING";
    transaction.execute(query, params![tenant, id.as_bytes(), tag]).map(drop)
}
