//! lb as a DaemonSet of a real cluster: three kubelets, pods that run. One cluster serves
//! all tests that begin with lb, and a second one after it the tests that begin with kube-proxy. A
//! cluster is made when the first test asks for it, and removed after the last one, also when one
//! failed. A killed run leaves it to the next run, which removes it first.

mod addons;
mod install;
mod load_balancer;
mod metallb;
mod names;
mod network;
mod node_local_dns;
mod source_ip;
mod termination;
mod traefik;
mod traffic;
mod upgrade;
mod world;

use std::process::ExitCode;

use anyhow::Result;
use lb_tests::harness::real::Proxy;
use libtest_mimic::{Arguments, Trial};

use crate::world::World;

type Test = (&'static str, fn(&World) -> Result<()>);

/// In the order in which they run: those that move agents come last.
const TESTS: &[&[Test]] = &[
    network::TESTS,
    source_ip::TESTS,
    termination::TESTS,
    names::TESTS,
    node_local_dns::TESTS,
    load_balancer::TESTS,
    upgrade::TESTS,
];

/// The same, on a cluster with kube-proxy.
const TESTS_WITH_KUBE_PROXY: &[&[Test]] = &[install::TESTS];

fn main() -> ExitCode {
    let arguments = Arguments { test_threads: Some(1), ..Arguments::from_args() };
    let trial = |proxy| {
        move |(name, test): &Test| {
            let test = *test;
            Trial::test(*name, move || {
                let outcome = World::get(proxy).and_then(|world| world.run(test));
                outcome.map_err(|error| {
                    // At once too: what comes at the end is lost if the run is ended before.
                    println!("{error:#}");
                    format!("{error:#}").into()
                })
            })
        }
    };
    let lb = TESTS.iter().flat_map(|tests| tests.iter()).map(trial(Proxy::Lb));
    let kube_proxy = TESTS_WITH_KUBE_PROXY.iter().flat_map(|tests| tests.iter());
    let trials = lb.chain(kube_proxy.map(trial(Proxy::KubeProxy))).collect();
    let outcome = libtest_mimic::run(&arguments, trials);
    if let Err(error) = world::remove() {
        eprintln!("error: {error:#}");
        return ExitCode::FAILURE;
    }
    outcome.exit_code()
}
