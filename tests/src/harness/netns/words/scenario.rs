//! A cluster with an agent on every node, and Services in its manifests.

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::manifests::{Endpoint, Manifests, Service};
use super::programmed;
use crate::harness::echo::{Answer, Probe, Transport};
use crate::harness::netns::actors::agent::{Agent, Options, cleanup};
use crate::harness::netns::actors::host::{Host, Serve};
use crate::harness::netns::actors::process::Process;
use crate::harness::netns::topology::cluster::{Builder, Cluster};
use crate::harness::netns::topology::plan::{Family, cidr, cluster_ip};
use crate::harness::wait::eventually;

/// The port that backends listen on, TCP and UDP.
pub const TARGET: u16 = 8080;
/// The port of Services.
pub const PORT: u16 = 80;
/// Maps that are read in no time: `get` reads all of them.
pub const SMALL_MAPS: [&str; 6] =
    ["--max-services", "1024", "--max-backends", "4096", "--max-slots", "8192"];

/// A cluster, its agents and their manifests.
pub struct Scenario {
    /// Agents by node; ended before the cluster goes.
    agents: Vec<Option<Agent>>,
    servers: Vec<Process>,
    /// The objects that all agents read.
    pub manifests: Manifests,
    /// The namespaces.
    pub cluster: Cluster,
    arguments: Vec<String>,
}

impl Scenario {
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
        let mut scenario = Self {
            agents: cluster.nodes().iter().map(|_| None).collect(),
            servers: Vec::new(),
            manifests,
            cluster,
            arguments: arguments.iter().map(ToString::to_string).collect(),
        };
        for number in 1..=scenario.agents.len() {
            scenario.start_agent(number as u8)?;
        }
        Ok(scenario)
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

    /// Agents that are started from now on get these arguments.
    pub fn set_arguments(&mut self, arguments: &[&str]) {
        self.arguments = arguments.iter().map(ToString::to_string).collect();
    }

    /// The agent of a node.
    ///
    /// # Errors
    /// It does not run.
    pub fn agent(&mut self, node: u8) -> Result<&mut Agent> {
        self.agents[usize::from(node) - 1].as_mut().context("this agent does not run")
    }

