//! The types that the steps of a decision pass on, and those of its result.

use super::tables::{Known, NewFlow};
use crate::{
    abi::{
        address::{Address, Be16, Family},
        counter::Reason,
        flow::{Action, NextHop, Tuple},
        fragment::FragmentKey,
        frontend::Frontend,
        service::{Service, SlotRange},
        settings::{FamilySettings, Settings},
    },
    packet::{Packet, quote::Quote},
};

/// Where in the datapath a packet is handled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Site {
    /// tc ingress on the host side of a pod's interface: the packet comes from the pod.
    FromPod,
    /// tc egress on the host side of a pod's interface: the packet goes to the pod.
    ToPod,
    /// Ingress of an external device, XDP or tc.
    FromDevice,
    /// tc egress of an external device.
    ToDevice {
        /// The kernel's index of the external device.
        ifindex: u32,
        /// The kernel's index of the device that received the packet; 0 if a process of this node
        /// sent it.
        ingress: u32,
    },
    /// tc egress of the loopback device: the packet goes from this node to itself.
    Loopback,
}

/// How the program answers a client in place of a backend.
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

/// The decision on a packet, with the reason that is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The packet goes on unchanged.
    Pass(Reason),
    /// The packet is dropped.
    Drop(Reason),
    /// The packet is translated and sent on as [`Output::rewrite`], [`Output::action`] and
    /// [`Output::device`] say.
    Translate(Reason),
    /// The packet is dropped, and its sender gets an answer.
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
    /// Flows and keys on their way to or from a table.
    pub(super) scratch: WorkScratch<A>,
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

/// Flows and keys that a decision looks up or writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct WorkScratch<A> {
    pub(super) fragment: FragmentKey<A>,
    /// 1: the flow cannot keep its client's source port.
    pub(super) needs_port: u32,
    /// A new flow.
    pub(super) new: NewFlow<A>,
    /// A flow that was found.
    pub(super) known: Known<A>,
}

/// The inputs of every step of a decision, apart from the tables.
pub(crate) struct Context<'a, F: Family> {
    pub(crate) packet: &'a Packet<F>,
    pub(crate) settings: &'a Settings,
    pub(crate) site: Site,
    /// The low 32 bits of the kernel's jiffies.
    pub(crate) now: u32,
}

impl<A: Address> Work<A> {
    /// Memory for a flow that a hook looks up once the decision is made.
    #[inline(always)]
    pub fn known(&mut self) -> &mut Known<A> {
        &mut self.scratch.known
    }

    /// Sets how the packet is sent on: like the other packets of this direction of the flow that was
    /// found.
    #[inline(always)]
    pub(super) fn set_delivery(&mut self) {
        let (out, flow) = (&mut self.out, &self.scratch.known.flow);
        (out.action, out.device, out.next_hop) = (flow.action, flow.device, flow.next_hop);
        out.index = flow.service;
    }
}

impl<F: Family> Context<'_, F> {
    #[inline(always)]
    pub(crate) fn family(&self) -> &FamilySettings<F::Address> {
        F::settings(self.settings)
    }

    /// Whether the packet's source may be an address of this node. It is a function of its own,
    /// because in a large one the bound of the loop would be spilled to the stack, where verifiers
    /// before 6.3 forget its range.
    #[inline(never)]
    pub(crate) fn may_be_sent_by_node(&self) -> bool {
        self.family().may_be_node(self.packet.tuple().source)
    }

    /// Now, in the unit of the times of flows.
    #[inline(always)]
    pub(crate) fn time(&self) -> u32 {
        self.settings.time(self.now)
    }

    /// Whether another node encapsulated the packet.
    #[inline(always)]
    pub(crate) fn is_encapsulated(&self) -> bool {
        matches!(self.site, Site::FromDevice) && self.packet.encap_len != 0
    }

    /// Whether new flows are left to the kernel. Encapsulated packets are not, because the kernel
    /// would not deliver them.
    #[inline(always)]
    pub(crate) fn is_draining(&self) -> bool {
        self.settings.is_draining() && !self.is_encapsulated()
    }

    /// Whether the program would forward the packet as a router does, but its TTL or hop limit is
    /// used up.
    #[inline(always)]
    pub(crate) fn is_ttl_exceeded(&self, action: Action) -> bool {
        action.is_forward() && self.packet.ttl <= 1
    }

    /// Whether a packet at ingress is a reply that is translated on egress. With a local address or
    /// a Service's as its source before routing, it would fail source validation
    /// (`fib_validate_source`), and conntrack would see it as INVALID.
    #[inline(always)]
    pub(crate) fn is_translated_on_egress(&self, action: Action) -> bool {
        matches!(self.site, Site::FromPod | Site::FromDevice) && action.is_reply_by_stack()
    }

    /// The client's origin.
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

/// The origin of a client, by which traffic policies apply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A pod or a process of this node.
    Inside,
    /// A pod of another node.
    Pod,
    /// Any other client.
    Outside,
    /// A client outside the cluster whose packets another node encapsulated for this one.
    Tunnel,
}

/// What a packet may be, judged by its destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Candidate {
    /// A request: the destination may be a Service's address.
    Service,
    /// A reply or a request to a node port: the destination may be an address of this node.
    Node,
    /// A reply: the destination is neither of these, but replies pass this site.
    Reply,
    /// Neither a request to a Service nor a reply, but a client's that may have flows of Services.
    Direct,
    /// Neither a request to a Service nor a reply.
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

/// The backends that may be chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Eligible {
    /// Their slots.
    pub range: SlotRange,
    /// Their bit in [`Backend::sets`](crate::abi::backend::Backend::sets).
    pub set: u8,
}
