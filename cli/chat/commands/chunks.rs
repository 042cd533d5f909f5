//! Commands on chunks: load, look, switch on and off.

use std::path::Path;

use anyhow::{Context as _, Result, anyhow, bail};
use serde_json::{Value, json};
use strand_engine::context::{Chunk, ChunkKind, Loaded, ReusePolicy};

use super::Report;
use crate::byte_size;
use crate::chat::Chat;
use crate::chunk_file;

/// What `/load` was given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Load {
    pub files: Vec<String>,
    pub name: Option<String>,
    pub inactive: bool,
}

impl Load {
    /// Reads the command's words.
    pub fn parse(words: Vec<String>) -> Option<Self> {
        let mut load = Self { files: Vec::new(), name: None, inactive: false };
        let mut words = words.into_iter();
        while let Some(word) = words.next() {
            match word.as_str() {
                "--inactive" => load.inactive = true,
                "--name" => load.name = Some(words.next()?),
                _ => load.files.push(word),
            }
        }
        let is_named_twice = load.name.is_some() && load.files.len() > 1;
        (!load.files.is_empty() && !is_named_twice).then_some(load)
    }
}

/// Reads every file before any is loaded: a command that fails changes nothing.
pub fn load(chat: &mut Chat, load: &Load) -> Result<Report> {
    let mut chunks = Vec::new();
    for pattern in &load.files {
        for path in expand(pattern)? {
            chunks.push(read(chat, &path, load.name.as_deref())?);
        }
    }
    if load.name.is_some() && chunks.len() > 1 {
        bail!("--name names one chunk, {} files match", chunks.len());
    }
    for chunk in &chunks {
        fits(chat, chunk)?;
    }
    let before = chat.context.clone();
    let mut reports = Vec::new();
    for chunk in chunks {
        match add(chat, chunk, !load.inactive) {
            Ok(report) => reports.push(report),
            Err(error) => {
                chat.context = before;
                return Err(error);
            }
        }
    }
    let (texts, facts): (Vec<String>, Vec<Value>) = reports.into_iter().unzip();
    Ok(Report::new("/load", texts.join("\n"), json!({"chunks": facts})))
}

/// The files a word names: itself, or what matches it, in order.
fn expand(pattern: &str) -> Result<Vec<String>> {
    if Path::new(pattern).exists() || !pattern.contains(['*', '?', '[']) {
        return Ok(vec![pattern.to_owned()]);
    }
    let paths = glob::glob(pattern).with_context(|| format!("{pattern} is no pattern"))?;
    let mut files = Vec::new();
    for path in paths {
        let path = path?;
        if path.is_file() {
            let text = path.to_str().ok_or_else(|| anyhow!("{} is not UTF-8", path.display()))?;
            files.push(text.to_owned());
        }
    }
    if files.is_empty() {
        bail!("no file matches {pattern}");
    }
    Ok(files)
}

fn read(chat: &Chat, path: &str, name: Option<&str>) -> Result<Chunk> {
    let file = chunk_file::read(Path::new(path))?;
    let (template, tokenizer) = chat.language();
    let name = name.unwrap_or(&file.name);
    Ok(Chunk::new(name, ChunkKind::File, file.content, template, tokenizer)?)
}

fn fits(chat: &Chat, chunk: &Chunk) -> Result<()> {
    let plan = chat.engine.plan();
    let (tokens, length) = (chunk.ids.len(), plan.max_model_len);
    if tokens + chat.context.anchor().len() + 1 >= length {
        bail!("{} has {tokens} tokens, the model takes {length} in all", chunk.name);
    }
    Ok(())
}

