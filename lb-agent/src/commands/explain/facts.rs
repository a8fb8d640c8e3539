//! Describes in sentences what the tables hold about a destination.
//!
//! It decides nothing: the core's own [`eligible`](select::eligible) selects the set of a client.

use std::net::SocketAddr;

use lb_common::{
    abi::{
        address::Be16,
        backend::{
            Backend, IN_CLUSTER_SET, IN_LOCAL_SET, ON_THIS_NODE, READY, TERMINATING, THIS_HOST,
        },
        counter::Reason,
        flow::{ANSWERED, CLIENT_FIN, Flow, ONE_WAY, RESET, SERVER_FIN, STREAM},
        frontend::{Frontend, FrontendKey, FrontendKind, TCP},
        service::Service,
        settings::Settings,
    },
    balance::{Endpoint, Origin, select, types::Eligible},
    flow_table::{Class, age},
};

use super::{
    pinned::PinnedFamily,
    report::{BACKENDS, Candidate, Step},
    tables::{Reader, Seen},
};
use crate::maps::flow_table::{is_expired, lifetime, seconds};

/// A client and its destination.
pub(super) struct Facts<'a, F: PinnedFamily, R> {
    /// The tables.
    pub(super) reader: &'a R,
    /// The settings in force.
    pub(super) settings: &'a Settings,
    /// The client.
    pub(super) source: Endpoint<F::Address>,
    /// The destination.
    pub(super) destination: Endpoint<F::Address>,
    /// [`TCP`] or UDP.
    pub(super) protocol: u8,
}

/// An address and port as text.
pub(super) fn text<F: PinnedFamily>(endpoint: Endpoint<F::Address>) -> String {
    SocketAddr::new(F::ip(endpoint.address), endpoint.port.get()).to_string()
}

/// The name of a protocol.
pub(super) fn protocol_name(protocol: u8) -> &'static str {
    if protocol == TCP { "tcp" } else { "udp" }
}

/// An address and port.
pub(super) fn endpoint<F: PinnedFamily>(address: F::Address, port: Be16) -> Endpoint<F::Address> {
    Endpoint { address, port }
}

