//! An API server of prepared answers, over plain HTTP/1.1: every watch has a connection of its own.
//!
//! It serves watches with streamed lists; every other answer is an empty list. It counts what it is
//! asked and what it sends. A watch ends after the time that it asked for, and what is sent before
//! the next one of its kind waits for that.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::{Value, json};

/// How long a watch lasts that does not say it.
const NO_END: Duration = Duration::from_secs(86_400);

/// What agents have asked since the server started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Usage {
    /// Connections that were opened.
    pub connections: u64,
    /// Requests.
    pub requests: u64,
    /// Bytes of answers.
    pub bytes: u64,
}

impl Usage {
    /// What came after `before`.
    #[must_use]
    pub fn since(self, before: Self) -> Self {
        Self {
            connections: self.connections - before.connections,
            requests: self.requests - before.requests,
            bytes: self.bytes - before.bytes,
        }
    }
}

/// A server; its threads end with the process.
#[derive(Clone)]
pub struct Server(Arc<State>);

struct State {
    /// The events of each list by the plural of the kind.
    lists: HashMap<&'static str, Vec<u8>>,
    watches: Mutex<HashMap<String, Watches>>,
    connections: AtomicU64,
    requests: AtomicU64,
    bytes: AtomicU64,
}

/// The watches of a kind.
#[derive(Default)]
struct Watches {
    /// The clients, and when their watch ends.
    clients: Vec<(TcpStream, Instant)>,
    /// What was sent while there was none.
    waiting: Vec<u8>,
}

impl Server {
    /// Serves `lists`, objects by the plural of their kind, on `listener`.
    pub fn start(listener: TcpListener, lists: HashMap<&'static str, Vec<Value>>) -> Self {
        let lists = lists.into_iter().map(|(kind, objects)| (kind, streamed(&objects)));
        let state = Arc::new(State {
            lists: lists.collect(),
            watches: Mutex::default(),
            connections: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
        });
        let server = Self(state);
        let accepting = server.clone();
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let server = accepting.clone();
                server.0.connections.fetch_add(1, Ordering::Relaxed);
                // A client that ends in the middle of a request is no error here.
                thread::spawn(move || server.serve(client).ok());
            }
        });
        server
    }

    /// What agents have asked so far.
    pub fn usage(&self) -> Usage {
        Usage {
            connections: self.0.connections.load(Ordering::Relaxed),
            requests: self.0.requests.load(Ordering::Relaxed),
            bytes: self.0.bytes.load(Ordering::Relaxed),
        }
    }

    /// Sends a line, which [`modified`] makes, to every watch of a kind; if their time is over, to
    /// the next one.
    ///
    /// # Errors
    /// Nobody has ever watched the kind.
    pub fn send(&self, kind: &str, line: &[u8]) -> Result<()> {
        let mut watches = self.0.watches.lock().unwrap_or_else(PoisonError::into_inner);
        let watches = watches.get_mut(kind).with_context(|| format!("nobody watches {kind}"))?;
        let now = Instant::now();
        watches.clients.retain(|(client, end)| match now < *end {
            true => self.chunk(client, line).is_ok(),
            false => {
                // An empty chunk ends the answer; a client that is gone needs no end.
                self.chunk(client, &[]).ok();
                false
            }
        });
        if watches.clients.is_empty() {
            watches.waiting.extend_from_slice(line);
        }
        Ok(())
    }

    fn serve(&self, client: TcpStream) -> Result<()> {
        client.set_nodelay(true)?;
        let mut requests = BufReader::new(client.try_clone()?);
        while let Some(target) = next_request(&mut requests)? {
            self.0.requests.fetch_add(1, Ordering::Relaxed);
            self.answer(&client, &target)?;
        }
        Ok(())
    }

    fn answer(&self, client: &TcpStream, target: &str) -> Result<()> {
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let kind = path.rsplit('/').next().unwrap_or_default();
        let has = |parameter: &str| query.split('&').any(|one| one == parameter);
        let Some(list) = self.0.lists.get(kind).filter(|_| has("watch=true")) else {
            // By a list of one object the agent learns whether the server serves.
            return self.whole(client, &json!({"metadata": {"resourceVersion": "1"}, "items": []}));
        };
        let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n";
        self.write(client, head.as_bytes())?;
        // The list comes first: an event must not get into the middle of it.
        let mut watches = self.0.watches.lock().unwrap_or_else(PoisonError::into_inner);
        if has("sendInitialEvents=true") {
            for part in list.chunks(64 << 10) {
                self.chunk(client, part)?;
            }
        }
        let watches = watches.entry(kind.to_owned()).or_default();
        let waiting = std::mem::take(&mut watches.waiting);
        if !waiting.is_empty() {
            self.chunk(client, &waiting)?;
        }
        let seconds = query.split('&').find_map(|one| one.strip_prefix("timeoutSeconds="));
        let time =
            seconds.map_or(Ok(NO_END), |seconds| seconds.parse().map(Duration::from_secs))?;
        watches.clients.push((client.try_clone()?, Instant::now() + time));
        Ok(())
    }

    fn whole(&self, client: &TcpStream, answer: &Value) -> Result<()> {
        let body = answer.to_string();
        let head = format!(
            "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        self.write(client, (head + &body).as_bytes())
    }

    fn chunk(&self, client: &TcpStream, bytes: &[u8]) -> Result<()> {
        let mut chunk = format!("{:x}\r\n", bytes.len()).into_bytes();
        chunk.extend_from_slice(bytes);
        chunk.extend_from_slice(b"\r\n");
        self.write(client, &chunk)
    }

    fn write(&self, mut client: &TcpStream, bytes: &[u8]) -> Result<()> {
        client.write_all(bytes)?;
        self.0.bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(())
    }
}

