//! What a program did with a frame, derived from what came out of it, and the promises about
//! every frame.

use std::borrow::Cow;
use std::cell::Cell;

use anyhow::{Context, Result, ensure};
use lb_common::abi::counter::Reason;
use lb_common::abi::flow::Tuple;
use lb_common::balance::Answer;
use lb_common::packet::{Packet, PacketKind};
use lb_testing::family::TestFamily;
use lb_testing::frame::{self, MACS};
use lb_testing::interpreter::Fate;
use lb_testing::site::TestSite;
use lb_testing::tunnel;
use lb_testing::world::{EXTERNAL, EXTERNAL_TOO, mac};

use crate::harness::programs::{GATEWAY_MAC, MOVED_GATEWAY_MAC, Ran};

/// The addresses and ports of a frame that XDP translated, after the check that nothing else
/// changed but the TTL, by `decrement`.
pub(super) fn checked<F: TestFamily>(
    before: &[u8],
    after: &[u8],
    decrement: u8,
) -> Result<Tuple<F::Address>> {
    let before = &inside::<F>(before, after)[..];
    let mut packet = Packet::<F>::default();
    F::parse(before, &mut packet).context("a frame without addresses was changed")?;
    let tuple = tuple_of::<F>(after, usize::from(packet.transport));
    frame::check_rewrite(before, after, &packet, &tuple, decrement).map_err(anyhow::Error::msg)?;
    let macs = &after[..MACS.len()];
    let is_right = if decrement == 0 { macs == &before[..12] } else { is_to_gateway(macs) };
    ensure!(is_right, "the MACs became {macs:02x?}");
    Ok(tuple)
}

/// The frame as it came, without its outer header if `after` is without it.
fn inside<'a, F: TestFamily>(before: &'a [u8], after: &[u8]) -> Cow<'a, [u8]> {
    match after.len() + tunnel::length::<F>() == before.len() {
        true => tunnel::decapsulated::<F>(before).into(),
        false => before.into(),
    }
}

/// Source and destination of the outer header that a frame got.
pub(super) fn encapsulated<F: TestFamily>(
    before: &[u8],
    after: &[u8],
) -> Result<Tuple<F::Address>> {
    let [source, destination] =
        tunnel::check_encapsulated::<F>(before, after).map_err(anyhow::Error::msg)?;
    let macs = &after[..MACS.len()];
    ensure!(is_to_gateway(macs) || macs == &before[..12], "MACs {macs:02x?}");
    Ok(Tuple { source, destination, ..Tuple::default() })
}

/// Whether these are the MACs of a frame that goes to the gateway of the tests.
fn is_to_gateway(macs: &[u8]) -> bool {
    [GATEWAY_MAC, MOVED_GATEWAY_MAC].iter().any(|gateway| macs[..6] == gateway[..])
        && macs[6..] == mac(EXTERNAL)
}

const NEXT: i32 = -1;
const SHOT: i32 = 2;
const REDIRECT: i32 = 7;

/// What a classifier did with the frame `before`, derived from what came out of it.
pub(super) fn fate<F: TestFamily>(
    site: TestSite,
    reason: Reason,
    before: &[u8],
    ran: &Ran,
    quoted: &Cell<Option<Tuple<F::Address>>>,
) -> Result<Fate<F::Address>> {
    let after = &ran.frame[..];
    if ran.returned == SHOT {
        return Ok(Fate::Dropped);
    }
    // The payload of a later fragment of a request to this node's own port does not change.
    let is_of_flow = matches!(reason, Reason::Request | Reason::Reply);
    if ran.returned == NEXT && after == before && !is_of_flow {
        return Ok(Fate::Untouched);
    }
    ensure!([NEXT, REDIRECT].contains(&ran.returned), "no such verdict");
    let is_request =
        matches!(reason, Reason::FlowCreated | Reason::Request | Reason::IcmpTranslated);
    if is_request && after.len() == before.len() + tunnel::length::<F>() {
        return encapsulated::<F>(before, after).map(Fate::Encapsulated);
    }
    let before = if is_request { inside::<F>(before, after) } else { before.into() };
    let mut packet = Packet::<F>::default();
    F::parse(&before[..], &mut packet).context("a frame without addresses was changed")?;
    if let Some(answer) = answer(reason, &packet) {
        check_answer(site, &before, ran, &packet, answer)?;
        return Ok(Fate::Answered(answer));
    }
    let (tuple, inner) = rewritten(reason, &before, after, &packet)?;
    if inner.is_some() {
        quoted.set(inner);
    }
    let decrement = before[F::TTL].wrapping_sub(after[F::TTL]);
    if tunnel::clamped(&before, after, &packet).is_some() && reason != Reason::IcmpTranslated {
        ensure!(ran.returned == NEXT && decrement == 0, "MSS clamped in a packet that is routed");
        return Ok(Fate::MssClamped(tuple));
    }
    continued::<F>(&before, ran, decrement, tuple)
}

