//! From a file's path to the name and the bytes of a chunk.
//!
//! Whether the bytes are text is for [`Chunk::new`] to say.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use strand_engine::EngineHandle;
use strand_engine::context::{Chunk, ChunkKind};

use crate::byte_size;

/// Longer files are not read.
const LARGEST: u64 = 256 << 20;

/// What a file adds to a context, before any model has seen it.
pub struct ChunkFile {
    /// The path's last part.
    pub name: String,
    pub content: Vec<u8>,
}

pub fn read(path: &Path) -> Result<ChunkFile> {
    if path.is_dir() {
        bail!("{} is a folder; name its files", path.display());
    }
    let told = || format!("cannot read the chunk {}", path.display());
    let file = File::open(path).with_context(told)?;
    let mut content = Vec::new();
    file.take(LARGEST + 1).read_to_end(&mut content).with_context(told)?;
    if content.len() as u64 > LARGEST {
        let (has, most) = (fs::metadata(path)?.len().max(LARGEST + 1), byte_size::format(LARGEST));
        bail!("{} has {has} bytes, a chunk has at most {most}", path.display());
    }
    let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
    Ok(ChunkFile { name, content })
}

/// The chunk of a content, refused where it can't fit into the model.
pub fn chunk(
    engine: &EngineHandle,
    name: &str,
    kind: ChunkKind,
    content: Vec<u8>,
) -> Result<Chunk> {
    let (Some(template), Some(tokenizer)) = (engine.chat_template(), engine.tokenizer()) else {
        bail!("{} has no chat template or no tokenizer, which chunks need", engine.model_name());
    };
    let (bytes, length) = (content.len(), engine.plan().max_model_len);
    // To tokenize what is far too long takes minutes.
    if tokenizer.fewest_tokens(bytes) > length {
        bail!("{name} has {bytes} bytes, more than {length} tokens of this model can hold");
    }
    let chunk = Chunk::new(name, kind, content, template, tokenizer)?;
    // one token more that asks, and one that answers
    let most = length.saturating_sub(2);
    if chunk.ids.len() > most {
        let tokens = chunk.ids.len();
        bail!("{name} has {tokens} tokens, the model takes {length} in all");
    }
    Ok(chunk)
}
