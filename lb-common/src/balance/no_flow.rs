//! Packets that belong to no flow and cannot open one, above all those to a ClusterIP.

use crate::{
    abi::{
        address::Family,
        counter::Reason,
        frontend::{FrontendKey, FrontendKind},
        traffic::NO_SERVICE,
    },
    packet::{PacketKind, RST},
};

use super::{
    tables::Tables,
    types::{Answer, Candidate, Context, Site, Verdict, Work},
};

/// The verdict on a packet that belongs to no flow and cannot open one.
#[inline(always)]
pub(super) fn decide<F: Family, T: Tables<F>>(
    candidate: Candidate,
    context: &Context<F>,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> Verdict {
    work.out.index = NO_SERVICE;
    match candidate {
        Candidate::Service if may_be_new(context.site) => decide_unsupported(context, tables),
        Candidate::Direct => Verdict::Pass(Reason::NotService),
        _ => Verdict::Pass(Reason::NoFlow),
    }
}

/// The verdict on a packet that Services do not carry, to an address that may be a ClusterIP.
#[inline(never)]
fn decide_unsupported<F: Family, T: Tables<F>>(context: &Context<F>, tables: &mut T) -> Verdict {
    let packet = context.packet;
    if matches!(packet.kind, PacketKind::Malformed) {
        return Verdict::Pass(Reason::Malformed);
    }
    if context.is_draining() {
        return Verdict::Pass(Reason::Draining);
    }
    let found = tables.frontend(&FrontendKey::of_address(packet.tuple().destination));
    let Some(frontend) = found.filter(|frontend| frontend.kind == FrontendKind::CLUSTER_IP_ADDRESS)
    else {
        return Verdict::Pass(Reason::UnknownAddress);
    };
    match packet.kind {
        PacketKind::Fragment => Verdict::Drop(Reason::Fragment),
        PacketKind::Icmp if F::is_icmp_error(packet.detail) => Verdict::Drop(Reason::IcmpError),
        PacketKind::Icmp if packet.detail == F::ECHO_REQUEST => {
            match tables.service(frontend.service) {
                Some(service) if service.cluster.length() > 0 => {
                    Verdict::Answer(Answer::Echo, Reason::EchoAnswered)
                }
                _ => Verdict::Answer(Answer::PortUnreachable, Reason::NoEndpoint),
            }
        }
        _ => Verdict::Answer(Answer::ProtocolUnreachable, Reason::NoSuchProtocol),
    }
}

/// Whether a packet to a Service may be new at `site`. A forwarded packet has passed another site
/// before and was decided on there.
#[inline(always)]
pub(super) fn may_be_new(site: Site) -> bool {
    !matches!(site, Site::ToDevice { ingress: 1.., .. })
}

/// The verdict on a packet that would leave the node untranslated, for `reason`. It must not if it
/// is to a ClusterIP, of a lost connection, or about to return to the router that sent it here.
#[inline(always)]
pub(super) fn keep_from_leaving<F: Family, T: Tables<F>>(
    context: &Context<F>,
    reason: Reason,
    tables: &mut T,
) -> Verdict {
    let Some(kept) = why_not_leave(context, tables) else { return Verdict::Pass(reason) };
    if matches!(kept, Reason::Orphan) {
        Verdict::Answer(Answer::Reset, kept)
    } else {
        Verdict::Drop(kept)
    }
}

/// Why a packet to an address of a Service must not leave the node untranslated; `None` if it may.
///
/// A load balancer's address or external IP may also be that of a backend's node, or of a machine
/// that this node talks to as with any other: only what a router has sent here, and this node would
/// send back as it came, is nobody's.
#[inline(never)]
fn why_not_leave<F: Family, T: Tables<F>>(context: &Context<F>, tables: &mut T) -> Option<Reason> {
    let destination = context.packet.tuple().destination;
    let kind = tables.frontend(&FrontendKey::of_address(destination)).map(|whole| whole.kind);
    // A ClusterIP, or an address that may become one.
    let is_internal = kind == Some(FrontendKind::CLUSTER_IP_ADDRESS)
        || context.family().is_in_service_cidr(destination);
    let is_external = kind == Some(FrontendKind::EXTERNAL_ADDRESS);
    if !(is_internal || is_external && is_returning(context)) {
        return None;
    }
    // No other proxy has translated it either: the flow is lost, and its client would send again
    // for a quarter of an hour.
    if is_orphan(context, tables) {
        return Some(Reason::Orphan);
    }
    Some(if is_internal { Reason::UntranslatedLeaving } else { Reason::Returning })
}

/// Whether another machine sent the packet, and it is about to leave by the device that it arrived
/// by.
#[inline(always)]
fn is_returning<F: Family>(context: &Context<F>) -> bool {
    matches!(context.site, Site::ToDevice { ifindex, ingress } if ifindex == ingress)
        && !context.may_be_sent_by_node()
        && !context.is_draining()
}

/// Whether the packet belongs to a TCP connection with a frontend, of which no flow is known.
#[inline(never)]
fn is_orphan<F: Family, T: Tables<F>>(context: &Context<F>, tables: &mut T) -> bool {
    let packet = context.packet;
    if !matches!(packet.kind, PacketKind::Tcp) || packet.is_syn() || packet.detail & RST != 0 {
        return false;
    }
    let tuple = packet.tuple();
    let key = FrontendKey::new(tuple.destination, tuple.destination_port, packet.protocol());
    tables.frontend(&key).is_some()
}
