//! Why a chunk's KV was not there.
//!
//! Told by what this process has computed for the tenant, and by the headers of the tenant's own
//! files; nothing of other tenants is looked at. The nearest reason is told:
//!
//! | reason | means |
//! |---|---|
//! | evicted | it was computed here, and has left all tiers since |
//! | lossy_variant | there is a lossy file, which is used only where that is asked for |
//! | policy | it is there as seen by another policy or from other chunks; or left on the disk |
//! | salt | it is there under another `cache_salt` |
//! | other_model | there is a file of another model, tokenizer or arithmetic |
//! | never_seen | none of these |

use std::collections::HashMap;

use serde::Serialize;
use strand_engine::ChunkId;
use strand_engine::cache::{KvId, KvIdentity, KvVariant};
use strand_engine::context::{Chunk, Context, ReusePolicy};
use strand_engine::store::KvRecord;
use utoipa::ToSchema;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Miss {
    NeverSeen,
    Evicted,
    OtherModel,
    LossyVariant,
    Policy,
    Salt,
}

/// KV that was computed here.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Way {
    kv: KvId,
    salt: Vec<u8>,
}

/// What this process computed for a tenant, by chunk; of each, the latest ways.
#[derive(Debug, Default)]
pub struct Memory {
    ways: HashMap<ChunkId, Vec<Way>>,
}

/// Ways of one chunk that are remembered.
const WAYS: usize = 64;

/// The KV that a chunk has in a context.
#[derive(Debug, Clone)]
pub struct Wanted {
    pub chunk: ChunkId,
    identity: KvIdentity,
    seen: Vec<KvId>,
    kv: KvId,
}

/// The KV that each chunk of a context has under a salt, in order; `None` for those that are
/// switched off.
pub fn wanted(context: &Context, engine: &KvIdentity, salt: &str) -> Vec<Option<Wanted>> {
    let (anchor, salt) = (context.anchor().to_vec(), salt.as_bytes().to_vec());
    let identity = KvIdentity { anchor, salt, ..engine.clone() };
    let mut names: Vec<(ChunkId, KvId)> = Vec::new();
    let entries = context.entries().iter().map(|entry| {
        if !entry.active {
            return None;
        }
        let before = || names.iter().map(|(_, kv)| *kv).collect();
        let seen = match (context.policy(), &entry.seen) {
            (ReusePolicy::Independent | ReusePolicy::Blend, _) => Vec::new(),
            (ReusePolicy::Mask, Some(seen)) => {
                names.iter().filter(|(id, _)| seen.contains(id)).map(|(_, kv)| *kv).collect()
            }
            (ReusePolicy::Exact | ReusePolicy::Mask, _) => before(),
        };
        let wanted = Wanted::new(&entry.chunk, identity.clone(), seen);
        names.push((entry.chunk.id, wanted.kv));
        Some(wanted)
    });
    entries.collect()
}

impl Wanted {
    fn new(chunk: &Chunk, identity: KvIdentity, seen: Vec<KvId>) -> Self {
        let kv = identity.root(KvVariant::Lossless).kv_id(&chunk.ids, &seen);
        Self { chunk: chunk.id, identity, seen, kv }
    }
}

impl Memory {
    pub fn remember(&mut self, wanted: &Wanted) {
        let ways = self.ways.entry(wanted.chunk).or_default();
        let way = Way { kv: wanted.kv, salt: wanted.identity.salt.clone() };
        ways.retain(|known| *known != way);
        if ways.len() == WAYS {
            ways.remove(0);
        }
        ways.push(way);
    }

    pub fn forget(&mut self, chunk: ChunkId) {
        self.ways.remove(&chunk);
    }

