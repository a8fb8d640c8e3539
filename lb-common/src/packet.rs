//! Frames: the fields that the datapath reads, and the headers that it writes.

pub mod answer;
pub mod checksum;
pub mod header;
pub mod parse;
pub mod quote;
pub mod tunnel;

pub use parse::{
    ACK, ETHERTYPE_IPV4, ETHERTYPE_IPV6, FIN, IP_OFFSET, MAX_EXTENSION_HEADERS, PSH, Packet,
    PacketKind, Parse, RST, SYN, Window, ethertype,
};
