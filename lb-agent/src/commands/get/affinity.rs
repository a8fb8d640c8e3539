//! Rows of `get affinity`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use lb_common::abi::{
    address::{Address4, Address6},
    affinity::{Affinity, AffinityKey, BY_NETNS, BY_SOCKET},
    backend::Backend,
};
use lb_sys::TypedMap;
use serde::Serialize;

use super::{
    GetError,
    clock::Clock,
    services::{ServiceNames, live_names},
};
use crate::maps::{
    pins::Pins,
    read::{opened, read_array, read_hash},
};

/// A client bound to a backend of a service port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct AffinityRow {
    /// The service port.
    pub service: String,
    /// The client's address, `netns:<cookie>` of its network namespace, or
    /// `socket:<cookie>` of a datagram socket, which keeps to one backend without
    /// session affinity too.
    pub client: String,
    /// `address:port` of the backend; null if its id means another backend now.
    pub backend: Option<String>,
    /// Index into BACKENDS4 or BACKENDS6.
    pub backend_id: u32,
    /// Seconds since the client last opened a flow; null if the clock cannot be read.
    pub idle_seconds: Option<u32>,
}

/// The rows of `get affinity`.
pub(super) fn affinity(pins: &Pins) -> Result<Vec<AffinityRow>, GetError> {
    let clock = Clock::open(pins)?;
    let names = live_names(pins)?;
    let is_ipv6 =
        |service: u32| names.iter().any(|(index, name)| *index == service && name.family == 6);
    let backends4 = read_array::<Backend<Address4>>(pins, "BACKENDS4")?;
    let backends6 = read_array::<Backend<Address6>>(pins, "BACKENDS6")?;
    let map = opened(pins, "AFFINITY", TypedMap::<AffinityKey, Affinity>::new)?;
    let texts = ServiceNames::new(&names);
    let mut rows: Vec<AffinityRow> = read_hash(&map, "AFFINITY")?
        .iter()
        .map(|(key, entry)| {
            let is_ipv6 = is_ipv6(key.service);
            let id = entry.backend as usize;
            let backend = if is_ipv6 {
                backends6.get(id).and_then(|backend| held(backend, entry, Ipv6Addr::from))
            } else {
                backends4.get(id).and_then(|backend| held(backend, entry, Ipv4Addr::from))
            };
            AffinityRow {
                service: texts.text(key.service),
                client: client_of(key, is_ipv6),
                backend,
                backend_id: entry.backend,
                idle_seconds: clock.seconds_since(entry.last_seen),
            }
        })
        .collect();
    rows.sort_by(|a, b| (&a.service, &a.client).cmp(&(&b.service, &b.client)));
    Ok(rows)
}

fn client_of(key: &AffinityKey, is_ipv6: bool) -> String {
    let [low, high, ..] = key.client;
    let cookie = u64::from(low) | u64::from(high) << 32;
    match key.kind {
        BY_NETNS => format!("netns:{cookie}"),
        BY_SOCKET => format!("socket:{cookie}"),
        _ if is_ipv6 => Ipv6Addr::from(Address6 { be32: key.client }).to_string(),
        _ => Ipv4Addr::from(Address4 { be32: low }).to_string(),
    }
}

/// The backend's address, if its id still means the backend that was chosen.
fn held<A: Copy, I: Into<IpAddr>>(
    backend: &Backend<A>,
    entry: &Affinity,
    address: impl Fn(A) -> I,
) -> Option<String> {
    (u32::from(backend.generation) == entry.generation)
        .then(|| SocketAddr::new(address(backend.address).into(), backend.port.get()).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_is_an_address_or_a_namespace() {
        let v4 = AffinityKey {
            client: [u32::from_ne_bytes([10, 0, 0, 9]), 0, 0, 0],
            ..AffinityKey::default()
        };
        assert_eq!(client_of(&v4, false), "10.0.0.9");
        let netns = AffinityKey { kind: BY_NETNS, client: [7, 1, 0, 0], ..v4 };
        assert_eq!(client_of(&netns, true), format!("netns:{}", (1u64 << 32) + 7));
    }
}
