//! A Kubernetes API server as a source of events.
//!
//! It keeps no objects: a list goes to the receiver as one [`ObjectEvent::Replaced`], which
//! the receiver compares with its own objects. Invariant: the watch ends only with its
//! receiver, whatever the server does.

mod access;
mod connect;
mod floor;
mod learned;
mod liveness;
mod pause;
mod servers;
mod transport;

pub use access::{ConnectError, Options};
pub use connect::{Connection, connect};
pub use learned::Learned;
pub use liveness::Liveness;
pub use transport::Proxies;

use std::{
    fmt,
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
use pause::{Pause, jittered};

/// How long to wait before a kind that the server does not serve is requested again.
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
    /// Continue the same watch after a pause.
    Resume,
    /// List again after a pause: the resource version to continue from is too old.
    Relist,
    /// List page by page: the server has no streaming lists.
    ListPages,
    /// Continue without the kind: the server does not serve it.
    NotServed,
    /// Continue without the kind until reading it is allowed.
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
    /// Lists are requested as streams.
    streaming: bool,
    /// A list has begun and not ended.
    listing: bool,
    /// The receiver has got a list.
    is_known: bool,
    /// The log says already that reading the kind is not allowed.
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

    /// Sends the events of a stream to the receiver, until a new stream is needed.
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
                    list.extend(admit(self.saw(kind, object.into())));
                    continue;
                }
                Ok(watcher::Event::InitDone) => {
                    tracing::info!(%kind, objects = list.len(), "listed");
                    progress.listing = false;
                    progress.is_known = true;
                    progress.is_denied = false;
                    ObjectEvent::Replaced(kind, std::mem::take(&mut list))
                }
                Ok(watcher::Event::Apply(object)) => changed(kind, self.saw(kind, object.into())),
                Ok(watcher::Event::Delete(object)) => deleted(kind, &self.saw(kind, object.into())),
                Err(error) => {
                    if let Some(end) = self.handle_error(kind, &error, progress).await {
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

    /// Notes the version of an object.
    fn saw(&self, kind: ObjectKind, object: Object) -> Object {
        self.connection.floor().saw(kind, object.metadata());
        object
    }

    /// Logs an error of a stream. Pauses if the same stream can continue; otherwise returns how
    /// it ends.
    async fn handle_error(
        &self,
        kind: ObjectKind,
        error: &watcher::Error,
        progress: &mut Progress,
    ) -> Option<End> {
        let remedy = remedy(kind, error, progress.streaming && progress.listing);
        if is_version_too_large(error) {
            self.connection.floor().is_too_large(kind);
        }
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
                    tracing::warn!(%kind, error = shown, "not allowed to read this kind: continuing without it; allow list and watch in the agent's ClusterRole");
                    progress.is_denied = true;
                }
                // A list from before is kept, because it is better than an empty one.
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
        let server = self.connection.server();
        let retry_in = delay.map(|delay| format!("{delay:.1?}"));
        let shown = sentence(error);
        match self.connection.advice() {
            Some(advice) if is_unreachable(error) => {
                tracing::warn!(%kind, server, error = shown, retry_in, advice, "cannot reach the API server: Services stay as they are, retrying");
            }
            _ => {
                tracing::warn!(%kind, server, error = shown, retry_in, "watch broken, retrying: changes of this kind are not seen until then")
            }
        }
    }

    async fn send(&self, event: ObjectEvent) -> Result<(), Closed> {
        self.connection.learned().observe(&event);
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

/// The event for a changed object. It is a deletion if the object does not concern this proxy
/// any more, which happens if the server does not apply the selector.
fn changed(kind: ObjectKind, object: Object) -> ObjectEvent {
    let name = object.name();
    admit(object).map_or(ObjectEvent::Deleted(kind, name), ObjectEvent::Applied)
}

fn deleted(kind: ObjectKind, object: &Object) -> ObjectEvent {
    ObjectEvent::Deleted(kind, object.name())
}

/// What to do after an error; `in_streaming_list` if it came instead of a streaming list, or
/// within one.
fn remedy(kind: ObjectKind, error: &watcher::Error, in_streaming_list: bool) -> Remedy {
    let status = match error {
        watcher::Error::WatchStartFailed(cause) | watcher::Error::InitialListFailed(cause) => {
            let kube::Error::Api(status) = cause else { return Remedy::Resume };
            status
        }
        // A server whose store cannot report progress answers 500 in the stream.
        watcher::Error::WatchError(status) if in_streaming_list && status.code == 500 => {
            return Remedy::ListPages;
        }
        _ => return Remedy::Resume,
    };
    match status.code {
        410 => Remedy::Relist,
        404 if kind == ObjectKind::ServiceCidr => Remedy::NotServed,
        403 if kind == ObjectKind::ServiceCidr => Remedy::Denied,
        // A server without streaming lists rejects their parameters with 400 or 422.
        400 | 422 if in_streaming_list => Remedy::ListPages,
        _ => Remedy::Resume,
    }
}

/// Whether the server does not know the version that was asked for: it lags behind, or its
/// store was restored.
fn is_version_too_large(error: &watcher::Error) -> bool {
    let status = match (error, cause(error)) {
        (watcher::Error::WatchError(status), _) => status,
        (_, Some(kube::Error::Api(status))) => status,
        _ => return false,
    };
    status.code == 504 && status.message.contains("Too large resource version")
}

/// The longest pause after an error before the same watch continues.
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

/// The error without repetitions, and with the innermost cause of a transport error.
fn sentence(error: &watcher::Error) -> String {
    let cause = match (error, cause(error)) {
        (watcher::Error::WatchError(status), _) => {
            return format!("{} {}", status.code, status.message);
        }
        (_, Some(cause)) => cause,
        (_, None) => return error.to_string(),
    };
    servers::reason(cause)
}

#[cfg(test)]
mod tests;
