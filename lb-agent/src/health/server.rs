//! The HTTP servers of the agent: health (10256), metrics (10249) and the health checks of
//! Services.
//!
//! They show what they are given and decide nothing.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    Router,
    extract::State,
    http::{HeaderName, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use jiff::Timestamp;
use tokio::{net::TcpListener, sync::watch};
use tokio_util::sync::CancellationToken;

use super::{Health, Report, checks::Wanted, http::serve};
use crate::{metrics::Metrics, model::IpFamily};

/// What `/proxyMode` answers.
pub const PROXY_MODE: &str = "ebpf";

/// Between attempts to bind an address that is taken.
pub const BIND_RETRY: Duration = Duration::from_secs(1);

/// How many endpoints the node has, for load balancers that weigh nodes by it.
const ENDPOINT_WEIGHT: HeaderName = HeaderName::from_static("x-load-balancing-endpoint-weight");

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
pub async fn serve_health(
    listener: TcpListener,
    health: Health,
    metrics: Metrics,
    cancel: CancellationToken,
) {
    let router = Router::new()
        .route("/healthz", get(healthz))
        .route("/livez", get(livez))
        .with_state((health, metrics));
    serve(listener, router, cancel).await;
}

/// Serves `/metrics`, `/healthz` and `/proxyMode` until cancelled.
pub async fn serve_metrics(listener: TcpListener, metrics: Metrics, cancel: CancellationToken) {
    let router = Router::new()
        .route("/metrics", get(scrape))
        .route("/healthz", get(async || plain("ok")))
        .route("/proxyMode", get(async || plain(PROXY_MODE)))
        .with_state(metrics);
    serve(listener, router, cancel).await;
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

/// What a health check listener of a Service shows.
#[derive(Clone, Debug)]
pub(super) struct ServiceCheck {
    /// `namespace/name`.
    pub(super) service: Arc<str>,
    /// The family of the listener.
    pub(super) family: IpFamily,
    /// Where the number of endpoints is found.
    pub(super) wanted: watch::Receiver<Wanted>,
    /// Whether the proxy keeps up.
    pub(super) health: Health,
}

/// Answers every path and method with the health check of a Service.
pub(super) fn service_check(check: ServiceCheck) -> Router {
    Router::new().fallback(answer_check).with_state(check)
}

async fn answer_check(State(check): State<ServiceCheck>) -> Response {
    let is_healthy = check.health.report(Timestamp::now()).healthy;
    let answer = check.wanted.borrow().answer(&check.service, check.family, is_healthy);
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("application/json")),
        (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        (ENDPOINT_WEIGHT, HeaderValue::from(answer.local_endpoints)),
    ];
    (status(answer.is_good()), headers, answer.body(&check.service)).into_response()
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
