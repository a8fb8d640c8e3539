//! Programs that somebody takes off are put back within seconds; where that cannot be,
//! `/healthz` says so.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use lb_tests::harness::echo::Answer;
use lb_tests::harness::netns::actors::agent::{self, cleanup};
use lb_tests::harness::netns::topology::cluster::Cluster;
use lb_tests::harness::netns::topology::plan::{Family, cluster_ip};
use lb_tests::harness::netns::words::world::{PORT, SMALL_MAPS, World};
use lb_tests::harness::wait::{PATIENCE, eventually};
use nix::sys::signal::Signal;

const SERVICE: u8 = 1;
const HEALTH: u16 = 10256;
const IS_BACK: &str = "detached by another program, and";

fn set_up(own: &[&str]) -> Result<World> {
    let builder = Cluster::builder().nodes(1).pod(1, "a").pod(1, "b");
    let mut world = World::start(builder, &[own, &SMALL_MAPS].concat())?;
    world.serve(&["b"])?;
    world.publish(&world.service("steady", SERVICE), &world.endpoints(&["b"]))?;
    Ok(world)
}

/// The pins of the links on node 1, those whose name ends so.
fn links(world: &World, end: &str) -> Result<Vec<PathBuf>> {
    let node = world.cluster.node(1);
    let version = fs::read_dir(node.bpf_dir())?.next().context("no version")??.path();
    let entries = fs::read_dir(version.join("links"))?;
    let paths: std::io::Result<Vec<_>> = entries.map(|entry| Ok(entry?.path())).collect();
    let is_meant = |path: &PathBuf| path.to_string_lossy().ends_with(end);
    let found: Vec<_> = paths?.into_iter().filter(is_meant).collect();
    ensure!(!found.is_empty(), "no link is pinned as *{end}");
    Ok(found)
}

fn run(world: &World, program: &str, arguments: &[&str]) -> Result<String> {
    let mut command = Command::new(program);
    command.args(arguments);
    world.cluster.node(1).output(command, PATIENCE)
}

fn detach(world: &World, link: &Path) -> Result<()> {
    let path = link.to_str().context("a path")?;
    run(world, "bpftool", &["link", "detach", "pinned", path]).map(drop)
}

/// What pod a is answered by the Service, packet by packet.
fn ask(world: &World, family: Family) -> Result<Answer> {
    world.cluster.pod("a").udp((cluster_ip(SERVICE).get(family), PORT).into())
}

fn ensure_served(world: &World) -> Result<()> {
    for family in Family::ALL {
        let answer = ask(world, family)?;
        ensure!(answer.name() == Some("b"), "{family:?}: {answer:?}");
    }
    Ok(())
}

fn ensure_lost(world: &World) -> Result<()> {
    let answer = ask(world, Family::V4)?;
    ensure!(answer.name().is_none(), "nothing was taken off: {answer:?}");
    Ok(())
}

/// Takes a program off and looks at what that means, while the agent cannot put it back.
fn while_stopped(world: &mut World, act: impl FnOnce(&World) -> Result<()>) -> Result<()> {
    world.agent(1)?.process().signal(Signal::SIGSTOP)?;
    let outcome = act(world);
    world.agent(1)?.process().signal(Signal::SIGCONT)?;
    outcome
}

/// Waits until the agent has said so many times that something is back. It is healthy
/// meanwhile.
fn wait_back(world: &mut World, times: usize) -> Result<()> {
    let agent = world.agent(1)?;
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
    let mut world = set_up(&["--socket-lb", "off", "--tc-attach", "tcx"])?;
    ensure_served(&world)?;
    let pod = world.cluster.pod("a").host_device().to_owned();
    for (times, link) in links(&world, &format!("{pod}-ingress"))?.iter().enumerate() {
        while_stopped(&mut world, |world| {
            detach(world, link)?;
            ensure_lost(world)
        })?;
        wait_back(&mut world, times + 1)?;
        ensure_served(&world)?;
    }
    Ok(())
}

