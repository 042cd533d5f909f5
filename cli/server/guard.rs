//! What happens to every request before its handler, and to every answer behind it.

use std::any::Any;
use std::time::Instant;

use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderName, HeaderValue};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use tower_http::cors::{AllowHeaders, AllowMethods, CorsLayer};
use tracing::{Instrument, field};
use uuid::Uuid;

use super::error::ApiError;
use super::state::App;

/// Refuses requests that call the server by a foreign name.
pub async fn check_host(State(app): State<App>, request: Request, next: Next) -> Response {
    match app.hosts.check(request.version(), request.headers()) {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    }
}

/// Lets the pages of these sites ask.
pub fn cors(origins: &[HeaderValue]) -> CorsLayer {
    CorsLayer::new()
        .allow_origin(origins.to_vec())
        .allow_methods(AllowMethods::mirror_request())
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers([HeaderName::from_static("x-request-id")])
}

/// The answer of a handler that panicked. What it said went to standard error.
pub fn panicked(_: Box<dyn Any + Send>) -> Response {
    ApiError::internal().into_response()
}

/// Names the request for the log and in `x-request-id`, and logs its end.
pub async fn observe(State(app): State<App>, request: Request, next: Next) -> Response {
    let started = Instant::now();
    let id = format!("req_{}", Uuid::new_v4().simple());
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let route = request.extensions().get::<MatchedPath>().map(|path| path.as_str().to_owned());
    let route = route.as_deref().unwrap_or("none");
    let span = tracing::info_span!("request", id, %method, route, status = field::Empty);
    let mut response = next.run(request).instrument(span.clone()).await;
    let header = HeaderValue::from_str(&id).expect("letters and digits");
    response.headers_mut().insert("x-request-id", header);
    let millis = started.elapsed().as_secs_f64() * 1e3;
    let status = response.status().as_u16();
    span.record("status", status);
    app.metrics.answered(route, status);
    tracing::info!(id, %method, ?path, status, millis, "answered");
    response
}

#[cfg(test)]
mod tests {
    use axum::Router;
    use axum::body::Body;
    use axum::routing::get;
    use tower::ServiceExt;
    use tower_http::catch_panic::CatchPanicLayer;

    use super::*;

    #[tokio::test]
    async fn a_handler_that_panics_tells_nothing_of_why() {
        async fn fails() -> &'static str {
            panic!("a secret of ours")
        }
        let router: Router = Router::new().route("/", get(fails));
        let router = router.layer(CatchPanicLayer::custom(panicked));
        let request = axum::http::Request::new(Body::empty());
        let answer = router.oneshot(request).await.expect("it is an answer");
        assert_eq!(answer.status(), 500);
        let body = axum::body::to_bytes(answer.into_body(), 4096).await.expect("it is short");
        let body = String::from_utf8(body.to_vec()).expect("text");
        assert!(body.contains("server_error") && !body.contains("secret"), "{body}");
    }
}
