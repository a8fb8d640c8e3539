//! What a flow is: its keys, the state and the actions of its directions. How flows are kept is in
//! [`flow_table`](super::flow_table).

use bytemuck::{Pod, Zeroable};

use super::ip::{Address, Address4, Be16, pod};

/// The addresses and ports of a packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub struct Tuple<A> {
    /// Source address, network byte order.
    pub source: A,
    /// Destination address, network byte order.
    pub destination: A,
    /// Source port, network byte order.
    pub source_port: Be16,
    /// Destination port, network byte order.
    pub destination_port: Be16,
}

impl<A: Address> Tuple<A> {
    /// Copies `other` field by field, for the reason given at [`Address::set`].
    #[inline(always)]
    pub fn set(&mut self, other: &Self) {
        self.source.set(&other.source);
        self.destination.set(&other.destination);
        self.source_port = other.source_port;
        self.destination_port = other.destination_port;
    }

    /// Sets both ports, as they are in a packet, by one store: a look-up reads them as one word,
    /// and a load of a word that two stores wrote stalls the CPU.
    #[inline(always)]
    pub fn set_ports(&mut self, ports: u32) {
        let words: &mut [u32] = bytemuck::cast_slice_mut(bytemuck::bytes_of_mut(self));
        words[const { size_of::<Self>() / size_of::<u32>() - 1 }] = ports;
    }

    /// Becomes the reverse of `other`: the tuple of a packet in the other direction.
    #[inline(always)]
    pub fn set_reverse(&mut self, other: &Self) {
        self.source.set(&other.destination);
        self.destination.set(&other.source);
        self.source_port = other.destination_port;
        self.destination_port = other.source_port;
    }

    /// The tuple of a packet in the other direction.
    #[inline(always)]
    pub fn reversed(&self) -> Self {
        let mut reverse = *self;
        reverse.set_reverse(self);
        reverse
    }

    /// Whether `other` is the same. All of it is compared without a branch: most that are compared
    /// are the same, and each branch is a path for a verifier.
    #[inline(always)]
    pub fn is(&self, other: &Self) -> bool {
        let ports = (self.source_port.be16 ^ other.source_port.be16)
            | (self.destination_port.be16 ^ other.destination_port.be16);
        let source = self.source.difference(&other.source);
        u32::from(ports) | source | self.destination.difference(&other.destination) == 0
    }

    /// Whether `other` is the tuple of packets in the other direction, compared in the same way.
    #[inline(always)]
    pub fn is_reverse_of(&self, other: &Self) -> bool {
        let ports = (self.source_port.be16 ^ other.destination_port.be16)
            | (self.destination_port.be16 ^ other.source_port.be16);
        let source = self.source.difference(&other.destination);
        u32::from(ports) | source | self.destination.difference(&other.source) == 0
    }
}

/// What identifies one direction of a flow: the packet as it arrives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub struct FlowKey<A> {
    /// Addresses and ports of the packet as it arrives.
    pub tuple: Tuple<A>,
    /// [`TCP`](super::frontend::TCP) or [`UDP`](super::frontend::UDP).
    pub protocol: u32,
}

impl<A: Address> FlowKey<A> {
    /// Becomes the key of the reverse entry of an entry with this rewrite.
    #[inline(always)]
    pub fn set_reverse(&mut self, rewrite: &Tuple<A>, protocol: u32) {
        self.tuple.set_reverse(rewrite);
        self.protocol = protocol;
    }
}

/// One direction of a translated flow, as a packet finds it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Flow<A> {
    /// Addresses and ports of the packet once it is translated.
    pub rewrite: Tuple<A>,
    /// How the packet is sent on: an [`Action`] constant.
    pub action: Action,
    /// The state of the flow, as its packets showed it: [`ANSWERED`], [`CLIENT_FIN`],
    /// [`SERVER_FIN`], [`RESET`], [`CONFIRMED`]; and [`ONE_WAY`].
    pub state: u8,
    /// The backend's generation when the flow chose it.
    pub generation: u16,
    /// Index into BACKENDS4 or BACKENDS6.
    pub backend: u32,
    /// Index into SERVICES.
    pub service: u32,
    /// When a packet was last noted, to within a second, in the unit of
    /// [`Settings::time_shift`](super::settings::Settings::time_shift).
    pub last_seen: u32,
    /// Index into DEVICES of the egress device of a flow of a node process, or [`LOOPBACK_DEVICE`].
    pub device: u32,
    /// The next hop of packets that the program forwards, if it has looked up the route.
    pub next_hop: NextHop,
}

/// The result of a route look-up in one aligned word, so that one store replaces it: the MAC of the
/// next hop, the egress device, and the device's epoch at that time. It is valid while the device
/// has the same epoch, but no longer than a second, because no agent may be running that notices
/// changes of routes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct NextHop {
    /// In memory order: six bytes of the MAC, one of the index into DEVICES, one of the device's
    /// epoch. 0 = not known.
    pub bytes: u64,
}

impl NextHop {
    /// No route has been looked up.
    pub const UNKNOWN: Self = Self { bytes: 0 };

    /// The next hop with this MAC, by the device with this index into DEVICES in its current
    /// `epoch`.
    #[inline(always)]
    pub fn new([a, b, c, d, e, f]: [u8; 6], device: u8, epoch: u8) -> Self {
        Self { bytes: u64::from_ne_bytes([a, b, c, d, e, f, device, epoch]) }
    }

