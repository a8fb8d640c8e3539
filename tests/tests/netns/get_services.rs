//! What `get services` tells of the endpoints of a Service, of what it has carried and of what it
//! turned away, beside what real sockets did.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lb_tests::harness::echo::{Probe, Transport};
use lb_tests::harness::netns::actors::agent;
use lb_tests::harness::netns::topology::cluster::Cluster;
use lb_tests::harness::netns::topology::plan::Family;
use lb_tests::harness::netns::words::fronts::{Front, SILENT};
use lb_tests::harness::netns::words::scenario::{SMALL_MAPS, Scenario};
use lb_tests::harness::wait::PATIENCE;
use serde_json::Value;

/// The Services of the tests by number: what their addresses and node ports end with.
const WEB: u8 = 1;
const NONE: u8 = 2;
const FAR_LOCAL: u8 = 3;
const RANGED: u8 = 4;
const NEXT: u8 = 5;

/// The row of a service port, on node 1.
fn row(scenario: &Scenario, name: &str, family: Family, protocol: &str) -> Result<Value> {
    let rows = agent::get(&scenario.cluster.node(1), "services")?;
    let number = if family == Family::V4 { 4 } else { 6 };
    let rows = rows.as_array().context("no rows")?;
    let of_it = |row: &&Value| {
        row["name"].as_str().and_then(|text| text.split(':').next()) == Some(name)
            && row["family"] == number
            && row["protocol"] == protocol
    };
    rows.iter().find(of_it).cloned().with_context(|| format!("no {name} {family:?} {protocol}"))
}

fn start(mode: &str) -> Result<Scenario> {
    let builder = Cluster::builder().pod(1, "a").pod(1, "b").pod(2, "c").pod(2, "d");
    let mut scenario =
        Scenario::start(builder, &[&["--socket-lb", mode][..], &SMALL_MAPS].concat())?;
    scenario.serve(&["b", "c"])?;
    scenario.publish(&scenario.exposed("web", WEB), &scenario.endpoints(&["b"]))?;
    scenario.publish(&scenario.exposed("none", NONE), &[])?;
    let far = scenario.endpoints(&["c"]);
    scenario.publish(&scenario.exposed("far-local", FAR_LOCAL).external_local(), &far)?;
    let ranged = scenario.exposed("ranged", RANGED).source_range("10.0.0.0/8");
    scenario.publish(&ranged.source_range("fd00::/8"), &far)?;
    scenario.cluster.fabric().route_external_to(1)?;
    Ok(scenario)
}

#[test]
fn endpoints_are_told_by_their_condition_and_place() -> Result<()> {
    let scenario = start("off")?;
    let mut endpoints = scenario.endpoints(&["b", "c"]);
    endpoints.extend(scenario.endpoints(&["d"]).into_iter().map(|endpoint| endpoint.terminating()));
    endpoints.extend(scenario.endpoints(&["a"]).into_iter().map(|endpoint| endpoint.not_ready()));
    scenario.publish(&scenario.exposed("web", WEB), &endpoints)?;
    for family in Family::ALL {
        let row = row(&scenario, "default/web", family, "tcp")?;
        let told = [&row["ready"], &row["terminating"], &row["local"]];
        ensure!(told == [2, 1, 1], "{row:#}");
    }
    Ok(())
}

/// A flow of a known number of packets and bytes, and each way to be turned away.
#[test]
fn what_a_service_carries_and_turns_away_is_counted() -> Result<()> {
    let mut scenario = start("off")?;
    let a = scenario.cluster.pod("a");
    let none = |scenario: &Scenario, family| {
        let row = row(scenario, "default/web", family, "udp")?;
        ensure!(row["packets"] == 0 && row["bytes"] == 0 && row["flows"] == 0, "{row:#}");
        Ok(())
    };
    for family in Family::ALL {
        none(&scenario, family)?;
        let to = Front::ClusterIp.at(&scenario, WEB, family);
        let payload = "x".repeat(100);
        let connection = a.open(Probe::udp(to).connected().payload(&payload))?;
        for _ in 0..4 {
            connection.exchange(&payload, Duration::from_secs(1))?;
        }
        let row = row(&scenario, "default/web", family, "udp")?;
        let headers = if family == Family::V4 { 14 + 20 + 8 } else { 14 + 40 + 8 };
        ensure!(row["packets"] == 10 && row["flows"] == 1, "five there, five back: {row:#}");
        let bytes = row["bytes"].as_u64().context("no bytes")?;
        ensure!(bytes > 5 * (headers + 100) + 5 * headers, "{row:#}");
        ensure!(row["drops"] == serde_json::json!({}), "{row:#}");
    }
    turned_away(&scenario)?;
    starts_anew(&mut scenario)
}

