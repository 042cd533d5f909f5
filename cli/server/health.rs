//! Whether the server lives, can answer, and which one it is.

use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};

use super::asking::blocking;
use super::error::ApiError;
use super::state::App;

/// 200 while the engine's thread runs.
pub async fn health(State(app): State<App>) -> Result<Json<Value>, ApiError> {
    blocking(&app, |server| Ok(server.engine.stats()?)).await?;
    Ok(Json(json!({"status": "ok"})))
}

/// 200 when requests are served. Nothing listens before the model is loaded, so this is what
/// [`health`] says.
pub async fn ready(State(app): State<App>) -> Result<Json<Value>, ApiError> {
    health(State(app)).await
}

pub async fn version() -> Json<Value> {
    Json(json!({"version": env!("CARGO_PKG_VERSION")}))
}
