//! Direct server return: what is tunnelled to a backend's node, and what that node makes of
//! it.
//!
//! The node that a client's packet comes to chooses a backend and with it a node, and sends
//! the packet there as it came, but for a hop. That node chooses among its own backends and
//! answers the client itself. What came in a tunnel is never tunnelled again.

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
    tables::{Entry, FlowTable, Tables},
    types::{Context, Origin, Site, Work},
};

/// Whether what an external device received in a tunnel with the ends `outer` was put there
/// by another node: the packet inside, with the ends `inner`, is a client's outside. Packets
/// of nodes and pods are never tunnelled here, so that what a CNI tunnels for them is let
/// alone.
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
        && !tables.is_node(&inner[0])
}

/// Whether a new flow is tunnelled to `node`, where its backend runs. Clients that are pods
/// or nodes are not: they would be answered past what their own node knows of the flow. Nor
/// is a node port at an address that the other nodes do not know for a node's.
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

/// Whether packets like this one are tunnelled: an error about one of them may be a forgery
/// that is to hit somebody else.
#[inline(always)]
pub fn is_encapsulated_flow<F: Family, T: Tables<F>>(packet: &Packet<F>, tables: &mut T) -> bool {
    let mut found = tables.flow(FlowTable::Flows, &packet.key);
    if found.is_none() {
        found = tables.flow(FlowTable::Embryonic, &packet.key);
    }
    found.is_some_and(|entry| entry.get().action.is_one_way())
}

/// Whether a packet that came in a tunnel, and for which there is neither backend nor flow, is
/// dropped: for a front end it is, as it would only go round in circles. The rest is no business
/// of ours and stays in its tunnel.
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
