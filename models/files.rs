//! From what the user names to everything a model consists of.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use serde_json::Value;
use strand_kernels::WeightDtype;

use crate::chat_template::ChatTemplate;
use crate::config::ModelConfig;
use crate::error::Error;
use crate::fingerprint::{Fingerprint, digest};
use crate::gguf::GgufFile;
use crate::gguf_tokenizer::{chat_template_from_metadata, tokenizer_from_metadata};
use crate::hub::Hub;
use crate::keys::Keys;
use crate::random::Recipe;
use crate::tokenizer::Tokenizer;
use crate::weights::Weights;

/// Shapes of well-known models, for random weights: (name, config.json).
pub const PRESETS: &[(&str, &str)] = &[
    ("qwen3-0.6b", include_str!("presets/qwen3-0.6b.json")),
    ("qwen3-8b", include_str!("presets/qwen3-8b.json")),
    ("llama-3.2-1b", include_str!("presets/llama-3.2-1b.json")),
];

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelSource {
    /// config.json, safetensors, tokenizer.json
    Folder(PathBuf),
    Gguf(PathBuf),
    /// `org/name` on the Hugging Face hub
    Hub(String),
    /// The model that is part of the program
    Demo,
    /// A config's shapes, with weights nobody trained and no tokenizer
    Random {
        config_json: String,
        seed: u64,
        recipe: Option<Recipe>,
    },
}

impl ModelSource {
    /// Tells a folder, a `.gguf` file and a hub id apart. What exists on disk wins; what looks
    /// like a path and does not exist is an error, never a hub id.
    ///
    /// # Errors
    /// [`Error::NotAModel`], [`Error::UnknownSource`].
    pub fn parse(text: &str) -> Result<Self, Error> {
        let path = PathBuf::from(text);
        let is_gguf = path.extension().is_some_and(|end| end.eq_ignore_ascii_case("gguf"));
        if path.is_dir() {
            return Ok(ModelSource::Folder(path));
        }
        if path.is_file() && is_gguf {
            return Ok(ModelSource::Gguf(path));
        }
        let not_a_model =
            |reason: &str| Error::NotAModel { path: path.clone(), reason: reason.to_string() };
        if path.is_file() {
            return Err(not_a_model("it is a file, but no .gguf; name the folder it lies in"));
        }
        if is_gguf {
            return Err(not_a_model("there is no such file"));
        }
        if text.starts_with(['.', '/', '~']) {
            return Err(not_a_model("there is no such folder"));
        }
        if is_hub_id(text) {
            return Ok(ModelSource::Hub(text.to_string()));
        }
        Err(Error::UnknownSource { text: text.to_string() })
    }
}

/// `org/name`, each of letters, digits, dots, dashes and underscores, as the hub allows them.
fn is_hub_id(text: &str) -> bool {
    let is_name = |name: &str| {
        let inner = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        !name.is_empty()
            && name.len() <= 96
            && name.chars().all(inner)
            && !name.starts_with(['.', '-'])
            && !name.ends_with(['.', '-'])
    };
    text.split_once('/').is_some_and(|(owner, name)| is_name(owner) && is_name(name))
}

/// What a model's author recommends for sampling; what is not said is `None`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationDefaults {
    /// Ids that end an answer, ascending: of generation_config.json, config.json and the tokenizer.
    pub stop_token_ids: Vec<u32>,
    pub do_sample: Option<bool>,
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    pub top_k: Option<u32>,
    pub min_p: Option<f32>,
    pub repetition_penalty: Option<f32>,
}

impl GenerationDefaults {
    fn new(
        generation_config: Option<&str>,
        tokenizer_config: Option<&str>,
        tokenizer: Option<&Tokenizer>,
        config: &ModelConfig,
    ) -> Result<Self, Error> {
        let mut keys = Keys::parse("generation_config.json", generation_config.unwrap_or("{}"))?;
        let mut stops = keys.token_ids("eos_token_id")?;
        stops.extend(&config.eos_token_ids);
        let eos = tokenizer_config.map(eos_token).transpose()?.flatten();
        stops.extend(eos.and_then(|eos| tokenizer?.token_to_id(&eos)));
        stops.sort_unstable();
        stops.dedup();
        let mut number = |key: &str| keys.take(key).and_then(|value| value.as_f64());
        Ok(GenerationDefaults {
            stop_token_ids: stops,
            temperature: number("temperature").map(|value| value as f32),
            top_p: number("top_p").map(|value| value as f32),
            top_k: number("top_k").map(|value| value as u32),
            min_p: number("min_p").map(|value| value as f32),
            repetition_penalty: number("repetition_penalty").map(|value| value as f32),
            do_sample: keys.flag("do_sample")?,
        })
    }
}

