//! Kubernetes Events: warnings on objects that lb refuses, and, on the Node, the start of the
//! agent or the reason why it does not start.
//!
//! With manifests there is no API server, and warnings are only logged. Publishing never
//! blocks its caller: an Event that cannot be sent is logged and dropped. Events that
//! kube-proxy has too differ only in who reports them.
//!
//! What is refused of an object is the same on all nodes, and one node publishes it
//! ([`Reporter`]); each has it in its log, its metrics and `lb-agent status`. An object is logged and
//! published as often as a [spam filter](spam) admits. Texts of tenants reach a log, an Event or a
//! terminal without control characters.

mod spam;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use k8s_openapi::api::core::v1::ObjectReference;
use kube::{
    Client,
    runtime::events::{self, Event, EventType, Recorder},
};
use tokio::{
    sync::mpsc,
    time::{Instant, timeout},
};

use lb_control::model::{
    RefusalReason,
    event::{Object, ObjectKind, ObjectName},
    text::Clean,
};

use crate::report::Refused;
use spam::SpamFilter;

/// The name that Events are reported under.
const CONTROLLER: &str = "lb-agent";

/// How many Events may wait for the API server.
const QUEUE: usize = 1024;

/// How long an agent that cannot start waits until the Event about it is sent.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// The reasons of Warning Events; docs/kube-proxy.md lists them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
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
    /// A map has room, but the Services of the namespace have their share of it.
    NamespaceFull,
    /// The agent cannot listen on the Service's health check port.
    FailedToStartServiceHealthcheck,
}

impl EventReason {
    /// All reasons.
    pub const ALL: [Self; 8] = [
        Self::ProtocolNotSupported,
        Self::InvalidObject,
        Self::AddressInUse,
        Self::ForbiddenAddress,
        Self::TooLarge,
        Self::MapFull,
        Self::NamespaceFull,
        Self::FailedToStartServiceHealthcheck,
    ];

    /// Whether an object is refused for what it says, on every node.
    const fn is_of_object(self) -> bool {
        match self {
            Self::ProtocolNotSupported
            | Self::InvalidObject
            | Self::AddressInUse
            | Self::ForbiddenAddress
            | Self::TooLarge => true,
            Self::MapFull | Self::NamespaceFull | Self::FailedToStartServiceHealthcheck => false,
        }
    }

    /// The `reason` of the Event.
    pub const fn word(self) -> &'static str {
        match self {
            Self::ProtocolNotSupported => "ProtocolNotSupported",
            Self::InvalidObject => "InvalidObject",
            Self::AddressInUse => "AddressInUse",
            Self::ForbiddenAddress => "ForbiddenAddress",
            Self::TooLarge => "TooLarge",
            Self::MapFull => "MapFull",
            Self::NamespaceFull => "NamespaceFull",
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
            | Self::MapFull
            | Self::NamespaceFull => "Program",
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
            | RefusalReason::Duplicate
            | RefusalReason::Unreadable => Self::InvalidObject,
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

/// An object: its kind and name.
type Key = (ObjectKind, ObjectName);

/// Who publishes what is refused of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reporter {
    /// This node: it is the object's reporter, or the matter is this node's alone.
    ThisNode,
    /// The agent of another node.
    OtherNode,
}

/// What is refused, logged and published once each; clones share it.
#[derive(Clone, Debug)]
pub struct Refusals {
    state: Arc<Mutex<State>>,
    queue: Option<mpsc::Sender<(Subject, Event)>>,
}

#[derive(Debug, Default)]
struct State {
    /// The note of each reason for which an object is refused now.
    refused: HashMap<Key, BTreeMap<EventReason, String>>,
    /// How many objects are refused for each reason.
    counts: BTreeMap<EventReason, usize>,
    filter: SpamFilter,
}

impl State {
    /// Removes the reasons of an object that are not to be kept.
    fn retain(&mut self, key: &Key, keep: impl Fn(EventReason) -> bool) {
        let Some(reasons) = self.refused.get_mut(key) else { return };
        reasons.retain(|reason, _| {
            let is_kept = keep(*reason);
            if !is_kept && let Some(count) = self.counts.get_mut(reason) {
                *count -= 1;
            }
            is_kept
        });
        if reasons.is_empty() {
            self.refused.remove(key);
        }
    }
}

impl Refusals {
    /// Logs refusals; publishes no Events.
    pub fn logged() -> Self {
        Self { state: Arc::default(), queue: None }
    }

