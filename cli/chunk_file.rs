//! From a file's path to the name and the bytes of a chunk.
//!
//! Whether the bytes are text is for [`strand_engine::context::Chunk::new`] to say.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

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
    let content =
        fs::read(path).with_context(|| format!("cannot read the chunk {}", path.display()))?;
    let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
    Ok(ChunkFile { name, content })
}