/// Puts one chunk into the context and its KV into the pool.
fn add(chat: &mut Chat, chunk: Chunk, active: bool) -> Result<(String, Value)> {
    let index = match chat.context.load(chunk, active) {
        Loaded::New(index) => index,
        Loaded::Already(index) => {
            let chunk = &chat.context.entries()[index].chunk;
            let text = format!("✓ Chunk already loaded as {}: {}...", chunk.name, chunk.id.short());
            return Ok((text, facts(chat, index, true)?));
        }
    };
    chat.encode(index)?;
    let chunk = &chat.context.entries()[index].chunk;
    let mut lines = vec![
        "✓ Added chunk:".to_owned(),
        format!("  Hash: {}...", chunk.id.short()),
        format!("  Size: {} tokens", chunk.ids.len()),
    ];
    if let Some((first, last)) = chat.context.position(index) {
        lines.push(format!("  Position: {first}-{last}"));
    }
    Ok((lines.join("\n"), facts(chat, index, false)?))
}

/// What programs are told of a chunk.
fn facts(chat: &Chat, index: usize, already_loaded: bool) -> Result<Value> {
    let mut facts = row(chat, index)?.facts;
    facts["already_loaded"] = already_loaded.into();
    Ok(facts)
}

/// A line of the table.
struct Row {
    cells: [String; 8],
    facts: Value,
}

const HEADER: [&str; 8] = ["#", "Hash", "Name", "State", "Tiers", "Tokens", "Bytes", "Preview"];
const PREVIEW: usize = 30;

fn row(chat: &Chat, index: usize) -> Result<Row> {
    let entry = &chat.context.entries()[index];
    let (chunk, plan) = (&entry.chunk, chat.engine.plan());
    let tiers = if chat.is_resident(index)? { vec!["device"] } else { Vec::new() };
    let bytes = chunk.ids.len().div_ceil(plan.block_size) as u64 * plan.block_bytes;
    let preview: String = chunk.text.split_whitespace().collect::<Vec<_>>().join(" ");
    let cells = [
        format!("#{}", index + 1),
        chunk.id.short(),
        chunk.name.clone(),
        if entry.active { "active" } else { "inactive" }.to_owned(),
        if tiers.is_empty() { "-".to_owned() } else { tiers.join(",") },
        chunk.ids.len().to_string(),
        byte_size::format(bytes),
        preview.chars().take(PREVIEW).collect(),
    ];
    let position = chat.context.position(index).map(|(first, last)| [first, last]);
    let facts = json!({
        "id": chunk.id.to_string(),
        "name": chunk.name,
        "active": entry.active,
        "tiers": tiers,
        "tokens": chunk.ids.len(),
        "bytes": bytes,
        "position": position,
    });
    Ok(Row { cells, facts })
}

/// The table, and what is used and free.
pub fn context(chat: &Chat) -> Result<Report> {
    let rows: Vec<Row> =
        (0..chat.context.entries().len()).map(|index| row(chat, index)).collect::<Result<_>>()?;
    let total = chat.engine.plan().max_model_len;
    let used = chat.used_tokens()?;
    let free = total.saturating_sub(used);
    let bytes: u64 = rows.iter().filter_map(|row| resident_bytes(&row.facts)).sum();
    let mut lines = vec![
        "Context Status:".to_owned(),
        format!("Total: {total} tokens"),
        format!("Used: {used} tokens"),
        format!("Free: {free} tokens"),
        format!("Policy: {}", chat.context.policy.as_str()),
        format!("Device: {}", byte_size::format(bytes)),
    ];
    if !rows.is_empty() {
        let header = HEADER.map(str::to_owned);
        lines.extend(aligned(std::iter::once(&header).chain(rows.iter().map(|row| &row.cells))));
    }
    let facts = json!({
        "total_tokens": total,
        "used_tokens": used,
        "free_tokens": free,
        "policy": chat.context.policy.as_str(),
        "tiers": {"device": bytes},
        "chunks": rows.into_iter().map(|row| row.facts).collect::<Vec<_>>(),
    });
    Ok(Report::new("/context", lines.join("\n"), facts))
}

fn resident_bytes(facts: &Value) -> Option<u64> {
    let on_device = facts["tiers"].as_array().is_some_and(|tiers| !tiers.is_empty());
    on_device.then(|| facts["bytes"].as_u64()).flatten()
}

