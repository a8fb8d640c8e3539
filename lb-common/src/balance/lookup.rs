//! Look-ups for several kinds of packets: the frontend that a packet is addressed to, and the live
//! flow that it belongs to.

use crate::{
    abi::{
        address::Family,
        flow::FlowKey,
        frontend::{FrontendKey, TCP},
    },
    packet::PacketKind,
};

use super::{
    tables::{Known, Search, Tables},
    track,
    types::{Context, Work},
};

/// Looks up the frontend that the packet is addressed to, and stores it in `work.chosen.frontend`.
/// An encapsulated packet may be addressed to a node port of the node that sent it here.
#[inline(never)]
pub(super) fn find_frontend<F: Family, T: Tables<F>>(
    context: &Context<F>,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> bool {
    let (tuple, protocol) = (context.packet.tuple(), context.packet.protocol());
    let port = tuple.destination_port;
    let mut found = tables.frontend(&FrontendKey::new(tuple.destination, port, protocol));
    if context.is_encapsulated() {
        if found.is_none() && tables.is_node(&tuple.destination) {
            found = tables.node_port(port, protocol);
        }
        found = found.filter(|frontend| !frontend.kind.is_internal());
    }
    if let Some(frontend) = found {
        work.chosen.frontend = frontend;
    }
    found.is_some()
}

/// Looks up the live flow for this key, and stores it in `work.scratch.known`. `key` may differ from
/// the packet's own: an ICMP error or a later fragment belongs to the flow of another packet.
#[inline(always)]
pub(super) fn find_live<F: Family, T: Tables<F>>(
    context: &Context<F>,
    key: &FlowKey<F::Address>,
    known: &mut Known<F::Address>,
    tables: &mut T,
) -> bool {
    let is_tcp = key.protocol == TCP as u32;
    let kind = if is_tcp { PacketKind::Tcp } else { PacketKind::Udp };
    if !tables.flow(key, Search::RepliesFirst, known) {
        return false;
    }
    let flow = &known.flow;
    let is_not_for_it = flow.action.is_one_way() && context.is_encapsulated();
    !is_not_for_it
        && !context.is_translated_on_egress(flow.action)
        && !track::is_expired(flow, kind, context)
}
