//! New flows to a Service.

use crate::{
    abi::{
        address::{Address, Be16, Family},
        backend::{Backend, ON_THIS_NODE, THIS_HOST},
        counter::{Class, Reason},
        flow::{ANSWERED, Action, LOOPBACK_DEVICE, NextHop, ONE_WAY},
        frontend::{Frontend, FrontendKey, FrontendKind},
        service::Service,
        traffic::NO_SERVICE,
    },
    packet::PacketKind,
};

use super::{
    entries, lookup,
    select::{self, Choice, Client},
    source_port::draw_port,
    tables::{InsertError, Search, Tables},
    tunnel,
    types::{Answer, Context, Origin, Site, Verdict, Work},
};

/// Opens a flow: finds the Service, chooses a backend and inserts the flow.
///
/// The steps are separate functions that are called one after the other, not from one another,
/// because the programs have a small stack.
#[inline(always)]
pub(crate) fn decide<F: Family, T: Tables<F>>(
    context: &Context<F>,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> Verdict {
    let opened = find_service(context, work, tables)
        .and_then(|()| choose_backend(context, work, tables))
        .and_then(|()| prepare_request(context, work, tables))
        .and_then(|()| insert(context, work, tables));
    match opened {
        Ok(()) => start(context, work),
        Err(reason) => not_opened(context.packet.kind, reason),
    }
}

/// The verdict on a packet that could not open a flow.
#[inline(always)]
fn not_opened(kind: PacketKind, reason: Reason) -> Verdict {
    match reason.class() {
        Class::Passed => Verdict::Pass(reason),
        Class::Refused if matches!(kind, PacketKind::Tcp) => Verdict::Answer(Answer::Reset, reason),
        Class::Refused => Verdict::Answer(Answer::PortUnreachable, reason),
        Class::Translated | Class::Answered | Class::Dropped | Class::Alarm => {
            Verdict::Drop(reason)
        }
    }
}

/// Finds the frontend and its Service: fills in `work.chosen`.
#[inline(never)]
fn find_service<F: Family, T: Tables<F>>(
    context: &Context<F>,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> Result<(), Reason> {
    let tuple = context.packet.tuple();
    work.out.index = NO_SERVICE;
    if !lookup::find_frontend(context, work, tables) {
        return Err(match tables.frontend(&FrontendKey::of_address(tuple.destination)) {
            Some(whole) if whole.kind == FrontendKind::CLUSTER_IP_ADDRESS => Reason::NoSuchPort,
            _ => Reason::UnknownAddress,
        });
    }
    if matches!(context.site, Site::FromDevice)
        && (F::is_martian(tuple.source) || context.family().is_node(tuple.source))
    {
        return Err(Reason::MartianSource);
    }
    let frontend = work.chosen.frontend;
    work.out.index = frontend.service;
    let service = tables.service(frontend.service).ok_or(Reason::TableInconsistent)?;
    if matches!(context.origin(), Origin::Tunnel) && service.flags & Service::DSR == 0 {
        return Err(Reason::UnaskedTunnel);
    }
    if frontend.flags & Frontend::RANGED != 0
        && !tables.is_in_range(frontend.service, &tuple.source)
    {
        return Err(Reason::SourceNotAllowed);
    }
    work.chosen.eligible = select::eligible(&service, frontend.kind, context.origin())?;
    work.chosen.service = service;
    Ok(())
}

/// Chooses a backend: fills in `work.scratch.new.flow.backend`.
#[inline(never)]
fn choose_backend<F: Family, T: Tables<F>>(
    context: &Context<F>,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> Result<(), Reason> {
    let client = Client::Address(context.packet.tuple().source);
    let (index, eligible) = (work.chosen.frontend.service, work.chosen.eligible);
    let choice = Choice { index, service: work.chosen.service, eligible, client };
    work.scratch.new.flow.backend =
        select::choose(&choice, context.settings, tables).ok_or(Reason::TableInconsistent)?;
    Ok(())
}

/// Inserts the new flow, with a source port of this node if it cannot keep its client's.
#[inline(always)]
fn insert<F: Family, T: Tables<F>>(
    context: &Context<F>,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> Result<(), Reason> {
    if work.scratch.needs_port != 0 && !draw_port(context, work, tables) {
        return Err(Reason::NoSourcePort);
    }
    entries::prepare(context, work);
    let (key, settings) = (&context.packet.key, context.settings);
    let mut result = tables.insert_flow(key, &mut work.scratch.new, settings);
    if matches!(result, Err(InsertError::Exists)) && entries::resolve(context, work, tables) {
        result = tables.insert_flow(key, &mut work.scratch.new, settings);
    }
    match result {
        Ok(()) => Ok(()),
        Err(InsertError::Full) => Err(Reason::FlowTableFull),
        Err(InsertError::Exists) => adopt(context, work, tables),
    }
}

/// Takes over the flow that another CPU has inserted for a packet like this one meanwhile.
#[inline(never)]
fn adopt<F: Family, T: Tables<F>>(
    context: &Context<F>,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> Result<(), Reason> {
    let scratch = &mut work.scratch;
    if !tables.flow(&context.packet.key, Search::Requests, &mut scratch.known) {
        return Err(Reason::NoSourcePort);
    }
    scratch.new.flow.set(&scratch.known.flow);
    Ok(())
}

#[inline(always)]
fn start<F: Family>(context: &Context<F>, work: &mut Work<F::Address>) -> Verdict {
    if context.is_ttl_exceeded(work.scratch.new.flow.action) {
        return Verdict::Answer(Answer::TimeExceeded, Reason::TtlExceeded);
    }
    work.out.rewrite.set(&work.scratch.new.flow.rewrite);
    (work.out.action, work.out.device) =
        (work.scratch.new.flow.action, work.scratch.new.flow.device);
    work.out.next_hop = NextHop::UNKNOWN;
    Verdict::Translate(Reason::FlowCreated)
}

/// How the requests of a new flow reach its backend.
struct RequestPath {
    action: Action,
    device: u32,
    /// The source address that the backend sees.
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
    /// The client's address, inside an outer header with the node's address.
    Tunnel,
}

/// How requests reach this backend from the packet's site, and whether they keep the client's
/// address (`docs/semantics.md`, section 3); `None` if the site has no path to a backend.
#[inline(always)]
fn path_to<F: Family, T: Tables<F>>(
    context: &Context<F>,
    kind: FrontendKind,
    service: &Service,
    backend: &Backend<F::Address>,
    tables: &mut T,
) -> Option<RequestPath> {
    let is_host = backend.flags & THIS_HOST != 0;
    let is_here = backend.flags & ON_THIS_NODE != 0 || is_host;
    let path = |action, device, source| Some(RequestPath { action, device, source });
    match context.site {
        Site::ToDevice { .. } if is_host => path(Action::REQUEST_LOOPBACK, 0, Source::Client),
        Site::ToDevice { ifindex, .. } => {
            path(Action::REQUEST_ROUTE, tables.device(ifindex)?, Source::Client)
        }
        Site::Loopback => {
            // A process that connects to an address of this node has that address as its source.
            // Unless it is a node port's, other nodes may have the address as well, and would get
            // the replies.
            let tuple = context.packet.tuple();
            let is_shared = tuple.source == tuple.destination && kind != FrontendKind::NODE_PORT;
            let is_own = !is_shared && !F::is_loopback(tuple.source);
            let source = if is_own { Source::Client } else { Source::Node };
            match is_host {
                true => path(Action::REQUEST, 0, source),
                false => path(Action::REQUEST_ROUTE, LOOPBACK_DEVICE, source),
            }
        }
        Site::FromPod if backend.address == context.packet.tuple().source => {
            path(Action::REQUEST_HAIRPIN, 0, Source::Hairpin)
        }
        Site::FromDevice | Site::FromPod => {
            let keeps_client = match context.origin() {
                _ if kind.is_internal() && context.settings.masquerades_all() => false,
                Origin::Inside => true,
                // The answers of a backend here leave by this node, whoever the client is. Without
                // SNAT the stack routes the request, so netfilter sees its client.
                Origin::Pod | Origin::Outside | Origin::Tunnel => is_here,
            };
            match (keeps_client, is_host) {
                (true, _) => path(Action::REQUEST, 0, Source::Client),
                (false, true) => path(Action::REQUEST_LOOPBACK, 0, Source::Node),
                (false, false)
                    if tunnel::must_encapsulate(context, service, kind, backend.node, tables) =>
                {
                    path(Action::REQUEST_TUNNEL, 0, Source::Tunnel)
                }
                (false, false) => path(Action::REQUEST_FORWARD, 0, Source::Node),
            }
        }
        Site::ToPod => None,
    }
}

/// Whether the source of a new flow depends on the route to its backend: it is an address of this
/// node, and the packets leave this node as they are then.
#[inline(always)]
fn is_source_by_route<F: Family>(context: &Context<F>, action: Action, source: Source) -> bool {
    context.settings.has_source_by_route()
        && match source {
            Source::Node => true,
            Source::Client => action == Action::REQUEST_ROUTE,
            Source::Hairpin | Source::Tunnel => false,
        }
}

/// Fills in the request direction of a new flow, `work.scratch.new.flow`, whose backend id must be set.
#[inline(never)]
fn prepare_request<F: Family, T: Tables<F>>(
    context: &Context<F>,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> Result<(), Reason> {
    let tuple = context.packet.tuple();
    let frontend = work.chosen.frontend;
    let backend = tables.backend(work.scratch.new.flow.backend).ok_or(Reason::TableInconsistent)?;
    let RequestPath { action, device, mut source } =
        path_to(context, frontend.kind, &work.chosen.service, &backend, tables)
            .ok_or(Reason::TableInconsistent)?;
    let flow = &mut work.scratch.new.flow;
    let route_source = &mut flow.rewrite.source;
    let has_route_source = is_source_by_route(context, action, source)
        && tables.route_source(&backend.address, route_source);
    if source == Source::Client {
        // The kernel chose the source of a node process for its route to the frontend.
        let is_right =
            !has_route_source || *route_source == tuple.source || !context.may_be_sent_by_node();
        if is_right {
            flow.rewrite.source.set(&tuple.source);
        } else {
            source = Source::Node;
        }
    } else if !has_route_source {
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
        // A UDP flow counts as answered from the start, because its replies do not pass this node.
        let is_tcp = matches!(context.packet.kind, PacketKind::Tcp);
        flow.state = if is_tcp { ONE_WAY } else { ONE_WAY | ANSWERED };
    }
    flow.action = action;
    flow.generation = backend.generation;
    flow.service = frontend.service;
    flow.last_seen = context.time();
    flow.device = device;
    flow.next_hop = NextHop::UNKNOWN;
    work.scratch.needs_port = u32::from(source == Source::Node);
    Ok(())
}
