//! The core, run on one packet over tables that keep aside what it writes.

use lb_common::{
    abi::{
        counter::Reason,
        flow::{FlowKey, Tuple},
        flow_table::Direction,
        frontend::TCP,
        settings::Settings,
    },
    balance::{self, Candidate, Site, Verdict, Work},
    flow_table::Class,
    packet::{ACK, Packet, PacketKind, SYN},
};

use super::{
    pinned::PinnedFamily,
    tables::{Overlay, Reader},
};
use crate::maps::flow_table::{Flows as _, is_expired};

/// The TTL of a packet that no router has forwarded yet.
const TTL: u8 = 64;

/// The datapath of this node, for packets of one protocol.
pub(super) struct Datapath<'a, F: PinnedFamily, R: Reader<F>, S> {
    /// The tables, with everything that the packet's earlier programs wrote.
    pub(super) overlay: Overlay<'a, F, R>,
    /// The settings in force.
    pub(super) settings: Settings,
    /// Routes, interfaces and attached programs.
    pub(super) around: &'a S,
    protocol: u8,
    flags: u8,
}

/// What the core decided on a packet.
pub(super) struct Judged<F: PinnedFamily> {
    /// The packet.
    pub(super) packet: Packet<F>,
    /// Where in the datapath the program runs.
    pub(super) site: Site,
    /// The decision.
    pub(super) verdict: Verdict,
    /// The rewrite and the flow entries behind it.
    pub(super) work: Work<F::Address>,
}

impl<'a, F: PinnedFamily, R: Reader<F>, S> Datapath<'a, F, R, S> {
    /// For a packet of the existing flow of `tuple`, else for one that opens a flow.
    pub(super) fn new(
        reader: &'a R,
        around: &'a S,
        protocol: u8,
        tuple: &Tuple<F::Address>,
    ) -> Self {
        let flags = tcp_flags::<F, R>(reader, protocol, tuple);
        let (overlay, settings) = (Overlay::new(reader), reader.settings());
        Self { overlay, settings, around, protocol, flags }
    }

    /// Whether the packet would open a flow.
    pub(super) fn opens(&self) -> bool {
        self.protocol != TCP || self.flags == SYN
    }

    /// Runs the core as the program at `site` does, and keeps what it writes.
    pub(super) fn judge(&mut self, site: Site, tuple: &Tuple<F::Address>) -> Judged<F> {
        let packet = self.packet(tuple, self.flags);
        let (verdict, work) = run(&mut self.overlay, &self.settings, &packet, site);
        Judged { packet, site, verdict, work }
    }

    /// A packet with these TCP flags, of this datapath's protocol.
    pub(super) fn packet(&self, tuple: &Tuple<F::Address>, flags: u8) -> Packet<F> {
        let key = FlowKey { tuple: *tuple, protocol: self.protocol.into() };
        let (kind, detail) =
            if self.protocol == TCP { (PacketKind::Tcp, flags) } else { (PacketKind::Udp, 0) };
        Packet { key, kind, detail, ttl: TTL, ..Packet::default() }
    }
}

/// Runs the core.
pub(super) fn run<F: PinnedFamily, R: Reader<F>>(
    overlay: &mut Overlay<'_, F, R>,
    settings: &Settings,
    packet: &Packet<F>,
    site: Site,
) -> (Verdict, Work<F::Address>) {
    let mut work = Work::default();
    if balance::is_of_a_guest(packet, site, settings) {
        return (Verdict::Pass(Reason::NotService), work);
    }
    let mut candidate = balance::candidate::<F>(packet.tuple().destination, site, settings);
    if candidate == Candidate::NotService && balance::may_be_direct(site, true, true) {
        candidate = Candidate::Direct;
    }
    let verdict = match balance::decide(candidate, packet, site, settings, &mut work, overlay) {
        Verdict::Pass(reason) => {
            balance::passed(candidate, packet, site, settings, reason, &mut work, overlay)
        }
        verdict => verdict,
    };
    (verdict, work)
}

/// The TCP flags of the next packet of an existing flow, or of the first packet of a new one.
fn tcp_flags<F: PinnedFamily, R: Reader<F>>(
    reader: &R,
    protocol: u8,
    tuple: &Tuple<F::Address>,
) -> u8 {
    let key = FlowKey { tuple: *tuple, protocol: protocol.into() };
    let settings = reader.settings();
    let time = settings.time(reader.now());
    let live = |direction| {
        let flow = reader.flows().find(&key, direction)?;
        (!is_expired(flow.word, time, &settings.flow_lifetimes)).then_some(flow)
    };
    let is_new = |direction| live(direction).map(|flow| flow.class() == Class::Unanswered);
    match (is_new(Direction::Request), is_new(Direction::Reply)) {
        (Some(false), _) | (None, Some(false)) => ACK,
        (None, Some(true)) => SYN | ACK,
        (Some(true) | None, _) => SYN,
    }
}
