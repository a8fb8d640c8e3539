//! Commands whose output nobody reads any more, as with `lb-agent get services | head -1`.

use std::io::pipe;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use lb_tests::harness::netns::actors::agent::lb_agent;
use lb_tests::harness::netns::topology::cluster::Cluster;
use lb_tests::harness::netns::topology::plan::{Family, cluster_ip};
use lb_tests::harness::netns::words::expectations::Expectations;
use lb_tests::harness::netns::words::scenario::{PORT, SMALL_MAPS, Scenario};

/// Every command that prints something, and its exit status here.
const COMMANDS: [(&[&str], i32); 12] = [
    (&["get", "services"], 0),
    (&["get", "frontends", "-o", "json"], 0),
    (&["get", "backends"], 0),
    (&["get", "flows"], 0),
    (&["get", "affinity"], 0),
    (&["get", "counters"], 0),
    (&["check"], 0),
    (&["status"], 0),
    (&["sysdump", "--out", "-"], 0),
    (&["cleanup"], 1),
    (&["version"], 0),
    (&["completions", "bash"], 0),
];

/// Runs a command with a pipe for stdout that has no reader: its status and what it says.
fn run(mut command: Command) -> Result<(Option<i32>, String)> {
    let (reader, writer) = pipe()?;
    drop(reader);
    let output = command.stdout(Stdio::from(writer)).stderr(Stdio::piped()).spawn()?;
    let output = output.wait_with_output().context("it does not end")?;
    Ok((output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned()))
}

#[test]
fn a_command_that_nobody_reads_ends_quietly_and_as_it_would() -> Result<()> {
    let builder = Cluster::builder().nodes(1).pod(1, "a").pod(1, "b");
    let mut scenario = Scenario::start(builder, &SMALL_MAPS)?;
    scenario.serve(&["b"])?;
    // More than the buffer of stdout holds.
    for number in 1..=20 {
        let service = scenario.service(&format!("s{number}"), number);
        scenario.publish(&service, &scenario.endpoints(&["b"]))?;
    }
    let node = scenario.cluster.node(1);
    let command = |words: &[&str]| -> Result<Command> {
        let mut command = lb_agent()?;
        command.args(words);
        if !["version", "completions"].contains(&words[0]) {
            command.arg("--bpf-dir").arg(node.bpf_dir());
        }
        if ["check", "sysdump", "cleanup"].contains(&words[0]) {
            command.arg("--cgroup").arg(node.cgroup_tree().path());
        }
        Ok(command)
    };
    let mut expectations = Expectations::default();
    let from = scenario.cluster.pod("a").ip(Family::V4).to_string();
    let to = format!("{}:{PORT}/tcp", cluster_ip(1).v4);
    let explain: (&[&str], i32) = (&["explain", "--from", &from, "--to", &to], 0);
    for (words, expected) in COMMANDS.into_iter().chain([explain]) {
        let (code, said) = node.netns().run(|| run(command(words)?))?;
        let is_quiet = !said.contains("panicked") && !said.contains("roken pipe");
        let row = format!("{words:?}: {code:?} {said}");
        expectations.is_true(row, code == Some(expected) && is_quiet);
    }
    // What a command does is done, whoever reads.
    scenario.take_agent(1)?.terminate()?;
    let (code, said) = node.netns().run(|| run(command(&["cleanup"])?))?;
    expectations.is_true(format!("cleanup: {code:?} {said}"), code == Some(0) && said.is_empty());
    ensure!(!node.bpf_dir().exists(), "cleanup stopped in the middle");
    expectations.finish()
}
