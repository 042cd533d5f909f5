//! Rows of contexts: ordered chunks with flags, and a conversation.

use rusqlite::{OptionalExtension, Transaction, params};

use super::{Index, concat_ids, split_ids};
use crate::ChunkId;
use crate::store::error::StoreError;

/// A context as it is kept; its chunks must be in the store.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StoredContext {
    /// As `ReusePolicy::as_str` spells it.
    pub policy: String,
    pub system: Option<String>,
    /// What people call it, where that is not its name.
    pub label: Option<String>,
    /// Rows that `blend` computes again; `None` in what an older program kept.
    pub blend_tokens: Option<u32>,
    pub entries: Vec<StoredEntry>,
    pub turns: Vec<StoredTurn>,
}

/// A chunk in its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredEntry {
    pub chunk: ChunkId,
    pub active: bool,
    /// What it saw when it was first encoded, where the policy remembers that.
    pub seen: Vec<ChunkId>,
}

/// One message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredTurn {
    /// As `Role::as_str` spells it.
    pub role: String,
    pub text: String,
    /// Of an answer: what opened it and what was generated.
    pub ids: Vec<u32>,
    /// The chunks it saw when it was first encoded, where the policy remembers that.
    pub seen: Vec<ChunkId>,
}

/// A context in a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContextInfo {
    pub name: String,
    pub label: Option<String>,
    pub policy: String,
    pub chunks: u64,
    pub turns: u64,
    /// Seconds since 1970, also below.
    pub created: u64,
    pub updated: u64,
}

