//! Traffic while an agent starts, is killed and ends, and the state that it leaves.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lb_tests::harness::echo::{Probe, Transport};
use lb_tests::harness::netns::actors::agent::{self, Agent, Options};
use lb_tests::harness::netns::actors::host::Host;
use lb_tests::harness::netns::topology::cluster::Cluster;
use lb_tests::harness::netns::topology::node::Node;
use lb_tests::harness::netns::topology::plan::{Family, cluster_ip};
use lb_tests::harness::netns::traffic::foreign::{Foreign, Hook};
use lb_tests::harness::netns::words::expectations::Expectations;
use lb_tests::harness::netns::words::scenario::{PORT, SMALL_MAPS, Scenario};
use lb_tests::harness::wait::{PATIENCE, eventually};
use serde_json::Value;

const SERVICE: u8 = 1;
const STICKY: u8 = 2;
const ADDED: u8 = 3;

/// So few flows that bpftool can print all places.
const FLOWS: [&str; 2] = ["--max-flows", "16384"];

fn arguments<'a>(own: &[&'a str]) -> Vec<&'a str> {
    [own, &SMALL_MAPS, &FLOWS].concat()
}

fn set_up(own: &[&str]) -> Result<Scenario> {
    let builder = Cluster::builder().pod(1, "a").pod(1, "b").pod(2, "c");
    let mut scenario = Scenario::start(builder, &arguments(own))?;
    scenario.serve(&["b", "c"])?;
    scenario.publish(&scenario.service("steady", SERVICE), &scenario.endpoints(&["b", "c"]))?;
    Ok(scenario)
}

fn probe(transport: Transport, number: u8, family: Family) -> Probe {
    Probe::new(transport, (cluster_ip(number).get(family), PORT).into())
}

/// Kills the agent of node 1 under load from a pod and from the node itself, and starts it
/// again with other arguments.
fn check_kill(
    scenario: &mut Scenario,
    expectations: &mut Expectations,
    what: &str,
    own: &[&str],
) -> Result<()> {
    const RATE: u64 = 500;
    const WHILE: Duration = Duration::from_millis(400);
    let longest = Duration::from_secs(20);
    let (a, node1) = (scenario.cluster.pod("a"), scenario.cluster.node(1));
    let mut loads = Vec::new();
    for (client, tcp, udp) in [(&**a, Family::V4, Family::V6), (&**node1, Family::V6, Family::V4)] {
        let connects = client.load(&probe(Transport::Tcp, SERVICE, tcp), RATE, longest)?;
        let stream = probe(Transport::Udp, SERVICE, udp);
        let datagrams = client.load(&stream, RATE, longest)?;
        loads.extend([(client.name(), "TCP", connects), (client.name(), "UDP", datagrams)]);
    }
    // The load is to go on for a while without an agent, and with the new one.
    thread::sleep(WHILE);
    scenario.take_agent(1)?.kill9()?;
    thread::sleep(WHILE);
    scenario.set_arguments(&arguments(own));
    scenario.start_agent(1)?;
    thread::sleep(WHILE);
    for (client, transport, load) in loads {
        let report = load.stop()?;
        println!(
            "{what}: {client} {transport}: {} of {} answered in {:.1} s, longest gap {:.1} ms",
            report.ok, report.sent, report.seconds, report.longest_gap_ms
        );
        let row = format!("{what}: {client} {transport} failed: {:?}", report.failed);
        expectations.is_true(row, report.failures() == 0);
        expectations.is_true(format!("{what}: {report:?}"), report.ok > RATE / 2);
    }
    Ok(())
}

/// Makes the qdiscs that filters hang on. To make or remove one, the kernel stops the device
/// for a moment and drops what is sent meanwhile, whoever asks for it; agents leave them.
fn make_qdiscs(scenario: &Scenario) -> Result<()> {
    let node1 = scenario.cluster.node(1);
    let pods = ["a", "b"].map(|pod| scenario.cluster.pod(pod).host_device().to_owned());
    for device in pods.iter().map(String::as_str).chain(["eth0", "lo"]) {
        let mut command = Command::new("tc");
        command.args(["qdisc", "add", "dev", device, "clsact"]);
        node1.output(command, PATIENCE)?;
    }
    Ok(())
}

