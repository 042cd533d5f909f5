//! `POST /v1/embeddings`: by a model made for it, or by the language model's hidden states.
//!
//! Vectors have length 1 either way, so that a product of two is their cosine.

use std::path::Path;

use anyhow::{Context as _, Result};
use axum::Json;
use axum::extract::State;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use strand_engine::{Event, Request};
use strand_models::{EmbeddedText, Embedder};

use super::asking::blocking;
use super::auth::Principal;
use super::body::Asked;
use super::error::ApiError;
use super::prompt;
use super::state::App;
use super::wire::completions::Prompt;
use super::wire::embeddings::{Embedding, EmbeddingRequest, EmbeddingUsage, Embeddings, Vector};

/// A model made for embeddings, under the name that clients know.
pub struct EmbeddingModel {
    pub id: String,
    embedder: Embedder,
}

/// Texts that are in the engine at a time.
const AT_ONCE: usize = 16;

impl EmbeddingModel {
    pub fn open(folder: &Path) -> Result<Self> {
        let open = || Embedder::open(folder);
        let what = || format!("cannot use the embedding model in {}", folder.display());
        let name = folder.file_name().map(|name| name.to_string_lossy().into_owned());
        let id = name.unwrap_or_else(|| "embedding".to_owned());
        Ok(Self { id, embedder: open().with_context(what)? })
    }
}

pub async fn create(
    State(app): State<App>,
    principal: Principal,
    Asked(asked): Asked<EmbeddingRequest>,
) -> Result<Json<Embeddings>, ApiError> {
    let EmbeddingRequest { model, texts, as_base64, dimensions } = asked;
    let meter = app.quotas.meter(&principal.payer)?;
    let made_for_it =
        app.embedder.as_ref().filter(|embedder| model.is_empty() || model == embedder.id);
    let (id, embedded) = match made_for_it {
        Some(embedder) => (embedder.id.clone(), by_embedder(&app, texts).await?),
        None => {
            app.model.check(Some(&model))?;
            (app.model.id.clone(), by_language_model(&app, &principal, texts).await?)
        }
    };
    let dim = embedded.first().map_or(0, |one| one.vector.len());
    if let Some(asked) = dimensions.filter(|&asked| asked != dim) {
        let message = format!("dimensions is {asked}, this model's vectors have {dim}");
        return Err(ApiError::invalid("dimensions", message));
    }
    let tokens: usize = embedded.iter().map(|one| one.tokens).sum();
    meter.count(tokens);
    let data = embedded.into_iter().enumerate().map(|(index, one)| {
        let embedding = written(normalized(one.vector), as_base64);
        Embedding { object: "embedding", index, embedding }
    });
    Ok(Json(Embeddings {
        object: "list",
        data: data.collect(),
        model: id,
        usage: EmbeddingUsage { prompt_tokens: tokens, total_tokens: tokens },
    }))
}

async fn by_embedder(app: &App, texts: Vec<Prompt>) -> Result<Vec<EmbeddedText>, ApiError> {
    let texts = texts.into_iter().map(|prompt| match prompt {
        Prompt::Text(text) if !text.is_empty() => Ok(text),
        Prompt::Text(_) => Err(ApiError::invalid("input", "input has an empty text")),
        Prompt::Tokens(_) => {
            let message = "input must be text: this embedding model has token ids of its own";
            Err(ApiError::invalid("input", message))
        }
    });
    let texts: Vec<String> = texts.collect::<Result<_, _>>()?;
    blocking(app, move |server| {
        let model = server.embedder.as_ref().expect("it was found");
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        model.embedder.embed(&texts).map_err(|error| match error {
            strand_models::Error::TextTooLong { .. } => {
                let error = ApiError::invalid("input", error.to_string());
                ApiError { code: Some("context_length_exceeded"), ..error }
            }
            other => other.into(),
        })
    })
    .await
}

/// The mean of the hidden states behind the last layer.
async fn by_language_model(
    app: &App,
    principal: &Principal,
    texts: Vec<Prompt>,
) -> Result<Vec<EmbeddedText>, ApiError> {
    let prompts = blocking(app, move |server| {
        let ids = texts.into_iter().map(|text| match text {
            Prompt::Text(text) => {
                prompt::check_length(server, text.len(), "input")?;
                prompt::of_text(server, &text, true)
            }
            Prompt::Tokens(ids) => Ok(ids),
        });
        ids.collect::<Result<Vec<_>, _>>()
    });
    let salt = app.salt(&principal.tenant, None);
    let embedding = |tokens: Vec<u32>| {
        let request = Request { salt: salt.clone(), ..Request::embedding(tokens) };
        let tokens = request.prompt_tokens();
        async move {
            let mut events = app.engine.submit(request)?;
            match events.next().await {
                Some(Event::Embedding { vector }) => Ok(EmbeddedText { vector, tokens }),
                Some(Event::Failed(error)) => Err(match ApiError::from(error) {
                    error if error.param.is_some() => {
                        ApiError { param: Some("input".to_owned()), ..error }
                    }
                    other => other,
                }),
                _ => Err(ApiError::from(strand_engine::Error::Stopped)),
            }
        }
    };
    stream::iter(prompts.await?).map(embedding).buffered(AT_ONCE).try_collect().await
}

fn normalized(mut vector: Vec<f32>) -> Vec<f32> {
    let length = vector.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    if length > 0.0 {
        vector.iter_mut().for_each(|x| *x = (f64::from(*x) / length) as f32);
    }
    vector
}

/// Numbers, or their little-endian bytes in base64, which is what OpenAI's SDKs ask for.
fn written(vector: Vec<f32>, as_base64: bool) -> Vector {
    if !as_base64 {
        return Vector::Numbers(vector);
    }
    let bytes: Vec<u8> = vector.iter().flat_map(|x| x.to_le_bytes()).collect();
    Vector::Base64(BASE64_STANDARD.encode(bytes))
}
