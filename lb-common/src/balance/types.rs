//! What the steps of a decision hand to one another, and what comes out of it.

use crate::{
    abi::{
        address::{Address, Be16, Family},
        counter::Reason,
        flow::{Action, Flow, FlowKey, NextHop, Tuple},
        fragment::FragmentKey,
        frontend::Frontend,
        service::{Service, SlotRange},
        settings::{FamilySettings, Settings},
    },
    packet::{Packet, quote::Quote},
};

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
    /// Goes on as [`Output::rewrite`], [`Output::action`] and [`Output::device`] say.
    Translate(Reason),
    /// Ends here, and its sender is answered.
    Answer(Answer, Reason),
}

/// Memory for one decision. It is an argument so that the programs, whose stack is small, can keep
/// it in a map. Nothing in it outlives a decision.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Work<A> {
    /// What becomes of the packet.
    pub out: Output<A>,
    /// The packet that an ICMP error quotes: read by the hook, and translated with the error.
    pub error: ErrorQuote<A>,
    /// The Service that a new flow is for.
    pub(super) chosen: Chosen,
    /// Entries and keys on their way to or from a table.
    pub(super) scratch: Scratch<A>,
}

/// How a packet goes on. Valid after [`Verdict::Translate`]; [`Output::index`] after every verdict
/// whose reason TRAFFIC or DROPS counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Output<A> {
    /// The addresses and ports of the translated packet.
    pub rewrite: Tuple<A>,
    /// Where the translated packet is sent.
    pub action: Action,
    /// Index into DEVICES, for [`Action::REPLY_INTO_DEVICE`].
    pub device: u32,
    /// Index into SERVICES of the service port that translates or rejects the packet;
    /// [`NO_SERVICE`](crate::abi::traffic::NO_SERVICE) if there is none.
    pub index: u32,
    /// The next hop that the flow remembers for forwarded packets.
    pub next_hop: NextHop,
}

/// The packet that an ICMP error quotes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct ErrorQuote<A> {
    /// The quote as it arrived: read by the hook before the decision.
    pub quote: Quote<A>,
    /// The addresses and ports of the translated quote. Valid after [`Verdict::Translate`].
    pub quoted: Tuple<A>,
}

/// The Service of a packet without a flow, filled in by `open::find_service`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Chosen {
    pub(super) frontend: Frontend,
    pub(super) service: Service,
    /// The backends that may be chosen.
    pub(super) eligible: Eligible,
}

/// Entries and keys that a decision looks up or writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Scratch<A> {
    pub(super) fragment: FragmentKey<A>,
    /// 1: the flow cannot keep its client's source port.
    pub(super) needs_port: u32,
    /// 1: an established flow of another frontend has the reply tuple that this flow had.
    pub(super) is_reply_tuple_taken: u32,
    pub(super) reverse_key: FlowKey<A>,
    /// The entry of the packet's direction.
    pub(super) flow: Flow<A>,
    /// The entry of the other direction.
    pub(super) reverse: Flow<A>,
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
    pub(super) fn set_delivery(&mut self, flow: &Flow<A>) {
        let out = &mut self.out;
        (out.action, out.device, out.next_hop) = (flow.action, flow.device, flow.next_hop);
        out.index = flow.service;
    }
}

impl<F: Family> Context<'_, F> {
    #[inline(always)]
    pub(crate) fn family(&self) -> &FamilySettings<F::Address> {
        F::settings(self.settings)
    }

    /// Whether the packet came in a tunnel of another node.
    #[inline(always)]
    pub(crate) fn is_encapsulated(&self) -> bool {
        matches!(self.site, Site::FromDevice) && self.packet.encap_len != 0
    }

    /// Whether new flows are left to the stack. Those in a tunnel would end there.
    #[inline(always)]
    pub(crate) fn is_draining(&self) -> bool {
        self.settings.is_draining() && !self.is_encapsulated()
    }

    /// Whether the program is to send the packet on as a router does, which ends here.
    #[inline(always)]
    pub(crate) fn is_ttl_exceeded(&self, action: Action) -> bool {
        action.is_forward() && self.packet.ttl <= 1
    }

    /// Whether the packet is a reply that has not been routed yet, but is changed only after
    /// that: input routing takes a source of ours for a forgery, connection tracking for invalid.
    #[inline(always)]
    pub(crate) fn is_translated_on_egress(&self, action: Action) -> bool {
        matches!(self.site, Site::FromPod | Site::FromDevice) && action.is_reply_by_stack()
    }

    /// Who the client is.
    #[inline(always)]
    pub(crate) fn origin(&self) -> Origin {
        match self.site {
            Site::FromDevice if self.is_encapsulated() => Origin::Tunnel,
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
    NotService,
}

/// An address and port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Endpoint<A: Address> {
    /// The address, network byte order.
    pub address: A,
    /// The port, network byte order.
    pub port: Be16,
}

/// The backends that may be chosen from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Eligible {
    /// Their slots.
    pub range: SlotRange,
    /// Their bit in [`Backend::sets`](crate::abi::backend::Backend::sets).
    pub set: u8,
}
