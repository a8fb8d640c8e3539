//! The Services that clients of the scaling cases use, among those that are only there.
//!
//! They are the last ones, so that a proxy that goes through its Services in order finds them last.
//! The addresses of their endpoints are all served by one pod.

use std::net::{Ipv4Addr, SocketAddr};

use serde_json::{Value, json};

use super::super::shared::{PORT, TARGET};
use crate::tools::bench::scale::objects::{Size, cluster_ip};

/// Where all endpoints are; no other address of a cluster is there.
pub const ENDPOINTS: &str = "10.128.0.0/10";

/// How many Services there are at least where all of [`Used`] are among them.
pub const LEAST: u32 = 1_000;

/// A Service that clients use.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Used {
    /// With one endpoint.
    One,
    /// With this many endpoints, a power of ten.
    Endpoints(u32),
    /// With two endpoints that name themselves; the first one is removed.
    Named,
    /// With two endpoints that hold connections; the first one terminates.
    Held,
}

/// The condition of the first endpoint.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum First {
    /// It is ready.
    Ready,
    /// It terminates and still serves.
    Terminating,
    /// It is not in the slice.
    Gone,
}

impl Used {
    /// All but the first, which is everywhere.
    pub const OTHERS: [Self; 5] = [
        Self::Endpoints(10),
        Self::Endpoints(100),
        Self::Endpoints(1_000),
        Self::Named,
        Self::Held,
    ];

    /// How far from the last Service it is.
    fn places_before_last(self) -> u32 {
        match self {
            Self::One => 0,
            Self::Endpoints(count) => count.ilog10(),
            Self::Named => 4,
            Self::Held => 5,
        }
    }

    /// Its number among so many Services.
    pub fn number(self, services: u32) -> u32 {
        services - 1 - self.places_before_last()
    }

    /// Where clients reach it.
    pub fn address(self, services: u32) -> SocketAddr {
        (cluster_ip(self.number(services)), PORT).into()
    }

    /// The port of its endpoints.
    pub fn target(self) -> u16 {
        match self {
            Self::One | Self::Endpoints(_) => TARGET,
            Self::Named => TARGET + 1,
            Self::Held => TARGET + 2,
        }
    }

    /// The address of an endpoint, counted from 1.
    pub fn endpoint(self, number: u32) -> Ipv4Addr {
        let [.., high, low] = number.to_be_bytes();
        Ipv4Addr::new(10, 160 + self.places_before_last() as u8, high, low)
    }

    fn endpoints(self) -> u32 {
        match self {
            Self::One => 1,
            Self::Endpoints(count) => count,
            Self::Named | Self::Held => 2,
        }
    }

    /// Its slice among those of `size`; the endpoints are on `node`.
    pub fn slice(self, size: Size, node: &str, first: First) -> Value {
        let begin = if first == First::Gone { 2 } else { 1 };
        let endpoints = (begin..=self.endpoints()).map(|number| {
            let is_terminating = number == 1 && first == First::Terminating;
            json!({
                "addresses": [self.endpoint(number)], "nodeName": node,
                "conditions": {"ready": !is_terminating, "serving": true, "terminating": is_terminating},
            })
        });
        let mut slice = size.slice(self.number(size.services), true);
        slice["endpoints"] = endpoints.collect();
        let port = self.target();
        slice["ports"] = ["TCP", "UDP"]
            .map(
                |protocol| json!({"name": port_name(protocol), "port": port, "protocol": protocol}),
            )
            .into();
        slice
    }

    /// Has its Service, among those of a cluster, serve datagrams as well.
    pub fn expose(self, service: &mut Value) {
        let port = |protocol: &str| {
            let (name, target) = (port_name(protocol), self.target());
            json!({"name": name, "port": PORT, "targetPort": target, "protocol": protocol})
        };
        service["spec"]["ports"] = ["TCP", "UDP"].map(port).into();
    }
}

fn port_name(protocol: &str) -> String {
    protocol.to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn services_that_are_used_have_numbers_and_addresses_of_their_own() {
        let all: Vec<_> = [Used::One].into_iter().chain(Used::OTHERS).collect();
        let numbers: Vec<_> = all.iter().map(|used| used.number(LEAST)).collect();
        assert_eq!(numbers, [999, 998, 997, 996, 995, 994]);
        assert_eq!(Used::Endpoints(1_000).endpoint(1_000), Ipv4Addr::new(10, 163, 3, 232));
        assert_eq!(Used::One.address(1), SocketAddr::from(([10, 96, 0, 2], 80)));
    }

    #[test]
    fn the_first_endpoint_terminates_and_goes() {
        let size = Size { services: LEAST, endpoints: 2 };
        let of = |first| {
            let slice = Used::Held.slice(size, "node1", first);
            let endpoints = slice["endpoints"].as_array().expect("endpoints").clone();
            let shown = endpoints.iter().map(|endpoint| {
                let conditions = &endpoint["conditions"];
                (endpoint["addresses"][0].clone(), conditions["ready"].clone())
            });
            shown.collect::<Vec<_>>()
        };
        let [one, two] = [json!("10.165.0.1"), json!("10.165.0.2")];
        assert_eq!(of(First::Ready), [(one.clone(), json!(true)), (two.clone(), json!(true))]);
        assert_eq!(of(First::Terminating), [(one, json!(false)), (two.clone(), json!(true))]);
        assert_eq!(of(First::Gone), [(two, json!(true))]);
    }
}