/// Opens the server's port in the calling thread's namespace.
///
/// # Errors
/// The port is in use.
pub fn listen(address: SocketAddr) -> Result<TcpListener> {
    TcpListener::bind(address).with_context(|| format!("cannot listen on {address}"))
}

/// The line of a watch that says that an object has changed.
pub fn modified(object: &Value) -> Vec<u8> {
    line("MODIFIED", object)
}

/// The lines of a watch that say that an object was deleted and created again.
pub fn recreated(object: &Value) -> Vec<u8> {
    [line("DELETED", object), line("ADDED", object)].concat()
}

fn line(change: &str, object: &Value) -> Vec<u8> {
    let mut line = json!({"type": change, "object": object}).to_string();
    line.push('\n');
    line.into_bytes()
}

/// A list as the start of a watch.
fn streamed(objects: &[Value]) -> Vec<u8> {
    let mut lines: Vec<u8> = objects.iter().flat_map(|object| line("ADDED", object)).collect();
    let mut end = json!({"metadata": {
        "resourceVersion": "1", "annotations": {"k8s.io/initial-events-end": "true"},
    }});
    // kube-proxy decodes nothing without a type.
    for field in ["apiVersion", "kind"] {
        if let Some(value) = objects.first().and_then(|object| object.get(field)) {
            end[field] = value.clone();
        }
    }
    lines.extend(line("BOOKMARK", &end));
    lines
}

/// The target of the next request; `None` at the end of the connection. Its body is skipped.
fn next_request(requests: &mut impl BufRead) -> Result<Option<String>> {
    let mut first = String::new();
    if requests.read_line(&mut first)? == 0 {
        return Ok(None);
    }
    let target = first.split(' ').nth(1).context("a request without a target")?.to_owned();
    let mut length = 0;
    loop {
        let mut header = String::new();
        ensure!(requests.read_line(&mut header)? > 0, "a request that is cut short");
        let Some((name, value)) = header.split_once(':') else { break };
        if name.eq_ignore_ascii_case("content-length") {
            length = value.trim().parse()?;
        }
    }
    std::io::copy(&mut requests.take(length), &mut std::io::sink())?;
    Ok(Some(target))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_read_one_after_the_other() {
        let text =
            b"POST /a?b HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}GET /c HTTP/1.1\r\nHost: x\r\n\r\n";
        let mut requests = &text[..];
        assert_eq!(next_request(&mut requests).unwrap().as_deref(), Some("/a?b"));
        assert_eq!(next_request(&mut requests).unwrap().as_deref(), Some("/c"));
        assert_eq!(next_request(&mut requests).unwrap(), None);
    }

    #[test]
    fn a_watch_begins_with_the_list_and_continues_with_events() {
        let listener = listen(([127, 0, 0, 1], 0).into()).unwrap();
        let address = listener.local_addr().unwrap();
        let objects = HashMap::from([("services", vec![json!({"metadata": {"name": "one"}})])]);
        let server = Server::start(listener, objects);
        let mut client = TcpStream::connect(address).unwrap();
        let target = "/api/v1/services?watch=true&sendInitialEvents=true";
        client.write_all(format!("GET {target} HTTP/1.1\r\n\r\n").as_bytes()).unwrap();
        let mut lines = BufReader::new(client).lines().map(Result::unwrap);
        let first = lines.find(|line| line.contains("ADDED")).unwrap();
        assert!(first.contains("one"), "{first}");
        lines.find(|line| line.contains("initial-events-end")).unwrap();
        // The watch is registered as soon as its list is written.
        while server.send("services", &modified(&json!({"x": 1}))).is_err() {}
        assert_eq!(
            lines.find(|line| line.contains("MODIFIED")).as_deref(),
            Some(r#"{"object":{"x":1},"type":"MODIFIED"}"#)
        );
        let Usage { connections, requests, bytes } = server.usage();
        assert_eq!((connections, requests), (1, 1));
        assert!(bytes > 200, "{bytes}");
    }

    #[test]
    fn what_is_sent_after_the_time_of_a_watch_waits_for_the_next_one() {
        let listener = listen(([127, 0, 0, 1], 0).into()).unwrap();
        let address = listener.local_addr().unwrap();
        let server = Server::start(listener, HashMap::from([("services", vec![])]));
        let watch = |seconds: u32| {
            let mut client = TcpStream::connect(address).unwrap();
            let target = format!("/api/v1/services?watch=true&timeoutSeconds={seconds}");
            client.write_all(format!("GET {target} HTTP/1.1\r\n\r\n").as_bytes()).unwrap();
            BufReader::new(client).lines().map(Result::unwrap)
        };
        let mut first = watch(0);
        while server.send("services", &modified(&json!({"x": 1}))).is_err() {}
        assert_eq!(first.find(|line| line == "0").as_deref(), Some("0"), "the answer ends");
        server.send("services", &modified(&json!({"x": 2}))).unwrap();
        let mut second = watch(100).filter(|line| line.contains("MODIFIED"));
        for number in [1, 2] {
            let expected = format!(r#"{{"object":{{"x":{number}}},"type":"MODIFIED"}}"#);
            assert_eq!(second.next(), Some(expected));
        }
    }
}
