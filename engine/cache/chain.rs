//! Names of blocks by what led to them.

use xxhash_rust::xxh3::xxh3_128_with_seed;

/// Chained xxh3-128 over the tokens of a block and of everything before it.
///
/// A name for lookup, never proof: a hit is taken only after the tokens themselves agree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockHash(u128);

impl BlockHash {
    /// The start of a chain; another salt is another world.
    pub fn root(salt: &[u8]) -> Self {
        Self(xxh3_128_with_seed(salt, ROOT_SEED))
    }

    /// The name of the block that follows this one and holds `tokens`.
    pub fn child(self, tokens: &[u32]) -> Self {
        let mut bytes = Vec::with_capacity(16 + 4 * tokens.len());
        bytes.extend_from_slice(&self.0.to_le_bytes());
        for token in tokens {
            bytes.extend_from_slice(&token.to_le_bytes());
        }
        Self(xxh3_128_with_seed(&bytes, tokens.len() as u64))
    }

    /// The start of a segment's chain: it sees the segment that ended in `seen`, but for its
    /// first `hidden` rows.
    pub fn seeing(self, seen: Self, hidden: usize) -> Self {
        let mut bytes = self.0.to_le_bytes().to_vec();
        bytes.extend_from_slice(&seen.0.to_le_bytes());
        bytes.extend_from_slice(&(hidden as u64).to_le_bytes());
        Self(xxh3_128_with_seed(&bytes, SEGMENT_SEED))
    }

    /// The start of the same chain for rows that are an approximation.
    pub fn approximated(self) -> Self {
        Self(xxh3_128_with_seed(&self.0.to_le_bytes(), VARIANT_SEED))
    }
}

/// Sets joints between segments apart from blocks of tokens.
const SEGMENT_SEED: u64 = u64::MAX;
const ROOT_SEED: u64 = u64::MAX - 2;
const VARIANT_SEED: u64 = u64::MAX - 1;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_depends_on_the_salt_the_past_and_where_blocks_end() {
        let root = BlockHash::root(b"");
        assert_ne!(root, BlockHash::root(b"x"));
        assert_eq!(root.child(&[1, 2]), root.child(&[1, 2]));
        assert_ne!(root.child(&[1, 2]), root.child(&[1]).child(&[2]));
        assert_ne!(root.child(&[1]).child(&[3]), root.child(&[2]).child(&[3]));
        let seen = root.child(&[1]);
        assert_ne!(root.seeing(seen, 0), root.seeing(seen, 1));
        assert_ne!(root.approximated(), root);
    }
}
