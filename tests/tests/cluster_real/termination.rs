//! Kubernetes' tutorial "Explore Termination Behavior for Pods And Their Endpoints" with a
//! Deployment: a pod that terminates goes on serving what it has, and what nobody else serves.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use lb_tests::harness::echo::{Answer, Probe};
use lb_tests::harness::netns::actors::host::Host;
use lb_tests::harness::netns::topology::plan::Family;
use lb_tests::harness::real::objects::{App, PORT, service};
use lb_tests::harness::wait::{PATIENCE, eventually};
use serde_json::json;

use crate::Test;
use crate::world::World;

pub(crate) const TESTS: &[Test] = &[
    ("termination::connections_stay_and_new_ones_go_to_the_replacement", replaced),
    ("termination::the_last_pod_serves_until_it_is_gone", last),
];

const SERVER: &str = "drained";
const CLIENT: &str = "client";
/// Longer than a test looks at the pod that terminates; then its object is removed ([`end`]).
const GRACE: u16 = 120;
/// New connections over each way.
const TRIES: usize = 6;

fn name(answer: &Answer) -> String {
    answer.name().map_or_else(|| format!("{answer:?}"), str::to_owned)
}

/// A client pod by the ClusterIP and the client outside by a node port, in each family.
fn ways<'a>(
    world: &World,
    pod: &'a Host,
    outside: &'a Host,
) -> Result<Vec<(&'a Host, SocketAddr)>> {
    let inside = world.cluster_ips("web")?;
    let port = world.node_port("web", "tcp")?;
    let entry = world.node(1)?;
    let ways = Family::ALL.iter().flat_map(|family| {
        [(pod, SocketAddr::new(inside.get(*family), PORT)), (outside, entry.at(*family, port))]
    });
    Ok(ways.collect())
}

fn check_new(ways: &[(&Host, SocketAddr)], server: &str) -> Result<()> {
    for (from, to) in ways {
        for _ in 0..TRIES {
            let answer = from.ask(Probe::tcp(*to).timeout(PATIENCE))?;
            ensure!(name(&answer) == server, "{to}: {answer:?} instead of {server}");
        }
    }
    Ok(())
}

fn set_up(world: &World) -> Result<()> {
    world.apply(&[
        App::new(SERVER, 1).on(1).grace(GRACE).deployment(),
        App::new(CLIENT, 1).on(2).deployment(),
        service("web", SERVER, "NodePort"),
    ])?;
    world.wait_endpoints("web", 1)
}

/// Removes a pod that terminates, without the rest of its time: the kubelet would let it have that.
fn end(world: &World, pod: &str) -> Result<()> {
    world.kubectl(&["delete", "pod", pod, "--grace-period=0", "--force", "--wait=false"]).map(drop)
}

fn replaced(world: &World) -> Result<()> {
    set_up(world)?;
    let (pod, outside) = (world.client(CLIENT)?, world.outside()?);
    let ways = ways(world, &pod, &outside)?;
    let old = world.only_pod(SERVER)?;
    check_new(&ways, &old)?;
    let held = ways.iter().map(|(from, to)| {
        from.open(Probe::tcp(*to).timeout(PATIENCE)).with_context(|| to.to_string())
    });
    let held: Vec<_> = held.collect::<Result<_>>()?;
    world.kubectl(&["delete", "pod", &old, "--wait=false"])?;
    world.roll_out(&format!("deployment/{SERVER}"))?;
    let new = world.only_pod(SERVER)?;
    ensure!(new != old, "the pod was not replaced");
    world.wait_rows("web", "one ready, one terminating", |row| {
        row["ready"] == 1 && row["terminating"] == 1
    })?;
    check_new(&ways, &new)?;
    for connection in held {
        let answer = connection.exchange("still there", PATIENCE)?;
        ensure!(name(&answer) == old, "a connection is answered by {answer:?}, not by {old}");
    }
    end(world, &old)?;
    world.wait_rows("web", "none terminating", |row| row["terminating"] == 0)?;
    check_new(&ways, &new)
}

fn last(world: &World) -> Result<()> {
    set_up(world)?;
    let patch = json!({"spec": {"externalTrafficPolicy": "Local"}}).to_string();
    world.kubectl(&["patch", "service", "web", "-p", &patch])?;
    world.wait_rows("web", "policy Local", |row| row["external_traffic_policy"] == "Local")?;
    let (pod, outside) = (world.client(CLIENT)?, world.outside()?);
    let ways = ways(world, &pod, &outside)?;
    let server = world.only_pod(SERVER)?;
    world.kubectl(&["scale", "deployment", SERVER, "--replicas=0"])?;
    world.wait_rows("web", "none ready, one terminating", |row| {
        row["ready"] == 0 && row["terminating"] == 1
    })?;
    check_new(&ways, &server)?;
    end(world, &server)?;
    world.wait_rows("web", "nobody", |row| row["ready"] == 0 && row["terminating"] == 0)?;
    for (from, to) in ways {
        eventually(|| {
            let answer = from.ask(Probe::tcp(to))?;
            ensure!(answer.error() == Some("ECONNREFUSED"), "{to}: {answer:?}");
            Ok(())
        })?;
    }
    Ok(())
}