/// `eos_token` of tokenizer_config.json: a string, or an object with its content.
fn eos_token(tokenizer_config: &str) -> Result<Option<String>, Error> {
    let mut keys = Keys::parse("tokenizer_config.json", tokenizer_config)?;
    let token = keys.take("eos_token");
    let text = token.as_ref().map(|token| token.get("content").unwrap_or(token));
    Ok(text.and_then(Value::as_str).map(str::to_string))
}

/// What `strand.json` beside a checkpoint says of how the model was trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Training {
    /// On chunks that see the anchor and themselves alone: they can be encoded independently.
    pub independent_chunks: bool,
}

impl Training {
    /// `{"reuse": "independent" or "exact", "anchor": text}`; the anchor is stated for people.
    fn parse(text: Option<&str>) -> Result<Self, Error> {
        let mut keys = Keys::parse("strand.json", text.unwrap_or("{}"))?;
        keys.text("anchor")?;
        let independent_chunks = match keys.text("reuse")?.as_deref() {
            None | Some("exact") => false,
            Some("independent") => true,
            Some(other) => {
                let expected = "expected \"independent\" or \"exact\"";
                return Err(keys.invalid("reuse", &other.into(), expected));
            }
        };
        keys.finish(|_, _| false)?;
        Ok(Self { independent_chunks })
    }
}

pub struct ModelFiles {
    /// How the model is called in answers: its hub id, or the name of its folder or file.
    pub name: String,
    pub config: ModelConfig,
    pub weights: Weights,
    pub tokenizer: Option<Tokenizer>,
    pub chat_template: Option<ChatTemplate>,
    pub generation: GenerationDefaults,
    pub training: Training,
    /// Of tokenizer.json; zeros where there is none beside the weights.
    pub tokenizer_digest: Fingerprint,
}

impl ModelFiles {
    /// Reads and checks everything but the weights' numbers, which stay where they are until
    /// [`Weights::packed`] asks for them.
    ///
    /// # Errors
    /// Any of [`Error`].
    pub fn open(source: &ModelSource) -> Result<Self, Error> {
        match source {
            ModelSource::Folder(folder) => {
                let texts = Texts::of_folder(folder)?;
                let weights = Weights::open_safetensors(folder)?;
                Self::assemble(name_of(folder), &texts, weights)
            }
            ModelSource::Gguf(path) => Self::of_gguf(path),
            ModelSource::Hub(id) => {
                let folder = Hub::from_env().fetch(id)?;
                let opened = Self::open(&ModelSource::Folder(folder))?;
                Ok(ModelFiles { name: id.clone(), ..opened })
            }
            ModelSource::Demo => {
                let bytes = include_bytes!("demo/model.safetensors");
                let weights = Weights::from_static("the bundled model", bytes)?;
                Self::assemble("strand-demo".to_string(), &Texts::of_demo(), weights)
            }
            ModelSource::Random { config_json, seed, recipe } => {
                let mut config = ModelConfig::from_json(config_json)?;
                if recipe.is_some() {
                    config.dtype = WeightDtype::Quantized;
                }
                Ok(ModelFiles {
                    name: "random".to_string(),
                    weights: Weights::random(&config, *seed, *recipe),
                    generation: GenerationDefaults::new(None, None, None, &config)?,
                    training: Training::default(),
                    tokenizer_digest: Fingerprint::default(),
                    config,
                    tokenizer: None,
                    chat_template: None,
                })
            }
        }
    }

