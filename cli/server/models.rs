//! `GET /v1/models` and `GET /v1/models/{id}`.

use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};

use super::error::ApiError;
use super::query::Names;
use super::state::{App, Server};

pub async fn list(State(app): State<App>) -> Json<Value> {
    let embedder = app.embedder.iter().map(|model| embedding_entry(&app, &model.id));
    let data: Vec<Value> = std::iter::once(entry(&app)).chain(embedder).collect();
    Json(json!({"object": "list", "data": data}))
}

/// Ids may hold slashes.
pub async fn get(
    State(app): State<App>,
    Names(id): Names<String>,
) -> Result<Json<Value>, ApiError> {
    if app.embedder.as_ref().is_some_and(|model| model.id == id) {
        return Ok(Json(embedding_entry(&app, &id)));
    }
    app.model.check(Some(&id))?;
    Ok(Json(entry(&app)))
}

fn embedding_entry(server: &Server, id: &str) -> Value {
    json!({
        "id": id,
        "object": "model",
        "created": server.model.created,
        "owned_by": "strand",
        "embeddings": "by a model made for them",
    })
}

fn entry(server: &Server) -> Value {
    json!({
        "embeddings": "mean of the hidden states behind the last layer",
        "id": server.model.id,
        "object": "model",
        "created": server.model.created,
        "owned_by": "strand",
        "root": server.engine.model_name(),
        "parent": null,
        "max_model_len": server.engine.plan().max_model_len,
    })
}
