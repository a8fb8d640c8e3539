//! Programs that another program detaches are restored within seconds; if that is impossible,
//! `/healthz` says so.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use lb_tests::harness::echo::Answer;
use lb_tests::harness::netns::actors::agent;
use lb_tests::harness::netns::topology::cluster::Cluster;
use lb_tests::harness::netns::topology::plan::{Family, cluster_ip};
use lb_tests::harness::netns::traffic::foreign::{Foreign, Hook};
use lb_tests::harness::netns::words::scenario::{PORT, SMALL_MAPS, Scenario};
use lb_tests::harness::wait::{PATIENCE, eventually};
use nix::sys::signal::Signal;

const SERVICE: u8 = 1;
const HEALTH: u16 = 10256;
/// The kernel runs no more programs on one hook (`BPF_MPROG_MAX`, `BPF_CGROUP_MAX_PROGS`).
const MOST_PROGRAMS: usize = 64;
const IS_BACK: &str = "detached by another program, and";

fn set_up(own: &[&str]) -> Result<Scenario> {
    let builder = Cluster::builder().nodes(1).pod(1, "a").pod(1, "b");
    let mut scenario = Scenario::start(builder, &[own, &SMALL_MAPS].concat())?;
    scenario.serve(&["b"])?;
    scenario.publish(&scenario.service("steady", SERVICE), &scenario.endpoints(&["b"]))?;
    Ok(scenario)
}

/// The pins of the links on node 1, those whose name ends so.
fn links(scenario: &Scenario, end: &str) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(scenario.cluster.node(1).bpf_dir().join("links"))?;
    let paths: std::io::Result<Vec<_>> = entries.map(|entry| Ok(entry?.path())).collect();
    let is_meant = |path: &PathBuf| path.to_string_lossy().ends_with(end);
    let found: Vec<_> = paths?.into_iter().filter(is_meant).collect();
    ensure!(!found.is_empty(), "no link is pinned as *{end}");
    Ok(found)
}

fn run(scenario: &Scenario, program: &str, arguments: &[&str]) -> Result<String> {
    let mut command = Command::new(program);
    command.args(arguments);
    scenario.cluster.node(1).output(command, PATIENCE)
}

fn detach(scenario: &Scenario, link: &Path) -> Result<()> {
    let path = link.to_str().context("a path")?;
    run(scenario, "bpftool", &["link", "detach", "pinned", path]).map(drop)
}

/// What pod a is answered by the Service, packet by packet.
fn ask(scenario: &Scenario, family: Family) -> Result<Answer> {
    scenario.cluster.pod("a").udp((cluster_ip(SERVICE).get(family), PORT).into())
}

fn ensure_served(scenario: &Scenario) -> Result<()> {
    for family in Family::ALL {
        let answer = ask(scenario, family)?;
        ensure!(answer.name() == Some("b"), "{family:?}: {answer:?}");
    }
    Ok(())
}

fn ensure_lost(scenario: &Scenario) -> Result<()> {
    let answer = ask(scenario, Family::V4)?;
    ensure!(answer.name().is_none(), "nothing was taken off: {answer:?}");
    Ok(())
}

/// Detaches a program and checks the effect while the agent is stopped and cannot restore it.
fn while_stopped(scenario: &mut Scenario, act: impl FnOnce(&Scenario) -> Result<()>) -> Result<()> {
    scenario.agent(1)?.process().signal(Signal::SIGSTOP)?;
    let outcome = act(scenario);
    scenario.agent(1)?.process().signal(Signal::SIGCONT)?;
    outcome
}

/// Waits until the agent has logged so many times that a program is restored. It must be
/// healthy meanwhile.
fn wait_back(scenario: &mut Scenario, times: usize) -> Result<()> {
    let agent = scenario.agent(1)?;
    let mut unhealthy = None;
    eventually(|| {
        let (status, body) = agent.http(HEALTH, "/healthz")?;
        unhealthy = (status != 200).then_some(body).or(unhealthy.take());
        let log = agent.process().stderr();
        ensure!(log.matches(IS_BACK).count() >= times, "not back\n{log}");
        Ok(())
    })?;
    ensure!(unhealthy.is_none(), "{unhealthy:?}");
    Ok(())
}

#[test]
fn a_tcx_program_that_is_detached_is_back_within_seconds() -> Result<()> {
    let mut scenario = set_up(&["--socket-lb", "off", "--tc-attach", "tcx"])?;
    ensure_served(&scenario)?;
    let pod = scenario.cluster.pod("a").host_device().to_owned();
    for (times, link) in links(&scenario, &format!("{pod}-ingress"))?.iter().enumerate() {
        while_stopped(&mut scenario, |scenario| {
            detach(scenario, link)?;
            ensure_lost(scenario)
        })?;
        wait_back(&mut scenario, times + 1)?;
        ensure_served(&scenario)?;
    }
    Ok(())
}

#[test]
fn an_xdp_program_that_is_detached_is_back_within_seconds() -> Result<()> {
    let mut scenario = set_up(&["--xdp", "native"])?;
    let is_attached = |scenario: &Scenario| {
        let told = run(scenario, "ip", &["-details", "link", "show", "dev", "eth0"])?;
        anyhow::Ok(told.contains("prog/xdp"))
    };
    ensure!(is_attached(&scenario)?);
    while_stopped(&mut scenario, |scenario| {
        detach(scenario, &links(scenario, "eth0-xdp_native")?[0])?;
        ensure!(!is_attached(scenario)?);
        Ok(())
    })?;
    eventually(|| {
        ensure!(is_attached(&scenario)?, "not back");
        Ok(())
    })?;
    let (status, body) = scenario.agent(1)?.http(HEALTH, "/healthz")?;
    ensure!(status == 200, "{body}");
    Ok(())
}

