//! Direct server return: which packets are encapsulated for a backend's node, and how that node
//! handles them.
//!
//! The node that receives a client's packet chooses a backend, and with it a node, and sends the
//! packet there encapsulated, untranslated but for its TTL. That node chooses among its own
//! backends and answers the client itself. An encapsulated packet is never encapsulated again.

use crate::{
    abi::{
        address::{Address, Family},
        frontend::FrontendKind,
        service::Service,
        settings::Settings,
    },
    packet::Packet,
};

use super::{
    lookup::find_frontend,
    tables::{Search, Tables},
    types::{Context, Origin, Site, Work},
};

/// Whether another node encapsulated this packet for direct server return. `outer` and `inner` are
/// source and destination of the outer and inner IP header. The outer destination is a Node object's
/// address: a pod may send packets to another address of its node, such as a bridge's
/// ([`is_forged`]). The inner source is then a client
/// outside the cluster: packets of nodes and pods are never encapsulated by lb, so that those that
/// a CNI encapsulates are left alone.
#[inline(always)]
pub fn is_encapsulated_by_node<F: Family, T: Tables<F>>(
    outer: &[F::Address; 2],
    inner: &[F::Address; 2],
    settings: &Settings,
    tables: &mut T,
) -> bool {
    let family = F::settings(settings);
    family.may_be_node(outer[1])
        && !family.is_pod(inner[0])
        && tables.is_node(&outer[0])
        && tables.is_node(&outer[1])
        && !tables.is_node(&inner[0])
}

/// Whether a pod of this node forges an encapsulated packet for direct server return: nodes alone
/// encapsulate packets for nodes. A CNI that masquerades it would give it the address of this node.
#[inline(always)]
pub fn is_forged<F: Family, T: Tables<F>>(destination: &F::Address, tables: &mut T) -> bool {
    tables.is_node(destination)
}

/// Whether the packets of a new flow are encapsulated for `node`, on which its backend runs. Those
/// of pods and nodes are not, because the client's own node would not know the flow of the replies.
/// Nor are packets to a node port at an address that the other nodes do not know as a node's.
#[inline(always)]
pub(crate) fn must_encapsulate<F: Family, T: Tables<F>>(
    context: &Context<F>,
    service: &Service,
    kind: FrontendKind,
    node: F::Address,
    tables: &mut T,
) -> bool {
    let tuple = context.packet.tuple();
    service.flags & Service::DSR != 0
        && !kind.is_internal()
        && !node.is_unspecified()
        && matches!(context.origin(), Origin::Outside)
        && !tables.is_node(&tuple.source)
        && (kind != FrontendKind::NODE_PORT || tables.is_node(&tuple.destination))
}

/// Whether packets like this one are encapsulated here. An ICMP error about another packet may be
/// forged.
#[inline(always)]
pub fn is_encapsulated_flow<F: Family, T: Tables<F>>(
    packet: &Packet<F>,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> bool {
    let known = &mut work.scratch.known;
    tables.flow(&packet.key, Search::Requests, known) && known.flow.action.is_one_way()
}

/// Whether an encapsulated packet with neither backend nor flow is dropped. If it is addressed to a
/// frontend, it is, because the kernel would route it back and forth between nodes. Any other is
/// not Service traffic: it goes on, still encapsulated.
#[inline(always)]
pub fn is_undeliverable<F: Family, T: Tables<F>>(
    packet: &Packet<F>,
    settings: &Settings,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> bool {
    let context = Context { packet, settings, site: Site::FromDevice, now: 0 };
    context.is_encapsulated() && find_frontend(&context, work, tables)
}
