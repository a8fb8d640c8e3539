//! The HTTP servers of the agent: health (10256), metrics (10249) and the health checks of
//! Services.
//!
//! They only report: the answers come from [`Health`], [`Metrics`] and [`Wanted`].

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    Router,
    extract::{RawQuery, State},
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header},
    response::Response,
    routing::any,
};
use jiff::Timestamp;
use lb_control::{desired::health_checks::Wanted, model::IpFamily};
use tokio::{net::TcpListener, sync::watch};
use tokio_util::sync::CancellationToken;

use super::{
    Health, Report,
    http::serve,
    reply::{JSON, NO_SNIFF, TEXT, not_found, reply, server_error},
};
use crate::metrics::{Metrics, format::Format};

/// The answer of `/proxyMode`.
pub const PROXY_MODE: &str = "ebpf";

/// Time between attempts to bind an address that is in use.
pub const BIND_RETRY: Duration = Duration::from_secs(1);

/// The number of local endpoints, for load balancers that weight nodes by it.
const ENDPOINT_WEIGHT: HeaderName = HeaderName::from_static("x-load-balancing-endpoint-weight");

/// When the counters started at zero, for scrapers.
const START_TIME: HeaderName = HeaderName::from_static("process-start-time-unix");

/// An address that cannot be bound.
#[derive(Debug, thiserror::Error)]
#[error("cannot bind {address} for {what}: free it or give another {flag}")]
pub struct BindError {
    address: SocketAddr,
    server: Server,
    what: &'static str,
    flag: &'static str,
    source: io::Error,
}

impl BindError {
    /// The server that the address is for.
    pub fn server(&self) -> Server {
        self.server
    }
}

/// The servers of the agent itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Server {
    /// `/healthz` and `/livez`.
    Health,
    /// `/metrics`, `/healthz`, `/proxyMode` and `/configz`.
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

/// Binds an address: `0.0.0.0` is IPv4 only, `[::]` is both families.
///
/// # Errors
/// If the address cannot be bound now.
pub async fn bind(server: Server, address: SocketAddr) -> Result<TcpListener, BindError> {
    TcpListener::bind(address).await.map_err(|source| BindError {
        address,
        server,
        what: server.what(),
        flag: server.flag(),
        source,
    })
}

/// Binds an address, and retries until it can be bound; `None` if cancelled.
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
                tracing::warn!(%error, cause = %error.source, "not serving: retrying every second");
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
        .route("/healthz", any(healthz))
        .route("/livez", any(livez))
        .fallback(not_found)
        .with_state((health, metrics));
    serve(listener, router, cancel).await;
}

/// Serves `/metrics`, `/healthz`, `/proxyMode` and `/configz` until cancelled; `configz` is
/// the JSON of the last.
pub async fn serve_metrics(
    listener: TcpListener,
    metrics: Metrics,
    configz: String,
    cancel: CancellationToken,
) {
    let configz = Arc::<str>::from(configz);
    let router = Router::new()
        .route("/metrics", any(scrape))
        .route("/healthz", any(ping))
        .route("/healthz/ping", any(async || reply(StatusCode::OK, TEXT, [], "ok")))
        .route("/proxyMode", any(async || text(PROXY_MODE)))
        .route(
            "/configz",
            any(async move || reply(StatusCode::OK, JSON, [NO_SNIFF], configz.to_string())),
        )
        .fallback(not_found)
        .with_state(metrics);
    serve(listener, router, cancel).await;
}

async fn healthz(State((health, metrics)): State<(Health, Metrics)>) -> Response {
    let report = health.report(Timestamp::now());
    let healthy = report.healthy && report.is_ready;
    let report = Report { healthy, ..report };
    let status = status(healthy && report.node_eligible == Some(true));
    metrics.healthz_answered(status.as_u16());
    answer(status, report)
}

async fn livez(State((health, metrics)): State<(Health, Metrics)>) -> Response {
    let report = Report { node_eligible: None, ..health.report(Timestamp::now()) };
    let status = status(report.healthy);
    metrics.livez_answered(status.as_u16());
    answer(status, report)
}

/// What a health check server of a Service reports.
#[derive(Clone, Debug)]
pub(super) struct ServiceCheck {
    /// `namespace/name`.
    pub(super) service: Arc<str>,
    /// The IP family of the listener.
    pub(super) family: IpFamily,
    /// The source of the number of local endpoints.
    pub(super) wanted: watch::Receiver<Wanted>,
    /// The health of the proxy.
    pub(super) health: Health,
}

/// A router that answers every path and method with the health check of a Service.
pub(super) fn service_check(check: ServiceCheck) -> Router {
    Router::new().fallback(answer_check).with_state(check)
}

async fn answer_check(State(check): State<ServiceCheck>) -> Response {
    let is_healthy = check.health.report(Timestamp::now()).healthy;
    let answer = check.wanted.borrow().answer(&check.service, check.family, is_healthy);
    let weight = (ENDPOINT_WEIGHT, HeaderValue::from(answer.local_endpoints));
    reply(status(answer.is_good()), JSON, [NO_SNIFF, weight], answer.body(&check.service))
}

fn status(good: bool) -> StatusCode {
    if good { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

/// Like kube-proxy, a healthy answer has the current time as `lastUpdated`: it used to be the
/// time of kube-proxy's last periodic sync.
fn answer(status: StatusCode, report: Report) -> Response {
    let last_updated =
        if status == StatusCode::OK { report.current_time } else { report.last_updated };
    let body = serde_json::to_string(&Report { last_updated, ..report });
    reply(status, JSON, [NO_SNIFF], body.expect("a report has string keys only"))
}

fn text(text: &'static str) -> Response {
    reply(StatusCode::OK, TEXT, [NO_SNIFF], text)
}

async fn ping(RawQuery(query): RawQuery) -> Response {
    let mut names = query.as_deref().unwrap_or_default().split('&');
    let is_verbose = names.any(|part| part.split('=').next() == Some("verbose"));
    text(if is_verbose { "[+]ping ok\nhealthz check passed\n" } else { "ok" })
}

async fn scrape(State(metrics): State<Metrics>, headers: HeaderMap) -> Response {
    let accept = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok());
    let format = Format::accepted(accept.unwrap_or_default());
    let started_at = metrics.started_at();
    match tokio::task::spawn_blocking(move || metrics.encode(format)).await {
        Ok(Ok(text)) => {
            let kind = HeaderValue::from_static(format.content_type());
            let since = HeaderValue::from(started_at.as_second());
            reply(StatusCode::OK, kind, [(START_TIME, since)], text)
        }
        Ok(Err(_)) | Err(_) => server_error("cannot encode the metrics"),
    }
}
