//! The name of a segment's KV, the same in every process that would compute the same bits.

use std::fmt;

use sha2::{Digest, Sha256};

/// SHA-256 over everything that a segment's K and V depend on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct KvId([u8; 32]);

/// Whether the stored rows are the computed ones, or an approximation of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum KvVariant {
    #[default]
    Lossless,
    Int8,
}

/// What KV depends on besides tokens and what they saw. Topology, block size and context length
/// are not in it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct KvIdentity {
    /// Of the configuration and every weight.
    pub model: [u8; 32],
    pub tokenizer: [u8; 32],
    /// Types, kernel family and its revision; never threads or batch.
    pub numerics: String,
    /// Rotation of the keys.
    pub rope: String,
    /// Tokens that every segment sees first.
    pub anchor: Vec<u32>,
    /// Sets tenants apart.
    pub salt: Vec<u8>,
}

/// An identity, digested once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvRoot([u8; 32]);

impl KvIdentity {
    pub fn root(&self, variant: KvVariant) -> KvRoot {
        let variant: &[u8] = match variant {
            KvVariant::Lossless => b"lossless",
            KvVariant::Int8 => b"int8",
        };
        let parts: [&[u8]; 6] = [
            &self.model,
            &self.tokenizer,
            self.numerics.as_bytes(),
            self.rope.as_bytes(),
            &self.salt,
            variant,
        ];
        let mut digest = Sha256::new_with_prefix(b"strand kv root 1");
        for part in parts {
            digest.update((part.len() as u64).to_le_bytes());
            digest.update(part);
        }
        update_tokens(&mut digest, &self.anchor);
        KvRoot(digest.finalize().into())
    }
}

impl KvRoot {
    /// The name of the KV of `tokens` that saw, after the anchor, the segments `seen` in order.
    pub fn kv_id(&self, tokens: &[u32], seen: &[KvId]) -> KvId {
        let mut digest = Sha256::new_with_prefix(b"strand kv 1");
        digest.update(self.0);
        update_tokens(&mut digest, tokens);
        for id in seen {
            digest.update(id.0);
        }
        KvId(digest.finalize().into())
    }
}

fn update_tokens(digest: &mut Sha256, tokens: &[u32]) {
    digest.update((tokens.len() as u64).to_le_bytes());
    let bytes: Vec<u8> = tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
    digest.update(bytes);
}

impl KvId {
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The first 16 digits, for people.
    pub fn short(&self) -> String {
        self.to_string()[..16].to_owned()
    }
}

impl fmt::Display for KvId {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_depends_on_all_that_the_rows_depend_on() {
        let identity = KvIdentity { anchor: vec![1], ..KvIdentity::default() };
        let name = |identity: &KvIdentity, variant, tokens: &[u32], seen: &[KvId]| {
            identity.root(variant).kv_id(tokens, seen)
        };
        let base = name(&identity, KvVariant::Lossless, &[1, 2], &[]);
        assert_eq!(base, name(&identity.clone(), KvVariant::Lossless, &[1, 2], &[]));
        let others = [
            name(&identity, KvVariant::Int8, &[1, 2], &[]),
            name(&identity, KvVariant::Lossless, &[1, 3], &[]),
            name(&identity, KvVariant::Lossless, &[1, 2], &[base]),
            name(
                &KvIdentity { model: [1; 32], ..identity.clone() },
                KvVariant::Lossless,
                &[1, 2],
                &[],
            ),
            name(
                &KvIdentity { rope: "x".into(), ..identity.clone() },
                KvVariant::Lossless,
                &[1, 2],
                &[],
            ),
            name(
                &KvIdentity { anchor: vec![], ..identity.clone() },
                KvVariant::Lossless,
                &[1, 2],
                &[],
            ),
            name(&KvIdentity { salt: vec![1], ..identity }, KvVariant::Lossless, &[1, 2], &[]),
        ];
        assert!(others.iter().all(|other| *other != base));
    }
}
