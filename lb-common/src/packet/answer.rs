//! Frames that answer a client in place of a backend: TCP reset, ICMP errors.

use bytemuck::{Pod, Zeroable};

use super::{
    checksum,
    header::{Header4, Header6, TTL},
    parse::{ACK, IP_OFFSET, Packet, RST},
};
use crate::abi::{
    address::{Address4, Address6, Be16, Family, Ipv4, Ipv6},
    frontend::TCP,
};

/// A TCP header without options (RFC 9293).
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct TcpHeader {
    ports: [Be16; 2],
    sequence: u32,
    acknowledgment: u32,
    data_offset: u8,
    flags: u8,
    window: u16,
    checksum: u16,
    urgent: u16,
}

/// Header of an ICMP or ICMPv6 error.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct IcmpHeader {
    icmp_type: u8,
    code: u8,
    checksum: u16,
    /// The MTU if the error is [`Respond::TOO_BIG`], network byte order; else 0.
    mtu: u32,
}

/// The most 4-byte words of a packet that an error quotes. A quote is the IP header with options or
/// extension headers, and the first eight bytes of the transport header.
pub const MAX_QUOTE_WORDS: usize = 26;

/// The answers of a family (ICMP: RFC 792, ICMPv6: RFC 4443).
pub trait Respond: Family {
    /// The family's IP header.
    type Header: Pod;

    /// ICMP type and code of "port unreachable".
    const PORT_UNREACHABLE: (u8, u8);
    /// ICMP type and code of "protocol unreachable"; in ICMPv6, "port unreachable".
    const PROTOCOL_UNREACHABLE: (u8, u8);
    /// ICMP type and code of "time to live exceeded in transit" or "hop limit exceeded".
    const TIME_EXCEEDED: (u8, u8);
    /// ICMP type and code of "fragmentation needed" or "packet too big".
    const TOO_BIG: (u8, u8);
    /// The ICMP type of an echo reply.
    const ECHO_REPLY: u8;
    /// Whether ICMP's checksum covers a pseudo header (RFC 4443 section 2.3).
    const ICMP_PSEUDO_HEADER: bool;

    /// An IP header for `length` bytes of `protocol`, of a packet of this host.
    fn header(
        source: Self::Address,
        destination: Self::Address,
        protocol: u8,
        length: u16,
    ) -> Self::Header;
}

impl Respond for Ipv4 {
    type Header = Header4;

    const PORT_UNREACHABLE: (u8, u8) = (3, 3);
    const PROTOCOL_UNREACHABLE: (u8, u8) = (3, 2);
    const TIME_EXCEEDED: (u8, u8) = (11, 0);
    const TOO_BIG: (u8, u8) = (3, 4);
    const ECHO_REPLY: u8 = 0;
    const ICMP_PSEUDO_HEADER: bool = false;

    #[inline(always)]
    fn header(source: Address4, destination: Address4, protocol: u8, length: u16) -> Header4 {
        Header4::new(source, destination, 0, protocol, length)
    }
}

impl Respond for Ipv6 {
    type Header = Header6;

    const PORT_UNREACHABLE: (u8, u8) = (1, 4);
    const PROTOCOL_UNREACHABLE: (u8, u8) = (1, 4);
    const TIME_EXCEEDED: (u8, u8) = (3, 0);
    const TOO_BIG: (u8, u8) = (2, 0);
    const ECHO_REPLY: u8 = 129;
    const ICMP_PSEUDO_HEADER: bool = true;

    #[inline(always)]
    fn header(source: Address6, destination: Address6, protocol: u8, length: u16) -> Header6 {
        Header6 {
            version_class_flow: Be16::new(0x6000),
            flow: 0,
            payload_length: Be16::new(length),
            next_header: protocol,
            hop_limit: TTL,
            source,
            destination,
        }
    }
}

/// The IP header of an answer with `length` bytes of `protocol`: from the packet's destination to
/// its source.
#[inline(always)]
pub fn header<F: Respond>(packet: &Packet<F>, protocol: u8, length: u16) -> F::Header {
    let tuple = packet.tuple();
    F::header(tuple.destination, tuple.source, protocol, length)
}

/// The length of a reset's TCP segment in bytes.
pub const RESET_LENGTH: u16 = size_of::<TcpHeader>() as u16;

/// The reset that answers a segment of no connection (RFC 9293 section 3.5.2): a SYN to a port that
/// is not open, or a segment of a lost connection, which its sender believes only with the number
/// that it has acknowledged. `numbers` are the segment's sequence and acknowledgment number, network
/// byte order. It follows an IP header for [`RESET_LENGTH`] bytes of TCP.
#[inline(always)]
pub fn reset<F: Respond>(packet: &Packet<F>, numbers: [u32; 2]) -> TcpHeader {
    const LENGTH: u16 = RESET_LENGTH;
    let to = packet.tuple().reversed();
    let (sequence, acknowledgment, flags) = if packet.detail & ACK != 0 {
        (numbers[1], 0, RST)
    } else {
        (0, u32::from_be(numbers[0]).wrapping_add(1).to_be(), RST | ACK)
    };
    let mut tcp = TcpHeader {
        ports: [to.source_port, to.destination_port],
        sequence,
        acknowledgment,
        data_offset: (LENGTH as u8 / 4) << 4,
        flags,
        window: 0,
        checksum: 0,
        urgent: 0,
    };
    let words: [u32; 5] = bytemuck::cast(tcp);
    let sum = checksum::pseudo(checksum::addresses(&to), TCP, LENGTH);
    tcp.checksum = !checksum::fold16(checksum::add(sum, &words));
    tcp
}

/// The number of bytes of a packet that an error about it quotes; `None` if its headers are longer
/// than [`MAX_QUOTE_WORDS`].
#[inline(always)]
pub fn quote_length<F: Family>(packet: &Packet<F>) -> Option<u16> {
    let length = packet.transport.wrapping_sub(IP_OFFSET as u16).wrapping_add(8);
    (length as usize <= MAX_QUOTE_WORDS * 4).then_some(length)
}

/// The header of an ICMP error of `kind` (type and code) about `packet`. `mtu` is for
/// [`Respond::TOO_BIG`], else 0. The first `length` bytes of `quote` are the start of the packet,
/// the others are zero. The header follows an IP header, and the quote follows it.
#[inline(always)]
pub fn icmp_error<F: Respond>(
    packet: &Packet<F>,
    kind: (u8, u8),
    mtu: u16,
    quote: &[u32; MAX_QUOTE_WORDS],
    length: u16,
) -> IcmpHeader {
    let to = packet.tuple().reversed();
    let total = size_of::<IcmpHeader>() as u16 + length;
    let mut icmp =
        IcmpHeader { icmp_type: kind.0, code: kind.1, checksum: 0, mtu: u32::from(mtu).to_be() };
    let sum = if F::ICMP_PSEUDO_HEADER {
        checksum::pseudo(checksum::addresses(&to), F::ICMP, total)
    } else {
        0
    };
    let words: [u32; 2] = bytemuck::cast(icmp);
    icmp.checksum = !checksum::fold16(checksum::add(checksum::add(sum, &words), quote));
    icmp
}
