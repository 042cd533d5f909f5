//! Accepts connections, and stops in order.
//!
//! Every connection has a deadline for headers and a limit on their size. Told to stop, the
//! server accepts nothing more, lets answers end, and drops those that take too long.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio_rustls::TlsAcceptor;
use tower::ServiceExt;

use super::auth::Peer;
use super::patience::Patient;

/// Bytes and number of a request's headers.
const HEADER_BYTES: usize = 64 << 10;
const HEADERS: usize = 100;
/// After an error of the system itself, such as too many open files.
const PAUSE: Duration = Duration::from_millis(100);

/// How connections are treated.
pub struct Rules {
    /// Connections at a time.
    pub connections: usize,
    /// What headers may take to arrive, and a client to read what it is sent.
    pub read_timeout: Duration,
    /// Speaks TLS where there is one.
    pub tls: Option<TlsAcceptor>,
    /// What answers may still take once the server stops.
    pub drain_timeout: Duration,
}

/// Serves until `shutdown`. Returns false where answers had to be dropped at the end.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    rules: Rules,
    shutdown: impl Future<Output = ()>,
) -> bool {
    // every connection holds a receiver: when none is left, all have ended
    let (stop, stopped) = watch::channel(());
    let permits = Arc::new(Semaphore::new(rules.connections));
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(rules.read_timeout)
        .max_header_size(HEADER_BYTES)
        .max_headers(HEADERS);
    let mut shutdown = std::pin::pin!(shutdown);
    loop {
        let accepted = async {
            let permit = permits.clone().acquire_owned().await.expect("it is never closed");
            (listener.accept().await, permit)
        };
        let (stream, peer, permit) = tokio::select! {
            () = &mut shutdown => break,
            (Ok((stream, from)), permit) = accepted => (stream, Peer::new(from.ip()), permit),
            else => {
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        // tokens are small and must not wait for each other
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "a connection delays what is small");
        }
        let (http, stopped) = (http.clone(), stopped.clone());
        let router = (router.clone(), peer);
        let (tls, patience) = (rules.tls.clone(), rules.read_timeout);
        tokio::spawn(async move {
            match tls {
                None => serve_one(Patient::new(stream, patience), http, router, stopped).await,
                Some(tls) => {
                    let handshake = tls.accept(Patient::new(stream, patience));
                    if let Ok(Ok(stream)) = tokio::time::timeout(patience, handshake).await {
                        serve_one(stream, http, router, stopped).await;
                    }
                }
            }
            drop(permit);
        });
    }
    drop((listener, stopped));
    stop.send_replace(());
    tokio::time::timeout(rules.drain_timeout, stop.closed()).await.is_ok()
}

/// Serves one connection to its end, which comes after the answer in progress when told to stop.
async fn serve_one(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    http: http1::Builder,
    (router, peer): (Router, Peer),
    mut stopped: watch::Receiver<()>,
) {
    let service = hyper::service::service_fn(move |request: Request<Incoming>| {
        let mut request = request.map(Body::new);
        request.extensions_mut().insert(peer);
        router.clone().oneshot(request)
    });
    let connection = http.serve_connection(TokioIo::new(stream), service).with_upgrades();
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        _ = stopped.changed() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    // a client that leaves, or talks no HTTP, is nothing to tell anybody
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection broke");
    }
}
