//! `lb-agent status`, `sysdump` and the log as JSON.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;

use anyhow::{Context, Result, ensure};
use lb_tests::harness::netns::actors::agent::{Agent, Options, lb_agent};
use lb_tests::harness::netns::topology::cluster::{Builder, Cluster};
use lb_tests::harness::netns::topology::node::Node;
use lb_tests::harness::netns::words::scenario::{SMALL_MAPS, Scenario};
use lb_tests::harness::wait::{PATIENCE, eventually};
use serde_json::{Value, json};

const SERVICE: u8 = 1;
/// What must be in no archive.
const TOKEN: &str = "dG9rZW4tb2YtdGhlLXRlc3Q";
const PASSWORD: &str = "hunter2-of-the-test";

fn builder() -> Builder {
    Cluster::builder().nodes(1).pod(1, "a").pod(1, "b")
}

fn command(node: &Node, arguments: &[&str]) -> Result<Command> {
    let mut command = lb_agent()?;
    command.args(arguments).arg("--bpf-dir").arg(node.bpf_dir());
    Ok(command)
}

/// Runs a command to its end: whether it succeeds, stdout and stderr.
fn run(node: &Node, arguments: &[&str]) -> Result<(bool, String, String)> {
    let mut process = node.spawn_agent("command", command(node, arguments)?)?;
    let status = process.wait(2 * PATIENCE)?;
    Ok((status.success(), process.stdout(), process.stderr()))
}

/// The status as JSON; its field `well` agrees with the exit status.
fn status(node: &Node) -> Result<Value> {
    let (succeeds, stdout, stderr) = run(node, &["status", "-o", "json"])?;
    let status: Value =
        serde_json::from_str(&stdout).with_context(|| format!("{stdout}{stderr}"))?;
    ensure!(status["well"] == succeeds, "exit status: {succeeds}, {status}");
    Ok(status)
}

fn has_problem(status: &Value, text: &str) -> bool {
    let mut problems = status["problems"].as_array().into_iter().flatten();
    problems.any(|problem| problem.as_str().is_some_and(|problem| problem.contains(text)))
}

fn entries(status: &Value, map: &str) -> Option<u64> {
    let mut maps = status["maps"].as_array()?.iter();
    maps.find(|row| row["map"] == map)?["entries"].as_u64()
}

fn is_attached(status: &Value, place: &str, hook: &str, program: &str) -> bool {
    let row = json!({ "place": place, "hook": hook, "program": program });
    status["attached"].as_array().is_some_and(|rows| rows.contains(&row))
}

/// A Service whose port nobody handles.
fn unsupported() -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": { "name": "sctp", "namespace": "default" },
        "spec": {
            "clusterIP": "10.96.0.77", "clusterIPs": ["10.96.0.77"], "ipFamilies": ["IPv4"],
            "ports": [{ "port": 9, "protocol": "SCTP" }],
        },
    })
}

#[test]
fn a_node_with_a_healthy_agent_is_well_and_shows_what_it_has() -> Result<()> {
    let mut scenario = Scenario::start(builder(), &SMALL_MAPS)?;
    scenario.serve(&["b"])?;
    scenario.publish(&scenario.service("web", SERVICE), &scenario.endpoints(&["b"]))?;
    let node = scenario.cluster.node(1);
    let shown = status(&node)?;
    ensure!(shown["well"] == true, "{shown}");
    ensure!(shown["agent"]["node"] == node.name(), "{shown}");
    // One for each protocol of the Service's port.
    ensure!(entries(&shown, "BACKENDS4") == Some(2), "{shown}");
    ensure!(entries(&shown, "SERVICES").is_some_and(|services| services >= 4), "{shown}");
    let device = scenario.cluster.pod("a").host_device().to_owned();
    ensure!(is_attached(&shown, &device, "ingress", "from_pod"), "{shown}");
    ensure!(is_attached(&shown, "eth0", "ingress", "from_device"), "{shown}");
    ensure!(is_attached(&shown, "cgroup", "connect", "connect4"), "{shown}");

    // A refused object is shown; it is its owner's business.
    scenario.manifests.write("sctp.json", &unsupported().to_string())?;
    let shown = eventually(|| {
        let shown = status(&node)?;
        ensure!(shown["agent"]["refused"][0]["name"] == "default/sctp", "{shown}");
        Ok(shown)
    })?;
    ensure!(shown["well"] == true, "{shown}");
    let (succeeds, page, _) = run(&node, &["status"])?;
    ensure!(succeeds && page.starts_with("well: "), "{page}");
    for text in ["ProtocolNotSupported", "from_pod", "BACKENDS4", node.name()] {
        ensure!(page.contains(text), "{text} is not in\n{page}");
    }
    Ok(())
}