#[test]
fn a_killed_and_restarted_agent_loses_no_packet() -> Result<()> {
    let packets: &[&str] = &["--socket-lb", "off"];
    let clsact: &[&str] = &["--socket-lb", "off", "--tc-attach", "clsact"];
    let connects: &[&str] = &["--socket-lb", "tcp"];
    let mut scenario = set_up(packets)?;
    let mut expectations = Expectations::default();
    make_qdiscs(&scenario)?;
    for (what, own) in [
        ("tcx to tcx", packets),
        ("tcx to clsact", clsact),
        ("clsact to clsact", clsact),
        ("clsact to tcx", packets),
        ("packets to connects", connects),
        ("connects to connects", connects),
        ("connects to packets", packets),
    ] {
        check_kill(&mut scenario, &mut expectations, what, own).context(what)?;
    }
    let leaked = scenario.cluster.fabric().service_packets()?;
    expectations.is_true(format!("{leaked} packets to ClusterIPs left a node"), leaked == 0);
    expectations.finish()
}

/// Fields of Services that traffic changes.
const COUNTED: [&str; 4] = ["flows", "packets", "bytes", "drops"];

/// All that an agent has programmed.
fn programmed(node: &Node) -> Result<Vec<Value>> {
    let shown = ["services", "frontends", "backends"].map(|what| agent::get(node, what));
    let mut shown = shown.into_iter().collect::<Result<Vec<_>>>()?;
    for row in shown.iter_mut().filter_map(Value::as_array_mut).flatten() {
        let fields = row.as_object_mut().context("a row is an object")?;
        fields.retain(|name, _| !COUNTED.contains(&name.as_str()));
    }
    Ok(shown)
}

/// The number of writes that the first complete state took, from the log.
fn first_writes(agent: &mut Agent) -> Result<u64> {
    let log = agent.process().stderr();
    let line =
        log.lines().find(|line| line.contains(" programmed ")).context("never programmed")?;
    let writes = line.split_whitespace().find_map(|word| word.strip_prefix("writes="));
    writes.and_then(|count| count.parse().ok()).with_context(|| line.to_owned())
}

fn check_restart(scenario: &mut Scenario, expectations: &mut Expectations) -> Result<()> {
    let node1 = scenario.cluster.node(1);
    let first = first_writes(scenario.agent(1)?)?;
    let before = programmed(&node1)?;
    scenario.take_agent(1)?.kill9()?;
    let without = programmed(&node1)?;
    expectations.is_true("`get` shows something else without an agent", without == before);
    scenario.start_agent(1)?;
    let after = programmed(&node1)?;
    expectations.is_true(format!("a restart changed {before:?} to {after:?}"), after == before);
    let again = first_writes(scenario.agent(1)?)?;
    println!("writes of the first start {first}, of the second {again}");
    // The settings of the node are stored once more, nothing else is.
    expectations.is_true(format!("a restart wrote {again} times"), again <= 1);
    Ok(())
}

fn check_changes_while_down(
    scenario: &mut Scenario,
    expectations: &mut Expectations,
) -> Result<()> {
    let gone = scenario.service("gone", 7);
    scenario.publish(&gone, &scenario.endpoints(&["b"]))?;
    let steady = scenario.service("steady", SERVICE);
    let a = scenario.cluster.pod("a");
    scenario.take_agent(1)?.kill9()?;
    scenario.manifests.delete(&gone)?;
    scenario.manifests.publish(&steady, &scenario.endpoints(&["c"]))?;
    let added = scenario.service("added", ADDED);
    scenario.manifests.publish(&added, &scenario.endpoints(&["b"]))?;
    let as_before = a.ask(probe(Transport::Tcp, 7, Family::V4))?;
    expectations.is_true(format!("without an agent: {as_before:?}"), as_before.name() == Some("b"));
    scenario.start_agent(1)?;
    for family in Family::ALL {
        for transport in [Transport::Tcp, Transport::Udp] {
            let ask = |number| a.ask(probe(transport, number, family));
            let deleted = a.ask(probe(transport, 7, family).timeout(WAIT))?;
            let (moved, new) = (ask(SERVICE)?, ask(ADDED)?);
            expectations.is_true(format!("deleted: {deleted:?}"), deleted.name().is_none());
            expectations.is_true(format!("moved: {moved:?}"), moved.name() == Some("c"));
            expectations.is_true(format!("added: {new:?}"), new.name() == Some("b"));
        }
    }
    scenario.delete(&added)?;
    scenario.publish(&steady, &scenario.endpoints(&["b", "c"]))
}

