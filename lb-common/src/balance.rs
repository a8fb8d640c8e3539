//! The decision on every packet and every connect(): a function of the packet, the
//! settings and the tables.
//!
//! It never writes to a packet. Hooks parse, call [`decide`] or [`socket::decide`] and
//! apply the verdict; they decide nothing themselves.

use crate::{
    abi::{
        address::{Address, Be16, Family},
        counter::Reason,
        flow::{Action, Flow, FlowKey, NextHop, Tuple},
        fragment::FragmentKey,
        frontend::{Frontend, TCP},
        service::Service,
        settings::{FamilySettings, Settings},
        traffic::NO_SERVICE,
    },
    packet::{Kind, Packet, quote::Quote},
};

pub mod error;
pub mod fragment;
pub mod known;
pub mod open;
pub mod select;
pub mod socket;
pub mod tables;
pub mod track;
pub mod tunnel;

pub use tables::{Entry, FlowTable, InsertError, Tables};

/// Where a packet was caught.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Site {
    /// It comes out of a pod.
    FromPod,
    /// It is about to go into a pod.
    ToPod,
    /// It comes in by an external device.
    FromDevice,
    /// It is about to leave by an external device.
    ToDevice {
        /// The kernel's index of that device.
        ifindex: u32,
        /// The kernel's index of the device that it came in by; 0 = a process of this node
        /// made it.
        ingress: u32,
    },
    /// It goes from this node to itself.
    Loopback,
}

/// How a client is told that there is nothing to connect to (or, for an echo, that
/// there is).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// TCP RST.
    Reset,
    /// ICMP(v6) port unreachable.
    PortUnreachable,
    /// ICMP protocol unreachable; ICMPv6 has only port unreachable for it.
    ProtocolUnreachable,
    /// ICMP(v6) echo reply.
    Echo,
    /// ICMP(v6) time exceeded in transit.
    TimeExceeded,
}

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Goes on as it is.
    Pass(Reason),
    /// Ends here.
    Drop(Reason),
    /// Goes on as [`Work::rewrite`], [`Work::action`] and [`Work::device`] say.
    Translate(Reason),
    /// Ends here, and its sender is answered.
    Answer(Answer, Reason),
}

/// Room for what a decision works out. It is an argument so that the programs, whose
/// stack is small, can keep it in a map; nothing in it outlives a decision.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Work<A> {
    /// The addresses and ports that a translated packet goes on with.
    pub rewrite: Tuple<A>,
    /// Where a translated packet goes on.
    pub action: Action,
    /// Index into DEVICES, for [`Action::REPLY_INTO_DEVICE`].
    pub device: u32,
    /// Index into SERVICES of the service port that translates the packet or turns it away;
    /// [`NO_SERVICE`] for none.
    pub index: u32,
    /// Where the flow remembers that a forwarded packet goes.
    pub next_hop: NextHop,
    /// What an ICMP error quotes, where the packet is one.
    pub quote: Quote<A>,
    /// The addresses and ports that a translated quote goes on with.
    pub quoted: Tuple<A>,
    fragment: FragmentKey<A>,
    frontend: Frontend,
    service: Service,
    eligible: select::Eligible,
    /// Whether the flow can't keep its client's port.
    needs_port: u32,
    /// Whether another flow has the reply tuple that the flow had.
    is_contested: u32,
    pair_key: FlowKey<A>,
    flow: Flow<A>,
    pair: Flow<A>,
}

/// What every step of a decision needs beside the tables.
pub(crate) struct Context<'a, F: Family> {
    pub(crate) packet: &'a Packet<F>,
    pub(crate) settings: &'a Settings,
    pub(crate) site: Site,
    pub(crate) now: u32,
}

impl<A: Address> Work<A> {
    /// The packet goes where those of this direction of a flow go.
    #[inline(always)]
    fn go_with(&mut self, flow: &Flow<A>) {
        (self.action, self.device, self.next_hop) = (flow.action, flow.device, flow.next_hop);
        self.index = flow.service;
    }
}

