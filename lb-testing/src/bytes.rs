//! Where the headers of a frame are, and its checksums, computed over the whole. Shares nothing
//! with the code under test.

use super::family::TestFamily;

/// Length of an Ethernet header.
pub const ETHERNET: usize = 14;

/// Computes the IPv4 header's checksum.
pub(super) fn update_header_checksum<F: TestFamily>(frame: &mut [u8]) {
    if F::NUMBER == 6 {
        return;
    }
    let field = ETHERNET + 10;
    frame[field..field + 2].fill(0);
    let sum = !header_sum::<F>(frame);
    frame[field..field + 2].copy_from_slice(&sum.to_be_bytes());
}

/// The Internet checksum of the parts, all but the last of even length (RFC 1071).
pub fn checksum(parts: &[&[u8]]) -> u16 {
    !sum(parts)
}

fn sum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0u64;
    for part in parts {
        for pair in part.chunks(2) {
            sum += u64::from(pair[0]) << 8 | u64::from(*pair.get(1).unwrap_or(&0));
        }
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

pub(super) fn pseudo<F: TestFamily>(
    addresses: [F::Address; 2],
    protocol: u8,
    length: usize,
) -> Vec<u8> {
    if F::NUMBER == 4 && protocol == F::ICMP {
        return Vec::new();
    }
    let mut bytes: Vec<u8> = addresses.into_iter().flat_map(F::bytes).collect();
    bytes.extend((length as u32).to_be_bytes());
    bytes.extend([0, 0, 0, protocol]);
    bytes
}

/// The addresses of a frame.
pub fn addresses<F: TestFamily>(frame: &[u8]) -> [F::Address; 2] {
    let (from, length) = (F::ADDRESSES, F::ADDRESS_LENGTH);
    [F::address(&frame[from..]), F::address(&frame[from + length..])]
}

/// The sum over a frame's transport header, payload and pseudo header, checksum field
/// included: 0xffff in a frame whose checksum is right (RFC 1071).
pub fn transport_sum<F: TestFamily>(frame: &[u8], transport: usize, protocol: u8) -> u16 {
    let body = &frame[transport..];
    sum(&[&pseudo::<F>(addresses::<F>(frame), protocol, body.len()), body])
}

pub(super) fn header_sum<F: TestFamily>(frame: &[u8]) -> u16 {
    let length = usize::from(frame[ETHERNET] & 0x0f) * 4;
    if F::NUMBER == 6 { 0xffff } else { sum(&[&frame[ETHERNET..ETHERNET + length]]) }
}
