//! IP in IP of one family (RFC 2003, RFC 2473): the encapsulation of packets for direct server
//! return, from the node that received them to the backend's node.

use super::{
    answer::Respond,
    header::{Header4, Header6},
    parse::{IP_OFFSET, Parse, Window},
};
use crate::abi::{
    address::{Address4, Address6, Be16, Ipv4, Ipv6},
    flow::Tuple,
};

/// The ECN field: the two lowest bits of the traffic class (RFC 3168).
const ECN: u8 = 3;

/// A family whose packets can be encapsulated in packets of the same family.
pub trait Tunnel: Parse + Respond {
    /// The protocol number of an encapsulated packet of this family.
    const PROTOCOL: u8;
    /// Length of the outer IP header in bytes.
    const LENGTH: u32 = size_of::<Self::Header>() as u32;

    /// Whether the frame has an encapsulated packet of the family after an IP header without
    /// options, and is not a fragment.
    fn is_tunnel<W: Window + ?Sized>(window: &W) -> bool;

    /// Source and destination of the IP header; `None` if it is truncated.
    fn ends<W: Window + ?Sized>(window: &W) -> Option<[Self::Address; 2]>;

    /// Length of the IP packet in bytes, with its header; what does not fit wraps around. `None` if
    /// the header is truncated.
    fn length<W: Window + ?Sized>(window: &W) -> Option<u16>;

    /// The outer header for the packet, with the addresses of `ends`. It has the traffic class and
    /// flow label of the packet, but not its ECN, because the node that decapsulates the packet
    /// does not read the ECN of the outer header (RFC 6040 section 4.3, compatibility mode).
    fn outer<W: Window + ?Sized>(window: &W, ends: &Tuple<Self::Address>) -> Option<Self::Header>;
}

impl Tunnel for Ipv4 {
    /// IPIP.
    const PROTOCOL: u8 = 4;

    #[inline(always)]
    fn is_tunnel<W: Window + ?Sized>(window: &W) -> bool {
        /// "More fragments" and the fragment offset.
        const FRAGMENT: u16 = 0x3fff;
        let header = window.load::<Header4>(IP_OFFSET);
        header.is_some_and(|header| {
            header.protocol == Self::PROTOCOL
                && header.version_and_length == 0x45
                && header.fragment.get() & FRAGMENT == 0
        })
    }

    #[inline(always)]
    fn ends<W: Window + ?Sized>(window: &W) -> Option<[Address4; 2]> {
        window.load::<Header4>(IP_OFFSET).map(|header| [header.source, header.destination])
    }

    #[inline(always)]
    fn length<W: Window + ?Sized>(window: &W) -> Option<u16> {
        window.load::<Header4>(IP_OFFSET).map(|header| header.total_length.get())
    }

    #[inline(always)]
    fn outer<W: Window + ?Sized>(window: &W, ends: &Tuple<Address4>) -> Option<Header4> {
        let inner = window.load::<Header4>(IP_OFFSET)?;
        let Tuple { source, destination, .. } = *ends;
        let length = inner.total_length.get();
        Some(Header4::new(source, destination, inner.tos & !ECN, Self::PROTOCOL, length))
    }
}

impl Tunnel for Ipv6 {
    /// IPv6 in IPv6.
    const PROTOCOL: u8 = 41;

    #[inline(always)]
    fn is_tunnel<W: Window + ?Sized>(window: &W) -> bool {
        let header = window.load::<Header6>(IP_OFFSET);
        header.is_some_and(|header| header.next_header == Self::PROTOCOL)
    }

    #[inline(always)]
    fn ends<W: Window + ?Sized>(window: &W) -> Option<[Address6; 2]> {
        window.load::<Header6>(IP_OFFSET).map(|header| [header.source, header.destination])
    }

    #[inline(always)]
    fn length<W: Window + ?Sized>(window: &W) -> Option<u16> {
        let header = window.load::<Header6>(IP_OFFSET)?;
        Some(header.payload_length.get().wrapping_add(size_of::<Header6>() as u16))
    }

    #[inline(always)]
    fn outer<W: Window + ?Sized>(window: &W, ends: &Tuple<Address6>) -> Option<Header6> {
        /// ECN in the first 16 bits: version, traffic class, start of the flow label.
        const ECN_OF_CLASS: u16 = (ECN as u16) << 4;
        let inner = window.load::<Header6>(IP_OFFSET)?;
        let Tuple { source, destination, .. } = *ends;
        let mut outer = Self::header(source, destination, Self::PROTOCOL, Self::length(window)?);
        outer.version_class_flow = Be16::new(inner.version_class_flow.get() & !ECN_OF_CLASS);
        outer.flow = inner.flow;
        Some(outer)
    }
}
