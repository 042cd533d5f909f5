//! Commands that look at chunks and switch them on and off.

use std::collections::HashMap;

use anyhow::{Result, anyhow};
use serde_json::{Value, json};
use strand_engine::context::ReusePolicy;
use strand_engine::{ChunkId, Tier, TiersOf};

use super::Report;
use crate::byte_size;
use crate::chat::Chat;

/// A line of the table.
pub struct Row {
    pub id: ChunkId,
    pub name: String,
    pub tokens: usize,
    /// First and last position; `None` while it is inactive.
    pub position: Option<(usize, usize)>,
    tiers: TiersOf,
    /// In the pool.
    bytes: u64,
    cells: [String; 8],
    pub facts: Value,
}

const HEADER: [&str; 8] = ["#", "Hash", "Name", "State", "Tiers", "Tokens", "Bytes", "Preview"];
const PREVIEW: usize = 30;

/// All lines of the table, for one question to the engine.
pub fn rows(chat: &Chat) -> Result<Vec<Row>> {
    let tiers = chat.all_tiers()?;
    let places = chat.context.positions().into_iter().zip(tiers);
    let rows = places.enumerate();
    Ok(rows.map(|(index, (position, tiers))| row(chat, index, position, tiers)).collect())
}

fn row(chat: &Chat, index: usize, position: Option<(usize, usize)>, tiers: TiersOf) -> Row {
    let entry = &chat.context.entries()[index];
    let (chunk, plan) = (&entry.chunk, chat.engine.plan());
    let names: Vec<&str> = tiers.list().into_iter().map(Tier::as_str).collect();
    let tokens = chunk.ids.len();
    let bytes = tokens.div_ceil(plan.block_size) as u64 * plan.block_bytes;
    let preview: String = chunk.text.split_whitespace().take(PREVIEW).collect::<Vec<_>>().join(" ");
    let cells = [
        format!("#{}", index + 1),
        chunk.id.short(),
        chunk.name.clone(),
        if entry.active { "active" } else { "inactive" }.to_owned(),
        if names.is_empty() { "-".to_owned() } else { names.join(",") },
        tokens.to_string(),
        byte_size::format(bytes),
        preview.chars().take(PREVIEW).collect(),
    ];
    let mut facts = brief(chat, index, position);
    facts["tiers"] = names.into();
    facts["bytes"] = bytes.into();
    let (id, name) = (chunk.id, chunk.name.clone());
    Row { id, name, tokens, position, tiers, bytes, cells, facts }
}

/// What can be told of a chunk without asking the engine.
fn brief(chat: &Chat, index: usize, position: Option<(usize, usize)>) -> Value {
    let entry = &chat.context.entries()[index];
    json!({
        "id": entry.chunk.id.to_string(),
        "name": entry.chunk.name,
        "active": entry.active,
        "tokens": entry.chunk.ids.len(),
        "position": position.map(|(first, last)| [first, last]),
    })
}

/// Bytes of KV in each tier.
struct Held {
    device: u64,
    host: u64,
    disk: u64,
}

fn held(chat: &Chat, rows: &[Row]) -> Result<Held> {
    let token_bytes = chat.engine.plan().token_bytes();
    let on_device = rows.iter().filter(|row| row.tiers.device);
    let in_host = rows.iter().filter(|row| row.tiers.host);
    let mut on_disk: HashMap<ChunkId, u64> = HashMap::new();
    for file in chat.keeper.kv_files()? {
        *on_disk.entry(file.chunk).or_default() += file.bytes;
    }
    Ok(Held {
        device: on_device.map(|row| row.bytes).sum(),
        host: in_host.map(|row| row.tokens as u64 * token_bytes).sum(),
        disk: rows.iter().filter_map(|row| on_disk.get(&row.id)).sum(),
    })
}

