//! Answers, cut into lines and objects as they arrive.
//!
//! Invariant: never more than one object is in memory as text.

use std::{mem, ops::ControlFlow, pin::Pin, time::Duration};

use axum::http::{HeaderMap, Request, Response, header::RETRY_AFTER};
use bytes::{Bytes, BytesMut};
use futures::{Stream, StreamExt, TryStreamExt};
use http_body_util::BodyExt;
use k8s_openapi::api::{
    core::v1::{Node, Service},
    discovery::v1::EndpointSlice,
    networking::v1::ServiceCIDR,
};
use kube::{Resource, api::ListParams, client::Body};
use lb_control::model::event::ObjectKind;
use tokio::time::{Instant, timeout, timeout_at};

use super::{
    connect::Connection,
    decode::{self, Item},
    failure::Failure,
};

/// How long a server may be silent before it answers, and within a list.
pub(super) const SILENCE: Duration = Duration::from_secs(60);

/// The limit of an object's JSON: API servers accept 3 MiB.
const MAX_OBJECT: usize = 16 << 20;
/// The limit of the text of an error.
const MAX_ERROR: usize = 64 << 10;

/// The path of all objects of a kind.
pub(super) fn path(kind: ObjectKind) -> String {
    match kind {
        ObjectKind::Service => Service::url_path(&(), None),
        ObjectKind::EndpointSlice => EndpointSlice::url_path(&(), None),
        ObjectKind::Node => Node::url_path(&(), None),
        ObjectKind::ServiceCidr => ServiceCIDR::url_path(&(), None),
    }
}

/// Lists a kind, and calls `each` for its objects as they arrive, until that breaks. Returns the
/// version of the list; empty if `each` broke.
pub(super) async fn list(
    connection: &Connection,
    kind: ObjectKind,
    parameters: &ListParams,
    mut each: impl FnMut(Item) -> ControlFlow<()>,
) -> Result<String, Failure> {
    let request = kube::core::Request::new(path(kind)).list(parameters);
    let request = request.map_err(|error| Failure::Malformed(error.to_string()))?;
    let mut chunks = send(connection, request).await?;
    let mut items = Items::default();
    while let Some(chunk) = chunks.next(Some(SILENCE)).await? {
        let each = |json: &[u8]| each(decode::item(kind, json));
        if items.push(&chunk, each)?.is_break() {
            return Ok(String::new());
        }
    }
    decode::list_version(&items.envelope)
}

/// Sends a request. An answer that is an error is a [`Failure`].
pub(super) async fn send(
    connection: &Connection,
    request: Request<Vec<u8>>,
) -> Result<Chunks, Failure> {
    let answer = timeout(SILENCE, connection.client.send(request.map(Body::from))).await;
    let answer = answer.map_err(|_| Failure::Silence(SILENCE))?.map_err(Failure::Request)?;
    let status = answer.status();
    if status.is_success() {
        return Ok(Chunks::of(answer));
    }
    let retry_after = retry_after(answer.headers());
    let mut chunks = Chunks::of(answer);
    let mut text = Vec::new();
    while text.len() < MAX_ERROR
        && let Ok(Some(chunk)) = chunks.next(Some(SILENCE)).await
    {
        text.extend_from_slice(&chunk);
    }
    let (code, message) = (status.as_u16(), decode::message(&text));
    Err(Failure::Status { code, message, retry_after, is_in_stream: false })
}

fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    headers.get(RETRY_AFTER)?.to_str().ok()?.parse().ok().map(Duration::from_secs)
}

/// The bytes of an answer.
pub(super) struct Chunks {
    stream: Pin<Box<dyn Stream<Item = Result<Bytes, String>> + Send>>,
    /// When it must have ended.
    deadline: Option<Instant>,
}

impl Chunks {
    fn of(answer: Response<Body>) -> Self {
        let stream = answer.into_body().into_data_stream();
        // The innermost cause alone says what happened.
        Self { stream: Box::pin(stream.map_err(|error| innermost(&error))), deadline: None }
    }

    /// The answer must have ended in this time.
    pub(super) fn within(self, limit: Duration) -> Self {
        Self { deadline: Some(Instant::now() + limit), ..self }
    }

    /// The next bytes, which may take as long as `silence`.
    pub(super) async fn next(
        &mut self,
        silence: Option<Duration>,
    ) -> Result<Option<Bytes>, Failure> {
        let started = Instant::now();
        let until = [silence.map(|silence| started + silence), self.deadline];
        let next = match until.into_iter().flatten().min() {
            Some(until) => timeout_at(until, self.stream.next()).await,
            None => Ok(self.stream.next().await),
        };
        let next = next.map_err(|_| Failure::Silence(started.elapsed()))?;
        next.transpose().map_err(Failure::Broken)
    }
}

fn innermost(error: &dyn std::error::Error) -> String {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
}

/// Cuts bytes into lines. What follows the last line end is no line.
#[derive(Debug, Default)]
pub(super) struct Lines {
    pending: BytesMut,
    /// How far there is no line end.
    searched: usize,
}

impl Lines {
    pub(super) fn push(&mut self, chunk: &[u8]) -> Result<(), Failure> {
        self.pending.extend_from_slice(chunk);
        let is_too_long = self.pending.len() > MAX_OBJECT && !self.pending.contains(&b'\n');
        if is_too_long { Err(too_long()) } else { Ok(()) }
    }

