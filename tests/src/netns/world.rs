//! A cluster with an agent on every node, and Services in its manifests.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::agent::{Agent, Options, cleanup};
use super::cluster::{Builder, Cluster};
use super::host::{Host, Serve};
use super::manifests::{Endpoint, Manifests, Service};
use super::plan::{Family, cidr, cluster_ip};
use super::process::Process;
use crate::echo::{Answer, Probe, Transport};

/// The port that backends listen on, TCP and UDP.
pub const TARGET: u16 = 8080;
/// The port of Services.
pub const PORT: u16 = 80;
/// How long a change may take to be seen.
const SEEN: Duration = Duration::from_secs(5);

/// A cluster, its agents and their manifests.
pub struct World {
    /// Agents by node; ended before the cluster goes.
    agents: Vec<Option<Agent>>,
    servers: Vec<Process>,
    /// The objects that all agents read.
    pub manifests: Manifests,
    /// The namespaces.
    pub cluster: Cluster,
    arguments: Vec<String>,
}

impl World {
    /// Builds the cluster, describes it in manifests and starts an agent on every node.
    ///
    /// # Errors
    /// What cannot be built, or an agent that does not become healthy.
    pub fn start(builder: Builder, arguments: &[&str]) -> Result<Self> {
        let cluster = builder.build()?;
        let manifests = Manifests::new()?;
        for node in cluster.nodes() {
            manifests.node(&format!("node{}", node.number()), node.addresses(), None)?;
        }
        manifests.write("service-cidr.json", &service_cidr())?;
        let mut world = Self {
            agents: cluster.nodes().iter().map(|_| None).collect(),
            servers: Vec::new(),
            manifests,
            cluster,
            arguments: arguments.iter().map(ToString::to_string).collect(),
        };
        for number in 1..=world.agents.len() {
            world.start_agent(number as u8)?;
        }
        Ok(world)
    }

    /// Starts the agent of a node and waits until it is healthy.
    ///
    /// # Errors
    /// As [`Agent::start`].
    pub fn start_agent(&mut self, node: u8) -> Result<()> {
        let arguments: Vec<&str> = self.arguments.iter().map(String::as_str).collect();
        let options = Options::manifests(self.manifests.path()).arguments(&arguments);
        let agent = Agent::start(&self.cluster.node(node), &options)?;
        self.agents[usize::from(node) - 1] = Some(agent);
        Ok(())
    }

    /// The agent of a node.
    ///
    /// # Errors
    /// It does not run.
    pub fn agent(&mut self, node: u8) -> Result<&mut Agent> {
        self.agents[usize::from(node) - 1].as_mut().context("this agent does not run")
    }

    /// Takes the agent of a node, to end it.
    ///
    /// # Errors
    /// It does not run.
    pub fn take_agent(&mut self, node: u8) -> Result<Agent> {
        self.agents[usize::from(node) - 1].take().context("this agent does not run")
    }

    /// Starts a server on [`TARGET`] in each of these pods.
    ///
    /// # Errors
    /// As [`Host::serve`].
    pub fn serve(&mut self, pods: &[&str]) -> Result<()> {
        for pod in pods {
            let server = self.cluster.pod(pod).serve(&Serve::on(TARGET).http(TARGET + 1))?;
            self.servers.push(server);
        }
        Ok(())
    }

    /// Starts a server on [`TARGET`] in a node itself.
    ///
    /// # Errors
    /// As [`Host::serve`].
    pub fn serve_node(&mut self, node: u8) -> Result<()> {
        let server = self.cluster.node(node).serve(&Serve::on(TARGET).http(TARGET + 1))?;
        self.servers.push(server);
        Ok(())
    }

    /// A Service on [`PORT`], TCP and UDP, with the ClusterIPs of this number.
    pub fn service(&self, name: &str, number: u8) -> Service {
        Service::new(name).cluster_ips(cluster_ip(number)).tcp(PORT, TARGET).udp(PORT, TARGET)
    }