    /// The MAC of the next hop.
    #[inline(always)]
    pub fn mac(self) -> [u8; 6] {
        let [a, b, c, d, e, f, ..] = self.bytes.to_ne_bytes();
        [a, b, c, d, e, f]
    }

    /// Index into DEVICES.
    #[inline(always)]
    pub fn device(self) -> u8 {
        self.bytes.to_ne_bytes()[6]
    }

    /// The epoch of the device; 0 = not known.
    #[inline(always)]
    pub fn epoch(self) -> u8 {
        self.bytes.to_ne_bytes()[7]
    }
}

impl<A: Address> Flow<A> {
    /// Copies `other` field by field, for the reason given at [`Address::set`].
    #[inline(always)]
    pub fn set(&mut self, other: &Self) {
        self.rewrite.set(&other.rewrite);
        self.action = other.action;
        self.state = other.state;
        self.generation = other.generation;
        self.backend = other.backend;
        self.service = other.service;
        self.last_seen = other.last_seen;
        self.device = other.device;
        self.next_hop = other.next_hop;
    }
}

/// [`Flow::device`] of a flow whose client, a process of this node, used the loopback device.
pub const LOOPBACK_DEVICE: u32 = u32::MAX;

/// The number of states that a flow of one protocol may be in.
pub const STATES: usize = 64;

/// TCP: the backend answered the SYN. UDP: the backend sent something.
pub const ANSWERED: u8 = 1;
/// TCP: the client sent FIN.
pub const CLIENT_FIN: u8 = 2;
/// UDP: a packet came more than a second after the backend had sent something.
pub const LASTING: u8 = 2;
/// TCP: the backend sent FIN.
pub const SERVER_FIN: u8 = 4;
/// UDP: another packet came more than a second later still, so this is more than a question and its
/// answer.
pub const STREAM: u8 = 4;
/// TCP: either side sent RST.
pub const RESET: u8 = 8;
/// The replies do not pass this node, so their packets set no state here.
pub const ONE_WAY: u8 = 16;
/// TCP: the client went on after the backend had answered its SYN, so neither end is forged.
pub const CONFIRMED: u8 = 32;
/// UDP: what its client sends counts as another flow's. Late answers still belong to this one.
pub const MOVED: u8 = 32;

/// How a packet is sent on once it is rewritten, and which direction it belongs to.
/// Bit 64 is set for replies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct Action {
    /// The number of the action.
    pub action: u8,
}

impl Action {
    /// Request. The stack routes it.
    pub const REQUEST: Self = Self { action: 1 };
    /// Request of a node process. The program looks up the route and redirects the packet.
    pub const REQUEST_ROUTE: Self = Self { action: 2 };
    /// Request of a node process to a process of the same node. It is redirected to the ingress of
    /// the loopback device.
    pub const REQUEST_LOOPBACK: Self = Self { action: 3 };
    /// Request of a pod to itself. It is sent back out of the device that received it.
    pub const REQUEST_HAIRPIN: Self = Self { action: 4 };
    /// Request with a source address of this node. The program forwards it past the stack, whose
    /// source validation (`fib_validate_source`) drops received packets with a local source
    /// address.
    pub const REQUEST_FORWARD: Self = Self { action: 5 };
    /// Request for direct server return. It is sent untranslated in an IP-in-IP packet to the
    /// backend's node, which answers the client itself. The addresses of the entry are those of the
    /// outer header, its ports are 0, and no replies are looked for.
    pub const REQUEST_TUNNEL: Self = Self { action: 6 };
    /// Reply. The stack routes it.
    pub const REPLY: Self = Self { action: 65 };
    /// Reply to a node process. It is redirected to the ingress of the egress device of its
    /// request.
    pub const REPLY_INTO_DEVICE: Self = Self { action: 66 };
    /// Reply of a pod to itself. It is sent back out of the device that received it.
    pub const REPLY_HAIRPIN: Self = Self { action: 68 };

    /// Reply to a client outside, with an address of this node or of a Service as its source. The
    /// program forwards it.
    pub const REPLY_FORWARD: Self = Self { action: 69 };
    /// Reply to a client whose requests another node encapsulated. The stack routes it to the
    /// client.
    pub const REPLY_DIRECT: Self = Self { action: 70 };
    const REPLY_BIT: u8 = 64;

    /// Whether the entry is for packets from the backend to the client.
    #[inline(always)]
    pub const fn is_reply(self) -> bool {
        self.action & Self::REPLY_BIT != 0
    }

    /// Whether the stack routes these replies, so that they are translated on egress.
    #[inline(always)]
    pub const fn is_reply_by_stack(self) -> bool {
        self.action == Self::REPLY.action || self.action == Self::REPLY_DIRECT.action
    }

    /// Whether the program forwards the packet as a router does, and decrements its TTL.
    #[inline(always)]
    pub const fn is_forward(self) -> bool {
        let action = self.action & !Self::REPLY_BIT;
        action == Self::REQUEST_FORWARD.action || self.is_one_way()
    }

    /// Whether the replies to these requests do not pass this node, so that their packets set no
    /// state here.
    #[inline(always)]
    pub const fn is_one_way(self) -> bool {
        self.action == Self::REQUEST_TUNNEL.action
    }
}

pod! {
    Tuple<A> { A, A, Be16, Be16 }
    FlowKey<A> { Tuple<A>, u32 }
    Flow<A> { Tuple<A>, Action, u8, u16, u32, u32, u32, u32, NextHop }
}
const _: () = assert!(size_of::<FlowKey<Address4>>() == 16 && size_of::<Flow<Address4>>() == 40);