impl<F: Family> Context<'_, F> {
    #[inline(always)]
    pub(crate) fn family(&self) -> &FamilySettings<F::Address> {
        F::settings(self.settings)
    }

    /// Whether the packet came in a tunnel of another node.
    #[inline(always)]
    pub(crate) fn is_tunnelled(&self) -> bool {
        matches!(self.site, Site::FromDevice) && self.packet.tunnel != 0
    }

    /// Whether new flows are left to the stack. Those in a tunnel would end there.
    #[inline(always)]
    pub(crate) fn is_draining(&self) -> bool {
        self.settings.is_draining() && !self.is_tunnelled()
    }

    /// Whether the program is to send the packet on as a router does, which ends here.
    #[inline(always)]
    pub(crate) fn is_last_hop(&self, action: Action) -> bool {
        action.is_forward() && self.packet.hops <= 1
    }

    /// Whether the packet is a reply that has not been routed yet, but is changed only after
    /// that: input routing takes a source of ours for a forgery, connection tracking for invalid.
    #[inline(always)]
    pub(crate) fn is_early(&self, action: Action) -> bool {
        matches!(self.site, Site::FromPod | Site::FromDevice) && action.is_reply_by_stack()
    }

    /// Who the client is.
    #[inline(always)]
    pub(crate) fn origin(&self) -> Origin {
        match self.site {
            Site::FromDevice if self.is_tunnelled() => Origin::Tunnel,
            Site::FromDevice if !self.family().is_pod(self.packet.tuple().source) => {
                Origin::Outside
            }
            Site::FromDevice => Origin::Pod,
            _ => Origin::Inside,
        }
    }
}

/// Who a client is, as far as policies are concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A pod or a process of this node.
    Inside,
    /// A pod of another node.
    Pod,
    /// Anybody else.
    Outside,
    /// Anybody else, by way of another node, which has chosen this one.
    Tunnel,
}

/// Who the client of a packet caught at `site` is.
pub fn origin<F: Family>(packet: &Packet<F>, site: Site, settings: &Settings) -> Origin {
    Context { packet, settings, site, now: 0 }.origin()
}

/// What a packet may be, as far as its destination tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Candidate {
    /// Addressed to what may be a Service's address.
    Service,
    /// Addressed to this node: a reply, or a request to a node port.
    Node,
    /// A reply.
    Reply,
    /// Nothing of ours.
    Neither,
}

/// What a packet caught at `site` may be: all that is to be known of most packets, before
/// they are parsed any further.
#[inline(always)]
pub fn candidate<F: Family>(destination: F::Address, site: Site, settings: &Settings) -> Candidate {
    let family = F::settings(settings);
    if matches!(site, Site::ToPod) {
        return Candidate::Reply;
    }
    if family.may_be_service(destination) {
        return Candidate::Service;
    }
    match site {
        Site::ToDevice { .. } if settings.flags & Settings::EXTERNAL != 0 => Candidate::Reply,
        Site::ToDevice { .. } => Candidate::Neither,
        Site::Loopback if F::is_loopback(destination) => Candidate::Node,
        _ if family.may_be_node(destination) => Candidate::Node,
        _ => Candidate::Neither,
    }
}

