//! Encapsulated frames, and the MSS that leaves room for the outer header. Shares nothing with
//! the code under test.

use lb_common::{abi::frontend::TCP, packet::Packet};

use super::{
    bytes::{
        ETHERNET, addresses, checksum, header_sum, pseudo, transport_sum, update_header_checksum,
    },
    family::TestFamily,
};

/// The TTL or hop limit of an outer header.
const TTL: u8 = 64;

/// The protocol number of an encapsulated packet of the family.
pub fn protocol<F: TestFamily>() -> u8 {
    if F::NUMBER == 4 { 4 } else { 41 }
}

/// Length of the outer header.
pub fn length<F: TestFamily>() -> usize {
    if F::NUMBER == 4 { 20 } else { 40 }
}

/// The frame in an outer header with this source and destination.
pub fn encapsulated<F: TestFamily>(frame: &[u8], ends: [F::Address; 2]) -> Vec<u8> {
    let (ethernet, packet) = frame.split_at(ETHERNET);
    let header = F::ip_header(ends, protocol::<F>(), &[], None, packet.len());
    let mut frame = [ethernet, &header, packet].concat();
    frame[F::TTL] = TTL;
    update_header_checksum::<F>(&mut frame);
    frame
}

/// The frame without its outer header.
pub fn decapsulated<F: TestFamily>(frame: &[u8]) -> Vec<u8> {
    [&frame[..ETHERNET], &frame[ETHERNET + length::<F>()..]].concat()
}

/// Checks that `after` is `before` encapsulated, its inner TTL decremented, and nothing else
/// changed but the MACs. Returns source and destination of the outer header.
///
/// # Errors
/// A sentence that says what differs.
pub fn check_encapsulated<F: TestFamily>(
    before: &[u8],
    after: &[u8],
) -> Result<[F::Address; 2], String> {
    let mut expected = before.to_vec();
    expected[F::TTL] -= 1;
    let was_right = header_sum::<F>(before) == 0xffff;
    if was_right {
        update_header_checksum::<F>(&mut expected);
    }
    let ends = addresses::<F>(after);
    let expected = encapsulated::<F>(&expected, ends);
    let mut compared = after.to_vec();
    compared[..12].copy_from_slice(&before[..12]);
    if F::NUMBER == 4 {
        // Any identification is right, because the outer header has DF.
        compared[ETHERNET + 4..ETHERNET + 6].copy_from_slice(&expected[ETHERNET + 4..][..2]);
        update_header_checksum::<F>(&mut compared);
    }
    if header_sum::<F>(after) != 0xffff || was_right && compared != expected {
        return Err(format!("encapsulated {after:02x?}, expected {expected:02x?}"));
    }
    Ok(ends)
}

/// The MSS in the first option of a SYN-ACK, if it is there.
fn mss<F: TestFamily>(frame: &[u8], packet: &Packet<F>) -> Option<u16> {
    let option = usize::from(packet.transport) + 20;
    match frame.get(option..option + 4)? {
        [2, 4, high, low] if packet.is_syn_ack() => Some(u16::from_be_bytes([*high, *low])),
        _ => None,
    }
}

/// Whether the MSS of a frame must be clamped.
pub fn is_clamped<F: TestFamily>(frame: &[u8], packet: &Packet<F>) -> bool {
    let least = 536 + length::<F>() as u16;
    mss(frame, packet).is_some_and(|size| size >= least)
}

/// The frame `before` with the MSS of `after`, if that is smaller by the length of an outer
/// header.
pub fn clamped<F: TestFamily>(before: &[u8], after: &[u8], packet: &Packet<F>) -> Option<Vec<u8>> {
    let [size, clamped] = [mss(before, packet)?, mss(after, packet)?];
    if size.checked_sub(length::<F>() as u16)? != clamped {
        return None;
    }
    let transport = usize::from(packet.transport);
    let was_right = transport_sum::<F>(before, transport, TCP).is_multiple_of(0xffff);
    let mut frame = before.to_vec();
    frame[transport + 22..transport + 24].copy_from_slice(&clamped.to_be_bytes());
    if was_right {
        frame[transport + 16..transport + 18].fill(0);
        let ends = addresses::<F>(&frame);
        let body = &frame[transport..];
        let sum = checksum(&[&pseudo::<F>(ends, TCP, body.len()), body]);
        frame[transport + 16..transport + 18].copy_from_slice(&sum.to_be_bytes());
    }
    Some(frame)
}
