//! The interpreter without a kernel: the core on the host, over plain maps.

use lb_common::{
    abi::{
        affinity::{Affinity, AffinityKey},
        counter::Reason,
        flow::{Action, FlowKey, LOOPBACK_DEVICE, Tuple},
        settings::Settings,
    },
    balance::{self, Candidate, Site, Verdict, Work, fragment, icmp_error, tunnel as tunnelled},
    packet::{Packet, PacketKind},
};

use super::{
    family::TestFamily,
    frame::MACS,
    interpreter::{Fate, Interpreter, Outcome},
    site::TestSite,
    tables::{FakeTables, FlowEntries, Lookups},
    tunnel,
    world::World,
};

/// The core on the host, its tables and its clock.
#[derive(Debug)]
pub struct Host<F: TestFamily> {
    /// Its tables.
    pub tables: FakeTables<F>,
    start: u32,
    settings: Settings,
    ifindices: Vec<u32>,
    quoted: Option<Tuple<F::Address>>,
}

impl<F: TestFamily> Host<F> {
    /// With a clock that starts at `start`.
    pub fn new(start: u32) -> Self {
        let tables = FakeTables::new(start);
        let (settings, ifindices) = (Settings::default(), Vec::new());
        Self { tables, start, settings, ifindices, quoted: None }
    }

    /// Decides on a frame.
    pub fn decide(
        &mut self,
        site: TestSite,
        frame: &[u8],
    ) -> (Verdict, Work<F::Address>, Packet<F>) {
        let (mut packet, mut work) = (Packet::default(), Work::default());
        self.tables.lookups = Lookups::default();
        let (site, settings, tables) = (site.site(), &self.settings, &mut self.tables);
        let Some(destination) = F::destination(frame) else {
            return (Verdict::Pass(Reason::Malformed), work, packet);
        };
        let is_forged = site == Site::FromPod
            && settings.accepts_tunnels()
            && F::is_tunnel(frame)
            && tunnelled::is_forged::<F, _>(&destination, tables);
        if is_forged {
            return (Verdict::Drop(Reason::UnaskedTunnel), work, packet);
        }
        let mut candidate = balance::candidate::<F>(destination, site, settings);
        if site == Site::FromDevice && frame[..6] != MACS[..6] {
            return (Verdict::Pass(Reason::NotService), work, packet);
        }
        let mut frame = frame;
        if site == Site::FromDevice && settings.accepts_tunnels() && F::is_tunnel(frame) {
            let inside = &frame[F::LENGTH as usize..];
            if let (Some(outer), Some(inner)) = (F::ends(frame), F::ends(inside))
                && tunnelled::is_encapsulated_by_node::<F, _>(&outer, &inner, settings, tables)
            {
                (packet.encap_len, frame, candidate) = (F::LENGTH, inside, Candidate::Service);
            }
        }
        if F::parse(frame, &mut packet).is_none() {
            return (Verdict::Pass(Reason::Malformed), work, packet);
        }
        if candidate == Candidate::NotService
            && balance::may_be_direct(
                site,
                F::may_begin(frame),
                balance::Tables::<F>::has_direct(tables),
            )
        {
            candidate = Candidate::Direct;
        }
        if balance::is_of_a_guest(&packet, site, settings) {
            return (Verdict::Pass(Reason::NotService), work, packet);
        }
        let verdict = if candidate == Candidate::NotService {
            Verdict::Pass(Reason::NotService)
        } else if packet.is_icmp_error() {
            let is_quoted = F::parse_quote(frame, &packet, &mut work.error.quote).is_some();
            icmp_error::decide(candidate, &packet, is_quoted, site, settings, &mut work, tables)
        } else if packet.kind == PacketKind::Fragment {
            fragment::decide(candidate, &packet, site, settings, &mut work, tables)
        } else {
            balance::decide(candidate, &packet, site, settings, &mut work, tables)
        };
        let verdict = match verdict {
            Verdict::Pass(reason) => {
                balance::passed(candidate, &packet, site, settings, reason, &mut work, tables)
            }
            verdict => verdict,
        };
        let verdict = match verdict {
            Verdict::Pass(reason) | Verdict::Answer(_, reason) if packet.encap_len != 0 => {
                match tunnelled::is_undeliverable(
                    &packet,
                    &self.settings,
                    &mut work,
                    &mut self.tables,
                ) {
                    true => Verdict::Drop(reason),
                    false => Verdict::Pass(reason),
                }
            }
            verdict => verdict,
        };
        if packet.is_first_fragment != 0 && matches!(verdict, Verdict::Translate(_)) {
            fragment::remember(&packet, &mut work, &mut self.tables);
        }
        (verdict, work, packet)
    }

