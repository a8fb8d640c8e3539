//! Counts the service ports with policy Local that have endpoints, but none on this node. Packets
//! of their clients are dropped.

use std::{
    collections::BTreeMap,
    ops::{AddAssign, SubAssign},
    sync::Arc,
};

use lb_common::abi::{
    backend::{IN_CLUSTER_SET, IN_LOCAL_SET},
    service::Service as ServiceEntry,
};

use super::DesiredService;
use crate::model::IpFamily;

/// How many service ports of one family have no endpoint on this node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NoLocalEndpoints {
    /// Those whose `internalTrafficPolicy` is Local.
    pub internal: usize,
    /// Those whose `externalTrafficPolicy` is Local.
    pub external: usize,
}

impl NoLocalEndpoints {
    /// The count of one Service.
    pub fn of(service: &DesiredService, family: IpFamily) -> Self {
        let mut missing = Self::default();
        for port in service.ports.iter().filter(|port| port.key.family == family) {
            let has = |set| port.backends.iter().any(|backend| backend.sets & set != 0);
            // The cluster set is chosen even if no policy uses it.
            if has(IN_CLUSTER_SET) && !has(IN_LOCAL_SET) {
                let keeps = |policy| usize::from(port.flags & policy != 0);
                missing.internal += keeps(ServiceEntry::INTERNAL_LOCAL);
                missing.external += keeps(ServiceEntry::EXTERNAL_LOCAL);
            }
        }
        missing
    }
}

impl AddAssign for NoLocalEndpoints {
    fn add_assign(&mut self, other: Self) {
        self.internal += other.internal;
        self.external += other.external;
    }
}

impl SubAssign for NoLocalEndpoints {
    fn sub_assign(&mut self, other: Self) {
        self.internal -= other.internal;
        self.external -= other.external;
    }
}

/// The sum over all Services, kept as they change.
#[derive(Debug, Default)]
pub struct Sum {
    /// Services with a port that has none, in each family.
    services: BTreeMap<Arc<str>, [NoLocalEndpoints; 2]>,
    total: [NoLocalEndpoints; 2],
}

impl Sum {
    /// Updates the count of a Service; `None` means that it is gone.
    pub fn set(&mut self, name: &Arc<str>, service: Option<&DesiredService>) {
        let new = IpFamily::ALL.map(|family| {
            service.map_or_else(NoLocalEndpoints::default, |it| NoLocalEndpoints::of(it, family))
        });
        let old = if new == [NoLocalEndpoints::default(); 2] {
            self.services.remove(name)
        } else {
            self.services.insert(Arc::clone(name), new)
        };
        for (family, total) in self.total.iter_mut().enumerate() {
            *total += new[family];
            *total -= old.map_or_else(NoLocalEndpoints::default, |old| old[family]);
        }
    }

    /// The sum for each family.
    pub fn of_families(&self) -> impl Iterator<Item = (IpFamily, NoLocalEndpoints)> {
        IpFamily::ALL.into_iter().zip(self.total)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::desired::{DesiredBackend, DesiredPort, PortKey};

    fn port(family: IpFamily, flags: u32, sets: &[u8]) -> DesiredPort {
        let backend = |sets: &u8| DesiredBackend {
            ip: family.unspecified(),
            port: 80,
            sets: *sets,
            flags: 0,
            node: None,
        };
        DesiredPort {
            key: PortKey { family, protocol: 6, port: "".into() },
            frontends: Vec::new(),
            ranges: Arc::default(),
            affinity_seconds: 0,
            flags,
            has_backend: false,
            backends: sets.iter().map(backend).collect(),
        }
    }

    #[test]
    fn a_port_lacks_an_endpoint_where_a_local_policy_has_only_others() {
        const INTERNAL: u32 = ServiceEntry::INTERNAL_LOCAL;
        const EXTERNAL: u32 = ServiceEntry::EXTERNAL_LOCAL;
        let rows: [(u32, &[u8], (usize, usize)); 5] = [
            (INTERNAL, &[IN_CLUSTER_SET], (1, 0)),
            (INTERNAL | EXTERNAL, &[IN_CLUSTER_SET, 0], (1, 1)),
            (EXTERNAL, &[IN_CLUSTER_SET, IN_LOCAL_SET], (0, 0)),
            (EXTERNAL, &[0], (0, 0)),
            (0, &[IN_CLUSTER_SET], (0, 0)),
        ];
        for (flags, sets, (internal, external)) in rows {
            let service = DesiredService { ports: vec![port(IpFamily::V6, flags, sets)] };
            let expected = NoLocalEndpoints { internal, external };
            assert_eq!(NoLocalEndpoints::of(&service, IpFamily::V6), expected, "{flags} {sets:?}");
            assert_eq!(NoLocalEndpoints::of(&service, IpFamily::V4), NoLocalEndpoints::default());
        }
    }

    #[test]
    fn the_sum_follows_services_that_change_and_go() {
        let mut sum = Sum::default();
        let total =
            |sum: &Sum| sum.of_families().map(|(_, missing)| missing.internal).sum::<usize>();
        let lacks = |sets: &[u8]| DesiredService {
            ports: IpFamily::ALL
                .map(|family| port(family, ServiceEntry::INTERNAL_LOCAL, sets))
                .into(),
        };
        let (a, b): (Arc<str>, Arc<str>) = ("n/a".into(), "n/b".into());
        sum.set(&a, Some(&lacks(&[IN_CLUSTER_SET])));
        sum.set(&b, Some(&lacks(&[IN_CLUSTER_SET])));
        sum.set(&a, Some(&lacks(&[IN_CLUSTER_SET])));
        assert_eq!(total(&sum), 4);
        sum.set(&a, Some(&lacks(&[IN_CLUSTER_SET | IN_LOCAL_SET])));
        assert_eq!(total(&sum), 2);
        sum.set(&b, None);
        assert_eq!(total(&sum), 0);
        assert!(sum.services.is_empty());
    }
}
