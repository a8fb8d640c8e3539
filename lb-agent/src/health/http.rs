//! HTTP/1 on a listener. Some of these ports are open to any client, so the number of
//! connections and their idle time are limited.

use std::{io, pin::pin, sync::Arc, time::Duration};

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// Connections that a listener serves at a time; further ones wait.
const CONNECTIONS: usize = 256;

/// How long a connection may wait for a request: longer than the interval of any prober that
/// keeps its connection open, so that no probe meets a closed connection.
const IDLE: Duration = Duration::from_secs(300);

/// How long a client may take to read an answer while the server shuts down.
const LINGER: Duration = Duration::from_secs(1);

/// How long to wait before the next accept() after one failed, such as for lack of file
/// descriptors.
const EXHAUSTED: Duration = Duration::from_secs(1);

/// Serves until cancelled, and then until all connections are closed.
pub(super) async fn serve(listener: TcpListener, router: Router, cancel: CancellationToken) {
    let connections = TaskTracker::new();
    accept(listener, router, cancel, connections.clone()).await;
    connections.close();
    connections.wait().await;
}

/// Accepts until cancelled. The listener is closed when this returns; open connections finish
/// as tasks of `connections`.
pub(super) async fn accept(
    listener: TcpListener,
    router: Router,
    cancel: CancellationToken,
    connections: TaskTracker,
) {
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    let next = async || {
        let permit = Arc::clone(&room).acquire_owned().await.map_err(io::Error::other)?;
        let (stream, _) = listener.accept().await?;
        io::Result::Ok((stream, permit))
    };
    loop {
        let accepted = tokio::select! {
            () = cancel.cancelled() => return,
            accepted = next() => accepted,
        };
        match accepted {
            Ok((stream, permit)) => {
                let serving = connection(stream, router.clone(), cancel.clone());
                connections.spawn(async move {
                    serving.await;
                    drop(permit);
                });
            }
            // The client closed the connection before it was accepted.
            Err(error) if is_client_error(&error) => {}
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection: retrying in a second");
                tokio::select! {
                    () = cancel.cancelled() => return,
                    () = sleep(EXHAUSTED) => {}
                }
            }
        }
    }
}

fn is_client_error(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

async fn connection(stream: TcpStream, router: Router, cancel: CancellationToken) {
    let serving = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(IDLE)
        .title_case_headers(true)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    let mut serving = pin!(serving);
    tokio::select! {
        // Errors of clients are ignored.
        _ = serving.as_mut() => return,
        () = cancel.cancelled() => serving.as_mut().graceful_shutdown(),
    }
    let _ = timeout(LINGER, serving).await;
}
