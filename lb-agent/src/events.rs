//! Events: warnings about objects that this proxy refuses, and what becomes of the proxy
//! itself, on its Node.
//!
//! With an API server they become Events on the object, with manifests log lines. It
//! never holds its caller up: what cannot be sent is logged and forgotten. Where kube-proxy
//! has the same Event, it is the same but for who reports it.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use k8s_openapi::api::core::v1::ObjectReference;
use kube::{
    Client,
    runtime::events::{Event, EventType, Recorder, Reporter},
};
use tokio::{sync::mpsc, time::timeout};

use lb_control::model::{
    RefusalReason,
    event::{Object, ObjectKind, ObjectName},
};

/// The name that Events are reported under.
const CONTROLLER: &str = "lb-agent";

/// How many Events may wait for the API server.
const QUEUE: usize = 1024;

/// How long an agent that cannot start waits until that is told.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// What is wrong with an object, as a word; see the documentation of Event reasons.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EventReason {
    /// A protocol that is not balanced.
    ProtocolNotSupported,
    /// An address or port that is none.
    InvalidObject,
    /// Another Service has the address and port.
    AddressInUse,
    /// A map is full.
    MapFull,
    /// The health check port cannot be bound.
    FailedToStartServiceHealthcheck,
}

impl EventReason {
    /// The `reason` of the Event.
    pub const fn word(self) -> &'static str {
        match self {
            Self::ProtocolNotSupported => "ProtocolNotSupported",
            Self::InvalidObject => "InvalidObject",
            Self::AddressInUse => "AddressInUse",
            Self::MapFull => "MapFull",
            Self::FailedToStartServiceHealthcheck => "FailedToStartServiceHealthcheck",
        }
    }

    /// What was being done, as a word.
    const fn action(self) -> &'static str {
        match self {
            Self::FailedToStartServiceHealthcheck => "Listen",
            Self::ProtocolNotSupported
            | Self::InvalidObject
            | Self::AddressInUse
            | Self::MapFull => "Program",
        }
    }

    fn event(self, note: String) -> Event {
        event(EventType::Warning, self.word(), self.action(), note)
    }
}

impl From<RefusalReason> for EventReason {
    fn from(reason: RefusalReason) -> Self {
        match reason {
            RefusalReason::UnsupportedProtocol => Self::ProtocolNotSupported,
            RefusalReason::InvalidName
            | RefusalReason::InvalidAddress
            | RefusalReason::InvalidPort
            | RefusalReason::InvalidPrefix
            | RefusalReason::UnknownValue
            | RefusalReason::OutOfRange
            | RefusalReason::Duplicate => Self::InvalidObject,
            RefusalReason::AddressInUse => Self::AddressInUse,
        }
    }
}

/// What becomes of the proxy itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// It starts.
    Starting,
    /// It ends, because the address of `/healthz` cannot be bound.
    FailedToStartProxierHealthcheck,
    /// It ends, because the address of `/metrics` cannot be bound.
    FailedToStartMetricServer,
}

impl Notice {
    fn event(self, note: String) -> Event {
        let (kind, reason) = match self {
            Self::Starting => (EventType::Normal, "Starting"),
            Self::FailedToStartProxierHealthcheck => {
                (EventType::Warning, "FailedToStartProxierHealthcheck")
            }
            Self::FailedToStartMetricServer => (EventType::Warning, "FailedToStartMetricServer"),
        };
        event(kind, reason, "StartKubeProxy", note)
    }
}

/// Which object an Event is about.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Subject {
    /// Its kind.
    pub kind: ObjectKind,
    /// Its namespace and name.
    pub name: ObjectName,
    /// Its identity, where it is known.
    pub uid: Option<String>,
}

impl Subject {
    /// A Node, as kube-proxy refers to it: by its name alone.
    fn node(name: &str) -> Self {
        Self { kind: ObjectKind::Node, name: name.into(), uid: None }
    }
}

impl From<&Object> for Subject {
    fn from(object: &Object) -> Self {
        Self { kind: object.kind(), name: object.name(), uid: object.metadata().uid.clone() }
    }
}

/// Tells what is refused, each thing once; clones share what they told.
#[derive(Clone, Debug)]
pub struct Refusals {
    told: Arc<Mutex<HashMap<(Subject, EventReason), String>>>,
    queue: Option<mpsc::Sender<(Subject, Event)>>,
}

