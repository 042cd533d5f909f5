//! A chunk: content-addressed text that is encoded once and switched on and off.

use strand_models::{ChatTemplate, Tokenizer};

use crate::ChunkId;
use crate::error::Error;
use crate::store::StoredChunk;

/// What a chunk is, which the model is told in its first line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChunkKind {
    File,
    Persona,
    Memory,
    Note,
}

impl ChunkKind {
    pub const ALL: [Self; 4] = [Self::File, Self::Persona, Self::Memory, Self::Note];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Persona => "persona",
            Self::Memory => "memory",
            Self::Note => "note",
        }
    }

    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == text)
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
        // the name is a part of the message's first line
        if name.is_empty() || name.contains(char::is_control) {
            return Err(refused("named by nothing, or with control characters".into()));
        }
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

    /// A chunk of the store. It is tokenized again: the model may be another one.
    pub fn from_stored(
        stored: StoredChunk,
        template: &ChatTemplate,
        tokenizer: &Tokenizer,
    ) -> Result<Self, Error> {
        let StoredChunk { info, text } = stored;
        Self::new(&info.name, info.kind, text.into_bytes(), template, tokenizer)
    }
}