impl<F: PinnedFamily, R: Reader<F>> Facts<'_, F, R> {
    /// Describes the frontend of the destination, and returns it.
    pub(super) fn frontend(&self, step: &mut Step) -> Option<Frontend> {
        const ABOUT: &str = "frontend";
        let Endpoint { address, port } = self.destination;
        let key = FrontendKey::new(address, port, self.protocol);
        let ip = F::ip(address);
        if let Some(frontend) = self.reader.frontend(&key) {
            let (kind, what) = kind_of(frontend.kind);
            let name = self.reader.name(frontend.service);
            let port = format!("{}/{}", text::<F>(self.destination), protocol_name(self.protocol));
            step.say(ABOUT, format!("{port} is {what} of {name}"));
            (step.frontend, step.service) = (Some(kind), Some(name));
            return Some(frontend);
        }
        let family = F::settings(self.settings);
        let text = match self.reader.frontend(&FrontendKey::of_address(address)) {
            Some(whole) => {
                let name = self.reader.name(whole.service);
                let port = format!("{}/{}", port.get(), protocol_name(self.protocol));
                let what = match whole.kind {
                    FrontendKind::EXTERNAL_ADDRESS => "a load balancer's address or external IP",
                    _ => "a ClusterIP",
                };
                format!("{ip} is {what} of {name}, which has no port {port}")
            }
            None if family.is_in_service_cidr(address) => {
                format!("{ip} is in a ServiceCIDR, but no Service on this node has it")
            }
            None if self.settings.node_ports.contains(port.get()) && family.is_node(address) => {
                format!("{ip} is an address of this node, but {} is not a NodePort", port.get())
            }
            None if family.is_node(address) => format!("{ip} is an address of this node"),
            None => format!("no Service has {ip} and port {}", port.get()),
        };
        step.say(ABOUT, text);
        None
    }

    /// Describes loadBalancerSourceRanges if the Service has them. Returns whether the client is
    /// allowed.
    pub(super) fn ranges(&self, frontend: &Frontend, client: F::Address, step: &mut Step) -> bool {
        if frontend.flags & Frontend::RANGED == 0 {
            return true;
        }
        let ranges = self.reader.ranges(frontend.service);
        let is_in = self.reader.is_in_range(frontend.service, client);
        let client = F::ip(client);
        let is = if is_in { "is" } else { "is not" };
        let list = if ranges.is_empty() { "none".to_owned() } else { ranges.join(", ") };
        step.say("ranges", format!("{client} {is} in loadBalancerSourceRanges ({list})"));
        is_in
    }

    /// Describes the set that the client gets and the backends in it.
    pub(super) fn policy(
        &self,
        frontend: &Frontend,
        origin: Origin,
        step: &mut Step,
    ) -> Option<Eligible> {
        let service = self.reader.service(frontend.service)?;
        let eligible = select::eligible(&service, frontend.kind, origin);
        let is_local = match eligible {
            Ok(eligible) => eligible.set == IN_LOCAL_SET,
            Err(reason) => matches!(reason, Reason::NoLocalEndpoint),
        };
        let set = if is_local { "local" } else { "cluster" };
        step.set = Some(set);
        let count = eligible.map_or(0, |eligible| eligible.range.length());
        let why = policy_text(&service, frontend.kind, origin);
        step.say("policy", format!("{why}: the {set} set, {}", plural(count, "backend")));
        let set = if is_local { IN_LOCAL_SET } else { IN_CLUSTER_SET };
        self.backends(frontend.service, set, step);
        eligible.ok()
    }

    /// Lists the backends of a service port.
    fn backends(&self, index: u32, set: u8, step: &mut Step) {
        let backends = self.reader.backends_of(index);
        step.backends = backends.iter().map(|(_, backend)| candidate::<F>(backend, set)).collect();
        let possible = step.possible();
        let known = step.backends.len();
        let known = match known {
            0 => "the Service has no endpoints".to_owned(),
            _ => format!("{possible} of {known} eligible"),
        };
        step.say(BACKENDS, known);
    }

    /// Describes a flow, and whether it is still valid.
    pub(super) fn flow(&self, seen: &Seen<F::Address>, step: &mut Step) {
        let word = seen.flow.word;
        let mut flow = Flow::default();
        seen.flow.entry.read(seen.direction, word, &mut flow);
        let time = self.settings.time(self.reader.now());
        let idle = age(word.time(), time);
        let lifetimes = &self.settings.lifetimes;
        let backend = self.reader.backend(flow.backend);
        let is_gone = backend.is_none_or(|backend| backend.generation != flow.generation);
        let direction = if flow.action.is_reply() { "to its client" } else { "to its backend" };
        let is_tcp = seen.flow.protocol() == TCP;
        let is_half_open = is_tcp && seen.flow.class() == Class::Unanswered;
        let handshake = if is_half_open { ", handshake not complete" } else { "" };
        let to = endpoint::<F>(flow.rewrite.destination, flow.rewrite.destination_port);
        let in_seconds = |times| seconds(times, self.settings).unwrap_or_default();
        let mut text = format!(
            "existing entry {direction} {}{handshake}{}, idle for {} s of {} s",
            text::<F>(to),
            state_text(is_tcp, flow.state),
            in_seconds(idle),
            in_seconds(lifetime(word, lifetimes)),
        );
        if is_expired(word, time, lifetimes) {
            text.push_str(": expired, ignored");
        }
        if is_gone {
            text.push_str("; its backend is no longer in an EndpointSlice");
        }
        step.say("flow", text);
        step.service.get_or_insert_with(|| self.reader.name(flow.service));
    }
}

