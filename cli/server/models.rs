//! `GET /v1/models` and `GET /v1/models/{id}`.

use axum::Json;
use axum::extract::State;

use super::error::ApiError;
use super::query::Names;
use super::state::{App, Server};
use super::wire::models::{ModelList, ModelObject};

pub async fn list(State(app): State<App>) -> Json<ModelList> {
    let embedder = app.embedder.iter().map(|model| embedding_entry(&app, &model.id));
    let data = std::iter::once(entry(&app)).chain(embedder).collect();
    Json(ModelList { object: "list", data })
}

/// Ids may hold slashes.
pub async fn get(
    State(app): State<App>,
    Names(id): Names<String>,
) -> Result<Json<ModelObject>, ApiError> {
    if app.embedder.as_ref().is_some_and(|model| model.id == id) {
        return Ok(Json(embedding_entry(&app, &id)));
    }
    app.model.check(Some(&id))?;
    Ok(Json(entry(&app)))
}

fn embedding_entry(server: &Server, id: &str) -> ModelObject {
    ModelObject {
        id: id.to_owned(),
        object: "model",
        created: server.model.created,
        owned_by: "strand",
        embeddings: "by a model made for them",
        parent: None,
        root: None,
        max_model_len: None,
    }
}

fn entry(server: &Server) -> ModelObject {
    ModelObject {
        embeddings: "mean of the hidden states behind the last layer",
        root: Some(server.engine.model_name().to_owned()),
        max_model_len: Some(server.engine.plan().max_model_len),
        ..embedding_entry(server, &server.model.id)
    }
}
