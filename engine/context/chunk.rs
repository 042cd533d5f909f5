//! A chunk: content-addressed text that is encoded once and switched on and off.

use std::fmt;

use sha2::{Digest, Sha256};
use strand_models::{ChatTemplate, Tokenizer};

use crate::error::Error;

/// SHA-256 of the content's bytes: what `sha256sum` prints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ChunkId([u8; 32]);

impl ChunkId {
    pub fn of(content: &[u8]) -> Self {
        Self(Sha256::digest(content).into())
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

/// What a chunk is, which the model is told in its first line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChunkKind {
    File,
    Persona,
    Memory,
    Note,
}

impl ChunkKind {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Persona => "persona",
            Self::Memory => "memory",
            Self::Note => "note",
        }
    }
}

/// Immutable: other content is another chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    pub id: ChunkId,
    pub name: String,
    pub kind: ChunkKind,
    pub text: String,
    /// The content inside its wrapper, a message of the model's own template.
    pub ids: Vec<u32>,
}

impl Chunk {
    /// Wraps and tokenizes content. Refuses what is no text, with the place of the first byte
    /// that isn't.
    pub fn new(
        name: &str,
        kind: ChunkKind,
        content: Vec<u8>,
        template: &ChatTemplate,
        tokenizer: &Tokenizer,
    ) -> Result<Self, Error> {
        let refused = |reason: String| Error::NotAChunk { name: name.to_owned(), reason };
        let id = ChunkId::of(&content);
        let text = String::from_utf8(content).map_err(|error| {
            refused(format!("not UTF-8 text, first at byte {}", error.utf8_error().valid_up_to()))
        })?;
        if let Some(at) = text.bytes().position(|byte| byte == 0) {
            return Err(refused(format!("a binary file, it has a zero at byte {at}")));
        }
        if text.is_empty() {
            return Err(refused("empty".into()));
        }
        let message = format!("# {}: {name}\n{text}", kind.as_str());
        let ids = template.chunk_ids(tokenizer, &message)?;
        Ok(Self { id, name: name.to_owned(), kind, text, ids })
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
}
