//! Upstream's end-to-end tests of sig-network, against a cluster of real nodes that is made for
//! them.

pub mod list;
pub mod page;
pub mod report;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use crate::harness::controlplane::programs::{KUBERNETES_VERSION, program};
use crate::harness::real::cni::Cni;
use crate::harness::real::plan::{NODES, Plan};
use crate::harness::real::scripts::{CONTROL_NAMESPACE, script};
use crate::harness::real::{self, Cluster, Options};
use list::List;
use report::Report;

/// The cluster's name.
const NAME: &str = "lb-e2e";
/// How many tests run side by side: most of their time is waiting.
const PROCESSES: u32 = 6;
/// A whole run takes a quarter of an hour.
const TIMEOUT: &str = "45m";
/// Where reports are.
const REPORTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/e2e");

/// What is run, and on what.
#[derive(Debug)]
pub struct Choice {
    /// The network of pods.
    pub cni: Cni,
    /// Only tests whose name contains this.
    pub only: Option<String>,
    /// Leave the cluster up.
    pub keep: bool,
}

/// What came out.
#[derive(Debug, Default)]
pub struct Outcome {
    /// How many tests passed.
    pub passed: usize,
    /// What is wrong with the others.
    pub failures: Vec<String>,
}

/// Runs the tests. A whole run writes `docs/conformance.md`.
///
/// # Errors
/// The cluster does not come up, or the tests cannot be started.
pub fn run(choice: &Choice) -> Result<Outcome> {
    let list = List::of_repository()?;
    let reports = PathBuf::from(REPORTS).join(choice.cni.to_string());
    fs::create_dir_all(&reports).with_context(|| format!("cannot create {}", reports.display()))?;
    let differences = list.differences(&upstream(&reports)?);
    let is_chosen =
        |name: &&String| choice.only.as_ref().is_none_or(|only| name.contains(only.as_str()));
    let chosen: BTreeSet<String> = list.run.iter().filter(is_chosen).cloned().collect();
    let start = Instant::now();
    let mut outcome = Outcome { passed: 0, failures: differences };
    if !chosen.is_empty() {
        let (passed, failures) = on_cluster(choice, &chosen, &reports)?.compare(&chosen);
        outcome.passed = passed;
        outcome.failures.extend(failures);
    }
    if choice.only.is_none() {
        let run = page::Run {
            cni: &choice.cni.to_string(),
            date: jiff::Timestamp::now().strftime("%Y-%m-%d").to_string(),
            versions: [KUBERNETES_VERSION.to_owned(), version(), kernel()?],
            passed: outcome.passed,
            failures: &outcome.failures,
            minutes: start.elapsed().as_secs().div_ceil(60),
        };
        page::update(&list, &run)?;
    }
    Ok(outcome)
}

/// The names of all tests that upstream has.
fn upstream(reports: &Path) -> Result<BTreeSet<String>> {
    let report = reports.join("upstream.json");
    let output = Command::new(program("e2e.test")?)
        .args(["--ginkgo.dry-run", r"--ginkgo.focus=\[sig-network\]", "--provider=local"])
        .arg(format!("--ginkgo.json-report={}", report.display()))
        .output()
        .context("cannot start e2e.test")?;
    ensure!(
        output.status.success(),
        "e2e.test cannot list its tests: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(Report::read(&report)?.names())
}

/// Makes a cluster, runs the tests, and removes it, also when they could not be run.
fn on_cluster(choice: &Choice, chosen: &BTreeSet<String>, reports: &Path) -> Result<Report> {
    let plan = Plan::new(NAME)?;
    let options = Options { cni: choice.cni, ..Options::default() };
    real::down(&plan)?;
    let result = real::up(&plan, &options, &|line| println!("{line}")).and_then(|cluster| {
        give_zones(&cluster)?;
        ginkgo(&cluster, chosen, reports)
    });
    if !choice.keep {
        real::down(&plan)?;
    }
    result
}

/// Puts each node into a zone of its own: tests of traffic distribution want three.
fn give_zones(cluster: &Cluster) -> Result<()> {
    for node in cluster.nodes() {
        let name = node.name();
        let zone = format!("topology.kubernetes.io/zone=zone-{name}");
        cluster.kubectl().run(&["label", "--overwrite", "node", &name, &zone])?;
    }
    Ok(())
}

fn ginkgo(cluster: &Cluster, chosen: &BTreeSet<String>, reports: &Path) -> Result<Report> {
    const REPORT: &str = "report.json";
    let report = reports.join(REPORT);
    fs::remove_file(&report).ok();
    let plan = cluster.plan();
    let mut command = Command::new(script(plan, CONTROL_NAMESPACE));
    command.arg(program("ginkgo")?).args([
        "run",
        "--no-color",
        "--silence-skips",
        &format!("--procs={PROCESSES}"),
        &format!("--timeout={TIMEOUT}"),
        &format!("--json-report={REPORT}"),
        &format!("--output-dir={}", reports.display()),
        &format!("--focus={}", focus(chosen)),
    ]);
    command.arg(program("e2e.test")?).args([
        "--",
        "--provider=local",
        "--allowed-not-ready-nodes=0",
        "--dns-domain=cluster.local",
        "--disable-log-dump",
        &format!("--num-nodes={NODES}"),
        &format!("--kubeconfig={}", plan.kubeconfig("admin").display()),
        &format!("--kubectl-path={}", program("kubectl")?.display()),
        &format!("--report-dir={}", reports.display()),
    ]);
    command.current_dir(reports);
    // That tests failed is in the report; without one, ginkgo has said why.
    let status = command.status().context("cannot start ginkgo")?;
    Report::read(&report).with_context(|| format!("ginkgo ended with {status}"))
}

/// An expression that matches these names and no others.
fn focus(names: &BTreeSet<String>) -> String {
    let escaped = names.iter().map(|name| {
        let special = |letter: char| r"\.+*?()|[]{}^$".contains(letter);
        name.chars().fold(String::new(), |mut text, letter| {
            text.extend(special(letter).then_some('\\'));
            text.push(letter);
            text
        })
    });
    format!("({})$", escaped.collect::<Vec<_>>().join("|"))
}

/// The version of lb, and the commit it was built from, where that is known.
fn version() -> String {
    let version = env!("CARGO_PKG_VERSION");
    let commit = Command::new("git")
        .args(["-C", env!("CARGO_MANIFEST_DIR"), "rev-parse", "--short", "HEAD"])
        .output()
        .ok()
        .filter(|output| output.status.success());
    commit.map_or_else(
        || version.to_owned(),
        |output| format!("{version} ({})", String::from_utf8_lossy(&output.stdout).trim()),
    )
}

fn kernel() -> Result<String> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").context("cannot read it")?;
    Ok(release.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_expression_takes_names_by_letter() {
        let names = ["[sig-network] A b: c (d)", "e|f"].map(str::to_owned).into();
        assert_eq!(focus(&names), r"(\[sig-network\] A b: c \(d\)|e\|f)$");
    }
}