    /// Logs refusals and publishes them as Events from this node. Needs a tokio runtime.
    pub fn published(client: Client, node_name: &str) -> Self {
        let (queue, inbox) = mpsc::channel(QUEUE);
        tokio::spawn(publish(recorder(client, node_name), inbox));
        Self { state: Arc::default(), queue: Some(queue) }
    }

    /// Logs and publishes that an object, or a part of it, is refused on this node alone, unless the
    /// same was published before.
    pub fn refuse(&self, subject: Subject, reason: EventReason, note: String) {
        self.refuse_by(|| Reporter::ThisNode, subject, reason, note);
    }

    /// Logs that an object, or a part of it, is refused, and publishes it if this node is the
    /// reporter, unless the same was published before.
    pub fn refuse_by(
        &self,
        reporter: impl FnOnce() -> Reporter,
        subject: Subject,
        reason: EventReason,
        note: String,
    ) {
        let note = shortened(Clean(&note).to_string());
        let key = (subject.kind, subject.name.clone());
        let mut state = self.state();
        let reasons = state.refused.entry(key.clone()).or_default();
        match reasons.insert(reason, note.clone()) {
            Some(before) if before == note => return,
            Some(_) => {}
            None => *state.counts.entry(reason).or_default() += 1,
        }
        if !state.filter.admit(&key, Instant::now()) {
            return;
        }
        drop(state);
        let (kind, name) = (subject.kind, shown(&subject.name));
        tracing::warn!(%kind, name, reason = reason.word(), note, "refused");
        if self.queue.is_some() && reporter() == Reporter::ThisNode {
            self.send(subject, reason.event(note));
        }
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
        let name = shown(&subject.name);
        if let Some(queue) = &self.queue
            && queue.try_send((subject, event)).is_err()
        {
            tracing::warn!(name, "Event not published: too many are waiting for the API server");
        }
    }

    /// Forgets one published refusal, because its cause is gone.
    pub fn withdraw(&self, subject: Subject, reason: EventReason) {
        self.state().retain(&(subject.kind, subject.name), |of| of != reason);
    }

    /// Forgets what was published of an object for what it says, except for these reasons.
    pub fn keep(&self, kind: ObjectKind, name: &ObjectName, reasons: &BTreeSet<EventReason>) {
        let is_kept = |reason: EventReason| !reason.is_of_object() || reasons.contains(&reason);
        self.state().retain(&(kind, name.clone()), is_kept);
    }

    /// What is refused now.
    pub fn published_now(&self) -> Vec<Refused> {
        let state = self.state();
        let refused = state.refused.iter().flat_map(|((kind, name), reasons)| {
            reasons.iter().map(|(reason, note)| Refused {
                kind: kind.to_string(),
                name: shown(name),
                reason: reason.word().to_owned(),
                note: note.clone(),
            })
        });
        refused.collect()
    }

    /// How many objects are refused for each reason.
    pub fn counts(&self) -> Vec<(EventReason, usize)> {
        let state = self.state();
        let count = |reason| state.counts.get(&reason).copied().unwrap_or(0);
        EventReason::ALL.map(|reason| (reason, count(reason))).to_vec()
    }

    /// The note that was published on the Service `namespace/name` for a reason.
    #[cfg(test)]
    pub(crate) fn published_note(&self, service: &str, reason: EventReason) -> Option<String> {
        let key = (ObjectKind::Service, service.into());
        self.state().refused.get(&key)?.get(&reason).cloned()
    }

    /// Forgets the published refusals of an object, because it is deleted.
    pub fn forget(&self, kind: ObjectKind, name: &ObjectName) {
        self.state().retain(&(kind, name.clone()), |_| false);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The name of an object, for a log or a terminal.
fn shown(name: &ObjectName) -> String {
    Clean(&name.to_string()).to_string()
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
    Recorder::new(client, events::Reporter { controller: CONTROLLER.to_owned(), instance })
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
            let name = shown(&subject.name);
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
