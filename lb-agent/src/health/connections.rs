//! Which connections a listener keeps open, because any client may open some.
//!
//! Invariant: a new connection is always taken. If there is no room for it, the one that has been
//! idle longest is closed, of the same source if that has its share.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Connections of other machines and of pods that a listener keeps open.
pub(super) const OTHERS: usize = 256;
/// How many of them one address may have.
pub(super) const PER_SOURCE: usize = 16;
/// Connections of this node, among them kubelet's probes, for which nobody else takes room.
pub(super) const OWN: usize = 32;

/// Who opened a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// A process of this node.
    Own,
    /// Somebody at this address.
    Other(IpAddr),
}

impl Source {
    /// The source of a connection from `peer` to `local`. The kernel connects a process of this
    /// node to an address of this node from that address.
    pub(super) fn of(peer: SocketAddr, local: SocketAddr) -> Self {
        let (peer, local) = (peer.ip().to_canonical(), local.ip().to_canonical());
        if peer.is_loopback() || peer == local { Self::Own } else { Self::Other(peer) }
    }
}

/// The open connections of a listener; clones share them.
#[derive(Clone, Debug, Default)]
pub(super) struct Connections(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    next: u64,
    open: BTreeMap<u64, Open>,
}

#[derive(Debug)]
struct Open {
    source: Source,
    /// When it was opened, or last used.
    used_at: Instant,
    is_used: bool,
    evicted: CancellationToken,
}

/// A connection that is open until this is dropped.
#[derive(Debug)]
pub(super) struct Connection {
    connections: Connections,
    id: u64,
    /// Cancelled once the connection has to make room for another one.
    pub(super) evicted: CancellationToken,
}

impl Connections {
    /// Takes a connection, and evicts another one if there is no room.
    pub(super) fn open(&self, source: Source, now: Instant) -> Connection {
        let mut state = self.state();
        let is_own = |open: &Open| open.source == Source::Own;
        match source {
            Source::Own => state.make_room(OWN, is_own),
            Source::Other(_) => {
                state.make_room(PER_SOURCE, |open| open.source == source);
                state.make_room(OTHERS, |open| !is_own(open));
            }
        }
        let (id, evicted) = (state.next, CancellationToken::new());
        state.next += 1;
        let open = Open { source, used_at: now, is_used: false, evicted: evicted.clone() };
        state.open.insert(id, open);
        Connection { connections: self.clone(), id, evicted }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Evicts until one more of these fits.
    fn make_room(&mut self, limit: usize, is_one: impl Fn(&Open) -> bool) {
        while self.open.values().filter(|open| is_one(open)).count() >= limit {
            let those = self.open.iter().filter(|(_, open)| is_one(open));
            let Some((id, _)) = those.min_by_key(|(id, open)| (open.used_at, **id)) else { return };
            let id = *id;
            if let Some(open) = self.open.remove(&id) {
                open.evicted.cancel();
            }
        }
    }
}

impl Connection {
    /// A request came.
    pub(super) fn used(&self, now: Instant) {
        if let Some(open) = self.connections.state().open.get_mut(&self.id) {
            (open.used_at, open.is_used) = (now, true);
        }
    }

    /// Whether a request ever came.
    pub(super) fn is_used(&self) -> bool {
        self.connections.state().open.get(&self.id).is_some_and(|open| open.is_used)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.connections.state().open.remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn other(number: usize) -> Source {
        Source::Other([192, 0, 2, number as u8].into())
    }

    /// The positions of the connections that had to make room.
    fn evicted(connections: &[Connection]) -> Vec<usize> {
        let evicted = connections.iter().enumerate();
        let evicted = evicted.filter(|(_, connection)| connection.evicted.is_cancelled());
        evicted.map(|(position, _)| position).collect()
    }

    #[test]
    fn the_connection_that_is_idle_longest_makes_room() {
        let (connections, start) = (Connections::default(), Instant::now());
        let at = |second| start + Duration::from_secs(second);
        let open = |number: usize| connections.open(other(number % 32), at(number as u64));
        let mut all: Vec<_> = (0..OTHERS).map(open).collect();
        assert!(evicted(&all).is_empty());
        all[0].used(at(1_000));
        all.push(connections.open(other(99), at(1_001)));
        assert_eq!(evicted(&all), [1]);
        drop(all.pop());
        all.push(connections.open(other(99), at(1_002)));
        assert_eq!(evicted(&all), [1], "there was room");
    }

    #[test]
    fn a_source_takes_room_from_itself_once_it_has_its_share() {
        let (connections, now) = (Connections::default(), Instant::now());
        let first = connections.open(other(1), now);
        let greedy: Vec<_> = (0..PER_SOURCE + 3).map(|_| connections.open(other(2), now)).collect();
        assert_eq!(evicted(&greedy), [0, 1, 2]);
        assert!(!first.evicted.is_cancelled());
    }

    #[test]
    fn the_node_has_room_that_nobody_else_takes() {
        let (connections, now) = (Connections::default(), Instant::now());
        let own: Vec<_> = (0..OWN).map(|_| connections.open(Source::Own, now)).collect();
        let others: Vec<_> =
            (0..2 * OTHERS).map(|n| connections.open(other(n % 250), now)).collect();
        assert!(evicted(&own).is_empty());
        assert_eq!(evicted(&others).len(), OTHERS);
        let more = connections.open(Source::Own, now);
        assert_eq!(evicted(&own), [0]);
        assert!(!more.evicted.is_cancelled());
    }

    #[test]
    fn a_process_of_the_node_is_known_by_its_address() {
        for (peer, local, expected) in [
            ("127.0.0.1:1", "127.0.0.1:10256", Source::Own),
            ("[::1]:1", "[::1]:10256", Source::Own),
            ("192.0.2.1:1", "192.0.2.1:10256", Source::Own),
            ("[::ffff:192.0.2.1]:1", "[::ffff:192.0.2.1]:10256", Source::Own),
            ("[::ffff:127.0.0.1]:1", "[::ffff:127.0.0.1]:10256", Source::Own),
            ("[::ffff:192.0.2.7]:1", "[::ffff:192.0.2.1]:10256", other(7)),
            ("192.0.2.7:1", "192.0.2.1:10256", other(7)),
        ] {
            let [peer, local] = [peer, local].map(|text| text.parse().unwrap());
            assert_eq!(Source::of(peer, local), expected, "{peer} {local}");
        }
    }
}
