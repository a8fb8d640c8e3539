//! The choice of a backend for a new flow.

use crate::{
    abi::{
        address::{Address, Family},
        affinity::{Affinity, AffinityKey, BY_ADDRESS, BY_NETNS, BY_SOCKET},
        backend::{Backend, IN_CLUSTER_SET, IN_LOCAL_SET, NOT_SERVING},
        counter::Reason,
        flow::{Flow, STREAM},
        frontend::FrontendKind,
        service::Service,
        settings::Settings,
    },
    packet::PacketKind,
};

use super::{
    tables::{Entry, Tables},
    track,
    types::{Context, Eligible, Origin, Work},
};

/// The client by which a backend is remembered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Client<A> {
    /// A packet's source address.
    Address(A),
    /// The cookie of the network namespace of a socket.
    Netns(u64),
    /// The cookie of a datagram socket. Its datagrams go to one backend, like those of a flow, with
    /// or without session affinity.
    Socket(u64),
}

impl<A: Address> Client<A> {
    #[inline(always)]
    fn key(self, service: u32) -> AffinityKey {
        let halves = |cookie: u64| [cookie as u32, (cookie >> 32) as u32, 0, 0];
        let (kind, client) = match self {
            Self::Address(address) => (BY_ADDRESS, address.widened()),
            Self::Netns(cookie) => (BY_NETNS, halves(cookie)),
            Self::Socket(cookie) => (BY_SOCKET, halves(cookie)),
        };
        AffinityKey { service, kind, client }
    }

    /// How long the client keeps its backend, in ticks; 0 = it does not keep it.
    #[inline(always)]
    fn lifetime(self, service: &Service, settings: &Settings) -> u32 {
        match self {
            Self::Socket(_) => {
                track::lifetime(PacketKind::Udp, STREAM, settings) << (settings.time_shift & 31)
            }
            // Valid up to 24.8 days at 1,000 ticks a second; the Kubernetes API allows a day.
            _ => service.affinity_seconds.wrapping_mul(settings.ticks_per_second),
        }
    }

    /// Whether the client may keep `backend`. With session affinity it keeps only a backend that a
    /// new client could get; a datagram flow keeps every backend that serves.
    #[inline(always)]
    fn keeps<B>(self, backend: &Backend<B>, bound: &Affinity, eligible: Eligible) -> bool {
        backend.generation as u32 == bound.generation
            && match self {
                Self::Socket(_) => backend.flags & NOT_SERVING == 0,
                Self::Address(_) | Self::Netns(_) => backend.sets & eligible.set != 0,
            }
    }
}

/// The backends that a client may get at a frontend of this kind, or the reason why there are none.
#[inline(always)]
pub fn eligible(service: &Service, kind: FrontendKind, origin: Origin) -> Result<Eligible, Reason> {
    let policy = match (kind.is_internal(), origin) {
        (true, _) => Service::INTERNAL_LOCAL,
        (false, Origin::Outside) => Service::EXTERNAL_LOCAL,
        // docs/semantics.md, row 3.4b: a pod of another node that asks this one for a node port
        // came here for this node's endpoints.
        (false, Origin::Pod) if kind == FrontendKind::NODE_PORT => Service::EXTERNAL_LOCAL,
        // Other clients inside the cluster may get any backend at an external frontend, whatever
        // `externalTrafficPolicy` says, as with kube-proxy.
        (false, _) => 0,
    };
    let is_chosen = matches!(origin, Origin::Tunnel);
    let local = is_chosen || service.flags & policy != 0;
    let (range, set) =
        if local { (service.local, IN_LOCAL_SET) } else { (service.cluster, IN_CLUSTER_SET) };
    if range.length() > 0 {
        Ok(Eligible { range, set })
    } else if is_chosen || local && service.cluster.length() > 0 {
        Err(Reason::NoLocalEndpoint)
    } else {
        Err(Reason::NoEndpoint)
    }
}

/// The input of a choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Choice<A> {
    /// Index into SERVICES.
    pub(crate) index: u32,
    pub(crate) service: Service,
    pub(crate) eligible: Eligible,
    pub(crate) client: Client<A>,
}