#[test]
fn what_is_wrong_is_named_and_the_exit_status_is_not_zero() -> Result<()> {
    let mut scenario =
        Scenario::start(builder(), &["--max-services", "8", "--max-namespace-share", "100"])?;
    let node = scenario.cluster.node(1);
    // Each Service takes two entries in each family.
    for (name, number) in [("one", 1), ("two", 2), ("three", 3)] {
        let endpoints = scenario.endpoints(&["b"]);
        scenario.manifests.publish(&scenario.service(name, number), &endpoints)?;
    }
    let shown = eventually(|| {
        let shown = status(&node)?;
        ensure!(has_problem(&shown, "--max-services"), "{shown}");
        Ok(shown)
    })?;
    ensure!(shown["agent"]["healthy"] == true, "{shown}");

    scenario.take_agent(1)?.kill9()?;
    let shown = status(&node)?;
    ensure!(has_problem(&shown, "no lb-agent runs") && shown["agent"].is_null(), "{shown}");
    ensure!(is_attached(&shown, "eth0", "ingress", "from_device"), "{shown}");
    let (succeeds, page, stderr) = run(&node, &["status"])?;
    ensure!(!succeeds && page.starts_with("NOT WELL: "), "{page}");
    ensure!(stderr.starts_with("lb-agent: this node is not well: no lb-agent runs"), "{stderr}");

    run(&node, &["cleanup"])?;
    let shown = status(&node)?;
    ensure!(has_problem(&shown, "nothing is pinned"), "{shown}");
    Ok(())
}

#[test]
fn status_waits_until_the_agent_has_programmed_its_node() -> Result<()> {
    let mut scenario = Scenario::start(builder(), &SMALL_MAPS)?;
    let node = scenario.cluster.node(1);
    scenario.take_agent(1)?.kill9()?;
    thread::scope(|scope| {
        let waits = scope.spawn(|| run(&node, &["status", "--wait", "120s"]));
        scenario.start_agent(1)?;
        let (succeeds, page, stderr) = waits.join().expect("no panic")?;
        ensure!(succeeds && page.starts_with("well: "), "{page}{stderr}");
        Ok(())
    })
}

/// The files of an archive, by their names without its folder.
fn read_archive(archive: &Path) -> Result<BTreeMap<String, String>> {
    let to = tempfile::tempdir()?;
    let unpacked =
        Command::new("tar").arg("-xzf").arg(archive).arg("-C").arg(to.path()).status()?;
    ensure!(unpacked.success(), "{} is no archive", archive.display());
    let folder = fs::read_dir(to.path())?.next().context("the archive is empty")??.path();
    let mut files = BTreeMap::new();
    let mut directories = vec![folder.clone()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory)? {
            let path = entry?.path();
            if path.is_dir() {
                directories.push(path);
                continue;
            }
            let name = path.strip_prefix(&folder)?.display().to_string();
            files.insert(name, fs::read_to_string(path)?);
        }
    }
    Ok(files)
}

