//! `strand serve`: an OpenAI-compatible server over one engine.
//!
//! Options become a [`Server`], the table of routes a router, and the listener serves it until
//! it is told to stop. All that knows HTTP and OpenAI's JSON is in this folder.

mod asking;
mod auth;
mod balance;
mod body;
mod chat;
mod chunks;
mod completions;
mod contexts;
mod embeddings;
mod error;
mod generation;
mod guard;
mod health;
mod hosts;
mod jwt;
mod lenient;
mod library;
mod listener;
mod logprobs;
pub mod logs;
mod metrics;
mod models;
mod openapi;
pub mod options;
mod patience;
mod prompt;
mod query;
mod quota;
pub mod reading;
mod responses;
mod routes;
mod sse;
mod state;
mod structured;
mod telling;
mod tls;
mod tokenize;
mod tools;
mod traces;
mod usage;
mod wire;

use std::io::{self, Write};
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use axum::http::HeaderValue;
use strand_engine::store::Store;
use strand_engine::{EngineConfig, EngineHandle};
use strand_models::ChatTemplate;
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_rustls::TlsAcceptor;

use crate::args::CommonArgs;
use crate::{Outcome, UsageError, data_dir, interrupt, load};
use auth::Keys;
use embeddings::EmbeddingModel;
use hosts::Hosts;
use jwt::Jwt;
use library::Library;
use metrics::Metrics;
use options::{ServeArgs, ServerArgs};
use quota::{QuotaLimits, Quotas};
use state::{ModelEntry, Server, ServerLimits, Sharing};

/// Threads that speak HTTP; computing has its own.
const HTTP_THREADS: usize = 2;
/// Threads that wait for the engine's and the disk's answers, and tokenize.
const BLOCKING_THREADS: usize = 64;

pub fn run(args: &ServeArgs, common: &CommonArgs) -> Result<Outcome> {
    let _traces = logs::begin(args.server.log_format, common.verbose)?;
    let files = args.server.tls_cert.as_ref().zip(args.server.tls_key.as_ref());
    let tls = files.map(|(chain, key)| tls::acceptor(chain, key)).transpose()?;
    let (keys, origins) = (keys(&args.server)?, origins(&args.server)?);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(HTTP_THREADS)
        .max_blocking_threads(BLOCKING_THREADS)
        .enable_all()
        .build()
        .context("cannot start threads")?;
    // bound before the model is loaded: what can't be listened on is told at once
    let (listener, address) = runtime.block_on(bind(&args.server, &keys))?;
    let hosts = Hosts::new(address, &args.server.allowed_host);
    let server = server(args, common, Callers { keys, hosts, origins })?;
    let finished = runtime.block_on(serve(listener, tls, server, &args.server))?;
    // what a dropped answer still computes is not waited for
    runtime.shutdown_background();
    Ok(if finished { Outcome::Done } else { Outcome::Interrupted })
}

/// Listens where it was asked to, unless that would be open to anybody unasked.
async fn bind(args: &ServerArgs, keys: &Keys) -> Result<(TcpListener, SocketAddr)> {
    let listen = async {
        let listener = TcpListener::bind(&args.addr).await?;
        let address = listener.local_addr()?;
        Ok::<_, io::Error>((listener, address))
    };
    let bound = listen.await.with_context(|| format!("cannot listen on {}", args.addr))?;
    if !bound.1.ip().is_loopback() && keys.is_empty() && !args.allow_no_key {
        let message = "anybody could use a server that listens on other than loopback without a \
                       key; give --api-key or --api-keys-file, or say --allow-no-key";
        bail!(UsageError(message.to_owned()));
    }
    Ok(bound)
}

fn keys(args: &ServerArgs) -> Result<Keys> {
    let mut keys = Keys::new(&args.api_key, args.api_keys_file.as_deref())?;
    if let Some((path, algorithm)) = args.jwt_key.as_ref().zip(args.jwt_algorithm) {
        keys.jwt = Some(Jwt::new(path, algorithm)?);
    }
    Ok(keys)
}

fn origins(args: &ServerArgs) -> Result<Vec<HeaderValue>> {
    let parse = |origin: &String| {
        let is_origin = origin.starts_with("http://") || origin.starts_with("https://");
        let value = origin.parse().ok().filter(|_| is_origin && !origin.ends_with('/'));
        value.ok_or_else(|| {
            let expected = "it must be like https://example.org";
            UsageError(format!("--cors-origin is {origin:?}, {expected}")).into()
        })
    };
    args.cors_origin.iter().map(parse).collect()
}

