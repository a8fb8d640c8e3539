//! A Kubernetes API server as a source of events.
//!
//! It keeps no objects: a list goes to the receiver as one [`Event::Replaced`], which
//! the receiver compares with what it has. Invariant: nothing that the server does or
//! fails to do ends the watch; it ends with its receiver.

mod connect;
mod liveness;

pub use connect::{ConnectError, Connection, Options, connect};
pub use liveness::Liveness;

use std::{
    fmt,
    hash::{BuildHasher, Hasher, RandomState},
    time::{Duration, Instant},
};

use futures::{Stream, StreamExt};
use k8s_openapi::api::{
    core::v1::{Node, Service},
    discovery::v1::EndpointSlice,
    networking::v1::ServiceCIDR,
};
use kube::{
    Api, Resource,
    runtime::watcher::{self, watcher},
};
use lb_control::model::event::{Object, ObjectEvent, ObjectKind};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc::Sender;

use super::admit::{admit, selector};

/// How often a kind that the server does not serve is asked for again.
const NOT_SERVED_RETRY: Duration = Duration::from_secs(600);

/// Watches all kinds until the receiver is gone.
pub async fn watch(connection: Connection, sender: Sender<ObjectEvent>) {
    watch_with(connection, sender, NOT_SERVED_RETRY).await;
}

async fn watch_with(
    connection: Connection,
    sender: Sender<ObjectEvent>,
    not_served_retry: Duration,
) {
    let watch = Watch { connection: &connection, sender: &sender, not_served_retry };
    let client = || connection.client.clone();
    tokio::join!(
        watch.kind::<Service>(ObjectKind::Service, Api::all(client())),
        watch.kind::<EndpointSlice>(ObjectKind::EndpointSlice, Api::all(client())),
        watch.kind::<Node>(ObjectKind::Node, Api::all(client())),
        watch.kind::<ServiceCIDR>(ObjectKind::ServiceCidr, Api::all(client())),
    );
}

#[derive(Clone, Copy)]
struct Watch<'a> {
    connection: &'a Connection,
    sender: &'a Sender<ObjectEvent>,
    not_served_retry: Duration,
}

/// What to do after an error of the watch.
#[derive(Debug, PartialEq, Eq)]
enum Remedy {
    /// Go on with the same watch after a pause.
    Resume,
    /// List again after a pause: the version to go on from is too old.
    Relist,
    /// List page by page: the server knows no streaming lists.
    ListPages,
    /// Do without the kind: the server does not have it.
    NotServed,
    /// Do without the kind until it may be read.
    Denied,
}

/// How a stream of one kind ended.
enum End {
    Closed,
    After(Remedy),
}

/// How far the watch of a kind has come.
#[derive(Debug)]
struct Progress {
    /// Lists are asked for as streams.
    streaming: bool,
    /// No list has ended since the last one began.
    listing: bool,
    /// The receiver was told a list.
    is_known: bool,
    /// That the kind may not be read was said.
    is_denied: bool,
    pause: Pause,
}

impl Progress {
    fn new() -> Self {
        Self {
            streaming: true,
            listing: true,
            is_known: false,
            is_denied: false,
            pause: Pause::default(),
        }
    }
}