/// Columns padded to the widest of their cells.
fn aligned<'a>(rows: impl Iterator<Item = &'a [String; 8]> + Clone) -> Vec<String> {
    let mut widths = [0; 8];
    for row in rows.clone() {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |row: &[String; 8]| {
        let cells = row
            .iter()
            .zip(widths)
            .map(|(cell, width)| format!("{cell}{}", " ".repeat(width - cell.chars().count())));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    rows.map(line).collect()
}

/// Flips the flags of all named chunks, or of none where one is unknown.
pub fn switch(chat: &mut Chat, names: &[String], active: bool) -> Result<Report> {
    let found: Vec<usize> =
        names.iter().map(|name| chat.context.find(name)).collect::<Result<_, _>>()?;
    let (command, did) = match active {
        true => ("/activate", "activated"),
        false => ("/deactivate", "deactivated"),
    };
    let mut lines = Vec::new();
    for &index in &found {
        chat.context.set_active(index, active);
        let id = chat.context.entries()[index].chunk.id;
        lines.push(format!("✓ Chunk {did}: {}...", id.short()));
    }
    let chunks: Vec<Value> =
        found.iter().map(|&index| Ok(row(chat, index)?.facts)).collect::<Result<_>>()?;
    Ok(Report::new(command, lines.join("\n"), json!({"chunks": chunks})))
}

/// All there is to know of a chunk, its text included.
pub fn show(chat: &Chat, name: &str) -> Result<Report> {
    let index = chat.context.find(name)?;
    let (row, entry) = (row(chat, index)?, &chat.context.entries()[index]);
    let chunk = &entry.chunk;
    let mut lines = vec![
        format!("Hash: {}", chunk.id),
        format!("Name: {} ({})", chunk.name, chunk.kind.as_str()),
    ];
    for (name, cell) in HEADER.iter().zip(&row.cells).skip(3).take(4) {
        lines.push(format!("{name}: {cell}"));
    }
    lines.push(chunk.text.clone());
    let mut facts = row.facts;
    facts["kind"] = chunk.kind.as_str().into();
    facts["text"] = chunk.text.as_str().into();
    Ok(Report::new("/show", lines.join("\n"), facts))
}

/// Removes a chunk from the context and its KV from the pool.
pub fn erase(chat: &mut Chat, name: &str) -> Result<Report> {
    let index = chat.context.find(name)?;
    let id = chat.context.entries()[index].chunk.id;
    chat.engine.erase(id)?;
    chat.context.remove(index);
    let text = format!("✓ Chunk erased: {}...", id.short());
    Ok(Report::new("/erase", text, json!({"id": id.to_string()})))
}

/// The same for all chunks.
pub fn clear(chat: &mut Chat) -> Result<Report> {
    let count = chat.context.entries().len();
    for entry in chat.context.entries() {
        chat.engine.erase(entry.chunk.id)?;
    }
    chat.context.clear();
    Ok(Report::new("/clear", "✓ All chunks cleared", json!({"cleared": count})))
}

/// Shows or sets the reuse policy.
pub fn policy(chat: &mut Chat, name: Option<&str>) -> Result<Report> {
    if let Some(name) = name {
        let known = || ReusePolicy::ALL.map(ReusePolicy::as_str).join(", ");
        chat.context.policy = ReusePolicy::parse(name)
            .ok_or_else(|| anyhow!("Unknown policy: {name}. Policies: {}", known()))?;
    }
    let policy = chat.context.policy.as_str();
    Ok(Report::new("/policy", format!("Policy: {policy}"), json!({"policy": policy})))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(words: &[&str]) -> Option<Load> {
        Load::parse(words.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn load_takes_files_a_name_and_a_flag() {
        let load = parsed(&["a.txt", "--name", "b", "--inactive"]).expect("it is complete");
        assert_eq!((load.files.len(), load.name.as_deref(), load.inactive), (1, Some("b"), true));
        assert_eq!(parsed(&["a", "b"]).map(|load| load.files.len()), Some(2));
        for bad in [&[][..], &["--inactive"], &["a", "--name"], &["a", "b", "--name", "c"]] {
            assert_eq!(parsed(bad), None, "{bad:?}");
        }
    }
}
