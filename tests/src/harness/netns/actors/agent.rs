//! The agent under test, on a node.

use std::ffi::OsString;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use serde_json::Value;

use super::client::program;
use super::process::Process;
use super::rights;
use crate::harness::netns::topology::node::Node;
use crate::harness::netns::traffic::http;
use crate::harness::wait::{PATIENCE, eventually, patiently};

/// The port of `/healthz`.
const HEALTH_PORT: u16 = 10256;

/// How long an agent may take to its first state in the maps: the kernel verifies every program
/// first, seconds of work for one CPU, which a busy machine gives in small shares.
const START: Duration = Duration::from_secs(180);

/// A running `lb-agent run`.
#[derive(Debug)]
pub struct Agent {
    node: Arc<Node>,
    process: Process,
}

/// How an agent is started.
#[derive(Clone, Debug, Default)]
pub struct Options {
    program: Option<PathBuf>,
    has_no_state_dir: bool,
    arguments: Vec<OsString>,
    environment: Vec<(String, String)>,
}

impl Options {
    /// Objects from the files in a directory.
    pub fn manifests(directory: &Path) -> Self {
        Self::default().argument("--manifests").argument(directory)
    }

    /// Objects from an API server.
    pub fn kubeconfig(file: &Path) -> Self {
        Self::default().argument("--kubeconfig").argument(file)
    }

    /// Another build of the agent than [`lb_agent`] finds.
    #[must_use]
    pub fn program(mut self, program: &Path) -> Self {
        self.program = Some(program.to_owned());
        self
    }

    /// The agent of a release with the layout of pins v3, which has no `--state-dir`.
    #[must_use]
    pub fn release_v3(mut self, program: &Path) -> Self {
        self.has_no_state_dir = true;
        self.program(program)
    }