impl Watch<'_> {
    async fn kind<K>(self, kind: ObjectKind, api: Api<K>)
    where
        K: Resource + Clone + DeserializeOwned + fmt::Debug + Send + 'static,
        Object: From<K>,
    {
        let mut progress = Progress::new();
        loop {
            let stream = watcher(api.clone(), config(kind, progress.streaming));
            let end = tokio::select! {
                end = self.follow(kind, stream, &mut progress) => end,
                () = self.sender.closed() => End::Closed,
            };
            let pause = match end {
                End::Closed => return,
                End::After(Remedy::ListPages) => {
                    tracing::debug!(%kind, "the API server has no streaming lists");
                    progress.streaming = false;
                    Duration::ZERO
                }
                End::After(Remedy::NotServed) => {
                    tracing::info!(%kind, "the API server does not serve this kind");
                    jittered(self.not_served_retry)
                }
                End::After(Remedy::Relist) => progress.pause.next(Pause::OUTDATED),
                End::After(Remedy::Denied | Remedy::Resume) => progress.pause.next(Pause::LONGEST),
            };
            if self.sleep(pause).await.is_err() {
                return;
            }
        }
    }

    /// Passes the events of a stream on until it has to be made anew.
    async fn follow<K>(
        &self,
        kind: ObjectKind,
        stream: impl Stream<Item = watcher::Result<watcher::Event<K>>>,
        progress: &mut Progress,
    ) -> End
    where
        Object: From<K>,
    {
        let mut stream = std::pin::pin!(stream);
        let mut list = Vec::new();
        while let Some(next) = stream.next().await {
            let event = match next {
                Ok(watcher::Event::Init) => {
                    list = Vec::new();
                    progress.listing = true;
                    continue;
                }
                Ok(watcher::Event::InitApply(object)) => {
                    list.extend(admit(object.into()));
                    continue;
                }
                Ok(watcher::Event::InitDone) => {
                    tracing::info!(%kind, objects = list.len(), "listed");
                    progress.listing = false;
                    progress.is_known = true;
                    progress.is_denied = false;
                    ObjectEvent::Replaced(kind, std::mem::take(&mut list))
                }
                Ok(watcher::Event::Apply(object)) => changed(kind, object.into()),
                Ok(watcher::Event::Delete(object)) => deleted(kind, &object.into()),
                Err(error) => {
                    if let Some(end) = self.mend(kind, &error, progress).await {
                        return end;
                    }
                    continue;
                }
            };
            progress.pause.reset();
            if self.send(event).await.is_err() {
                return End::Closed;
            }
        }
        End::After(Remedy::Relist)
    }

    /// Says what is wrong, and pauses where the same stream can go on; otherwise how it
    /// ends.
    async fn mend(
        &self,
        kind: ObjectKind,
        error: &watcher::Error,
        progress: &mut Progress,
    ) -> Option<End> {
        let remedy = remedy(kind, error, progress.streaming && progress.listing);
        let liveness = self.connection.liveness();
        match remedy {
            Remedy::Resume | Remedy::Relist => {
                liveness.broke(kind, &sentence(error), Instant::now());
            }
            Remedy::ListPages => {}
            Remedy::NotServed | Remedy::Denied => liveness.lives(kind),
        }
        match remedy {
            Remedy::Resume => {
                let delay = progress.pause.next(longest_pause(error));
                self.warn(kind, error, Some(delay));
                tokio::time::sleep(delay).await;
                return None;
            }
            Remedy::Relist => self.warn(kind, error, None),
            Remedy::ListPages => {}
            Remedy::NotServed | Remedy::Denied => {
                if remedy == Remedy::Denied && !progress.is_denied {
                    let shown = sentence(error);
                    tracing::warn!(%kind, error = shown, "not allowed to read this kind: going on without it");
                    progress.is_denied = true;
                }
                // What was listed before is worth more than nothing.
                if !progress.is_known
                    && self.send(ObjectEvent::Replaced(kind, Vec::new())).await.is_err()
                {
                    return Some(End::Closed);
                }
                progress.is_known = true;
            }
        }
        Some(End::After(remedy))
    }

    fn warn(&self, kind: ObjectKind, error: &watcher::Error, delay: Option<Duration>) {
        let server = self.connection.url();
        let retry_in = delay.map(|delay| format!("{delay:.1?}"));
        let shown = sentence(error);
        match self.connection.advice() {
            Some(advice) if is_unreachable(error) => {
                tracing::warn!(%kind, server, error = shown, retry_in, advice, "cannot reach the API server");
            }
            _ => tracing::warn!(%kind, server, error = shown, retry_in, "watch broken, retrying"),
        }
    }

    async fn send(&self, event: ObjectEvent) -> Result<(), Closed> {
        self.sender.send(event).await.map_err(|_| Closed)
    }

    async fn sleep(&self, delay: Duration) -> Result<(), Closed> {
        tokio::select! {
            () = tokio::time::sleep(delay) => Ok(()),
            () = self.sender.closed() => Err(Closed),
        }
    }
}

/// The receiver of events is gone.
struct Closed;

fn config(kind: ObjectKind, streaming: bool) -> watcher::Config {
    let config = watcher::Config { label_selector: selector(kind), ..watcher::Config::default() };
    if streaming { config.streaming_lists() } else { config }
}

/// What a changed object is to this proxy: it may have ceased to concern it, where the
/// server did not apply the selector.
fn changed(kind: ObjectKind, object: Object) -> ObjectEvent {
    let name = object.name();
    admit(object).map_or(ObjectEvent::Deleted(kind, name), ObjectEvent::Applied)
}

