//! The index: one SQLite file with a row for every chunk, file, context and setting.
//!
//! Every change is one transaction. Knows no file but its own. Schema: FORMAT.md.

mod chunks;
mod contexts;
mod files;
mod small;

use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, Transaction, TransactionBehavior};

use super::error::StoreError;
use crate::ChunkId;

pub use chunks::{ChunkInfo, PutChunk, StoredChunk};
pub use contexts::{ContextInfo, StoredContext, StoredEntry, StoredTurn};
pub use files::KvFile;
pub use small::FileStamp;

/// One step per version, the first makes a new file version 1.
const MIGRATIONS: [&str; 2] =
    [include_str!("index/schema_1.sql"), include_str!("index/schema_2.sql")];
/// The version this program writes.
const VERSION: i64 = MIGRATIONS.len() as i64;
/// How long a statement waits for another connection's.
const BUSY: Duration = Duration::from_secs(30);

/// A connection, and the tenant whose chunks and contexts it speaks of.
pub struct Index {
    path: PathBuf,
    connection: Connection,
    tenant: String,
}

impl Index {
    /// An index that is gone with it.
    pub fn in_memory(tenant: &str) -> Result<Self, StoreError> {
        Self::prepared(Path::new(":memory:"), Connection::open_in_memory(), tenant)
    }

    /// Opens the file for a tenant, making or migrating it.
    pub(super) fn open(path: &Path, tenant: &str) -> Result<Self, StoreError> {
        let opened = Connection::open(path);
        Self::prepared(path, opened, tenant)
    }

    fn prepared(
        path: &Path,
        opened: rusqlite::Result<Connection>,
        tenant: &str,
    ) -> Result<Self, StoreError> {
        let connection = opened.map_err(|error| StoreError::sql(path, error))?;
        let index = Self { path: path.to_owned(), connection, tenant: tenant.to_owned() };
        index.sql(index.prepare())?;
        index.migrate()?;
        Ok(index)
    }

    /// Whose chunks and contexts it speaks of.
    pub fn tenant(&self) -> &str {
        &self.tenant
    }

    fn prepare(&self) -> rusqlite::Result<()> {
        self.connection.busy_timeout(BUSY)?;
        self.connection.pragma_update(None, "journal_mode", "wal")?;
        self.connection.pragma_update(None, "synchronous", "full")?;
        self.connection.pragma_update(None, "foreign_keys", true)?;
        // what is erased is not to be found in free pages
        self.connection.pragma_update(None, "secure_delete", true)
    }

    fn migrate(&self) -> Result<(), StoreError> {
        let version = |connection: &Connection| {
            connection.pragma_query_value(None, "user_version", |row| row.get::<_, i64>(0))
        };
        let found = self.sql(version(&self.connection))?;
        if !(0..=VERSION).contains(&found) {
            let path = self.path.clone();
            return Err(StoreError::FutureIndex { path, found, known: VERSION });
        }
        if found == VERSION {
            return Ok(());
        }
        self.change(|transaction| {
            for step in &MIGRATIONS[found as usize..] {
                transaction.execute_batch(step)?;
            }
            transaction.pragma_update(None, "user_version", VERSION)
        })
    }

    /// Runs statements that change rows: all of them or none.
    fn change<T>(
        &self,
        body: impl FnOnce(&Transaction) -> rusqlite::Result<T>,
    ) -> Result<T, StoreError> {
        // takes the write lock at once: a later upgrade would fail instead of waiting
        let begun = Transaction::new_unchecked(&self.connection, TransactionBehavior::Immediate);
        let transaction = self.sql(begun)?;
        let value = self.sql(body(&transaction))?;
        self.sql(transaction.commit())?;
        Ok(value)
    }

    fn sql<T>(&self, result: rusqlite::Result<T>) -> Result<T, StoreError> {
        result.map_err(|error| StoreError::sql(&self.path, error))
    }

    fn bad_row(&self, what: &'static str, value: impl ToString) -> StoreError {
        StoreError::BadRow { path: self.path.clone(), what, value: value.to_string() }
    }

    /// Writes what is in the log into the file and empties the log.
    pub(super) fn checkpoint(&self) -> Result<(), StoreError> {
        // another connection that reads now leaves it for later, which is no failure
        self.sql(self.connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())))
    }

    /// SQLite's own check of its pages; the first thing it found.
    pub(super) fn damage(&self) -> Result<Option<String>, StoreError> {
        let query = "PRAGMA quick_check(1)";
        let said: String = self.sql(self.connection.query_row(query, [], |row| row.get(0)))?;
        Ok((said != "ok").then_some(said))
    }
}

/// Ids one after another, as a blob.
fn concat_ids(ids: &[ChunkId]) -> Vec<u8> {
    ids.iter().flat_map(|id| *id.as_bytes()).collect()
}

fn split_ids(blob: &[u8]) -> Option<Vec<ChunkId>> {
    let (ids, rest) = blob.as_chunks::<32>();
    rest.is_empty().then(|| ids.iter().map(|id| ChunkId::from_bytes(*id)).collect())
}

#[cfg(test)]
mod tests;
