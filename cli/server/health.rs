//! Whether the server lives, can answer, and which one it is.

use axum::Json;
use axum::extract::State;

use super::asking::blocking;
use super::error::ApiError;
use super::state::App;
use super::wire::models::{Health, Version};

/// 200 while the engine's thread runs.
pub async fn health(State(app): State<App>) -> Result<Json<Health>, ApiError> {
    blocking(&app, |server| Ok(server.engine.stats()?)).await?;
    Ok(Json(Health { status: "ok" }))
}

/// 200 when requests are served. Nothing listens before the model is loaded, so this is what
/// [`health`] says.
pub async fn ready(State(app): State<App>) -> Result<Json<Health>, ApiError> {
    health(State(app)).await
}

pub async fn version() -> Json<Version> {
    Json(Version { version: env!("CARGO_PKG_VERSION") })
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::sync::Arc;

    use anyhow::Result;
    use axum::Router;
    use axum::body::Body;
    use axum::http::Request;
    use clap::Parser;
    use strand_engine::batch::{Batch, RowOutput, Runner};
    use strand_engine::load::Loaded;
    use strand_engine::{Engine, EngineHandle, Error, ModelFacts, SegmentKv, TierSetup};
    use tower::ServiceExt;

    use crate::args::{Cli, Command};
    use crate::load;
    use crate::server::auth::Peer;
    use crate::server::{self, Callers, routes};

    /// Whatever it is asked to compute kills the engine's thread.
    struct Deadly;

    impl Runner for Deadly {
        fn run(&mut self, _: &Batch) -> Result<Vec<Result<RowOutput, Error>>, Error> {
            panic!("the device is on fire")
        }

        fn gather(&mut self, _: &[u32]) -> Result<SegmentKv, Error> {
            panic!("nothing was computed")
        }

        fn scatter(&mut self, _: &SegmentKv, _: usize, _: &[u32]) -> Result<(), Error> {
            panic!("nothing was computed")
        }
    }

    /// The bundled model's server, but for what computes.
    fn router() -> Result<Router> {
        let cli = Cli::try_parse_from(["strand", "serve", "--kv-memory", "16MiB"])?;
        let Command::Serve(args) = cli.command else { unreachable!("it was asked for") };
        let config = load::config(&args.engine);
        let loaded = load::load(&load::source(None)?, &config, None, &cli.common)?;
        let Loaded { engine, facts, .. } = loaded;
        let (plan, tokenizer) = (engine.plan().clone(), facts.tokenizer.clone());
        let engine = Engine::new(plan, Deadly, tokenizer, vec![0], TierSetup::default());
        let engine = EngineHandle::spawn(engine, ModelFacts { ..facts }, None);
        Ok(routes::router(Arc::new(server::over(engine, None, &args, Callers::default())?)))
    }

    async fn ask(router: &Router, method: &str, path: &str, body: &str) -> (u16, String) {
        let request = Request::builder().method(method).uri(path);
        let request = request.extension(Peer::new(Ipv4Addr::LOCALHOST.into()));
        let request =
            request.header("host", "localhost").header("content-type", "application/json");
        let request = request.body(Body::from(body.to_owned())).expect("it is one");
        let answer = router.clone().oneshot(request).await.expect("it is answered");
        let status = answer.status().as_u16();
        let body = axum::body::to_bytes(answer.into_body(), 1 << 20).await.expect("it is short");
        (status, String::from_utf8(body.to_vec()).expect("text"))
    }

    #[tokio::test]
    async fn an_engine_that_died_is_told_by_health_and_to_everybody() {
        let router = router().expect("the bundled model loads");
        for path in ["/health", "/ready"] {
            assert_eq!(ask(&router, "GET", path, "").await.0, 200, "{path}");
        }
        let completion = r#"{"prompt": "x", "max_tokens": 1}"#;
        // the first kills it in the middle, the second finds it dead
        for _ in 0..2 {
            let (status, body) = ask(&router, "POST", "/v1/completions", completion).await;
            assert_eq!(status, 503, "{body}");
            assert!(body.contains("the engine has stopped") && !body.contains("fire"), "{body}");
        }
        for path in ["/health", "/ready", "/metrics"] {
            assert_eq!(ask(&router, "GET", path, "").await.0, 503, "{path}");
        }
        // what needs no engine still answers
        assert_eq!(ask(&router, "GET", "/version", "").await.0, 200);
    }
}
