//! `cargo xtask test`: runs all tests, tier by tier.
//!
//! Always ends with the line `N passed, N failed`, so that its output can be read without
//! knowing the tiers. A test that cannot run counts as failed.

pub(crate) mod count;
mod tier;

use std::io::{BufRead, BufReader, Write, stdout};
use std::path::{self, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use self::count::{Counter, Form, Outcome};
use self::tier::{ALL, Run, Step, TIERS, Tier, VECTORS};
use crate::progress::seconds;
use crate::workspace::{Workspace, is_root};
use crate::{build, build_ebpf, cluster, image, setup, vm};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Tiers to run; all except e2e by default, none by default with --vectors
    #[arg(value_name = "NAME", value_parser = clap::builder::PossibleValuesParser::new(TIERS.map(|tier| tier.name).into_iter().chain([ALL])))]
    names: Vec<String>,
    /// Run a file of flow vectors; can be given several times
    #[arg(long, value_name = "FILE")]
    vectors: Vec<PathBuf>,
    /// Run only tests whose name contains TEXT; of flow vectors, groups whose id contains it
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// The network of pods of the tiers cluster-real (bridge, if not given) and e2e (ptp)
    #[arg(long, value_name = "CNI", value_parser = cluster::NETWORKS)]
    cni: Option<String>,
    /// Print the names of the tests instead of running them
    #[arg(long)]
    list: bool,
}

impl Args {
    /// Whether the arguments select a tier.
    fn names(&self, tier: &Tier) -> bool {
        let is_whole = self.names.is_empty() && self.vectors.is_empty() && !tier.on_request;
        let is_named = |name: &String| name == tier.name || (name == ALL && !tier.on_request);
        let is_asked_for = is_whole || self.names.iter().any(is_named);
        is_asked_for && (tier.has_names() || !self.chooses())
    }

    /// Whether the arguments select tests by name.
    fn chooses(&self) -> bool {
        self.only.is_some() || self.list
    }

    /// Fails if the arguments select tests by name in a tier whose tests have no names.
    fn check_names(&self) -> Result<()> {
        let nameless =
            |tier: &&Tier| !tier.has_names() && self.names.iter().any(|name| name == tier.name);
        if let (true, Some(tier)) = (self.chooses(), TIERS.iter().find(nameless)) {
            bail!(
                "the tests of the tier {0} have no names: leave out --only and --list, or see \
                 `cargo xtask {0} --help`",
                tier.name
            );
        }
        Ok(())
    }

    /// Fails if the arguments choose a network of pods and no tier that has pods.
    fn check_network(&self) -> Result<()> {
        let has_pods = |tier: &Tier| tier.scope >= setup::Scope::Nodes && self.names(tier);
        if let Some(cni) = &self.cni {
            ensure!(
                TIERS.iter().any(has_pods),
                "--cni {cni} is for the tiers cluster-real and e2e: name one of them"
            );
        }
        Ok(())
    }

    /// The files of vectors, by absolute paths, because the programs run in the clone.
    fn files(&self) -> Result<Vec<Step>> {
        let step = |file: &PathBuf| {
            let label = file.display().to_string();
            let file = path::absolute(file).with_context(|| format!("{}", file.display()))?;
            Ok(Step::new(label, Run::Vectors(Some(file))))
        };
        self.vectors.iter().map(step).collect()
    }
}

