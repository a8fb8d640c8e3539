//! Removes flows that expired long ago, and counts the entries of the maps.
//!
//! The programs decide by themselves whether an entry has expired. The sweep only frees room, and
//! waits for twice the timeout, so that it never races with a packet.

use std::{io, os::fd::AsFd, thread, time::Duration};

use bytemuck::Pod;
use lb_common::{
    abi::{
        address::{Address, Address4, Address6},
        affinity::{Affinity, AffinityKey, BY_SOCKET},
        flow::{Flow, FlowKey},
        frontend::TCP,
        service::Service,
        settings::{Settings, Timeouts},
        socket::{DatagramKey, Peer},
    },
    balance::track,
    packet::PacketKind,
};
use lb_sys::{PerCpuCounters, TypedMap};

use super::{
    mapped::MappedArray,
    pins::{PinError, Pins},
    read::opened,
    timeouts,
};

/// The pause between two batches, so that a sweep of a full table does not occupy a CPU.
const PAUSE: Duration = Duration::from_millis(2);

/// How long a connection that both sides have closed may still need translation: see
/// [`Sweeper::live`].
const CLOSED_SECONDS: u32 = 2;

/// The maps that the programs fill.
pub struct Sweeper {
    flows4: TypedMap<FlowKey<Address4>, Flow<Address4>>,
    flows6: TypedMap<FlowKey<Address6>, Flow<Address6>>,
    embryonic4: TypedMap<FlowKey<Address4>, Flow<Address4>>,
    embryonic6: TypedMap<FlowKey<Address6>, Flow<Address6>>,
    affinity: TypedMap<AffinityKey, Affinity>,
    datagram_peers: TypedMap<DatagramKey, Peer>,
    services: MappedArray<Service>,
    clock: std::os::fd::OwnedFd,
}

/// The fill of a map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapFill {
    /// The map's name.
    pub map: &'static str,
    /// The number of entries.
    pub entries: u64,
    /// The capacity.
    pub max_entries: u64,
    /// The number of entries that this sweep removed.
    pub removed: u64,
}

impl Sweeper {
    /// Opens the pinned maps.
    ///
    /// # Errors
    /// [`PinError`] if one is missing or of another layout.
    pub fn open(pins: &Pins) -> Result<Self, PinError> {
        let path = pins.clock();
        Ok(Self {
            flows4: opened(pins, "FLOWS4", TypedMap::new)?,
            flows6: opened(pins, "FLOWS6", TypedMap::new)?,
            embryonic4: opened(pins, "EMBRYONIC4", TypedMap::new)?,
            embryonic6: opened(pins, "EMBRYONIC6", TypedMap::new)?,
            affinity: opened(pins, "AFFINITY", TypedMap::new)?,
            datagram_peers: opened(pins, "DATAGRAM_PEERS", TypedMap::new)?,
            services: opened(pins, "SERVICES", MappedArray::readable)?,
            clock: lb_sys::obj_get(&path).map_err(|source| PinError::Open { path, source })?,
        })
    }

    /// Sweeps every map once. Blocking.
    ///
    /// # Errors
    /// Those of the bpf(2) calls.
    pub fn sweep(
        &mut self,
        timeouts: &Timeouts,
        ticks_per_second: u32,
    ) -> io::Result<Vec<MapFill>> {
        let now = lb_sys::ticks_now(self.clock.as_fd())?;
        let is_old = |limit: u32, last_seen: u32| is_past(now, last_seen, limit);
        let mut fills = vec![
            sweep_flows("FLOWS4", &self.flows4, &is_old, timeouts)?,
            sweep_flows("FLOWS6", &self.flows6, &is_old, timeouts)?,
            sweep_flows("EMBRYONIC4", &self.embryonic4, &is_old, timeouts)?,
            sweep_flows("EMBRYONIC6", &self.embryonic6, &is_old, timeouts)?,
        ];
        let services = &mut self.services;
        fills.push(sweep_map("AFFINITY", &self.affinity, |key, entry| {
            let limit = match key.kind {
                // A datagram socket keeps its backend for as long as a UDP flow does.
                BY_SOCKET => timeouts.udp_stream,
                // An index out of range belongs to no Service: the entry has expired.
                _ => services
                    .load(key.service)
                    .map_or(0, |service| service.affinity_seconds)
                    .saturating_mul(ticks_per_second),
            };
            is_old(limit, entry.last_seen)
        })?);
        fills.push(sweep_map("DATAGRAM_PEERS", &self.datagram_peers, |_, _| false)?);
        Ok(fills)
    }
}

impl Sweeper {
    /// The number of flows that the programs would find, counted by their request entries. A
    /// connection that both sides have closed no longer counts once it was idle for
    /// `CLOSED_SECONDS`; the programs keep it for longer, in case its last packet was lost.
    ///
    /// # Errors
    /// Those of the bpf(2) calls.
    pub fn live(&self, settings: &Settings) -> io::Result<u64> {
        let now = lb_sys::ticks_now(self.clock.as_fd())?;
        let closed = settings.ticks_per_second.saturating_mul(CLOSED_SECONDS);
        let age = |last_seen: u32| {
            let age = now.wrapping_sub(last_seen);
            if age < 1 << 31 { age } else { 0 }
        };
        let is_live = |protocol: u32, state: u8, last_seen: u32| {
            let is_tcp = protocol == u32::from(TCP);
            let kind = if is_tcp { PacketKind::Tcp } else { PacketKind::Udp };
            let most = if is_tcp && track::is_closed(state) { closed } else { u32::MAX };
            age(last_seen) <= track::lifetime(kind, state, settings).min(most)
        };
        let mut live = 0;
        live += live_flows(&self.flows4, &is_live)? + live_flows(&self.flows6, &is_live)?;
        live += live_flows(&self.embryonic4, &is_live)? + live_flows(&self.embryonic6, &is_live)?;
        Ok(live)
    }