    fn assemble(name: String, texts: &Texts, weights: Weights) -> Result<Self, Error> {
        let (mut config, declared) = ModelConfig::parse(&texts.config)?;
        // A config that does not say leaves it to the weights, as transformers does.
        let stored = || weights.stored_dtype("model.embed_tokens.weight");
        if let Some(dtype) = declared.or_else(stored) {
            config.dtype = dtype;
        }
        weights.set_tied_copy_aside(&config)?;
        let tokenizer = texts.tokenizer.as_deref().map(Tokenizer::from_bytes).transpose()?;
        let tokenizer_config = texts.tokenizer_config.as_deref();
        let chat_template = ChatTemplate::from_tokenizer_config(
            tokenizer_config.unwrap_or("{}"),
            texts.chat_template.as_deref(),
        )?;
        let generation = texts.generation_config.as_deref();
        Ok(ModelFiles {
            name,
            training: Training::parse(texts.strand.as_deref())?,
            tokenizer_digest: texts.tokenizer.as_deref().map(digest).unwrap_or_default(),
            generation: GenerationDefaults::new(
                generation,
                tokenizer_config,
                tokenizer.as_ref(),
                &config,
            )?,
            config,
            weights,
            tokenizer,
            chat_template,
        })
    }

    fn of_gguf(path: &Path) -> Result<Self, Error> {
        let file = GgufFile::open(path)?;
        // A file may leave out its vocabulary; then it takes token ids alone.
        let has_vocabulary = file.metadata.contains_key("tokenizer.ggml.tokens");
        let tokenizer = has_vocabulary.then(|| tokenizer_from_metadata(&file.metadata));
        let chat_template = has_vocabulary.then(|| chat_template_from_metadata(&file.metadata));
        Ok(ModelFiles {
            name: name_of(&path.with_extension("")),
            generation: GenerationDefaults::new(None, None, None, &file.config)?,
            config: file.config,
            weights: Weights::from_gguf(file.tensors),
            training: Training::default(),
            tokenizer_digest: Fingerprint::default(),
            tokenizer: tokenizer.transpose()?,
            chat_template: chat_template.transpose()?.flatten(),
        })
    }
}

/// The text files of a checkpoint.
struct Texts {
    config: Cow<'static, str>,
    generation_config: Option<Cow<'static, str>>,
    tokenizer: Option<Cow<'static, [u8]>>,
    tokenizer_config: Option<Cow<'static, str>>,
    chat_template: Option<Cow<'static, str>>,
    strand: Option<Cow<'static, str>>,
}

impl Texts {
    fn of_folder(folder: &Path) -> Result<Self, Error> {
        let text = |name: &str| {
            let path = folder.join(name);
            match std::fs::read_to_string(&path) {
                Ok(text) => Ok(Some(Cow::Owned(text))),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
                Err(source) => Err(Error::Io { path, source }),
            }
        };
        let config = text("config.json")?.ok_or_else(|| {
            let reason = match folder.is_dir() {
                true => "it holds no config.json",
                false => "there is no such folder",
            };
            Error::NotAModel { path: folder.to_path_buf(), reason: reason.to_string() }
        })?;
        let into_bytes = |text: Cow<'static, str>| Cow::Owned(text.into_owned().into_bytes());
        Ok(Texts {
            config,
            generation_config: text("generation_config.json")?,
            tokenizer: text("tokenizer.json")?.map(into_bytes),
            tokenizer_config: text("tokenizer_config.json")?,
            chat_template: text("chat_template.jinja")?,
            strand: text("strand.json")?,
        })
    }

    fn of_demo() -> Self {
        Texts {
            config: Cow::Borrowed(include_str!("demo/config.json")),
            generation_config: Some(Cow::Borrowed(include_str!("demo/generation_config.json"))),
            tokenizer: Some(Cow::Borrowed(include_bytes!("demo/tokenizer.json"))),
            tokenizer_config: Some(Cow::Borrowed(include_str!("demo/tokenizer_config.json"))),
            chat_template: None,
            strand: Some(Cow::Borrowed(include_str!("demo/strand.json"))),
        }
    }
}

fn name_of(path: &Path) -> String {
    let absolute = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    let name = absolute.file_name().unwrap_or(absolute.as_os_str());
    name.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests;
