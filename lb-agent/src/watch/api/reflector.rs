//! Follows the objects of one kind: a list, then the changes since its version.
//!
//! Invariants: what is sent never becomes older, and every request but the first follows a pause
//! or an answer that was complete.

use std::{collections::BTreeMap, ops::ControlFlow, time::Duration};

use axum::http::Request;
use kube::api::{ListParams, VersionMatch, WatchParams};
use lb_control::model::{
    event::{Object, ObjectEvent, ObjectKind, ObjectName, Unreadable},
    text::{Clean, Cut},
};
use tokio::{sync::mpsc::Sender, time::Instant};

use super::{
    connect::Connection,
    decode::{self, Bookmark, Change, Item},
    failure::Failure,
    pause::{Pause, jittered},
    reading::{self, Chunks, Lines, SILENCE},
    scope::NodeScope,
};
use crate::watch::admit::{admit, selector};

/// How long a watch lasts on average: as in client-go, where it is 5 to 10 minutes.
const WATCH: Duration = Duration::from_secs(450);
/// How much longer than it was asked for a watch may last.
const OVERTIME: Duration = Duration::from_secs(30);
/// After a stream that lasted so long, pauses are short again.
const HEALTHY: Duration = Duration::from_secs(30);
/// How long to wait before a kind that the server does not serve is requested again.
const NOT_SERVED_RETRY: Duration = Duration::from_secs(600);

/// What is to be done next.
#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    /// List.
    Listing,
    /// Ask for the changes since this version.
    Watching(String),
}

/// How new a list must be.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Floor {
    /// Whatever the server has: the agent has nothing.
    Any,
    /// At least as new as this version, which the agent has.
    AtLeast(String),
    /// The newest there is: the server does not know the version that the agent has.
    Newest,
}

impl Floor {
    fn version(&self) -> &str {
        match self {
            Self::Any => "0",
            Self::AtLeast(version) => version,
            Self::Newest => "",
        }
    }

    /// Versions are numbers that grow (KEP-5504); one that is no number is never older.
    fn is_above(&self, version: &str) -> bool {
        let Self::AtLeast(known) = self else { return false };
        let numbers: (Result<u64, _>, Result<u64, _>) = (version.parse(), known.parse());
        matches!(numbers, (Ok(found), Ok(known)) if found < known)
    }
}

/// A list that is not complete yet.
#[derive(Debug, Default)]
struct List {
    objects: BTreeMap<ObjectName, Object>,
    unreadable: BTreeMap<ObjectName, Unreadable>,
}

/// The watch of one kind.
pub(super) struct Reflector<'a> {
    kind: ObjectKind,
    connection: &'a Connection,
    sender: &'a Sender<ObjectEvent>,
    state: State,
    floor: Floor,
    field_selector: Option<String>,
    /// Lists are requested as streams.
    streaming: bool,
    /// The receiver has got a list.
    is_known: bool,
    /// The log says already that reading the kind is not allowed.
    is_denied: bool,
    pause: Pause,
}

impl<'a> Reflector<'a> {
    pub(super) fn new(
        kind: ObjectKind,
        connection: &'a Connection,
        sender: &'a Sender<ObjectEvent>,
    ) -> Self {
        Self {
            kind,
            connection,
            sender,
            state: State::Listing,
            floor: Floor::Any,
            field_selector: None,
            streaming: true,
            is_known: false,
            is_denied: false,
            pause: Pause::default(),
        }
    }