    fn fate(
        &self,
        site: TestSite,
        frame: &[u8],
        packet: &Packet<F>,
        work: &Work<F::Address>,
    ) -> Fate<F::Address> {
        let (tuple, device) = (work.out.rewrite, work.out.device);
        match work.out.action {
            Action::REQUEST | Action::REPLY => Fate::Translated(tuple),
            Action::REPLY_DIRECT if tunnel::is_clamped(frame, packet) => Fate::MssClamped(tuple),
            Action::REPLY_DIRECT => Fate::Translated(tuple),
            Action::REQUEST_TUNNEL => Fate::Encapsulated(tuple),
            Action::REQUEST_ROUTE => Fate::Routed(tuple),
            Action::REQUEST_FORWARD | Action::REPLY_FORWARD => Fate::Forwarded(tuple),
            Action::REPLY_INTO_DEVICE if device == LOOPBACK_DEVICE => Fate::IntoLoopback(tuple),
            Action::REQUEST_LOOPBACK => Fate::IntoLoopback(tuple),
            Action::REQUEST_HAIRPIN | Action::REPLY_HAIRPIN => Fate::Hairpinned(tuple),
            Action::REPLY_INTO_DEVICE => match self.ifindices[device as usize] {
                ifindex if ifindex == site.ifindex() => Fate::Translated(tuple),
                ifindex => Fate::IntoDevice(tuple, ifindex),
            },
            other => panic!("no such action: {other:?}"),
        }
    }
}

impl<F: TestFamily> Interpreter<F> for Host<F> {
    fn reset(&mut self) {
        self.tables = FakeTables::new(self.start);
    }

    fn load(&mut self, world: &World<F>) {
        self.tables.load(world);
        self.settings = world.settings;
        self.ifindices = world.devices.iter().map(|device| device.ifindex).collect();
    }

    fn send(&mut self, site: TestSite, frame: &[u8]) -> Outcome<F::Address> {
        let (verdict, mut work, packet) = self.decide(site, frame);
        if packet.kind == PacketKind::Fragment {
            // None of its bytes are ports.
            (work.out.rewrite.source_port, work.out.rewrite.destination_port) = Default::default();
        }
        self.quoted = match verdict {
            Verdict::Translate(Reason::IcmpTranslated) => Some(work.error.quoted),
            _ => None,
        };
        match verdict {
            Verdict::Pass(reason) => Outcome { reason, fate: Fate::Untouched },
            Verdict::Drop(reason) => Outcome { reason, fate: Fate::Dropped },
            Verdict::Answer(answer, reason) => Outcome { reason, fate: Fate::Answered(answer) },
            Verdict::Translate(reason) => {
                Outcome { reason, fate: self.fate(site, frame, &packet, &work) }
            }
        }
    }

    fn quoted(&self) -> Option<Tuple<F::Address>> {
        self.quoted
    }

    fn advance(&mut self, ticks: u32) {
        self.tables.clock = self.tables.clock.wrapping_add(ticks);
    }

    fn flows(&mut self) -> FlowEntries<F::Address> {
        self.tables.flows()
    }

    fn remove_flow(&mut self, key: &FlowKey<F::Address>) {
        self.tables.lose(key);
    }

    fn affinities(&mut self) -> Vec<(AffinityKey, Affinity)> {
        self.tables.affinities()
    }

    fn lookups(&self) -> Option<Lookups> {
        Some(self.tables.lookups)
    }
}