/// Chooses the backend that the client keeps, else any backend with equal chance, but for one client
/// of a Service with session affinity always the same. Returns its id;
/// `None` if the tables are inconsistent.
#[inline(always)]
pub(crate) fn choose<F: Family, T: Tables<F>>(
    choice: &Choice<F::Address>,
    settings: &Settings,
    tables: &mut T,
) -> Option<u32> {
    let lifetime = choice.client.lifetime(&choice.service, settings);
    if lifetime == 0 {
        let start = tables.random();
        return any(choice, start, tables);
    }
    let now = tables.now();
    let key = choice.client.key(choice.index);
    let entry = tables.affinity(&key);
    if let Some(entry) = &entry {
        let bound = *entry.get();
        if !track::is_past(bound.last_seen, now, lifetime)
            && let Some(backend) = tables.backend(bound.backend)
            && backend.service == choice.index
            && choice.client.keeps(&backend, &bound, choice.eligible)
        {
            entry.store(Affinity { last_seen: now, ..bound });
            return Some(bound.backend);
        }
    }
    let start = match choice.client {
        // Another one in each period of the timeout, so that a client that comes back later may get
        // another backend.
        Client::Address(_) => tables.spread(&key, now.checked_div(lifetime).unwrap_or(0)),
        Client::Netns(_) | Client::Socket(_) => tables.random(),
    };
    let id = any(choice, start, tables)?;
    // A packet may be forged: its client is bound once the backend has answered, see `bind`. Until
    // then all its packets choose alike.
    if matches!(choice.client, Client::Address(_)) {
        return Some(id);
    }
    let generation = tables.backend(id)?.generation as u32;
    let bound = Affinity { backend: id, generation, last_seen: now };
    match entry {
        Some(entry) => entry.store(bound),
        None => tables.bind(&key, &bound),
    }
    Some(id)
}

/// Binds the client of the flow `work.scratch.known` to its backend, if its Service has session
/// affinity. The backend has answered, and of TCP the client has gone on: neither is forged.
#[inline(always)]
pub(crate) fn bind<F: Family, T: Tables<F>>(
    context: &Context<F>,
    work: &Work<F::Address>,
    tables: &mut T,
) {
    let flow = &work.scratch.known.flow;
    if let Some(service) = tables.service(flow.service)
        && service.affinity_seconds != 0
    {
        let tuple = context.packet.tuple();
        let is_reply = flow.action.is_reply();
        let client = if is_reply { &flow.rewrite.destination } else { &tuple.source };
        bind_to(client, flow, context, tables);
    }
}

/// Binds `client` to the backend of `flow`, unless it is bound to another that is there.
#[inline(never)]
fn bind_to<F: Family, T: Tables<F>>(
    client: &F::Address,
    flow: &Flow<F::Address>,
    context: &Context<F>,
    tables: &mut T,
) {
    let key = Client::Address(*client).key(flow.service);
    let (backend, generation) = (flow.backend, flow.generation as u32);
    let bound = Affinity { backend, generation, last_seen: context.now };
    let Some(entry) = tables.affinity(&key) else {
        tables.bind(&key, &bound);
        return;
    };
    let other = *entry.get();
    // In a set that the new backend is in too.
    let sets = tables.backend(backend).map_or(0, |found| found.sets);
    let is_there = tables
        .backend(other.backend)
        .is_some_and(|found| found.generation as u32 == other.generation && found.sets & sets != 0);
    let is_same = other.backend == backend && other.generation == generation;
    let Some(service) = tables.service(flow.service) else { return };
    let lifetime = service.affinity_seconds.wrapping_mul(context.settings.ticks_per_second);
    if is_same || !is_there || track::is_past(other.last_seen, context.now, lifetime) {
        entry.store(bound);
    }
}

/// Returns the id of the backend that the random number `start` stands for. Between two stores of the agent, a slot may
/// refer to a backend that has just left the set: then the backend of the next slot is taken.
#[inline(never)]
fn any<F: Family, T: Tables<F>>(
    choice: &Choice<F::Address>,
    start: u32,
    tables: &mut T,
) -> Option<u32> {
    const ATTEMPTS: u32 = 2;
    let Eligible { range, set } = choice.eligible;
    let mut position = ((start as u64 * range.length() as u64) >> 32) as u32;
    let mut attempt = 0;
    while attempt < ATTEMPTS {
        if position >= range.length() {
            position = 0;
        }
        let id = tables.slot(range.start().wrapping_add(position))?;
        let backend = tables.backend(id)?;
        if backend.service == choice.index && backend.sets & set != 0 {
            return Some(id);
        }
        position += 1;
        attempt += 1;
    }
    None
}
