//! Reading a frame: what the datapath needs to know of it, and nothing more.
//!
//! Every byte comes through a [`Window`], which checks bounds; nothing is trusted to
//! be there, or to be as long as a header says.

use bytemuck::Pod;
use network_types::{eth::EthHdr, ip::Ipv4Hdr, ip::Ipv6Hdr, tcp::TcpHdr, udp::UdpHdr};

use crate::abi::{
    address::{Address4, Address6, Be16, Family, Ipv4, Ipv6},
    flow::{FlowKey, Tuple},
    frontend::{TCP, UDP},
};

use super::header::{Fragment6, Header4, Header6};

/// A view of a frame's first bytes.
pub trait Window {
    /// The bytes at `offset`, as a `T`; `None` if the frame ends before. No alignment
    /// is needed.
    fn load<T: Pod>(&self, offset: usize) -> Option<T>;
}

impl Window for [u8] {
    #[inline(always)]
    fn load<T: Pod>(&self, offset: usize) -> Option<T> {
        let end = offset.checked_add(size_of::<T>())?;
        self.get(offset..end).map(bytemuck::pod_read_unaligned)
    }
}

/// What follows the IP header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum PacketKind {
    /// A whole TCP header; [`Packet::detail`] holds its flags.
    Tcp,
    /// A whole UDP header.
    Udp,
    /// The family's ICMP; [`Packet::detail`] holds the type.
    Icmp,
    /// A fragment of a larger datagram that has no ports: any but the first one of TCP or UDP.
    Fragment,
    /// Another protocol.
    Other,
    /// A header is cut short or contradicts itself.
    #[default]
    Malformed,
}

/// TCP flag FIN, in [`Packet::detail`] (RFC 9293 section 3.1).
pub const FIN: u8 = 0x01;
/// TCP flag SYN.
pub const SYN: u8 = 0x02;
/// TCP flag RST.
pub const RST: u8 = 0x04;
/// TCP flag ACK.
pub const ACK: u8 = 0x10;

/// What the datapath knows of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet<F: Family> {
    /// Addresses and, for TCP and UDP, ports (else 0); the protocol number of what follows
    /// the IP header and IPv6 extension headers. It is what flow tables are asked for.
    pub key: FlowKey<F::Address>,
    /// Offset of the transport header from the start of the frame.
    pub transport: u16,
    /// What follows the IP header.
    pub kind: PacketKind,
    /// TCP flags or ICMP type, by `kind`.
    pub detail: u8,
    /// TTL or hop limit.
    pub ttl: u8,
    /// 1: the first fragment of a larger datagram.
    pub is_first_fragment: u16,
    /// What all fragments of a datagram have in common, in a fragment; IPv4's has 16 bits.
    pub identification: u32,
    /// Bytes of the tunnel's header that the packet came behind, from another node of the
    /// cluster; 0 = none. Set before the packet is parsed.
    pub encap_len: u32,
}

impl<F: Family> Default for Packet<F> {
    fn default() -> Self {
        Self::of(FlowKey::default(), 0, 0, 0)
    }
}

impl<F: Family> Packet<F> {
    /// A packet of which no more is known yet.
    #[inline(always)]
    fn of(key: FlowKey<F::Address>, transport: usize, ttl: u8, encap_len: u32) -> Self {
        Self {
            key,
            transport: transport as u16,
            kind: PacketKind::Malformed,
            detail: 0,
            ttl,
            is_first_fragment: 0,
            identification: 0,
            encap_len,
        }
    }

    /// `kind` if the packet is all of it: what has no ports is nothing of ours in pieces.
    #[inline(always)]
    fn unless_fragment(&self, kind: PacketKind) -> PacketKind {
        if self.is_first_fragment != 0 { PacketKind::Fragment } else { kind }
    }

    /// Addresses and ports.
    #[inline(always)]
    pub fn tuple(&self) -> &Tuple<F::Address> {
        &self.key.tuple
    }

    /// The protocol number of what follows the IP header and IPv6 extension headers.
    #[inline(always)]
    pub fn protocol(&self) -> u8 {
        self.key.protocol as u8
    }

