//! Clients, frontends and Services that many cases begin with.

pub(super) use lb_common::{
    abi::{
        address::{Address, Prefix},
        frontend::{TCP, UDP},
        settings::Settings,
    },
    balance::Endpoint,
};

pub(super) use crate::{
    case::Case,
    family::TestFamily,
    scene::Scene,
    site::TestSite,
    world::{Location, at},
};

/// Lists functions as cases, each with the protocols that it holds for.
macro_rules! cases {
    ($($protocols:expr => $case:ident,)+) => {
        /// The cases of this file, each once with every protocol that it holds for.
        pub fn cases<F: TestFamily>() -> Vec<Case<F>> {
            let mut cases = Vec::new();
            $(cases.extend($protocols.iter().map(|protocol| Case {
                module: module_path!(),
                name: stringify!($case),
                protocol: *protocol,
                show: $case,
            }));)+
            cases
        }
    };
}
pub(super) use cases;

pub(super) const BOTH: &[u8] = &[TCP, UDP];
pub(super) const TCP_ONLY: &[u8] = &[TCP];
pub(super) const UDP_ONLY: &[u8] = &[UDP];

/// A pod of this node, as a client.
pub(super) fn pod<F: TestFamily>() -> Endpoint<F::Address> {
    at(F::pod(1), 40_000)
}

/// A node process, as a client.
pub(super) fn process<F: TestFamily>() -> Endpoint<F::Address> {
    at(F::node(), 50_000)
}

/// A client with another source port.
pub(super) fn from_port<A: Address>(client: Endpoint<A>, port: u16) -> Endpoint<A> {
    at(client.address, port)
}

/// The frontend that most cases use.
pub(super) fn web<F: TestFamily>() -> Endpoint<F::Address> {
    at(F::vip(1), 80)
}

/// Clients of each kind that a ClusterIP has, with the site where their frames are received.
pub(super) fn clients<F: TestFamily>() -> [(TestSite, Endpoint<F::Address>); 2] {
    [(TestSite::FromPod, pod::<F>()), (TestSite::ToDevice, process::<F>())]
}

/// A Service at [`web`] of the case's protocol with backends on another node; returns its
/// index and the ids of its backends.
pub(super) fn service<F: TestFamily>(scene: &mut Scene<F>, backends: u8) -> (u32, Vec<u32>) {
    let (index, ids) = service_at(scene, web::<F>(), backends);
    scene.update();
    (index, ids)
}

pub(super) fn service_at<F: TestFamily>(
    scene: &mut Scene<F>,
    frontend: Endpoint<F::Address>,
    backends: u8,
) -> (u32, Vec<u32>) {
    let index = scene.world.add_service(frontend, scene.protocol);
    let backend = |number| at(F::remote_pod(number), 8080);
    let ids = (1..=backends)
        .map(|number| scene.world.add_backend(index, backend(number), Location::OtherNode))
        .collect();
    (index, ids)
}

/// Routes the pods of other nodes by an overlay, whose address this node has; returns the address.
pub(super) fn route_pods_by_overlay<F: TestFamily>(scene: &mut Scene<F>) -> F::Address {
    let [gate, _] = F::service_prefixes();
    let pods = Prefix { address: F::remote_pod(0).masked(gate.mask), mask: gate.mask };
    let overlay = F::pod(250);
    scene.world.sources.push((pods, overlay));
    scene.world.settings.flags |= Settings::SOURCE_BY_ROUTE;
    let settings = F::settings_mut(&mut scene.world.settings);
    settings.node_addresses[settings.node_address_count as usize] = overlay;
    settings.node_address_count += 1;
    scene.update();
    overlay
}