impl Refusals {
    /// Tells the log alone.
    pub fn logged() -> Self {
        Self { told: Arc::default(), queue: None }
    }

    /// Tells the API server too, as this node. Needs a tokio runtime.
    pub fn published(client: Client, node_name: &str) -> Self {
        let (queue, inbox) = mpsc::channel(QUEUE);
        tokio::spawn(publish(recorder(client, node_name), inbox));
        Self { told: Arc::default(), queue: Some(queue) }
    }

    /// Tells that an object, or a part of it, is refused, unless the same was told before.
    pub fn refuse(&self, subject: Subject, reason: EventReason, note: String) {
        let key = (subject, reason);
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.get(&key) == Some(&note) {
            return;
        }
        told.insert(key.clone(), note.clone());
        drop(told);
        let (subject, reason) = key;
        let (kind, name) = (subject.kind, subject.name.to_string());
        tracing::warn!(%kind, name, reason = reason.word(), note, "refused");
        self.send(subject, reason.event(note));
    }

    /// Tells on the Node that the proxy starts.
    pub fn starting(&self, node_name: &str) {
        self.send(Subject::node(node_name), Notice::Starting.event(String::new()));
    }

    fn send(&self, subject: Subject, event: Event) {
        let name = subject.name.to_string();
        if let Some(queue) = &self.queue
            && queue.try_send((subject, event)).is_err()
        {
            tracing::warn!(name, "Event dropped: too many wait for the API server");
        }
    }

    /// Forgets that one thing was told of an object: it is good again.
    pub fn withdraw(&self, subject: Subject, reason: EventReason) {
        self.told.lock().unwrap_or_else(PoisonError::into_inner).remove(&(subject, reason));
    }

    /// What was told of the Service `namespace/name` for a reason.
    #[cfg(test)]
    pub(crate) fn told(&self, service: &str, reason: EventReason) -> Option<String> {
        let told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let is_meant = |(subject, of): &(Subject, EventReason)| {
            subject.name.to_string() == service && *of == reason
        };
        told.iter().find(|(key, _)| is_meant(key)).map(|(_, note)| note.clone())
    }

    /// Forgets what was told of an object: it is gone, or good again.
    pub fn forget(&self, kind: ObjectKind, name: &ObjectName) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        told.retain(|(subject, _), _| subject.kind != kind || subject.name != *name);
    }
}

/// Tells on the Node why the proxy does not start, if the API server can be told in time.
pub async fn tell_failure(client: Client, node_name: &str, notice: Notice, note: String) {
    let (recorder, event) = (recorder(client, node_name), notice.event(note));
    let subject = reference(&Subject::node(node_name));
    match timeout(LAST_WORDS, recorder.publish(&event, &subject)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(%error, "Event not published"),
        Err(_) => tracing::warn!(waited = ?LAST_WORDS, "Event not published"),
    }
}

fn recorder(client: Client, node_name: &str) -> Recorder {
    let instance = Some(node_name.to_owned());
    Recorder::new(client, Reporter { controller: CONTROLLER.to_owned(), instance })
}

fn event(type_: EventType, reason: &str, action: &str, note: String) -> Event {
    Event {
        type_,
        reason: reason.to_owned(),
        note: Some(shortened(note)).filter(|note| !note.is_empty()),
        action: action.to_owned(),
        secondary: None,
    }
}

async fn publish(recorder: Recorder, mut inbox: mpsc::Receiver<(Subject, Event)>) {
    while let Some((subject, event)) = inbox.recv().await {
        if let Err(error) = recorder.publish(&event, &reference(&subject)).await {
            let name = subject.name.to_string();
            tracing::warn!(name, %error, "Event not published");
        }
    }
}

fn reference(subject: &Subject) -> ObjectReference {
    let namespace = &subject.name.namespace;
    ObjectReference {
        api_version: Some(subject.kind.api_version().to_owned()),
        kind: Some(subject.kind.name().to_owned()),
        name: Some(subject.name.name.clone()),
        namespace: (!namespace.is_empty()).then(|| namespace.clone()),
        uid: subject.uid.clone(),
        ..ObjectReference::default()
    }
}

/// The note within the 1024 bytes that the API takes.
fn shortened(mut note: String) -> String {
    note.truncate(note.floor_char_boundary(1024));
    note
}

#[cfg(test)]
mod tests;