const WAIT: Duration = Duration::from_millis(200);

/// An agent without a source of objects serves on, and says that it is not ready.
fn check_not_ready(scenario: &mut Scenario, expectations: &mut Expectations) -> Result<()> {
    let kubeconfig = scenario.manifests.path().join("kubeconfig");
    let server = "apiVersion: v1\nkind: Config\ncurrent-context: x\n\
        clusters: [{name: x, cluster: {server: \"http://127.0.0.1:9\"}}]\n\
        contexts: [{name: x, context: {cluster: x, user: x}}]\n\
        users: [{name: x, user: {token: x}}]\n";
    std::fs::write(&kubeconfig, server)?;
    scenario.take_agent(1)?.kill9()?;
    let node1 = scenario.cluster.node(1);
    let before = programmed(&node1)?;
    let options = Options::kubeconfig(&kubeconfig).arguments(&arguments(&["--socket-lb", "off"]));
    let mut agent = Agent::spawn(&node1, &options)?;
    let (status, body) =
        eventually(|| agent.http(10256, "/healthz")).with_context(|| agent.process().tail())?;
    expectations.is_true(format!("/healthz without objects: {status} {body}"), status == 503);
    let answer = scenario.cluster.pod("a").ask(probe(Transport::Tcp, SERVICE, Family::V4))?;
    expectations.is_true(format!("it does not serve on: {answer:?}"), answer.name().is_some());
    expectations.is_true("it cleared what was there", programmed(&node1)? == before);
    let status = agent.terminate()?;
    expectations.is_true(format!("SIGTERM without a server: {status}"), status.code() == Some(0));
    std::fs::remove_file(&kubeconfig)?;
    scenario.start_agent(1)
}

#[test]
fn a_pod_that_comes_later_is_served_within_100_ms() -> Result<()> {
    const SOON: Duration = Duration::from_millis(100);
    let scenario = set_up(&["--socket-lb", "off"])?;
    let late = scenario.cluster.add_pod(1, "late")?;
    let start = Instant::now();
    let quick = probe(Transport::Tcp, SERVICE, Family::V4).timeout(Duration::from_millis(20));
    loop {
        let begun = start.elapsed();
        if late.ask(quick.clone())?.name().is_some() {
            println!("a new pod was served when it asked after {begun:?}");
            ensure!(begun < SOON, "served only after {begun:?}");
            return Ok(());
        }
        ensure!(begun < PATIENCE, "a new pod is not served");
    }
}

/// `bpftool` in a node's namespace.
fn bpftool(node: &Node, arguments: &[&str]) -> Result<String> {
    let mut command = Command::new("bpftool");
    command.args(arguments);
    node.output(command, PATIENCE)
}

