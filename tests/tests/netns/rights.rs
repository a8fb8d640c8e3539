//! What an agent needs of its container, and what it says if it does not get that. Every agent of
//! this tier runs with the capabilities of the DaemonSet alone.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use lb_agent::maps::pins::Pins;
use lb_agent::options::modes::SocketLb;
use lb_agent::options::sizes::Sizes;
use lb_agent::programs::features;
use lb_agent::programs::load::Constants;
use lb_agent::programs::prepare;
use lb_tests::harness::echo::Transport;
use lb_tests::harness::netns::actors::agent::{Agent, Options, lb_agent};
use lb_tests::harness::netns::actors::rights;
use lb_tests::harness::netns::topology::cluster::Cluster;
use lb_tests::harness::netns::topology::node::Node;
use lb_tests::harness::netns::topology::plan::Family;
use lb_tests::harness::netns::words::expectations::Expectations;
use lb_tests::harness::netns::words::scenario::{SMALL_MAPS, Scenario};
use lb_tests::harness::wait::{PATIENCE, eventually};

/// What `run` and `check` of the agent say on a node: the last line of the one, the findings that
/// would keep it from starting of the other.
fn refused(node: &Node, bpf_dir: &Path, prepare: impl Fn(&mut Command)) -> Result<[String; 2]> {
    let directory = tempfile::tempdir()?;
    let mut run = lb_agent()?;
    run.args(["run", "--hostname-override", node.name(), "--manifests"]).arg(directory.path());
    run.args(SMALL_MAPS).arg("--bpf-dir").arg(bpf_dir);
    let mut check = lb_agent()?;
    check.arg("check").arg("--bpf-dir").arg(bpf_dir);
    let mut said = [String::new(), String::new()];
    for (mut command, said) in [run, check].into_iter().zip(&mut said) {
        command.arg("--cgroup").arg(node.cgroup_tree().path());
        prepare(&mut command);
        let mut process = node.spawn_agent("refused", command)?;
        let status = process.wait(PATIENCE)?;
        ensure!(status.code() == Some(1), "{status}: {}", process.tail());
        let failed = process.stdout();
        let failed = failed.lines().filter(|line| line.starts_with("fail"));
        let last = process.stderr().lines().last().unwrap_or_default().to_owned();
        *said = failed.map(str::to_owned).chain([last]).collect::<Vec<_>>().join("\n");
    }
    Ok(said)
}

/// Both say the same cause.
fn expect_refused(said: Result<[String; 2]>, cause: &str) -> Result<()> {
    for said in said? {
        ensure!(said.contains(cause), "no {cause:?} in {said}");
    }
    Ok(())
}

/// Loads the programs as an agent does, without the question beforehand whether it may.
fn load(node: &Node, capabilities: &[&str]) -> Result<()> {
    let pins = Pins::new(&node.bpf_dir().join("trial"));
    let sizes = Sizes { services: 64, backends: 64, slots: 256, flows: 1024 };
    let result = rights::with_only(capabilities, || {
        let constants = Constants::new(SocketLb::Tcp, features::features())?;
        Ok(prepare::load(&pins, &sizes, constants).map(drop)?)
    });
    if pins.base().exists() {
        fs::remove_dir_all(pins.base())?;
    }
    result
}

#[test]
fn an_agent_has_no_right_that_its_manifest_does_not_give_it() -> Result<()> {
    let builder = Cluster::builder().pod(1, "a").pod(1, "b");
    let mut scenario = Scenario::start(builder, &SMALL_MAPS)?;
    scenario.serve(&["b"])?;
    let web = scenario.exposed("web", 1);
    scenario.publish(&web, &scenario.endpoints(&["b"]))?;
    // The second agent takes over from the first with no more rights than that.
    scenario.take_agent(1)?.terminate()?;
    scenario.start_agent(1)?;
    let process = scenario.agent(1)?.process().pid();
    let status = fs::read_to_string(format!("/proc/{process}/status"))?;
    let expected = format!("CapEff:\t{:016x}\n", rights::mask(&rights::of_manifest()?));
    ensure!(status.contains(&expected), "no {expected} in {status}");
    let a = scenario.cluster.pod("a");
    for family in Family::ALL {
        let kind = (Transport::Tcp, family);
        scenario.check(&a, kind, 1, &["b"], &[a.ip(family)])?;
    }
    Ok(())
}

#[test]
fn each_capability_is_needed_and_its_absence_is_named() -> Result<()> {
    let cluster = Cluster::builder().nodes(1).build()?;
    let node = cluster.node(1);
    let all = rights::of_manifest()?;
    let mut expectations = Expectations::default();
    expectations.check("with all", load(&node, &all));
    for without in &all {
        let rest: Vec<&str> = all.iter().copied().filter(|name| name != without).collect();
        let loaded = load(&node, &rest);
        expectations.is_true(format!("the kernel does without {without}"), loaded.is_err());
        let said = refused(&node, node.bpf_dir(), |command| rights::limit(command, &rest));
        let cause = format!("missing CAP_{without}: run as root, or add them to capabilities.add");
        expectations.check(format!("without {without}"), expect_refused(said, &cause));
    }
    expectations.finish()
}

