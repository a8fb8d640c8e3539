//! Services that clients outside reach: what a user asks for, what a cloud adds, and what
//! agents make of it.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::{LiveCluster, is_open, service};
use crate::harness::netns::actors::host::Host;
use crate::harness::netns::topology::plan::{Addresses, Family};
use crate::harness::wait::{PATIENCE, eventually};

/// What curl ends with where nobody listens, and where nobody answers in time.
const REFUSED: i32 = 7;
const TIMED_OUT: i32 = 28;

/// Whom a Service lets serve its clients outside, or inside.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Policy {
    /// Every endpoint.
    Cluster,
    /// The endpoints of the node that a client comes to.
    Local,
}

impl Policy {
    /// As the API spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cluster => "Cluster",
            Self::Local => "Local",
        }
    }
}

/// [`service`] of a type (`NodePort`, `LoadBalancer`) that selects the pods of `app`.
pub fn exposed(name: &str, number: u8, kind: &str, app: &str) -> Value {
    let mut object = service(name, number);
    object["spec"]["type"] = json!(kind);
    object["spec"]["selector"] = json!({"app": app});
    object
}

/// What an HTTP client is told by the servers of [`LiveCluster::serve`].
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Fetched {
    /// Who answered, and which client it saw.
    Answer {
        /// The server.
        name: String,
        /// The client's address, as the server sees it.
        client: IpAddr,
    },
    /// The connection was refused.
    Refused,
    /// Silence.
    TimedOut,
}

/// Asks by curl, which waits so long.
///
/// # Errors
/// An answer of anybody else, and what is neither an answer, a refusal nor silence.
pub fn fetch(from: &Host, to: SocketAddr, patience: Duration) -> Result<Fetched> {
    let mut command = Command::new("curl");
    command.args(["--silent", "--show-error", "--fail", "--max-time"]);
    command.arg(patience.as_secs_f64().to_string()).arg(format!("http://{to}/"));
    let mut process = from.spawn("curl", command)?;
    let status = process.wait(patience + PATIENCE)?;
    match status.code() {
        Some(0) => parse(&process.stdout()),
        Some(REFUSED) => Ok(Fetched::Refused),
        Some(TIMED_OUT) => Ok(Fetched::TimedOut),
        _ => bail!("curl http://{to} ended with {status}\n{}", process.tail()),
    }
}

fn parse(said: &str) -> Result<Fetched> {
    let value = |key: &str| {
        let found = said.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        found.with_context(|| format!("no {key} in {said:?}"))
    };
    let name = value("name")?.to_owned();
    Ok(Fetched::Answer { name, client: value("client_address")?.parse()? })
}

/// What a health check port tells.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Health {
    /// The status of the answer.
    pub status: u16,
    /// `localEndpoints` of its body.
    pub endpoints: u64,
}

/// Asks a health check port by curl, as a load balancer does.
///
/// # Errors
/// Nobody listens, or the answer is none of a health check port.
pub fn health(from: &Host, at: SocketAddr) -> Result<Health> {
    let mut command = Command::new("curl");
    command.args(["--silent", "--show-error", "--max-time", "5", "--write-out", "\n%{http_code}"]);
    command.arg(format!("http://{at}/"));
    let said = from.output(command, PATIENCE)?;
    let (body, status) = said.rsplit_once('\n').context("no status")?;
    let body: Value = serde_json::from_str(body).with_context(|| said.clone())?;
    let endpoints = body["localEndpoints"].as_u64().with_context(|| said.clone())?;
    Ok(Health { status: status.parse()?, endpoints })
}

/// Waits until a health check port tells of so many endpoints, with 503 for none.
///
/// # Errors
/// It takes longer than [`PATIENCE`], or as [`health`].
pub fn wait_endpoints(from: &Host, at: SocketAddr, endpoints: u64) -> Result<()> {
    let expected = Health { status: if endpoints > 0 { 200 } else { 503 }, endpoints };
    eventually(|| {
        let found = health(from, at)?;
        ensure!(found == expected, "{at} reports {found:?} instead of {expected:?}");
        Ok(())
    })
}

impl LiveCluster {
    /// Gives a Service of type LoadBalancer its addresses, as the controller of a cloud does.
    ///
    /// # Errors
    /// There is no such Service.
    pub fn set_ingress(&self, service: &str, addresses: Addresses) -> Result<()> {
        let ips = [json!({"ip": addresses.v4}), json!({"ip": addresses.v6})];
        let status = json!({"status": {"loadBalancer": {"ingress": ips}}}).to_string();
        self.kubectl(&[
            "patch",
            "service",
            service,
            "--subresource=status",
            "--type=merge",
            "-p",
            &status,
        ])?;
        let wanted = [addresses.v4.to_string(), format!("[{}]", addresses.v6)];
        self.wait_rows(service, |rows| {
            let frontends: Vec<_> =
                rows.iter().filter_map(|row| row["frontends"].as_array()).flatten().collect();
            wanted.iter().all(|address| {
                let start = format!("{address}:");
                frontends.iter().any(|at| at.as_str().is_some_and(|at| at.starts_with(&start)))
            })
        })
    }

