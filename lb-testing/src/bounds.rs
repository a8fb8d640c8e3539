//! The promise of the parser about any bytes: what it says of a frame lies within the frame.

use lb_common::packet::{Packet, PacketKind, quote::Quote};

use crate::{family::TestFamily, frame::ETHERNET};

/// Parses a frame, and checks that its transport header and what it quotes are in it.
///
/// # Errors
/// What lies outside.
pub fn check<F: TestFamily>(frame: &[u8]) -> Result<(), String> {
    let mut packet = Packet::<F>::default();
    if F::parse(frame, &mut packet).is_none() {
        let is_truncated = frame.len() < F::ADDRESSES + 2 * F::ADDRESS_LENGTH;
        return holds(is_truncated, || format!("{} bytes have an IP header", frame.len()));
    }
    let needed = match packet.kind {
        PacketKind::Tcp => 20,
        PacketKind::Udp | PacketKind::Icmp => 8,
        PacketKind::Other | PacketKind::Fragment | PacketKind::Malformed => return Ok(()),
    };
    let is_inside = usize::from(packet.transport) + needed <= frame.len();
    holds(is_inside, || format!("the transport header ends outside: {packet:?}"))?;
    let mut quote = Quote::default();
    if packet.kind != PacketKind::Icmp || F::parse_quote(frame, &packet, &mut quote).is_none() {
        return Ok(());
    }
    let [header, ports] = [quote.header, quote.transport].map(usize::from);
    let addresses = F::ADDRESSES - ETHERNET + 2 * F::ADDRESS_LENGTH;
    let is_inside = usize::from(packet.transport) + 8 == header
        && header + addresses <= ports
        && ports + 4 <= frame.len();
    holds(is_inside, || format!("the quote lies outside: {quote:?}"))
}

fn holds(condition: bool, problem: impl FnOnce() -> String) -> Result<(), String> {
    if condition { Ok(()) } else { Err(problem()) }
}
