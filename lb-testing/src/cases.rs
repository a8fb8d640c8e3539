//! What the datapath must do with Services, row by row, for both families and, where it
//! makes no difference, both protocols.

use super::{family::TestFamily, scene::Row};

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
mod setup;
pub mod shape;
pub mod tuples;
pub mod udp;

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
