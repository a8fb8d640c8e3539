//! New flows, and what is no flow at all, addressed to a Service.

use crate::{
    abi::{
        address::{Address, Be16, Family},
        backend::{Backend, ON_THIS_NODE, THIS_HOST},
        counter::Reason,
        flow::{ANSWERED, Action, LOOPBACK_DEVICE, NextHop, ONE_WAY},
        frontend::{Frontend, FrontendKey, FrontendKind},
        service::Service,
        traffic::NO_SERVICE,
    },
    packet::Kind,
};

use super::{
    Answer, Context, Origin, Site, Verdict, Work,
    select::{self, Choice, Client},
    tables::{Entry, FlowTable, InsertError, Tables},
    track, tunnel,
};

/// A new flow: finds the Service, chooses a backend and remembers both directions.
///
/// The steps are functions of their own, called one after the other and not from one
/// another, as the stack of the programs is small.
#[inline(always)]
pub(crate) fn decide<F: Family, T: Tables<F>>(
    context: &Context<F>,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> Verdict {
    let opened = find(context, work, tables)
        .and_then(|()| choose(context, work, tables))
        .and_then(|()| flow_to(context, work, tables))
        .and_then(|()| enter(context, work, tables));
    match opened {
        Ok(()) => onward(context, work),
        Err(reason) => ended(context.packet.kind, reason),
    }
}

/// What becomes of a packet that opened no flow.
#[inline(always)]
fn ended(kind: Kind, reason: Reason) -> Verdict {
    match reason {
        Reason::UnknownAddress | Reason::MartianSource => Verdict::Pass(reason),
        Reason::NoSuchPort | Reason::NoEndpoint | Reason::NoSourcePort => match kind {
            Kind::Tcp => Verdict::Answer(Answer::Reset, reason),
            _ => Verdict::Answer(Answer::PortUnreachable, reason),
        },
        _ => Verdict::Drop(reason),
    }
}

/// Finds front end and Service: `work.frontend`, `work.service` and `work.eligible`.
#[inline(never)]
fn find<F: Family, T: Tables<F>>(
    context: &Context<F>,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> Result<(), Reason> {
    let tuple = context.packet.tuple();
    work.index = NO_SERVICE;
    if !tunnel::front_end(context, work, tables) {
        return Err(match tables.frontend(&FrontendKey::of_address(tuple.destination)) {
            Some(_) => Reason::NoSuchPort,
            None => Reason::UnknownAddress,
        });
    }
    if matches!(context.site, Site::FromDevice)
        && (F::is_martian(tuple.source) || context.family().is_node(tuple.source))
    {
        return Err(Reason::MartianSource);
    }
    let frontend = work.frontend;
    work.index = frontend.service;
    let service = tables.service(frontend.service).ok_or(Reason::TableInconsistent)?;
    if frontend.flags & Frontend::RANGED != 0
        && !tables.is_in_range(frontend.service, &tuple.source)
    {
        return Err(Reason::SourceNotAllowed);
    }
    work.eligible = select::eligible(&service, frontend.kind, context.origin())?;
    work.service = service;
    Ok(())
}

/// Chooses a backend: `work.flow.backend`.
#[inline(never)]
fn choose<F: Family, T: Tables<F>>(
    context: &Context<F>,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> Result<(), Reason> {
    let client = Client::Address(context.packet.tuple().source);
    let (index, eligible) = (work.frontend.service, work.eligible);
    let choice = Choice { index, service: work.service, eligible, client };
    work.flow.backend =
        select::choose(&choice, context.settings, tables).ok_or(Reason::TableInconsistent)?;
    Ok(())
}

/// Adds the new flow `work.flow`, from a port of its own if it can't keep the client's.
#[inline(never)]
fn enter<F: Family, T: Tables<F>>(
    context: &Context<F>,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> Result<(), Reason> {
    if work.needs_port != 0 && !draw_port(context, work, tables) {
        return Err(Reason::NoSourcePort);
    }
    prepare_pair(context, work);
    match add(context, work, tables) {
        Err(InsertError::Exists) if find_port(context, work, tables) => {
            prepare_pair(context, work);
            insert_pair(table_of(context), context, false, work, tables)
        }
        result => result,
    }
    .map_err(|error| match error {
        InsertError::Exists => Reason::NoSourcePort,
        InsertError::Full => Reason::FlowTableFull,
    })
}

/// Where a new flow is kept: TCP in the table of handshakes, everything else is established
/// at once.
#[inline(always)]
fn table_of<F: Family>(context: &Context<F>) -> FlowTable {
    match context.packet.kind {
        Kind::Tcp => FlowTable::Embryonic,
        _ => FlowTable::Flows,
    }
}

/// How many source ports are looked at in search of a free one. Where seven in ten are
/// taken, all of them are once in three million flows.
const ATTEMPTS: u32 = 42;

/// Gives the new flow a source port of this node's, any. Returns whether there is one.
#[inline(always)]
fn draw_port<F: Family, T: Tables<F>>(
    context: &Context<F>,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> bool {
    let ports = context.settings.source_ports;
    if ports.count == 0 {
        return false;
    }
    let offset = (tables.random() as u64 * ports.count as u64) >> 32;
    work.flow.rewrite.source_port = Be16::new(ports.first.wrapping_add(offset as u16));
    work.pair_key.set_pair(&work.flow.rewrite, context.packet.key.protocol);
    true
}

/// Gives the new flow a source port of this node's that is free. Returns whether one was
/// found.
#[inline(never)]
fn find_port<F: Family, T: Tables<F>>(
    context: &Context<F>,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> bool {
    let mut attempt = 0;
    while attempt < ATTEMPTS && draw_port(context, work, tables) {
        if tables.flow(FlowTable::Flows, &work.pair_key).is_none()
            && tables.flow(FlowTable::Embryonic, &work.pair_key).is_none()
        {
            return true;
        }
        attempt += 1;
    }
    false
}

#[inline(always)]
fn onward<F: Family>(context: &Context<F>, work: &mut Work<F::Address>) -> Verdict {
    if context.is_last_hop(work.flow.action) {
        return Verdict::Answer(Answer::TimeExceeded, Reason::TtlExceeded);
    }
    work.rewrite.set(&work.flow.rewrite);
    (work.action, work.device) = (work.flow.action, work.flow.device);
    work.next_hop = NextHop::UNKNOWN;
    Verdict::Translate(Reason::FlowCreated)
}

/// How a new flow reaches its backend.
struct Way {
    action: Action,
    device: u32,
    /// What the backend sees as the client's address, if not the client's.
    source: Source,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    /// The client's address.
    Client,
    /// The node's address, the client's port.
    Hairpin,
    /// The node's address and a port of the node's.
    Node,
    /// The client's, in a tunnel from the node's address.
    Tunnel,
}

/// The way to a backend with these flags (see semantics.md, table 3).
#[inline(always)]
fn way<F: Family, T: Tables<F>>(
    context: &Context<F>,
    kind: FrontendKind,
    service: &Service,
    backend: &Backend<F::Address>,
    tables: &mut T,
) -> Option<Way> {
    let is_host = backend.flags & THIS_HOST != 0;
    let is_here = backend.flags & ON_THIS_NODE != 0 || is_host;
    let way = |action, device, source| Some(Way { action, device, source });
    match context.site {
        Site::ToDevice { .. } if is_host => way(Action::REQUEST_LOOPBACK, 0, Source::Client),
        Site::ToDevice { ifindex, .. } => {
            way(Action::REQUEST_ROUTE, tables.device(ifindex)?, Source::Client)
        }
        Site::Loopback => {
            // A process that asks for an address held by this node has that address as
            // its source. But for a node port's, other nodes may hold it as well, and the
            // answers would go to them.
            let tuple = context.packet.tuple();
            let is_shared = tuple.source == tuple.destination && kind != FrontendKind::NODE_PORT;
            let is_own = !is_shared && !F::is_loopback(tuple.source);
            let source = if is_own { Source::Client } else { Source::Node };
            match is_host {
                true => way(Action::REQUEST, 0, source),
                false => way(Action::REQUEST_ROUTE, LOOPBACK_DEVICE, source),
            }
        }
        Site::FromPod if backend.address == context.packet.tuple().source => {
            way(Action::REQUEST_HAIRPIN, 0, Source::Hairpin)
        }
        Site::FromDevice | Site::FromPod => {
            let keeps_client = match context.origin() {
                _ if kind.is_internal() && context.settings.masquerades_all() => false,
                Origin::Inside => true,
                // A pod's address is known to every node, a client's outside only to those
                // that its packets to a ClusterIP were routed to.
                Origin::Pod => is_here,
                Origin::Outside | Origin::Tunnel => is_here && !kind.is_internal(),
            };
            match (keeps_client, is_host) {
                (true, _) => way(Action::REQUEST, 0, Source::Client),
                (false, true) => way(Action::REQUEST_LOOPBACK, 0, Source::Node),
                (false, false)
                    if tunnel::is_wanted(context, service, kind, backend.node, tables) =>
                {
                    way(Action::REQUEST_TUNNEL, 0, Source::Tunnel)
                }
                (false, false) => way(Action::REQUEST_FORWARD, 0, Source::Node),
            }
        }
        Site::ToPod => None,
    }
}

/// Works out the request direction of a new flow, `work.flow`, of which the backend's id is
/// there.
#[inline(never)]
fn flow_to<F: Family, T: Tables<F>>(
    context: &Context<F>,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> Result<(), Reason> {
    let tuple = context.packet.tuple();
    let frontend = work.frontend;
    let backend = tables.backend(work.flow.backend).ok_or(Reason::TableInconsistent)?;
    let Way { action, device, source } =
        way(context, frontend.kind, &work.service, &backend, tables)
            .ok_or(Reason::TableInconsistent)?;
    let flow = &mut work.flow;
    flow.rewrite.source.set(&tuple.source);
    if source != Source::Client {
        let node = &context.family().node_source;
        if node.is_unspecified() {
            return Err(Reason::NoNodeAddress);
        }
        flow.rewrite.source.set(node);
    }
    flow.rewrite.destination.set(&backend.address);
    flow.rewrite.source_port = tuple.source_port;
    flow.rewrite.destination_port = backend.port;
    flow.state = 0;
    if source == Source::Tunnel {
        flow.rewrite.destination.set(&backend.node);
        flow.rewrite.source_port = Be16::new(0);
        flow.rewrite.destination_port = Be16::new(0);
        // Datagrams are taken for answered: nothing is going to tell.
        let is_tcp = matches!(context.packet.kind, Kind::Tcp);
        flow.state = if is_tcp { ONE_WAY } else { ONE_WAY | ANSWERED };
    }
    flow.action = action;
    flow.generation = backend.generation;
    flow.service = frontend.service;
    flow.last_seen = context.now;
    flow.device = device;
    flow.next_hop = NextHop::UNKNOWN;
    work.needs_port = u32::from(source == Source::Node);
    Ok(())
}

/// Works out the reply direction of `work.flow`.
#[inline(always)]
pub(crate) fn prepare_pair<F: Family>(context: &Context<F>, work: &mut Work<F::Address>) {
    let key = &context.packet.key;
    work.pair_key.set_pair(&work.flow.rewrite, key.protocol);
    work.pair.set(&work.flow);
    work.pair.rewrite.set_reverse(&key.tuple);
    work.pair.next_hop = NextHop::UNKNOWN;
    work.pair.action = reply_action(work.flow.action, context);
}

/// Adds both directions: the reply's first, so that no answer finds it missing. Answers that
/// go another way need none.
#[inline(never)]
pub(crate) fn insert_pair<F: Family, T: Tables<F>>(
    table: FlowTable,
    context: &Context<F>,
    replace: bool,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> Result<(), InsertError> {
    if !work.flow.action.is_one_way() {
        tables.insert_flow(table, &work.pair_key, &work.pair, replace)?;
    }
    tables.insert_flow(table, &context.packet.key, &work.flow, true)
}

#[inline(always)]
fn reply_action<F: Family>(request: Action, context: &Context<F>) -> Action {
    match (request, context.site) {
        (Action::REQUEST_ROUTE, _) => Action::REPLY_INTO_DEVICE,
        (Action::REQUEST_HAIRPIN, _) => Action::REPLY_HAIRPIN,
        (Action::REQUEST_FORWARD, _)
        | (Action::REQUEST_LOOPBACK, Site::FromDevice | Site::FromPod) => Action::REPLY_FORWARD,
        (Action::REQUEST, _) if context.is_tunnelled() => Action::REPLY_DIRECT,
        _ => Action::REPLY,
    }
}

/// Adds the new flow `work.flow` unless its reply's addresses and ports are taken.
#[inline(always)]
fn add<F: Family, T: Tables<F>>(
    context: &Context<F>,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> Result<(), InsertError> {
    let table = table_of(context);
    // A client has a port of its own for a backend nearly always (see `known`).
    if matches!(table, FlowTable::Embryonic)
        && work.needs_port | work.is_contested != 0
        && !release(context, FlowTable::Flows, work, tables)
    {
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
pub(crate) fn release<F: Family, T: Tables<F>>(
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
    let is_over = is_tcp && track::is_closed(found.state)
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

/// What Services do not carry, addressed to what may be a ClusterIP.
#[inline(never)]
pub(crate) fn not_balanced<F: Family, T: Tables<F>>(
    context: &Context<F>,
    tables: &mut T,
) -> Verdict {
    let packet = context.packet;
    if matches!(packet.kind, Kind::Malformed) {
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
