//! Addresses that no Service gets on this node, because another program has them: the API server,
//! or a process that serves a ClusterIP itself.

use std::{collections::BTreeSet, net::IpAddr, sync::Arc};

use lb_common::abi::frontend::TCP;

use super::{DesiredFrontend, FrontendAddress};
use crate::{
    model::{Refusal, RefusalReason, event::ObjectKind},
    snapshot::Entry,
};

/// The Service whose endpoints are the API servers.
pub const API_SERVER: &str = "default/kubernetes";

/// The addresses that API servers have.
#[derive(Debug, Default)]
pub struct Taken {
    api_servers: BTreeSet<(IpAddr, u16)>,
}

/// Who has an address that a Service wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Holder {
    /// An API server.
    ApiServer,
    /// A process of this node, on an interface with the ClusterIP: a cache of DNS.
    Process,
}

impl Taken {
    /// Sets the API servers: the endpoints of [`API_SERVER`]. Returns whether they changed.
    pub fn set_api_servers(&mut self, entry: Option<&Entry>) -> bool {
        let mut found = BTreeSet::new();
        for slice in entry.into_iter().flat_map(Entry::slices) {
            for endpoint in &slice.endpoints {
                found.extend(slice.ports.iter().map(|port| (endpoint.address, port.number)));
            }
        }
        let is_changed = self.api_servers != found;
        self.api_servers = found;
        is_changed
    }

    /// Who has the address of a frontend; `None` if the Service can have it. `held` are the
    /// addresses that interfaces of this node hold.
    pub fn holder(
        &self,
        service: &str,
        frontend: &DesiredFrontend,
        held: &BTreeSet<IpAddr>,
    ) -> Option<Holder> {
        let FrontendAddress { ip, port, protocol } = frontend.at;
        if frontend.kind.is_internal() && held.contains(&ip) {
            return Some(Holder::Process);
        }
        let is_api_server = protocol == TCP && self.api_servers.contains(&(ip, port));
        (is_api_server && service != API_SERVER).then_some(Holder::ApiServer)
    }
}

/// The refusal of a frontend with the address of an API server.
pub fn refusal(service: &Arc<str>, FrontendAddress { ip, port, .. }: FrontendAddress) -> Refusal {
    Refusal {
        kind: ObjectKind::Service,
        object: (&**service).into(),
        uid: String::new(),
        field: "spec.ports".to_owned(),
        reason: RefusalReason::AddressInUse,
        message: format!(
            "{ip} port {port} is an API server (an endpoint of {API_SERVER}): give the Service \
             another address or port"
        ),
    }
}
