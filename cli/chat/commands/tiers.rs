//! Commands that move a chunk's KV between device, host and disk, and remove it.

use std::time::Instant;

use anyhow::{Result, bail};
use serde_json::{Value, json};
use strand_engine::context::Loaded;
use strand_engine::store::{Codec, SavedFile};
use strand_engine::{ChunkId, Error, Restore, Tier};

use super::Report;
use crate::args::parse_codec;
use crate::byte_size;
use crate::chat::Chat;
use crate::chunk_file;

/// What `/save` was given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Save {
    /// A chunk, or `all`.
    pub what: String,
    pub codec: Option<Codec>,
}

impl Save {
    /// Reads the command's words.
    pub fn parse(words: Vec<String>) -> Option<Self> {
        let (mut what, mut codec) = (None, None);
        let mut words = words.into_iter();
        while let Some(word) = words.next() {
            match word.as_str() {
                "--codec" => codec = Some(parse_codec(&words.next()?).ok()?),
                _ if what.is_none() => what = Some(word),
                _ => return None,
            }
        }
        Some(Self { what: what?, codec })
    }
}

/// Writes text, tokens and KV of a chunk or of all.
pub fn save(chat: &mut Chat, save: &Save) -> Result<Report> {
    chat.keeper.store()?;
    let all = 0..chat.context.entries().len();
    let named = chat.context.find(&save.what);
    let indices: Vec<usize> = match named {
        // a chunk may be called so
        Err(_) if save.what == "all" => all.collect(),
        named => vec![named?],
    };
    let codec = save.codec.unwrap_or(chat.codec);
    let (mut lines, mut facts) = (Vec::new(), Vec::new());
    for index in indices {
        if chat.interrupt.pressed() {
            bail!("ended by Ctrl-C; {} chunks were saved", facts.len());
        }
        let saved = save_one(chat, index, codec)?;
        let id = chat.context.entries()[index].chunk.id;
        let ratio = saved.raw_bytes as f64 / saved.file_bytes as f64;
        lines.push(format!("✓ Chunk saved: {}...", id.short()));
        lines.push(format!(
            "  Bytes: {} for {}, ratio {ratio:.2} ({})",
            byte_size::format(saved.file_bytes),
            byte_size::format(saved.raw_bytes),
            codec.as_str()
        ));
        facts.push(json!({
            "id": id.to_string(),
            "codec": codec.as_str(),
            "bytes": saved.file_bytes,
            "raw_bytes": saved.raw_bytes,
            "ratio": ratio,
        }));
    }
    if facts.is_empty() {
        lines.push("There are no chunks to save".to_owned());
    }
    Ok(Report::new("/save", lines.join("\n"), json!({"chunks": facts})))
}

fn save_one(chat: &mut Chat, index: usize, codec: Codec) -> Result<SavedFile> {
    chat.keeper.keep_text(&chat.context.entries()[index].chunk)?;
    let prompt = || chat.context.segments_to(index);
    match chat.engine.save(prompt(), "", codec) {
        Err(Error::NoKv { .. }) => {
            // evicted, not computed under this policy yet, or there with loss only
            chat.encode_exactly(index)?;
            Ok(chat.engine.save(prompt(), "", codec)?)
        }
        saved => Ok(saved?),
    }
}

/// Moves a chunk's KV to the host, and switches it off.
pub fn unload(chat: &mut Chat, name: &str) -> Result<Report> {
    let index = chat.context.find(name)?;
    let prompt = chat.context.segments_to(index);
    let chunk = &chat.context.entries()[index].chunk;
    let (id, tokens) = (chunk.id, chunk.ids.len());
    let tiers = chat.tiers(prompt.clone())?;
    if !tiers.device && !tiers.host {
        bail!("the KV of {} is not on the device; /populate brings it there", chunk.name);
    }
    let unloaded = chat.engine.unload(prompt, "", chat.codec.variant())?;
    chat.context.set_active(index, false);
    let text = format!("✓ Chunk moved to host memory: {}...", id.short());
    let facts = json!({
        "id": id.to_string(),
        "tokens": tokens,
        "blocks": unloaded.blocks,
        "bytes": unloaded.bytes,
    });
    Ok(Report::new("/unload", text, facts))
}

/// Brings a chunk's KV from host or disk to the device, and activates it. One that is only in the
/// store is put into the context.
pub fn restore(chat: &mut Chat, name: &str) -> Result<Report> {
    unless_it_fails(chat, |chat| try_restore(chat, name))
}

/// Does something, and leaves the context as it was where that fails.
fn unless_it_fails(
    chat: &mut Chat,
    does: impl FnOnce(&mut Chat) -> Result<Report>,
) -> Result<Report> {
    let before = chat.context.clone();
    let done = does(chat);
    if done.is_err() {
        chat.context = before;
    }
    done
}

