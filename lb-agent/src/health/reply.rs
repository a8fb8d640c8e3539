//! HTTP answers in the form of Go's net/http, including headers, because the clients of these
//! ports were made for kube-proxy.
//!
//! Invariant: headers are in Go's order: those of the caller, the date, the length.

use axum::{
    body::Body,
    http::{HeaderName, HeaderValue, Response, StatusCode, header},
};
use jiff::{Timestamp, fmt::rfc2822::DateTimePrinter};

/// The content type of JSON.
pub(super) const JSON: HeaderValue = HeaderValue::from_static("application/json");
/// The content type of text.
pub(super) const TEXT: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");
/// The header that forbids clients to guess another content type.
pub(super) const NO_SNIFF: (HeaderName, HeaderValue) =
    (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));

/// An answer with `headers` after its content type.
pub(super) fn reply<const N: usize>(
    status: StatusCode,
    kind: HeaderValue,
    headers: [(HeaderName, HeaderValue); N],
    body: impl Into<Body>,
) -> Response<Body> {
    let mut response = Response::new(body.into());
    *response.status_mut() = status;
    let map = response.headers_mut();
    map.insert(header::CONTENT_TYPE, kind);
    map.extend(headers);
    let date = DateTimePrinter::new().timestamp_to_rfc9110_string(&Timestamp::now());
    if let Some(date) = date.ok().and_then(|date| HeaderValue::from_str(&date).ok()) {
        map.insert(header::DATE, date);
    }
    response
}

/// Go's answer to an unknown path.
pub(super) async fn not_found() -> Response<Body> {
    error(StatusCode::NOT_FOUND, "404 page not found")
}

/// An answer with status 500.
pub(super) fn server_error(text: &str) -> Response<Body> {
    error(StatusCode::INTERNAL_SERVER_ERROR, text)
}

fn error(status: StatusCode, text: &str) -> Response<Body> {
    reply(status, TEXT, [NO_SNIFF], format!("{text}\n"))
}
