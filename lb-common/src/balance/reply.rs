//! Packets from a backend back to its client.

use crate::{
    abi::{address::Family, counter::Reason},
    packet::{ACK, Kind, RST, SYN},
};

use super::{
    Context, Verdict, Work, is_balanced, request,
    tables::{Entry, FlowTable, Tables},
    track,
};

/// Decides on a packet that may come from a backend: one look-up, a second one only for
/// the packets that answer a TCP handshake.
#[inline(always)]
pub(crate) fn decide<F: Family, T: Tables<F>>(
    context: &Context<F>,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> Verdict {
    let packet = context.packet;
    if !is_balanced(packet.kind) {
        return Verdict::Pass(Reason::NoFlow);
    }
    let flags = packet.detail;
    let handshake =
        matches!(packet.kind, Kind::Tcp) && (flags & (SYN | ACK) == SYN | ACK || flags & RST != 0);
    let mut table = FlowTable::Flows;
    let mut found = tables.flow(table, &packet.key);
    if found.is_none() && handshake {
        table = FlowTable::Embryonic;
        found = tables.flow(table, &packet.key);
    }
    let Some(entry) = found else { return Verdict::Pass(Reason::NoFlow) };
    let flow = entry.get();
    if !flow.action.is_reply()
        || track::is_expired(flow, packet.kind, context.now, context.settings)
    {
        return Verdict::Pass(Reason::NoFlow);
    }
    if handshake && packet.detail & SYN != 0 && track::is_closed(flow.state) {
        // The answer to another connection: the client has gone to the backend itself,
        // from the same port.
        work.flow.set(flow);
        request::forget(table, &packet.key, work, tables);
        return Verdict::Pass(Reason::NoFlow);
    }
    track::note(context, table, &entry, flow, work, tables);
    request::translate(flow, Reason::Reply, work)
}
