//! IP headers as the datapath reads and writes them, in network byte order.

use bytemuck::{Pod, Zeroable};
use network_types::ip::{Ipv4Hdr, Ipv6Hdr};

use super::checksum;
use crate::abi::address::{Address4, Address6, Be16};

/// The TTL or hop limit of packets that the datapath makes.
pub const TTL: u8 = 64;

/// An IPv4 header without options (RFC 791).
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct Header4 {
    /// Version in the upper half, header length in 4-byte words in the lower.
    pub version_and_length: u8,
    /// Type of service.
    pub tos: u8,
    /// Length of the whole packet, bytes.
    pub total_length: Be16,
    /// Identification of the datagram that a fragment belongs to.
    pub identification: u16,
    /// Flags and fragment offset.
    pub fragment: Be16,
    /// Time to live.
    pub ttl: u8,
    /// Protocol of what follows.
    pub protocol: u8,
    /// Checksum of the header, network byte order.
    pub checksum: u16,
    /// Source address.
    pub source: Address4,
    /// Destination address.
    pub destination: Address4,
}

impl Header4 {
    /// The header of a packet that the datapath makes, for `length` bytes of `protocol`, with the
    /// flag "don't fragment".
    #[inline(always)]
    pub fn new(
        source: Address4,
        destination: Address4,
        tos: u8,
        protocol: u8,
        length: u16,
    ) -> Self {
        const DONT_FRAGMENT: u16 = 0x4000;
        let mut header = Self {
            version_and_length: 0x45,
            tos,
            total_length: Be16::new(size_of::<Self>() as u16 + length),
            identification: 0,
            fragment: Be16::new(DONT_FRAGMENT),
            ttl: TTL,
            protocol,
            checksum: 0,
            source,
            destination,
        };
        let words: [u32; 5] = bytemuck::cast(header);
        header.checksum = !checksum::fold16(checksum::add(0, &words));
        header
    }
}

/// An IPv6 header (RFC 8200 section 3).
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct Header6 {
    /// Version in the upper four bits, traffic class, start of the flow label.
    pub version_class_flow: Be16,
    /// Rest of the flow label.
    pub flow: u16,
    /// Length of what follows this header, bytes.
    pub payload_length: Be16,
    /// Protocol, or kind of extension header, of what follows.
    pub next_header: u8,
    /// Hop limit.
    pub hop_limit: u8,
    /// Source address.
    pub source: Address6,
    /// Destination address.
    pub destination: Address6,
}

/// An IPv6 fragment header (RFC 8200 section 4.5).
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct Fragment6 {
    /// Protocol, or kind of extension header, of what follows in the whole datagram.
    pub next_header: u8,
    reserved: u8,
    /// Fragment offset in the upper 13 bits; the lowest bit is "more fragments".
    pub fragment: Be16,
    /// Identification of the datagram that a fragment belongs to.
    pub identification: u32,
}

const _: () = assert!(size_of::<Header4>() == Ipv4Hdr::LEN && size_of::<Header6>() == Ipv6Hdr::LEN);