    /// Sets the policy for clients outside by `kubectl patch`, and waits until every running
    /// agent has it.
    ///
    /// # Errors
    /// There is no such Service.
    pub fn set_external_policy(&self, service: &str, policy: Policy) -> Result<()> {
        self.set_policy(service, policy, "externalTrafficPolicy", "external_traffic_policy")
    }

    /// [`LiveCluster::set_external_policy`] for clients inside.
    ///
    /// # Errors
    /// There is no such Service.
    pub fn set_internal_policy(&self, service: &str, policy: Policy) -> Result<()> {
        self.set_policy(service, policy, "internalTrafficPolicy", "internal_traffic_policy")
    }

    fn set_policy(&self, service: &str, policy: Policy, field: &str, column: &str) -> Result<()> {
        let patch = json!({"spec": {field: policy.name()}}).to_string();
        self.kubectl(&["patch", "service", service, "-p", &patch])?;
        self.wait_rows(service, |rows| rows.iter().all(|row| row[column] == policy.name()))
    }

    /// Waits until the agents of node 1, 2 and so on have so many local backends for each port
    /// and family of a Service.
    ///
    /// # Errors
    /// It takes longer than [`PATIENCE`], or an agent does not run.
    pub fn wait_local_backends(&self, service: &str, wanted: &[u64]) -> Result<()> {
        let mut node = 0;
        self.wait_rows(service, |rows| {
            let wanted = wanted[node % wanted.len()];
            node += 1;
            rows.iter().all(|row| row["local_backends"] == wanted)
        })
        .with_context(|| format!("not {wanted:?} local backends"))
    }

    /// Waits until exactly these pods serve a Service, as every running agent has it. Where no
    /// policy is Local, the local set is for what other nodes tunnel only, and does not count.
    ///
    /// # Errors
    /// It takes longer than [`PATIENCE`].
    pub fn wait_members(&self, service: &str, pods: &[&str]) -> Result<()> {
        let name = format!("default/{service}");
        let pods = pods.iter().map(|pod| self.cluster.pod(pod).addresses());
        let wanted: BTreeSet<IpAddr> =
            pods.flat_map(|pod| Family::ALL.map(|family| pod.get(family))).collect();
        let mut found = BTreeSet::new();
        self.wait(|agent| {
            let services = agent.get("services")?;
            let services = services.as_array().into_iter().flatten();
            let services: Vec<_> = services.filter(|row| is_port(row, "name", &name)).collect();
            let policies = ["external_traffic_policy", "internal_traffic_policy"];
            let is_local = services
                .iter()
                .any(|row| policies.iter().any(|column| row[column] == Policy::Local.name()));
            // An endpoint is stored before its set has it.
            let is_published =
                is_local || services.iter().all(|row| row["cluster_backends"] == wanted.len() / 2);
            let rows = agent.get("backends")?;
            let rows =
                rows.as_array().into_iter().flatten().filter(|row| is_port(row, "service", &name));
            let serves = |row: &&Value| {
                is_local
                    || row["sets"].as_array().is_some_and(|sets| sets.contains(&"cluster".into()))
            };
            let members = rows
                .filter(serves)
                .filter_map(|row| row["address"].as_str()?.parse::<SocketAddr>().ok());
            found = members.map(|address| address.ip()).collect();
            Ok(found == wanted && is_published && is_open(agent, &name)?)
        })
        .with_context(|| format!("Service {name}: {found:?} serve instead of {wanted:?}"))
    }

    /// Waits until the rows of a Service, of which there are some, meet a condition in every
    /// running agent; they are asked in the order of their nodes.
    fn wait_rows(&self, service: &str, mut is_met: impl FnMut(&[Value]) -> bool) -> Result<()> {
        let name = format!("default/{service}");
        self.wait(|agent| {
            let rows = agent.get("services")?;
            let mut rows = rows.as_array().cloned().unwrap_or_default();
            rows.retain(|row| is_port(row, "name", &name));
            let is_met = is_met(&rows);
            Ok(is_met && !rows.is_empty())
        })
        .with_context(|| format!("Service {name}"))
    }

    /// The node port that the API server has given to a port of a Service.
    ///
    /// # Errors
    /// There is none.
    pub fn node_port(&self, service: &str, port: &str) -> Result<u16> {
        self.port(service, &format!("{{.spec.ports[?(@.name==\"{port}\")].nodePort}}"))
    }

    /// The health check port that the API server has given to a Service.
    ///
    /// # Errors
    /// There is none.
    pub fn health_check_port(&self, service: &str) -> Result<u16> {
        self.port(service, "{.spec.healthCheckNodePort}")
    }

    fn port(&self, service: &str, path: &str) -> Result<u16> {
        let said = self.kubectl(&["get", "service", service, "-o", &format!("jsonpath={path}")])?;
        said.parse().with_context(|| format!("{path} of Service {service} is {said:?}"))
    }
}

/// Whether a column of a row holds the name of a port of this Service.
fn is_port(row: &Value, column: &str, service: &str) -> bool {
    row[column].as_str().and_then(|port| port.split(':').next()) == Some(service)
}
