//! One agent follows another on a node that is in use: by `--wait`, with other sizes of maps, and
//! with another layout of them. Nothing that anybody sends is lost.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lb_tests::harness::controlplane::programs::agent_v3;
use lb_tests::harness::echo::{Probe, Transport};
use lb_tests::harness::netns::actors::agent::{Agent, Options, cleanup, lb_agent, lb_agent_next};
use lb_tests::harness::netns::actors::client::Load;
use lb_tests::harness::netns::topology::cluster::Cluster;
use lb_tests::harness::netns::topology::plan::{Family, cluster_ip, node_port};
use lb_tests::harness::netns::words::expectations::Expectations;
use lb_tests::harness::netns::words::scenario::{PORT, SMALL_MAPS, Scenario};
use lb_tests::harness::wait::PATIENCE;

const SERVICE: u8 = 1;
const STICKY: u8 = 2;
/// Has an agent with other layouts kill itself while it moves flows.
const KILL_WHILE_MOVING: &str = "LB_KILL_WHILE_MOVING";
/// Of each kind of load a second: connections that are new, datagrams, requests on connections
/// that stay. Three clients together open about a thousand connections.
const RATE: u64 = 350;
const TRAFFIC: Duration = Duration::from_secs(120);
/// How long traffic goes on after a change.
const WHILE: Duration = Duration::from_secs(1);

/// A pod, a node and a client outside; backends here and on another node.
fn set_up(arguments: &[&str]) -> Result<Scenario> {
    let builder = Cluster::builder().pod(1, "a").pod(1, "b").pod(2, "c");
    let mut scenario = Scenario::start(builder, arguments)?;
    scenario.serve(&["b", "c"])?;
    scenario.publish(&scenario.exposed("web", SERVICE), &scenario.endpoints(&["b", "c"]))?;
    Ok(scenario)
}

fn probe(transport: Transport, number: u8, family: Family) -> Probe {
    Probe::new(transport, (cluster_ip(number).get(family), PORT).into())
}

/// Loads from everywhere: new connections, datagrams, connections that stay.
struct Traffic(Vec<(String, Load)>);

impl Traffic {
    fn start(scenario: &Scenario) -> Result<Self> {
        let (a, node) = (scenario.cluster.pod("a"), scenario.cluster.node(1));
        let inside = |family| (cluster_ip(SERVICE).get(family), PORT).into();
        let outside = |family| node.at(family, node_port(SERVICE));
        let mut loads = Vec::new();
        let from = [
            ("pod", a.loads(inside(Family::V4), RATE, TRAFFIC)?),
            ("node", node.loads(inside(Family::V6), RATE, TRAFFIC)?),
            ("outside", scenario.cluster.outside().loads(outside(Family::V4), RATE, TRAFFIC)?),
        ];
        for (client, [connections, datagrams, kept]) in from {
            loads.push((format!("{client}, new connections"), connections));
            loads.push((format!("{client}, datagrams"), datagrams));
            loads.push((format!("{client}, long connections"), kept));
        }
        Ok(Self(loads))
    }

    /// Nothing was lost, and the longest time without an answer is told.
    fn stop(self, expectations: &mut Expectations, what: &str) -> Result<()> {
        thread::sleep(WHILE);
        for (kind, load) in self.0 {
            let report = load.stop()?;
            println!(
                "{what}: {kind}: {} of {} answered in {:.1} s, longest gap {:.1} ms",
                report.ok, report.sent, report.seconds, report.longest_gap_ms
            );
            let row = format!("{what}: {kind} failed: {:?}", report.failed);
            expectations.is_true(row, report.failures() == 0);
            expectations.is_true(format!("{what}: {kind}: {report:?}"), report.ok > RATE / 2);
        }
        Ok(())
    }
}

/// The next agent prepares while the present one serves, which then ends; returns how long it
/// took from there to `programmed`.
fn hand_over(scenario: &mut Scenario, options: Options) -> Result<Duration> {
    let node = scenario.cluster.node(1);
    let mut next = Agent::spawn(&node, &options.argument("--wait"))?;
    next.wait_log(&["prepared"])?;
    let start = Instant::now();
    let status = scenario.take_agent(1)?.terminate()?;
    ensure!(status.success(), "the agent before ended with {status}");
    next.wait_log(&["INFO", " programmed "])?;
    let took = start.elapsed();
    next.wait_ready()?;
    scenario.set_agent(1, next);
    Ok(took)
}

