//! `GET /v1/models` and `GET /v1/models/{id}`.

use axum::Json;
use axum::extract::{Path, State};
use serde_json::{Value, json};

use super::error::ApiError;
use super::state::{App, Server};

pub async fn list(State(app): State<App>) -> Json<Value> {
    Json(json!({"object": "list", "data": [entry(&app)]}))
}

/// Ids may hold slashes.
pub async fn get(State(app): State<App>, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    app.model.check(Some(&id))?;
    Ok(Json(entry(&app)))
}

fn entry(server: &Server) -> Value {
    json!({
        "id": server.model.id,
        "object": "model",
        "created": server.model.created,
        "owned_by": "strand",
        "root": server.engine.model_name(),
        "parent": null,
        "max_model_len": server.engine.plan().max_model_len,
    })
}
