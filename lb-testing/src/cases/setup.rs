//! What many rows begin with.

pub(super) use lb_common::{
    abi::{address::Address, frontend::TCP, frontend::UDP},
    balance::Endpoint,
};

pub(super) use crate::{
    family::TestFamily,
    scene::{Bench, Place, Row},
    world::{Where, at},
};

/// Lists functions as rows, each with the protocols it holds for.
macro_rules! rows {
    ($($protocols:expr => $row:ident,)+) => {
        /// The rows of this file.
        pub fn rows<F: TestFamily>() -> Vec<Row<F>> {
            vec![$(Row { name: stringify!($row), protocols: $protocols, run: $row }),+]
        }
    };
}
pub(super) use rows;

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

/// The front end that most rows use.
pub(super) fn web<F: TestFamily>() -> Endpoint<F::Address> {
    at(F::vip(1), 80)
}

/// Clients of each kind that a ClusterIP has, with the place where they are caught.
pub(super) fn clients<F: TestFamily>() -> [(Place, Endpoint<F::Address>); 2] {
    [(Place::FromPod, pod::<F>()), (Place::ToDevice, process::<F>())]
}

/// A Service at [`web`] of the row's protocol with backends on another node; returns its
/// index and the ids of its backends.
pub(super) fn service<F: TestFamily>(bench: &mut Bench<F>, backends: u8) -> (u32, Vec<u32>) {
    let (index, ids) = service_at(bench, web::<F>(), backends);
    bench.update();
    (index, ids)
}

pub(super) fn service_at<F: TestFamily>(
    bench: &mut Bench<F>,
    front: Endpoint<F::Address>,
    backends: u8,
) -> (u32, Vec<u32>) {
    let index = bench.world.add_service(front, bench.protocol);
    let backend = |number| at(F::remote_pod(number), 8080);
    let ids = (1..=backends)
        .map(|number| bench.world.add_backend(index, backend(number), Where::Elsewhere))
        .collect();
    (index, ids)
}