fn options(scenario: &Scenario, arguments: &[&str]) -> Options {
    Options::manifests(scenario.manifests.path()).arguments(arguments)
}

#[test]
fn a_waiting_agent_takes_over_without_a_lost_packet() -> Result<()> {
    let mut expectations = Expectations::default();
    for mode in ["off", "tcp"] {
        let arguments = [&["--socket-lb", mode][..], &SMALL_MAPS].concat();
        let mut scenario = set_up(&arguments)?;
        let traffic = Traffic::start(&scenario)?;
        let next = options(&scenario, &arguments);
        let took = hand_over(&mut scenario, next)?;
        println!("--socket-lb {mode}: programmed {took:?} after the end was asked for");
        traffic.stop(&mut expectations, mode)?;
    }
    expectations.finish()
}

#[test]
fn a_waiting_agent_is_ready_before_it_serves() -> Result<()> {
    let mut scenario = Scenario::start(Cluster::builder().nodes(1), &SMALL_MAPS)?;
    let mut expectations = Expectations::default();
    let node = scenario.cluster.node(1);
    let file = scenario.manifests.path().with_extension("ready");
    fs::write(&file, "of an earlier agent\n")?;
    let is_ready = || -> Result<bool> {
        let mut command = lb_agent()?;
        command.arg("status").arg("--ready-file").arg(&file);
        Ok(node.spawn_agent("status", command)?.wait(PATIENCE)?.success())
    };
    let waiting = |options: Options| {
        options.arguments(&SMALL_MAPS).argument("--wait").argument("--ready-file").argument(&file)
    };
    // One that cannot list its objects is not ready, whatever the agent before it has written.
    let nobody = Options::default().argument("--master").argument("http://127.0.0.1:9");
    let mut blind = Agent::spawn(&node, &waiting(nobody))?;
    blind.wait_log(&["preparing to take over"])?;
    expectations.is_true("ready without objects", !is_ready()?);
    blind.terminate()?;

    let mut next = Agent::spawn(&node, &waiting(options(&scenario, &[])))?;
    next.wait_log(&["prepared"])?;
    expectations.is_true("not ready though prepared", is_ready()?);
    let said = fs::read_to_string(&file)?;
    expectations.is_true(format!("the file says {said:?}"), said == "prepared\n");
    // The first one still serves, and both of its ports are its own.
    let log = next.process().stderr();
    expectations.is_true(format!("it bound something: {log}"), !log.contains("in use"));
    expectations.check("the first one", scenario.agent(1)?.wait_ready());
    scenario.take_agent(1)?.kill9()?;
    next.wait_log(&["INFO", " programmed "])?;
    next.wait_ready()?;
    let said = lb_tests::harness::wait::eventually(|| {
        let said = fs::read_to_string(&file)?;
        ensure!(said == "programmed\n", "the file says {said:?}");
        Ok(said)
    });
    expectations.check("programmed", said.map(drop).context("after the end of the first"));
    scenario.set_agent(1, next);
    fs::remove_file(&file)?;
    expectations.finish()
}

/// One agent after another, each with its own arguments, while everybody sends.
fn check_chain(expectations: &mut Expectations, what: &str, chain: &[&[&str]]) -> Result<Scenario> {
    let fixed = ["--socket-lb", "off"];
    let (first, rest) = chain.split_first().context("no agent")?;
    let mut scenario = set_up(&[&fixed[..], first].concat())?;
    for arguments in rest {
        let traffic = Traffic::start(&scenario)?;
        let next = options(&scenario, &[&fixed[..], arguments].concat());
        let took = hand_over(&mut scenario, next)?;
        println!("{what}: {arguments:?} programmed {took:?} after the end was asked for");
        traffic.stop(expectations, &format!("{what} {arguments:?}"))?;
    }
    Ok(scenario)
}

