//! FLOWS4, FLOWS6 and, for TCP handshakes not yet complete, EMBRYONIC4, EMBRYONIC6.
//!
//! A translated flow has two entries, one for each direction; each holds the whole
//! rewrite. The reverse of an entry's rewrite is the key of its pair.

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
    /// Takes over `other` field by field, for the reason of [`Address::set`].
    #[inline(always)]
    pub fn set(&mut self, other: &Self) {
        self.source.set(&other.source);
        self.destination.set(&other.destination);
        self.source_port = other.source_port;
        self.destination_port = other.destination_port;
    }

    /// Sets both ports, as they stand in a packet, by one store: a look-up, which reads them
    /// as one word, would wait for two.
    #[inline(always)]
    pub fn set_ports(&mut self, ports: u32) {
        let words: &mut [u32] = bytemuck::cast_slice_mut(bytemuck::bytes_of_mut(self));
        words[const { size_of::<Self>() / size_of::<u32>() - 1 }] = ports;
    }

    /// Takes over the tuple of a packet that goes the other way.
    #[inline(always)]
    pub fn set_reverse(&mut self, other: &Self) {
        self.source.set(&other.destination);
        self.destination.set(&other.source);
        self.source_port = other.destination_port;
        self.destination_port = other.source_port;
    }

    /// The tuple of a packet that goes the other way.
    #[inline(always)]
    pub fn reversed(&self) -> Self {
        let mut reverse = *self;
        reverse.set_reverse(self);
        reverse
    }

    /// Whether packets of `other` go the other way.
    #[inline(always)]
    pub fn is_reverse_of(&self, other: &Self) -> bool {
        self.source_port == other.destination_port
            && self.destination_port == other.source_port
            && self.source == other.destination
            && self.destination == other.source
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
    /// Becomes the key of the pair of an entry with this rewrite.
    #[inline(always)]
    pub fn set_reverse(&mut self, rewrite: &Tuple<A>, protocol: u32) {
        self.tuple.set_reverse(rewrite);
        self.protocol = protocol;
    }
}

/// One direction of a translated flow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Flow<A> {
    /// Addresses and ports of the packet as it goes on.
    pub rewrite: Tuple<A>,
    /// Where the packet goes on: an [`Action`] constant.
    pub action: Action,
    /// What was seen of the flow: [`ANSWERED`], [`CLIENT_FIN`], [`SERVER_FIN`], [`RESET`];
    /// and [`ONE_WAY`].
    pub state: u8,
    /// The backend's generation when the flow chose it.
    pub generation: u16,
    /// Index into BACKENDS4 or BACKENDS6.
    pub backend: u32,
    /// Index into SERVICES.
    pub service: u32,
    /// The low 32 bits of the kernel's jiffies when a packet was last noted; to within
    /// a second.
    pub last_seen: u32,
    /// Index into DEVICES of the device that a flow of a node process left by, or
    /// [`LOOPBACK_DEVICE`].
    pub device: u32,
    /// Where packets that the program forwards go, if it has asked.
    pub next_hop: NextHop,
}

/// What a route look-up said, in one aligned word, so that it is replaced by one store: the
/// MAC of the next hop, the device that leads there, and when that was. It holds for as long
/// as the device's epoch is the same, and no longer than a second: no agent may be there to
/// tell of changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct NextHop {
    /// The bytes, in memory order: six of the MAC, one of the index into DEVICES, one of the
    /// device's epoch; 0 = not known.
    pub bytes: u64,
}

impl NextHop {
    /// Not asked for yet.
    pub const UNKNOWN: Self = Self { bytes: 0 };

    /// By the device with this index into DEVICES, in its `epoch`.
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
    /// Takes over `other` field by field, for the reason of [`Address::set`].
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

/// [`Flow::device`] of a node process that reached its own node by the loopback device.
pub const LOOPBACK_DEVICE: u32 = u32::MAX;

/// TCP: the backend answered the SYN. UDP: the backend sent something.
pub const ANSWERED: u8 = 1;
/// TCP: the client sent FIN.
pub const CLIENT_FIN: u8 = 2;
/// TCP: the backend sent FIN.
pub const SERVER_FIN: u8 = 4;
/// TCP: either side sent RST.
pub const RESET: u8 = 8;
/// The answers go another way: nothing tells of them.
pub const ONE_WAY: u8 = 16;

/// What becomes of a packet once it is rewritten, and which direction it belongs to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct Action {
    /// The number of the action.
    pub action: u8,
}

impl Action {
    /// Request; the stack routes it on.
    pub const REQUEST: Self = Self { action: 1 };
    /// Request of a node process; sent where a route look-up says.
    pub const REQUEST_ROUTE: Self = Self { action: 2 };
    /// Request of a node process to a process of the same node; goes in by loopback.
    pub const REQUEST_LOOPBACK: Self = Self { action: 3 };
    /// Request of a pod to itself; goes back out of the device it came in by.
    pub const REQUEST_HAIRPIN: Self = Self { action: 4 };
    /// Request with a source address of this node; forwarded by the program, past the
    /// stack, which takes no packet in that claims to come from its own node.
    pub const REQUEST_FORWARD: Self = Self { action: 5 };
    /// Request, tunnelled as it came to the backend's node, which answers the client itself.
    /// The addresses of the entry are those of the tunnel, its ports are 0; it has no pair.
    pub const REQUEST_TUNNEL: Self = Self { action: 6 };
    /// Reply; goes on as it was going.
    pub const REPLY: Self = Self { action: 65 };
    /// Reply to a node process; goes into the device that its request left by.
    pub const REPLY_INTO_DEVICE: Self = Self { action: 66 };
    /// Reply of a pod to itself; goes back out of the device it came in by.
    pub const REPLY_HAIRPIN: Self = Self { action: 68 };

    /// Reply to a client outside, from an address of this node or a Service's; forwarded by
    /// the program.
    pub const REPLY_FORWARD: Self = Self { action: 69 };
    /// Reply to a client whose requests came by another node, in a tunnel.
    pub const REPLY_DIRECT: Self = Self { action: 70 };
    const REPLY_BIT: u8 = 64;

    /// Whether the entry is of the direction from backend to client.
    #[inline(always)]
    pub const fn is_reply(self) -> bool {
        self.action & Self::REPLY_BIT != 0
    }

    /// Whether replies go on as they were going, changed where the stack lets them out.
    #[inline(always)]
    pub const fn is_reply_by_stack(self) -> bool {
        self.action == Self::REPLY.action || self.action == Self::REPLY_DIRECT.action
    }

    /// Whether the program sends the packet on its way, and takes a hop, as a router does.
    #[inline(always)]
    pub const fn is_forward(self) -> bool {
        let action = self.action & !Self::REPLY_BIT;
        action == Self::REQUEST_FORWARD.action || self.is_one_way()
    }

    /// Whether the answers to these requests go another way, so that nothing tells of them.
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