    /// One more argument.
    #[must_use]
    pub fn argument(mut self, argument: impl Into<OsString>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// A variable of the environment.
    #[must_use]
    pub fn variable(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// More arguments.
    #[must_use]
    pub fn arguments(mut self, arguments: &[&str]) -> Self {
        self.arguments.extend(arguments.iter().map(OsString::from));
        self
    }
}

impl Agent {
    /// Starts the agent and waits until it is healthy.
    ///
    /// # Errors
    /// It ends, or `/healthz` does not answer 200 in three minutes; with the end of its log.
    pub fn start(node: &Arc<Node>, options: &Options) -> Result<Self> {
        let mut agent = Self::spawn(node, options)?;
        agent.wait_ready()?;
        Ok(agent)
    }

    /// Starts the agent without waiting.
    ///
    /// # Errors
    /// The program is not there.
    pub fn spawn(node: &Arc<Node>, options: &Options) -> Result<Self> {
        let mut command = match &options.program {
            Some(program) => Command::new(program),
            None => lb_agent()?,
        };
        command.arg("run").args(["--hostname-override", node.name()]);
        command.arg("--bpf-dir").arg(node.bpf_dir());
        if !options.has_no_state_dir {
            command.arg("--state-dir").arg(node.state_dir());
        }
        command.arg("--cgroup").arg(node.cgroup_tree().path());
        command.args(&options.arguments);
        command.envs(options.environment.iter().map(|(name, value)| (name, value)));
        rights::limit(&mut command, &rights::of_manifest()?);
        let process = node.spawn_agent("lb-agent", command)?;
        Ok(Self { node: node.clone(), process })
    }

    /// Waits until `/healthz` answers 200.
    ///
    /// # Errors
    /// As [`Agent::start`].
    pub fn wait_ready(&mut self) -> Result<()> {
        let ready = patiently(START);
        let deadline = Instant::now() + ready;
        let process = &mut self.process;
        self.node.netns().run(|| {
            let mut last = String::new();
            while Instant::now() < deadline {
                if let Some(status) = process.ended()? {
                    bail!("the agent ended with {status}\n{}", process.tail());
                }
                match http_get(HEALTH_PORT, "/healthz") {
                    Ok((200, _)) => return Ok(()),
                    Ok((status, body)) => last = format!("{status} {body}"),
                    Err(error) => last = format!("{error:#}"),
                }
                thread::sleep(Duration::from_millis(5));
            }
            bail!("the agent is not healthy after {ready:?}: {last}\n{}", process.tail())
        })
    }

    /// Waits until one line of the log has all of these words.
    ///
    /// # Errors
    /// The agent ends, or it takes longer than [`PATIENCE`]; with the end of its log.
    pub fn wait_log(&mut self, words: &[&str]) -> Result<()> {
        let process = &mut self.process;
        let mut ended = None;
        eventually(|| {
            // Its last words count, so the log is read after the status.
            ended = process.ended()?;
            let log = process.stderr();
            let is_said = log.lines().any(|line| words.iter().all(|word| line.contains(word)));
            if is_said || ended.is_some() { Ok(is_said) } else { bail!("no line yet") }
        })
        .and_then(|is_said| if is_said { Ok(()) } else { bail!("it ended: {ended:?}") })
        .with_context(|| format!("no line of the log has {words:?}\n{}", process.tail()))
    }

    /// The node that it runs on.
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// The process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// `GET` from 127.0.0.1 of the node: status and body.
    ///
    /// # Errors
    /// Nobody listens, or no HTTP answer.
    pub fn http(&self, port: u16, path: &str) -> Result<(u16, String)> {
        self.node.netns().run(|| http_get(port, path))
    }

    /// SIGKILL; the datapath stays.
    ///
    /// # Errors
    /// It cannot be waited for.
    pub fn kill9(mut self) -> Result<()> {
        self.process.kill().map(drop)
    }

    /// SIGTERM; the datapath stays.
    ///
    /// # Errors
    /// It still runs after [`PATIENCE`].
    pub fn terminate(mut self) -> Result<ExitStatus> {
        self.process.signal(Signal::SIGTERM)?;
        self.process.wait(PATIENCE)
    }

    /// How often a packet of any hook ended for this reason, by `get counters`.
    ///
    /// # Errors
    /// As [`get`].
    pub fn counted(&self, reason: &str) -> Result<u64> {
        let counters = self.get("counters")?;
        let rows = counters.as_array().into_iter().flatten();
        let rows = rows.filter(|row| row["reason"] == reason);
        Ok(rows.filter_map(|row| row["count"].as_u64()).sum())
    }

    /// `lb-agent get WHAT` on this agent's node.
    ///
    /// # Errors
    /// As [`get`].
    pub fn get(&self, what: &str) -> Result<Value> {
        get(&self.node, what)
    }
}

/// `lb-agent get WHAT -o json` of a node, whether an agent runs there or not.
///
/// # Errors
/// The command fails or prints no JSON.
pub fn get(node: &Node, what: &str) -> Result<Value> {
    let mut command = lb_agent()?;
    command.args(["get", what, "-o", "json", "--bpf-dir"]).arg(node.bpf_dir());
    let output = node.output(command, patiently(PATIENCE))?;
    serde_json::from_str(&output).with_context(|| format!("`get {what}` printed {output:?}"))
}

/// `lb-agent explain -o json` on a node: `from` with or without a port, `to` with a protocol.
///
/// # Errors
/// The command fails or prints no JSON.
pub fn explain(node: &Node, from: &str, to: &str, at: &str) -> Result<Value> {
    let mut command = lb_agent()?;
    command.args(["explain", "--from", from, "--to", to, "--at", at, "-o", "json"]);
    command.arg("--bpf-dir").arg(node.bpf_dir());
    let output = node.output(command, patiently(PATIENCE))?;
    serde_json::from_str(&output).with_context(|| format!("`explain` printed {output:?}"))
}

/// `lb-agent cleanup` on a node.
///
/// # Errors
/// The command fails.
pub fn cleanup(node: &Node) -> Result<String> {
    let mut command = lb_agent()?;
    command.arg("cleanup").arg("--bpf-dir").arg(node.bpf_dir());
    command.arg("--cgroup").arg(node.cgroup_tree().path());
    node.output(command, patiently(PATIENCE))
}

/// The agent's program: `LB_AGENT`, else the release build of this workspace, which
/// `cargo xtask build` makes.
///
/// # Errors
/// It is not there.
pub fn lb_agent() -> Result<Command> {
    if std::env::var_os("LB_AGENT").is_none() {
        let built = release("lb-agent");
        if built.is_file() {
            return Ok(Command::new(built));
        }
    }
    Ok(Command::new(program("LB_AGENT", "lb-agent", &[])?))
}

/// The agent whose maps have other layouts, as a next release may have them: `LB_AGENT_NEXT`, else
/// the one beside the running program, which `cargo xtask test netns` builds.
///
/// # Errors
/// It is not there.
pub fn lb_agent_next() -> Result<PathBuf> {
    program("LB_AGENT_NEXT", "lb-agent-next", &[]).context(
        "run `cargo xtask test netns`, or build it with `cargo build -p lb-agent --features \
         next-layout --bin lb-agent-next`",
    )
}

/// A program of the release build.
fn release(name: &str) -> PathBuf {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| workspace.join("target"), PathBuf::from);
    target.join("release").join(name)
}

/// A request to 127.0.0.1 of the calling thread's namespace.
pub(crate) fn http_get(port: u16, path: &str) -> Result<(u16, String)> {
    let address = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port);
    let answer = http::request("GET", address, path, &[])?;
    Ok((answer.status(), answer.body))
}
