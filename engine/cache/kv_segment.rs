//! A chunk's KV as all tiers know it.

use std::sync::Arc;

use crate::tenant::{SHARED, may_use, tenant_of};

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

/// The KV of a chunk: what a tenant may use, whatever narrows its salts, or everybody's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvOf {
    pub chunk: ChunkId,
    pub tenant: Option<String>,
}

impl KvOf {
    /// That of the tenant whose salt this is, or without one everybody's.
    pub fn new(chunk: ChunkId, salt: Option<&str>) -> Self {
        Self { chunk, tenant: salt.map(|salt| tenant_of(salt).to_owned()) }
    }

    /// Whether it includes what a chunk has under a salt.
    pub fn includes(&self, chunk: ChunkId, salt: &[u8]) -> bool {
        self.chunk == chunk && self.has_salt(salt)
    }

    pub fn has_salt(&self, salt: &[u8]) -> bool {
        let salt = String::from_utf8_lossy(salt);
        self.tenant.as_ref().is_none_or(|tenant| may_use(tenant, &salt))
    }

    pub fn has_tenant(&self, tenant: &str) -> bool {
        self.tenant.as_ref().is_none_or(|own| own == tenant || tenant == SHARED)
    }
}

impl KvSegment {
    /// Whose it is, as its salt says.
    pub fn tenant(&self) -> String {
        tenant_of(&String::from_utf8_lossy(&self.identity.salt)).to_owned()
    }

    pub fn is_of(&self, kv: &KvOf) -> bool {
        kv.includes(self.chunk, &self.identity.salt)
    }

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

#[cfg(test)]
impl KvSegment {
    /// Rows of one token each, of a chunk that is named by it.
    pub(crate) fn of_token(token: u32, rows: usize, first_position: usize) -> Arc<Self> {
        let tokens = vec![token; rows];
        Arc::new(Self {
            kv: KvIdentity::default().root(KvVariant::Lossless).kv_id(&tokens, &[]),
            chunk: ChunkId::of(&token.to_le_bytes()),
            variant: KvVariant::Lossless,
            identity: Arc::default(),
            tokens: tokens.into(),
            seen: [].into(),
            first_position,
            hashes: [].into(),
        })
    }
}
