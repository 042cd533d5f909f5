//! Commands that make chunks: of files, and of other chunks.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result, anyhow, bail};
use serde_json::{Value, json};
use strand_engine::ChunkId;
use strand_engine::context::{Chunk, ChunkKind, Loaded};

use super::Report;
use super::chunks::{Row, rows};
use crate::answer::reuse_json;
use crate::chat::Chat;
use crate::chunk_file;
use crate::progress::Progress;

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

/// A chunk on its way into the context.
struct New {
    chunk: Arc<Chunk>,
    /// It had its name before this command.
    known: bool,
}

/// Reads every file before any is loaded: a command that fails changes nothing.
pub fn load(chat: &mut Chat, load: &Load) -> Result<Report> {
    let mut new = Vec::new();
    for pattern in &load.files {
        for path in expand(pattern)? {
            chat.check_interrupt()?;
            let file = chunk_file::read(Path::new(&path))?;
            let name = load.name.as_deref();
            new.push(make(chat, name, &file.name, ChunkKind::File, file.content)?);
        }
    }
    if load.name.is_some() && new.len() > 1 {
        bail!("--name names one chunk, {} files match", new.len());
    }
    let added = add_all(chat, new, !load.inactive)?;
    let texts: Vec<&str> = added.iter().map(|added| added.text.as_str()).collect();
    let text = texts.join("\n");
    let facts: Vec<Value> = added.into_iter().map(|added| added.facts).collect();
    Ok(Report::new("/load", text, json!({"chunks": facts})))
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

/// The chunk of a content. One that the context or the store knows keeps its name and kind.
fn make(
    chat: &Chat,
    asked: Option<&str>,
    name: &str,
    kind: ChunkKind,
    content: Vec<u8>,
) -> Result<New> {
    let id = ChunkId::of(&content);
    let there = chat.context.entries().iter().find(|entry| entry.chunk.id == id);
    if let Some(entry) = there {
        same_name(asked, &entry.chunk.name)?;
        return Ok(New { chunk: entry.chunk.clone(), known: true });
    }
    if let Some(stored) = chat.keeper.chunk(id)? {
        same_name(asked, &stored.info.name)?;
        let (name, kind) = (&stored.info.name, stored.info.kind);
        let chunk = chunk_file::chunk(&chat.engine, name, kind, content)?;
        return Ok(New { chunk: Arc::new(chunk), known: true });
    }
    let name = asked.unwrap_or(name);
    let chunk = chunk_file::chunk(&chat.engine, name, kind, content)?;
    Ok(New { chunk: Arc::new(chunk), known: false })
}

fn same_name(asked: Option<&str>, name: &str) -> Result<()> {
    match asked.filter(|asked| *asked != name) {
        Some(asked) => bail!(
            "this content is the chunk {name} already, and a chunk keeps its name; \
             /erase it to load it as {asked}"
        ),
        None => Ok(()),
    }
}

/// What is said of a chunk that was added.
struct Added {
    text: String,
    facts: Value,
}

/// Adds chunks and encodes them; all or none.
fn add_all(chat: &mut Chat, new: Vec<New>, active: bool) -> Result<Vec<Added>> {
    let before = chat.context.clone();
    let added = try_add_all(chat, new, active);
    if added.is_err() {
        chat.context = before;
    }
    added
}

fn try_add_all(chat: &mut Chat, new: Vec<New>, active: bool) -> Result<Vec<Added>> {
    let total: u64 = new.iter().map(|new| new.chunk.ids.len() as u64).sum();
    let (mut done, mut progress) = (0, Progress::encoding());
    let mut encoded = Vec::new();
    for New { chunk, known } in new {
        let tokens = chunk.ids.len() as u64;
        let (index, known, reuse) = match chat.context.load(chunk, active) {
            Loaded::New(index) => (index, known, Some(chat.encode(index, chat.restore)?)),
            Loaded::Already(index) => (index, true, None),
        };
        encoded.push((index, known, reuse));
        done += tokens;
        progress.update(done, total);
    }
    drop(progress);
    // positions hold for the layout after the whole command
    let rows = rows(chat)?;
    let added = encoded.into_iter().map(|(index, known, reuse)| {
        let text = told(&rows[index], known);
        let mut facts = rows[index].facts.clone();
        facts["already_loaded"] = known.into();
        facts["reuse"] = reuse.map_or(Value::Null, reuse_json);
        Added { text, facts }
    });
    Ok(added.collect())
}

fn told(row: &Row, known: bool) -> String {
    let short = row.id.short();
    if known {
        return format!("✓ Chunk already loaded as {}: {short}...", row.name);
    }
    let mut lines = vec![
        "✓ Added chunk:".to_owned(),
        format!("  Hash: {short}..."),
        format!("  Size: {} tokens", row.tokens),
    ];
    if let Some((first, last)) = row.position {
        lines.push(format!("  Position: {first}-{last}"));
    }
    lines.join("\n")
}

/// Makes a chunk of the contents of others, joined by one newline unless the left one ends so.
pub fn compose(chat: &mut Chat, names: &[String]) -> Result<Report> {
    let parts: Vec<&Arc<Chunk>> = names
        .iter()
        .map(|name| Ok(&chat.context.entries()[chat.context.find(name)?].chunk))
        .collect::<Result<_>>()?;
    let mut text = String::new();
    for part in &parts {
        if !text.is_empty() && !text.ends_with('\n') {
            text.push('\n');
        }
        text.push_str(&part.text);
    }
    let name = parts.iter().map(|part| part.name.as_str()).collect::<Vec<_>>().join(" + ");
    let kind = parts[0].kind;
    let kind = if parts.iter().all(|part| part.kind == kind) { kind } else { ChunkKind::Note };
    let count = parts.len();
    let new = make(chat, None, &name, kind, text.into_bytes())?;
    let mut added = add_all(chat, vec![new], true)?;
    let Added { text, mut facts } = added.remove(0);
    facts["from"] = count.into();
    Ok(Report::new("/compose", format!("{text}\n  From: {count} chunks"), facts))
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
