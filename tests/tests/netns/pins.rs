//! Pins that somebody removes under a running agent: they are back within seconds, and neither
//! they nor their absence costs a packet. And who may take the node away from an agent: nobody.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lb_tests::harness::echo::Probe;
use lb_tests::harness::netns::actors::agent::{self, Agent, Options, lb_agent};
use lb_tests::harness::netns::actors::client::Connection;
use lb_tests::harness::netns::actors::process::Process;
use lb_tests::harness::netns::topology::cluster::Cluster;
use lb_tests::harness::netns::topology::node::Node;
use lb_tests::harness::netns::topology::plan::{Family, cluster_ip};
use lb_tests::harness::netns::traffic::http;
use lb_tests::harness::netns::words::expectations::Expectations;
use lb_tests::harness::netns::words::scenario::{PORT, SMALL_MAPS, Scenario};
use lb_tests::harness::wait::{PATIENCE, eventually};
use nix::sys::signal::Signal;

const SERVICE: u8 = 1;
const HEALTH: u16 = 10256;
const METRICS: u16 = 10249;
const ANSWER: Duration = Duration::from_secs(1);

fn arguments(mode: &str) -> Vec<&str> {
    [&["--socket-lb", mode][..], &SMALL_MAPS].concat()
}

fn set_up(mode: &str) -> Result<Scenario> {
    let builder = Cluster::builder().nodes(1).pod(1, "a").pod(1, "b");
    let mut scenario = Scenario::start(builder, &arguments(mode))?;
    scenario.serve(&["b"])?;
    scenario.publish(&scenario.service("steady", SERVICE), &scenario.endpoints(&["b"]))?;
    Ok(scenario)
}

fn open(scenario: &Scenario) -> Result<Vec<Connection>> {
    let a = scenario.cluster.pod("a");
    let one = |family| a.open(Probe::tcp((cluster_ip(SERVICE).get(family), PORT).into()));
    Family::ALL.into_iter().map(one).collect()
}

/// Connections go on, and new ones are served, TCP and UDP.
fn ensure_served(scenario: &Scenario, held: &[Connection]) -> Result<()> {
    for connection in held {
        let answer = connection.exchange("on", ANSWER)?;
        ensure!(answer.name() == Some("b"), "a connection broke: {answer:?}");
    }
    for family in Family::ALL {
        let to = (cluster_ip(SERVICE).get(family), PORT).into();
        for probe in [Probe::tcp(to), Probe::udp(to)] {
            let answer = scenario.cluster.pod("a").ask(probe)?;
            ensure!(answer.name() == Some("b"), "{family:?}: {answer:?}");
        }
    }
    Ok(())
}

/// The pins below a directory with the kernel's ids of the maps and links.
fn pinned(base: &Path) -> Result<BTreeMap<PathBuf, u32>> {
    let mut found = BTreeMap::new();
    let mut directories = vec![base.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).with_context(|| directory.display().to_string())? {
            let path = entry?.path();
            if path.is_dir() {
                directories.push(path);
                continue;
            }
            let object = lb_sys::obj_get(&path)?;
            let name = path.strip_prefix(base)?.to_string_lossy();
            let id = match name.split(['/', '@']).next() {
                Some("links") => lb_sys::link_info(object.as_fd())?.id,
                Some("maps" | "layouts") => lb_sys::map_info(object.as_fd())?.id,
                _ => lb_sys::program_info(object.as_fd())?.id,
            };
            found.insert(path.strip_prefix(base)?.to_owned(), id);
        }
    }
    Ok(found)
}

fn metric(node: &Node, name: &str) -> Result<u64> {
    let address = (std::net::Ipv4Addr::LOCALHOST, METRICS).into();
    let text = node.netns().run(|| http::request("GET", address, "/metrics", &[]))?.body;
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    let value = line.with_context(|| format!("no {name} in {text}"))?;
    Ok(value.parse::<f64>()? as u64)
}

