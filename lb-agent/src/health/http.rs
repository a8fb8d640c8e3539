//! HTTP/1 on a listener. Some of these ports are open to any client, so the number of
//! connections and their idle time are limited.

use std::{io, net::SocketAddr, pin::pin, sync::Arc, time::Duration};

use axum::Router;
use hyper::{
    server::conn::http1,
    service::{Service, service_fn},
};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    time::{Instant, sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::connections::{Connection, Connections, Source};

/// How long a new connection may wait for its first request.
const FIRST: Duration = Duration::from_secs(10);

/// How long a connection may wait for another request: longer than the interval of any prober
/// that keeps its connection open, so that no probe meets a closed connection.
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
/// as tasks of `tasks`.
pub(super) async fn accept(
    listener: TcpListener,
    router: Router,
    cancel: CancellationToken,
    tasks: TaskTracker,
) {
    accept_from(listener, Source::of, router, cancel, tasks).await;
}

async fn accept_from(
    listener: TcpListener,
    source: fn(SocketAddr, SocketAddr) -> Source,
    router: Router,
    cancel: CancellationToken,
    tasks: TaskTracker,
) {
    let connections = Connections::default();
    loop {
        let accepted = tokio::select! {
            () = cancel.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let accepted = accepted.and_then(|(stream, peer)| Ok((stream.local_addr()?, stream, peer)));
        match accepted {
            Ok((local, stream, peer)) => {
                let open = connections.open(source(peer, local), Instant::now());
                tasks.spawn(serve_one(stream, open, router.clone(), cancel.clone()));
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
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, NotConnected};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset | NotConnected)
}

async fn serve_one(stream: TcpStream, open: Connection, router: Router, cancel: CancellationToken) {
    let (open, router) = (Arc::new(open), TowerToHyperService::new(router));
    let used = Arc::clone(&open);
    let service = service_fn(move |request| {
        used.used(Instant::now());
        router.call(request)
    });
    let serving = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(IDLE)
        .title_case_headers(true)
        .serve_connection(TokioIo::new(stream), service);
    let mut serving = pin!(serving);
    tokio::select! {
        // Errors of clients are ignored.
        _ = serving.as_mut() => return,
        () = open.evicted.cancelled() => return,
        () = unused(&open) => return,
        () = cancel.cancelled() => serving.as_mut().graceful_shutdown(),
    }
    let _ = timeout(LINGER, serving).await;
}

/// Completes if the first request does not come in time.
async fn unused(open: &Connection) {
    sleep(FIRST).await;
    if open.is_used() {
        std::future::pending().await
    }
}

#[cfg(test)]
mod tests {
    use axum::routing::any;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpSocket,
    };

    use super::*;
    use crate::health::connections::{OTHERS, PER_SOURCE};

    const DEADLINE: Duration = Duration::from_secs(10);

    /// A listener for which 127.0.0.1 is this node, and the rest of 127.0.0.0/8 is not.
    async fn listen() -> (SocketAddr, CancellationToken) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = Router::new().fallback(any(async || "ok"));
        let source = |peer: SocketAddr, local: SocketAddr| match peer.ip() {
            ip if ip == local.ip() => Source::Own,
            ip => Source::Other(ip),
        };
        let cancel = CancellationToken::new();
        let accepting = accept_from(listener, source, router, cancel.clone(), TaskTracker::new());
        tokio::spawn(accepting);
        (address, cancel)
    }

    async fn connect(source: u8, server: SocketAddr) -> TcpStream {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(SocketAddr::from(([127, 0, 0, source], 0))).unwrap();
        socket.connect(server).await.unwrap()
    }

    async fn ask(mut stream: TcpStream) -> String {
        let request = "GET / HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n";
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        timeout(DEADLINE, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
        answer
    }

    #[tokio::test]
    async fn silent_connections_keep_nobody_from_an_answer() {
        let (server, cancel) = listen().await;
        let mut held = Vec::new();
        for number in 0..OTHERS {
            held.push(connect(2 + (number / PER_SOURCE) as u8, server).await);
        }
        for prober in [1, 1, 99] {
            let answer = ask(connect(prober, server).await).await;
            assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "127.0.0.{prober}: {answer}");
        }
        // The oldest made room for the prober from elsewhere, and no other did.
        let closed = timeout(DEADLINE, held[0].read(&mut [0])).await.unwrap();
        assert!(matches!(closed, Ok(0) | Err(_)), "{closed:?}");
        assert!(
            held[1]
                .try_read(&mut [0])
                .is_err_and(|error| { error.kind() == io::ErrorKind::WouldBlock })
        );
        cancel.cancel();
    }

    #[tokio::test]
    async fn a_source_has_its_share_and_no_more() {
        let (server, cancel) = listen().await;
        let mut held = Vec::new();
        for _ in 0..=PER_SOURCE {
            held.push(connect(2, server).await);
        }
        let closed = timeout(DEADLINE, held[0].read(&mut [0])).await.unwrap();
        assert!(matches!(closed, Ok(0) | Err(_)), "{closed:?}");
        cancel.cancel();
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_without_a_request_is_closed_soon_and_one_that_is_used_is_not() {
        let connections = Connections::default();
        let start = Instant::now();
        let silent = connections.open(Source::Own, start);
        unused(&silent).await;
        assert_eq!(start.elapsed(), FIRST);
        let busy = connections.open(Source::Own, Instant::now());
        busy.used(Instant::now());
        assert!(timeout(IDLE, unused(&busy)).await.is_err());
    }
}