    /// Why what is wanted was not there; `files` are the tenant's of this chunk.
    pub fn why(&self, wanted: &Wanted, files: &[KvRecord]) -> Miss {
        let ways = self.ways.get(&wanted.chunk).map_or(&[][..], Vec::as_slice);
        let salt = &wanted.identity.salt;
        if ways.iter().any(|way| way.kv == wanted.kv) {
            return Miss::Evicted;
        }
        let told = files.iter().map(|file| of_file(wanted, file));
        let computed = ways.iter().map(|way| match way.salt == *salt {
            true => Miss::Policy,
            false => Miss::Salt,
        });
        let nearest = [Miss::Evicted, Miss::LossyVariant, Miss::Policy, Miss::Salt];
        let reasons: Vec<Miss> = told.chain(computed).collect();
        let found = nearest.into_iter().find(|miss| reasons.contains(miss));
        found.or(reasons.first().copied()).unwrap_or(Miss::NeverSeen)
    }
}

/// Why a file is not what is wanted.
fn of_file(wanted: &Wanted, file: &KvRecord) -> Miss {
    let unsalted = |identity: &KvIdentity| KvIdentity { salt: Vec::new(), ..identity.clone() };
    if unsalted(&file.identity) != unsalted(&wanted.identity) {
        return Miss::OtherModel;
    }
    if file.identity.salt != wanted.identity.salt {
        return Miss::Salt;
    }
    match (file.seen == wanted.seen, file.variant) {
        (false, _) => Miss::Policy,
        (true, KvVariant::Int8) => Miss::LossyVariant,
        // it was there, and the engine found it damaged or gone
        (true, KvVariant::Lossless) => Miss::Evicted,
    }
}

#[cfg(test)]
mod tests {
    use strand_engine::store::KvShape;

    use super::*;

    fn identity(salt: &str) -> KvIdentity {
        KvIdentity { model: [1; 32], salt: salt.as_bytes().to_vec(), ..KvIdentity::default() }
    }

    fn chunk() -> Chunk {
        let kind = strand_engine::context::ChunkKind::File;
        let (id, ids) = (ChunkId::of(b"a"), vec![1, 2, 3]);
        Chunk { id, name: "a".into(), kind, text: "a".into(), ids }
    }

    fn want(salt: &str, seen: &[KvId]) -> Wanted {
        Wanted::new(&chunk(), identity(salt), seen.to_vec())
    }

    fn file(identity: KvIdentity, variant: KvVariant, seen: &[KvId]) -> KvRecord {
        let shape =
            KvShape { layers: 1, kv_heads: 1, head_dim: 2, dtype: strand_kernels::KvDtype::F32 };
        KvRecord {
            identity,
            variant,
            chunk: ChunkId::of(b"a"),
            first_position: 0,
            seen: seen.to_vec(),
            tokens: vec![1, 2, 3],
            shape,
        }
    }

    #[test]
    fn the_nearest_reason_is_told() {
        let other = KvId::from_bytes([9; 32]);
        let mut memory = Memory::default();
        let wanted = want("s", &[]);
        assert_eq!(memory.why(&wanted, &[]), Miss::NeverSeen);
        let foreign = KvIdentity { model: [2; 32], ..identity("s") };
        let mut files = vec![file(foreign, KvVariant::Lossless, &[])];
        assert_eq!(memory.why(&wanted, &files), Miss::OtherModel);
        files.push(file(identity("t"), KvVariant::Lossless, &[]));
        assert_eq!(memory.why(&wanted, &files), Miss::Salt);
        files.push(file(identity("s"), KvVariant::Lossless, &[other]));
        assert_eq!(memory.why(&wanted, &files), Miss::Policy);
        files.push(file(identity("s"), KvVariant::Int8, &[]));
        assert_eq!(memory.why(&wanted, &files), Miss::LossyVariant);
        memory.remember(&wanted);
        assert_eq!(memory.why(&wanted, &files), Miss::Evicted);
    }

    #[test]
    fn what_was_computed_counts_without_a_file() {
        let mut memory = Memory::default();
        memory.remember(&want("t", &[]));
        assert_eq!(memory.why(&want("s", &[]), &[]), Miss::Salt);
        memory.remember(&want("s", &[KvId::from_bytes([9; 32])]));
        assert_eq!(memory.why(&want("s", &[]), &[]), Miss::Policy);
        memory.forget(ChunkId::of(b"a"));
        assert_eq!(memory.why(&want("s", &[]), &[]), Miss::NeverSeen);
    }
}