fn sysdump(node: &Node) -> Result<BTreeMap<String, String>> {
    let directory = tempfile::tempdir()?;
    let archive = directory.path().join("dump.tar.gz");
    let out = archive.to_string_lossy().into_owned();
    let (succeeds, _, stderr) = run(node, &["sysdump", "--out", &out])?;
    ensure!(succeeds, "{stderr}");
    read_archive(&archive)
}

fn contains(files: &BTreeMap<String, String>, name: &str, text: &str) -> Result<()> {
    let file = files.get(name).with_context(|| format!("no {name} in {:?}", files.keys()))?;
    ensure!(file.contains(text), "{name} has no {text}:\n{file}");
    Ok(())
}

#[test]
fn a_dump_has_what_a_bug_report_needs() -> Result<()> {
    let mut scenario = Scenario::start(builder(), &SMALL_MAPS)?;
    scenario.serve(&["b"])?;
    scenario.publish(&scenario.service("web", SERVICE), &scenario.endpoints(&["b"]))?;
    let files = sysdump(&scenario.cluster.node(1))?;
    for (name, text) in [
        ("status.txt", "well: "),
        ("status.json", "\"maps_version\""),
        ("check.txt", "kernel"),
        ("log.txt", " programmed "),
        ("metrics.txt", "lb_build"),
        ("configuration.json", "clusterCIDR"),
        ("get/services.json", "default/web"),
        ("get/frontends.json", "10.96."),
        ("get/backends.json", "10.244.1."),
        ("get/flows.json", "["),
        ("get/counters.json", "["),
        ("network/links.txt", "eth0"),
        ("network/routes.txt", "RouteMessage"),
        ("network/programs.json", "from_device"),
        ("kernel.txt", "Linux"),
    ] {
        contains(&files, name, text)?;
    }
    Ok(())
}

#[test]
fn a_dump_of_an_agent_without_api_server_says_why_and_has_no_secret() -> Result<()> {
    let cluster = builder().build()?;
    let node = cluster.node(1);
    let directory = tempfile::tempdir()?;
    let kubeconfig = directory.path().join("kubeconfig");
    // Nobody listens there.
    let content = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{ "name": "c", "cluster": {
            "server": format!("http://admin:{PASSWORD}@127.0.0.1:9"),
        } }],
        "users": [{ "name": "u", "user": { "token": TOKEN } }],
        "contexts": [{ "name": "c", "context": { "cluster": "c", "user": "u" } }],
    });
    fs::write(&kubeconfig, content.to_string())?;
    let options = Options::kubeconfig(&kubeconfig).arguments(&SMALL_MAPS).arguments(&["-v", "6"]);
    let _agent = Agent::spawn(&node, &options)?;
    eventually(|| {
        let shown = status(&node)?;
        ensure!(has_problem(&shown, "the watch of Services is broken"), "{shown}");
        ensure!(shown["well"] == false, "{shown}");
        Ok(())
    })?;
    let files = sysdump(&node)?;
    contains(&files, "status.txt", "NOT WELL")?;
    contains(&files, "configuration.json", "kubeconfig")?;
    contains(&files, "log.txt", "127.0.0.1:9")?;
    for (name, text) in &files {
        for secret in [TOKEN, PASSWORD] {
            ensure!(!text.contains(secret), "{name} has a secret");
        }
    }
    Ok(())
}

#[test]
fn the_log_is_json_if_it_is_asked_for() -> Result<()> {
    let arguments = [&SMALL_MAPS[..], &["--logging-format", "json"]].concat();
    let mut scenario = Scenario::start(builder(), &arguments)?;
    let log = scenario.agent(1)?.process().stderr();
    let lines = log.lines().map(serde_json::from_str).collect::<Result<Vec<Value>, _>>()?;
    let running = lines.iter().find(|line| line["message"] == "running");
    let running = running.with_context(|| log.clone())?;
    ensure!(running["level"] == "INFO" && running["node"] == "node1", "{running}");
    ensure!(running["timestamp"].is_string() && running["target"].is_string(), "{running}");
    Ok(())
}