fn state_text(is_tcp: bool, state: u8) -> String {
    let of_tcp = [
        (ANSWERED, "answered"),
        (CLIENT_FIN, "client has sent FIN"),
        (SERVER_FIN, "backend has sent FIN"),
        (RESET, "reset"),
        (ONE_WAY, "replies take another path"),
    ];
    let of_udp = [
        (ANSWERED, "answered"),
        (STREAM, "for longer than two seconds"),
        (ONE_WAY, "replies take another path"),
    ];
    let names = if is_tcp { &of_tcp[..] } else { &of_udp };
    let seen = names.iter().filter(|(bit, _)| state & bit != 0);
    seen.map(|(_, name)| format!(", {name}")).collect()
}

fn kind_of(kind: FrontendKind) -> (&'static str, &'static str) {
    match kind {
        FrontendKind::CLUSTER_IP => ("cluster_ip", "a ClusterIP frontend"),
        FrontendKind::CLUSTER_IP_ADDRESS => ("cluster_ip_address", "the ClusterIP"),
        FrontendKind::NODE_PORT => ("node_port", "a NodePort frontend"),
        FrontendKind::EXTERNAL => ("external", "a load balancer or external IP frontend"),
        FrontendKind::EXTERNAL_ADDRESS => {
            ("external_address", "the address of a load balancer or an external IP")
        }
        _ => ("unknown", "a frontend of unknown kind"),
    }
}

fn policy_text(service: &Service, kind: FrontendKind, origin: Origin) -> String {
    let named = |flag| if service.flags & flag != 0 { "Local" } else { "Cluster" };
    let internal = named(Service::INTERNAL_LOCAL);
    let external = named(Service::EXTERNAL_LOCAL);
    match (kind.is_internal(), origin) {
        (_, Origin::Tunnel) => "encapsulated by another node".to_owned(),
        (true, _) => format!("internalTrafficPolicy {internal}"),
        (false, Origin::Outside) => {
            format!("client outside the cluster, externalTrafficPolicy {external}")
        }
        (false, Origin::Pod) if kind == FrontendKind::NODE_PORT => {
            format!("client is a pod of another node, externalTrafficPolicy {external}")
        }
        (false, Origin::Pod) => {
            format!("client is a pod of another node, externalTrafficPolicy {external} is ignored")
        }
        (false, Origin::Inside) => {
            format!("client on this node, externalTrafficPolicy {external} is ignored")
        }
    }
}

/// Where a backend runs, as in `get backends`.
pub(super) fn place<A>(backend: &Backend<A>) -> &'static str {
    match backend.flags {
        flags if flags & THIS_HOST != 0 => "this_host",
        flags if flags & ON_THIS_NODE != 0 => "this_node",
        _ => "other_node",
    }
}

fn candidate<F: PinnedFamily>(backend: &Backend<F::Address>, set: u8) -> Candidate {
    let possible = backend.sets & set != 0;
    let why_not = (!possible).then(|| why_not(backend, set).to_owned());
    Candidate {
        address: text::<F>(endpoint::<F>(backend.address, backend.port)),
        place: place(backend),
        possible,
        why_not,
        ..Candidate::default()
    }
}

/// Why a backend is not in a set.
fn why_not<A>(backend: &Backend<A>, set: u8) -> &'static str {
    let is_away = set == IN_LOCAL_SET && place(backend) == "other_node";
    match backend.flags {
        _ if is_away => "it is not on this node",
        flags if flags & TERMINATING != 0 => "it is terminating",
        flags if flags & READY == 0 => "it is not ready",
        _ if set == IN_LOCAL_SET => "the Service has no local set",
        _ => "the topology hints of the endpoints exclude it",
    }
}

/// A count and its noun.
pub(super) fn plural(count: u32, thing: &str) -> String {
    if count == 1 { format!("1 {thing}") } else { format!("{count} {thing}s") }
}
