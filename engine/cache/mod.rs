//! Which KV block holds what: bookkeeping only.
//!
//! No tensors, no devices, no I/O and no clock: blocks are numbers here, and what they hold is
//! known by the tokens that were written to them. The same for host and disk: what they hold is
//! known here by name, the bytes are elsewhere.

mod block_manager;
mod chain;
mod chunk_id;
mod kv_id;
mod kv_segment;
mod layout;
mod tiers;

pub use block_manager::{BlockManager, BlockState, Departure, Owner};
pub use chain::BlockHash;
pub use chunk_id::ChunkId;
pub use kv_id::{KvId, KvIdentity, KvRoot, KvVariant};
pub use kv_segment::{KvOf, KvSegment};
pub use layout::{Layout, Sees, SegmentLayout};
pub use tiers::{DiskFile, Tier, Tiers, TiersOf};

/// A physical block of KV rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub u32);
