//! Every program through the verifier: first as the agent loads them, which ends with the first
//! program that is refused; then each by itself, so that every refusal is reported.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use lb_agent::maps::pins::Pins;
use lb_agent::options::modes::SocketLb;
use lb_agent::options::sizes::Sizes;
use lb_agent::programs::features::{self, Features};
use lb_agent::programs::load::{Constants, LoadError};
use lb_agent::programs::prepare;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::{Map, Value};

use super::Report;
use crate::harness::netns::actors::rights;
use crate::harness::programs::Programs;

/// The pin directory of this test.
const PINS: &str = "/sys/fs/bpf/lb-vm";
/// How much of a verifier's log is shown, from its end.
const LOG: usize = 4000;
/// The limit of locked memory that a container runtime of those kernels sets, in bytes.
const MEMLOCK: u64 = 64 << 10;

pub(super) fn run(report: &mut Report, features: Features) {
    for mode in [SocketLb::Tcp, SocketLb::Node, SocketLb::All] {
        match by_agent(mode, features) {
            Ok(None) => report.fact("without", format!("--socket-lb {mode:?}").to_lowercase()),
            result => report.test(
                format!("the agent loads its programs for --socket-lb {mode:?}"),
                result.map(drop),
            ),
        }
    }
    report.run("the capabilities of the manifests suffice, and each is needed", rights);
    if let Err(error) = each(report) {
        report.test("the object can be loaded", Err(error));
    }
}

/// Loads the programs with the capabilities that the manifests give the agent on this kernel, and
/// with each of them taken away.
fn rights() -> Result<()> {
    let all = rights::documented()?;
    let load = |capabilities: &[&str]| {
        rights::with_only(capabilities, || by_agent(SocketLb::Tcp, features::features()))
    };
    load(&all).with_context(|| format!("with {}", all.join(", ")))?;
    // The first load of the process has raised this limit for all that follow: aya raises it once.
    let before = getrlimit(Resource::RLIMIT_MEMLOCK).context("cannot read the limit of memory")?;
    for without in &all {
        let rest: Vec<&str> = all.iter().copied().filter(|name| name != without).collect();
        setrlimit(Resource::RLIMIT_MEMLOCK, MEMLOCK, MEMLOCK).context("cannot limit memory")?;
        let loaded = load(&rest);
        setrlimit(Resource::RLIMIT_MEMLOCK, before.0, before.1).context("cannot lift the limit")?;
        ensure!(loaded.is_err(), "the programs load without {without}");
    }
    Ok(())
}

/// Loads the programs as an agent does, and returns how long it took; nothing if the kernel
/// lacks what the mode needs.
fn by_agent(mode: SocketLb, features: Features) -> Result<Option<f64>> {
    let pins = Pins::new(Path::new(PINS));
    let sizes = Sizes { services: 1024, backends: 4096, slots: 8192, flows: 4096 };
    let constants = match Constants::new(mode, features) {
        Err(LoadError::Cookie { .. }) => return Ok(None),
        constants => constants?,
    };
    let loaded = prepare::load(&pins, &sizes, constants);
    let removed = std::fs::remove_dir_all(PINS).context("cannot remove the pins");
    let loaded = loaded.map(|programs| programs.elapsed.as_secs_f64())?;
    removed.map(|()| Some(loaded))
}

fn each(report: &mut Report) -> Result<()> {
    let (programs, refused) = Programs::load_each(&[])?;
    for (name, _) in programs.programs() {
        let refusal = refused.iter().find(|(other, _)| other == name);
        let result = refusal.map_or(Ok(()), |(_, error)| Err(shortened(error)));
        report.test(format!("program {name} is accepted"), result);
    }
    if refused.is_empty() {
        let counts: Map<String, Value> =
            programs.told()?.into_iter().map(|(name, count)| (name, count.into())).collect();
        report.fact("instructions", counts);
    }
    Ok(())
}

/// An error with the end of the verifier's log, which says why.
fn shortened(error: &anyhow::Error) -> anyhow::Error {
    let text = format!("{error:#}");
    let start = text.len().saturating_sub(LOG);
    let start = (start..=text.len()).find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    anyhow::Error::msg(text[start..].to_owned())
}
