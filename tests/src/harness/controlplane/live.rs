//! A cluster of namespaces with a real control plane in its fabric, and agents that watch it
//! with the rights of their ServiceAccount.

pub mod exposed;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::objects::Pod;
use super::{ControlPlane, Options, successful};
use crate::harness::netns::actors::agent::{self, Agent, cleanup};
use crate::harness::netns::actors::host::{Host, Serve};
use crate::harness::netns::actors::process::Process;
use crate::harness::netns::topology::cluster::{Builder, Cluster};
use crate::harness::netns::topology::node;
use crate::harness::netns::topology::plan::{NODE_GATEWAY, cluster_ip};
use crate::harness::wait::{PATIENCE, eventually};

/// The port that backends listen on, TCP and UDP; HTTP is one above.
pub const TARGET: u16 = 8080;
/// The port of Services, TCP and UDP.
pub const PORT: u16 = 80;
/// The port of Services for HTTP.
pub const HTTP: u16 = 8000;
/// Where `kubectl proxy` listens, on the loopback interface of the fabric.
const PROXY_PORT: u16 = 8001;

/// Maps that are soon read.
const SMALL: [&str; 6] =
    ["--max-services", "8192", "--max-backends", "8192", "--max-slots", "16384"];

/// A cluster, its control plane and its agents.
pub struct LiveCluster {
    /// Agents by node; ended before the cluster goes.
    agents: Vec<Option<Agent>>,
    servers: Vec<Process>,
    proxy: Mutex<Option<Proxy>>,
    /// The control plane, in the fabric's namespace.
    pub plane: ControlPlane,
    /// The namespaces.
    pub cluster: Cluster,
}

impl LiveCluster {
    /// Builds the cluster, starts the control plane and creates the Nodes; no agent yet.
    ///
    /// # Errors
    /// What cannot be built or started.
    pub fn start(builder: Builder, options: Options) -> Result<Self> {
        let cluster = builder.build()?;
        let namespace = cluster.fabric().netns().path();
        let plane = ControlPlane::start(&namespace, NODE_GATEWAY.v4.into(), options)?;
        for node in cluster.nodes() {
            let addresses = node.addresses();
            plane.create_node(node.name(), &[addresses.v4.into(), addresses.v6.into()])?;
        }
        let agents = cluster.nodes().iter().map(|_| None).collect();
        Ok(Self { agents, servers: Vec::new(), proxy: Mutex::default(), plane, cluster })
    }

    /// Starts an agent on every node and waits until all are healthy.
    ///
    /// # Errors
    /// As [`Agent::start`].
    pub fn start_agents(&mut self, arguments: &[&str]) -> Result<()> {
        for number in 1..=self.agents.len() {
            self.start_agent(number as u8, arguments)?;
        }
        Ok(())
    }

    /// Starts the agent of a node and waits until it is healthy.
    ///
    /// # Errors
    /// As [`Agent::start`].
    pub fn start_agent(&mut self, node: u8, arguments: &[&str]) -> Result<()> {
        self.spawn_agent(node, arguments)?.wait_ready()
    }

    /// Starts the agent of a node.
    ///
    /// # Errors
    /// As [`Agent::spawn`].
    pub fn spawn_agent(&mut self, node: u8, arguments: &[&str]) -> Result<&mut Agent> {
        let kubeconfig = self.plane.agent_kubeconfig();
        let options = agent::Options::kubeconfig(&kubeconfig).arguments(&SMALL);
        self.spawn_agent_with(node, &options.arguments(arguments))
    }