/// Decides on a packet caught at `site`.
#[inline(always)]
pub fn decide<F: Family, T: Tables<F>>(
    packet: &Packet<F>,
    site: Site,
    settings: &Settings,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> Verdict {
    let candidate = candidate::<F>(packet.tuple().destination, site, settings);
    decide_candidate(candidate, packet, site, settings, work, tables)
}

/// Decides on a packet caught at `site` that is the `candidate` told by [`candidate`].
#[inline(always)]
pub fn decide_candidate<F: Family, T: Tables<F>>(
    candidate: Candidate,
    packet: &Packet<F>,
    site: Site,
    settings: &Settings,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> Verdict {
    if matches!(candidate, Candidate::Neither) {
        return Verdict::Pass(Reason::NotService);
    }
    let context = Context { packet, settings, site, now: tables.now() };
    let may_open = may_open(&context, candidate);
    let verdict = if is_balanced(packet.kind) {
        match known::decide(&context, may_open, work, tables) {
            Some(verdict) => verdict,
            None => open::decide(&context, work, tables),
        }
    } else {
        return of_no_flow(candidate, &context, work, tables);
    };
    keep_in(candidate, &context, verdict, tables)
}

/// What becomes of a packet that belongs to no flow and can't open one.
#[inline(always)]
fn of_no_flow<F: Family, T: Tables<F>>(
    candidate: Candidate,
    context: &Context<F>,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> Verdict {
    work.index = NO_SERVICE;
    let verdict = match candidate {
        Candidate::Service if may_enter(context.site) => open::not_balanced(context, tables),
        _ => Verdict::Pass(Reason::NoFlow),
    };
    keep_in(candidate, context, verdict, tables)
}

/// Whether what is addressed to a Service may be new at `site`.
#[inline(always)]
fn may_enter(site: Site) -> bool {
    !matches!(site, Site::ToDevice { ingress: 1.., .. })
}

/// The verdict, but for what would leave the node untranslated for a ClusterIP.
#[inline(always)]
fn keep_in<F: Family, T: Tables<F>>(
    candidate: Candidate,
    context: &Context<F>,
    verdict: Verdict,
    tables: &mut T,
) -> Verdict {
    match (context.site, candidate, verdict) {
        (Site::ToDevice { .. }, Candidate::Service, Verdict::Pass(_))
            if is_service_address(context, tables) =>
        {
            Verdict::Drop(Reason::UntranslatedLeaving)
        }
        _ => verdict,
    }
}

/// Decides on a whole packet that came in by an external device and belongs to a known flow,
/// or can be told to be nothing of ours; `None` for every other.
#[inline(always)]
pub fn decide_known<F: Family, T: Tables<F>>(
    candidate: Candidate,
    packet: &Packet<F>,
    settings: &Settings,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> Option<Verdict> {
    if !is_balanced(packet.kind) || packet.is_syn() || packet.is_first != 0 {
        return None;
    }
    let context = Context { packet, settings, site: Site::FromDevice, now: tables.now() };
    let verdict = known::decide(&context, may_open(&context, candidate), work, tables);
    if context.is_tunnelled() && matches!(verdict, Some(Verdict::Pass(_))) {
        return None;
    }
    verdict
}

/// Whether a packet without a flow may open one.
#[inline(always)]
fn may_open<F: Family>(context: &Context<F>, candidate: Candidate) -> bool {
    let port = context.packet.tuple().destination_port.get();
    match candidate {
        Candidate::Service => may_enter(context.site),
        Candidate::Node => context.settings.node_ports.contains(port),
        Candidate::Reply | Candidate::Neither => false,
    }
}

/// Whether the packet's destination is, or may become, a ClusterIP, so that it must
/// not leave the node untranslated.
#[inline(never)]
fn is_service_address<F: Family, T: Tables<F>>(context: &Context<F>, tables: &mut T) -> bool {
    let destination = context.packet.tuple().destination;
    context.family().is_in_service_cidr(destination)
        || tables.frontend(&crate::abi::frontend::FrontendKey::of_address(destination)).is_some()
}

/// The entry of the flow that packets of this key belong to, whatever they carry.
#[inline(always)]
fn live_flow<F: Family, T: Tables<F>>(
    context: &Context<F>,
    key: &FlowKey<F::Address>,
    tables: &mut T,
) -> Option<T::FlowEntry> {
    let is_tcp = key.protocol == TCP as u32;
    let mut found = tables.flow(FlowTable::Flows, key);
    if found.is_none() && is_tcp {
        found = tables.flow(FlowTable::Embryonic, key);
    }
    let kind = if is_tcp { Kind::Tcp } else { Kind::Udp };
    found.filter(|entry| {
        let flow = entry.get();
        let is_not_for_it = flow.action.is_one_way() && context.is_tunnelled();
        !is_not_for_it
            && !context.is_early(flow.action)
            && !track::is_expired(flow, kind, context.now, context.settings)
    })
}

/// Whether a packet carries what Services carry.
#[inline(always)]
pub(crate) fn is_balanced(kind: Kind) -> bool {
    matches!(kind, Kind::Tcp | Kind::Udp)
}

/// An address and port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Endpoint<A: Address> {
    /// The address, network byte order.
    pub address: A,
    /// The port, network byte order.
    pub port: Be16,
}