/// Each reason, by the client that meets it.
fn turned_away(scenario: &Scenario) -> Result<()> {
    let (a, outside) = (scenario.cluster.pod("a"), scenario.cluster.outside());
    for family in Family::ALL {
        let refused = a.ask(Probe::tcp(Front::ClusterIp.at(scenario, NONE, family)))?;
        ensure!(refused.error() == Some("ECONNREFUSED"), "{refused:?}");
        for number in [FAR_LOCAL, RANGED] {
            let to = Front::Balancer.at(scenario, number, family);
            outside.ask(Probe::new(Transport::Udp, to).timeout(SILENT))?;
        }
        for (name, protocol, reason) in [
            ("default/none", "tcp", "no_endpoint"),
            ("default/far-local", "udp", "no_local_endpoint"),
            ("default/ranged", "udp", "source_not_allowed"),
        ] {
            let row = row(scenario, name, family, protocol)?;
            ensure!(row["drops"] == serde_json::json!({reason: 1}), "{row:#}");
        }
    }
    Ok(())
}

/// The index of a Service that is gone counts from nothing for the next one, and an agent that
/// starts again goes on with the counts.
fn starts_anew(scenario: &mut Scenario) -> Result<()> {
    let before = row(scenario, "default/web", Family::V4, "udp")?;
    scenario.take_agent(1)?.terminate()?;
    scenario.start_agent(1)?;
    let after = row(scenario, "default/web", Family::V4, "udp")?;
    ensure!(after["packets"] == before["packets"], "{before:#} {after:#}");
    let none = scenario.exposed("none", NONE);
    let old: Vec<Value> = indices(scenario, "default/none")?;
    scenario.delete(&none)?;
    scenario.delete(&scenario.exposed("web", WEB))?;
    // An index is used again a second after it was given up.
    let mut taken = Vec::new();
    let start = Instant::now();
    while start.elapsed() < PATIENCE {
        scenario.publish(&scenario.exposed("next", NEXT), &[])?;
        taken = indices(scenario, "default/next")?;
        if taken.iter().any(|index| old.contains(index)) {
            break;
        }
        scenario.delete(&scenario.exposed("next", NEXT))?;
    }
    ensure!(taken.iter().any(|index| old.contains(index)), "{taken:?} none of {old:?}");
    for family in Family::ALL {
        for protocol in ["tcp", "udp"] {
            let row = row(scenario, "default/next", family, protocol)?;
            ensure!(row["packets"] == 0 && row["drops"] == serde_json::json!({}), "{row:#}");
        }
    }
    Ok(())
}

fn indices(scenario: &Scenario, name: &str) -> Result<Vec<Value>> {
    let mut found = Vec::new();
    for family in Family::ALL {
        for protocol in ["tcp", "udp"] {
            found.push(row(scenario, name, family, protocol)?["index"].clone());
        }
    }
    Ok(found)
}

/// A call that is refused before there is a packet counts as well; what is connected does not.
#[test]
fn calls_that_are_refused_are_counted() -> Result<()> {
    let scenario = start("tcp")?;
    let a = scenario.cluster.pod("a");
    for family in Family::ALL {
        let refused = a.ask(Probe::tcp(Front::ClusterIp.at(&scenario, NONE, family)))?;
        ensure!(refused.error() == Some("ECONNREFUSED"), "{refused:?}");
        let row_none = row(&scenario, "default/none", family, "tcp")?;
        ensure!(row_none["drops"] == serde_json::json!({"no_endpoint": 1}), "{row_none:#}");
        a.ask(Probe::tcp(Front::ClusterIp.at(&scenario, WEB, family)))?;
        let row = row(&scenario, "default/web", family, "tcp")?;
        ensure!(row["packets"] == 0 && row["flows"] == 0, "{row:#}");
    }
    Ok(())
}
