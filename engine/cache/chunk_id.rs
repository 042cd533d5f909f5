//! The name of a chunk.

use std::fmt;

use sha2::{Digest, Sha256};

/// SHA-256 of the content's bytes: what `sha256sum` prints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ChunkId([u8; 32]);

impl ChunkId {
    pub fn of(content: &[u8]) -> Self {
        Self(Sha256::digest(content).into())
    }

    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// True when its hex digits begin with these, in upper or lower case.
    pub fn starts_with(&self, digits: &[u8]) -> bool {
        let nibble = |at: usize| {
            let byte = *self.0.get(at / 2)?;
            Some(if at.is_multiple_of(2) { byte >> 4 } else { byte & 15 })
        };
        let value = |digit: &u8| char::from(*digit).to_digit(16);
        digits.iter().enumerate().all(|(at, digit)| {
            value(digit).is_some_and(|value| nibble(at).map(u32::from) == Some(value))
        })
    }

    /// The first 16 digits, for people.
    pub fn short(&self) -> String {
        self.to_string()[..16].to_owned()
    }
}

impl fmt::Display for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_what_sha256sum_prints() {
        let id = ChunkId::of(b"abc");
        let known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!((id.to_string().as_str(), id.short().as_str()), (known, &known[..16]));
    }

    #[test]
    fn an_id_starts_with_its_digits_in_either_case() {
        let id = ChunkId::of(b"abc");
        let all = id.to_string();
        assert!((0..=64).all(|count| id.starts_with(&all.as_bytes()[..count])));
        assert!(id.starts_with(b"BA7816Bf"));
        for other in ["bb", "ba7817", "ba7x", &format!("{all}0")] {
            assert!(!id.starts_with(other.as_bytes()), "{other}");
        }
    }
}
