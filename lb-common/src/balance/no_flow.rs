//! Packets that belong to no flow and cannot open one, above all those to a ClusterIP.

use crate::{
    abi::{address::Family, counter::Reason, frontend::FrontendKey, traffic::NO_SERVICE},
    packet::PacketKind,
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
    let verdict = match candidate {
        Candidate::Service if may_be_new(context.site) => decide_unsupported(context, tables),
        _ => Verdict::Pass(Reason::NoFlow),
    };
    drop_cluster_ip_leak(candidate, context, verdict, tables)
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
    let Some(frontend) = tables.frontend(&FrontendKey::of_address(packet.tuple().destination))
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

/// Turns Pass into Drop if a packet to a ClusterIP would leave the node untranslated.
#[inline(always)]
pub(super) fn drop_cluster_ip_leak<F: Family, T: Tables<F>>(
    candidate: Candidate,
    context: &Context<F>,
    verdict: Verdict,
    tables: &mut T,
) -> Verdict {
    match (context.site, candidate, verdict) {
        (Site::ToDevice { .. }, Candidate::Service, Verdict::Pass(_))
            if is_service_address(context, tables) =>
        {
            Verdict::Drop(Reason::UntranslatedLeaving)
        }
        _ => verdict,
    }
}

/// Whether the packet's destination is, or may become, a ClusterIP, so that the packet must not
/// leave the node untranslated.
#[inline(never)]
fn is_service_address<F: Family, T: Tables<F>>(context: &Context<F>, tables: &mut T) -> bool {
    let destination = context.packet.tuple().destination;
    context.family().is_in_service_cidr(destination)
        || tables.frontend(&FrontendKey::of_address(destination)).is_some()
}
