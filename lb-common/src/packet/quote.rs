//! The packet that an ICMP error quotes.
//!
//! A quote may end anywhere after the first eight bytes of its transport header (RFC 792). So only
//! addresses and ports are read, and lengths in the quoted headers are not trusted.

use network_types::ip::Ipv4Hdr;

use super::{
    header::{Header4, Header6},
    parse::{Packet, PacketKind, Parse, Window},
};
use crate::abi::{
    address::{Address, Be16, Family, Ipv4, Ipv6},
    flow::FlowKey,
    frontend::{TCP, UDP},
};

/// The packet that an ICMP error quotes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Quote<A> {
    /// Addresses, ports and protocol, as the router or host that reports the error saw them.
    pub key: FlowKey<A>,
    /// Offset of the quoted IP header from the start of the frame.
    pub header: u16,
    /// Offset of the quoted transport header from the start of the frame.
    pub transport: u16,
}

/// Length of the ICMP header before the quote.
const ICMP_HEADER: usize = 8;

/// The number of IPv6 extension headers that are skipped in a quote.
const MAX_EXTENSION_HEADERS: usize = 2;

/// A family whose quotes can be parsed.
pub trait ParseQuote: Parse {
    /// Parses the IP header at `quote.header`: addresses and protocol. Returns the offset of the
    /// transport header; `None` if the quote ends before it.
    fn quoted_header<W: Window + ?Sized>(
        window: &W,
        quote: &mut Quote<Self::Address>,
    ) -> Option<usize>;

    /// Parses the quote of the ICMP error `packet`; `None` if the quoted packet is neither TCP nor
    /// UDP, or the quote ends before its ports.
    #[inline(always)]
    fn parse_quote<W: Window + ?Sized>(
        window: &W,
        packet: &Packet<Self>,
        quote: &mut Quote<Self::Address>,
    ) -> Option<()> {
        quote.header = packet.transport + ICMP_HEADER as u16;
        let transport = Self::quoted_header(window, quote)?;
        quote.transport = transport as u16;
        let tuple = &mut quote.key.tuple;
        [tuple.source_port, tuple.destination_port] = window.load(transport)?;
        matches!(quote.key.protocol as u8, TCP | UDP).then_some(())
    }
}

impl ParseQuote for Ipv4 {
    #[inline(always)]
    fn quoted_header<W: Window + ?Sized>(
        window: &W,
        quote: &mut Quote<Self::Address>,
    ) -> Option<usize> {
        const OFFSET: u16 = 0x1fff;
        let start = quote.header as usize;
        let header: Header4 = window.load(start)?;
        let length = (header.version_and_length & 0x0f) as usize * 4;
        if header.version_and_length >> 4 != 4
            || length < Ipv4Hdr::LEN
            || header.fragment.get() & OFFSET != 0
        {
            return None;
        }
        set(quote, &header.source, &header.destination, header.protocol);
        Some(start + length)
    }
}

impl ParseQuote for Ipv6 {
    #[inline(always)]
    fn quoted_header<W: Window + ?Sized>(
        window: &W,
        quote: &mut Quote<Self::Address>,
    ) -> Option<usize> {
        const HOP_BY_HOP: u8 = 0;
        const ROUTING: u8 = 43;
        const FRAGMENT: u8 = 44;
        const DESTINATION_OPTIONS: u8 = 60;
        const OFFSET: u16 = 0xfff8;
        let start = quote.header as usize;
        let header: Header6 = window.load(start)?;
        if header.version_class_flow.get() >> 12 != 6 {
            return None;
        }
        let mut next = header.next_header;
        let mut at = start + size_of::<Header6>();
        let mut followed = 0;
        while followed < MAX_EXTENSION_HEADERS {
            let length = match next {
                FRAGMENT => 8,
                HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS => {
                    let [_, length] = window.load::<[u8; 2]>(at)?;
                    (length as usize + 1) * 8
                }
                _ => break,
            };
            let [start, offset, ..]: [Be16; 4] = window.load(at)?;
            if next == FRAGMENT && offset.get() & OFFSET != 0 {
                return None;
            }
            next = (start.get() >> 8) as u8;
            at += length;
            followed += 1;
        }
        set(quote, &header.source, &header.destination, next);
        Some(at)
    }
}

#[inline(always)]
fn set<A: Address>(quote: &mut Quote<A>, source: &A, destination: &A, protocol: u8) {
    quote.key.tuple.source.set(source);
    quote.key.tuple.destination.set(destination);
    quote.key.protocol = protocol as u32;
}

impl<F: Family> Packet<F> {
    /// Whether this is an ICMP error about another packet. A redirect is not treated as one: it
    /// names a better next hop for the translated destination, the backend, and would misdirect the
    /// sender if it were translated to speak of the Service.
    #[inline(always)]
    pub fn is_icmp_error(&self) -> bool {
        matches!(self.kind, PacketKind::Icmp)
            && F::is_icmp_error(self.detail)
            && self.detail != F::REDIRECT
    }
}