/// The table, and what is used and free.
pub fn context(chat: &Chat) -> Result<Report> {
    let rows = rows(chat)?;
    let total = chat.engine.plan().max_model_len;
    let used = chat.used_tokens()?;
    // more than there is may be switched on; the next question says so
    let free = total.saturating_sub(used);
    let held = held(chat, &rows)?;
    let mut lines = vec![
        "Context Status:".to_owned(),
        format!("Total: {total} tokens"),
        format!("Used: {used} tokens"),
        format!("Free: {free} tokens"),
        format!("Policy: {}", chat.context.policy().as_str()),
        format!("Device: {}", byte_size::format(held.device)),
        format!("Host: {}", byte_size::format(held.host)),
        format!("Disk: {}", byte_size::format(held.disk)),
    ];
    if !rows.is_empty() {
        let header = HEADER.map(str::to_owned);
        lines.extend(aligned(std::iter::once(&header).chain(rows.iter().map(|row| &row.cells))));
    }
    let facts = json!({
        "total_tokens": total,
        "used_tokens": used,
        "free_tokens": free,
        "policy": chat.context.policy().as_str(),
        "tiers": {"device": held.device, "host": held.host, "disk": held.disk},
        "chunks": rows.into_iter().map(|row| row.facts).collect::<Vec<_>>(),
    });
    Ok(Report::new("/context", lines.join("\n"), facts))
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

/// Flips the flags of all named chunks, or of none where one is unknown. Asks the engine nothing.
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
    let positions = chat.context.positions();
    let chunks: Vec<Value> =
        found.iter().map(|&index| brief(chat, index, positions[index])).collect();
    Ok(Report::new(command, lines.join("\n"), json!({"chunks": chunks})))
}

/// All there is to know of a chunk, its text included.
pub fn show(chat: &Chat, name: &str) -> Result<Report> {
    let index = chat.context.find(name)?;
    let position = chat.context.positions()[index];
    let row = row(chat, index, position, chat.tiers(chat.context.segments_to(index))?);
    let chunk = &chat.context.entries()[index].chunk;
    let stored = chat.keeper.chunk(chunk.id)?.map(|stored| stored.info);
    let tags = stored.as_ref().map_or(Vec::new(), |info| info.tags.clone());
    let mut lines = vec![
        format!("Hash: {}", chunk.id),
        format!("Name: {} ({})", chunk.name, chunk.kind.as_str()),
    ];
    for (name, cell) in HEADER.iter().zip(&row.cells).skip(3).take(4) {
        lines.push(format!("{name}: {cell}"));
    }
    if let Some((first, last)) = position {
        lines.push(format!("Position: {first}-{last}"));
    }
    lines.push(format!("Tags: {}", if tags.is_empty() { "-".into() } else { tags.join(", ") }));
    lines.push(format!("Kept on disk: {}", if stored.is_some() { "yes" } else { "no" }));
    lines.push(chunk.text.clone());
    let mut facts = row.facts;
    facts["kind"] = chunk.kind.as_str().into();
    facts["tags"] = tags.into();
    facts["kept"] = stored.is_some().into();
    facts["created"] = stored.map(|info| info.created).into();
    facts["text"] = chunk.text.as_str().into();
    Ok(Report::new("/show", lines.join("\n"), facts))
}

/// Adds a tag, which is kept with the chunk's text.
pub fn tag(chat: &mut Chat, name: &str, tag: &str) -> Result<Report> {
    let index = chat.context.find(name)?;
    let chunk = &chat.context.entries()[index].chunk;
    chat.keeper.keep_text(chunk)?;
    chat.keeper.store()?.add_tag(chunk.id, tag)?;
    let tags = chat.keeper.chunk(chunk.id)?.map_or(Vec::new(), |stored| stored.info.tags);
    let text = format!("✓ Chunk tagged: {}... {}", chunk.id.short(), tags.join(", "));
    Ok(Report::new("/tag", text, json!({"id": chunk.id.to_string(), "tags": tags})))
}

/// Shows or sets the reuse policy.
pub fn policy(chat: &mut Chat, name: Option<&str>) -> Result<Report> {
    if let Some(name) = name {
        let known = || ReusePolicy::ALL.map(ReusePolicy::as_str).join(", ");
        let policy = ReusePolicy::parse(name);
        let policy =
            policy.ok_or_else(|| anyhow!("Unknown policy: {name}. Policies: {}", known()))?;
        chat.context.set_policy(policy);
    }
    let policy = chat.context.policy().as_str();
    Ok(Report::new("/policy", format!("Policy: {policy}"), json!({"policy": policy})))
}
