//! `strand chunks`: what is kept on the disk, without a model.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Error, Result};
use clap::{Args, Subcommand};
use serde_json::{Value, json};
use strand_engine::ChunkId;
use strand_engine::store::{
    ChunkInfo, Collected, Exported, Imported, KvFile, Problem, Quarantined, Store, StoredChunk,
    Verification,
};

use crate::args::CommonArgs;
use crate::{Outcome, byte_size, data_dir, date};

// No doc comment: clap would show it in place of the command's own.
#[derive(Debug, Args)]
pub struct ChunksArgs {
    /// Whose chunks, where a server keeps several tenants' [default: those of chat]
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true, global = true)]
    pub tenant: String,
    #[command(subcommand)]
    pub command: ChunksCommand,
}

#[derive(Debug, Subcommand)]
pub enum ChunksCommand {
    /// All chunks and what KV they have
    List,
    /// A chunk's text and its KV files
    Show {
        /// Its hash, or 4 or more digits that begin no other
        id: String,
    },
    /// Check every byte of the KV files and every text; damaged files are put aside
    Verify {
        /// A chunk's hash, or 4 or more digits that begin no other [default: all chunks]
        id: Option<String>,
    },
    /// Remove KV files without a chunk and old quarantined files, and stay within a budget
    Gc {
        /// Remove those worth least while all KV files take more than this, as 10GiB
        #[arg(long, value_name = "BYTES", value_parser = byte_size::parse,
              allow_negative_numbers = true)]
        budget: Option<u64>,
    },
    /// Write a chunk, its text and its KV to one file
    Export {
        /// Its hash, or 4 or more digits that begin no other
        id: String,
        /// Replaced if it is there
        file: PathBuf,
    },
    /// Take in a chunk that was exported, here or elsewhere
    Import { file: PathBuf },
}

pub fn run(args: &ChunksArgs, common: &CommonArgs) -> Result<Outcome> {
    let store = data_dir::open_store(common).map_err(Error::msg)?.of_tenant(&args.tenant)?;
    let json = common.json;
    match &args.command {
        ChunksCommand::List => list(&store, json)?,
        ChunksCommand::Show { id } => show(&store, store.find_chunk(id)?, json)?,
        ChunksCommand::Verify { id } => {
            let chunk = id.as_deref().map(|id| store.find_chunk(id)).transpose()?;
            return verified(&store.verify(chunk)?, json);
        }
        ChunksCommand::Gc { budget } => collected(&store.gc(*budget)?, json)?,
        ChunksCommand::Export { id, file } => {
            let id = store.find_chunk(id)?;
            exported(id, file, &store.export(id, file)?, json)?;
        }
        ChunksCommand::Import { file } => imported(&store.import(file)?, json)?,
    }
    Ok(Outcome::Done)
}

fn list(store: &Store, json: bool) -> Result<()> {
    let (chunks, files) = (store.chunks()?, store.kv_files()?);
    let mut out = io::stdout().lock();
    if json {
        for chunk in &chunks {
            writeln!(out, "{}", facts(chunk, &files))?;
        }
        return Ok(());
    }
    let rows: Vec<[String; 6]> = chunks.iter().map(|chunk| row(chunk, &files)).collect();
    if !rows.is_empty() {
        let titles = ["Hash", "Name", "Kind", "Tokens", "Text", "KV"].map(str::to_owned);
        let rows: Vec<[String; 6]> = std::iter::once(titles).chain(rows).collect();
        let width =
            |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..5).map(width).collect();
        for row in &rows {
            let cells: Vec<String> =
                (row.iter().zip(&widths)).map(|(cell, width)| format!("{cell:<width$}")).collect();
            writeln!(out, "{}  {}", cells.join("  "), row[5])?;
        }
    }
    let orphans = files.iter().filter(|file| chunks.iter().all(|chunk| chunk.id != file.chunk));
    let orphans: Vec<u64> = orphans.map(|file| file.bytes).collect();
    if !orphans.is_empty() {
        let bytes = byte_size::format(orphans.iter().sum());
        let count = counted(orphans.len(), "file");
        crate::note(&format!("{count} ({bytes}) without a chunk; gc removes such"));
    }
    Ok(())
}

fn row(chunk: &ChunkInfo, files: &[KvFile]) -> [String; 6] {
    let own = files.iter().filter(|file| file.chunk == chunk.id);
    let kv: Vec<String> = own
        .map(|file| format!("{} {}", file.codec.as_str(), byte_size::format(file.bytes)))
        .collect();
    [
        chunk.id.short(),
        chunk.name.clone(),
        chunk.kind.as_str().to_owned(),
        chunk.tokens.map_or("-".to_owned(), |tokens| tokens.to_string()),
        byte_size::format(chunk.text_bytes),
        if kv.is_empty() { "-".to_owned() } else { kv.join(", ") },
    ]
}

fn facts(chunk: &ChunkInfo, files: &[KvFile]) -> Value {
    let own = files.iter().filter(|file| file.chunk == chunk.id);
    let files: Vec<Value> = own.map(file_facts).collect();
    json!({
        "id": chunk.id.to_string(),
        "name": chunk.name,
        "kind": chunk.kind.as_str(),
        "tokens": chunk.tokens,
        "text_bytes": chunk.text_bytes,
        "created": chunk.created,
        "tags": chunk.tags,
        "files": files,
    })
}

fn file_facts(file: &KvFile) -> Value {
    json!({
        "kv_id": file.kv_id.to_string(),
        "codec": file.codec.as_str(),
        "tokens": file.tokens,
        "bytes": file.bytes,
        "raw_bytes": file.raw_bytes,
        "created": file.created,
        "last_used": file.last_used,
        "uses": file.uses,
    })
}

