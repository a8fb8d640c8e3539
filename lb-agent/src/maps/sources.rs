//! The maps SOURCES4 and SOURCES6.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Debug,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use bytemuck::Pod;
use ipnet::IpNet;
use lb_common::abi::{
    address::{Address4, Address6},
    source::SourceKey,
};
use lb_control::dataplane::DataplaneError;
use lb_sys::TypedMap;

use super::{
    pins::{PinError, Pins, SOURCES},
    read::{failed, opened, read_trie},
};

/// The source address of packets from this node, by the prefix of their destination.
pub type SourcesByRoute = BTreeMap<IpNet, IpAddr>;

/// SOURCES of both families, and what they hold.
#[derive(Debug)]
pub struct Sources {
    v4: TypedMap<SourceKey<Address4>, Address4>,
    v6: TypedMap<SourceKey<Address6>, Address6>,
    held: SourcesByRoute,
}

impl Sources {
    /// Opens the maps and adopts their entries.
    ///
    /// # Errors
    /// [`PinError`] if one is missing, of another layout, or cannot be read.
    pub fn open(pins: &Pins) -> Result<Self, PinError> {
        let unreadable = |name| {
            move |error: DataplaneError| PinError::Open {
                path: pins.map(name),
                source: error.source,
            }
        };
        let v4: TypedMap<SourceKey<Address4>, Address4> = opened(pins, "SOURCES4", TypedMap::new)?;
        let v6: TypedMap<SourceKey<Address6>, Address6> = opened(pins, "SOURCES6", TypedMap::new)?;
        let ipv4 = read_trie(&v4, "SOURCES4").map_err(unreadable("SOURCES4"))?;
        let ipv6 = read_trie(&v6, "SOURCES6").map_err(unreadable("SOURCES6"))?;
        let held4 = ipv4.into_iter().filter_map(|(key, source)| {
            let [address, source] = [key.address, source].map(|ip| Ipv4Addr::from(ip).into());
            entry(key.prefix_length, address, source)
        });
        let held6 = ipv6.into_iter().filter_map(|(key, source)| {
            let [address, source] = [key.address, source].map(|ip| Ipv6Addr::from(ip).into());
            entry(key.prefix_length, address, source)
        });
        let held = held4.chain(held6).collect();
        Ok(Self { v4, v6, held })
    }

    /// The source addresses that the maps hold.
    pub fn route_sources(&self) -> BTreeSet<IpAddr> {
        self.held.values().copied().collect()
    }

    /// Makes the maps hold `wanted`, by the writes that are needed. Returns how many prefixes do
    /// not fit: the longest, whose routes count as the routes around them.
    ///
    /// # Errors
    /// [`DataplaneError`] if a map cannot be written.
    pub fn set(&mut self, wanted: &SourcesByRoute) -> Result<usize, DataplaneError> {
        let (wanted, left_out) = fitting(wanted);
        let gone: Vec<IpNet> =
            self.held.keys().filter(|prefix| !wanted.contains_key(*prefix)).copied().collect();
        for prefix in gone {
            match prefix {
                IpNet::V4(prefix) => remove(&self.v4, "SOURCES4", &key4(prefix))?,
                IpNet::V6(prefix) => remove(&self.v6, "SOURCES6", &key6(prefix))?,
            }
            self.held.remove(&prefix);
        }
        for (prefix, source) in wanted {
            if self.held.get(&prefix) == Some(&source) {
                continue;
            }
            match (prefix, source) {
                (IpNet::V4(prefix), IpAddr::V4(source)) => {
                    store(&self.v4, "SOURCES4", &key4(prefix), &source.into())?;
                }
                (IpNet::V6(prefix), IpAddr::V6(source)) => {
                    store(&self.v6, "SOURCES6", &key6(prefix), &source.into())?;
                }
                // No route has a source address of the other family (RFC 5549 is about next hops).
                _ => continue,
            }
            self.held.insert(prefix, source);
        }
        Ok(left_out)
    }
}

/// The prefixes that fit into the maps, shortest first, and how many do not.
fn fitting(wanted: &SourcesByRoute) -> (SourcesByRoute, usize) {
    let mut ordered: Vec<_> = wanted.iter().map(|(prefix, source)| (*prefix, *source)).collect();
    ordered.sort_by_key(|(prefix, _)| (prefix.prefix_len(), *prefix));
    let mut counts = [0; 2];
    ordered.retain(|(prefix, _)| {
        let count = &mut counts[usize::from(matches!(prefix, IpNet::V6(_)))];
        *count += 1;
        *count <= SOURCES
    });
    let left_out = wanted.len() - ordered.len();
    (ordered.into_iter().collect(), left_out)
}

fn entry(prefix_length: u32, address: IpAddr, source: IpAddr) -> Option<(IpNet, IpAddr)> {
    Some((IpNet::new(address, prefix_length.try_into().ok()?).ok()?, source))
}

fn key4(prefix: ipnet::Ipv4Net) -> SourceKey<Address4> {
    let prefix_length = prefix.prefix_len().into();
    SourceKey { prefix_length, address: prefix.network().into() }
}

fn key6(prefix: ipnet::Ipv6Net) -> SourceKey<Address6> {
    let prefix_length = prefix.prefix_len().into();
    SourceKey { prefix_length, address: prefix.network().into() }
}

fn store<A: Pod + Debug>(
    map: &TypedMap<SourceKey<A>, A>,
    name: &'static str,
    key: &SourceKey<A>,
    source: &A,
) -> Result<(), DataplaneError>
where
    SourceKey<A>: Pod + Debug,
{
    map.set(key, source).map_err(failed(name, || format!("insertion of {key:?}")))
}

fn remove<A: Pod>(
    map: &TypedMap<SourceKey<A>, A>,
    name: &'static str,
    key: &SourceKey<A>,
) -> Result<(), DataplaneError>
where
    SourceKey<A>: Pod + Debug,
{
    map.remove(key).map(drop).map_err(failed(name, || format!("deletion of {key:?}")))
}