#[test]
fn a_filter_that_refuses_bpf_is_named() -> Result<()> {
    let cluster = Cluster::builder().nodes(1).build()?;
    let node = cluster.node(1);
    let all = rights::of_manifest()?;
    for error in [libc::EPERM, libc::ENOSYS] {
        let said = refused(&node, node.bpf_dir(), |command| {
            rights::limit(command, &all);
            rights::refuse(command, libc::SYS_bpf, error);
        });
        expect_refused(said, "a seccomp filter refuses bpf(2) although the capabilities are there")
            .with_context(|| format!("error {error}"))?;
    }
    Ok(())
}

#[test]
fn a_bpffs_that_is_missing_or_read_only_is_named() -> Result<()> {
    let cluster = Cluster::builder().nodes(1).build()?;
    let node = cluster.node(1);
    let all = rights::of_manifest()?;
    let directory = tempfile::tempdir()?;
    let path = directory.path().to_str().context("a directory that is no text")?;
    let said = refused(&node, directory.path(), |command| rights::limit(command, &all));
    expect_refused(said, &format!("there is no bpffs at {path}, and mounting one needs CAP_SYS"))?;
    let said = refused(&node, directory.path(), |command| {
        in_own_mounts(command, &format!("mount -t bpf -o ro x {path}"), &all);
    });
    expect_refused(said, &format!("{path} is on a read-only mount, so nothing can be pinned"))
}

#[test]
fn an_agent_needs_no_writable_root() -> Result<()> {
    let cluster = Cluster::builder().nodes(1).build()?;
    let node = cluster.node(1);
    let manifests = tempfile::tempdir()?;
    let mut command = lb_agent()?;
    command.args(["run", "--hostname-override", node.name(), "--manifests"]).arg(manifests.path());
    command.arg("--bpf-dir").arg(node.bpf_dir()).args(SMALL_MAPS);
    command.arg("--cgroup").arg(node.cgroup_tree().path());
    let read_only = "mount -o remount,bind,ro / && mount -o bind /proc/sys /proc/sys \
                     && mount -o remount,bind,ro /proc/sys";
    in_own_mounts(&mut command, read_only, &rights::of_manifest()?);
    let mut agent = node.spawn_agent("read-only", command)?;
    let programmed = eventually(|| {
        ensure!(agent.ended()?.is_none(), "it ended");
        ensure!(agent.stderr().contains("programmed"), "not yet");
        Ok(())
    });
    programmed.with_context(|| agent.stderr())?;
    agent.kill()?;
    Ok(())
}

/// Wraps `command` so that it runs in a mount namespace of its own, after the shell has made the
/// mounts, with these capabilities.
fn in_own_mounts(command: &mut Command, mounts: &str, capabilities: &[&str]) {
    let named: Vec<String> =
        capabilities.iter().map(|name| format!("+{}", name.to_lowercase())).collect();
    let script = format!(
        "{mounts} && exec setpriv --bounding-set -all,{} --inh-caps -all -- \"$@\"",
        named.join(",")
    );
    let mut wrapped = Command::new("unshare");
    wrapped.args(["--mount", "sh", "-c", &script, "sh"]);
    wrapped.arg(command.get_program()).args(command.get_args());
    *command = wrapped;
}

#[test]
fn a_node_that_is_prepared_needs_nothing_of_its_agent() -> Result<()> {
    let cluster = Cluster::builder().nodes(1).build()?;
    let node = cluster.node(1);
    let sysctl = |name: &str| -> Result<String> {
        let path = format!("/proc/sys/net/ipv4/conf/lo/{name}");
        node.netns().run(|| Ok(fs::read_to_string(&path)?.trim().to_owned()))
    };
    let names = ["accept_local", "route_localnet"];
    let before = names.map(sysctl);
    ensure!(before.into_iter().all(|value| value.is_ok_and(|value| value == "0")), "set before");
    let mut command = lb_agent()?;
    command.args(["run", "--init-only", "--bpf-dir"]).arg(node.bpf_dir().join("deep"));
    command.env("NODE_NAME", node.name());
    node.output(command, PATIENCE)?;
    for name in names {
        ensure!(sysctl(name)? == "1", "{name} is not set");
    }
    ensure!(node.bpf_dir().join("deep").is_dir(), "no directory");
    fs::remove_dir(node.bpf_dir().join("deep"))?;
    Ok(())
}

#[test]
fn the_name_of_the_node_is_put_into_variables() -> Result<()> {
    let cluster = Cluster::builder().nodes(1).build()?;
    let node = cluster.node(1);
    let manifests = tempfile::tempdir()?;
    let options = Options::manifests(manifests.path()).arguments(&SMALL_MAPS);
    let mut agent = Agent::start(&node, &options)?;
    let mut command = lb_agent()?;
    let parent = node.bpf_dir().parent().context("no parent")?.display().to_string();
    let name = node.bpf_dir().file_name().context("no name")?.to_string_lossy().into_owned();
    command.args(["get", "services"]).env("NODE_NAME", name);
    command.env("LB_BPF_DIR", format!("{parent}/$(NODE_NAME)")).env("LB_OUTPUT", "json");
    let output = node.output(command, PATIENCE)?;
    ensure!(output.trim() == "[]", "{output}");
    ensure!(agent.process().ended()?.is_none(), "the agent ended");
    Ok(())
}