fn show(store: &Store, id: ChunkId, json: bool) -> Result<()> {
    let StoredChunk { info, text } = store.chunk(id)?.context("the chunk was erased just now")?;
    let files: Vec<KvFile> =
        store.kv_files()?.into_iter().filter(|file| file.chunk == id).collect();
    let mut out = io::stdout().lock();
    if json {
        let mut facts = facts(&info, &files);
        facts["text"] = text.into();
        writeln!(out, "{facts}")?;
        return Ok(());
    }
    writeln!(out, "Hash: {}", info.id)?;
    writeln!(out, "Name: {} ({})", info.name, info.kind.as_str())?;
    if let Some(tokens) = info.tokens {
        writeln!(out, "Size: {tokens} tokens")?;
    }
    writeln!(out, "Created: {}", date::of(info.created))?;
    if !info.tags.is_empty() {
        writeln!(out, "Tags: {}", info.tags.join(", "))?;
    }
    for file in &files {
        let ratio = file.bytes as f64 / file.raw_bytes.max(1) as f64;
        writeln!(
            out,
            "KV: {} {}, {}, {:.0} % of {}",
            file.kv_id.short(),
            file.codec.as_str(),
            byte_size::format(file.bytes),
            100.0 * ratio,
            byte_size::format(file.raw_bytes),
        )?;
    }
    let end = if text.ends_with('\n') { "" } else { "\n" };
    write!(out, "\n{text}{end}")?;
    Ok(())
}

fn verified(found: &Verification, json: bool) -> Result<Outcome> {
    let mut out = io::stdout().lock();
    let (chunks, files) = (found.chunks, found.files);
    if json {
        let problems: Vec<Value> = found.problems.iter().map(problem_facts).collect();
        let facts = json!({
            "chunks": chunks, "files": files, "bytes": found.bytes, "problems": problems,
        });
        writeln!(out, "{facts}")?;
    } else {
        let bytes = byte_size::format(found.bytes);
        let (chunks, files) = (counted(chunks, "chunk"), counted(files, "file"));
        let problems = counted(found.problems.len(), "problem");
        writeln!(out, "{chunks}, {files} ({bytes}), {problems}")?;
        for problem in &found.problems {
            drop(writeln!(io::stderr(), "error: {}", describe(problem)));
        }
    }
    Ok(if found.problems.is_empty() { Outcome::Done } else { Outcome::Failed })
}

fn describe(problem: &Problem) -> String {
    match problem {
        Problem::Text(id) => {
            format!("the text of {}... is altered; erase it and load its file again", id.short())
        }
        Problem::Missing { chunk, kv_id } => {
            format!("{}...: the file {kv_id}.kv is gone", chunk.short())
        }
        Problem::Damaged { chunk, quarantined: Quarantined { name, path, damage } } => {
            format!("{}...: {name}: {damage}; it is now {}", chunk.short(), path.display())
        }
        Problem::Index(text) => format!("the index is damaged: {text}"),
    }
}

fn problem_facts(problem: &Problem) -> Value {
    let (chunk, path) = match problem {
        Problem::Text(id) => (Some(*id), None),
        Problem::Missing { chunk, .. } => (Some(*chunk), None),
        Problem::Damaged { chunk, quarantined } => (Some(*chunk), Some(&quarantined.path)),
        Problem::Index(_) => (None, None),
    };
    json!({
        "chunk": chunk.map(|id| id.to_string()), "problem": describe(problem), "path": path,
    })
}

fn collected(found: &Collected, json: bool) -> Result<()> {
    let mut out = io::stdout().lock();
    if json {
        let removed: Vec<Value> = found.removed.iter().map(file_facts).collect();
        let facts = json!({
            "removed": removed,
            "freed_bytes": found.freed_bytes,
            "kept_bytes": found.kept_bytes,
            "leftovers": found.leftovers,
        });
        writeln!(out, "{facts}")?;
        return Ok(());
    }
    let files = counted(found.removed.len(), "file");
    let (freed, kept) = (byte_size::format(found.freed_bytes), byte_size::format(found.kept_bytes));
    writeln!(out, "{files} removed ({freed}), {kept} kept")?;
    if found.leftovers > 0 {
        writeln!(out, "{} of the quarantine removed", counted(found.leftovers, "old file"))?;
    }
    Ok(())
}

fn exported(id: ChunkId, file: &Path, found: &Exported, json: bool) -> Result<()> {
    let Exported { files, bytes, problems } = found;
    for problem in problems {
        crate::note(&format!("left out, {}", describe(problem)));
    }
    let mut out = io::stdout().lock();
    if json {
        let facts = json!({"id": id.to_string(), "path": file, "files": files, "bytes": bytes});
        writeln!(out, "{facts}")?;
        return Ok(());
    }
    let (files, size) = (counted(*files, "KV file"), byte_size::format(*bytes));
    writeln!(out, "✓ Chunk exported: {}... with {files}, {size}", id.short())?;
    Ok(())
}

fn imported(found: &Imported, json: bool) -> Result<()> {
    let Imported { chunk, already, files, bytes } = found;
    let mut out = io::stdout().lock();
    if json {
        let facts = json!({
            "id": chunk.id.to_string(), "name": chunk.name, "already": already, "files": files,
            "bytes": bytes,
        });
        writeln!(out, "{facts}")?;
        return Ok(());
    }
    let (files, size) = (counted(*files, "new KV file"), byte_size::format(*bytes));
    let hash = chunk.id.short();
    if *already {
        writeln!(out, "✓ Chunk already there as {}: {hash}... with {files}, {size}", chunk.name)?;
    } else {
        writeln!(out, "✓ Chunk imported: {hash}... {} with {files}, {size}", chunk.name)?;
    }
    Ok(())
}

fn counted(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}