/// Map dumps show the names of fields.
fn check_dumps(scenario: &Scenario, expectations: &mut Expectations) -> Result<()> {
    let sticky = scenario.service("sticky", STICKY).affinity(Duration::from_secs(60));
    scenario.publish(&sticky, &scenario.endpoints(&["b", "c"]))?;
    let a = scenario.cluster.pod("a");
    for family in Family::ALL {
        for transport in [Transport::Tcp, Transport::Udp] {
            ensure!(a.ask(probe(transport, STICKY, family))?.name().is_some(), "no answer");
        }
    }
    let node1 = scenario.cluster.node(1);
    let mut dumped = Vec::new();
    for path in pinned_maps(node1.bpf_dir())? {
        let file = path.to_string_lossy();
        let Ok(shown) = bpftool(&node1, &["-j", "map", "show", "pinned", &file]) else { continue };
        let map: Value = serde_json::from_str(&shown)?;
        let kind = map["type"].as_str().unwrap_or_default().to_owned();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let name = name.split('@').next().unwrap_or_default().to_owned();
        if !["hash", "lru_hash", "array"].contains(&kind.as_str()) || name.starts_with('.') {
            continue;
        }
        let dump = bpftool(&node1, &["map", "dump", "pinned", &file])?;
        let entries: Value =
            serde_json::from_str(&dump).with_context(|| format!("{name}: {:.200}", dump))?;
        let entries = entries.as_array().cloned().unwrap_or_default();
        let is_named = |value: &Value| value.as_object().is_some_and(|fields| !fields.is_empty());
        let is_key_named = |entry: &Value| kind == "array" || is_named(&entry["key"]);
        // Without types it would be a list of bytes.
        let is_value_typed = |entry: &Value| is_named(&entry["value"]) || entry["value"] == 1;
        let bad = entries.iter().find(|entry| !is_value_typed(entry) || !is_key_named(entry));
        expectations.is_true(format!("{name} ({kind}) shows {bad:?}"), bad.is_none());
        expectations.is_true(format!("{name} has no types"), map["btf_id"].as_u64() > Some(0));
        if !entries.is_empty() {
            dumped.push(name);
        }
    }
    for name in ["FRONTENDS4", "FRONTENDS6", "SERVICES", "SLOTS", "BACKENDS4", "BACKENDS6"]
        .iter()
        .chain(&["FLOW_SEED", "FLOW_TABLE4", "FLOW_REPLIES4", "FLOW_TABLE6", "FLOW_REPLIES6"])
        .chain(&["AFFINITY", "SETTINGS", "NAMES", "DEVICES"])
        .chain(&["NODES4", "NODES6"])
    {
        expectations
            .is_true(format!("no entry of {name}"), dumped.iter().any(|other| other == name));
    }
    Ok(())
}

fn pinned_maps(bpf_dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(bpf_dir.join("maps"))? {
        files.push(entry?.path());
    }
    ensure!(!files.is_empty(), "nothing is pinned below {}", bpf_dir.display());
    Ok(files)
}

/// What hangs on the devices of a node and on its cgroups.
fn attached(node: &Node) -> Result<String> {
    let tree = node.cgroup_tree().path().to_string_lossy().into_owned();
    Ok(bpftool(node, &["net", "show"])? + &bpftool(node, &["cgroup", "tree", &tree])?)
}

/// Nothing of lb is left, and a ClusterIP has no answer any more.
fn check_cleanup(scenario: &mut Scenario, expectations: &mut Expectations) -> Result<()> {
    let node1 = scenario.cluster.node(1);
    scenario.take_agent(1)?.terminate()?;
    let said = agent::cleanup(&node1)?;
    println!("cleanup: {}", said.trim());
    expectations.is_true("pins are left", !node1.bpf_dir().exists());
    let left = attached(&node1)?;
    let ours = left.lines().find(|line| line.contains("lb_") || line.contains("lb-"));
    let ours = ours.filter(|line| !line.contains("somebody"));
    let ours = ours.filter(|line| !line.trim_start().starts_with('/'));
    expectations.is_true(format!("left: {ours:?} of {left}"), ours.is_none());
    for client in [&**scenario.cluster.pod("a"), &**node1] as [&Host; 2] {
        let answer = client.ask(probe(Transport::Tcp, SERVICE, Family::V4).timeout(WAIT))?;
        expectations.is_true(format!("after cleanup: {answer:?}"), answer.name().is_none());
    }
    let again = agent::cleanup(&node1)?;
    expectations.is_true(format!("a second cleanup: {again}"), again.contains("detached 0 links"));
    Ok(())
}

#[test]
fn a_new_agent_adopts_what_the_last_one_left() -> Result<()> {
    let mut scenario = set_up(&["--socket-lb", "off"])?;
    let mut expectations = Expectations::default();
    check_restart(&mut scenario, &mut expectations).context("restart")?;
    check_changes_while_down(&mut scenario, &mut expectations).context("changes while down")?;
    check_not_ready(&mut scenario, &mut expectations).context("no server")?;
    check_dumps(&scenario, &mut expectations).context("dumps")?;
    check_cleanup(&mut scenario, &mut expectations).context("cleanup")?;
    expectations.finish()
}

