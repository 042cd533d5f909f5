//! Commands that tell about the program, the model and its work.

use anyhow::Result;
use serde_json::json;

use super::{Report, TABLE};
use crate::answer::{reuse_json, reuse_text};
use crate::byte_size;
use crate::chat::Chat;

pub fn stats(chat: &Chat) -> Result<Report> {
    let (engine, plan, totals) = (chat.engine.stats()?, chat.engine.plan(), &chat.totals);
    let seconds = totals.decode_time.as_secs_f64();
    let speed = (seconds > 0.0).then(|| totals.decoded_tokens as f64 / seconds);
    let reuse = totals.reuse;
    let prompts = reuse.cached() + reuse.encoded + reuse.recomputed;
    let in_use = engine.blocks - engine.blocks_free;
    let pool = byte_size::format(engine.blocks as u64 * plan.block_bytes);
    let lines = [
        format!("Answers:   {}", totals.answers),
        format!("Context:   {} of {} tokens", totals.context_tokens, plan.max_model_len),
        format!("Prompts:   {prompts} tokens: {}", reuse_text(reuse)),
        format!(
            "Generated: {} tokens{}",
            totals.generated_tokens,
            speed.map_or(String::new(), |speed| format!(" at {speed:.1} tokens/s"))
        ),
        format!(
            "KV pool:   {} blocks ({pool}), {in_use} in use, {} kept for reuse",
            engine.blocks, engine.blocks_idle
        ),
        format!(
            "Host:      {} of {}",
            byte_size::format(engine.host_bytes),
            byte_size::format(engine.host_budget)
        ),
    ];
    let facts = json!({
        "answers": totals.answers,
        "context_tokens": totals.context_tokens,
        "max_model_len": plan.max_model_len,
        "reuse": reuse_json(reuse),
        "generated_tokens": totals.generated_tokens,
        "decode_tokens_per_second": speed,
        "blocks": engine.blocks,
        "blocks_in_use": in_use,
        "blocks_idle": engine.blocks_idle,
        "host_bytes": engine.host_bytes,
        "host_budget": engine.host_budget,
    });
    Ok(Report::new("/stats", lines.join("\n"), facts))
}

pub fn model(chat: &Chat) -> Report {
    let (name, plan) = (chat.engine.model_name(), chat.engine.plan());
    let facts = json!({
        "model": name,
        "device": plan.device,
        "dtype": plan.dtype.name(),
        "kv_dtype": plan.kv_dtype.name(),
        "vocabulary": plan.vocab_size,
        "max_model_len": plan.max_model_len,
        "block_size": plan.block_size,
        "blocks": plan.num_blocks,
        "threads": plan.threads,
    });
    Report::new("/model", format!("{name}\n{plan}"), facts)
}

pub fn help() -> Report {
    let call = |name: &str, arguments: &str| format!("{name} {arguments}").trim_end().to_owned();
    let calls: Vec<String> = TABLE.iter().map(|e| call(e.name, e.arguments)).collect();
    let width = calls.iter().map(String::len).max().unwrap_or(0);
    let lines: Vec<String> = calls
        .iter()
        .zip(&TABLE)
        .map(|(call, entry)| format!("{call:<width$}  {}", entry.does))
        .collect();
    let commands = TABLE.iter();
    let commands: Vec<_> = commands
        .map(|e| json!({"name": e.name, "arguments": e.arguments, "does": e.does}))
        .collect();
    Report::new("/help", lines.join("\n"), json!({"commands": commands}))
}
