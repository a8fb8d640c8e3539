//! Whether the maps of an agent hold a Service exactly as it was published: these endpoints in
//! its sets and no other, its policies, and every frontend that the Service itself names.
//!
//! The agent opens frontends last of all that it adds and takes backends out of their sets last
//! of all that it removes, so a Service that is programmed is served as a whole.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, ensure};
use ipnet::IpNet;
use serde_json::{Value, json};

use super::manifests::{Endpoint, Port, Service};
use crate::harness::netns::actors::agent::Agent;
use crate::harness::netns::topology::plan::Family;

/// Compares the maps of an agent with a Service and its endpoints.
///
/// # Errors
/// What is missing, or still there.
pub(super) fn check(agent: &Agent, service: &Service, endpoints: &[Endpoint]) -> Result<()> {
    let node = agent.node();
    let tables = Tables {
        services: of_service(agent.get("services")?, "name", service),
        backends: of_service(agent.get("backends")?, "service", service),
        frontends: of_service(agent.get("frontends")?, "service", service),
    };
    let families: Vec<_> = service.cluster_ips.iter().map(|ip| Family::of(*ip)).collect();
    let (found, wanted) = (tables.services.len(), families.len() * service.ports.len());
    ensure!(found == wanted, "{}: {found} rows of `get services`, not {wanted}", node.name());
    for family in families {
        let endpoints: Vec<_> =
            endpoints.iter().filter(|one| Family::of(one.address) == family).collect();
        for port in &service.ports {
            check_port(&tables, node.name(), service, family, port, &endpoints).with_context(
                || format!("{}: {}:{} {family:?}", node.name(), service.name(), port.name),
            )?;
        }
    }
    for ip in &service.cluster_ips {
        let is_whole =
            |row: &Value| row["kind"] == "cluster_ip_address" && row["address"] == ip.to_string();
        ensure!(tables.frontends.iter().any(is_whole), "{}: no frontend {ip}", node.name());
    }
    Ok(())
}

/// The rows of one Service.
struct Tables {
    services: Vec<Value>,
    backends: Vec<Value>,
    frontends: Vec<Value>,
}

fn of_service(table: Value, column: &str, service: &Service) -> Vec<Value> {
    let name = service.name();
    let is_it = |row: &Value| {
        row[column].as_str().and_then(|port| port.split(':').next()) == Some(name.as_str())
    };
    let Value::Array(rows) = table else { return Vec::new() };
    rows.into_iter().filter(is_it).collect()
}

fn check_port(
    tables: &Tables,
    node: &str,
    service: &Service,
    family: Family,
    port: &Port,
    endpoints: &[&Endpoint],
) -> Result<()> {
    let name = format!("{}:{}", service.name(), port.name);
    let number = if family == Family::V4 { 4 } else { 6 };
    let row = tables.services.iter().find(|row| row["name"] == name && row["family"] == number);
    let row = row.context("not in `get services`")?;
    let is_outside = service.node_port.is_some()
        || !service.balancer_ips.is_empty()
        || !service.external_ips.is_empty();
    let cluster = chosen(endpoints.iter().copied());
    let local = if service.internal_local || is_outside {
        chosen(endpoints.iter().copied().filter(|one| one.node.as_deref() == Some(node)))
    } else {
        BTreeSet::new()
    };
    for (set, wanted) in [("cluster", &cluster), ("local", &local)] {
        let found = members(&tables.backends, &name, family, set);
        ensure!(found == *wanted, "{found:?} in the {set} set, not {wanted:?}");
    }
    let count = |is_it: fn(&Endpoint) -> bool| endpoints.iter().filter(|one| is_it(one)).count();
    let policy = |is_local| if is_local { "Local" } else { "Cluster" };
    let mut wanted = vec![
        ("cluster_backends", json!(cluster.len())),
        ("local_backends", json!(local.len())),
        ("ready", json!(count(|one| one.ready))),
        ("terminating", json!(count(|one| one.terminating))),
        ("internal_traffic_policy", json!(policy(service.internal_local))),
        ("external_traffic_policy", json!(policy(is_outside && service.external_local))),
        ("affinity_seconds", json!(service.affinity.map(|time| time.as_secs()))),
    ];
    if let Some(mode) = service.external_mode.filter(|_| is_outside) {
        wanted.push(("external_mode", json!(mode)));
    }
    for (column, value) in wanted {
        ensure!(row[column] == value, "{column} is {}, not {value}", row[column]);
    }
    let shown = texts(&row["source_ranges"]);
    let ranges = ranges(service, family)?;
    ensure!(
        ranges.is_subset(&shown) && ranges.is_empty() == shown.is_empty(),
        "source ranges are {shown:?}, not {ranges:?}"
    );
    let ips = [&service.cluster_ips, &service.balancer_ips, &service.external_ips];
    let ips = ips.into_iter().flatten().filter(|ip| Family::of(**ip) == family);
    let frontends = texts(&row["frontends"]);
    for ip in ips {
        let frontend = SocketAddr::new(*ip, port.number).to_string();
        ensure!(frontends.contains(&frontend), "no frontend {frontend}");
    }
    Ok(())
}

/// The endpoints that serve: the ready ones, or, where there is none, those that still serve
/// while they terminate.
fn chosen<'a>(endpoints: impl Iterator<Item = &'a Endpoint> + Clone) -> BTreeSet<IpAddr> {
    let addresses = |is_it: fn(&Endpoint) -> bool| -> BTreeSet<IpAddr> {
        endpoints.clone().filter(|one| is_it(one)).map(|one| one.address).collect()
    };
    let ready = addresses(|one| one.ready);
    if ready.is_empty() { addresses(|one| one.serving && one.terminating) } else { ready }
}

/// The addresses in a set of a service port.
fn members(backends: &[Value], port: &str, family: Family, set: &str) -> BTreeSet<IpAddr> {
    let of_set = backends.iter().filter(|row| row["service"] == port);
    let of_set = of_set.filter(|row| texts(&row["sets"]).contains(set));
    let addresses = of_set.filter_map(|row| row["address"].as_str()?.parse::<SocketAddr>().ok());
    addresses.map(|at| at.ip()).filter(|ip| Family::of(*ip) == family).collect()
}

/// The source ranges of a family; a range of all addresses restricts nobody.
fn ranges(service: &Service, family: Family) -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    for range in &service.source_ranges {
        let range: IpNet = range.trim().parse().with_context(|| range.clone())?;
        if Family::of(range.addr()) == family {
            if range.prefix_len() == 0 {
                return Ok(BTreeSet::new());
            }
            found.insert(range.trunc().to_string());
        }
    }
    // Source ranges restrict a load balancer's addresses only.
    Ok(if service.balancer_ips.is_empty() { BTreeSet::new() } else { found })
}

fn texts(list: &Value) -> BTreeSet<String> {
    let texts = list.as_array().into_iter().flatten();
    texts.filter_map(|text| Some(text.as_str()?.to_owned())).collect()
}