/// The programs of another owner beside lb's.
struct Others {
    programs: Vec<(&'static str, Foreign)>,
}

impl Others {
    /// Attaches programs to all hooks that node 1 has; with a filter of the old kind.
    fn attach(scenario: &Scenario, device: &str) -> Result<Self> {
        let node1 = scenario.cluster.node(1);
        let filter = Foreign::load(Hook::Ingress)?;
        let pin = PathBuf::from(format!("{}-somebody", node1.bpf_dir().display()));
        filter.pin(&pin)?;
        let pinned = pin.to_string_lossy();
        let filter_line =
            format!("filter add dev {device} ingress prio 5 handle 7 bpf da pinned {pinned}");
        for line in [format!("qdisc add dev {device} clsact"), filter_line] {
            let mut command = Command::new("tc");
            command.args(line.split(' '));
            node1.output(command, PATIENCE).context(line)?;
        }
        std::fs::remove_file(&pin)?;
        let netns = node1.netns();
        let programs = vec![
            ("filter", filter),
            ("tcx ingress", Foreign::load(Hook::Ingress)?.attach_device(netns, device)?),
            ("tcx egress", Foreign::load(Hook::Egress)?.attach_device(netns, device)?),
            ("connect4", Foreign::load(Hook::Connect4)?.attach_cgroup(node1.cgroup_tree())?),
        ];
        Ok(Self { programs })
    }

    /// Every program runs for a connection of the pod, and for one of the node.
    fn check(
        &self,
        scenario: &Scenario,
        expectations: &mut Expectations,
        when: &str,
    ) -> Result<()> {
        let before = self.programs.iter().map(|(_, one)| one.runs()).collect::<Result<Vec<_>>>()?;
        let b = scenario.cluster.pod("b");
        let a = scenario.cluster.pod("a");
        // To the backend itself: the same with and without an agent.
        let answer = a.tcp(b.at(Family::V4, lb_tests::harness::netns::words::scenario::TARGET))?;
        expectations.is_true(format!("{when}: {answer:?}"), answer.name() == Some("b"));
        for ((name, one), before) in self.programs.iter().zip(before) {
            expectations
                .is_true(format!("{when}: the {name} program did not run"), one.runs()? > before);
        }
        Ok(())
    }
}

#[test]
fn programs_of_others_stay_as_they_are() -> Result<()> {
    let mut scenario = set_up(&["--socket-lb", "tcp"])?;
    let mut expectations = Expectations::default();
    let node1 = scenario.cluster.node(1);
    let device = scenario.cluster.pod("a").host_device().to_owned();
    // Behind an agent's programs first; later in front of them.
    let others = Others::attach(&scenario, &device)?;
    let a = scenario.cluster.pod("a");
    for own in [
        &["--socket-lb", "tcp"][..],
        &["--socket-lb", "off", "--tc-attach", "clsact"],
        &["--socket-lb", "off"],
    ] {
        others.check(&scenario, &mut expectations, &format!("before {own:?}"))?;
        scenario.take_agent(1)?.kill9()?;
        scenario.set_arguments(&arguments(own));
        scenario.start_agent(1)?;
        others.check(&scenario, &mut expectations, &format!("{own:?}"))?;
        let answer = a.ask(probe(Transport::Tcp, SERVICE, Family::V4))?;
        expectations
            .is_true(format!("{own:?} does not serve: {answer:?}"), answer.name().is_some());
    }
    scenario.take_agent(1)?.terminate()?;
    agent::cleanup(&node1)?;
    others.check(&scenario, &mut expectations, "after cleanup")?;
    scenario.start_agent(1)?;
    others.check(&scenario, &mut expectations, "behind others")?;
    let answer = a.ask(probe(Transport::Tcp, SERVICE, Family::V6))?;
    expectations.is_true(format!("behind others: {answer:?}"), answer.name().is_some());
    expectations.finish()
}