    /// The endpoints that these pods make.
    pub fn endpoints(&self, pods: &[&str]) -> Vec<Endpoint> {
        pods.iter().flat_map(|pod| Endpoint::of_pod(&self.cluster.pod(pod))).collect()
    }

    /// Publishes a Service and waits until every running agent has programmed so many
    /// backends of it.
    ///
    /// # Errors
    /// It takes longer than 5 s.
    pub fn publish(&self, service: &Service, endpoints: &[Endpoint]) -> Result<()> {
        self.manifests.publish(service, endpoints)?;
        let name = service.object()["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        let name = format!("default/{name}");
        // Each endpoint is one backend for each of the Service's ports.
        let ports = service.object()["spec"]["ports"].as_array().map_or(0, Vec::len);
        let wanted = endpoints.len() * ports;
        self.wait(|agent| {
            let services = agent.get("services")?;
            let rows = services.as_array().cloned().unwrap_or_default();
            let of_service = |row: &&serde_json::Value| {
                let port = row["name"].as_str().unwrap_or_default();
                port.split(':').next() == Some(name.as_str())
            };
            let backends = |row: &serde_json::Value| row["cluster_backends"].as_u64();
            let found: u64 = rows.iter().filter(of_service).filter_map(backends).sum();
            Ok(rows.iter().any(|row| of_service(&row)) && found as usize == wanted)
        })
        .with_context(|| format!("Service {name} was not programmed with {wanted} backends"))
    }

    /// Waits until every running agent meets a condition.
    ///
    /// # Errors
    /// It takes longer than 5 s.
    pub fn wait(&self, mut is_met: impl FnMut(&Agent) -> Result<bool>) -> Result<()> {
        let start = Instant::now();
        loop {
            let mut all = true;
            for agent in self.agents.iter().flatten() {
                all &= is_met(agent)?;
            }
            if all {
                return Ok(());
            }
            ensure!(start.elapsed() < SEEN, "not within {SEEN:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Asks a Service as `client` and checks who answered, from which address it was
    /// asked, and that the client sees the Service as its peer.
    ///
    /// # Errors
    /// Anything else.
    pub fn check(
        &self,
        client: &Host,
        (transport, family): (Transport, Family),
        number: u8,
        servers: &[&str],
        seen: &[std::net::IpAddr],
    ) -> Result<String> {
        let to = (cluster_ip(number).get(family), PORT).into();
        let what = format!("{} -> {to} {transport:?}", client.name());
        let answer = client.ask(Probe::new(transport, to))?;
        expect(&what, &answer, to, servers, seen)
    }
}

/// Checks an answer; returns who gave it.
///
/// # Errors
/// It is another one.
pub fn expect(
    what: &str,
    answer: &Answer,
    to: std::net::SocketAddr,
    servers: &[&str],
    seen: &[std::net::IpAddr],
) -> Result<String> {
    let reached = answer.reached().with_context(|| format!("{what}: {answer:?}"))?;
    let greeting = &reached.greeting;
    ensure!(servers.contains(&greeting.name.as_str()), "{what}: not by {servers:?}: {answer:?}");
    ensure!(seen.contains(&greeting.client_address), "{what}: not from {seen:?}: {answer:?}");
    // A socket that asked for a v4-mapped address is told one.
    let peer = std::net::SocketAddr::new(reached.peer.ip().to_canonical(), reached.peer.port());
    ensure!(peer == to, "{what}: the client sees another peer: {answer:?}");
    Ok(greeting.name.clone())
}

fn service_cidr() -> String {
    let object = json!({
        "apiVersion": "networking.k8s.io/v1",
        "kind": "ServiceCIDR",
        "metadata": {"name": "kubernetes"},
        "spec": {"cidrs": [cidr::SERVICES_V4.to_string(), cidr::SERVICES_V6.to_string()]},
    });
    format!("{object:#}")
}

impl Drop for World {
    fn drop(&mut self) {
        for (index, agent) in self.agents.iter_mut().enumerate() {
            drop(agent.take());
            if let Err(error) = cleanup(&self.cluster.node(index as u8 + 1)) {
                eprintln!("cleanup of node{}: {error:#}", index + 1);
            }
        }
    }
}
