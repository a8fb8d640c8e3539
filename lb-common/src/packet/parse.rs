//! Parses a frame: the fields that the datapath needs, and no others.
//!
//! Every byte is read through a [`Window`], which checks bounds. Lengths in headers are not
//! trusted.

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
    /// The bytes at `offset` as a `T`; `None` if the frame is shorter. No alignment is needed.
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
    /// TCP, with a whole header; [`Packet::detail`] has its flags.
    Tcp,
    /// UDP, with a whole header.
    Udp,
    /// ICMP or ICMPv6, by the family; [`Packet::detail`] has the type.
    Icmp,
    /// A fragment without ports: any but the first one of TCP or UDP.
    Fragment,
    /// Another protocol.
    Other,
    /// A header is truncated or contradicts itself.
    #[default]
    Malformed,
}

/// TCP flag FIN, in [`Packet::detail`] (RFC 9293 section 3.1).
pub const FIN: u8 = 0x01;
/// TCP flag SYN.
pub const SYN: u8 = 0x02;
/// TCP flag RST.
pub const RST: u8 = 0x04;
/// TCP flag PSH.
pub const PSH: u8 = 0x08;
/// TCP flag ACK.
pub const ACK: u8 = 0x10;

/// The fields of a packet that the datapath uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet<F: Family> {
    /// Addresses and, for TCP and UDP, ports (else 0); and the protocol number of the header after
    /// the IP header and IPv6 extension headers. It is the key to look up in the flow tables.
    pub key: FlowKey<F::Address>,
    /// Offset of the transport header from the start of the frame.
    pub transport: u16,
    /// What follows the IP header.
    pub kind: PacketKind,
    /// TCP flags or ICMP type, by `kind`.
    pub detail: u8,
    /// TTL or hop limit of the packet as it arrived.
    pub ttl: u8,
    /// 1: the packet is the first fragment of a datagram; else 0.
    pub is_first_fragment: u16,
    /// The identification of the datagram if the packet is a fragment, network byte order; 16 bits
    /// in IPv4.
    pub identification: u32,
    /// Length of the outer IP header in bytes if another node of the cluster encapsulated the
    /// packet, else 0. The hook sets it before the packet is parsed.
    pub encap_len: u32,
}

impl<F: Family> Default for Packet<F> {
    fn default() -> Self {
        Self::of(FlowKey::default(), 0, 0, 0)
    }
}

impl<F: Family> Packet<F> {
    /// A packet whose transport header has not been parsed.
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

    /// `kind`, or [`PacketKind::Fragment`] if the packet is a first fragment: only TCP and UDP are
    /// translated in fragments.
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

    /// Whether this is a SYN-ACK.
    #[inline(always)]
    pub fn is_syn_ack(&self) -> bool {
        matches!(self.kind, PacketKind::Tcp) && self.detail & (SYN | ACK) == SYN | ACK
    }

    /// Whether this is a SYN, which opens a TCP connection.
    #[inline(always)]
    pub fn is_syn(&self) -> bool {
        matches!(self.kind, PacketKind::Tcp) && self.detail & (SYN | ACK | RST | FIN) == SYN
    }
}

/// Offset of the IP header from the start of the frame, which is an Ethernet header. The kernel
/// keeps a VLAN tag beside the packet, so that tc programs do not see it here.
pub const IP_OFFSET: usize = size_of::<EthHdr>();

/// The EtherType of a frame, host byte order; `None` if the frame is shorter than its Ethernet
/// header.
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
    /// The number of bytes from the start of the frame that suffice to parse a TCP packet without
    /// IPv4 options or IPv6 extension headers.
    const USUAL_HEADERS: usize;

    /// The packet's destination; `None` if the IP header is truncated.
    fn destination<W: Window + ?Sized>(window: &W) -> Option<Self::Address>;

    /// Whether a conversation may begin with the packet: it is a datagram, a SYN, or one whose ports are
    /// not where they usually are. Later fragments are not.
    fn may_begin<W: Window + ?Sized>(window: &W) -> bool;

    /// Parses the frame into `packet`, except for [`Packet::encap_len`]; `None` if the IP header is
    /// truncated.
    fn parse<W: Window + ?Sized>(window: &W, packet: &mut Packet<Self>) -> Option<()>;
}

impl Parse for Ipv4 {
    const USUAL_HEADERS: usize = IP_OFFSET + Ipv4Hdr::LEN + TcpHdr::LEN;

    #[inline(always)]
    fn destination<W: Window + ?Sized>(window: &W) -> Option<Address4> {
        window.load::<Header4>(IP_OFFSET).map(|header| header.destination)
    }

    #[inline(always)]
    fn may_begin<W: Window + ?Sized>(window: &W) -> bool {
        /// The fragment offset.
        const OFFSET: u16 = 0x1fff;
        window.load::<Header4>(IP_OFFSET).is_some_and(|header| match header.protocol {
            _ if header.fragment.get() & OFFSET != 0 => false,
            TCP if header.version_and_length == 0x45 => has_syn(window, Ipv4Hdr::LEN),
            protocol => matches!(protocol, TCP | UDP),
        })
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

/// The number of IPv6 extension headers that are skipped. A packet with more counts as malformed.
pub const MAX_EXTENSION_HEADERS: usize = 4;

impl Parse for Ipv6 {
    const USUAL_HEADERS: usize = IP_OFFSET + Ipv6Hdr::LEN + TcpHdr::LEN;

    #[inline(always)]
    fn destination<W: Window + ?Sized>(window: &W) -> Option<Address6> {
        window.load::<Header6>(IP_OFFSET).map(|header| header.destination)
    }

    #[inline(always)]
    fn may_begin<W: Window + ?Sized>(window: &W) -> bool {
        const FRAGMENT: u8 = 44;
        const ICMP: u8 = 58;
        /// The fragment offset.
        const OFFSET: u16 = 0xfff8;
        window.load::<Header6>(IP_OFFSET).is_some_and(|header| match header.next_header {
            TCP => has_syn(window, Ipv6Hdr::LEN),
            FRAGMENT => window
                .load::<Fragment6>(IP_OFFSET + Ipv6Hdr::LEN)
                .is_some_and(|fragment| fragment.fragment.get() & OFFSET == 0),
            // The others may be extension headers.
            next_header => next_header != ICMP,
        })
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

/// Whether the TCP header behind an IP header of so many bytes has SYN and no ACK.
#[inline(always)]
fn has_syn<W: Window + ?Sized>(window: &W, ip_header: usize) -> bool {
    /// Offset of the flags in a TCP header.
    const FLAGS: usize = 13;
    let flags = window.load::<u8>(IP_OFFSET + ip_header + FLAGS);
    flags.is_some_and(|flags| flags & (SYN | ACK) == SYN)
}

/// The key of a packet without ports.
#[inline(always)]
fn flow_key<A>(source: A, destination: A, protocol: u8) -> FlowKey<A> {
    let none = Be16::new(0);
    let tuple = Tuple { source, destination, source_port: none, destination_port: none };
    FlowKey { tuple, protocol: protocol as u32 }
}

/// Parses the transport header at `offset`. According to the IP header, it has `length` bytes with
/// its payload.
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