    /// Removes the request entries of all flows but those of TCP, so that each counts as new with its
    /// client's next datagram. Answers that are under way find their entries.
    ///
    /// # Errors
    /// Those of the bpf(2) calls.
    pub fn evict_datagram_requests(&self) -> io::Result<()> {
        evict_datagram_requests("FLOWS4", &self.flows4)?;
        evict_datagram_requests("FLOWS6", &self.flows6)
    }
}

fn evict_datagram_requests<A: Address>(
    name: &'static str,
    map: &TypedMap<FlowKey<A>, Flow<A>>,
) -> io::Result<()> {
    let is_request = |key: &FlowKey<A>, flow: &Flow<A>| {
        key.protocol != u32::from(TCP) && !flow.action.is_reply()
    };
    sweep_map(name, map, is_request).map(drop)
}

/// Counts live flows. A flow is live if either of its entries is.
fn live_flows<A: Address>(
    map: &TypedMap<FlowKey<A>, Flow<A>>,
    is_live: &impl Fn(u32, u8, u32) -> bool,
) -> io::Result<u64> {
    let mut live = 0;
    map.visit(|keys, values| {
        let requests = keys.iter().zip(values).filter(|(_, flow)| !flow.action.is_reply());
        let found = requests.filter(|(key, flow)| {
            let is_live = |flow: &Flow<A>| is_live(key.protocol, flow.state, flow.last_seen);
            is_live(flow)
                || map
                    .get(&reverse_key(key, flow))
                    .is_ok_and(|reverse| reverse.is_some_and(|reverse| is_live(&reverse)))
        });
        live += found.count() as u64;
        true
    })?;
    Ok(live)
}

/// The key of the reverse entry.
fn reverse_key<A: Address>(key: &FlowKey<A>, flow: &Flow<A>) -> FlowKey<A> {
    FlowKey { tuple: flow.rewrite.reversed(), protocol: key.protocol }
}

/// COUNTERS, summed over the CPUs; the index is
/// [`Hook::counter`](lb_common::abi::counter::Hook::counter).
///
/// # Errors
/// [`PinError`] if the map is missing or cannot be read.
pub fn counters(pins: &Pins) -> Result<Vec<u64>, PinError> {
    opened(pins, "COUNTERS", |map| PerCpuCounters::new(map)?.sums())
}

fn sweep_flows<A: Address>(
    name: &'static str,
    map: &TypedMap<FlowKey<A>, Flow<A>>,
    is_old: &impl Fn(u32, u32) -> bool,
    timeouts: &Timeouts,
) -> io::Result<MapFill> {
    sweep_map(name, map, |key, flow| {
        let is_tcp = key.protocol == u32::from(TCP);
        let is_expired =
            |flow: &Flow<A>| is_old(track::timeout(is_tcp, flow.state, timeouts), flow.last_seen);
        if !is_expired(flow) {
            return false;
        }
        if flow.action.is_one_way() {
            return true;
        }
        // One direction may be idle while the other is not.
        !matches!(map.get(&reverse_key(key, flow)), Ok(Some(reverse)) if !is_expired(&reverse))
    })
}

/// Removes the expired entries of `map`, batch by batch.
fn sweep_map<K: Pod, V: Pod>(
    name: &'static str,
    map: &TypedMap<K, V>,
    mut is_expired: impl FnMut(&K, &V) -> bool,
) -> io::Result<MapFill> {
    let (mut seen, mut removed) = (0u64, 0u64);
    let mut failure = None;
    map.visit(|keys, values| {
        seen += keys.len() as u64;
        let expired: Vec<K> = keys
            .iter()
            .zip(values)
            .filter(|(key, value)| is_expired(key, value))
            .map(|(key, _)| *key)
            .collect();
        for key in &expired {
            match remove_if(map, key, &mut is_expired) {
                Ok(is_removed) => removed += u64::from(is_removed),
                Err(error) => failure = Some(error),
            }
        }
        if keys.len() == lb_sys::BATCH {
            thread::sleep(PAUSE);
        }
        failure.is_none()
    })?;
    failure.map_or(Ok(()), Err)?;
    let max_entries = map.max_entries().into();
    Ok(MapFill { map: name, entries: seen.saturating_sub(removed), max_entries, removed })
}

/// Removes an entry if it is still expired: a packet may have refreshed it since its batch was
/// read.
fn remove_if<K: Pod, V: Pod>(
    map: &TypedMap<K, V>,
    key: &K,
    mut is_expired: impl FnMut(&K, &V) -> bool,
) -> io::Result<bool> {
    match map.get(key)? {
        Some(value) if is_expired(key, &value) => map.remove(key),
        _ => Ok(false),
    }
}

/// Whether more than twice `timeout` has passed since `last_seen`. An entry that a packet refreshed
/// after `now` was read has `last_seen` in the future, and has not expired.
fn is_past(now: u32, last_seen: u32, timeout: u32) -> bool {
    let age = now.wrapping_sub(last_seen);
    age < 1 << 31 && age > timeout.min(timeouts::LONGEST) * 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_old_past_twice_its_timeout_also_across_the_wrap_of_the_clock() {
        assert!(!is_past(1000, 900, 50));
        assert!(is_past(1001, 900, 50));
        assert!(is_past(50, u32::MAX - 51, 50));
        assert!(!is_past(900, 901, 50), "refreshed after the clock was read");
        assert!(!is_past(u32::MAX, u32::MAX - timeouts::LONGEST, u32::MAX));
    }
}