    /// Starts the agent of a node, with any options.
    ///
    /// # Errors
    /// As [`Agent::spawn`].
    pub fn spawn_agent_with(&mut self, node: u8, options: &agent::Options) -> Result<&mut Agent> {
        let agent = Agent::spawn(&self.cluster.node(node), options)?;
        Ok(self.agents[usize::from(node) - 1].insert(agent))
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

    /// Starts servers in each of these pods, on [`TARGET`] and, for HTTP, one above.
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

    /// Reports pods of the cluster, by name, as running; `app` is what Services select.
    ///
    /// # Errors
    /// The API server refuses one.
    pub fn create_pods(&self, app: &str, pods: &[&str]) -> Result<()> {
        for name in pods {
            create_pod(&self.plane, app, &self.cluster.pod(name))?;
        }
        Ok(())
    }

    /// Applies [`service`] with kubectl.
    ///
    /// # Errors
    /// The API server refuses it.
    pub fn create_service(&self, name: &str, number: u8) -> Result<()> {
        self.plane.apply(&service(name, number).to_string())
    }

    /// Waits until every running agent has so many backends for each port and family of a
    /// Service, and has opened its frontends; no row at all for a Service that is not there.
    ///
    /// # Errors
    /// It takes longer than [`PATIENCE`].
    pub fn wait_backends(&self, service: &str, wanted: Option<u64>) -> Result<()> {
        let name = format!("default/{service}");
        self.wait(|agent| {
            let rows = agent.get("services")?;
            let rows = rows.as_array().cloned().unwrap_or_default();
            let mut backends = rows
                .iter()
                .filter(|row| {
                    let port = row["name"].as_str().unwrap_or_default();
                    port.split(':').next() == Some(name.as_str())
                })
                .map(|row| row["cluster_backends"].as_u64());
            Ok(match wanted {
                None => backends.next().is_none(),
                Some(_) => {
                    let all: Vec<_> = backends.collect();
                    !all.is_empty()
                        && all.iter().all(|backends| *backends == wanted)
                        && is_open(agent, &name)?
                }
            })
        })
        .with_context(|| format!("Service {name} was not programmed with {wanted:?} backends"))
    }

    /// Waits until every running agent meets a condition.
    ///
    /// # Errors
    /// It takes longer than [`PATIENCE`].
    pub fn wait(&self, mut is_met: impl FnMut(&Agent) -> Result<bool>) -> Result<()> {
        eventually(|| {
            for agent in self.agents.iter().flatten() {
                ensure!(is_met(agent)?, "{}: not yet", agent.node().name());
            }
            Ok(())
        })
    }

    /// Waits until the log of a node's agent holds `text`.
    ///
    /// # Errors
    /// It ends before, or it takes longer than [`PATIENCE`].
    pub fn wait_log(&mut self, node: u8, text: &str) -> Result<()> {
        let process = self.agent(node)?.process();
        let start = Instant::now();
        while !process.stderr().contains(text) {
            let ended = process.ended()?;
            let in_time = ended.is_none() && start.elapsed() < PATIENCE;
            ensure!(in_time, "no {text:?} in the log, ended: {ended:?}\n{}", process.tail());
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Runs kubectl with every right and returns what it prints.
    ///
    /// # Errors
    /// It fails.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        successful("kubectl", self.plane.kubectl(arguments)?).with_context(|| arguments.join(" "))
    }

    /// A request to the API server with every right, faster than [`LiveCluster::kubectl`]: the
    /// status and the object that it answers with. The thread of the first request must
    /// outlive the others.
    ///
    /// # Errors
    /// No answer.
    pub fn request(&self, method: &str, path: &str, body: &Value) -> Result<(u16, Value)> {
        {
            let mut proxy = self.proxy.lock().unwrap_or_else(PoisonError::into_inner);
            if proxy.is_none() {
                *proxy = Some(Proxy::start(&self.plane, &self.cluster)?);
            }
        }
        let netns = self.cluster.fabric().netns();
        netns.run(|| request(method, path, body)).with_context(|| format!("{method} {path}"))
    }

    /// Watches objects by a path with `?watch=1`: one event a line.
    ///
    /// # Errors
    /// No answer.
    pub fn watch(&self, path: &str) -> Result<BufReader<TcpStream>> {
        self.request("GET", "/readyz", &Value::Null)?;
        let stream = self.cluster.fabric().netns().run(|| ask("GET", path, ""))?;
        let mut reader = BufReader::new(stream);
        let mut line = String::new();
        while reader.read_line(&mut line)? > 2 {
            line.clear();
        }
        Ok(reader)
    }

    /// Sends a signal to the API server, to stop (SIGSTOP) and resume (SIGCONT) it.
    ///
    /// # Errors
    /// It does not run.
    pub fn signal_api_server(&self, signal: nix::sys::signal::Signal) -> Result<()> {
        let id = self.plane.api_server.as_ref().context("the API server is stopped")?.id();
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(id.try_into()?), signal)?;
        Ok(())
    }

    /// `curl` from a host, with more arguments than `--silent --show-error --fail`.
    ///
    /// # Errors
    /// It fails.
    pub fn curl(&self, client: &Host, arguments: &[&str]) -> Result<String> {
        let mut command = std::process::Command::new("curl");
        command.args(["--silent", "--show-error", "--fail", "--max-time", "5"]).args(arguments);
        client.output(command, 2 * PATIENCE)
    }

    /// A kubeconfig file for the agent's server with another token.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn kubeconfig_with(&self, user: &str, token: &str) -> Result<PathBuf> {
        self.plane.write_kubeconfig(user, token)?;
        Ok(self.plane.kubeconfig(user))
    }
}