/// Runs an agent's command to its end: its status and what it says on both streams.
fn run(node: &Node, arguments: &[&str]) -> Result<(Option<i32>, String)> {
    let mut command = lb_agent()?;
    command.args(arguments).arg("--bpf-dir").arg(node.bpf_dir());
    let mut process = node.spawn_agent("command", command)?;
    let status = process.wait(2 * PATIENCE)?;
    Ok((status.code(), format!("{}{}", process.stdout(), process.stderr())))
}

type Removal = fn(&Path) -> std::io::Result<()>;

fn empty(directory: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() { fs::remove_dir_all(path)? } else { fs::remove_file(path)? }
    }
    Ok(())
}

/// Removes pins while the agent serves: all are back, the same ones, and nobody noticed.
fn check_removal(mode: &str, what: &str, remove: Removal) -> Result<()> {
    let mut scenario = set_up(mode)?;
    let node = scenario.cluster.node(1);
    let held = open(&scenario)?;
    let before = pinned(node.bpf_dir())?;
    for kind in ["links", "maps"] {
        ensure!(before.keys().any(|path| path.starts_with(kind)), "no {kind} in {before:?}");
    }
    ensure!(before.contains_key(Path::new("clock")), "{before:?}");
    remove(node.bpf_dir())?;
    ensure_served(&scenario, &held).with_context(|| format!("{what}: without pins"))?;
    let mut unhealthy = None;
    eventually(|| {
        let (status, body) = scenario.agent(1)?.http(HEALTH, "/healthz")?;
        unhealthy = (status != 200).then_some(body).or(unhealthy.take());
        let now = pinned(node.bpf_dir())?;
        ensure!(now == before, "{what}: before {before:?}\nnow {now:?}");
        Ok(())
    })?;
    ensure!(unhealthy.is_none(), "{what}: {unhealthy:?}");
    ensure_served(&scenario, &held)?;
    let agent = scenario.agent(1)?;
    agent.wait_log(&["WARN", "made again", "no traffic was affected"])?;
    let log = agent.process().stderr();
    ensure!(!log.contains("detached by another program"), "{what}: {log}");
    eventually(|| {
        let (restored, missing) =
            (metric(&node, "lb_restored_pins_total")?, metric(&node, "lb_missing_pins")?);
        ensure!((restored, missing) == (before.len() as u64, 0), "{restored} {missing}");
        Ok(())
    })?;
    // Commands find the agent, and no other one can start.
    let (code, said) = run(&node, &["status"])?;
    ensure!(code == Some(0), "{what}: {said}");
    let first = format!("another lb-agent (process {}", scenario.agent(1)?.process().pid());
    let options = Options::manifests(scenario.manifests.path()).arguments(&SMALL_MAPS);
    let mut second = Agent::spawn(&node, &options)?;
    let status = second.process().wait(PATIENCE)?;
    let said = second.process().stderr();
    ensure!(status.code() == Some(1) && said.contains(&first), "{what}: {status} {said}");
    // The pins are what holds the datapath from here on.
    scenario.take_agent(1)?.kill9()?;
    ensure_served(&scenario, &held).with_context(|| format!("{what}: without an agent"))?;
    scenario.start_agent(1)?;
    ensure_served(&scenario, &held).with_context(|| format!("{what}: with the next agent"))
}

#[test]
fn a_directory_that_is_emptied_is_filled_again_and_nobody_notices() -> Result<()> {
    check_removal("off", "emptied", empty)
}

#[test]
fn a_directory_that_is_removed_is_made_again_and_nobody_notices() -> Result<()> {
    check_removal("tcp", "removed", |directory| fs::remove_dir_all(directory))
}

#[test]
fn a_removed_directory_of_links_costs_no_program() -> Result<()> {
    check_removal_of_links()
}

