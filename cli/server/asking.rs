//! From a checked request to the engine's.

use strand_engine::{Limits, Request, Segment};

use super::auth::Principal;
use super::error::ApiError;
use super::library::{self, Sight, Wish};
use super::state::{App, Server};
use super::wire::common::Common;
use crate::sampling;

/// Makes the prompt where it may take its time, over what it asks to see.
pub async fn prepare<T: Send + 'static>(
    app: &App,
    principal: &Principal,
    common: &Common,
    make: impl FnOnce(&Server, Option<&mut Sight>) -> Result<T, ApiError> + Send + 'static,
) -> Result<(T, Option<Sight>), ApiError> {
    let (tenant, wish) = (principal.tenant.clone(), Wish::new(app, principal, common));
    blocking(app, move |server| {
        let mut sight = library::resolve(server, &tenant, &wish)?;
        let made = make(server, sight.as_mut())?;
        Ok((made, sight))
    })
    .await
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
        salt: server.salt(&principal.tenant, common.cache_salt.as_deref()),
        restore: server.restore,
        allow_lossy: false,
    }
}
