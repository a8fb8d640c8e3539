//! What the datapath must do with Services, case by case, for both families and, where it
//! makes no difference, both protocols.

use super::{case::Case, family::TestFamily};

pub mod affinity;
pub mod clients;
pub mod clock;
pub mod conversations;
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

/// All cases but those of [`clock`].
pub fn all<F: TestFamily>() -> Vec<Case<F>> {
    [
        clients::cases,
        nothing::cases,
        shape::cases,
        affinity::cases,
        life::cases,
        udp::cases,
        tuples::cases,
        outside::cases,
        masquerade::cases,
        direct::cases,
        conversations::cases,
        icmp::cases,
        fragments::cases,
        odd::cases,
        drain::cases,
    ]
    .into_iter()
    .flat_map(|cases| cases())
    .collect()
}