impl Index {
    /// Replaces the one of this name, whole.
    pub fn put_context(
        &self,
        name: &str,
        context: &StoredContext,
        now: u64,
    ) -> Result<(), StoreError> {
        for entry in &context.entries {
            if self.chunk_info(entry.chunk)?.is_none() {
                return Err(StoreError::UnknownChunk { text: entry.chunk.short() });
            }
        }
        self.change(|transaction| {
            transaction.execute(
                "INSERT INTO contexts
                     (tenant, name, policy, system, label, blend_tokens, created, updated)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?7) ON CONFLICT DO UPDATE SET
                     policy = excluded.policy, system = excluded.system, label = excluded.label,
                     blend_tokens = excluded.blend_tokens, updated = excluded.updated",
                params![
                    self.tenant,
                    name,
                    context.policy,
                    context.system,
                    context.label,
                    context.blend_tokens,
                    now as i64
                ],
            )?;
            for table in ["context_chunks", "turns"] {
                let query = format!("DELETE FROM {table} WHERE tenant = ? AND context = ?");
                transaction.execute(&query, [self.tenant.as_str(), name])?;
            }
            insert_parts(transaction, &self.tenant, name, context)
        })
    }

    pub fn context(&self, name: &str) -> Result<Option<StoredContext>, StoreError> {
        // one transaction: another connection may replace the context between two queries
        let begun = self.sql(self.connection.unchecked_transaction())?;
        let query = "SELECT policy, system, label, blend_tokens FROM contexts
             WHERE tenant = ? AND name = ?";
        let read = |row: &rusqlite::Row| {
            Ok(StoredContext {
                policy: row.get(0)?,
                system: row.get(1)?,
                label: row.get(2)?,
                blend_tokens: row.get(3)?,
                ..StoredContext::default()
            })
        };
        let head = begun.query_row(query, [self.tenant.as_str(), name], read).optional();
        let Some(head) = self.sql(head)? else { return Ok(None) };
        let (entries, turns) = (self.entries(name)?, self.turns(name)?);
        Ok(Some(StoredContext { entries, turns, ..head }))
    }

    /// The one used last comes first.
    pub fn contexts(&self) -> Result<Vec<ContextInfo>, StoreError> {
        self.context_infos(None)
    }

    pub fn num_contexts(&self) -> Result<u64, StoreError> {
        let query = "SELECT count(*) FROM contexts WHERE tenant = ?";
        let count = self.connection.query_row(query, [&self.tenant], |row| row.get::<_, i64>(0));
        self.sql(count).map(|count| count as u64)
    }

    pub fn context_info(&self, name: &str) -> Result<Option<ContextInfo>, StoreError> {
        Ok(self.context_infos(Some(name))?.pop())
    }

    /// Of all contexts, or of one.
    fn context_infos(&self, name: Option<&str>) -> Result<Vec<ContextInfo>, StoreError> {
        let query = "SELECT name, label, policy, created, updated,
                (SELECT count(*) FROM context_chunks AS c
                 WHERE c.tenant = contexts.tenant AND c.context = contexts.name),
                (SELECT count(*) FROM turns AS t
                 WHERE t.tenant = contexts.tenant AND t.context = contexts.name)
             FROM contexts WHERE tenant = ?1 AND name = coalesce(?2, name)
             ORDER BY updated DESC, name";
        self.sql(self.connection.prepare(query).and_then(|mut statement| {
            let read = |row: &rusqlite::Row| {
                let number = |index| row.get::<_, i64>(index).map(|number| number as u64);
                Ok(ContextInfo {
                    name: row.get(0)?,
                    label: row.get(1)?,
                    policy: row.get(2)?,
                    created: number(3)?,
                    updated: number(4)?,
                    chunks: number(5)?,
                    turns: number(6)?,
                })
            };
            statement.query_map(params![self.tenant, name], read)?.collect()
        }))
    }

    /// False where there was none.
    pub fn remove_context(&self, name: &str) -> Result<bool, StoreError> {
        let query = "DELETE FROM contexts WHERE tenant = ? AND name = ?";
        Ok(self.change(|transaction| transaction.execute(query, [self.tenant.as_str(), name]))?
            == 1)
    }

    fn entries(&self, context: &str) -> Result<Vec<StoredEntry>, StoreError> {
        let query = "SELECT chunk, active, seen FROM context_chunks
             WHERE tenant = ? AND context = ? ORDER BY place";
        let rows: Vec<([u8; 32], bool, Vec<u8>)> =
            self.sql(self.connection.prepare(query).and_then(|mut statement| {
                let read = |row: &rusqlite::Row| Ok((row.get(0)?, row.get(1)?, row.get(2)?));
                statement.query_map([self.tenant.as_str(), context], read)?.collect()
            }))?;
        let entry = |(chunk, active, seen): ([u8; 32], bool, Vec<u8>)| {
            let seen = split_ids(&seen).ok_or_else(|| self.bad_row("list of ids", seen.len()))?;
            Ok(StoredEntry { chunk: ChunkId::from_bytes(chunk), active, seen })
        };
        rows.into_iter().map(entry).collect()
    }

    fn turns(&self, context: &str) -> Result<Vec<StoredTurn>, StoreError> {
        let query = "SELECT role, text, ids, seen FROM turns
             WHERE tenant = ? AND context = ? ORDER BY place";
        let rows: Vec<(String, String, Vec<u8>, Vec<u8>)> =
            self.sql(self.connection.prepare(query).and_then(|mut statement| {
                let read =
                    |row: &rusqlite::Row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?));
                statement.query_map([self.tenant.as_str(), context], read)?.collect()
            }))?;
        let turn = |(role, text, ids, seen): (String, String, Vec<u8>, Vec<u8>)| {
            let seen = split_ids(&seen).ok_or_else(|| self.bad_row("list of ids", seen.len()))?;
            let (words, rest) = ids.as_chunks::<4>();
            if !rest.is_empty() {
                return Err(self.bad_row("list of tokens", ids.len()));
            }
            let ids = words.iter().map(|word| u32::from_le_bytes(*word)).collect();
            Ok(StoredTurn { role, text, ids, seen })
        };
        rows.into_iter().map(turn).collect()
    }
}

fn insert_parts(
    transaction: &Transaction,
    tenant: &str,
    name: &str,
    context: &StoredContext,
) -> rusqlite::Result<()> {
    let mut insert = transaction.prepare(
        "INSERT INTO context_chunks (tenant, context, place, chunk, active, seen)
         VALUES (?, ?, ?, ?, ?, ?)",
    )?;
    for (place, entry) in context.entries.iter().enumerate() {
        let (chunk, seen) = (entry.chunk.as_bytes(), concat_ids(&entry.seen));
        insert.execute(params![tenant, name, place as i64, chunk, entry.active, seen])?;
    }
    let mut insert = transaction.prepare(
        "INSERT INTO turns (tenant, context, place, role, text, ids, seen)
         VALUES (?, ?, ?, ?, ?, ?, ?)",
    )?;
    for (place, turn) in context.turns.iter().enumerate() {
        let ids: Vec<u8> = turn.ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        let seen = concat_ids(&turn.seen);
        insert.execute(params![tenant, name, place as i64, turn.role, turn.text, ids, seen])?;
    }
    Ok(())
}