#[test]
fn maps_grow_and_shrink_without_a_lost_packet() -> Result<()> {
    const SMALL: [&str; 8] = [
        "--max-services",
        "1024",
        "--max-backends",
        "4096",
        "--max-slots",
        "8192",
        "--max-flows",
        "65536",
    ];
    const LARGE: [&str; 8] = [
        "--max-services",
        "2048",
        "--max-backends",
        "8192",
        "--max-slots",
        "16384",
        "--max-flows",
        "131072",
    ];
    let mut expectations = Expectations::default();
    let mut scenario = check_chain(&mut expectations, "sizes", &[&SMALL, &LARGE, &SMALL])?;
    // Fewer than are in use: the next agent ends, and the one before may serve again.
    let before = scenario.agent(1)?.get("services")?;
    scenario.take_agent(1)?.terminate()?;
    let none = ["--socket-lb", "off", "--max-services", "2"];
    let node = scenario.cluster.node(1);
    let mut next = Agent::spawn(&node, &options(&scenario, &none))?;
    let status = next.process().wait(PATIENCE)?;
    let said = next.process().stderr();
    expectations.is_true(format!("{status}: {said}"), status.code() == Some(1));
    expectations.is_true(&said, said.contains("--max-services 2 is too small"));
    let after = lb_tests::harness::netns::actors::agent::get(&node, "services")?;
    let names = |services: &serde_json::Value| -> Vec<String> {
        services.as_array().into_iter().flatten().map(|row| row["name"].to_string()).collect()
    };
    expectations.is_true(format!("{before}\nis now\n{after}"), names(&before) == names(&after));
    expectations.finish()
}

#[test]
fn the_pins_of_layout_v3_are_adopted_without_a_lost_packet() -> Result<()> {
    let mut expectations = Expectations::default();
    let others = ["--max-services", "2048", "--max-backends", "8192", "--max-slots", "16384"];
    for (what, own, more) in [
        ("tcx", ["--tc-attach", "auto", "--socket-lb", "tcp"], &SMALL_MAPS[..]),
        ("clsact", ["--tc-attach", "clsact", "--socket-lb", "node"], &SMALL_MAPS),
        ("other sizes", ["--tc-attach", "auto", "--socket-lb", "off"], &others),
    ] {
        let arguments = [&own[..], &SMALL_MAPS].concat();
        let mut scenario = set_up(&arguments)?;
        let node = scenario.cluster.node(1);
        scenario.take_agent(1)?.terminate()?;
        cleanup(&node)?;
        let before = options(&scenario, &arguments).release_v3(&agent_v3()?);
        let before = Agent::start(&node, &before)?;
        ensure!(node.bpf_dir().join("v3/FLOWS4").exists(), "the agent before has another layout");
        scenario.set_agent(1, before);
        let traffic = Traffic::start(&scenario)?;
        let next = options(&scenario, &[&own[..], more, &["--max-flows", "65536"]].concat());
        let took = hand_over(&mut scenario, next)?;
        println!("v3, {what}: programmed {took:?} after the end was asked for");
        traffic.stop(&mut expectations, &format!("v3, {what}"))?;
        expectations.is_true("v3 is still there", !node.bpf_dir().join("v3").exists());
    }
    expectations.finish()
}

/// The agent of a release with other layouts.
fn next_release(options: Options) -> Result<Options> {
    Ok(options.program(&lb_agent_next()?))
}

/// How many entries are pinned in the layout of this release and in the other one.
fn versions(scenario: &Scenario) -> Result<(usize, usize)> {
    let directory = scenario.cluster.node(1).bpf_dir().join("maps");
    let mut names = Vec::new();
    for entry in fs::read_dir(&directory)? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    let count = |end: &str| {
        let changed =
            ["FRAGMENTS4", "DATAGRAM_PEERS", "SERVICES", "AFFINITY", "FRONTENDS4", "BACKENDS6"];
        changed.iter().filter(|name| names.contains(&format!("{name}{end}"))).count()
    };
    Ok((count("@1"), count("@2")))
}

