//! Which backend a new flow gets.

use crate::{
    abi::{
        address::{Address, Family},
        affinity::{Affinity, AffinityKey, BY_ADDRESS, BY_NETNS, BY_SOCKET},
        backend::{Backend, IN_CLUSTER_SET, IN_LOCAL_SET},
        counter::Reason,
        flow::ANSWERED,
        frontend::FrontendKind,
        service::Service,
        settings::Settings,
    },
    packet::PacketKind,
};

use super::{
    tables::{Entry, Tables},
    track,
    types::{Eligible, Origin},
};

/// Who asks, as far as keeping to a backend is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Client<A> {
    /// A packet's source address.
    Address(A),
    /// The cookie of the network namespace of a socket.
    Netns(u64),
    /// The cookie of a datagram socket: its datagrams keep to one backend as those of a
    /// flow do, with or without session affinity.
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

    /// How long the client keeps to its backend, in ticks; 0 = not at all.
    #[inline(always)]
    fn lifetime(self, service: &Service, settings: &Settings) -> u32 {
        match self {
            Self::Socket(_) => track::lifetime(PacketKind::Udp, ANSWERED, settings),
            // 24.8 days at 1,000 ticks a second; the API allows a day.
            _ => service.affinity_seconds.wrapping_mul(settings.ticks_per_second),
        }
    }

    /// Whether the client may keep to `backend`: affinity only to one that a new client
    /// could be given, a datagram flow to any that is in a slice.
    #[inline(always)]
    fn keeps<B>(self, backend: &Backend<B>, bound: &Affinity, eligible: Eligible) -> bool {
        backend.generation as u32 == bound.generation
            && (matches!(self, Self::Socket(_)) || backend.sets & eligible.set != 0)
    }
}

/// The set that a client gets at a front end of this kind, or why it gets none.
#[inline(always)]
pub fn eligible(service: &Service, kind: FrontendKind, origin: Origin) -> Result<Eligible, Reason> {
    let policy = match (kind.is_internal(), origin) {
        (true, _) => Service::INTERNAL_LOCAL,
        (false, Origin::Outside) => Service::EXTERNAL_LOCAL,
        // Clients inside the cluster take the short way to where the traffic from outside
        // may end.
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

/// What a backend is chosen for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Choice<A> {
    /// Index into SERVICES.
    pub(crate) index: u32,
    pub(crate) service: Service,
    pub(crate) eligible: Eligible,
    pub(crate) client: Client<A>,
}

/// Chooses: the backend that the client keeps to, else any with equal chance. Returns its
/// id.
#[inline(never)]
pub(crate) fn choose<F: Family, T: Tables<F>>(
    choice: &Choice<F::Address>,
    settings: &Settings,
    tables: &mut T,
) -> Option<u32> {
    let lifetime = choice.client.lifetime(&choice.service, settings);
    if lifetime == 0 {
        return any(choice, tables);
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
    let id = any(choice, tables)?;
    let generation = tables.backend(id)?.generation as u32;
    let bound = Affinity { backend: id, generation, last_seen: now };
    match entry {
        Some(entry) => entry.store(bound),
        None => tables.bind(&key, &bound),
    }
    Some(id)
}

/// Any backend with equal chance; returns its id. A slot may point, for the moment between
/// two stores of the agent, to a backend that has just left: then its neighbour is taken.
#[inline(never)]
fn any<F: Family, T: Tables<F>>(choice: &Choice<F::Address>, tables: &mut T) -> Option<u32> {
    const ATTEMPTS: u32 = 2;
    let Eligible { range, set } = choice.eligible;
    let mut position = ((tables.random() as u64 * range.length() as u64) >> 32) as u32;
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
