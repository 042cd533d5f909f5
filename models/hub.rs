//! Models of the Hugging Face hub: found in its cache, downloaded when they are not there.
//!
//! The cache is the one every tool of the hub shares (`HF_HOME`, else `~/.cache/huggingface`), in
//! its layout. A model that is complete there is used without a word to the network.

use std::path::{Path, PathBuf};

use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo};

use crate::error::Error;
use crate::safetensors::{INDEX_FILE, SINGLE_FILE, read_index};

const CONFIG_FILE: &str = "config.json";

/// Small files, fetched before the weights where the repository has them: weights that are there
/// then say that the rest is, too.
const SMALL_FILES: &[&str] = &[
    CONFIG_FILE,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
];

pub struct Hub {
    cache: Cache,
    endpoint: Option<String>,
    token: Option<String>,
    offline: bool,
    progress: bool,
}

/// A model of the cache, for `strand models list`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CachedModel {
    pub id: String,
    /// The folder of its files.
    pub path: PathBuf,
    pub bytes: u64,
}

impl Hub {
    /// As the environment says: `HF_HOME`, `HF_ENDPOINT`, `HF_TOKEN` (else the token that the
    /// hub's own login left in the cache) and `HF_HUB_OFFLINE`.
    pub fn from_env() -> Self {
        let set = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let cache = Cache::from_env();
        Hub {
            token: set("HF_TOKEN").or_else(|| cache.token()),
            cache,
            endpoint: set("HF_ENDPOINT"),
            offline: set("HF_HUB_OFFLINE").is_some_and(|value| is_true(&value)),
            progress: true,
        }
    }

    /// A cache folder (the one named `hub`) and the public hub, without token or progress bars.
    pub fn new(cache: impl Into<PathBuf>) -> Self {
        Hub {
            cache: Cache::new(cache.into()),
            endpoint: None,
            token: None,
            offline: false,
            progress: false,
        }
    }

    pub fn with_endpoint(self, endpoint: impl Into<String>) -> Self {
        Hub { endpoint: Some(endpoint.into()), ..self }
    }

    pub fn with_token(self, token: impl Into<String>) -> Self {
        Hub { token: Some(token.into()), ..self }
    }

    /// Only what the cache holds.
    pub fn offline(self) -> Self {
        Hub { offline: true, ..self }
    }

    /// The folder with the files of model `id`, downloaded if need be; progress goes to standard
    /// error.
    ///
    /// # Errors
    /// [`Error::HubOffline`], [`Error::HubDenied`], [`Error::HubNoModel`],
    /// [`Error::HubNotFound`], [`Error::HubFailed`].
    pub fn fetch(&self, id: &str) -> Result<PathBuf, Error> {
        match self.snapshot(id) {
            Some(folder) if missing_weights(&folder)?.is_none() => Ok(folder),
            found if self.offline => Err(Error::HubOffline {
                id: id.to_string(),
                file: match found {
                    None => CONFIG_FILE.to_string(),
                    Some(folder) => missing_weights(&folder)?.unwrap_or_default(),
                },
                cache: self.cache.path().clone(),
            }),
            _ => self.download(id),
        }
    }

    /// The models whose config is in the cache, by id.
    pub fn cached(&self) -> Vec<CachedModel> {
        let Ok(entries) = std::fs::read_dir(self.cache.path()) else {
            return Vec::new();
        };
        let of_entry = |entry: std::io::Result<std::fs::DirEntry>| {
            let name = entry.ok()?.file_name().into_string().ok()?;
            // A repository's owner has no double dash in its name.
            let id = name.strip_prefix("models--")?.replacen("--", "/", 1);
            let path = self.snapshot(&id)?;
            let bytes = size_of_files(&path);
            Some(CachedModel { id, path, bytes })
        };
        let mut models: Vec<CachedModel> = entries.filter_map(of_entry).collect();
        models.sort_by(|a, b| a.id.cmp(&b.id));
        models
    }

