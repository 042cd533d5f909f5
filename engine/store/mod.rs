//! What outlives the process: KV files, and the index of chunks and contexts.
//!
//! A [`Store`] owns a folder; FORMAT.md draws what lies in it. Everything written is whole or not
//! there, everything read is checked: a file that doesn't hold is moved to quarantine, reported,
//! and treated as absent. The text of a chunk is always kept; KV is a cache that can be computed
//! again. Knows no scheduler, no device and no model.

mod archive;
mod codec;
mod error;
mod files;
mod index;
mod kv_file;
mod manifest;
mod pipeline;
mod rows;
#[expect(clippy::module_inception, reason = "the store is what this folder is named after")]
mod store;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod upkeep;

pub use archive::{Exported, Imported};
pub use codec::{Codec, Coding};
pub use error::{Damage, StoreError};
pub use index::{
    ChunkInfo, ContextInfo, FileStamp, Index, KvFile, PutChunk, StoredChunk, StoredContext,
    StoredEntry, StoredTurn,
};
pub use kv_file::{KvRecord, KvShape};
pub use store::{Expected, Loaded, OpenReport, Quarantined, SavedFile, Store};
pub use upkeep::{Collected, Erased, Problem, Verification};

use std::time::{SystemTime, UNIX_EPOCH};

/// Seconds since 1970; 0 where the clock stands before it.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
