//! From a checked request to the engine's.

use strand_engine::{Limits, Request, Segment};

use super::auth::Principal;
use super::error::ApiError;
use super::library;
use super::state::{App, Server};
use super::wire::common::Common;
use crate::sampling;

/// Makes the prompt where it may take its time, after what it asks for was found.
pub async fn prepare<T: Send + 'static>(
    app: &App,
    principal: &Principal,
    common: &Common,
    make: impl FnOnce(&Server) -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    library::resolve(app, principal, &common.selection)?;
    blocking(app, make).await
}

/// Runs what blocks on a thread for it.
pub async fn blocking<T: Send + 'static>(
    app: &App,
    work: impl FnOnce(&Server) -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let server = app.clone();
    let done = tokio::task::spawn_blocking(move || work(&server)).await;
    done.unwrap_or_else(|_| Err(ApiError::internal()))
}

/// The engine's request for one prompt.
pub fn request(
    server: &Server,
    principal: &Principal,
    common: &Common,
    prompt: Vec<Segment>,
) -> Request {
    let defaults = server.engine.generation_defaults();
    let mut params = sampling::params(&common.sampling, defaults, sampling::any_seed());
    params.logit_bias = common.logit_bias.clone();
    Request {
        prompt,
        sampling: params,
        limits: Limits {
            n: common.n as u32,
            min_tokens: common.min_tokens,
            stop_token_ids: common.stop_token_ids.clone(),
            ..sampling::limits(&common.sampling)
        },
        priority: common.priority,
        salt: principal.tenant.salt(common.cache_salt.as_deref()),
        restore: server.restore,
        allow_lossy: false,
    }
}