fn try_restore(chat: &mut Chat, name: &str) -> Result<Report> {
    let index = find_or_fetch(chat, name)?;
    let started = Instant::now();
    let tiers = chat.tiers(chat.context.segments_to(index))?;
    let Some(&from) = tiers.list().first() else {
        let name = &chat.context.entries()[index].chunk.name;
        let policy = chat.context.policy().as_str();
        bail!("{name} has no KV in host memory or on disk under {policy}; /populate computes it");
    };
    if from != Tier::Device {
        chat.encode(index, Restore::Always)?;
    }
    chat.context.set_active(index, true);
    // a file that turned out to be damaged is not there any more
    let lost = from == Tier::Disk && !chat.tiers(chat.context.segments_to(index))?.disk;
    let source = if lost { "text, its file on disk was damaged" } else { from.as_str() };
    let millis = started.elapsed().as_secs_f64() * 1e3;
    let chunk = &chat.context.entries()[index].chunk;
    let (id, tokens) = (chunk.id, chunk.ids.len());
    let lines = [
        format!("✓ Chunk restored: {}...", id.short()),
        format!("  Size: {tokens} tokens"),
        format!("  From: {source}, {millis:.1} ms"),
    ];
    let facts = json!({
        "id": id.to_string(),
        "name": chunk.name,
        "tokens": tokens,
        "from": if lost { "text" } else { from.as_str() },
        "millis": millis,
    });
    Ok(Report::new("/restore", lines.join("\n"), facts))
}

/// A chunk of the context; else one of the store, which is put there, inactive.
fn find_or_fetch(chat: &mut Chat, name: &str) -> Result<usize> {
    let unknown = match chat.context.find(name) {
        Err(error @ Error::UnknownChunk { .. }) => error,
        found => return Ok(found?),
    };
    let Some(stored) = chat.keeper.find(name)? else { return Err(unknown.into()) };
    let (info, content) = (stored.info, stored.text.into_bytes());
    let chunk = chunk_file::chunk(&chat.engine, &info.name, info.kind, content)?;
    match chat.context.load(chunk, false) {
        Loaded::New(index) | Loaded::Already(index) => Ok(index),
    }
}

/// Makes sure a chunk's KV is on the device. One that is only in the store is put into the
/// context, inactive.
pub fn populate(chat: &mut Chat, name: &str) -> Result<Report> {
    unless_it_fails(chat, |chat| try_populate(chat, name))
}

fn try_populate(chat: &mut Chat, name: &str) -> Result<Report> {
    let index = find_or_fetch(chat, name)?;
    let started = Instant::now();
    let tiers = chat.tiers(chat.context.segments_to(index))?;
    let from = tiers.list().first().copied();
    if from != Some(Tier::Device) {
        chat.encode(index, Restore::Always)?;
    }
    let millis = started.elapsed().as_secs_f64() * 1e3;
    let id = chat.context.entries()[index].chunk.id;
    let source = from.map_or("text", Tier::as_str);
    let text = match from {
        Some(Tier::Device) => format!("already populated: {}...", id.short()),
        _ => format!("✓ Chunk populated: {}...\n  From: {source}, {millis:.1} ms", id.short()),
    };
    let facts = json!({
        "id": id.to_string(),
        "already_populated": from == Some(Tier::Device),
        "from": source,
        "millis": millis,
    });
    Ok(Report::new("/populate", text, facts))
}

/// Removes a chunk from the context, its KV from every tier and its text from the store.
pub fn erase(chat: &mut Chat, name: &str) -> Result<Report> {
    must_reach_the_disk(chat)?;
    let (id, index) = match chat.context.find(name) {
        Ok(index) => (chat.context.entries()[index].chunk.id, Some(index)),
        Err(error @ Error::UnknownChunk { .. }) => match chat.keeper.find(name)? {
            Some(stored) => (stored.info.id, None),
            None => return Err(error.into()),
        },
        Err(error) => return Err(error.into()),
    };
    erase_everywhere(chat, id)?;
    if let Some(index) = index {
        chat.context.remove(index);
    }
    let text = format!("✓ Chunk erased: {}...", id.short());
    Ok(Report::new("/erase", text, json!({"id": id.to_string()})))
}

/// Nothing is erased by halves: what can't be opened may well hold it.
fn must_reach_the_disk(chat: &Chat) -> Result<()> {
    match chat.keeper.no_store() {
        Some(reason) => {
            bail!("nothing can be erased: {reason}; /clear removes it from memory alone")
        }
        None => Ok(()),
    }
}

fn erase_everywhere(chat: &mut Chat, id: ChunkId) -> Result<()> {
    chat.engine.erase(id, None)?;
    chat.keeper.forget(id);
    Ok(())
}

/// Drops all chunks from the context and memory; with `saved`, from the disk too.
pub fn clear(chat: &mut Chat, saved: bool) -> Result<Report> {
    if saved {
        must_reach_the_disk(chat)?;
    }
    let ids: Vec<ChunkId> = chat.context.entries().iter().map(|entry| entry.chunk.id).collect();
    for &id in &ids {
        if saved {
            erase_everywhere(chat, id)?;
        } else {
            chat.engine.forget(id, None)?;
        }
    }
    chat.context.clear();
    let facts: Value = json!({"cleared": ids.len(), "saved": saved});
    Ok(Report::new("/clear", "✓ All chunks cleared", facts))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn save_takes_a_chunk_and_a_codec() {
        let parsed = |words: &[&str]| Save::parse(words.iter().map(ToString::to_string).collect());
        let all = Save { what: "all".into(), codec: None };
        assert_eq!(parsed(&["all"]), Some(all));
        let int8 = Save { what: "a b".into(), codec: Some(Codec::Int8) };
        assert_eq!(parsed(&["a b", "--codec", "int8"]), Some(int8));
        for bad in [&[][..], &["a", "b"], &["--codec", "raw"], &["a", "--codec", "zip"]] {
            assert_eq!(parsed(bad), None, "{bad:?}");
        }
    }
}
