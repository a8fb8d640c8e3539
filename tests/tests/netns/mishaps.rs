//! Faults of a node: a second agent, a device that has another program or is removed, ports that
//! the node uses itself.

use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lb_tests::harness::echo::{Probe, Transport};
use lb_tests::harness::netns::actors::agent::{self, Agent, Options, cleanup, lb_agent};
use lb_tests::harness::netns::actors::host::Serve;
use lb_tests::harness::netns::topology::cluster::{Builder, Cluster};
use lb_tests::harness::netns::topology::node::Node;
use lb_tests::harness::netns::topology::plan::{Family, cidr, node_port};
use lb_tests::harness::netns::traffic::foreign::{Foreign, Hook};
use lb_tests::harness::netns::words::expectations::Expectations;
use lb_tests::harness::netns::words::scenario::{SMALL_MAPS, Scenario, TARGET};
use lb_tests::harness::wait::{PATIENCE, eventually};

const ANSWER: Duration = Duration::from_millis(500);

/// The Services by number: served from node 1 and from node 2.
const NEAR: u8 = 1;
const FAR: u8 = 2;

fn pods() -> Builder {
    Cluster::builder().pod(1, "b").pod(2, "c")
}

fn start(builder: Builder, more: &[&str]) -> Result<Scenario> {
    let cidr = cidr::cluster();
    let fixed = ["--socket-lb", "off", "--cluster-cidr", &cidr];
    let mut scenario = Scenario::start(builder, &[&fixed[..], more, &SMALL_MAPS].concat())?;
    scenario.serve(&["b", "c"])?;
    scenario.publish(&scenario.exposed("near", NEAR), &scenario.endpoints(&["b"]))?;
    scenario.publish(&scenario.exposed("far", FAR), &scenario.endpoints(&["c"]))?;
    Ok(scenario)
}

fn at(scenario: &Scenario, number: u8, family: Family) -> SocketAddr {
    (scenario.cluster.node(1).ip(family), node_port(number)).into()
}

/// The client outside reaches both Services at node 1, soon.
fn check(scenario: &Scenario) -> Result<()> {
    for (number, server) in [(NEAR, "b"), (FAR, "c")] {
        for family in Family::ALL {
            for transport in [Transport::Tcp, Transport::Udp] {
                let to = at(scenario, number, family);
                eventually(|| {
                    let probe = Probe::new(transport, to).timeout(ANSWER);
                    let answer = scenario.cluster.outside().ask(probe)?;
                    ensure!(answer.name() == Some(server), "{transport:?} {to}: {answer:?}");
                    Ok(())
                })?;
            }
        }
    }
    Ok(())
}

/// The programs on the hooks of a node.
fn tcx_programs(node: &Node) -> Result<String> {
    let mut command = Command::new("bpftool");
    command.arg("net");
    node.output(command, PATIENCE)
}

#[test]
fn a_second_agent_refuses_and_names_the_first() -> Result<()> {
    let mut scenario = Scenario::start(Cluster::builder().nodes(1), &SMALL_MAPS)?;
    let node = scenario.cluster.node(1);
    let first = scenario.agent(1)?.process().pid();
    let options = Options::manifests(scenario.manifests.path()).arguments(&SMALL_MAPS);
    let mut second = Agent::spawn(&node, &options)?;
    let status = second.process().wait(PATIENCE)?;
    let said = second.process().stderr();
    let bpf_dir = node.bpf_dir().to_string_lossy().into_owned();
    let mut expectations = Expectations::default();
    expectations.is_true(format!("{status}"), status.code() == Some(1));
    let is_named = said.contains(&format!("(process {first}")) && said.contains(&bpf_dir);
    expectations.is_true(format!("not one sentence that names the first: {said}"), {
        said.lines().count() == 1 && said.starts_with("lb-agent: ") && is_named
    });
    let attached = tcx_programs(&node)?;
    let other = format!("{bpf_dir}-other");
    let arguments =
        ["--bpf-dir", &other, "--healthz-bind-address", "", "--metrics-bind-address", ""];
    let mut command = lb_agent()?;
    command.args(["run", "--hostname-override", "node1", "--manifests"]);
    command.arg(scenario.manifests.path()).arg("--cgroup").arg(node.cgroup_tree().path());
    command.args(arguments).args(SMALL_MAPS);
    let mut beside = node.spawn_agent("beside", command)?;
    // With other maps it would attach its programs to the same hooks.
    let status = beside.wait(PATIENCE)?;
    let said = beside.stderr();
    let last = said.lines().last().unwrap_or_default();
    let words = [format!("(process {first}"), bpf_dir.clone(), "end it first".to_owned()];
    let is_named = words.iter().all(|word| last.contains(word));
    expectations.is_true(
        format!("another --bpf-dir: {status} {said}"),
        status.code() == Some(1) && is_named,
    );
    let hooks = tcx_programs(&node)?;
    expectations.is_true(format!("it attached itself: {hooks}"), hooks == attached);
    // The first one serves on, and the next one follows it after any end.
    expectations.check("the first one", scenario.agent(1)?.get("services").map(drop));
    scenario.take_agent(1)?.kill9()?;
    expectations.check("after SIGKILL", scenario.start_agent(1));
    expectations.finish()
}