fn deleted(kind: ObjectKind, object: &Object) -> ObjectEvent {
    ObjectEvent::Deleted(kind, object.name())
}

/// What to do after an error, `in_streaming_list` if it came instead of such a list or
/// amid it.
fn remedy(kind: ObjectKind, error: &watcher::Error, in_streaming_list: bool) -> Remedy {
    let status = match error {
        watcher::Error::WatchStartFailed(cause) | watcher::Error::InitialListFailed(cause) => {
            let kube::Error::Api(status) = cause else { return Remedy::Resume };
            status
        }
        // A server whose store cannot report progress says so in the stream, with 500.
        watcher::Error::WatchError(status) if in_streaming_list && status.code == 500 => {
            return Remedy::ListPages;
        }
        _ => return Remedy::Resume,
    };
    match status.code {
        410 => Remedy::Relist,
        404 if kind == ObjectKind::ServiceCidr => Remedy::NotServed,
        403 if kind == ObjectKind::ServiceCidr => Remedy::Denied,
        // The parameters of streaming lists are invalid, or a bad request, to a server
        // without them.
        400 | 422 if in_streaming_list => Remedy::ListPages,
        _ => Remedy::Resume,
    }
}

/// How long to wait at most after an error before the same watch goes on.
fn longest_pause(error: &watcher::Error) -> Duration {
    match error {
        watcher::Error::WatchError(status) if status.code == 410 => Pause::OUTDATED,
        error if is_unreachable(error) => Pause::UNREACHABLE,
        _ => Pause::LONGEST,
    }
}

fn is_unreachable(error: &watcher::Error) -> bool {
    cause(error)
        .is_some_and(|cause| matches!(cause, kube::Error::Service(_) | kube::Error::HyperError(_)))
}

fn cause(error: &watcher::Error) -> Option<&kube::Error> {
    match error {
        watcher::Error::InitialListFailed(cause)
        | watcher::Error::WatchStartFailed(cause)
        | watcher::Error::WatchFailed(cause) => Some(cause),
        watcher::Error::WatchError(_) | watcher::Error::NoResourceVersion => None,
    }
}

/// The error without what is said twice, and with the cause that a transport hides.
fn sentence(error: &watcher::Error) -> String {
    let cause = match (error, cause(error)) {
        (watcher::Error::WatchError(status), _) => {
            return format!("{} {}", status.code, status.message);
        }
        (_, Some(cause)) => cause,
        (_, None) => return error.to_string(),
    };
    match cause {
        kube::Error::Api(status) => format!("{} {}", status.code, status.message),
        cause => {
            let mut innermost: &dyn std::error::Error = cause;
            while let Some(source) = innermost.source() {
                innermost = source;
            }
            innermost.to_string()
        }
    }
}

/// Pauses between attempts: doubling up to a limit, with jitter, from the start again
/// after a success or a long quiet time.
#[derive(Debug)]
struct Pause {
    next: Duration,
    last: Instant,
}

impl Pause {
    const FIRST: Duration = Duration::from_millis(100);
    /// For a server that answers with errors, and may have more than enough to do.
    const LONGEST: Duration = Duration::from_secs(15);
    /// For one that cannot be reached: what it never sees costs it nothing.
    const UNREACHABLE: Duration = Duration::from_secs(3);
    /// For what is too old: the next list mends it.
    const OUTDATED: Duration = Duration::from_secs(1);

    fn next(&mut self, longest: Duration) -> Duration {
        if self.last.elapsed() > 2 * Self::LONGEST {
            self.reset();
        }
        self.last = Instant::now();
        let pause = self.next.min(longest);
        self.next = (pause * 2).min(Self::LONGEST);
        jittered(pause)
    }

    fn reset(&mut self) {
        self.next = Self::FIRST;
    }
}

impl Default for Pause {
    fn default() -> Self {
        Self { next: Self::FIRST, last: Instant::now() }
    }
}

/// Between 0.5 and 1.5 times the duration.
fn jittered(duration: Duration) -> Duration {
    // Each state is seeded at random.
    let random = RandomState::new().build_hasher().finish() >> 32;
    duration / 2 + duration.mul_f64(random as f64 / f64::from(u32::MAX))
}

#[cfg(test)]
mod tests;
