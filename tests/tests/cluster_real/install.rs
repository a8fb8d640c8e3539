//! docs/install.md, followed to the letter on a cluster with kube-proxy: its commands are taken from
//! the page and run while clients work, into lb and back.

use std::env;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use lb_tests::harness::netns::words::expectations::Expectations;
use lb_tests::harness::real::addons;
use lb_tests::harness::real::page::Steps;
use lb_tests::harness::real::plan::node_name;
use lb_tests::harness::real::scripts::{KUBECTL, script};
use lb_tests::harness::wait::eventually;

use crate::Test;
use crate::traffic::{self, Kind, SERVERS, Traffic};
use crate::world::{AGENTS, World, nodes};

pub(crate) const TESTS: &[Test] = &[
    ("install::the_page_leads_from_kube_proxy_to_lb_and_back_without_a_loss", there_and_back),
    ("install::nodes_change_one_after_the_other_and_back_without_a_loss", node_by_node),
];

/// How long known connections may take to end, on the page and here.
const DRAIN: [&str; 2] = ["10m", "10s"];

fn there_and_back(world: &World) -> Result<()> {
    let page = Steps::read()?;
    let shell = Shell::new(world)?;
    traffic::set_up(world)?;

    let traffic = Traffic::start(world, &Kind::ALL)?;
    shell.run(&page.install)?;
    let programmed = shell.run(&page.wait)?;
    ensure!(is_of_each_node(&programmed, "programmed"), "{programmed}");
    shell.run(&page.stop)?;
    let removed = shell.run(&page.remove_rules)?;
    ensure!(removed.matches("removed iptables").count() >= nodes().count(), "{removed}");
    shell.run(&page.tidy)?;
    ensure_rules(world, false)?;
    // Each agent looks every 10 s, and tells that they are back only if it saw them gone.
    eventually(|| {
        let log = ["logs", "-n", "kube-system", "-l", AGENTS, "--tail=-1"];
        let log = world.real.kubectl().run(&log)?;
        ensure!(is_of_each_node(&log, "kube-proxy's rules are gone"), "not yet on each node");
        Ok(())
    })?;
    let checked = shell.run(&page.check)?;
    ensure!(checked.contains(&format!("{}/{SERVERS}", world.namespace())), "{checked}");
    traffic.finish("kube-proxy to lb")?;

    let stay = Traffic::start(world, &[Kind::Requests])?;
    let traffic = Traffic::start(world, &[Kind::NewConnections, Kind::Datagrams])?;
    shell.run(&page.start)?;
    eventually(|| {
        let told = shell.run(&page.is_back)?;
        ensure!(is_of_each_node(&told, "kube-proxy is back"), "not yet on each node: {told}");
        Ok(())
    })?;
    ensure_rules(world, true)?;
    shell.run(&page.remove_lb)?;
    stay.finish("lb to kube-proxy, connections that end before the drain")?;
    ensure!(page.detach.contains(DRAIN[0]), "the page drains otherwise: {}", page.detach);
    let detached = shell.run(&page.detach.replace(DRAIN[0], DRAIN[1]))?;
    ensure!(detached.matches("detached").count() == nodes().count(), "{detached}");
    shell.run(&page.tidy)?;
    traffic.finish("lb to kube-proxy")?;
    check_gone(world)
}

fn node_by_node(world: &World) -> Result<()> {
    let page = Steps::read()?;
    let (steps, shell) = (&page.by_node, Shell::new(world)?);
    traffic::set_up(world)?;
    shell.run(&steps.label_kube_proxy)?;
    shell.run(&steps.install)?;

    let traffic = Traffic::start(world, &Kind::ALL)?;
    for node in nodes() {
        let removed = shell.run_on(node, &steps.to_lb)?;
        ensure!(removed.contains("removed iptables"), "{removed}");
    }
    ensure_rules(world, false)?;
    traffic.finish("kube-proxy to lb, node by node")?;

    let traffic = Traffic::start(world, &[Kind::NewConnections, Kind::Datagrams])?;
    ensure!(steps.leave.contains(DRAIN[0]), "the page drains otherwise: {}", steps.leave);
    for node in nodes() {
        shell.run_on(node, &steps.start_kube_proxy)?;
        let agent = format!("--field-selector=spec.nodeName={}", node_name(node));
        eventually(|| {
            let name = ["get", "pod", "-n", "kube-system", "-l", AGENTS, &agent, "-o", "name"];
            let name = world.real.kubectl().run(&name)?;
            let log = ["logs", "-n", "kube-system", name.trim(), "--tail=-1"];
            let log = world.real.kubectl().run(&log)?;
            ensure!(log.contains("kube-proxy is back"), "not yet on node {node}");
            Ok(())
        })?;
        let detached = shell.run_on(node, &steps.leave.replace(DRAIN[0], DRAIN[1]))?;
        ensure!(detached.contains("detached"), "{detached}");
    }
    ensure_rules(world, true)?;
    shell.run(&page.tidy)?;
    traffic.finish("lb to kube-proxy, node by node")?;
    check_gone(world)
}

/// Whether a command over all pods of a DaemonSet printed a line with this text for each node.
fn is_of_each_node(printed: &str, text: &str) -> bool {
    printed.lines().filter(|line| line.contains(text)).count() == nodes().count()
}

/// kube-proxy's rules for the Service are on each node, or none of its rules is on any.
fn ensure_rules(world: &World, wanted: bool) -> Result<()> {
    let mut expectations = Expectations::default();
    for node in world.real.nodes() {
        for program in ["iptables-save", "ip6tables-save"] {
            let rules = node.output(program, &[])?;
            let own = if wanted { "KUBE-SVC-" } else { "KUBE-SERVICES" };
            let what = format!("{program} on {} with {own}: {wanted}", node.name());
            expectations.is_true(what, rules.contains(own) == wanted);
        }
    }
    expectations.finish()
}

/// No node has a program or a map of lb.
fn check_gone(world: &World) -> Result<()> {
    for node in world.real.nodes() {
        let left = node.output("ls", &["/sys/fs/bpf"])?;
        ensure!(!left.contains("lb"), "{} still has {left}", node.name());
        let attached = node.output("bpftool", &["net", "show"])?;
        ensure!(!attached.contains("lb_"), "attached on {}: {attached}", node.name());
    }
    Ok(())
}

/// An administrator's shell in a clone of this repository.
struct Shell {
    clone: PathBuf,
    path: String,
}

impl Shell {
    fn new(world: &World) -> Result<Self> {
        let kubectl = script(world.real.plan(), KUBECTL);
        let programs = kubectl.parent().context("a script without a directory")?;
        let path = env::var("PATH").unwrap_or_default();
        let path = format!("{}:{path}", programs.display());
        Ok(Self { clone: addons::write_clone(world.real.plan())?, path })
    }

    /// Runs a block of commands for a node.
    fn run_on(&self, node: u8, commands: &str) -> Result<String> {
        self.run(&format!("NODE={}\n{commands}", node_name(node)))
    }

    /// Runs a block of commands.
    fn run(&self, commands: &str) -> Result<String> {
        let mut shell = Command::new("sh");
        shell.args(["-euc", commands]).current_dir(&self.clone).env("PATH", &self.path);
        let output = shell.output().context("cannot start a shell")?;
        let printed = String::from_utf8_lossy(&output.stdout).into_owned();
        let said = String::from_utf8_lossy(&output.stderr);
        println!("{commands}{printed}{said}");
        ensure!(output.status.success(), "{}\n{commands}{printed}{said}", output.status);
        Ok(printed)
    }
}