/// How often XDP of node 1 ended with this reason.
fn taken_by_xdp(scenario: &Scenario, reason: &str) -> Result<u64> {
    let counters = agent::get(&scenario.cluster.node(1), "counters")?;
    let rows = counters.as_array().context("no list of counters")?;
    let row = rows.iter().find(|row| row["hook"] == "xdp_device" && row["reason"] == reason);
    Ok(row.and_then(|row| row["count"].as_u64()).unwrap_or(0))
}

#[test]
fn an_xdp_program_of_another_owner_is_left_alone() -> Result<()> {
    for mode in ["native", "generic"] {
        let mut scenario = start(pods().no_tx_checksum_offload(), &["--xdp", mode])?;
        let node = scenario.cluster.node(1);
        scenario.take_agent(1)?.terminate()?;
        cleanup(&node)?;
        let other = Foreign::load(Hook::Xdp)?.attach_device(node.netns(), "eth0")?;
        scenario.start_agent(1)?;
        scenario.agent(1)?.wait_log(&["WARN", "eth0", "tc: another XDP program is attached"])?;
        check(&scenario)?;
        ensure!(other.runs()? > 0, "{mode}: the other program does not run");
        ensure!(taken_by_xdp(&scenario, "request")? == 0, "{mode}: ours runs beside it");
        scenario.take_agent(1)?.terminate()?;
        drop(other);
        scenario.start_agent(1)?;
        scenario.agent(1)?.wait_log(&["INFO", "eth0", "handled by XDP"])?;
        check(&scenario)?;
        ensure!(taken_by_xdp(&scenario, "request")? > 0, "{mode}: ours does not run");
    }
    Ok(())
}

#[test]
fn a_device_that_is_replaced_or_renamed_is_served_again() -> Result<()> {
    for xdp in ["off", "native"] {
        let scenario = start(pods().no_tx_checksum_offload(), &["--xdp", xdp])?;
        check(&scenario)?;
        let held = [NEAR, FAR].map(|number| {
            let probe = Probe::tcp(at(&scenario, number, Family::V4));
            scenario.cluster.outside().open(probe)
        });
        let check_held = |when: &str| -> Result<()> {
            for (held, server) in held.iter().zip(["b", "c"]) {
                let held = held.as_ref().map_err(|error| anyhow::anyhow!("{error:#}"))?;
                let answer = held.exchange(when, PATIENCE)?;
                ensure!(answer.name() == Some(server), "{when}: {answer:?}");
            }
            Ok(())
        };
        scenario.cluster.replug(1)?;
        check(&scenario).context("new device")?;
        check_held("new device")?;
        scenario.cluster.rename_uplink(1, "eth0", "uplink0")?;
        check(&scenario).context("new name")?;
        check_held("new name")?;
        if xdp == "native" {
            ensure!(taken_by_xdp(&scenario, "request")? > 0, "XDP is not back");
        }
    }
    Ok(())
}

/// What `check` says of `eth0` of node 1.
fn checked(scenario: &Scenario, xdp: &str) -> Result<String> {
    let node = scenario.cluster.node(1);
    let mut command = lb_agent()?;
    command.args(["check", "--xdp", xdp, "--bpf-dir"]).arg(node.bpf_dir());
    command.arg("--cgroup").arg(node.cgroup_tree().path());
    let said = node.output(command, PATIENCE)?;
    let lines: Vec<&str> = said.lines().filter(|line| line.contains(" eth0: ")).collect();
    ensure!(lines.len() == 1, "not one line of eth0: {said}");
    Ok(lines[0].to_owned())
}

