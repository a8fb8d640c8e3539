//! What the datapath must do with Services, row by row, for both families and, where it
//! makes no difference, both protocols.

use lb_common::{
    abi::{address::Address, frontend::TCP, frontend::UDP},
    balance::Endpoint,
};

use super::{
    bench::{Bench, Place, Row},
    family::TestFamily,
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

pub mod affinity;
pub mod clients;
pub mod clock;
pub mod direct;
pub mod drain;
pub mod fragments;
pub mod icmp;
pub mod life;
pub mod masquerade;
pub mod nothing;
pub mod odd;
pub mod outside;
pub mod shape;
pub mod tuples;
pub mod udp;

const BOTH: &[u8] = &[TCP, UDP];
const TCP_ONLY: &[u8] = &[TCP];
const UDP_ONLY: &[u8] = &[UDP];

/// All rows but those of [`clock`].
pub fn all<F: TestFamily>() -> Vec<Row<F>> {
    let mut rows = clients::rows();
    rows.extend(nothing::rows());
    rows.extend(shape::rows());
    rows.extend(affinity::rows());
    rows.extend(life::rows());
    rows.extend(udp::rows());
    rows.extend(tuples::rows());
    rows.extend(outside::rows());
    rows.extend(masquerade::rows());
    rows.extend(direct::rows());
    rows.extend(icmp::rows());
    rows.extend(fragments::rows());
    rows.extend(odd::rows());
    rows.extend(drain::rows());
    rows
}

/// A pod of this node, as a client.
fn pod<F: TestFamily>() -> Endpoint<F::Address> {
    at(F::pod(1), 40_000)
}

/// A node process, as a client.
fn process<F: TestFamily>() -> Endpoint<F::Address> {
    at(F::node(), 50_000)
}

/// A client with another source port.
fn from_port<A: Address>(client: Endpoint<A>, port: u16) -> Endpoint<A> {
    at(client.address, port)
}

/// The front end that most rows use.
fn web<F: TestFamily>() -> Endpoint<F::Address> {
    at(F::vip(1), 80)
}

/// Clients of each kind that a ClusterIP has, with the place where they are caught.
fn clients<F: TestFamily>() -> [(Place, Endpoint<F::Address>); 2] {
    [(Place::FromPod, pod::<F>()), (Place::ToDevice, process::<F>())]
}

/// A Service at [`web`] of the row's protocol with backends on another node; returns its
/// index and the ids of its backends.
fn service<F: TestFamily>(bench: &mut Bench<F>, backends: u8) -> (u32, Vec<u32>) {
    let (index, ids) = service_at(bench, web::<F>(), backends);
    bench.update();
    (index, ids)
}

fn service_at<F: TestFamily>(
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