/// Checks an answer to `before`, and where it is sent.
fn check_answer<F: TestFamily>(
    site: TestSite,
    before: &[u8],
    ran: &Ran,
    packet: &Packet<F>,
    answer: Answer,
) -> Result<()> {
    frame::check_answer(before, &ran.frame, packet, answer).map_err(anyhow::Error::msg)?;
    ensure!(ran.returned == REDIRECT, "an answer that is not sent back");
    let macs = Macs { before, after: &ran.frame };
    let is_right = match site {
        TestSite::FromPod | TestSite::FromDevice | TestSite::FromOtherDevice => macs.are_swapped(),
        TestSite::Loopback => macs.lead_into([0; 6]),
        TestSite::ToPod
        | TestSite::ToDevice
        | TestSite::ToDeviceForwarded
        | TestSite::ToDeviceReturned => macs.lead_into(mac(EXTERNAL)),
    };
    ensure!(is_right, "the answer's MACs are {:02x?}", macs.of_frame());
    Ok(())
}

/// A frame's addresses and ports, and those that it quotes.
type Rewritten<A> = (Tuple<A>, Option<Tuple<A>>);

/// The addresses and ports of a translated frame, after the check that nothing else changed.
fn rewritten<F: TestFamily>(
    reason: Reason,
    before: &[u8],
    after: &[u8],
    packet: &Packet<F>,
) -> Result<Rewritten<F::Address>> {
    let decrement = before[F::TTL].wrapping_sub(after[F::TTL]);
    if reason == Reason::IcmpTranslated && packet.kind != PacketKind::Fragment {
        let [outer, inner] =
            frame::check_error(before, after, packet, decrement).map_err(anyhow::Error::msg)?;
        return Ok((outer, Some(inner)));
    }
    let tuple = if packet.kind == PacketKind::Fragment {
        let [source, destination] = frame::addresses::<F>(after);
        Tuple { source, destination, ..Tuple::default() }
    } else {
        tuple_of::<F>(after, usize::from(packet.transport))
    };
    let clamped = tunnel::clamped(before, after, packet);
    frame::check_rewrite(clamped.as_deref().unwrap_or(before), after, packet, &tuple, decrement)
        .map_err(anyhow::Error::msg)?;
    Ok((tuple, None))
}

/// Where a translated frame continues, by the verdict, the TTL and the MACs.
fn continued<F: TestFamily>(
    before: &[u8],
    ran: &Ran,
    decrement: u8,
    tuple: Tuple<F::Address>,
) -> Result<Fate<F::Address>> {
    let is_redirected = ran.returned == REDIRECT;
    ensure!(decrement == 0 || decrement == 1 && is_redirected, "the TTL fell by {decrement}");
    let macs = Macs { before, after: &ran.frame };
    Ok(if !is_redirected {
        ensure!(macs.are_unchanged(), "the MACs became {:02x?}", macs.of_frame());
        Fate::Translated(tuple)
    } else if decrement == 1 {
        let is_right = is_to_gateway(macs.of_frame()) || macs.are_unchanged();
        ensure!(is_right, "forwarded with MACs {:02x?}", macs.of_frame());
        Fate::Forwarded(tuple)
    } else if macs.are_unchanged() {
        Fate::Routed(tuple)
    } else if macs.are_swapped() {
        Fate::Hairpinned(tuple)
    } else if macs.lead_into([0; 6]) {
        Fate::IntoLoopback(tuple)
    } else if macs.lead_into(mac(EXTERNAL)) {
        Fate::IntoDevice(tuple, EXTERNAL)
    } else if macs.lead_into(mac(EXTERNAL_TOO)) {
        Fate::IntoDevice(tuple, EXTERNAL_TOO)
    } else {
        anyhow::bail!("redirected with MACs {:02x?}", macs.of_frame());
    })
}

/// The MACs of a frame before and after a program.
struct Macs<'a> {
    before: &'a [u8],
    after: &'a [u8],
}

impl Macs<'_> {
    /// Those after the program: destination, source.
    fn of_frame(&self) -> &[u8] {
        &self.after[..MACS.len()]
    }

    fn are_unchanged(&self) -> bool {
        self.after[..12] == self.before[..12]
    }

    fn are_swapped(&self) -> bool {
        self.after[..6] == self.before[6..12] && self.after[6..12] == self.before[..6]
    }

    /// Whether the frame goes to `device` with its source unchanged.
    fn lead_into(&self, device: [u8; 6]) -> bool {
        self.after[..6] == device && self.after[6..12] == self.before[6..12]
    }
}

/// The answer that a reason stands for.
fn answer<F: TestFamily>(reason: Reason, packet: &Packet<F>) -> Option<Answer> {
    const TCP: u8 = 6;
    match reason {
        Reason::EchoAnswered => Some(Answer::Echo),
        Reason::NoSuchProtocol => Some(Answer::ProtocolUnreachable),
        Reason::TtlExceeded => Some(Answer::TimeExceeded),
        Reason::Orphan => Some(Answer::Reset),
        Reason::NoEndpoint | Reason::NoSuchPort | Reason::NoSourcePort => {
            let is_tcp = packet.protocol() == TCP;
            Some(if is_tcp { Answer::Reset } else { Answer::PortUnreachable })
        }
        _ => None,
    }
}

fn tuple_of<F: TestFamily>(frame: &[u8], transport: usize) -> Tuple<F::Address> {
    use lb_common::abi::address::Be16;
    let [source, destination] = frame::addresses::<F>(frame);
    let port = |at: usize| Be16::new(u16::from_be_bytes([frame[at], frame[at + 1]]));
    let (source_port, destination_port) = (port(transport), port(transport + 2));
    Tuple { source, destination, source_port, destination_port }
}
