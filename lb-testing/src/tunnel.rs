//! Tunnels around frames, and the segment size that goes with them. Shares nothing with the
//! code under test.

use lb_common::{abi::frontend::TCP, packet::Packet};

use super::{
    bytes::{
        ETHERNET, addresses, checksum, header_sum, pseudo, transport_sum, update_header_checksum,
    },
    family::TestFamily,
};

/// The TTL or hop limit of a tunnel.
const TTL: u8 = 64;

/// The protocol number of a packet of the family in another one.
pub fn protocol<F: TestFamily>() -> u8 {
    if F::NUMBER == 4 { 4 } else { 41 }
}

/// Bytes of a tunnel's header.
pub fn length<F: TestFamily>() -> usize {
    if F::NUMBER == 4 { 20 } else { 40 }
}

/// The frame in a tunnel with these ends.
pub fn encapsulated<F: TestFamily>(frame: &[u8], ends: [F::Address; 2]) -> Vec<u8> {
    let (ethernet, packet) = frame.split_at(ETHERNET);
    let header = F::ip_header(ends, protocol::<F>(), &[], None, packet.len());
    let mut frame = [ethernet, &header, packet].concat();
    frame[F::TTL] = TTL;
    update_header_checksum::<F>(&mut frame);
    frame
}

/// The frame without the tunnel's header.
pub fn decapsulated<F: TestFamily>(frame: &[u8]) -> Vec<u8> {
    [&frame[..ETHERNET], &frame[ETHERNET + length::<F>()..]].concat()
}

/// Checks that `after` is `before`, one hop further on, in a tunnel, and nothing else changed
/// but the MACs. Returns the tunnel's ends.
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
        // The identification is anything: nobody may cut the tunnel's packets.
        compared[ETHERNET + 4..ETHERNET + 6].copy_from_slice(&expected[ETHERNET + 4..][..2]);
        update_header_checksum::<F>(&mut compared);
    }
    if header_sum::<F>(after) != 0xffff || was_right && compared != expected {
        return Err(format!("in a tunnel {after:02x?}, expected {expected:02x?}"));
    }
    Ok(ends)
}

/// The segment size that a SYN-ACK announces in its first option, if it does.
fn segment_size<F: TestFamily>(frame: &[u8], packet: &Packet<F>) -> Option<u16> {
    let option = usize::from(packet.transport) + 20;
    match frame.get(option..option + 4)? {
        [2, 4, high, low] if packet.is_syn_ack() => Some(u16::from_be_bytes([*high, *low])),
        _ => None,
    }
}

/// Whether the segment size that a frame announces is to be made smaller.
pub fn is_to_be_clamped<F: TestFamily>(frame: &[u8], packet: &Packet<F>) -> bool {
    let least = 536 + length::<F>() as u16;
    segment_size(frame, packet).is_some_and(|size| size >= least)
}

/// The frame before, with the smaller segment size of `after`, if that is smaller by the
/// header of a tunnel.
pub fn clamped<F: TestFamily>(before: &[u8], after: &[u8], packet: &Packet<F>) -> Option<Vec<u8>> {
    let [size, clamped] = [segment_size(before, packet)?, segment_size(after, packet)?];
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
