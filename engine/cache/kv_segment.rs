//! A chunk's KV as all tiers know it.

use std::sync::Arc;

use super::{BlockHash, ChunkId, KvId, KvIdentity, KvVariant};

/// What the rows of a chunk's segment are, wherever they lie.
#[derive(Debug, PartialEq, Eq)]
pub struct KvSegment {
    pub kv: KvId,
    pub chunk: ChunkId,
    pub variant: KvVariant,
    /// What it depends on besides its tokens and what they saw.
    pub identity: Arc<KvIdentity>,
    pub tokens: Box<[u32]>,
    /// What it saw after the anchor.
    pub seen: Box<[KvId]>,
    /// Position at which its first key is rotated.
    pub first_position: usize,
    /// Names of its blocks in the pool.
    pub hashes: Box<[BlockHash]>,
}

impl KvSegment {
    /// The same rows after a lossy codec: another name.
    pub fn approximated(&self) -> Self {
        let variant = KvVariant::Int8;
        Self {
            kv: self.identity.root(variant).kv_id(&self.tokens, &self.seen),
            chunk: self.chunk,
            variant,
            identity: self.identity.clone(),
            tokens: self.tokens.clone(),
            seen: self.seen.clone(),
            first_position: self.first_position,
            hashes: [].into(),
        }
    }
}