    /// This agent is that of a node from now on.
    pub fn set_agent(&mut self, node: u8, agent: Agent) {
        self.agents[usize::from(node) - 1] = Some(agent);
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

    /// Starts these servers in a pod.
    ///
    /// # Errors
    /// As [`Host::serve`].
    pub fn serve_these(&mut self, pod: &str, serve: &Serve) -> Result<()> {
        let server = self.cluster.pod(pod).serve(serve)?;
        self.servers.push(server);
        Ok(())
    }

    /// Starts servers on each of these ports in each of these pods.
    ///
    /// # Errors
    /// As [`Host::serve`].
    pub fn serve_ports(&mut self, pods: &[&str], ports: std::ops::Range<u16>) -> Result<()> {
        for pod in pods {
            let serve =
                ports.clone().fold(Serve::default(), |serve, port| serve.tcp(port).udp(port));
            let server = self.cluster.pod(pod).serve(&serve)?;
            self.servers.push(server);
        }
        Ok(())
    }

    /// Starts a server on [`TARGET`] in a node itself.
    ///
    /// # Errors
    /// As [`Host::serve`].
    pub fn serve_node(&mut self, node: u8) -> Result<()> {
        self.serve_node_these(node, &Serve::on(TARGET).http(TARGET + 1))
    }

    /// Starts these servers in a node itself.
    ///
    /// # Errors
    /// As [`Host::serve`].
    pub fn serve_node_these(&mut self, node: u8, serve: &Serve) -> Result<()> {
        let server = self.cluster.node(node).serve(serve)?;
        self.servers.push(server);
        Ok(())
    }

    /// A Service on [`PORT`], TCP and UDP, with the ClusterIPs of this number.
    pub fn service(&self, name: &str, number: u8) -> Service {
        self.empty_service(name, number).tcp(PORT, TARGET).udp(PORT, TARGET)
    }

    /// A Service with the ClusterIPs of this number, and no port yet.
    pub fn empty_service(&self, name: &str, number: u8) -> Service {
        Service::new(name).cluster_ips(cluster_ip(number))
    }

    /// [`Scenario::service`] that clients outside the cluster reach as well: at a node port, a load
    /// balancer's addresses and external IPs (see [`Service::exposed`]).
    pub fn exposed(&self, name: &str, number: u8) -> Service {
        self.service(name, number).exposed(number)
    }

    /// The endpoints that these pods make.
    pub fn endpoints(&self, pods: &[&str]) -> Vec<Endpoint> {
        pods.iter().flat_map(|pod| Endpoint::of_pod(&self.cluster.pod(pod))).collect()
    }

    /// The endpoints that processes in a node's own network namespace make.
    pub fn node_endpoints(&self, node: u8) -> [Endpoint; 2] {
        let name = format!("node{node}");
        let node = self.cluster.node(node);
        Family::ALL.map(|family| Endpoint::at(node.ip(family)).node(&name))
    }

    /// Publishes a Service and waits until the maps of every running agent hold it with these
    /// endpoints: those that are eligible serve it, and no other endpoint does.
    ///
    /// # Errors
    /// It takes longer than [`PATIENCE`](crate::harness::wait::PATIENCE).
    pub fn publish(&self, service: &Service, endpoints: &[Endpoint]) -> Result<()> {
        self.manifests.publish(service, endpoints)?;
        self.wait_until(|agent| programmed::check(agent, service, endpoints))
    }

    /// Deletes a Service and waits until no running agent has it any more.
    ///
    /// # Errors
    /// There is none, or it takes longer than [`PATIENCE`](crate::harness::wait::PATIENCE).
    pub fn delete(&self, service: &Service) -> Result<()> {
        self.manifests.delete(service)?;
        self.wait_gone(service)
    }

    /// Waits until no running agent has a Service any more.
    ///
    /// # Errors
    /// It takes longer than [`PATIENCE`](crate::harness::wait::PATIENCE).
    pub fn wait_gone(&self, service: &Service) -> Result<()> {
        self.wait(|agent| Ok(backends_of(agent, service)?.is_none()))
            .with_context(|| format!("{} is still there", service.name()))
    }

    /// Waits until every running agent meets a condition.
    ///
    /// # Errors
    /// It takes longer than [`PATIENCE`](crate::harness::wait::PATIENCE).
    pub fn wait(&self, mut is_met: impl FnMut(&Agent) -> Result<bool>) -> Result<()> {
        self.wait_until(|agent| {
            ensure!(is_met(agent)?, "{}: not yet", agent.node().name());
            Ok(())
        })
    }

    /// Waits until a check of every running agent succeeds.
    ///
    /// # Errors
    /// The error of the last check, after [`PATIENCE`](crate::harness::wait::PATIENCE).
    pub fn wait_until(&self, mut check: impl FnMut(&Agent) -> Result<()>) -> Result<()> {
        eventually(|| self.agents.iter().flatten().try_for_each(&mut check))
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

/// How many backends of the cluster set an agent has for all ports and families of a Service;
/// `None` if it has no such Service.
///
/// # Errors
/// As [`Agent::get`].
pub fn backends_of(agent: &Agent, service: &Service) -> Result<Option<usize>> {
    let services = agent.get("services")?;
    let name = service.name();
    let found = services.as_array().into_iter().flatten().filter_map(|row| {
        let is_port = row["name"].as_str()?.split(':').next()? == name;
        is_port.then(|| row["cluster_backends"].as_u64().unwrap_or_default() as usize)
    });
    let counts: Vec<_> = found.collect();
    Ok((!counts.is_empty()).then(|| counts.iter().sum()))
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

impl Drop for Scenario {
    fn drop(&mut self) {
        for (index, agent) in self.agents.iter_mut().enumerate() {
            drop(agent.take());
            if let Err(error) = cleanup(&self.cluster.node(index as u8 + 1)) {
                eprintln!("cleanup of node{}: {error:#}", index + 1);
            }
        }
    }
}
