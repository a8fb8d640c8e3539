//! The decision on a connect() or sendmsg(), before any packet is sent.

use crate::abi::{
    address::{Address, Family},
    counter::Reason,
    frontend::{Frontend, FrontendKey, FrontendKind},
    settings::Settings,
    traffic::NO_SERVICE,
};

use super::{
    select::{self, Choice, Client},
    tables::Tables,
    types::{Endpoint, Origin},
};

/// The decision on a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision<A: Address> {
    /// The call goes on unchanged. The packets are then decided on one by one.
    Untouched(Reason),
    /// The call goes to this backend.
    Translate(Endpoint<A>),
    /// The call fails: with EPERM for [`Reason::SourceNotAllowed`], else with ECONNREFUSED. The
    /// second field is the index of the service port that rejects it, or [`NO_SERVICE`].
    Refuse(Reason, u32),
}

/// The socket that calls. Each value is read only when it is needed, because each costs a helper
/// call.
pub trait Caller {
    /// The cookie of the socket's network namespace; 0 if the kernel does not provide it.
    fn netns(&self) -> u64;
    /// Whether the socket is in the node's own network namespace.
    fn is_node(&self) -> bool;
    /// The cookie of the socket if each of its datagrams is decided on separately (sendmsg()).
    fn datagram_socket(&self) -> Option<u64>;
}

/// Decides on a call of a socket to `destination` over `protocol`.
#[inline(always)]
pub fn decide<F: Family, T: Tables<F>>(
    destination: Endpoint<F::Address>,
    protocol: u8,
    caller: &impl Caller,
    settings: &Settings,
    tables: &mut T,
) -> Decision<F::Address> {
    let family = F::settings(settings);
    let may_be_node_port = settings.node_ports.contains(destination.port.get())
        && family.may_be_node(destination.address);
    // These addresses belong to the caller's network namespace, which may be a pod's.
    let is_own = destination.address.is_unspecified() || F::is_loopback(destination.address);
    if is_own || (!may_be_node_port && !family.may_be_service(destination.address)) {
        return Decision::Untouched(Reason::NotService);
    }
    if settings.is_draining() {
        return Decision::Untouched(Reason::Draining);
    }
    let key = FrontendKey::new(destination.address, destination.port, protocol);
    let Some(frontend) = tables.frontend(&key) else {
        return match tables.frontend(&FrontendKey::of_address(destination.address)) {
            Some(whole) if whole.kind == FrontendKind::CLUSTER_IP_ADDRESS => {
                Decision::Refuse(Reason::NoSuchPort, NO_SERVICE)
            }
            _ => Decision::Untouched(Reason::UnknownAddress),
        };
    };
    let Some(service) = tables.service(frontend.service) else {
        return Decision::Untouched(Reason::TableInconsistent);
    };
    if frontend.flags & Frontend::RANGED != 0 {
        // The address of a pod is not known here: its packets are decided on.
        if !caller.is_node() {
            return Decision::Untouched(Reason::SocketExempt);
        }
        if !tables.is_in_range(frontend.service, &family.node_source) {
            return Decision::Refuse(Reason::SourceNotAllowed, frontend.service);
        }
    }
    let eligible = match select::eligible(&service, frontend.kind, Origin::Inside) {
        Ok(eligible) => eligible,
        Err(reason) => return Decision::Refuse(reason, frontend.service),
    };
    let client = match caller.datagram_socket() {
        Some(cookie) if service.affinity_seconds == 0 => Client::Socket(cookie),
        _ => Client::Netns(caller.netns()),
    };
    let choice = Choice { index: frontend.service, service, eligible, client };
    let Some(id) = select::choose(&choice, settings, tables) else {
        return Decision::Untouched(Reason::TableInconsistent);
    };
    let Some(backend) = tables.backend(id) else {
        return Decision::Untouched(Reason::TableInconsistent);
    };
    Decision::Translate(Endpoint { address: backend.address, port: backend.port })
}
