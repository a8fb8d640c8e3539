//! The decision on every packet and every connect(): a function of the packet, the settings and the
//! tables. `docs/semantics.md` says what it decides.
//!
//! It never writes to a packet. Hooks parse, call [`candidate()`] and [`decide`], or [`socket::decide`], and
//! apply the verdict; they decide nothing themselves.

use crate::{
    abi::{
        address::{Address, Family},
        counter::Reason,
        settings::Settings,
    },
    packet::{Packet, PacketKind},
};

mod direct;
mod entries;
pub mod fragment;
pub mod icmp_error;
mod known;
mod lookup;
mod no_flow;
mod open;
mod own;
pub mod select;
pub mod socket;
mod source_port;
pub mod tables;
pub mod track;
pub mod tunnel;
pub mod types;

use types::Context;

pub use tables::{Entry, InsertError, Known, NewFlow, Note, Search, Tables};
pub use types::{Answer, Candidate, Endpoint, ErrorQuote, Origin, Output, Site, Verdict, Work};

/// The origin of the client of a packet at `site`.
pub fn origin<F: Family>(packet: &Packet<F>, site: Site, settings: &Settings) -> Origin {
    Context { packet, settings, site, now: 0 }.origin()
}

/// What a packet at `site` may be, judged by its destination alone. For most packets this is all
/// that is needed, so it comes before any further parsing.
#[inline(always)]
pub fn candidate<F: Family>(destination: F::Address, site: Site, settings: &Settings) -> Candidate {
    let family = F::settings(settings);
    if matches!(site, Site::ToPod) {
        return Candidate::Reply;
    }
    if family.may_be_service(destination) {
        return Candidate::Service;
    }
    match site {
        Site::ToDevice { .. } if settings.flags & Settings::EXTERNAL != 0 => Candidate::Reply,
        Site::ToDevice { .. } => Candidate::NotService,
        Site::Loopback if F::is_loopback(destination) => Candidate::Node,
        // Frontends of node ports have these addresses, but nobody else may ask for them.
        _ if F::is_loopback(destination) || destination.is_unspecified() => Candidate::NotService,
        _ if family.may_be_node(destination) => Candidate::Node,
        _ => Candidate::NotService,
    }
}

/// Whether a machine behind this node's device sent the packet, and no process of the node, so that
/// nothing is decided about it: macvlan and virtual machines share the device, and have their own
/// addresses.
#[inline(always)]
pub fn is_of_a_guest<F: Family>(packet: &Packet<F>, site: Site, settings: &Settings) -> bool {
    matches!(site, Site::ToDevice { ingress: 0, .. })
        && !F::settings(settings).may_be_node(packet.tuple().source)
}

/// Decides on a packet at `site` for which [`candidate()`] returned `candidate`. If the packet passes,
/// [`passed`] has the last word.
#[inline(always)]
pub fn decide<F: Family, T: Tables<F>>(
    candidate: Candidate,
    packet: &Packet<F>,
    site: Site,
    settings: &Settings,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> Verdict {
    if matches!(candidate, Candidate::NotService) {
        return Verdict::Pass(Reason::NotService);
    }
    let context = Context { packet, settings, site, now: tables.now() };
    if !is_service_protocol(packet.kind) {
        return no_flow::decide(candidate, &context, work, tables);
    }
    let mut verdict = Verdict::Pass(Reason::NotService);
    if !matches!(candidate, Candidate::Direct) {
        match known::decide(candidate, &context, may_open(&context, candidate), work, tables) {
            Some(decided) => verdict = decided,
            None => return open::decide(&context, work, tables),
        }
    }
    if !matches!(candidate, Candidate::Service)
        && direct::begins_at(site)
        && matches!(verdict, Verdict::Pass(_))
    {
        return direct::decide(&context, work, tables).unwrap_or(verdict);
    }
    verdict
}

/// Whether a packet at `site` that is no Service's may be part of a client's conversation with a
/// backend itself, so that [`decide`] has to see it as [`Candidate::Direct`]. `may_begin` says
/// whether [a conversation may begin with it](crate::packet::Parse::may_begin), `has_direct` whether
/// [such conversations](Tables::has_direct) have flows.
#[inline(always)]
pub fn may_be_direct(site: Site, may_begin: bool, has_direct: bool) -> bool {
    direct::begins_at(site) && (may_begin || has_direct)
}

/// Whether [`passed`] may decide otherwise at `site`.
#[inline(always)]
const fn may_be_kept(site: Site) -> bool {
    matches!(site, Site::ToDevice { .. } | Site::ToPod | Site::Loopback)
}

/// The verdict on a packet that passes with `reason`: because [`decide`], or its counterpart for
/// fragments or ICMP errors, left it alone. Some must not leave the node. It is a step of its own, so
/// that the verifier follows it once and not once for each way to pass.
#[inline(always)]
pub fn passed<F: Family, T: Tables<F>>(
    candidate: Candidate,
    packet: &Packet<F>,
    site: Site,
    settings: &Settings,
    reason: Reason,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> Verdict {
    let context = Context { packet, settings, site, now: tables.now() };
    if !may_be_kept(site) || matches!(candidate, Candidate::NotService) {
        return Verdict::Pass(reason);
    }
    if matches!((site, candidate), (Site::ToDevice { .. }, Candidate::Service)) {
        return no_flow::keep_from_leaving(&context, reason, tables);
    }
    if matches!(reason, Reason::NoFlow) && own::may_get_answer(&context) {
        own::expect_answer(&context, work, tables);
    }
    Verdict::Pass(reason)
}

/// Decides on an unfragmented packet that an external device received, if it belongs to a known
/// flow or is certainly not Service traffic; `None` for every other packet, on which
/// [`decide`] decides.
#[inline(always)]
pub fn decide_known<F: Family, T: Tables<F>>(
    candidate: Candidate,
    packet: &Packet<F>,
    settings: &Settings,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> Option<Verdict> {
    if !is_service_protocol(packet.kind) || packet.is_syn() || packet.is_first_fragment != 0 {
        return None;
    }
    let context = Context { packet, settings, site: Site::FromDevice, now: tables.now() };
    let may_open = may_open(&context, candidate);
    let verdict = known::decide(candidate, &context, may_open, work, tables);
    if context.is_encapsulated() && matches!(verdict, Some(Verdict::Pass(_))) {
        return None;
    }
    verdict
}

/// Whether a packet of no flow may open one.
#[inline(always)]
fn may_open<F: Family>(context: &Context<F>, candidate: Candidate) -> bool {
    let port = context.packet.tuple().destination_port.get();
    match candidate {
        Candidate::Service => no_flow::may_be_new(context.site),
        Candidate::Node => context.settings.node_ports.contains(port),
        Candidate::Direct | Candidate::Reply | Candidate::NotService => false,
    }
}

/// Whether Services carry this protocol. They do not carry SCTP.
#[inline(always)]
fn is_service_protocol(kind: PacketKind) -> bool {
    matches!(kind, PacketKind::Tcp | PacketKind::Udp)
}