#[test]
fn a_pin_that_is_removed_is_back_and_no_packet_misses_its_program() -> Result<()> {
    let mut scenario = set_up(&["--socket-lb", "tcp", "--tc-attach", "tcx"])?;
    let pins = links(&scenario, "")?;
    for pin in &pins {
        fs::remove_file(pin)?;
        ensure_served(&scenario)?;
    }
    let start = Instant::now();
    while !pins.iter().all(|pin| pin.exists()) {
        ensure!(start.elapsed() < PATIENCE, "not pinned: {pins:?}");
        ensure_served(&scenario)?;
    }
    // And what is pinned is what is attached: the programs outlive the agent.
    scenario.take_agent(1)?.kill9()?;
    ensure_served(&scenario)
}

#[test]
fn a_filter_that_is_deleted_is_back_within_seconds() -> Result<()> {
    let mut scenario = set_up(&["--socket-lb", "off", "--tc-attach", "clsact"])?;
    ensure_served(&scenario)?;
    let pod = scenario.cluster.pod("a").host_device().to_owned();
    while_stopped(&mut scenario, |scenario| {
        run(scenario, "tc", &["filter", "del", "dev", &pod, "ingress"])?;
        ensure_lost(scenario)
    })?;
    wait_back(&mut scenario, 1)?;
    ensure_served(&scenario)?;
    while_stopped(&mut scenario, |scenario| {
        run(scenario, "tc", &["qdisc", "del", "dev", &pod, "clsact"])?;
        ensure_lost(scenario)
    })?;
    wait_back(&mut scenario, 3)?;
    ensure_served(&scenario)
}

#[test]
fn a_connect_hook_that_is_detached_is_back_within_seconds() -> Result<()> {
    let mut scenario = set_up(&["--socket-lb", "tcp"])?;
    // A connection that the hook has translated goes past the packet path.
    let translated = |scenario: &Scenario| {
        let count = |scenario: &Scenario| {
            let counters = agent::get(&scenario.cluster.node(1), "counters")?;
            let rows = counters.as_array().cloned().unwrap_or_default();
            let rows = rows.into_iter().filter(|row| row["hook"] == "connect4");
            anyhow::Ok(rows.filter_map(|row| row["count"].as_u64()).sum::<u64>())
        };
        let before = count(scenario)?;
        let answer = scenario.cluster.pod("a").tcp((cluster_ip(SERVICE).v4, PORT).into())?;
        ensure!(answer.name() == Some("b"), "{answer:?}");
        Ok(count(scenario)? - before)
    };
    ensure!(translated(&scenario)? == 1);
    while_stopped(&mut scenario, |scenario| {
        detach(scenario, &links(scenario, "cgroup-connect4")?[0])?;
        ensure!(translated(scenario)? == 0, "the hook was not detached");
        Ok(())
    })?;
    wait_back(&mut scenario, 1)?;
    ensure!(translated(&scenario)? == 1);
    Ok(())
}

#[test]
fn a_program_that_cannot_be_restored_is_named_and_makes_the_proxy_unhealthy() -> Result<()> {
    let mut scenario = set_up(&["--socket-lb", "tcp", "--tc-attach", "tcx"])?;
    let node = scenario.cluster.node(1);
    let pod = scenario.cluster.pod("a").host_device().to_owned();
    // Its places are taken by others, as many as a hook takes.
    let mut others = Vec::new();
    while_stopped(&mut scenario, |scenario| {
        detach(scenario, &links(scenario, &format!("{pod}-ingress"))?[0])?;
        detach(scenario, &links(scenario, "cgroup-connect4")?[0])?;
        let device = || Foreign::load(Hook::Ingress)?.attach_device(node.netns(), &pod);
        let cgroup = || Foreign::load(Hook::Connect4)?.attach_cgroup(node.cgroup_tree());
        for attach in [&device as &dyn Fn() -> Result<Foreign>, &cgroup] {
            let until_full = (0..=MOST_PROGRAMS).map_while(|_| attach().ok());
            others.extend(until_full);
            ensure!(attach().is_err(), "the hook takes more than {MOST_PROGRAMS} programs");
        }
        Ok(())
    })?;
    let agent = scenario.agent(1)?;
    eventually(|| {
        let (status, _) = agent.http(HEALTH, "/healthz")?;
        let (alive, _) = agent.http(HEALTH, "/livez")?;
        let log = agent.process().stderr();
        let named = ["unhealthy", "connect-time hooks", "connect4", "interfaces", &pod];
        let is_told = named.iter().all(|text| log.contains(text));
        ensure!((status, alive) == (503, 503) && is_told, "{status} {alive}\n{log}");
        Ok(())
    })?;
    // It goes on trying.
    drop(others);
    eventually(|| {
        let (status, body) = agent.http(HEALTH, "/healthz")?;
        ensure!(status == 200, "{body}");
        Ok(())
    })?;
    ensure_served(&scenario)
}