/// The links alone: the checks of the hooks run beside that of the pins, and take nothing off.
fn check_removal_of_links() -> Result<()> {
    let mut scenario = set_up("tcp")?;
    let node = scenario.cluster.node(1);
    let held = open(&scenario)?;
    let before = pinned(node.bpf_dir())?;
    for _ in 0..3 {
        fs::remove_dir_all(node.bpf_dir().join("links"))?;
        eventually(|| {
            ensure_served(&scenario, &held)?;
            let now = pinned(node.bpf_dir())?;
            ensure!(now == before, "before {before:?}\nnow {now:?}");
            Ok(())
        })?;
    }
    let log = scenario.agent(1)?.process().stderr();
    ensure!(!log.contains("detached by another program"), "{log}");
    ensure!(!log.contains("unhealthy"), "{log}");
    Ok(())
}

/// A mount namespace with a bpffs of its own, which lives as long as a process in it.
struct Mounts<'a> {
    node: &'a Node,
    holder: Process,
    point: PathBuf,
}

impl<'a> Mounts<'a> {
    fn make(node: &'a Node, point: &Path) -> Result<Self> {
        let mut command = Command::new("unshare");
        let script = "mount -t bpf bpf \"$0\" && echo mounted && exec sleep 600";
        command.args(["--mount", "sh", "-c", script]).arg(point);
        let mut holder = node.spawn_agent("mounts", command)?;
        holder.wait_for_output("mounted", PATIENCE)?;
        Ok(Self { node, holder, point: point.to_owned() })
    }

    /// A command that runs there.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--mount=/proc/{}/ns/mnt", self.holder.pid())).arg(program);
        command
    }

    fn run(&self, script: &str) -> Result<String> {
        let mut command = self.command("sh");
        command.args(["-c", script]).arg(&self.point);
        self.node.output(command, PATIENCE)
    }

    fn agent(&self, manifests: &Path) -> Result<Process> {
        let mut command = self.command(&lb_agent()?.get_program().to_string_lossy());
        command.args(["run", "--hostname-override", "node1", "--manifests"]).arg(manifests);
        command.arg("--cgroup").arg(self.node.cgroup_tree().path());
        command.arg("--state-dir").arg(self.node.state_dir());
        command.args(arguments("off")).arg("--bpf-dir").arg(self.point.join("lb"));
        self.node.spawn_agent("mounted", command)
    }

    fn has_pins(&self, wanted: &str) -> Result<()> {
        let found = self.run("find \"$0/lb\" -type f | sort")?;
        ensure!(found == wanted, "pinned are {found}, not {wanted}");
        Ok(())
    }
}

fn said(process: &Process, words: &[&str]) -> Result<()> {
    eventually(|| {
        let log = process.stderr();
        let line = log.lines().any(|line| words.iter().all(|word| line.contains(word)));
        ensure!(line, "no line with {words:?}\n{log}");
        Ok(())
    })
}

#[test]
fn a_bpffs_that_is_unmounted_and_mounted_again_gets_the_pins_again() -> Result<()> {
    let mut scenario = set_up("off")?;
    let node = scenario.cluster.node(1);
    scenario.take_agent(1)?.terminate()?;
    agent::cleanup(&node)?;
    let directory = tempfile::tempdir()?;
    let mounts = Mounts::make(&node, directory.path())?;
    let mut agent = mounts.agent(scenario.manifests.path())?;
    said(&agent, &["INFO", " programmed "])?;
    let held = open(&scenario)?;
    ensure_served(&scenario, &held)?;
    let before = mounts.run("find \"$0/lb\" -type f | sort")?;
    ensure!(before.contains("maps/FLOW_TABLE4@2") && before.contains("links/"), "{before}");

    // Nothing can be pinned while there is no bpffs that the agent may write.
    mounts.run("umount -l \"$0\" && mount -t bpf -o ro bpf \"$0\"")?;
    said(&agent, &["WARN", "cannot be made again", "read-only"])?;
    eventually(|| {
        let missing = metric(&node, "lb_missing_pins")?;
        ensure!(missing == before.lines().count() as u64, "{missing} are missing");
        Ok(())
    })?;
    ensure_served(&scenario, &held).context("without a bpffs")?;
    let address = (std::net::Ipv4Addr::LOCALHOST, HEALTH).into();
    let health = node.netns().run(|| http::request("GET", address, "/healthz", &[]))?;
    ensure!(health.status() == 200, "{}", health.body);

    mounts.run("umount \"$0\" && mount -t bpf bpf \"$0\"")?;
    eventually(|| mounts.has_pins(&before))?;
    said(&agent, &["WARN", "made again", "removed or unmounted"])?;
    ensure_served(&scenario, &held)?;
    agent.kill()?;
    ensure_served(&scenario, &held).context("without an agent")?;
    let agent = mounts.agent(scenario.manifests.path())?;
    said(&agent, &["INFO", " programmed "])?;
    ensure_served(&scenario, &held).context("with the next agent")
}

