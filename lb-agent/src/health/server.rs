//! The HTTP servers of the agent: health (10256) and metrics (10249).
//!
//! They show what they are given and decide nothing.

use std::{future::Future, io, net::SocketAddr, time::Duration};

use axum::{
    Router,
    extract::State,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use jiff::Timestamp;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::{Health, Report};
use crate::metrics::Metrics;

/// What `/proxyMode` answers.
pub const PROXY_MODE: &str = "ebpf";

/// How long a client may take to read an answer once the agent ends.
const LINGER: Duration = Duration::from_secs(1);

/// Between attempts to bind an address that is taken.
const BIND_RETRY: Duration = Duration::from_secs(1);

/// An address that cannot be bound.
#[derive(Debug, thiserror::Error)]
#[error("cannot bind {address} for {what}: free it or give another {flag}")]
pub struct BindError {
    address: SocketAddr,
    what: &'static str,
    flag: &'static str,
    source: io::Error,
}

/// Which of the servers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Server {
    /// `/healthz` and `/livez`.
    Health,
    /// `/metrics`, `/healthz` and `/proxyMode`.
    Metrics,
}

impl Server {
    const fn what(self) -> &'static str {
        match self {
            Self::Health => "the health server",
            Self::Metrics => "the metrics server",
        }
    }

    const fn flag(self) -> &'static str {
        match self {
            Self::Health => "--healthz-bind-address",
            Self::Metrics => "--metrics-bind-address",
        }
    }
}

/// Binds an address: `0.0.0.0` is IPv4 alone, `[::]` both families.
///
/// # Errors
/// If it cannot be bound now.
pub async fn bind(server: Server, address: SocketAddr) -> Result<TcpListener, BindError> {
    TcpListener::bind(address).await.map_err(|source| BindError {
        address,
        what: server.what(),
        flag: server.flag(),
        source,
    })
}

/// Binds an address and tries again until it can be bound; none if cancelled before.
pub async fn bind_retrying(
    server: Server,
    address: SocketAddr,
    cancel: &CancellationToken,
) -> Option<TcpListener> {
    let mut warned = false;
    loop {
        match bind(server, address).await {
            Ok(listener) => return Some(listener),
            Err(error) if !warned => {
                tracing::warn!(%error, cause = %error.source, "trying again every second");
                warned = true;
            }
            Err(_) => {}
        }
        tokio::select! {
            () = cancel.cancelled() => return None,
            () = tokio::time::sleep(BIND_RETRY) => {}
        }
    }
}

/// Serves `/healthz` and `/livez` until cancelled.
///
/// # Errors
/// If accepting connections fails.
pub async fn serve_health(
    listener: TcpListener,
    health: Health,
    metrics: Metrics,
    cancel: CancellationToken,
) -> io::Result<()> {
    let router = Router::new()
        .route("/healthz", get(healthz))
        .route("/livez", get(livez))
        .with_state((health, metrics));
    serve(listener, router, cancel).await
}

/// Serves `/metrics`, `/healthz` and `/proxyMode` until cancelled.
///
/// # Errors
/// If accepting connections fails.
pub async fn serve_metrics(
    listener: TcpListener,
    metrics: Metrics,
    cancel: CancellationToken,
) -> io::Result<()> {
    let router = Router::new()
        .route("/metrics", get(scrape))
        .route("/healthz", get(async || plain("ok")))
        .route("/proxyMode", get(async || plain(PROXY_MODE)))
        .with_state(metrics);
    serve(listener, router, cancel).await
}

async fn serve(listener: TcpListener, router: Router, cancel: CancellationToken) -> io::Result<()> {
    let end = cancel.clone();
    let serving =
        axum::serve(listener, router).with_graceful_shutdown(async move { end.cancelled().await });
    let overdue = async {
        cancel.cancelled().await;
        tokio::time::sleep(LINGER).await;
    };
    first_of(serving.into_future(), overdue).await
}

async fn first_of(
    serving: impl Future<Output = io::Result<()>>,
    overdue: impl Future<Output = ()>,
) -> io::Result<()> {
    tokio::select! {
        result = serving => result,
        () = overdue => Ok(()),
    }
}

async fn healthz(State((health, metrics)): State<(Health, Metrics)>) -> Response {
    let report = health.report(Timestamp::now());
    let good = report.healthy && report.node_eligible == Some(true);
    let status = status(good);
    metrics.healthz_answered(status.as_u16());
    answer(status, &report)
}

async fn livez(State((health, metrics)): State<(Health, Metrics)>) -> Response {
    let report = Report { node_eligible: None, ..health.report(Timestamp::now()) };
    let status = status(report.healthy);
    metrics.livez_answered(status.as_u16());
    answer(status, &report)
}

fn status(good: bool) -> StatusCode {
    if good { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

fn answer(status: StatusCode, report: &Report) -> Response {
    let json = HeaderValue::from_static("application/json");
    let body = serde_json::to_string(report).expect("a report has string keys only");
    let headers = [
        (header::CONTENT_TYPE, json),
        (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
    ];
    (status, headers, body).into_response()
}

fn plain(text: &'static str) -> Response {
    let headers = [(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"))];
    (headers, text).into_response()
}

async fn scrape(State(metrics): State<Metrics>) -> Response {
    let kind =
        HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");
    match tokio::task::spawn_blocking(move || metrics.encode()).await {
        Ok(Ok(text)) => ([(header::CONTENT_TYPE, kind)], text).into_response(),
        Ok(Err(_)) | Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}
