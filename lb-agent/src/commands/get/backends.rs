//! Rows of `get backends`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use lb_common::abi::backend::{Backend, IN_CLUSTER_SET, IN_LOCAL_SET, ON_THIS_NODE, THIS_HOST};
use lb_control::dataplane::PinnedState;
use serde::Serialize;

use super::services::ServiceNames;

/// An endpoint of a service port that is in one of its sets now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BackendRow {
    /// The service port.
    pub service: String,
    /// `address:port`.
    pub address: String,
    /// `tcp` or `udp`.
    pub protocol: &'static str,
    /// The sets that it is a member of: `cluster`, `local`.
    pub sets: Vec<&'static str>,
    /// `this_node`, `this_host` (a process in the host's network) or `other_node`.
    pub place: &'static str,
    /// The address of that other node; null if it is not known.
    pub node: Option<String>,
    /// Index into BACKENDS4 or BACKENDS6, by the family of the address.
    pub id: u32,
    /// How often the id has changed its meaning.
    pub generation: u16,
}

/// The rows of `get backends`, by service and address.
pub(crate) fn backends(state: &PinnedState) -> Vec<BackendRow> {
    let names = ServiceNames::new(&state.names);
    let v4 = (0..)
        .zip(&state.backends4)
        .filter(|(_, backend)| backend.sets != 0)
        .map(|(id, backend)| backend_row(id, backend, Ipv4Addr::from, &names));
    let v6 = (0..)
        .zip(&state.backends6)
        .filter(|(_, backend)| backend.sets != 0)
        .map(|(id, backend)| backend_row(id, backend, Ipv6Addr::from, &names));
    let mut rows: Vec<_> = v4.chain(v6).collect();
    rows.sort_by(|a, b| {
        (&a.service, a.protocol, &a.address, a.id).cmp(&(&b.service, b.protocol, &b.address, b.id))
    });
    rows
}

pub(crate) fn backend_row<A: Copy, I: Into<IpAddr>>(
    id: u32,
    backend: &Backend<A>,
    ip: impl Fn(A) -> I,
    names: &ServiceNames<'_>,
) -> BackendRow {
    let node: IpAddr = ip(backend.node).into();
    let sets = [(IN_CLUSTER_SET, "cluster"), (IN_LOCAL_SET, "local")];
    BackendRow {
        service: names.text(backend.service),
        address: SocketAddr::new(ip(backend.address).into(), backend.port.get()).to_string(),
        protocol: names.protocol(backend.service),
        sets: sets.iter().filter(|(bit, _)| backend.sets & bit != 0).map(|(_, set)| *set).collect(),
        place: match backend.flags {
            flags if flags & THIS_HOST != 0 => "this_host",
            flags if flags & ON_THIS_NODE != 0 => "this_node",
            _ => "other_node",
        },
        node: (!node.is_unspecified()).then(|| node.to_string()),
        id,
        generation: backend.generation,
    }
}
