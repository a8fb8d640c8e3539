//! The loop that applies events, and changes of this node, to the maps.

use std::{
    collections::BTreeSet,
    net::IpAddr,
    time::{Duration, Instant},
};

use jiff::Timestamp;
use lb_control::{
    controller::{Controller, Outcome},
    desired::{
        NodeFacts,
        health_checks::{self, Wanted},
        node_ports,
        taken::ApiServers,
    },
    model::{
        event::{Object, ObjectEvent, ObjectKind},
        network::NodeNetwork,
        source_ports::MIN_SOURCE_PORTS,
    },
};
use tokio::{
    sync::{mpsc, watch},
    time::{sleep_until, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;

use super::{
    own_node::{self, OwnNode},
    provisional,
};
use crate::{
    config::{Config, PodPrefixes, Source},
    events::{EventReason, Refusals, Reporter, Subject},
    health::{self, Health, Severity},
    maps::{kernel::KernelDataplane, timeouts},
    metrics::{Change, Metrics},
    options::modes::SocketLb,
    watch::api::Nodes,
};

/// How soon a failed write is tried again at first; doubled each time.
const FIRST_RETRY: Duration = Duration::from_millis(50);
/// The longest wait between tries.
const LAST_RETRY: Duration = Duration::from_secs(10);
/// How long the first plan waits for the state of the interfaces at most.
const NETWORK_WAIT: Duration = Duration::from_millis(200);
/// How often the node's sysctls are read again.
const SYSCTLS: Duration = Duration::from_secs(60);
/// At most so many queued events are planned together.
const BATCH: usize = 4096;

/// The state of the loop.
pub(super) struct Reconciler {
    controller: Controller,
    node_name: String,
    /// The source has a Node for each node; manifests need not have any.
    has_nodes: bool,
    /// The addresses of the Node object; `None` until it is known whether there is one.
    node_addresses: Option<Vec<IpAddr>>,
    network: NodeNetwork,
    node_ports: node_ports::Selection,
    /// Where the health check servers of Services listen.
    health_check_addresses: BTreeSet<IpAddr>,
    /// Which health checks, and where, were published last.
    published_health_checks: Option<(u64, BTreeSet<IpAddr>)>,
    pod_prefixes: PodPrefixes,
    masquerade_all: bool,
    /// The range of the node's own ports about which the log has a warning, because it leaves no
    /// source ports.
    warned_local_ports: Option<(u16, u16)>,
    /// Whether the log has a warning that not all addresses of nodes fit.
    has_warned_nodes_full: bool,
    ticks_per_second: u32,
    only_node_sockets: bool,
    started: Instant,
    /// Changes in the cluster before this time do not count as delays.
    started_at: Timestamp,
    retry: Duration,
    due: Option<Instant>,
    has_awaited_network: bool,
    /// A list was applied, which took far more memory than what is kept of it.
    has_listed: bool,
    ready: bool,
    sinks: Sinks,
}

/// The receivers of what the loop publishes.
pub(super) struct Sinks {
    pub(super) health: Health,
    pub(super) metrics: Metrics,
    pub(super) refusals: Refusals,
    /// The addresses of the Node object; `None` until it is known whether there is one.
    pub(super) node_addresses: watch::Sender<Option<Vec<IpAddr>>>,
    /// This node's Node object.
    pub(super) own_node: watch::Sender<OwnNode>,
    /// Which Nodes the decisions need.
    pub(super) nodes: watch::Sender<Option<Nodes>>,
    /// The health checks that Services ask for.
    pub(super) health_checks: watch::Sender<Wanted>,
    /// Cancelled once the first complete state is in the maps.
    pub(super) programmed: CancellationToken,
}

impl Reconciler {
    pub(super) fn new(
        config: &Config,
        expected: impl IntoIterator<Item = ObjectKind>,
        ticks_per_second: u32,
        sinks: Sinks,
    ) -> Self {
        Self {
            controller: Controller::new(&config.node_name, config.external_mode, expected)
                .with_limits(config.limits),
            node_name: config.node_name.clone(),
            has_nodes: matches!(config.source, Source::Api(_)),
            node_addresses: None,
            network: NodeNetwork::default(),
            health_check_addresses: BTreeSet::new(),
            published_health_checks: None,
            node_ports: node_ports::Selection {
                addresses: config.node_port_addresses.clone(),
                on_loopback: config.localhost_node_ports,
                primary: config.bind_address,
            },
            pod_prefixes: config.pod_prefixes.clone(),
            masquerade_all: config.masquerade_all,
            warned_local_ports: None,
            has_warned_nodes_full: false,
            ticks_per_second,
            only_node_sockets: config.socket_lb == SocketLb::Node,
            started: Instant::now(),
            started_at: Timestamp::now(),
            retry: FIRST_RETRY,
            due: None,
            has_awaited_network: false,
            has_listed: false,
            ready: false,
            sinks,
        }
    }

    /// Applies events and writes nothing, while another agent holds the maps. Calls `listed` once
    /// all objects are known; ends with the source of events.
    pub(super) async fn prepare(
        &mut self,
        events: &mut mpsc::Receiver<ObjectEvent>,
        listed: impl FnOnce(),
    ) {
        let mut listed = Some(listed);
        while let Some(event) = events.recv().await {
            self.apply(event);
            if self.controller.snapshot().is_complete()
                && let Some(listed) = listed.take()
            {
                listed();
            }
        }
    }

    /// Runs until the source of events ends. Until its first lists, `known` is served where
    /// nothing else is.
    pub(super) async fn run(
        mut self,
        mut events: mpsc::Receiver<ObjectEvent>,
        mut network: watch::Receiver<NodeNetwork>,
        mut api_servers: watch::Receiver<ApiServers>,
        mut dataplane: KernelDataplane,
        known: Option<provisional::Known>,
    ) {
        self.network = network.borrow_and_update().clone();
        self.refresh_facts();
        self.controller.set_api_servers(api_servers.borrow_and_update().clone());
        // What was listed before the maps were this agent's is planned at once.
        self.due = self.controller.snapshot().is_complete().then(Instant::now);
        if self.due.is_none()
            && let Some(known) = known
        {
            let facts = self.controller.facts().clone();
            provisional::serve(&self.node_name, facts, known, &mut dataplane);
        }
        let mut sysctls_at = Instant::now() + SYSCTLS;
        loop {
            let wake_at = self.due.map_or(sysctls_at, |due| due.min(sysctls_at));
            tokio::select! {
                event = events.recv() => {
                    let Some(event) = event else { return };
                    self.apply(event);
                    self.apply_queued(&mut events).await;
                }
                Ok(()) = network.changed() => self.update_network(&mut network),
                Ok(()) = api_servers.changed() => {
                    self.controller.set_api_servers(api_servers.borrow_and_update().clone());
                }
                () = sleep_until(wake_at.into()) => {}
            }
            if Instant::now() >= sysctls_at {
                self.refresh_facts();
                sysctls_at = Instant::now() + SYSCTLS;
            }
            if !self.has_awaited_network && self.controller.snapshot().is_complete() {
                self.await_network(&mut network).await;
            }
            if self.controller.has_changes() || self.due.is_some_and(|due| due <= Instant::now()) {
                self.reconcile(&mut dataplane);
                self.publish_needed_nodes();
            } else {
                self.publish_unchanged();
            }
            if self.has_listed && self.controller.snapshot().is_complete() {
                self.has_listed = false;
                release_memory(&mut dataplane);
            }
        }
    }

    /// Applies the events that are queued already, so that they are planned together.
    async fn apply_queued(&mut self, events: &mut mpsc::Receiver<ObjectEvent>) {
        let now = tokio::time::Instant::now();
        for _ in 0..BATCH {
            match timeout_at(now, events.recv()).await {
                Ok(Some(event)) => self.apply(event),
                _ => return,
            }
        }
    }

    fn apply(&mut self, event: ObjectEvent) {
        let now = Timestamp::now();
        self.sinks.health.queued_update(now);
        let count = event.listed().map_or(1, <[Object]>::len);
        self.has_listed |= event.listed().is_some();
        let kind = event.kind();
        match kind {
            ObjectKind::Service => self.sinks.metrics.queued(Change::Service, count, now),
            ObjectKind::EndpointSlice => self.sinks.metrics.queued(Change::Endpoint, count, now),
            ObjectKind::Node | ObjectKind::ServiceCidr => {}
        }
        self.publish_eligibility(&event);
        own_node::publish(&event, &self.node_name, &self.sinks.own_node);
        if let ObjectEvent::Deleted(kind, name) = &event {
            self.sinks.refusals.forget(*kind, name);
        }
        let pod_cidrs = self.controller.snapshot().node().map(|node| node.pod_cidrs.clone());
        self.controller.apply(event);
        if kind == ObjectKind::Service && !self.ready {
            self.publish_needed_nodes();
        }
        let snapshot = self.controller.snapshot();
        let has_other_pods = snapshot.node().map(|node| &node.pod_cidrs) != pod_cidrs.as_ref();
        let addresses = match snapshot.node() {
            Some(node) => &node.addresses.all[..],
            None if snapshot.is_complete() => &[],
            None => return,
        };
        if self.node_addresses.as_deref() != Some(addresses) {
            self.node_addresses = Some(addresses.to_vec());
            // An error means that the task that follows the interfaces has ended.
            let _ = self.sinks.node_addresses.send(self.node_addresses.clone());
            self.refresh_facts();
        } else if has_other_pods {
            self.refresh_facts();
        }
    }

    /// Publishes which Nodes are needed, once Services are listed.
    fn publish_needed_nodes(&self) {
        let mut awaited = self.controller.snapshot().awaited();
        if awaited.any(|kind| kind == ObjectKind::Service) {
            return;
        }
        let all = self.controller.uses_direct_return();
        let needed = Some(if all { Nodes::All } else { Nodes::Own });
        self.sinks
            .nodes
            .send_if_modified(|published| std::mem::replace(published, needed) != needed);
    }

    /// Waits, before the first plan, until the interfaces were read with the addresses of the
    /// Node object known, because the set of this node's addresses depends on them.
    async fn await_network(&mut self, network: &mut watch::Receiver<NodeNetwork>) {
        self.has_awaited_network = true;
        self.sinks.refusals.starting(&self.node_name);
        let seen =
            timeout(NETWORK_WAIT, network.wait_for(|network| network.knows_node_object)).await;
        if !matches!(seen, Ok(Ok(_))) {
            tracing::warn!(
                waited = ?NETWORK_WAIT,
                "the node's interfaces are not read yet: programming Services without node ports, \
                 which follow once the interfaces are read"
            );
        }
        drop(seen);
        self.update_network(network);
    }

    fn update_network(&mut self, network: &mut watch::Receiver<NodeNetwork>) {
        self.network = network.borrow_and_update().clone();
        self.report_interface_problems();
        self.sinks.metrics.set_misplaced_programs(self.network.misplaced.len());
        self.refresh_facts();
    }

    fn publish_eligibility(&self, event: &ObjectEvent) {
        let own = |object: &Object| match object {
            Object::Node(node) if node.metadata.name.as_deref() == Some(&self.node_name) => {
                Some(health::is_eligible(Some(node)))
            }
            _ => None,
        };
        if event.kind() != ObjectKind::Node || event.has_unreadable(&self.node_name) {
            return;
        }
        let eligible = match event {
            ObjectEvent::Applied(object) => own(object),
            ObjectEvent::Replaced(_, objects) | ObjectEvent::ReplacedExcept(_, objects, _) => {
                // Manifests without any Node say nothing about this one.
                let is_absent = self.has_nodes || !objects.is_empty();
                objects.iter().find_map(own).or(is_absent.then_some(false))
            }
            ObjectEvent::Deleted(_, name) => (name.name == self.node_name).then_some(false),
            ObjectEvent::Unreadable(..) => None,
        };
        if let Some(eligible) = eligible {
            self.sinks.health.set_node_eligible(eligible);
        }
    }

    fn report_interface_problems(&self) {
        let all = |sentences: &[String]| (!sentences.is_empty()).then(|| sentences.join("; "));
        let health = &self.sinks.health;
        health.set_fault("interfaces", all(&self.network.problems));
        health.set("unhandled interfaces", Severity::Degraded, all(&self.network.unhandled));
    }

    fn refresh_facts(&mut self) {
        let network = &self.network;
        let candidates = || {
            let preferred = self.node_addresses.iter().flatten().chain(&network.default_sources);
            preferred.chain(&network.addresses).filter(|ip| network.addresses.contains(ip))
        };
        let node = self.controller.snapshot().node();
        let internal_ips = node.map_or(&[][..], |node| &node.addresses.internal);
        let node_source4 =
            candidates().find_map(|ip| if let IpAddr::V4(ip) = ip { Some(*ip) } else { None });
        let node_source6 =
            candidates().find_map(|ip| if let IpAddr::V6(ip) = ip { Some(*ip) } else { None });
        let is_node_source = |ip: &IpAddr| match ip {
            IpAddr::V4(ip) => node_source4 == Some(*ip),
            IpAddr::V6(ip) => node_source6 == Some(*ip),
        };
        let facts = NodeFacts {
            addresses: network.addresses.iter().copied().collect(),
            held_addresses: network.held_addresses.clone(),
            node_port_addresses: node_ports::addresses(&self.node_ports, internal_ips, network),
            node_source4,
            node_source6,
            is_source_by_route: !network.route_sources.iter().all(is_node_source),
            pod_prefixes: match &self.pod_prefixes {
                PodPrefixes::Listed(prefixes) => prefixes.clone(),
                PodPrefixes::OfNode => node.map(|node| node.pod_cidrs.clone()).unwrap_or_default(),
                PodPrefixes::Unknown => Vec::new(),
            },
            masquerade_all: self.masquerade_all,
            local_ports: timeouts::local_ports(),
            timeouts: timeouts::timeouts(self.ticks_per_second),
            ticks_per_second: self.ticks_per_second,
            only_node_sockets: self.only_node_sockets,
        };
        let of_node_ports = &facts.node_port_addresses;
        self.health_check_addresses =
            health_checks::listen_addresses(&self.node_ports.addresses, of_node_ports);
        self.controller.set_facts(facts);
    }

    fn reconcile(&mut self, dataplane: &mut KernelDataplane) {
        let started = Instant::now();
        // What was taken out of use is reclaimed without a change, and that is no sync.
        let is_sync = self.controller.has_changes();
        let now = self.started.elapsed().as_millis() as u64;
        let outcome = match self.controller.reconcile(now, dataplane) {
            Ok(outcome) => outcome,
            Err(error) => {
                tracing::error!(%error, "cannot read the maps: they stay as they are until a retry succeeds");
                return self.retry_later();
            }
        };
        self.publish_refusals(&outcome);
        for (service, ip) in &outcome.left_to_processes {
            tracing::info!(
                %service,
                %ip,
                "an interface of this node holds this ClusterIP: its process serves it, as NodeLocal \
                 DNSCache does, and lb does not translate packets to it; remove the address from the \
                 interface if nothing serves there"
            );
        }
        for error in outcome.errors.iter().take(3) {
            tracing::error!(
                %error,
                failed = outcome.errors.len(),
                "cannot write to a map: the affected Services stay as they are until a retry \
                 succeeds"
            );
        }
        if !outcome.errors.is_empty() {
            return self.retry_later();
        }
        self.retry = FIRST_RETRY;
        self.due = outcome.next_due.map(|at| self.started + Duration::from_millis(at));
        if self.controller.snapshot().is_complete() {
            self.warn_no_source_ports();
            self.warn_nodes_full(outcome.nodes_left_out);
            self.publish_synced(&outcome, started.elapsed(), is_sync);
        }
    }

    /// Logs a warning, once, when not all addresses of nodes fit.
    fn warn_nodes_full(&mut self, left_out: usize) {
        if left_out > 0 && !self.has_warned_nodes_full {
            tracing::warn!(
                left_out,
                "map NODES4 or NODES6 is full: DSR packets from {left_out} node addresses will be \
                 dropped"
            );
        }
        self.has_warned_nodes_full = left_out > 0;
    }

    /// Logs a warning, once for each range of local ports that leaves no source ports.
    fn warn_no_source_ports(&mut self) {
        let settings = self.controller.settings();
        let has_no_source_ports = settings.is_some_and(|settings| settings.source_ports.count == 0);
        let local = self.controller.facts().local_ports;
        let cause = has_no_source_ports.then_some(local);
        if cause.is_some() && self.warned_local_ports != cause {
            let (first, last) = local;
            tracing::warn!(
                "no {} consecutive ports are free for use as source ports: clients outside cannot \
                 reach backends on other nodes; narrow net.ipv4.ip_local_port_range (now {first} \
                 {last})",
                MIN_SOURCE_PORTS
            );
        }
        self.warned_local_ports = cause;
    }

    fn retry_later(&mut self) {
        self.due = Some(Instant::now() + self.retry);
        self.retry = (self.retry * 2).min(LAST_RETRY);
    }

    /// Publishes the health checks, after the maps hold the state that they announce.
    fn publish_health_checks(&mut self) {
        let version = self.controller.health_checks_version();
        let addresses = &self.health_check_addresses;
        let published = self.published_health_checks.replace((version, addresses.clone()));
        if published.as_ref() == self.published_health_checks.as_ref() {
            return;
        }
        let checks = self.controller.health_checks();
        self.sinks.health_checks.send_if_modified(|published| {
            let is_changed = published.checks != *checks || published.addresses != *addresses;
            if is_changed {
                *published = Wanted { checks: checks.clone(), addresses: addresses.clone() };
            }
            is_changed
        });
    }

    /// Publishes that the maps hold all that is known, because nothing that was received changed
    /// it.
    fn publish_unchanged(&self) {
        if self.ready {
            self.sinks.health.updated(Timestamp::now());
            self.sinks.metrics.nothing_pending();
        }
    }

    fn publish_synced(&mut self, outcome: &Outcome, took: Duration, is_sync: bool) {
        self.publish_health_checks();
        let sinks = &self.sinks;
        let now = Timestamp::now();
        sinks.health.updated(now);
        if is_sync {
            sinks.metrics.synced(took, now);
        }
        for trigger in outcome.triggers.iter().filter(|trigger| trigger.at > self.started_at) {
            let waited = now.duration_since(trigger.at).try_into().unwrap_or_default();
            sinks.metrics.programmed(trigger.family, waited);
        }
        for (family, missing) in self.controller.no_local_endpoints().of_families() {
            sinks.metrics.set_no_local_endpoints(family, missing.internal, missing.external);
        }
        let counts = self.controller.counts();
        sinks.metrics.set_programmed_objects(counts.services, counts.frontends, counts.backends);
        let lb_control::plan::Counts { services, frontends, backends } = counts;
        if !self.ready {
            self.ready = true;
            tracing::info!(
                services,
                frontends,
                backends,
                writes = outcome.ops,
                ?took,
                "programmed"
            );
            // Last: what waits for it logs after this line.
            sinks.programmed.cancel();
        } else if outcome.ops > 0 {
            tracing::debug!(
                services,
                frontends,
                backends,
                writes = outcome.ops,
                ?took,
                "programmed"
            );
        }
    }

    fn publish_refusals(&self, outcome: &Outcome) {
        let sinks = &self.sinks;
        for (kind, name) in &outcome.resolved {
            let reasons = self.controller.refusal_reasons(*kind, name);
            sinks.refusals.keep(*kind, name, &reasons.into_iter().map(Into::into).collect());
        }
        let reporter = |subject: &Subject| {
            let (kind, name) = (subject.kind, subject.name.clone());
            move || match self.controller.snapshot().is_reporter(kind, &name) {
                true => Reporter::ThisNode,
                false => Reporter::OtherNode,
            }
        };
        for refusal in &outcome.refusals {
            let subject = Subject {
                kind: refusal.kind,
                name: refusal.object.clone(),
                uid: Some(refusal.uid.clone())
                    .filter(|uid| !uid.is_empty())
                    .or_else(|| self.uid(&refusal.object.to_string())),
            };
            let note = format!("{}: {}", refusal.field, refusal.message);
            let by = reporter(&subject);
            sinks.refusals.refuse_by(by, subject, refusal.reason.into(), note);
        }
        for shortage in &outcome.shortages {
            let (reason, other) = match shortage.share {
                None => (EventReason::MapFull, EventReason::NamespaceFull),
                Some(_) => (EventReason::NamespaceFull, EventReason::MapFull),
            };
            let subject = self.service(&shortage.service);
            sinks.refusals.withdraw(subject.clone(), other);
            sinks.refusals.refuse_by(reporter(&subject), subject, reason, shortage.message());
        }
        for name in &outcome.fitting {
            let subject = self.service(name);
            sinks.refusals.withdraw(subject.clone(), EventReason::MapFull);
            sinks.refusals.withdraw(subject, EventReason::NamespaceFull);
        }
        sinks.metrics.set_shortages(self.controller.shortages_of_maps());
    }

    /// A Service `namespace/name` as the subject of an Event.
    fn service(&self, name: &str) -> Subject {
        Subject { kind: ObjectKind::Service, name: name.into(), uid: self.uid(name) }
    }

    /// The uid of the Service `namespace/name`, by which its Events are found.
    fn uid(&self, service: &str) -> Option<String> {
        let service = self.controller.snapshot().service(service)?.service.as_ref()?;
        (!service.uid.is_empty()).then(|| service.uid.to_string())
    }
}

/// Gives back the memory that a list and the plan made of it took.
fn release_memory(dataplane: &mut KernelDataplane) {
    if let Err(error) = dataplane.unmap() {
        tracing::debug!(%error, "cannot unmap the arrays");
    }
    lb_sys::trim_heap();
}
