//! Packets towards a Service.

use crate::{
    abi::{
        address::{Address, Family},
        backend::THIS_HOST,
        counter::Reason,
        flow::{ANSWERED, Action, Flow, FlowKey},
        frontend::FrontendKey,
    },
    packet::{Kind, RST},
};

use super::{
    Answer, Context, Site, Verdict, Work, is_balanced,
    select::{self, Choice, Client},
    tables::{Entry, FlowTable, InsertError, Tables},
    track,
};

/// Decides on a packet whose destination may be a ClusterIP.
#[inline(always)]
pub(crate) fn decide<F: Family, T: Tables<F>>(
    context: &Context<F>,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> Verdict {
    let packet = context.packet;
    if !is_balanced(packet.kind) {
        return not_balanced(context, tables);
    }
    if let Some(entry) = tables.flow(FlowTable::Flows, &packet.key) {
        let flow = entry.get();
        if is_valid(context, flow, tables) {
            track::note(context, FlowTable::Flows, &entry, flow, work, tables);
            return translate(flow, Reason::Request, work);
        }
        if packet.is_syn() {
            work.flow.set(flow);
            forget(FlowTable::Flows, &packet.key, work, tables);
        }
    }
    if matches!(packet.kind, Kind::Tcp)
        && let Some(verdict) = handshake(context, work, tables)
    {
        return verdict;
    }
    open(context, work, tables)
}

/// A TCP packet of no established flow; `None` if it opens one.
#[inline(never)]
fn handshake<F: Family, T: Tables<F>>(
    context: &Context<F>,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> Option<Verdict> {
    let packet = context.packet;
    if let Some(entry) = tables.flow(FlowTable::Embryonic, &packet.key) {
        let flow = entry.get();
        if is_valid(context, flow, tables) {
            if packet.is_syn() || packet.detail & RST != 0 || flow.state != ANSWERED {
                track::note(context, FlowTable::Embryonic, &entry, flow, work, tables);
            } else {
                work.flow.set(flow);
                establish(context, work, tables);
            }
            return Some(translate(flow, Reason::Request, work));
        }
        work.flow.set(flow);
        forget(FlowTable::Embryonic, &packet.key, work, tables);
    }
    if packet.is_syn() { None } else { Some(Verdict::Pass(Reason::UnknownTcpFlow)) }
}

#[inline(always)]
pub(crate) fn translate<A: Address>(flow: &Flow<A>, reason: Reason, work: &mut Work<A>) -> Verdict {
    work.rewrite.set(&flow.rewrite);
    Verdict::Translate { action: flow.action, device: flow.device, reason }
}

/// Whether a flow still decides for this packet; else it counts as absent.
#[inline(always)]
fn is_valid<F: Family, T: Tables<F>>(
    context: &Context<F>,
    flow: &Flow<F::Address>,
    tables: &mut T,
) -> bool {
    let packet = context.packet;
    if flow.action.is_reply() || track::is_expired(flow, packet.kind, context.now, context.settings)
    {
        return false;
    }
    match packet.kind {
        Kind::Tcp => !packet.is_syn() || !(track::is_closing(flow.state) || is_gone(flow, tables)),
        // A datagram leaves a backend that is gone as soon as there is another one.
        _ => !is_gone(flow, tables) || !has_backend(context, tables),
    }
}

/// Whether the backend that a flow chose is in no slice any more.
#[inline(always)]
fn is_gone<F: Family, T: Tables<F>>(flow: &Flow<F::Address>, tables: &mut T) -> bool {
    match tables.backend(flow.backend) {
        Some(backend) => backend.generation != flow.generation,
        None => true,
    }
}

#[inline(always)]
fn has_backend<F: Family, T: Tables<F>>(context: &Context<F>, tables: &mut T) -> bool {
    let tuple = context.packet.tuple();
    let key =
        FrontendKey::new(tuple.destination, tuple.destination_port, context.packet.protocol());
    tables
        .frontend(&key)
        .and_then(|frontend| tables.service(frontend.service))
        .is_some_and(|service| select::eligible(&service).is_ok())
}

/// Removes both directions of the flow `work.flow`, one of which is `key`. The other may
/// have been lost and its place taken by another flow's: that one stays.
#[inline(never)]
pub(crate) fn forget<F: Family, T: Tables<F>>(
    table: FlowTable,
    key: &FlowKey<F::Address>,
    work: &mut Work<F::Address>,
    tables: &mut T,
) {
    tables.remove_flow(table, key);
    work.pair_key.set_pair(&work.flow.rewrite, key.protocol);
    if tables
        .flow(table, &work.pair_key)
        .is_some_and(|pair| pair.get().rewrite.is_reverse_of(&key.tuple))
    {
        tables.remove_flow(table, &work.pair_key);
    }
}

/// Moves the flow `work.flow`, whose handshake is complete, to the table of established
/// flows. If that takes no entry, the flow stays where it is.
#[inline(always)]
fn establish<F: Family, T: Tables<F>>(
    context: &Context<F>,
    work: &mut Work<F::Address>,
    tables: &mut T,
) {
    work.flow.last_seen = context.now;
    // The packet that completes the handshake may be the last one already.
    work.flow.state |= track::observed(context.packet.kind, context.packet.detail, false);
    prepare_pair(context, work);
    if insert_pair(FlowTable::Flows, context, true, work, tables).is_ok() {
        forget(FlowTable::Embryonic, &context.packet.key, work, tables);
    }
}

/// Works out the reply direction of `work.flow`.
#[inline(always)]
fn prepare_pair<F: Family>(context: &Context<F>, work: &mut Work<F::Address>) {
    let key = &context.packet.key;
    work.pair_key.set_pair(&work.flow.rewrite, key.protocol);
    work.pair.set(&work.flow);
    work.pair.rewrite.set_reverse(&key.tuple);
    work.pair.action = reply_action(work.flow.action);
}

/// Adds both directions: the reply's first, so that no answer finds it missing.
#[inline(never)]
fn insert_pair<F: Family, T: Tables<F>>(
    table: FlowTable,
    context: &Context<F>,
    replace: bool,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> Result<(), InsertError> {
    tables.insert_flow(table, &work.pair_key, &work.pair, replace)?;
    tables.insert_flow(table, &context.packet.key, &work.flow, true)
}

#[inline(always)]
fn reply_action(request: Action) -> Action {
    match request {
        Action::REQUEST_ROUTE => Action::REPLY_INTO_DEVICE,
        Action::REQUEST_HAIRPIN => Action::REPLY_HAIRPIN,
        _ => Action::REPLY,
    }
}

/// A new flow: finds the Service and chooses a backend. A function of its own, as what
/// it needs of the stack is of no use to packets of known flows.
#[inline(never)]
fn open<F: Family, T: Tables<F>>(
    context: &Context<F>,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> Verdict {
    let packet = context.packet;
    let tuple = packet.tuple();
    let frontend_key =
        FrontendKey::new(tuple.destination, tuple.destination_port, packet.protocol());
    let Some(frontend) = tables.frontend(&frontend_key) else {
        return match tables.frontend(&FrontendKey::of_address(tuple.destination)) {
            Some(_) => refuse(packet.kind, Reason::NoSuchPort),
            None => Verdict::Pass(Reason::UnknownAddress),
        };
    };
    let Some(service) = tables.service(frontend.service) else {
        return Verdict::Drop(Reason::TableInconsistent);
    };
    let eligible = match select::eligible(&service) {
        Ok(eligible) => eligible,
        Err(Reason::NoLocalEndpoint) => return Verdict::Drop(Reason::NoLocalEndpoint),
        Err(reason) => return refuse(packet.kind, reason),
    };
    let client = Client::Address(tuple.source);
    let choice = Choice { index: frontend.service, service, eligible, client };
    let Some(mut id) = select::choose(&choice, context.settings, tables) else {
        return Verdict::Drop(Reason::TableInconsistent);
    };
    let mut attempt = 0;
    while attempt < ATTEMPTS {
        if let Err(reason) = flow_to(context, choice.index, id, work, tables) {
            return Verdict::Drop(reason);
        }
        prepare_pair(context, work);
        match add(context, work, tables) {
            Ok(()) => {
                work.rewrite.set(&work.flow.rewrite);
                let (action, device) = (work.flow.action, work.flow.device);
                return Verdict::Translate { action, device, reason: Reason::FlowCreated };
            }
            Err(InsertError::Full) => return Verdict::Drop(Reason::FlowTableFull),
            Err(InsertError::Exists) => {}
        }
        attempt += 1;
        match select::any(&choice, id, tables) {
            Some(other) => id = other,
            None => break,
        }
    }
    Verdict::Drop(Reason::ReplyTupleTaken)
}

/// How many backends a new flow tries when its client already talks, from the same
/// port, to the one it was given (by another front end).
const ATTEMPTS: u32 = 2;

/// Works out the request direction of a new flow, `work.flow`.
#[inline(never)]
fn flow_to<F: Family, T: Tables<F>>(
    context: &Context<F>,
    service: u32,
    id: u32,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> Result<(), Reason> {
    let tuple = context.packet.tuple();
    let backend = tables.backend(id).ok_or(Reason::TableInconsistent)?;
    let mut source = tuple.source;
    let (action, device) = match context.site {
        Site::ToDevice { ifindex, .. } if backend.flags & THIS_HOST == 0 => {
            (Action::REQUEST_ROUTE, tables.device(ifindex).ok_or(Reason::TableInconsistent)?)
        }
        Site::ToDevice { .. } => (Action::REQUEST_LOOPBACK, 0),
        _ if backend.address == tuple.source => {
            source = context.family().node_source;
            if source.is_unspecified() {
                return Err(Reason::NoNodeAddress);
            }
            (Action::REQUEST_HAIRPIN, 0)
        }
        _ => (Action::REQUEST, 0),
    };
    let flow = &mut work.flow;
    flow.rewrite.source.set(&source);
    flow.rewrite.destination.set(&backend.address);
    flow.rewrite.source_port = tuple.source_port;
    flow.rewrite.destination_port = backend.port;
    flow.action = action;
    flow.state = 0;
    flow.generation = backend.generation;
    flow.backend = id;
    flow.service = service;
    flow.last_seen = context.now;
    flow.device = device;
    Ok(())
}

/// Adds the new flow `work.flow` unless its reply's addresses and ports are taken: TCP
/// goes to the table of handshakes, everything else is established at once.
#[inline(always)]
fn add<F: Family, T: Tables<F>>(
    context: &Context<F>,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> Result<(), InsertError> {
    let is_tcp = matches!(context.packet.kind, Kind::Tcp);
    let table = if is_tcp { FlowTable::Embryonic } else { FlowTable::Flows };
    if is_tcp && !release(context, FlowTable::Flows, work, tables) {
        return Err(InsertError::Exists);
    }
    match insert_pair(table, context, false, work, tables) {
        Err(InsertError::Exists) if release(context, table, work, tables) => {
            insert_pair(table, context, true, work, tables)
        }
        result => result,
    }
}

/// Makes room for the reply direction of `work.flow`: what stands there goes if it is
/// over, or is left of an earlier flow of this very key. Returns whether the place is
/// free, or may be overwritten.
#[inline(never)]
fn release<F: Family, T: Tables<F>>(
    context: &Context<F>,
    table: FlowTable,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> bool {
    let Some(entry) = tables.flow(table, &work.pair_key) else { return true };
    let found = entry.get();
    let kind = context.packet.kind;
    let is_tcp = matches!(kind, Kind::Tcp);
    if found.rewrite.is_reverse_of(context.packet.tuple()) {
        // The new flow's entries are going to stand in the other table.
        if is_tcp && matches!(table, FlowTable::Flows) {
            tables.remove_flow(table, &work.pair_key);
        }
        return true;
    }
    let is_over = is_tcp && track::is_closing(found.state)
        || track::is_expired(found, kind, context.now, context.settings);
    if is_over {
        let protocol = work.pair_key.protocol;
        // The request direction of what stands there, by way of the room for ours, which
        // is worked out again below. That flow may have moved to another backend since.
        work.pair.rewrite.set(&found.rewrite);
        tables.remove_flow(table, &work.pair_key);
        work.pair_key.set_pair(&work.pair.rewrite, protocol);
        if tables
            .flow(table, &work.pair_key)
            .is_some_and(|request| request.get().rewrite == work.flow.rewrite)
        {
            tables.remove_flow(table, &work.pair_key);
        }
        prepare_pair(context, work);
    }
    is_over
}

/// There is nothing to connect to.
#[inline(always)]
fn refuse(kind: Kind, reason: Reason) -> Verdict {
    match kind {
        Kind::Tcp => Verdict::Answer(Answer::Reset, reason),
        _ => Verdict::Answer(Answer::PortUnreachable, reason),
    }
}

/// What Services do not carry, addressed to what may be a ClusterIP.
#[inline(never)]
fn not_balanced<F: Family, T: Tables<F>>(context: &Context<F>, tables: &mut T) -> Verdict {
    let packet = context.packet;
    if matches!(packet.kind, Kind::Malformed) {
        return Verdict::Pass(Reason::Malformed);
    }
    let Some(frontend) = tables.frontend(&FrontendKey::of_address(packet.tuple().destination))
    else {
        return Verdict::Pass(Reason::UnknownAddress);
    };
    match packet.kind {
        Kind::Fragment => Verdict::Drop(Reason::Fragment),
        Kind::Icmp if F::is_icmp_error(packet.detail) => Verdict::Drop(Reason::IcmpError),
        Kind::Icmp if packet.detail == F::ECHO_REQUEST => match tables.service(frontend.service) {
            Some(service) if service.cluster.length() > 0 => {
                Verdict::Answer(Answer::Echo, Reason::EchoAnswered)
            }
            _ => Verdict::Answer(Answer::PortUnreachable, Reason::NoEndpoint),
        },
        _ => Verdict::Answer(Answer::ProtocolUnreachable, Reason::NoSuchProtocol),
    }
}
