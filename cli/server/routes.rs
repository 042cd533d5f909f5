//! The one table of routes. Whoever adds one says who may use it.
//!
//! Deny by default: without a key no path says whether it exists. With one, an unknown path is
//! 404 and another method 405.

use std::collections::BTreeMap;

use axum::Router;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::handler::Handler;
use axum::http::{Method, StatusCode};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodFilter, MethodRouter, on};
use tower_http::catch_panic::CatchPanicLayer;

use super::auth::{Access, Peer};
use super::error::ApiError;
use super::state::App;
use super::{
    chat, chunks, completions, contexts, embeddings, guard, health, metrics, models, openapi,
    responses, tokenize,
};

/// A path, a method, and who may use them.
pub struct Route {
    pub method: Method,
    pub path: &'static str,
    pub access: Access,
    handler: MethodRouter<App>,
}

fn get<H: Handler<T, App>, T: 'static>(path: &'static str, access: Access, handler: H) -> Route {
    Route { method: Method::GET, path, access, handler: on(MethodFilter::GET, handler) }
}

fn post<H: Handler<T, App>, T: 'static>(path: &'static str, access: Access, handler: H) -> Route {
    Route { method: Method::POST, path, access, handler: on(MethodFilter::POST, handler) }
}

fn put<H: Handler<T, App>, T: 'static>(path: &'static str, access: Access, handler: H) -> Route {
    Route { method: Method::PUT, path, access, handler: on(MethodFilter::PUT, handler) }
}

fn patch<H: Handler<T, App>, T: 'static>(path: &'static str, access: Access, handler: H) -> Route {
    Route { method: Method::PATCH, path, access, handler: on(MethodFilter::PATCH, handler) }
}

fn delete<H: Handler<T, App>, T: 'static>(path: &'static str, access: Access, handler: H) -> Route {
    Route { method: Method::DELETE, path, access, handler: on(MethodFilter::DELETE, handler) }
}

/// Everything that is served.
pub fn table() -> Vec<Route> {
    use Access::{Admin, Open, User};
    vec![
        get("/health", Open, health::health),
        get("/ready", Open, health::ready),
        get("/metrics", Admin, metrics::scrape),
        get("/openapi.json", User, openapi::get),
        get("/version", User, health::version),
        get("/v1/models", User, models::list),
        get("/v1/models/{*id}", User, models::get),
        post("/v1/chat/completions", User, chat::create),
        post("/v1/completions", User, completions::create),
        post("/v1/responses", User, responses::create),
        get("/v1/responses", User, responses::connect),
        post("/v1/embeddings", User, embeddings::create),
        post("/v1/chunks", User, chunks::create),
        get("/v1/chunks", User, chunks::list),
        get("/v1/chunks/{id}", User, chunks::get),
        delete("/v1/chunks/{id}", Admin, chunks::erase),
        post("/v1/chunks/{id}/populate", User, chunks::populate),
        post("/v1/chunks/{id}/save", Admin, chunks::save),
        post("/v1/chunks/{id}/unload", User, chunks::unload),
        post("/v1/chunks/{id}/restore", User, chunks::restore),
        post("/v1/chunks/{id}/pin", User, chunks::pin),
        post("/v1/contexts", User, contexts::create),
        get("/v1/contexts", User, contexts::list),
        get("/v1/contexts/{id}", User, contexts::get),
        patch("/v1/contexts/{id}", User, contexts::change),
        delete("/v1/contexts/{id}", User, contexts::forget),
        post("/v1/contexts/{id}/fork", User, contexts::fork),
        post("/v1/contexts/{id}/chunks/{chunk}/activate", User, contexts::activate),
        post("/v1/contexts/{id}/chunks/{chunk}/deactivate", User, contexts::deactivate),
        put("/v1/contexts/{id}/chunks/{chunk}", User, contexts::put),
        delete("/v1/contexts/{id}/chunks/{chunk}", User, contexts::remove),
        post("/tokenize", User, tokenize::tokenize),
        post("/detokenize", User, tokenize::detokenize),
        get("/tokenizer_info", User, tokenize::info),
    ]
}

/// The table as a service.
pub fn router(app: App) -> Router {
    let admitted = |access| from_fn_with_state((app.clone(), access), admit);
    let mut paths: BTreeMap<&str, MethodRouter<App>> = BTreeMap::new();
    for route in table() {
        let methods = paths.entry(route.path).or_default();
        *methods = std::mem::take(methods).merge(route.handler.layer(admitted(route.access)));
    }
    let mut router = Router::new();
    for (path, methods) in paths {
        let other = no_such_method.layer(admitted(Access::User));
        router = router.route(path, methods.fallback(other));
    }
    router = router
        .fallback(no_such_path.layer(admitted(Access::User)))
        .layer(DefaultBodyLimit::max(app.limits.body));
    if !app.origins.is_empty() {
        router = router.layer(guard::cors(&app.origins));
    }
    router
        .layer(from_fn_with_state(app.clone(), guard::check_host))
        .layer(CatchPanicLayer::custom(guard::panicked))
        .layer(from_fn_with_state(app.clone(), guard::observe))
        .with_state(app)
}

/// Lets a request through that has the key for it.
async fn admit(
    State((app, access)): State<(App, Access)>,
    mut request: Request,
    next: Next,
) -> Response {
    if access == Access::Open {
        return next.run(request).await;
    }
    let peer = Peer::of(request.extensions());
    if let Err(error) = app.quotas.check_address(peer) {
        return error.into_response();
    }
    match app.keys.principal(request.headers(), peer) {
        Err(error) => {
            app.quotas.was_wrong(peer);
            error.into_response()
        }
        Ok(principal) if !principal.may(access) => {
            ApiError::forbidden("this key may not do that; it needs the role admin").into_response()
        }
        Ok(principal) => match app.quotas.enter(&principal.payer) {
            Err(error) => error.into_response(),
            Ok(turn) => {
                request.extensions_mut().insert(principal);
                turn.last_for(next.run(request).await)
            }
        },
    }
}

async fn no_such_path() -> ApiError {
    ApiError::not_found("there is no such path")
}

async fn no_such_method() -> ApiError {
    ApiError::refused(StatusCode::METHOD_NOT_ALLOWED, "this path does not have that method")
}