#[test]
fn an_agent_whose_directory_another_one_has_taken_ends_and_names_it() -> Result<()> {
    let mut scenario = set_up("off")?;
    let node = scenario.cluster.node(1);
    let agent = scenario.agent(1)?;
    agent.process().signal(Signal::SIGSTOP)?;
    fs::remove_dir_all(node.bpf_dir())?;
    fs::create_dir(node.bpf_dir())?;
    let mut command = Command::new("flock");
    command.arg(node.bpf_dir()).args(["sh", "-c", "echo locked && exec sleep 600"]);
    let mut other = node.spawn_agent("other", command)?;
    other.wait_for_output("locked", PATIENCE)?;
    let agent = scenario.agent(1)?;
    agent.process().signal(Signal::SIGCONT)?;
    let status = agent.process().wait(PATIENCE)?;
    let said = agent.process().stderr();
    let last = said.lines().last().unwrap_or_default();
    let words = ["another agent serves now", "process ", &node.bpf_dir().to_string_lossy()];
    let is_said = words.iter().all(|word| last.contains(word));
    ensure!(status.code() == Some(1) && is_said, "{status}: {said}");
    let pins = fs::read_dir(node.bpf_dir())?.count();
    ensure!(pins == 0, "it pinned {pins} into a directory that is not its own");
    Ok(())
}

#[test]
fn cleanup_refuses_beside_an_agent_unless_it_is_forced() -> Result<()> {
    let mut scenario = set_up("tcp")?;
    let mut expectations = Expectations::default();
    let node = scenario.cluster.node(1);
    let held = open(&scenario)?;
    let before = pinned(node.bpf_dir())?;
    let process = format!("(process {}", scenario.agent(1)?.process().pid());
    let manifests = scenario.manifests.path().to_string_lossy().into_owned();
    for own in [&["cleanup"][..], &["run", "--manifests", &manifests, "--cleanup"]] {
        let (code, said) = run(&node, own)?;
        let is_told = [&process, "end it first", "--force"].iter().all(|word| said.contains(*word));
        expectations.is_true(format!("{own:?}: {code:?} {said}"), code == Some(1) && is_told);
        expectations.is_true(format!("{own:?} unpinned"), pinned(node.bpf_dir())? == before);
        expectations.check(format!("{own:?}"), ensure_served(&scenario, &held));
    }
    let (code, said) = run(&node, &["cleanup", "--force"])?;
    let is_told = said.contains(&process) && said.contains("again within seconds");
    expectations.is_true(format!("forced: {code:?} {said}"), code == Some(0) && is_told);
    expectations.is_true(format!("forced: {said}"), !said.contains("detached 0 links"));
    // As it said: everything comes back, and stays without the agent.
    let paths = |pins: BTreeMap<PathBuf, u32>| pins.into_keys().collect::<Vec<_>>();
    let before = paths(before);
    eventually(|| {
        let now = paths(pinned(node.bpf_dir())?);
        ensure!(now == before, "before {before:?}\nnow {now:?}");
        ensure_served(&scenario, &[])
    })?;
    scenario.take_agent(1)?.kill9()?;
    expectations.check("without an agent", ensure_served(&scenario, &[]));
    scenario.start_agent(1)?;
    expectations.finish()
}
