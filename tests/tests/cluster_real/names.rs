//! Names: CoreDNS behind its Service, asked by pods and nodes, and what the names lead to.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use lb_tests::harness::netns::actors::host::Host;
use lb_tests::harness::netns::topology::plan::Family;
use lb_tests::harness::netns::words::expectations::Expectations;
use lb_tests::harness::real::objects::{App, TARGET_HTTP, service};
use lb_tests::harness::real::plan::CLUSTER_DNS;
use lb_tests::harness::wait::{PATIENCE, eventually};
use serde_json::json;

use crate::Test;
use crate::world::{World, nodes};

pub(crate) const TESTS: &[Test] = &[
    ("names::pods_and_nodes_resolve_by_the_dns_service", resolved),
    ("names::headless_srv_and_stateful_names_lead_to_their_pods", stateful),
];

/// Asks the DNS Service from here; the answers, sorted.
pub(crate) fn dig(from: &Host, name: &str, kind: &str, tcp: bool) -> Result<BTreeSet<String>> {
    let mut command = Command::new("dig");
    command.args(["+short", "+tries=1", "+time=5", if tcp { "+tcp" } else { "+notcp" }]);
    command.args([&format!("@{CLUSTER_DNS}"), name, kind]);
    let said = from.output(command, PATIENCE)?;
    Ok(said.lines().map(str::to_owned).collect())
}

pub(crate) fn full(world: &World, name: &str) -> String {
    format!("{name}.{}.svc.cluster.local", world.namespace())
}

fn record(family: Family) -> &'static str {
    match family {
        Family::V4 => "A",
        Family::V6 => "AAAA",
    }
}

fn texts(addresses: impl IntoIterator<Item = IpAddr>) -> BTreeSet<String> {
    addresses.into_iter().map(|address| address.to_string()).collect()
}

fn resolved(world: &World) -> Result<()> {
    world.apply(&[App::new("web", 3).deployment(), service("web", "web", "ClusterIP")])?;
    let ips = world.cluster_ips("web")?;
    let pods = world.pods("web")?;
    let mut clients = pods.iter().map(|pod| world.pod(pod)).collect::<Result<Vec<_>>>()?;
    for node in nodes() {
        clients.push(world.node(node)?);
    }
    // CoreDNS learns the Service by a watch of its own.
    eventually(|| {
        let found = dig(&clients[0], &full(world, "web"), "A", false)?;
        ensure!(!found.is_empty(), "CoreDNS does not know the Service");
        Ok(())
    })?;
    let mut expectations = Expectations::default();
    for client in &clients {
        for family in Family::ALL {
            for tcp in [false, true] {
                let wanted = texts([ips.get(family)]);
                let found = dig(client, &full(world, "web"), record(family), tcp);
                let what = format!("{} asks for {family:?}, TCP: {tcp}", client.name());
                expectations.check(what, is(found, &wanted));
            }
        }
    }
    expectations.finish()
}

fn is(found: Result<BTreeSet<String>>, wanted: &BTreeSet<String>) -> Result<()> {
    let found = found?;
    ensure!(found == *wanted, "{found:?} instead of {wanted:?}");
    Ok(())
}

fn stateful(world: &World) -> Result<()> {
    let mut headless = service("db", "db", "ClusterIP");
    headless["spec"]["clusterIP"] = json!("None");
    headless["spec"]["publishNotReadyAddresses"] = json!(true);
    world.apply(&[headless, App::new("db", 3).stateful_set(), client()])?;
    let members: Vec<Host> =
        (0..3).map(|number| world.pod(&format!("db-{number}"))).collect::<Result<_>>()?;
    let mut expectations = Expectations::default();
    for family in Family::ALL {
        let all = texts(members.iter().map(|member| member.ip(family)));
        let complete =
            eventually(|| is(dig(&members[0], &full(world, "db"), record(family), false), &all));
        expectations.check(format!("headless, {family:?}"), complete);
        for member in &members {
            let name = full(world, &format!("{}.db", member.name()));
            let own = texts([member.ip(family)]);
            let found = dig(&members[0], &name, record(family), false);
            expectations.check(format!("{name}, {family:?}"), is(found, &own));
        }
    }
    let srv = dig(&members[0], &full(world, "_http._tcp.db"), "SRV", false)?;
    let wanted: BTreeSet<String> = members
        .iter()
        .map(|member| format!("{TARGET_HTTP} {}.", full(world, &format!("{}.db", member.name()))))
        .collect();
    // Priority and weight come first; the weight depends on how many answers there are.
    let found: BTreeSet<String> =
        srv.iter().filter_map(|line| line.splitn(3, ' ').nth(2)).map(str::to_owned).collect();
    expectations.check("SRV", is(Ok(found), &wanted));
    // By the resolver of a container, with the search domains that kubelet gave it.
    for member in &members {
        let name = format!("{}.db", member.name());
        expectations.check(format!("connect to {name}"), connect(world, &name, member.name()));
    }
    expectations.finish()
}

/// A pod with the tools of clients.
fn client() -> serde_json::Value {
    json!({
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "tools"},
        "spec": {
            "selector": {"matchLabels": {"app": "tools"}},
            "template": {
                "metadata": {"labels": {"app": "tools"}},
                "spec": {
                    "terminationGracePeriodSeconds": 1,
                    "containers": [{
                        "name": "tools",
                        "image": "registry.k8s.io/e2e-test-images/agnhost:2.63.0",
                        "args": ["pause"],
                    }],
                },
            },
        },
    })
}

/// The container resolves the name by itself, connects, and reaches this server.
fn connect(world: &World, name: &str, server: &str) -> Result<()> {
    let url = format!("http://{name}:{TARGET_HTTP}/");
    let said = world.kubectl(&[
        "exec",
        "deployment/tools",
        "--",
        "curl",
        "-s",
        "-S",
        "-f",
        "-m",
        "10",
        &url,
    ])?;
    let found = said.lines().find_map(|line| line.strip_prefix("name="));
    ensure!(found.context("no name in the answer")? == server, "{said:?} instead of {server}");
    Ok(())
}