#[test]
fn a_release_with_another_layout_takes_over_and_back_without_a_lost_packet() -> Result<()> {
    let mut expectations = Expectations::default();
    for mode in ["off", "all"] {
        let arguments = [&["--socket-lb", mode][..], &SMALL_MAPS].concat();
        let mut scenario = set_up(&arguments)?;
        let sticky = scenario.service("sticky", STICKY).affinity(Duration::from_secs(600));
        scenario.publish(&sticky, &scenario.endpoints(&["b", "c"]))?;
        let a = scenario.cluster.pod("a");
        let ask = || -> Result<Option<String>> {
            let probe = probe(Transport::Tcp, STICKY, Family::V4);
            Ok(a.ask(probe)?.name().map(ToString::to_string))
        };
        let chosen = ask()?;
        ensure!(chosen.is_some(), "no answer of the Service with affinity");
        // One load goes on through both, so that its long connections do.
        let traffic = Traffic::start(&scenario)?;
        let next = next_release(options(&scenario, &arguments))?;
        let took = hand_over(&mut scenario, next)?;
        println!("{mode}: the next release programmed {took:?} after the end was asked for");
        expectations.is_true("not in the next layout", versions(&scenario)? == (0, 6));
        expectations.is_true("another backend, forth", ask()? == chosen);
        thread::sleep(WHILE);
        let now = options(&scenario, &arguments);
        let took = hand_over(&mut scenario, now)?;
        println!("{mode}: this release programmed {took:?} after the end was asked for");
        expectations.is_true("not back in this layout", versions(&scenario)? == (6, 0));
        expectations.is_true("another backend, back", ask()? == chosen);
        let left = scenario.cluster.node(1).bpf_dir().join("handover");
        expectations.is_true("the pins of the handover are left", !left.exists());
        traffic.stop(&mut expectations, &format!("another layout, {mode}"))?;
    }
    expectations.finish()
}

#[test]
fn an_agent_that_is_killed_while_it_moves_flows_is_followed_by_either_release() -> Result<()> {
    let mut expectations = Expectations::default();
    let arguments = [&["--socket-lb", "off"][..], &SMALL_MAPS].concat();
    let mut scenario = set_up(&arguments)?;
    let node = scenario.cluster.node(1);
    let traffic = Traffic::start(&scenario)?;
    // Who follows: the release that was there before, then the killed one again.
    for is_next in [false, true] {
        let mut killed = Agent::spawn(
            &node,
            &next_release(options(&scenario, &arguments))?
                .argument("--wait")
                .variable(KILL_WHILE_MOVING, "1"),
        )?;
        killed.wait_log(&["prepared"])?;
        scenario.take_agent(1)?.terminate()?;
        let status = killed.process().wait(PATIENCE)?;
        expectations.is_true(format!("it ended with {status}"), status.code().is_none());
        expectations.is_true("it moved nothing", node.bpf_dir().join("handover").exists());
        let after = options(&scenario, &arguments);
        let mut after = Agent::spawn(&node, &if is_next { next_release(after)? } else { after })?;
        after.wait_log(&["an agent was killed while it moved flows"])?;
        after.wait_ready()?;
        after.wait_log(&["INFO", " programmed "])?;
        scenario.set_agent(1, after);
        let wanted = if is_next { (0, 6) } else { (6, 0) };
        expectations.is_true("the layout", versions(&scenario)? == wanted);
        expectations.is_true("left over", !node.bpf_dir().join("handover").exists());
    }
    traffic.stop(&mut expectations, "killed")?;
    expectations.finish()
}

#[test]
fn a_layout_that_cannot_be_converted_ends_the_start_and_everything_serves_on() -> Result<()> {
    let mut expectations = Expectations::default();
    let arguments = [&["--socket-lb", "off"][..], &SMALL_MAPS].concat();
    let mut scenario = set_up(&arguments)?;
    let node = scenario.cluster.node(1);
    let a = scenario.cluster.pod("a");
    // Without its description, nobody knows what a map of another version holds.
    fs::remove_file(node.bpf_dir().join("layouts@1"))?;
    let mut next =
        Agent::spawn(&node, &next_release(options(&scenario, &arguments))?.argument("--wait"))?;
    let status = next.process().wait(PATIENCE)?;
    let said = next.process().stderr();
    expectations.is_true(format!("{status}: {said}"), status.code() == Some(1));
    for words in [
        "map FRONTENDS4 cannot be taken over",
        "FRONTENDS4@1 has layout version 1, this lb-agent has version 2",
        "no description of version 1 is in the kernel",
        "`lb-agent cleanup --drain`",
    ] {
        expectations.is_true(format!("{words:?} is not in {said}"), said.contains(words));
    }
    expectations.is_true("a map was replaced", versions(&scenario)? == (6, 0));
    for family in Family::ALL {
        let answer = a.ask(probe(Transport::Tcp, SERVICE, family))?;
        expectations.is_true(format!("{family:?}: {answer:?}"), answer.name().is_some());
    }
    expectations.check("the agent before", scenario.agent(1)?.wait_ready());
    expectations.finish()
}