    /// Whether this answers a SYN.
    #[inline(always)]
    pub fn is_syn_ack(&self) -> bool {
        matches!(self.kind, PacketKind::Tcp) && self.detail & (SYN | ACK) == SYN | ACK
    }

    /// Whether this opens a TCP connection.
    #[inline(always)]
    pub fn is_syn(&self) -> bool {
        matches!(self.kind, PacketKind::Tcp) && self.detail & (SYN | ACK | RST | FIN) == SYN
    }
}

/// Offset of the IP header: the frame starts with an Ethernet header, and tc programs
/// see no VLAN tag in it (the kernel keeps it beside the packet).
pub const IP_OFFSET: usize = size_of::<EthHdr>();

/// The EtherType of a frame, host byte order; `None` if it is too short to have one.
#[inline(always)]
pub fn ethertype<W: Window + ?Sized>(window: &W) -> Option<u16> {
    window.load::<Be16>(IP_OFFSET - 2).map(Be16::get)
}

/// EtherType of IPv4.
pub const ETHERTYPE_IPV4: u16 = 0x0800;
/// EtherType of IPv6.
pub const ETHERTYPE_IPV6: u16 = 0x86dd;

/// A family whose packets can be parsed.
pub trait Parse: Family {
    /// How many bytes from the start of the frame suffice to parse a TCP packet without
    /// IPv4 options or IPv6 extension headers.
    const USUAL_HEADERS: usize;

    /// The packet's destination; `None` if the IP header is cut short.
    fn destination<W: Window + ?Sized>(window: &W) -> Option<Self::Address>;

    /// Reads into `packet`; `None` if not even the addresses are there.
    fn parse<W: Window + ?Sized>(window: &W, packet: &mut Packet<Self>) -> Option<()>;
}

impl Parse for Ipv4 {
    const USUAL_HEADERS: usize = IP_OFFSET + Ipv4Hdr::LEN + TcpHdr::LEN;

    #[inline(always)]
    fn destination<W: Window + ?Sized>(window: &W) -> Option<Address4> {
        window.load::<Header4>(IP_OFFSET).map(|header| header.destination)
    }

    #[inline(always)]
    fn parse<W: Window + ?Sized>(window: &W, packet: &mut Packet<Self>) -> Option<()> {
        const MORE_FRAGMENTS: u16 = 0x2000;
        const OFFSET: u16 = 0x1fff;
        let header: Header4 = window.load(IP_OFFSET)?;
        let length = ((header.version_and_length & 0x0f) as usize) * 4;
        let key = flow_key(header.source, header.destination, header.protocol);
        *packet = Packet::of(key, IP_OFFSET + length, header.ttl, packet.encap_len);
        let total = header.total_length.get() as usize;
        if header.version_and_length >> 4 == 4 && length >= Ipv4Hdr::LEN && total >= length {
            let fragment = header.fragment.get();
            if fragment & (MORE_FRAGMENTS | OFFSET) != 0 {
                packet.identification = header.identification as u32;
                if fragment & OFFSET != 0 {
                    packet.kind = PacketKind::Fragment;
                    return Some(());
                }
                packet.is_first_fragment = 1;
            }
            transport(window, IP_OFFSET + length, total - length, packet);
        }
        Some(())
    }
}

/// How many IPv6 extension headers are followed before a packet counts as malformed.
pub const MAX_EXTENSION_HEADERS: usize = 4;

impl Parse for Ipv6 {
    const USUAL_HEADERS: usize = IP_OFFSET + Ipv6Hdr::LEN + TcpHdr::LEN;

    #[inline(always)]
    fn destination<W: Window + ?Sized>(window: &W) -> Option<Address6> {
        window.load::<Header6>(IP_OFFSET).map(|header| header.destination)
    }