/// Whether an agent has opened all frontends of a Service: a ClusterIP as a whole is the last.
///
/// # Errors
/// As [`Agent::get`].
/// Creates the object of a pod, with the label `app`.
///
/// # Errors
/// The API server refuses it.
pub fn create_pod(plane: &ControlPlane, app: &str, pod: &node::Pod) -> Result<()> {
    let addresses = pod.addresses();
    plane.create_pod(Pod {
        namespace: "default",
        name: pod.name(),
        labels: &[("app", app)],
        node: &pod.node_name(),
        addresses: &[addresses.v4.into(), addresses.v6.into()],
        ready: true,
    })
}

fn is_open(agent: &Agent, service: &str) -> Result<bool> {
    let frontends = agent.get("frontends")?;
    let mut rows = frontends.as_array().into_iter().flatten();
    Ok(rows.any(|row| row["kind"] == "cluster_ip_address" && row["service"] == service))
}

/// A dual-stack Service that selects the pods of `app: name`, with the ClusterIPs of this
/// number: [`PORT`] over TCP and UDP, [`HTTP`].
pub fn service(name: &str, number: u8) -> Value {
    let mut service = plain_service(name, number);
    let http = json!({"name": "http", "protocol": "TCP", "port": HTTP, "targetPort": TARGET + 1});
    service["spec"]["ports"].as_array_mut().into_iter().for_each(|ports| ports.push(http.clone()));
    service
}

/// The same with [`PORT`] alone.
pub fn plain_service(name: &str, number: u8) -> Value {
    let addresses = cluster_ip(number);
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"namespace": "default", "name": name},
        "spec": {
            "selector": {"app": name},
            "ipFamilyPolicy": "RequireDualStack",
            "clusterIP": addresses.v4,
            "clusterIPs": [addresses.v4.to_string(), addresses.v6.to_string()],
            "ports": [
                {"name": "tcp", "protocol": "TCP", "port": PORT, "targetPort": TARGET},
                {"name": "udp", "protocol": "UDP", "port": PORT, "targetPort": TARGET},
            ],
        },
    })
}

/// `kubectl proxy`: it logs in, so that requests need not.
struct Proxy(Child);

impl Proxy {
    fn start(plane: &ControlPlane, cluster: &Cluster) -> Result<Self> {
        let port = format!("--port={PROXY_PORT}");
        let mut command = plane.kubectl_command(["proxy", &port])?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut proxy = Self(command.spawn().context("run kubectl proxy")?);
        let start = Instant::now();
        loop {
            let ready = cluster.fabric().netns().run(|| request("GET", "/readyz", &Value::Null));
            if ready.is_ok() {
                return Ok(proxy);
            }
            let ended = proxy.0.try_wait()?;
            ensure!(ended.is_none(), "kubectl proxy ended with {ended:?}");
            ensure!(start.elapsed() < PATIENCE, "kubectl proxy does not answer: {ready:?}");
            thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// A request from the calling thread's namespace.
fn request(method: &str, path: &str, body: &Value) -> Result<(u16, Value)> {
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let mut answer = String::new();
    ask(method, path, &body)?.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no end of HTTP headers")?;
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    let object = serde_json::from_str(body).unwrap_or_else(|_| json!(body));
    Ok((status.context("no HTTP status")?, object))
}

/// Sends a request. By HTTP/1.0 the answer is not cut in chunks and ends with the connection.
fn ask(method: &str, path: &str, body: &str) -> Result<TcpStream> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, PROXY_PORT))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let kind = match method {
        "PATCH" => "application/merge-patch+json",
        _ => "application/json",
    };
    let length = body.len();
    let request = format!(
        "{method} {path} HTTP/1.0\r\nHost: localhost\r\nContent-Type: {kind}\r\n\
         Accept: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
    );
    stream.write_all(request.as_bytes())?;
    Ok(stream)
}

impl Drop for LiveCluster {
    fn drop(&mut self) {
        for (index, agent) in self.agents.iter_mut().enumerate() {
            if thread::panicking()
                && let Some(agent) = agent.as_mut()
            {
                eprint!("{}", agent.process().tail());
            }
            drop(agent.take());
            if let Err(error) = cleanup(&self.cluster.node(index as u8 + 1)) {
                eprintln!("cleanup of node{}: {error:#}", index + 1);
            }
        }
    }
}
