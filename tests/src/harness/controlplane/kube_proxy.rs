//! The real kube-proxy on a node of a test's cluster, to be compared with and to be taken
//! over from.
//!
//! It writes in the node's network namespace alone: what it would set for the whole machine
//! is turned off by its flags ([`CONFINED`]). It dies with its owner.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::{Command, ExitStatus};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use super::ControlPlane;
use super::programs::kube_proxy;
use crate::harness::netns::actors::process::Process;
use crate::harness::netns::topology::node::Node;
use crate::harness::netns::topology::plan::cidr;
use crate::harness::netns::traffic::http;

/// How long it may take to write its first rules, on a machine that has other work.
const SYNCED: Duration = Duration::from_secs(60);
/// How long it may take to end.
const ENDED: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(20);

/// Flags without which it writes outside of its network namespace, or takes what is the
/// node's for its own: the size of the conntrack table and of its hash are the machine's,
/// timeouts are the test's, and its oom score would make it outlive the test.
const CONFINED: [&str; 7] = [
    "--conntrack-max-per-core=0",
    "--conntrack-min=0",
    "--conntrack-tcp-timeout-established=0s",
    "--conntrack-tcp-timeout-close-wait=0s",
    "--conntrack-udp-timeout=0s",
    "--conntrack-udp-timeout-stream=0s",
    "--oom-score-adj=0",
];

/// What it programs.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Mode {
    /// `iptables`.
    Iptables,
    /// `nftables`.
    Nftables,
}

impl Mode {
    /// Both, for loops.
    pub const ALL: [Self; 2] = [Self::Iptables, Self::Nftables];

    /// As `--proxy-mode` takes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Iptables => "iptables",
            Self::Nftables => "nftables",
        }
    }
}

/// How it is started.
#[derive(Clone, Debug)]
pub struct Options {
    /// What it programs.
    pub mode: Mode,
    /// Where `/healthz` listens, at every address; not 10256 beside an agent.
    pub health_port: u16,
    /// Where `/metrics` listens, on the loopback interface; not 10249 beside an agent.
    pub metrics_port: u16,
    /// More flags; they win.
    pub arguments: Vec<String>,
}

impl Options {
    /// With the ports that kube-proxy has by itself.
    pub fn new(mode: Mode) -> Self {
        Self { mode, health_port: 10256, metrics_port: 10249, arguments: Vec::new() }
    }

    /// With other ports, to run beside an agent.
    pub fn beside_agent(mode: Mode) -> Self {
        Self { health_port: 20256, metrics_port: 20249, ..Self::new(mode) }
    }

    /// More flags; they win.
    #[must_use]
    pub fn arguments(mut self, arguments: &[&str]) -> Self {
        self.arguments.extend(arguments.iter().map(|argument| (*argument).to_owned()));
        self
    }
}

/// A running kube-proxy. Dropping kills it; its rules stay in the namespace.
#[derive(Debug)]
pub struct KubeProxy {
    node: Arc<Node>,
    process: Process,
    options: Options,
}

impl KubeProxy {
    /// Starts it on a node, with the rights of `system:kube-proxy`, and waits until it has
    /// written its rules for both families.
    ///
    /// # Errors
    /// It is not there, it ends, or it has written none in 60 s; with the end of its log.
    pub fn start(plane: &ControlPlane, node: &Arc<Node>, options: Options) -> Result<Self> {
        let mut proxy = Self::spawn(plane, node, options)?;
        proxy.wait_synced()?;
        Ok(proxy)
    }

    /// Starts it without waiting.
    ///
    /// # Errors
    /// It is not there.
    pub fn spawn(plane: &ControlPlane, node: &Arc<Node>, options: Options) -> Result<Self> {
        Self::spawn_with(&plane.kube_proxy_kubeconfig(), node, options)
    }

    /// Starts it with the API server of a kubeconfig, without waiting.
    ///
    /// # Errors
    /// It is not there.
    pub fn spawn_with(kubeconfig: &Path, node: &Arc<Node>, options: Options) -> Result<Self> {
        let mut command = Command::new(kube_proxy()?);
        command
            .arg(format!("--kubeconfig={}", kubeconfig.display()))
            .arg(format!("--hostname-override={}", node.name()))
            .arg(format!("--proxy-mode={}", options.mode.name()))
            .arg(format!("--cluster-cidr={}", cidr::cluster()))
            .arg(format!("--healthz-bind-address=0.0.0.0:{}", options.health_port))
            .arg(format!("--metrics-bind-address=127.0.0.1:{}", options.metrics_port))
            .args(CONFINED)
            .args(&options.arguments);
        let process = node.spawn("kube-proxy", command)?;
        Ok(Self { node: Arc::clone(node), process, options })
    }

    /// Waits until it has written its rules for both families. Its `/healthz` answers 200
    /// before, so this asks its metrics.
    ///
    /// # Errors
    /// As [`KubeProxy::start`].
    pub fn wait_synced(&mut self) -> Result<()> {
        self.wait_synced_within(SYNCED)
    }

    /// [`KubeProxy::wait_synced`] for so long.
    ///
    /// # Errors
    /// As [`KubeProxy::start`].
    pub fn wait_synced_within(&mut self, limit: Duration) -> Result<()> {
        let start = Instant::now();
        loop {
            let answer = self.http(self.options.metrics_port, "/metrics");
            if answer.as_ref().is_ok_and(|answer| has_synced(&answer.body)) {
                return Ok(());
            }
            let ended = self.process.ended()?;
            ensure!(
                ended.is_none() && start.elapsed() < limit,
                "kube-proxy wrote no rules, ended: {ended:?}, asked: {:?}\n{}",
                answer.map(|answer| answer.status_line),
                self.process.tail()
            );
            thread::sleep(POLL);
        }
    }

    /// `GET` from 127.0.0.1 of the node.
    ///
    /// # Errors
    /// Nobody listens, or no HTTP answer.
    pub fn http(&self, port: u16, path: &str) -> Result<http::Answer> {
        let to = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port);
        self.node.netns().run(|| http::request("GET", to, path, &[]))
    }

    /// How it was started.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// The process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// SIGTERM; the rules stay.
    ///
    /// # Errors
    /// It still runs after 10 s.
    pub fn terminate(mut self) -> Result<ExitStatus> {
        self.process.signal(Signal::SIGTERM)?;
        self.process.wait(ENDED).context("stop kube-proxy")
    }
}

/// Whether the rules of both families were written once.
fn has_synced(metrics: &str) -> bool {
    const LAST: &str = "kubeproxy_sync_proxy_rules_last_timestamp_seconds{";
    let values = metrics.lines().filter_map(|line| line.strip_prefix(LAST)?.rsplit(' ').next());
    values.filter(|value| value.parse::<f64>().is_ok_and(|value| value > 0.0)).count() == 2
}

#[cfg(test)]
mod tests {
    use super::has_synced;

    #[test]
    fn rules_are_there_when_both_families_have_a_time() {
        let line = |family: &str, value: &str| {
            format!(
                "kubeproxy_sync_proxy_rules_last_timestamp_seconds{{ip_family=\"{family}\"}} {value}\n"
            )
        };
        let (v4, v6) = (line("IPv4", "1.7636e+09"), line("IPv6", "1.7636e+09"));
        assert!(has_synced(&format!("# HELP\n{v4}{v6}")));
        assert!(!has_synced(&v4));
        assert!(!has_synced(&format!("{v4}{}", line("IPv6", "0"))));
    }
}