    #[inline(always)]
    fn parse<W: Window + ?Sized>(window: &W, packet: &mut Packet<Self>) -> Option<()> {
        const HOP_BY_HOP: u8 = 0;
        const ROUTING: u8 = 43;
        const FRAGMENT: u8 = 44;
        const DESTINATION_OPTIONS: u8 = 60;
        const MORE_FRAGMENTS: u16 = 1;
        const OFFSET: u16 = 0xfff8;
        let header: Header6 = window.load(IP_OFFSET)?;
        let key = flow_key(header.source, header.destination, header.next_header);
        let transport_offset = IP_OFFSET + Ipv6Hdr::LEN;
        *packet = Packet::of(key, transport_offset, header.hop_limit, packet.encap_len);
        if header.version_class_flow.get() >> 12 != 6 {
            return Some(());
        }
        let payload = header.payload_length.get() as usize;
        let mut skipped = 0;
        let mut followed = 0;
        while followed < MAX_EXTENSION_HEADERS {
            match packet.protocol() {
                FRAGMENT => {
                    let Some(header) = window.load::<Fragment6>(IP_OFFSET + Ipv6Hdr::LEN + skipped)
                    else {
                        return Some(());
                    };
                    packet.key.protocol = header.next_header as u32;
                    skipped += size_of::<Fragment6>();
                    let fragment = header.fragment.get();
                    if fragment & (MORE_FRAGMENTS | OFFSET) != 0 {
                        packet.identification = header.identification;
                        if fragment & OFFSET != 0 {
                            packet.kind = PacketKind::Fragment;
                            return Some(());
                        }
                        packet.is_first_fragment = 1;
                    }
                }
                HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS => {
                    let Some([next, length]) =
                        window.load::<[u8; 2]>(IP_OFFSET + Ipv6Hdr::LEN + skipped)
                    else {
                        return Some(());
                    };
                    packet.key.protocol = next as u32;
                    skipped += (length as usize + 1) * 8;
                }
                _ => break,
            }
            followed += 1;
        }
        if skipped > payload
            || matches!(packet.protocol(), HOP_BY_HOP | ROUTING | FRAGMENT | DESTINATION_OPTIONS)
        {
            return Some(());
        }
        let offset = IP_OFFSET + Ipv6Hdr::LEN + skipped;
        packet.transport = offset as u16;
        transport(window, offset, payload - skipped, packet);
        Some(())
    }
}

/// The key of a packet without ports.
#[inline(always)]
fn flow_key<A>(source: A, destination: A, protocol: u8) -> FlowKey<A> {
    let none = Be16::new(0);
    let tuple = Tuple { source, destination, source_port: none, destination_port: none };
    FlowKey { tuple, protocol: protocol as u32 }
}

/// Reads the transport header at `offset`, of which the IP header promises `length`
/// bytes with what follows.
#[inline(always)]
fn transport<F: Family, W: Window + ?Sized>(
    window: &W,
    offset: usize,
    length: usize,
    packet: &mut Packet<F>,
) {
    /// A TCP header without options.
    #[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
    #[repr(C)]
    struct Start {
        ports: u32,
        sequence: [u16; 4],
        data_offset: u8,
        flags: u8,
        rest: [u16; 3],
    }
    match packet.protocol() {
        TCP => {
            if length < TcpHdr::LEN {
                return;
            }
            let Some(start) = window.load::<Start>(offset) else { return };
            let header = (start.data_offset >> 4) as usize * 4;
            if header < TcpHdr::LEN || header > length {
                return;
            }
            packet.key.tuple.set_ports(start.ports);
            packet.detail = start.flags;
            packet.kind = PacketKind::Tcp;
        }
        UDP => {
            if length < UdpHdr::LEN {
                return;
            }
            let Some([ports, _]) = window.load::<[u32; 2]>(offset) else { return };
            packet.key.tuple.set_ports(ports);
            packet.kind = PacketKind::Udp;
        }
        protocol if protocol == F::ICMP => {
            if length < 8 {
                return;
            }
            let Some([icmp_type, ..]) = window.load::<[u8; 8]>(offset) else { return };
            packet.detail = icmp_type;
            packet.kind = packet.unless_fragment(PacketKind::Icmp);
        }
        _ => packet.kind = packet.unless_fragment(PacketKind::Other),
    }
}
