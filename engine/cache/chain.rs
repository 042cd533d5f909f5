//! Names of blocks by what led to them.

use xxhash_rust::xxh3::xxh3_128_with_seed;

/// Chained xxh3-128 over the tokens of a block and of everything before it.
///
/// A name for lookup, never proof: a hit is taken only after the tokens themselves agree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockHash(u128);

impl BlockHash {
    /// The start of a chain; another salt is another world.
    pub fn root(salt: u64) -> Self {
        Self(xxh3_128_with_seed(b"strand block chain", salt))
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

    /// The start of a segment's chain: it sees the segment that ended in `seen`.
    pub fn seeing(self, seen: Self) -> Self {
        let mut bytes = self.0.to_le_bytes().to_vec();
        bytes.extend_from_slice(&seen.0.to_le_bytes());
        Self(xxh3_128_with_seed(&bytes, SEGMENT_SEED))
    }
}

/// Sets joints between segments apart from blocks of tokens.
const SEGMENT_SEED: u64 = u64::MAX;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_depends_on_the_salt_the_past_and_where_blocks_end() {
        let root = BlockHash::root(0);
        assert_ne!(root, BlockHash::root(1));
        assert_eq!(root.child(&[1, 2]), root.child(&[1, 2]));
        assert_ne!(root.child(&[1, 2]), root.child(&[1]).child(&[2]));
        assert_ne!(root.child(&[1]).child(&[3]), root.child(&[2]).child(&[3]));
    }
}