    fn snapshot(&self, id: &str) -> Option<PathBuf> {
        let config = self.cache.model(id.to_string()).get(CONFIG_FILE)?;
        config.parent().map(Path::to_path_buf)
    }

    fn download(&self, id: &str) -> Result<PathBuf, Error> {
        let mut builder = ApiBuilder::from_cache(self.cache.clone())
            .with_token(self.token.clone())
            .with_progress(self.progress);
        if let Some(endpoint) = &self.endpoint {
            builder = builder.with_endpoint(endpoint.trim_end_matches('/').to_string());
        }
        let api = builder.build().map_err(|error| failed(id, CONFIG_FILE, &error))?;
        let repo = api.repo(Repo::model(id.to_string()));
        let info = repo.info().map_err(|error| match failed(id, "the list of files", &error) {
            Error::HubNotFound { id, .. } => Error::HubNoModel { id },
            other => other,
        })?;
        let has = |name: &str| info.siblings.iter().any(|file| file.rfilename == name);
        if !has(CONFIG_FILE) {
            return Err(not_found(id, CONFIG_FILE));
        }
        let weights = match (has(SINGLE_FILE), has(INDEX_FILE)) {
            (true, _) => SINGLE_FILE,
            (false, true) => INDEX_FILE,
            (false, false) => return Err(not_found(id, SINGLE_FILE)),
        };
        let mut files: Vec<String> = SMALL_FILES.iter().map(|name| name.to_string()).collect();
        files.retain(|name| has(name));
        files.push(weights.to_string());
        let fetched = get_all(&repo, id, &files)?;
        if weights == INDEX_FILE {
            let map = read_index(&fetched.join(INDEX_FILE))?;
            files.extend(map.into_values());
            files.sort_unstable();
            files.dedup();
        }
        // A second time: the repository may have moved on between two files, and then the ones
        // fetched before are of another revision.
        get_all(&repo, id, &files)?;
        get_all(&repo, id, &files)
    }
}

/// Fetches what is not in the cache yet; returns the folder of the last file.
fn get_all(repo: &ApiRepo, id: &str, files: &[String]) -> Result<PathBuf, Error> {
    let mut folder = PathBuf::new();
    for file in files {
        let path = repo.get(file).map_err(|error| failed(id, file, &error))?;
        folder = path.parent().map(Path::to_path_buf).unwrap_or_default();
    }
    Ok(folder)
}

/// The first weight file that a snapshot lacks.
fn missing_weights(folder: &Path) -> Result<Option<String>, Error> {
    if folder.join(SINGLE_FILE).is_file() {
        return Ok(None);
    }
    let index = folder.join(INDEX_FILE);
    if !index.is_file() {
        return Ok(Some(SINGLE_FILE.to_string()));
    }
    let shards = read_index(&index)?;
    Ok(shards.into_values().find(|shard| !folder.join(shard).is_file()))
}

fn size_of_files(folder: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return 0;
    };
    // Through the links: the files themselves lie elsewhere in the cache.
    let size = |path: PathBuf| std::fs::metadata(path).ok().filter(|data| data.is_file());
    entries.flatten().filter_map(|entry| size(entry.path())).map(|data| data.len()).sum()
}

fn is_true(value: &str) -> bool {
    matches!(value.to_ascii_lowercase().as_str(), "1" | "true" | "yes" | "on")
}

fn not_found(id: &str, file: &str) -> Error {
    Error::HubNotFound { id: id.to_string(), file: file.to_string() }
}

fn failed(id: &str, file: &str, error: &ApiError) -> Error {
    let text = error.to_string();
    // The client's error type is not ours to name; its text carries the status.
    let status = text.split_once("http status: ").and_then(|(_, rest)| rest.trim().parse().ok());
    match status {
        Some(status @ (401 | 403)) => Error::HubDenied { id: id.to_string(), status },
        Some(404) => not_found(id, file),
        _ => Error::HubFailed { id: id.to_string(), file: file.to_string(), reason: text },
    }
}

#[cfg(test)]
mod tests;