#[test]
fn check_reports_how_packets_of_a_device_are_handled() -> Result<()> {
    let mut expectations = Expectations::default();
    let mut row =
        |said: String, words: &str| expectations.is_true(said.clone(), said.ends_with(words));
    let mut scenario = start(pods().no_tx_checksum_offload(), &["--xdp", "native"])?;
    let node = scenario.cluster.node(1);
    row(checked(&scenario, "auto")?, "eth0: packets are handled by XDP in the driver");
    scenario.take_agent(1)?.terminate()?;
    row(checked(&scenario, "auto")?, "eth0: packets are handled by XDP in the driver");
    cleanup(&node)?;
    let would = "packets would be handled by XDP in the driver, or by tc if its driver rejects XDP";
    row(checked(&scenario, "native")?, would);
    row(checked(&scenario, "off")?, "packets would be handled by tc: --xdp off");
    let _other = Foreign::load(Hook::Xdp)?.attach_device(node.netns(), "eth0")?;
    row(checked(&scenario, "native")?, "would be handled by tc: another XDP program is attached");
    scenario.start_agent(1)?;
    row(checked(&scenario, "native")?, "are handled by tc: another XDP program is attached");
    expectations.finish()
}

/// A flow with a rewritten source shows the node's address and port.
#[test]
fn flows_show_their_rewritten_source() -> Result<()> {
    let mut scenario = start(pods(), &[])?;
    let (node, outside) = (scenario.cluster.node(1).ip(Family::V4), scenario.cluster.outside());
    let to = at(&scenario, FAR, Family::V4);
    let held = outside.open(Probe::tcp(to))?;
    let seen = held.exchange("who", PATIENCE)?.reached().map(|reached| reached.greeting.clone());
    let seen = seen.context("no answer")?;
    ensure!(seen.client_address == node, "not from the node: {seen:?}");
    let flows = scenario.agent(1)?.get("flows")?;
    let mut rows = flows.as_array().into_iter().flatten();
    let row = rows.find(|row| row["destination"] == to.to_string());
    let row = row.context("no such flow")?;
    let source: SocketAddr = row["new_source"].as_str().context("no new_source")?.parse()?;
    ensure!(source == SocketAddr::new(node, seen.client_port), "{row} but {seen:?}");
    Ok(())
}

/// Sets the range of ports that the node's own sockets get.
fn set_local_ports(scenario: &Scenario, range: &str) -> Result<()> {
    let set = || Ok(std::fs::write("/proc/sys/net/ipv4/ip_local_port_range", range)?);
    scenario.cluster.node(1).netns().run(set)
}

#[test]
fn node_ports_may_be_among_the_ephemeral_ports_of_the_node() -> Result<()> {
    let mut scenario = start(pods(), &[])?;
    let (node, outside) = (scenario.cluster.node(1), scenario.cluster.outside());
    let _server = outside.serve(&Serve::on(TARGET))?;
    scenario.take_agent(1)?.terminate()?;
    set_local_ports(&scenario, "1024 65535")?;
    scenario.start_agent(1)?;
    scenario.agent(1)?.wait_log(&["WARN", "net.ipv4.ip_local_port_range", "1024 65535"])?;
    let outside = scenario.cluster.outside();
    let mut expectations = Expectations::default();
    for family in Family::ALL {
        let near = outside.ask(Probe::tcp(at(&scenario, NEAR, family)))?;
        expectations.is_true(format!("{family:?}, here: {near:?}"), near.name() == Some("b"));
        let far = outside.ask(Probe::tcp(at(&scenario, FAR, family)).timeout(ANSWER))?;
        expectations.is_true(format!("{family:?}, elsewhere: {far:?}"), far.name().is_none());
        for number in [NEAR, FAR] {
            let probe = Probe::tcp(outside.at(family, TARGET)).source_port(node_port(number));
            let own = node.ask(probe)?;
            expectations
                .is_true(format!("{family:?}, own: {own:?}"), own.name() == Some("outside"));
        }
    }
    let counted = scenario.agent(1)?.counted("no_source_port")?;
    expectations.is_true(format!("no_source_port: {counted}"), counted > 0);
    expectations.finish()
}