/// Who may ask, settled before the model is loaded.
#[derive(Default)]
struct Callers {
    keys: Keys,
    hosts: Hosts,
    origins: Vec<HeaderValue>,
}

/// Loads the model and all that requests share.
fn server(args: &ServeArgs, common: &CommonArgs, callers: Callers) -> Result<Server> {
    let source = load::source(args.model.as_deref())?;
    let store = data_dir::open_store_or_tell(common).ok();
    let engines = store.as_ref().map(Store::another).transpose()?;
    let ServerArgs { max_queue, tenant_share, share_kv, .. } = args.server;
    if share_kv && tenant_share.is_some() {
        let message = "KV that tenants share is nobody's share; give --share-kv or --tenant-share";
        bail!(UsageError(message.to_owned()));
    }
    // where nobody needs a key there is nobody to leave room for
    let tenant_share = tenant_share.filter(|_| !callers.keys.is_empty());
    let config = EngineConfig { max_queue, tenant_share, ..load::config(&args.engine) };
    let engine = load::start(&source, &config, engines, common)?;
    over(engine, store, args, callers)
}

/// A server over an engine that runs.
fn over(
    engine: EngineHandle,
    store: Option<Store>,
    args: &ServeArgs,
    callers: Callers,
) -> Result<Server> {
    let asked = args.server.served_model_name.clone();
    let library = Library::new(store, &engine, args)?;
    let embedder = args.server.embedding_model.as_deref().map(EmbeddingModel::open);
    Ok(Server {
        model: ModelEntry::new(
            asked.unwrap_or_else(|| engine.model_name().to_owned()),
            &engine.chat_template().map(ChatTemplate::source).unwrap_or_default(),
        ),
        limits: ServerLimits {
            body: usize::try_from(args.server.max_body).unwrap_or(usize::MAX),
            read_timeout: seconds(args.server.read_timeout),
            n: args.server.max_n,
        },
        hosts: callers.hosts,
        restore: args.reuse.restore,
        // where nobody needs a key there is nobody to share with
        sharing: match args.server.share_kv && !callers.keys.is_empty() {
            true => Sharing::Shared,
            false => Sharing::Parted,
        },
        library,
        quotas: Quotas::new(QuotaLimits {
            per_minute: args.server.max_per_minute,
            concurrent: args.server.max_concurrent,
            tokens_per_minute: args.server.max_tokens_per_minute,
            wrong_per_minute: args.server.max_wrong_per_minute,
        }),
        metrics: Metrics::default(),
        grammars: OnceLock::new(),
        embedder: embedder.transpose()?,
        keys: callers.keys,
        origins: callers.origins,
        engine,
    })
}

/// Serves until it is told to stop; false where answers had to be dropped.
async fn serve(
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    server: Server,
    args: &ServerArgs,
) -> Result<bool> {
    let address = listener.local_addr()?;
    let mut stop = Stop::new()?;
    let scheme = if tls.is_some() { "https" } else { "http" };
    let rules = listener::Rules {
        connections: args.max_connections,
        read_timeout: seconds(args.read_timeout),
        drain_timeout: seconds(args.drain_timeout),
        tls,
    };
    // a closed standard error changes nothing about serving
    drop(writeln!(io::stderr(), "listening on {scheme}://{address}"));
    let router = routes::router(Arc::new(server));
    Ok(listener::serve(listener, router, rules, async move {
        stop.told().await;
        // whoever says it twice wants it at once
        tokio::spawn(async move {
            stop.told().await;
            std::process::exit(i32::from(interrupt::EXIT_STATUS));
        });
    })
    .await)
}

/// Ctrl-C, or what a service manager sends.
struct Stop {
    interrupt: Signal,
    terminate: Signal,
}

impl Stop {
    fn new() -> Result<Self> {
        let catch = |kind| signal(kind).context("cannot catch signals");
        let (interrupt, terminate) =
            (catch(SignalKind::interrupt())?, catch(SignalKind::terminate())?);
        Ok(Self { interrupt, terminate })
    }

    async fn told(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

fn seconds(count: usize) -> Duration {
    Duration::from_secs(count as u64)
}