/// A tier and its steps to run.
type Chosen = (&'static Tier, Vec<Step>);

/// The outcome of one tier.
struct Row {
    tier: &'static str,
    outcome: Outcome,
    took: Duration,
}

pub(crate) fn run(workspace: &Workspace, args: &Args) -> Result<ExitCode> {
    if args.list {
        return list(workspace, args);
    }
    let rows = match choose(workspace, args).and_then(|chosen| {
        prepare(workspace, &chosen)?;
        Ok(chosen)
    }) {
        Ok(chosen) => run_tiers(workspace, &chosen, args),
        Err(error) => vec![Row {
            tier: "setup",
            outcome: Outcome::failure(format!("{error:#}")),
            took: Duration::ZERO,
        }],
    };
    let passed: usize = rows.iter().map(|row| row.outcome.passed).sum();
    let failed: usize = rows.iter().map(|row| row.outcome.failed).sum();
    println!("\n{}", summary(&rows));
    if passed + failed == 0 {
        println!("no test {}", if args.only.is_some() { "matches" } else { "was run" });
    }
    println!("{passed} passed, {failed} failed");
    stdout().flush().context("cannot write the result")?;
    Ok(if failed == 0 && passed > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The selected tiers, with their steps.
fn choose(workspace: &Workspace, args: &Args) -> Result<Vec<Chosen>> {
    args.check_names()?;
    args.check_network()?;
    tier::check_binaries(&workspace.integration_tests()?)?;
    let files = args.files()?;
    let steps = |tier: &'static Tier| {
        let mut steps = if args.names(tier) { tier.steps(args.chooses()) } else { Vec::new() };
        if tier.name == VECTORS {
            steps.extend(files.clone());
        }
        (tier, steps)
    };
    Ok(TIERS
        .iter()
        .map(steps)
        .filter(|(tier, steps)| args.names(tier) || !steps.is_empty())
        .collect())
}

/// Installs and builds what the tiers need.
fn prepare(workspace: &Workspace, chosen: &[Chosen]) -> Result<()> {
    let used = || chosen.iter().filter(|(_, steps)| !steps.is_empty()).map(|(tier, _)| tier);
    let scope = used().map(|tier| tier.scope).max().unwrap_or(setup::Scope::Build);
    setup::ensure(workspace, scope)?;
    if used().any(|tier| tier.programs) {
        build::tools(workspace)?;
        if scope >= setup::Scope::Nodes {
            cluster::images(workspace)?;
        } else if used().any(|tier| tier.needs_image()) {
            image::make(workspace)?;
        } else {
            build::agent(workspace)?;
        }
        if used().any(|tier| tier.needs_next_agent()) {
            build::next_agent(workspace)?;
        }
        return Ok(());
    }
    if used().any(|tier| tier.name == VECTORS) {
        return build::tool(workspace, LB_VECTORS);
    }
    build_ebpf::object(workspace, false)
}

/// The program of the tests crate that runs files of vectors.
const LB_VECTORS: &str = "lb-vectors";
/// The one that runs upstream's end-to-end tests.
const LB_E2E: &str = "lb-e2e";

fn run_tiers(workspace: &Workspace, chosen: &[Chosen], args: &Args) -> Vec<Row> {
    let mut rows = Vec::new();
    for (tier, steps) in chosen {
        let started = Instant::now();
        let mut outcome = Outcome::default();
        if tier.root && !steps.is_empty() && !is_root() {
            outcome = Outcome::failure(
                "these tests load programs and make network namespaces: run them as root"
                    .to_owned(),
            );
        } else {
            for step in steps {
                println!("\n== {}: {}", tier.name, step.label);
                let mut of_step = run_step(workspace, step, args);
                if let Some(alone) = failed_in_a_crowd(step, &of_step) {
                    println!("\n== {}: {}, again, one by one", tier.name, step.label);
                    of_step = of_step.repeated(run_step(workspace, &alone, args));
                }
                outcome.add(&step.label, of_step);
            }
        }
        if let Some(only) = &args.only
            && args.names.iter().any(|name| name == tier.name)
            && outcome == Outcome::default()
        {
            outcome = Outcome::failure(format!("no test matches {only} in tier {}", tier.name));
        }
        rows.push(Row { tier: tier.name, outcome, took: started.elapsed() });
    }
    rows
}

/// A defect fails many tests; the load of others fails a few.
const MOST_REPEATED: usize = 3;

/// The step that runs alone what failed beside others, where a wait can end too early.
fn failed_in_a_crowd(step: &Step, outcome: &Outcome) -> Option<Step> {
    let failures = &outcome.failures;
    let is_few = (1..=MOST_REPEATED).contains(&failures.len()) && failures.len() == outcome.failed;
    let is_worth_it = step.is_crowded && is_few && outcome.passed > 0;
    is_worth_it.then(|| step.alone(failures)).flatten()
}

/// The variable that names the network of pods to the tests of cluster-real.
const CNI: &str = "LB_TESTS_CNI";

/// Runs the tests of a step that the arguments choose.
fn run_step(workspace: &Workspace, step: &Step, args: &Args) -> Outcome {
    let (only, network) = (args.only.as_deref(), args.cni.as_deref());
    let (mut command, form) = match &step.run {
        Run::Machine(kernel) => return vm::outcome(workspace, kernel),
        Run::CargoTest(arguments, of_binary) => {
            let mut command = workspace.cargo("test");
            command.args(arguments).arg("--").args(of_binary).args(only);
            command.envs(network.map(|network| (CNI, network)));
            (command, Form::Libtest)
        }
        Run::Vectors(file) => {
            let mut command = workspace.command(workspace.tool(LB_VECTORS));
            command.args(file).args(only.map(|only| format!("--group={only}")));
            (command, Form::Plain)
        }
        Run::EndToEnd(cni) => {
            let mut command = workspace.command(workspace.tool(LB_E2E));
            command
                .args(["--cni", network.unwrap_or(cni)])
                .args(only.map(|only| format!("--only={only}")));
            (command, Form::Plain)
        }
    };
    match stream(&mut command, form) {
        Ok(outcome) if outcome == Outcome::default() && form == Form::Plain && only.is_none() => {
            Outcome::failure("no flow was tested".to_owned())
        }
        Ok(outcome) => outcome,
        Err(error) => Outcome::failure(format!("{error:#}")),
    }
}

/// Prints `TIER NAME` for each selected test.
fn list(workspace: &Workspace, args: &Args) -> Result<ExitCode> {
    build_ebpf::object(workspace, false)?;
    let mut is_empty = true;
    for (tier, steps) in choose(workspace, args)? {
        for step in steps {
            let Run::CargoTest(arguments, _) = step.run else {
                eprintln!(
                    "{}: not listed, its program has tests with names of its own",
                    step.label
                );
                continue;
            };
            let mut command = workspace.cargo("test");
            command.args(arguments).args(["--", "--list"]).args(&args.only);
            let output = command.stderr(Stdio::inherit()).output()?;
            ensure!(output.status.success(), "cannot list the tests of {}", step.label);
            for name in String::from_utf8_lossy(&output.stdout).lines() {
                if let Some(name) = name.strip_suffix(": test") {
                    println!("{} {name}", tier.name);
                    is_empty = false;
                }
            }
        }
    }
    Ok(if is_empty { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Runs a program, shows its output as it arrives, and counts its tests.
fn stream(command: &mut Command, form: Form) -> Result<Outcome> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {command:?}"))?;
    let output = child.stdout.take().context("a program without output")?;
    let mut counter = Counter::new(form);
    for line in BufReader::new(output).split(b'\n') {
        let line = line.context("cannot read the output")?;
        let line = String::from_utf8_lossy(&line);
        println!("{line}");
        counter.line(&line);
    }
    let status = child.wait().with_context(|| format!("cannot wait for {command:?}"))?;
    Ok(counter.finish(&status.to_string(), status.success()))
}

fn summary(rows: &[Row]) -> String {
    let mut lines = vec![format!(
        "{:<8} {:>7} {:>7} {:>8} {:>8}",
        "tier", "passed", "failed", "ignored", "time"
    )];
    for Row { tier, outcome, took } in rows {
        lines.push(format!(
            "{tier:<8} {:>7} {:>7} {:>8} {:>8}",
            outcome.passed,
            outcome.failed,
            outcome.ignored,
            seconds(*took)
        ));
    }
    for row in rows {
        for name in &row.outcome.repeated {
            lines.push(format!("REPEATED {} {name}: failed beside others, passed alone", row.tier));
        }
        let mut before = None;
        for failure in &row.outcome.failures {
            lines.push(format!("FAILED {} {failure}", row.tier));
            let said = row.outcome.said.get(failure);
            if said == before && said.is_some() {
                lines.push("    as the test before".to_owned());
            } else {
                lines.extend(said.into_iter().flatten().map(|line| format!("    {line}")));
            }
            before = said;
        }
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_repeats_every_failure_with_its_tier() {
        let mut outcome = Outcome::failure("a::b".to_owned());
        outcome.passed = 3;
        let rows = [Row { tier: "kernel", outcome, took: Duration::from_secs(2) }];
        let text = summary(&rows);
        assert!(text.contains("kernel         3       1        0     2.0s"), "{text}");
        assert!(text.ends_with("FAILED kernel a::b"), "{text}");
    }

    #[test]
    fn the_summary_gives_the_reason_of_a_failure_once() {
        let mut outcome = Outcome::failure("a".to_owned());
        outcome.failures.push("b".to_owned());
        for name in ["a", "b"] {
            outcome.said.insert(name.to_owned(), vec!["Error: no space left".to_owned()]);
        }
        let text = summary(&[Row { tier: "kernel", outcome, took: Duration::from_secs(2) }]);
        let end = "FAILED kernel a\n    Error: no space left\n\
                   FAILED kernel b\n    as the test before";
        assert!(text.ends_with(end), "{text}");
    }

    #[test]
    fn output_is_counted_while_it_streams() {
        let script = "echo 'test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured'; exit 0";
        let run = |script| stream(Command::new("sh").args(["-c", script]), Form::Libtest);
        let outcome = run(script).expect("sh starts");
        assert_eq!((outcome.passed, outcome.failed), (2, 0));
        let outcome = run("exit 101").expect("sh starts");
        assert_eq!((outcome.passed, outcome.failed), (0, 1));
    }

    #[test]
    fn a_file_of_vectors_runs_alone_unless_tiers_are_named() {
        let tiers = |names: &[&str], files: &[&str]| -> Vec<&str> {
            let args = Args {
                names: names.iter().map(|name| (*name).to_owned()).collect(),
                vectors: files.iter().map(PathBuf::from).collect(),
                only: None,
                cni: None,
                list: false,
            };
            TIERS.iter().filter(|tier| args.names(tier)).map(|tier| tier.name).collect()
        };
        let all = ["unit", "kernel", "vectors", "netns", "cluster", "cluster-real", "vm"];
        assert_eq!(tiers(&[], &[]), all);
        assert_eq!(tiers(&[], &["v.json"]), [""; 0]);
        assert_eq!(tiers(&["all"], &["v.json"]), all);
        assert_eq!(tiers(&["unit"], &["v.json"]), ["unit"]);
        assert_eq!(tiers(&["e2e"], &[]), ["e2e"]);
    }
}
