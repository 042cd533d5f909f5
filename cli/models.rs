//! `strand models`: what there is, what it is made of, and how to get more.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use strand_models::{Hub, ModelFiles, ModelSource};

use crate::args::{CommonArgs, ModelsCommand};
use crate::{Outcome, byte_size, load};

/// How the list calls the model that is part of the program.
const DEMO: &str = "strand-demo";

pub fn run(command: &ModelsCommand, common: &CommonArgs) -> Result<Outcome> {
    match command {
        ModelsCommand::List => list(common.json)?,
        ModelsCommand::Pull { id } => pull(id, common.json)?,
        ModelsCommand::Show { model } => show(&load::source(model.as_deref())?, common.json)?,
    }
    Ok(Outcome::Done)
}

fn list(json: bool) -> io::Result<()> {
    let mut out = io::stdout().lock();
    let cached = Hub::from_env().cached();
    if json {
        writeln!(out, "{}", json!({"id": DEMO, "path": null, "bytes": null, "bundled": true}))?;
        for model in &cached {
            let row = json!({
                "id": model.id, "path": model.path, "bytes": model.bytes, "bundled": false,
            });
            writeln!(out, "{row}")?;
        }
        return Ok(());
    }
    let width = cached.iter().map(|model| model.id.len()).max().unwrap_or(0).max(DEMO.len());
    writeln!(out, "{DEMO:<width$}  {:>10}  (no MODEL given)", "bundled")?;
    for model in &cached {
        let size = byte_size::format(model.bytes);
        writeln!(out, "{:<width$}  {size:>10}  {}", model.id, model.path.display())?;
    }
    Ok(())
}

fn pull(id: &str, json: bool) -> Result<()> {
    if !matches!(ModelSource::parse(id), Ok(ModelSource::Hub(_))) {
        let text = format!("{id} is no hub id; expected one like Qwen/Qwen3-0.6B");
        return Err(crate::UsageError(text).into());
    }
    let path = Hub::from_env().fetch(id)?;
    let bytes: u64 = files(&path)?.iter().map(|file| file.1).sum();
    let mut out = io::stdout().lock();
    if json {
        writeln!(out, "{}", json!({"id": id, "path": path, "bytes": bytes}))?;
    } else {
        writeln!(out, "{id}  {}  {}", byte_size::format(bytes), path.display())?;
    }
    Ok(())
}

fn show(source: &ModelSource, json: bool) -> Result<()> {
    let model = ModelFiles::open(source)?;
    let files = match source {
        ModelSource::Folder(path) => files(path)?,
        ModelSource::Hub(id) => files(&Hub::from_env().fetch(id)?)?,
        ModelSource::Gguf(path) => vec![one_file(path)?],
        ModelSource::Demo | ModelSource::Random { .. } => Vec::new(),
    };
    let mut facts = describe(&model);
    let listed = files.iter().map(|(name, bytes)| json!({"name": name, "bytes": bytes}));
    facts["files"] = listed.collect();
    let mut out = io::stdout().lock();
    if json {
        writeln!(out, "{facts}")?;
        return Ok(());
    }
    for (name, value) in facts.as_object().into_iter().flatten() {
        if name != "files" {
            writeln!(out, "{:<18} {}", name.replace('_', " "), plain(value))?;
        }
    }
    if files.is_empty() {
        writeln!(out, "{:<18} part of the program", "files")?;
    }
    for (index, (name, bytes)) in files.iter().enumerate() {
        let label = if index == 0 { "files" } else { "" };
        writeln!(out, "{label:<18} {:>10}  {name}", byte_size::format(*bytes))?;
    }
    Ok(())
}

fn describe(model: &ModelFiles) -> Value {
    let config = &model.config;
    let windows = config.sliding_window.iter().flatten();
    json!({
        "name": model.name,
        "architecture": format!("{:?}", config.architecture),
        "parameters": config.num_parameters(),
        "dtype": config.dtype.name(),
        "context": config.max_position_embeddings,
        "sliding_window": windows.min(),
        "vocabulary": config.vocab_size,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_size": config.head_dim,
        "tied_embeddings": config.tie_word_embeddings,
        "tokenizer": model.tokenizer.is_some(),
        "chat_template": model.chat_template.is_some(),
        "stop_tokens": model.generation.stop_token_ids,
    })
}

/// A value as people read it.
fn plain(value: &Value) -> String {
    match value {
        Value::Bool(true) => "yes".to_owned(),
        Value::Bool(false) => "no".to_owned(),
        Value::Null => "none".to_owned(),
        Value::String(text) => text.clone(),
        Value::Array(values) => values.iter().map(plain).collect::<Vec<_>>().join(", "),
        other => other.to_string(),
    }
}

/// Names and sizes of a folder's files, by name.
fn files(folder: &Path) -> Result<Vec<(String, u64)>> {
    let entries = fs::read_dir(folder)
        .and_then(Iterator::collect::<io::Result<Vec<_>>>)
        .with_context(|| format!("cannot list {}", folder.display()))?;
    let paths: Vec<PathBuf> = entries.iter().map(fs::DirEntry::path).collect();
    let mut files: Vec<_> = paths
        .iter()
        .filter(|path| path.is_file())
        .map(|path| one_file(path))
        .collect::<Result<_>>()?;
    files.sort();
    Ok(files)
}

fn one_file(path: &Path) -> Result<(String, u64)> {
    let data = fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?;
    let name = path.file_name().unwrap_or(path.as_os_str());
    Ok((name.to_string_lossy().into_owned(), data.len()))
}
