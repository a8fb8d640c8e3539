//! A Kubernetes API server as a source of events.
//!
//! It keeps no objects: a list goes to the receiver as one [`Event::Replaced`], which
//! the receiver compares with what it has. Invariant: nothing that the server does or
//! fails to do ends the watch; it ends with its receiver.

mod connect;

pub use connect::{ConnectError, Connection, Options, connect};

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
use serde::de::DeserializeOwned;
use tokio::sync::mpsc::Sender;

use super::{Event, Kind, Object, admit::admit, admit::selector};

/// How often a kind that the server does not serve is asked for again.
const NOT_SERVED_RETRY: Duration = Duration::from_secs(600);

/// Watches all kinds until the receiver is gone.
pub async fn watch(connection: Connection, sender: Sender<Event>) {
    watch_with(connection, sender, NOT_SERVED_RETRY).await;
}

async fn watch_with(connection: Connection, sender: Sender<Event>, not_served_retry: Duration) {
    let watch = Watch { connection: &connection, sender: &sender, not_served_retry };
    let client = || connection.client.clone();
    tokio::join!(
        watch.kind::<Service>(Kind::Service, Api::all(client())),
        watch.kind::<EndpointSlice>(Kind::EndpointSlice, Api::all(client())),
        watch.kind::<Node>(Kind::Node, Api::all(client())),
        watch.kind::<ServiceCIDR>(Kind::ServiceCidr, Api::all(client())),
    );
}

#[derive(Clone, Copy)]
struct Watch<'a> {
    connection: &'a Connection,
    sender: &'a Sender<Event>,
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
    /// The server does not have the kind.
    NotServed,
}

/// How a stream of one kind ended.
enum End {
    Closed,
    After(Remedy),
}

impl Watch<'_> {
    async fn kind<K>(self, kind: Kind, api: Api<K>)
    where
        K: Resource + Clone + DeserializeOwned + fmt::Debug + Send + 'static,
        Object: From<K>,
    {
        let mut streaming = true;
        let mut pause = Pause::default();
        loop {
            let stream = watcher(api.clone(), config(kind, streaming));
            let end = tokio::select! {
                end = self.follow(kind, stream, streaming, &mut pause) => end,
                () = self.sender.closed() => End::Closed,
            };
            match end {
                End::Closed => return,
                End::After(Remedy::ListPages) => {
                    tracing::debug!(%kind, "the API server has no streaming lists");
                    streaming = false;
                }
                End::After(Remedy::NotServed) => {
                    tracing::info!(%kind, "the API server does not serve this kind");
                    if self.send(Event::Replaced(kind, Vec::new())).await.is_err() {
                        return;
                    }
                    if self.sleep(jittered(self.not_served_retry)).await.is_err() {
                        return;
                    }
                }
                End::After(Remedy::Relist | Remedy::Resume) => {
                    if self.sleep(pause.next()).await.is_err() {
                        return;
                    }
                }
            }
        }
    }

    /// Passes the events of a stream on until it has to be made anew.
    async fn follow<K>(
        &self,
        kind: Kind,
        stream: impl Stream<Item = watcher::Result<watcher::Event<K>>>,
        streaming: bool,
        pause: &mut Pause,
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
                    continue;
                }
                Ok(watcher::Event::InitApply(object)) => {
                    list.extend(admit(object.into()));
                    continue;
                }
                Ok(watcher::Event::InitDone) => {
                    tracing::info!(%kind, objects = list.len(), "listed");
                    Event::Replaced(kind, std::mem::take(&mut list))
                }
                Ok(watcher::Event::Apply(object)) => changed(kind, object.into()),
                Ok(watcher::Event::Delete(object)) => deleted(kind, &object.into()),
                Err(error) => {
                    let remedy = remedy(kind, &error, streaming);
                    if remedy != Remedy::Resume {
                        self.warn(kind, &error, &remedy, None);
                        return End::After(remedy);
                    }
                    let delay = pause.next();
                    self.warn(kind, &error, &remedy, Some(delay));
                    tokio::time::sleep(delay).await;
                    continue;
                }
            };
            pause.reset();
            if self.send(event).await.is_err() {
                return End::Closed;
            }
        }
        End::After(Remedy::Relist)
    }

    fn warn(&self, kind: Kind, error: &watcher::Error, remedy: &Remedy, delay: Option<Duration>) {
        if matches!(remedy, Remedy::ListPages | Remedy::NotServed) {
            return;
        }
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

    async fn send(&self, event: Event) -> Result<(), Closed> {
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

fn config(kind: Kind, streaming: bool) -> watcher::Config {
    let config = watcher::Config {
        label_selector: selector(kind).map(str::to_owned),
        ..watcher::Config::default()
    };
    if streaming { config.streaming_lists() } else { config }
}

/// What a changed object is to this proxy: it may have ceased to concern it, where the
/// server did not apply the selector.
fn changed(kind: Kind, object: Object) -> Event {
    let name = object.name();
    admit(object).map_or(Event::Deleted(kind, name), Event::Applied)
}

fn deleted(kind: Kind, object: &Object) -> Event {
    Event::Deleted(kind, object.name())
}

fn remedy(kind: Kind, error: &watcher::Error, streaming: bool) -> Remedy {
    let (watcher::Error::WatchStartFailed(cause) | watcher::Error::InitialListFailed(cause)) =
        error
    else {
        return Remedy::Resume;
    };
    match (cause, streaming) {
        (kube::Error::Api(status), _) if status.code == 410 => Remedy::Relist,
        (kube::Error::Api(status), _) if status.code == 404 && kind == Kind::ServiceCidr => {
            Remedy::NotServed
        }
        // The parameters of streaming lists are invalid, or a bad request, to a server
        // without them.
        (kube::Error::Api(status), true) if matches!(status.code, 400 | 422) => Remedy::ListPages,
        _ => Remedy::Resume,
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
    const LONGEST: Duration = Duration::from_secs(15);

    fn next(&mut self) -> Duration {
        if self.last.elapsed() > 2 * Self::LONGEST {
            self.reset();
        }
        self.last = Instant::now();
        let pause = self.next;
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
