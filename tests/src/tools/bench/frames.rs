//! The packets that the programs are given.

use lb_common::{
    abi::{
        address::{Address, Be16, Family, Ipv4, Ipv6},
        flow::Tuple,
        frontend::TCP,
    },
    packet::{ETHERTYPE_IPV4, ETHERTYPE_IPV6, IP_OFFSET, checksum},
};

use super::abi::{Lane, MAX_WORDS};

/// What differs between the families in a frame.
pub trait Frame: Family {
    /// Length of the IP header, bytes.
    const IP_HEADER: usize;
    /// The EtherType.
    const ETHERTYPE: u16;

    /// Bytes of the IP header before the addresses, for `length` bytes after it.
    fn start(protocol: u8, length: u16) -> Vec<u8>;
}

impl Frame for Ipv4 {
    const IP_HEADER: usize = 20;
    const ETHERTYPE: u16 = ETHERTYPE_IPV4;

    fn start(protocol: u8, length: u16) -> Vec<u8> {
        let [high, low] = (length + Self::IP_HEADER as u16).to_be_bytes();
        vec![0x45, 0, high, low, 0, 0, 0x40, 0, 64, protocol, 0, 0]
    }
}

impl Frame for Ipv6 {
    const IP_HEADER: usize = 40;
    const ETHERTYPE: u16 = ETHERTYPE_IPV6;

    fn start(protocol: u8, length: u16) -> Vec<u8> {
        let [high, low] = length.to_be_bytes();
        vec![0x60, 0, 0, 0, high, low, protocol, 64]
    }
}

/// A frame of `length` bytes; `tcp_header` is the length of a TCP header, which UDP does
/// not have.
pub fn frame<F: Frame>(
    tuple: &Tuple<F::Address>,
    protocol: u8,
    flags: u8,
    length: usize,
    tcp_header: u8,
) -> Vec<u8> {
    let transport = IP_OFFSET + F::IP_HEADER;
    let payload = (length - transport) as u16;
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    frame.extend(F::ETHERTYPE.to_be_bytes());
    frame.extend(F::start(protocol, payload));
    for address in [tuple.source, tuple.destination] {
        address.words().iter().for_each(|word| frame.extend(word.to_ne_bytes()));
    }
    for Be16 { be16 } in [tuple.source_port, tuple.destination_port] {
        frame.extend(be16.to_ne_bytes());
    }
    if protocol == TCP {
        frame.extend([0, 0, 0, 1, 0, 0, 0, 1, tcp_header / 4 * 16, flags, 0xff, 0xff]);
    } else {
        frame.extend(payload.to_be_bytes());
    }
    // The programs change a sum, they never check it.
    frame.extend([0x12, 0x34]);
    frame.resize(length, 0);
    if F::IP_HEADER == Ipv4::IP_HEADER {
        let words: Vec<u32> = (0..5).map(|index| word(&frame, IP_OFFSET + index * 4)).collect();
        let sum = !checksum::fold16(checksum::add(0, &words));
        frame[24..26].copy_from_slice(&sum.to_ne_bytes());
    }
    frame
}

/// What the wrapper must know to restore `frame`.
pub fn lane(frame: &[u8]) -> Lane {
    let mut lane = Lane { length: frame.len() as u32, ..Lane::default() };
    for index in 0..3 {
        lane.ethernet[index] = word(frame, index * 4);
    }
    lane.ethernet[3] = u32::from(u16::from_ne_bytes([frame[12], frame[13]]));
    for index in 0..MAX_WORDS {
        let at = IP_OFFSET + index * 4;
        if at + 4 <= frame.len() {
            lane.words[index] = word(frame, at);
        }
    }
    lane
}

fn word(frame: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes([frame[at], frame[at + 1], frame[at + 2], frame[at + 3]])
}