    /// Follows until the receiver is gone. With a scope, only the objects in it.
    pub(super) async fn run(mut self, mut scope: Option<NodeScope>) {
        if let Some(scope) = &mut scope {
            self.field_selector = scope.changed().await;
        }
        let sender = self.sender;
        loop {
            let started = Instant::now();
            let result = tokio::select! {
                result = self.follow() => result,
                () = sender.closed() => return,
                selector = changed(&mut scope) => {
                    tracing::info!(kind = %self.kind, selector, "watching other objects of this kind");
                    self.field_selector = selector;
                    self.list_again();
                    continue;
                }
            };
            if started.elapsed() >= HEALTHY {
                self.pause.reset();
            }
            let pause = match result {
                Ok(()) => self.pause.next(Pause::LONGEST),
                Err(Failure::Closed) => return,
                Err(failure) => match self.handle(failure).await {
                    Ok(pause) => pause,
                    Err(_) => return,
                },
            };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = sender.closed() => return,
            }
        }
    }

    /// Lists if need be, and passes on changes until the server ends the stream.
    async fn follow(&mut self) -> Result<(), Failure> {
        if self.state == State::Listing && !self.streaming {
            self.list().await?;
        }
        let limit = jittered(WATCH);
        let stream = reading::send(self.connection, self.watch_request(limit)?).await?;
        let mut chunks = stream.within(limit + OVERTIME);
        if self.state != State::Listing {
            self.lives();
        }
        let (mut lines, mut list) = (Lines::default(), List::default());
        while let Some(line) = self.next_line(&mut chunks, &mut lines).await? {
            self.apply(&line, &mut list).await?;
        }
        if self.state == State::Listing { Err(Failure::CutShort) } else { Ok(()) }
    }

    async fn next_line(
        &self,
        chunks: &mut Chunks,
        lines: &mut Lines,
    ) -> Result<Option<bytes::BytesMut>, Failure> {
        // A watch may be silent, as long as its connection is probed; a list may not.
        let silence = (self.state == State::Listing).then_some(SILENCE);
        loop {
            if let Some(line) = lines.next() {
                return Ok(Some(line));
            }
            let Some(chunk) = chunks.next(silence).await? else { return Ok(None) };
            lines.push(&chunk)?;
        }
    }

    fn watch_request(&self, limit: Duration) -> Result<Request<Vec<u8>>, Failure> {
        let is_list = self.state == State::Listing;
        let parameters = WatchParams {
            label_selector: selector(self.kind),
            field_selector: self.field_selector.clone(),
            timeout: u32::try_from(limit.as_secs()).ok(),
            bookmarks: true,
            send_initial_events: is_list,
        };
        let version = match &self.state {
            State::Listing => self.floor.version(),
            State::Watching(version) => version,
        };
        let request = kube::core::Request::new(reading::path(self.kind));
        let request = request.watch(&parameters, version);
        request.map_err(|error| Failure::Malformed(error.to_string()))
    }

    /// Lists by one answer, for a server without streaming lists: from its watch cache, and
    /// therefore without pages.
    async fn list(&mut self) -> Result<(), Failure> {
        let mut parameters = ListParams {
            label_selector: selector(self.kind),
            field_selector: self.field_selector.clone(),
            ..ListParams::default()
        };
        if self.floor != Floor::Newest {
            parameters = parameters.at(self.floor.version()).matching(VersionMatch::NotOlderThan);
        }
        let mut list = List::default();
        let listed = reading::list(self.connection, self.kind, &parameters, |item| {
            self.add(Change::Added, item, &mut list);
            ControlFlow::Continue(())
        });
        let version = listed.await?;
        self.complete(version, list).await
    }

    /// Applies a line of a stream.
    async fn apply(&mut self, line: &[u8], list: &mut List) -> Result<(), Failure> {
        let event = decode::event(line)?;
        match event.change {
            Change::Error => Err(decode::error_in_stream(event.object)),
            Change::Unknown => Ok(()),
            Change::Bookmark => {
                let Bookmark { version, ends_list } = decode::bookmark(event.object)?;
                if self.state != State::Listing {
                    self.lives();
                    self.state = State::Watching(version);
                } else if ends_list {
                    self.complete(version, std::mem::take(list)).await?;
                }
                Ok(())
            }
            change => {
                let item = decode::item(self.kind, event.object.get().as_bytes());
                if self.state == State::Listing {
                    self.add(change, item, list);
                    return Ok(());
                }
                self.change(change, item).await
            }
        }
    }

    /// Adds an object to a list, or removes it there: the list is a stream too.
    fn add(&self, change: Change, item: Item, list: &mut List) {
        let name = item.name();
        list.objects.remove(&name);
        list.unreadable.remove(&name);
        if change == Change::Deleted {
            return;
        }
        match item.outcome {
            Ok(object) => {
                list.objects.extend(admit(object).map(|object| (name, object)));
            }
            Err(unreadable) => {
                self.log_unreadable(&unreadable);
                list.unreadable.insert(name, unreadable);
            }
        }
    }

    /// Passes on a complete list.
    async fn complete(&mut self, version: String, list: List) -> Result<(), Failure> {
        if let Floor::AtLeast(known) = &self.floor
            && self.floor.is_above(&version)
        {
            return Err(Failure::Older { found: version, known: known.clone() });
        }
        let List { objects, unreadable } = list;
        let objects: Vec<_> = objects.into_values().collect();
        tracing::info!(kind = %self.kind, objects = objects.len(), "listed");
        let unreadable: Vec<_> = unreadable.into_values().collect();
        let event = if unreadable.is_empty() {
            ObjectEvent::Replaced(self.kind, objects)
        } else {
            ObjectEvent::ReplacedExcept(self.kind, objects, unreadable)
        };
        self.send(event).await?;
        self.is_known = true;
        self.is_denied = false;
        self.floor = Floor::AtLeast(version.clone());
        self.state = State::Watching(version);
        self.connection.liveness().listed(self.kind);
        self.lives();
        Ok(())
    }

    /// Passes on a change.
    async fn change(&mut self, change: Change, item: Item) -> Result<(), Failure> {
        self.lives();
        let name = item.name();
        if name.name.is_empty() {
            return Err(Failure::Malformed("an object has no name".to_owned()));
        }
        let event = match (change, item.outcome) {
            (Change::Deleted, _) => ObjectEvent::Deleted(self.kind, name),
            // An object that does not concern this proxy any more counts as deleted. That happens
            // if the server does not apply the selector.
            (_, Ok(object)) => {
                admit(object).map_or(ObjectEvent::Deleted(self.kind, name), ObjectEvent::Applied)
            }
            (_, Err(unreadable)) => {
                self.log_unreadable(&unreadable);
                ObjectEvent::Unreadable(self.kind, unreadable)
            }
        };
        self.send(event).await?;
        if let Some(version) = item.version {
            self.state = State::Watching(version);
        }
        Ok(())
    }

    fn log_unreadable(&self, object: &Unreadable) {
        let Unreadable { name, field, error, .. } = object;
        let name = name.to_string();
        tracing::warn!(
            kind = %self.kind, name = %Clean(&name), field = %Cut(field), error = %Cut(error),
            "this object cannot be read: what was known of it stays, others are not affected"
        );
        self.connection.liveness().unreadable(self.kind);
    }

    /// Decides what follows a failure, and after which pause.
    async fn handle(&mut self, failure: Failure) -> Result<Duration, Failure> {
        let is_of_list = self.state == State::Listing;
        let code = failure.code();
        if is_of_list && self.streaming && rejects_streaming(&failure) {
            tracing::debug!(kind = %self.kind, "the API server has no streaming lists");
            self.streaming = false;
            return Ok(Duration::ZERO);
        }
        if self.kind == ObjectKind::ServiceCidr && matches!(code, Some(403 | 404)) {
            return self.go_without(&failure).await;
        }
        let is_lost = matches!(code, Some(400 | 410 | 422))
            || matches!(failure, Failure::Malformed(_))
            || failure.is_version_too_large();
        if is_lost {
            self.list_again();
        }
        if failure.is_version_too_large() || (is_of_list && code == Some(410)) {
            self.floor = Floor::Newest;
        }
        let now = Instant::now().into_std();
        self.connection.liveness().broke(self.kind, &failure.to_string(), now);
        let pause = self.pause.next(failure.longest_pause()) + failure.retry_after();
        self.warn(&failure, pause);
        Ok(pause)
    }

    /// Continues without a kind that the server does not serve, or that may not be read.
    async fn go_without(&mut self, failure: &Failure) -> Result<Duration, Failure> {
        let kind = self.kind;
        self.connection.liveness().is_absent(kind);
        // A list from before is kept, because it is better than an empty one.
        if !self.is_known {
            self.send(ObjectEvent::Replaced(kind, Vec::new())).await?;
        }
        self.is_known = true;
        self.list_again();
        if failure.code() == Some(404) {
            tracing::info!(%kind, "the API server does not serve this kind");
            return Ok(jittered(NOT_SERVED_RETRY));
        }
        if !self.is_denied {
            tracing::warn!(%kind, error = %failure, "not allowed to read this kind: continuing without it; allow list and watch in the agent's ClusterRole");
            self.is_denied = true;
        }
        Ok(self.pause.next(Pause::LONGEST))
    }

    /// The next request is for a list.
    fn list_again(&mut self) {
        if let State::Watching(version) = std::mem::replace(&mut self.state, State::Listing) {
            self.floor = Floor::AtLeast(version);
        }
    }

    fn lives(&self) {
        let now = Instant::now().into_std();
        if let Some(outage) = self.connection.liveness().lives(self.kind, now) {
            tracing::info!(kind = %self.kind, ?outage, "the watch works again");
        }
    }

    fn warn(&self, failure: &Failure, pause: Duration) {
        let (kind, server) = (self.kind, self.connection.server());
        let retry_in = format!("{pause:.1?}");
        match self.connection.advice() {
            Some(advice) if failure.is_unreachable() => {
                tracing::warn!(%kind, server, error = %failure, retry_in, advice, "cannot reach the API server: Services stay as they are, retrying");
            }
            _ => {
                tracing::warn!(%kind, server, error = %failure, retry_in, "watch broken, retrying: changes of this kind are not seen until then")
            }
        }
    }

    async fn send(&self, event: ObjectEvent) -> Result<(), Failure> {
        self.connection.learned().observe(&event);
        self.sender.send(event).await.map_err(|_| Failure::Closed)
    }
}

/// Whether a server refuses to stream a list. One without streaming lists rejects their parameters,
/// and one whose store cannot report progress answers 500 in the stream.
fn rejects_streaming(failure: &Failure) -> bool {
    match failure {
        Failure::Status { code: 400 | 422, .. } => true,
        Failure::Status { code: 500, is_in_stream, .. } => *is_in_stream,
        _ => false,
    }
}

/// The next field selector of a scope; never without one.
async fn changed(scope: &mut Option<NodeScope>) -> Option<String> {
    match scope {
        Some(scope) => scope.changed().await,
        None => std::future::pending().await,
    }
}