    /// The next line, without its end.
    pub(super) fn next(&mut self) -> Option<BytesMut> {
        let unsearched = &self.pending[self.searched..];
        let Some(end) = unsearched.iter().position(|byte| *byte == b'\n') else {
            self.searched = self.pending.len();
            return None;
        };
        let mut line = self.pending.split_to(self.searched + end + 1);
        line.truncate(line.len() - 1);
        self.searched = 0;
        Some(line)
    }
}

/// Cuts the objects out of the JSON of a list.
#[derive(Debug, Default)]
struct Items {
    /// The list without its objects.
    envelope: Vec<u8>,
    /// The object that is not complete yet.
    item: Vec<u8>,
    /// How many brackets are open.
    depth: u32,
    in_string: bool,
    is_escaped: bool,
    /// Within the array of the objects.
    in_items: bool,
}

impl Items {
    /// Calls `each` for every object that is complete, until that breaks.
    fn push(
        &mut self,
        chunk: &[u8],
        mut each: impl FnMut(&[u8]) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>, Failure> {
        for byte in chunk {
            if self.add(*byte) && each(&mem::take(&mut self.item)).is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
        if self.item.len() > MAX_OBJECT || self.envelope.len() > MAX_OBJECT {
            return Err(too_long());
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Adds a byte. Returns whether it completes an object.
    fn add(&mut self, byte: u8) -> bool {
        if self.in_string {
            self.in_string = self.is_escaped || byte != b'"';
            self.is_escaped = byte == b'\\' && !self.is_escaped;
            self.keep(byte);
            return false;
        }
        match byte {
            b'"' => self.in_string = true,
            b'{' | b'[' => {
                let starts_items = byte == b'[' && self.depth == 1 && self.follows_items();
                self.in_items |= starts_items;
                self.depth += 1;
                if starts_items {
                    self.envelope.push(byte);
                    return false;
                }
            }
            b'}' | b']' => {
                self.depth = self.depth.saturating_sub(1);
                if self.in_items && self.depth == 1 {
                    self.in_items = false;
                }
            }
            _ => {}
        }
        self.keep(byte);
        self.in_items && byte == b'}' && self.depth == 2
    }

    fn keep(&mut self, byte: u8) {
        match (self.in_items, self.depth) {
            (false, _) => self.envelope.push(byte),
            // Between two objects.
            (true, 2) if byte != b'}' => {}
            (true, _) => self.item.push(byte),
        }
    }

    /// Whether the key of the array that begins is that of the objects.
    fn follows_items(&self) -> bool {
        let key = self.envelope.trim_ascii_end().strip_suffix(b":");
        key.is_some_and(|key| key.trim_ascii_end().ends_with(b"\"items\""))
    }
}

fn too_long() -> Failure {
    Failure::Malformed(format!("an object is longer than {MAX_OBJECT} bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The objects of a list that arrives in pieces of `size`, and its version.
    fn cut(text: &str, size: usize) -> (Vec<String>, String) {
        let (mut items, mut found) = (Items::default(), Vec::new());
        for chunk in text.as_bytes().chunks(size) {
            let result = items.push(chunk, |json| {
                found.push(String::from_utf8(json.to_vec()).unwrap());
                ControlFlow::Continue(())
            });
            assert!(result.unwrap().is_continue());
        }
        (found, decode::list_version(&items.envelope).unwrap_or_default())
    }

    #[test]
    fn a_list_is_cut_into_its_objects_wherever_its_pieces_end() {
        let tricky = r#"{"metadata":{"name":"a\"}]\\"},"items":[1,{"x":"{["}]}"#;
        for (text, expected) in [
            (r#"{"metadata":{"resourceVersion":"7"},"items":[]}"#.to_owned(), vec![]),
            (r#"{"items":null,"metadata":{"resourceVersion":"7"}}"#.to_owned(), vec![]),
            (
                format!(
                    "{{ \"other\":[[\"items\"],{{\"items\":[2]}}], \"items\" : [ {tricky} ,\n {{}}\n] , \"metadata\":{{\"resourceVersion\":\"7\"}} }}\n"
                ),
                vec![tricky, "{}"],
            ),
        ] {
            for size in 1..=text.len() {
                let (found, version) = cut(&text, size);
                assert_eq!(found, expected, "{text} in pieces of {size}");
                assert_eq!(version, "7", "{text} in pieces of {size}");
            }
        }
    }

    #[test]
    fn a_list_that_is_cut_short_has_no_version() {
        let text = r#"{"metadata":{"resourceVersion":"7"},"items":[{"a":1},{"b"#;
        let (found, version) = cut(text, 5);
        assert_eq!((found.len(), version.as_str()), (1, ""));
    }

    #[test]
    fn lines_are_cut_wherever_their_pieces_end() {
        let text = b"one\n\ntwo\nhalf";
        for size in 1..=text.len() {
            let (mut lines, mut found) = (Lines::default(), Vec::new());
            for chunk in text.chunks(size) {
                lines.push(chunk).unwrap();
                while let Some(line) = lines.next() {
                    found.push(line.to_vec());
                }
            }
            assert_eq!(found, [&b"one"[..], b"", b"two"], "in pieces of {size}");
        }
    }
}
