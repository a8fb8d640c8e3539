//! The demo as a program, as `cargo xtask demo` runs it.

use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use anyhow::{Context, Result, ensure};
use lb_tests::harness::netns::actors::agent::lb_agent;
use lb_tests::harness::netns::topology::cgroup;
use lb_tests::harness::wait::{PATIENCE, within};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

/// A demo that runs. Dropping kills it; what it made goes with the sweep of the next cluster.
struct Demo {
    child: Child,
    output: TempDir,
}

impl Demo {
    fn start() -> Result<Self> {
        let output = tempfile::tempdir()?;
        let file = |name| File::create(output.path().join(name));
        let mut command = Command::new(env!("CARGO_BIN_EXE_lb-demo"));
        command.env("LB_AGENT", lb_agent()?.get_program()).stdin(Stdio::null());
        let child = command.stdout(file("stdout")?).stderr(file("stderr")?).spawn();
        Ok(Self { child: child.context("cannot start lb-demo")?, output })
    }

    fn said(&self, stream: &str) -> String {
        fs::read_to_string(self.output.path().join(stream)).unwrap_or_default()
    }

    /// Everything that it has printed, for errors.
    fn tail(&self) -> String {
        format!("stdout:\n{}\nstderr:\n{}", self.said("stdout"), self.said("stderr"))
    }

    fn wait(&mut self) -> Result<ExitStatus> {
        within(4 * PATIENCE, || self.child.try_wait()?.context("the demo still runs"))
            .with_context(|| self.tail())
    }

    /// Its network namespaces, BPF directories, cgroups, manifests and logs that are there. A process
    /// of it would keep its cgroup.
    fn things(&self) -> Result<Vec<String>> {
        let own = format!("lb-{}-", self.child.id());
        let [namespaces, bpf] = ["/run/netns", "/sys/fs/bpf"].map(PathBuf::from);
        let mut left = Vec::new();
        for directory in [namespaces, bpf, cgroup::mount_point()?, env::temp_dir()] {
            let entries = fs::read_dir(&directory);
            for entry in entries.with_context(|| format!("cannot read {}", directory.display()))? {
                let path = entry?.path();
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                if name.starts_with(&own) {
                    left.push(path.display().to_string());
                }
            }
        }
        Ok(left)
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// The rows of a printed demo: all lines that end in `ok`, and all that end in `FAILED`.
fn rows(said: &str) -> [Vec<&str>; 2] {
    ["ok", "FAILED"].map(|verdict| {
        let ends_so = |line: &&str| line.split_whitespace().last() == Some(verdict);
        said.lines().filter(ends_so).collect()
    })
}

/// One row of each part of the demo, by the words that it must have.
const ROWS: [&[&str]; 10] = [
    &["pod, same node", "10.96.0.1", "connect", "TCP+UDP", "near", "pod's IP"],
    &["pod, same node", "10.96.0.1", "packet", "TCP+UDP", "near", "pod's IP"],
    &["node, other node", "10.96.0.2", "packet", "far", "node's IP"],
    &["outside, NodePort", "30001", "near", "192.0.2.10", "client's IP"],
    &["outside, NodePort, dsr", "30010", "far", "192.0.2.10", "client's IP"],
    &["Service without endpoints", "ECONNREFUSED", "refused at once"],
    &["outside: LB, Local, node without endpoint", "no answer", "dropped on the node"],
    &["sticky", "40", "one backend"],
    &["client to web", "TCP connections/s", "0 lost"],
    &["addressed to a ClusterIP", "0"],
];

#[test]
fn the_demo_keeps_its_promises_and_leaves_nothing_behind() -> Result<()> {
    let mut demo = Demo::start()?;
    let status = demo.wait()?;
    let said = demo.said("stdout");
    let [kept, broken] = rows(&said);
    ensure!(broken.is_empty() && status.success(), "{status}\n{}", demo.tail());
    let summary = format!("all {} checks as promised", kept.len());
    ensure!(said.trim_end().ends_with(&summary), "{summary:?} is not the end of\n{said}");
    let readme = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("README.md");
    ensure!(fs::read_to_string(readme)?.contains(&summary), "README.md does not say {summary:?}");
    for words in ROWS {
        let is_shown = kept.iter().any(|row| words.iter().all(|word| row.contains(word)));
        ensure!(is_shown, "no row has {words:?}\n{said}");
    }
    let shown = said.lines().filter(|line| line.contains(":tcp-80 ")).count();
    ensure!(shown > 1, "get services shows {shown} Services\n{said}");
    let left = demo.things()?;
    ensure!(left.is_empty(), "still there: {left:?}");
    Ok(())
}

#[test]
fn a_demo_that_is_interrupted_cleans_up() -> Result<()> {
    let mut demo = Demo::start()?;
    within(PATIENCE, || {
        ensure!(!demo.things()?.is_empty(), "the demo has made nothing yet");
        Ok(())
    })?;
    kill(Pid::from_raw(i32::try_from(demo.child.id())?), Signal::SIGTERM)?;
    let status = demo.wait()?;
    ensure!(status.code() == Some(130), "{status}\n{}", demo.tail());
    ensure!(demo.said("stderr").contains("interrupted, and cleaned up"), "{}", demo.tail());
    let left = demo.things()?;
    ensure!(left.is_empty(), "still there: {left:?}");
    let said = demo.said("stdout");
    let shown = rows(&said).map(|rows| rows.len());
    ensure!(shown == [0, 0], "the demo went on\n{}", demo.tail());
    Ok(())
}