#[test]
fn an_xdp_program_that_is_detached_is_back_within_seconds() -> Result<()> {
    let mut world = set_up(&["--xdp", "native"])?;
    let is_attached = |world: &World| {
        let told = run(world, "ip", &["-details", "link", "show", "dev", "eth0"])?;
        anyhow::Ok(told.contains("prog/xdp"))
    };
    ensure!(is_attached(&world)?);
    while_stopped(&mut world, |world| {
        detach(world, &links(world, "eth0-xdp_native")?[0])?;
        ensure!(!is_attached(world)?);
        Ok(())
    })?;
    eventually(|| {
        ensure!(is_attached(&world)?, "not back");
        Ok(())
    })?;
    let (status, body) = world.agent(1)?.http(HEALTH, "/healthz")?;
    ensure!(status == 200, "{body}");
    Ok(())
}

#[test]
fn a_pin_that_is_removed_is_back_and_no_packet_misses_its_program() -> Result<()> {
    let mut world = set_up(&["--socket-lb", "tcp", "--tc-attach", "tcx"])?;
    let pins = links(&world, "")?;
    for pin in &pins {
        fs::remove_file(pin)?;
        ensure_served(&world)?;
    }
    let start = Instant::now();
    while !pins.iter().all(|pin| pin.exists()) {
        ensure!(start.elapsed() < PATIENCE, "not pinned: {pins:?}");
        ensure_served(&world)?;
    }
    // And what is pinned is what is attached: the programs outlive the agent.
    world.take_agent(1)?.kill9()?;
    ensure_served(&world)
}

#[test]
fn a_filter_that_is_deleted_is_back_within_seconds() -> Result<()> {
    let mut world = set_up(&["--socket-lb", "off", "--tc-attach", "clsact"])?;
    ensure_served(&world)?;
    let pod = world.cluster.pod("a").host_device().to_owned();
    while_stopped(&mut world, |world| {
        run(world, "tc", &["filter", "del", "dev", &pod, "ingress"])?;
        ensure_lost(world)
    })?;
    wait_back(&mut world, 1)?;
    ensure_served(&world)?;
    while_stopped(&mut world, |world| {
        run(world, "tc", &["qdisc", "del", "dev", &pod, "clsact"])?;
        ensure_lost(world)
    })?;
    wait_back(&mut world, 3)?;
    ensure_served(&world)
}

#[test]
fn a_connect_hook_that_is_detached_is_back_within_seconds() -> Result<()> {
    let mut world = set_up(&["--socket-lb", "tcp"])?;
    // A connection that the hook has translated goes past the packet path.
    let translated = |world: &World| {
        let count = |world: &World| {
            let counters = agent::get(&world.cluster.node(1), "counters")?;
            let rows = counters.as_array().cloned().unwrap_or_default();
            let rows = rows.into_iter().filter(|row| row["hook"] == "connect4");
            anyhow::Ok(rows.filter_map(|row| row["count"].as_u64()).sum::<u64>())
        };
        let before = count(world)?;
        let answer = world.cluster.pod("a").tcp((cluster_ip(SERVICE).v4, PORT).into())?;
        ensure!(answer.name() == Some("b"), "{answer:?}");
        Ok(count(world)? - before)
    };
    ensure!(translated(&world)? == 1);
    while_stopped(&mut world, |world| {
        detach(world, &links(world, "cgroup-connect4")?[0])?;
        ensure!(translated(world)? == 0, "the hook was not detached");
        Ok(())
    })?;
    wait_back(&mut world, 1)?;
    ensure!(translated(&world)? == 1);
    Ok(())
}

#[test]
fn what_cannot_be_put_back_makes_the_proxy_unhealthy_and_is_named() -> Result<()> {
    let mut world = set_up(&["--socket-lb", "tcp", "--tc-attach", "tcx"])?;
    let node = world.cluster.node(1);
    // The agent is told to stay out of it: with the directory of its pins gone, nothing that
    // it attached would stay.
    cleanup(&node)?;
    let pod = world.cluster.pod("a").host_device().to_owned();
    let agent = world.agent(1)?;
    eventually(|| {
        let (status, _) = agent.http(HEALTH, "/healthz")?;
        let (alive, _) = agent.http(HEALTH, "/livez")?;
        let log = agent.process().stderr();
        let named = ["unhealthy", "connect-time hooks", "start the agent anew", &pod];
        let is_told = named.iter().all(|text| log.contains(text));
        ensure!((status, alive) == (503, 503) && is_told, "{status} {alive}\n{log}");
        Ok(())
    })?;
    world.take_agent(1)?.terminate()?;
    world.start_agent(1)?;
    ensure_served(&world)
}
