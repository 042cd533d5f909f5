//! What happens to every request before its handler, and to every answer behind it.

use std::time::Instant;

use axum::extract::{Request, State};
use axum::http::HeaderValue;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use uuid::Uuid;

use super::state::App;

/// Refuses requests that call the server by a foreign name.
pub async fn check_host(State(app): State<App>, request: Request, next: Next) -> Response {
    match app.hosts.check(request.version(), request.headers()) {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    }
}

/// Names the request for the log and in `x-request-id`, and logs its end.
pub async fn observe(request: Request, next: Next) -> Response {
    let started = Instant::now();
    let id = format!("req_{}", Uuid::new_v4().simple());
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let mut response = next.run(request).await;
    let header = HeaderValue::from_str(&id).expect("letters and digits");
    response.headers_mut().insert("x-request-id", header);
    let millis = started.elapsed().as_secs_f64() * 1e3;
    let status = response.status().as_u16();
    tracing::info!(id, %method, ?path, status, millis, "answered");
    response
}
