//! How many entries of each map are in use, in all and by the Services of each namespace.
//!
//! Invariant: the counts follow what the planner holds as it changes; nothing walks all of it.

use std::{collections::HashMap, fmt};

use super::held::{HeldPort, index_of_family};
use crate::{desired::DesiredPort, model::IpFamily};

/// A map whose entries Services take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Map {
    /// SERVICES.
    Services,
    /// BACKENDS4.
    Backends4,
    /// BACKENDS6.
    Backends6,
    /// FRONTENDS4.
    Frontends4,
    /// FRONTENDS6.
    Frontends6,
    /// RANGES4.
    Ranges4,
    /// RANGES6.
    Ranges6,
    /// SLOTS.
    Slots,
}

impl Map {
    /// All of them, in the order in which their room is checked.
    pub const ALL: [Self; 8] = [
        Self::Services,
        Self::Backends4,
        Self::Backends6,
        Self::Frontends4,
        Self::Frontends6,
        Self::Ranges4,
        Self::Ranges6,
        Self::Slots,
    ];

    /// The map's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Services => "SERVICES",
            Self::Backends4 => "BACKENDS4",
            Self::Backends6 => "BACKENDS6",
            Self::Frontends4 => "FRONTENDS4",
            Self::Frontends6 => "FRONTENDS6",
            Self::Ranges4 => "RANGES4",
            Self::Ranges6 => "RANGES6",
            Self::Slots => "SLOTS",
        }
    }

    /// The flag that sets its size.
    pub const fn flag(self) -> &'static str {
        match self {
            Self::Backends4 | Self::Backends6 => "--max-backends",
            Self::Slots => "--max-slots",
            Self::Services
            | Self::Frontends4
            | Self::Frontends6
            | Self::Ranges4
            | Self::Ranges6 => "--max-services",
        }
    }
}

impl fmt::Display for Map {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

/// How many entries of each map.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Usage([usize; Map::ALL.len()]);

impl Usage {
    /// How many of a map.
    pub(super) fn of(&self, map: Map) -> usize {
        self.0[map as usize]
    }

    fn add(&mut self, map: Map, count: usize) {
        self.0[map as usize] += count;
    }

    /// Adds a port with so many backends, frontends and source ranges, which are all of its family.
    fn add_port(&mut self, family: IpFamily, [backends, frontends, ranges]: [usize; 3]) {
        let family = index_of_family(family);
        self.add(Map::Services, 1);
        self.add([Map::Backends4, Map::Backends6][family], backends);
        self.add([Map::Frontends4, Map::Frontends6][family], frontends);
        self.add([Map::Ranges4, Map::Ranges6][family], ranges);
    }

    /// Those that a Service holds.
    pub(super) fn held(ports: &[HeldPort]) -> Self {
        let mut usage = Self::default();
        for port in ports {
            let entries = [port.backends.len(), port.frontends.len(), port.ranges.len()];
            usage.add_port(port.key.family, entries);
            let blocks = port.sets.blocks();
            usage.add(Map::Slots, blocks.map(|block| block.capacity() as usize).sum());
        }
        usage
    }

    /// Those that a Service wants; its slots depend on those that it has.
    pub(super) fn wanted(ports: &[DesiredPort]) -> Self {
        let mut usage = Self::default();
        for port in ports {
            let entries = [port.backends.len(), port.frontends.len(), port.ranges.len()];
            usage.add_port(port.key.family, entries);
        }
        usage
    }
}

/// The entries in use.
#[derive(Debug, Default)]
pub(super) struct Used {
    total: Usage,
    namespaces: HashMap<Box<str>, Usage>,
}

impl Used {
    /// In all.
    pub(super) fn total(&self) -> &Usage {
        &self.total
    }

    /// By all Services of a Service's namespace.
    pub(super) fn near(&self, service: &str) -> Usage {
        self.namespaces.get(namespace(service)).copied().unwrap_or_default()
    }

    /// A Service of `namespace/name` that held `before` now holds `after`.
    pub(super) fn change(&mut self, service: &str, before: &Usage, after: &Usage) {
        if before == after {
            return;
        }
        let name = namespace(service);
        let own = match self.namespaces.get_mut(name) {
            Some(own) => own,
            None => self.namespaces.entry(name.into()).or_default(),
        };
        for sum in [&mut self.total, own] {
            for (sum, (before, after)) in sum.0.iter_mut().zip(before.0.iter().zip(after.0)) {
                *sum = *sum + after - before;
            }
        }
        if *own == Usage::default() {
            self.namespaces.remove(name);
        }
    }
}

fn namespace(service: &str) -> &str {
    service.split_once('/').map_or("", |(namespace, _)| namespace)
}

/// How much of what is free to it a namespace may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Share {
    /// In percent; 100 means that there is no limit.
    pub(super) percent: u32,
    /// What the namespace has.
    pub(super) used: Usage,
}

impl Share {
    /// Whether the namespace may have `growth` more entries of a map of which `free` are free. What
    /// does not grow always may.
    pub(super) fn allows(&self, map: Map, growth: usize, free: usize) -> bool {
        let used = self.used.of(map);
        growth == 0
            || self.percent >= 100
            || (used + growth).saturating_mul(100)
                <= (used + free).saturating_mul(self.percent as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_has_at_most_half_of_what_is_free_to_it() {
        let used = |services| {
            let mut used = Usage::default();
            used.add(Map::Services, services);
            Share { percent: 50, used }
        };
        for (share, growth, free, is_allowed) in [
            (used(0), 5, 10, true),
            (used(0), 6, 10, false),
            (used(5), 0, 5, true),
            (used(5), 1, 5, false),
            (used(4), 1, 6, true),
            // It had more before there was a limit: it keeps that.
            (used(9), 0, 1, true),
            (used(9), 1, 1, false),
            (Share { percent: 100, ..used(9) }, 1, 1, true),
        ] {
            assert_eq!(
                share.allows(Map::Services, growth, free),
                is_allowed,
                "{share:?} {growth} {free}"
            );
        }
    }

    #[test]
    fn counts_follow_changes_of_services() {
        let usage = |count| {
            let mut usage = Usage::default();
            usage.add(Map::Slots, count);
            usage
        };
        let mut used = Used::default();
        used.change("a/x", &usage(0), &usage(4));
        used.change("a/y", &usage(0), &usage(2));
        used.change("b/x", &usage(0), &usage(1));
        assert_eq!((used.near("a/z"), used.near("b/z")), (usage(6), usage(1)));
        used.change("a/x", &usage(4), &usage(1));
        used.change("b/x", &usage(1), &usage(0));
        assert_eq!(
            (used.near("a/z"), used.near("b/z"), *used.total()),
            (usage(3), usage(0), usage(3))
        );
        assert_eq!(used.namespaces.len(), 1, "an empty one is forgotten");
    }
}
