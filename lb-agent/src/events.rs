//! Kubernetes Events: warnings on objects that lb refuses, and, on the Node, the start of the
//! agent or the reason why it does not start.
//!
//! With manifests there is no API server, and warnings are only logged. Publishing never
//! blocks its caller: an Event that cannot be sent is logged and dropped. Events that
//! kube-proxy has too differ only in who reports them.

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

use crate::report::Refused;

/// The name that Events are reported under.
const CONTROLLER: &str = "lb-agent";

/// How many Events may wait for the API server.
const QUEUE: usize = 1024;

/// How long an agent that cannot start waits until the Event about it is sent.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// The reasons of Warning Events; docs/kube-proxy.md lists them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EventReason {
    /// The protocol of a port is neither TCP nor UDP.
    ProtocolNotSupported,
    /// A value is not valid, such as an address or a port.
    InvalidObject,
    /// Another Service, of a stronger kind of claim or older, has the address and port.
    AddressInUse,
    /// No Service may have this address.
    ForbiddenAddress,
    /// The Service asks for more than a limit allows: it is not served.
    TooLarge,
    /// A map is full: the Service is not programmed, or stays as it was.
    MapFull,
    /// The agent cannot listen on the Service's health check port.
    FailedToStartServiceHealthcheck,
}

impl EventReason {
    /// The `reason` of the Event.
    pub const fn word(self) -> &'static str {
        match self {
            Self::ProtocolNotSupported => "ProtocolNotSupported",
            Self::InvalidObject => "InvalidObject",
            Self::AddressInUse => "AddressInUse",
            Self::ForbiddenAddress => "ForbiddenAddress",
            Self::TooLarge => "TooLarge",
            Self::MapFull => "MapFull",
            Self::FailedToStartServiceHealthcheck => "FailedToStartServiceHealthcheck",
        }
    }

    /// The `action` of the Event.
    const fn action(self) -> &'static str {
        match self {
            Self::FailedToStartServiceHealthcheck => "Listen",
            Self::ProtocolNotSupported
            | Self::InvalidObject
            | Self::AddressInUse
            | Self::ForbiddenAddress
            | Self::TooLarge
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
            RefusalReason::ForbiddenAddress => Self::ForbiddenAddress,
            RefusalReason::TooLarge => Self::TooLarge,
        }
    }
}

/// The reasons of Events about the agent itself, on its Node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// The agent starts.
    Starting,
    /// The agent ends, because it cannot listen on the address of `/healthz`.
    FailedToStartProxierHealthcheck,
    /// The agent ends, because it cannot listen on the address of `/metrics`.
    FailedToStartMetricServer,
    /// kube-proxy's rules are on the node again.
    KubeProxyIsBack,
}

impl Notice {
    fn event(self, note: String) -> Event {
        let (kind, reason) = match self {
            Self::Starting => (EventType::Normal, "Starting"),
            Self::FailedToStartProxierHealthcheck => {
                (EventType::Warning, "FailedToStartProxierHealthcheck")
            }
            Self::FailedToStartMetricServer => (EventType::Warning, "FailedToStartMetricServer"),
            Self::KubeProxyIsBack => (EventType::Warning, "KubeProxyIsBack"),
        };
        event(kind, reason, "StartKubeProxy", note)
    }
}

/// The object that an Event is about.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Subject {
    /// Its kind.
    pub kind: ObjectKind,
    /// Its namespace and name.
    pub name: ObjectName,
    /// Its uid, if known.
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

/// Publishes each Warning Event once; clones share the set of published ones.
#[derive(Clone, Debug)]
pub struct Refusals {
    published: Arc<Mutex<HashMap<(Subject, EventReason), String>>>,
    queue: Option<mpsc::Sender<(Subject, Event)>>,
}

impl Refusals {
    /// Logs refusals; publishes no Events.
    pub fn logged() -> Self {
        Self { published: Arc::default(), queue: None }
    }

    /// Logs refusals and publishes them as Events from this node. Needs a tokio runtime.
    pub fn published(client: Client, node_name: &str) -> Self {
        let (queue, inbox) = mpsc::channel(QUEUE);
        tokio::spawn(publish(recorder(client, node_name), inbox));
        Self { published: Arc::default(), queue: Some(queue) }
    }

    /// Logs and publishes that an object, or a part of it, is refused, unless the same was
    /// published before.
    pub fn refuse(&self, subject: Subject, reason: EventReason, note: String) {
        let key = (subject, reason);
        let mut published = self.published.lock().unwrap_or_else(PoisonError::into_inner);
        if published.get(&key) == Some(&note) {
            return;
        }
        published.insert(key.clone(), note.clone());
        drop(published);
        let (subject, reason) = key;
        let (kind, name) = (subject.kind, subject.name.to_string());
        tracing::warn!(%kind, name, reason = reason.word(), note, "refused");
        self.send(subject, reason.event(note));
    }

    /// Publishes on the Node that the agent starts.
    pub fn starting(&self, node_name: &str) {
        self.send(Subject::node(node_name), Notice::Starting.event(String::new()));
    }

    /// Publishes on the Node that kube-proxy's rules are there again.
    pub fn kube_proxy_is_back(&self, node_name: &str, note: String) {
        self.send(Subject::node(node_name), Notice::KubeProxyIsBack.event(note));
    }

    fn send(&self, subject: Subject, event: Event) {
        let name = subject.name.to_string();
        if let Some(queue) = &self.queue
            && queue.try_send((subject, event)).is_err()
        {
            tracing::warn!(name, "Event not published: too many are waiting for the API server");
        }
    }

    /// Forgets one published refusal, because its cause is gone.
    pub fn withdraw(&self, subject: Subject, reason: EventReason) {
        self.published.lock().unwrap_or_else(PoisonError::into_inner).remove(&(subject, reason));
    }

    /// What is refused now.
    pub fn published_now(&self) -> Vec<Refused> {
        let published = self.published.lock().unwrap_or_else(PoisonError::into_inner);
        let refused = published.iter().map(|((subject, reason), note)| Refused {
            kind: subject.kind.to_string(),
            name: subject.name.to_string(),
            reason: reason.word().to_owned(),
            note: note.clone(),
        });
        refused.collect()
    }

    /// The note that was published on the Service `namespace/name` for a reason.
    #[cfg(test)]
    pub(crate) fn published_note(&self, service: &str, reason: EventReason) -> Option<String> {
        let published = self.published.lock().unwrap_or_else(PoisonError::into_inner);
        let is_meant = |(subject, of): &(Subject, EventReason)| {
            subject.name.to_string() == service && *of == reason
        };
        published.iter().find(|(key, _)| is_meant(key)).map(|(_, note)| note.clone())
    }

    /// Forgets the published refusals of an object, because it is deleted.
    pub fn forget(&self, kind: ObjectKind, name: &ObjectName) {
        let mut published = self.published.lock().unwrap_or_else(PoisonError::into_inner);
        published.retain(|(subject, _), _| subject.kind != kind || subject.name != *name);
    }
}

/// Publishes on the Node why the agent does not start, if the API server answers in time.
pub async fn publish_failure(client: Client, node_name: &str, notice: Notice, note: String) {
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

/// The note, cut to the 1024 bytes that the API accepts.
fn shortened(mut note: String) -> String {
    note.truncate(note.floor_char_boundary(1024));
    note
}

#[cfg(test)]
mod tests;
