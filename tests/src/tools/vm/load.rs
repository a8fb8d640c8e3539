//! Every program through the verifier: first as the agent loads them, which ends with the first
//! program that is refused; then each by itself, so that every refusal is reported.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use lb_agent::maps::{pins::Pins, read::read_state, sources::Sources};
use lb_agent::options::modes::SocketLb;
use lb_agent::options::sizes::Sizes;
use lb_agent::programs::features::{self, Features};
use lb_agent::programs::load::Constants;
use lb_agent::programs::prepare;
use serde_json::{Map, Value};

use super::Report;
use crate::harness::netns::actors::rights;
use crate::harness::programs::{Programs, program_descriptor};
use crate::harness::verify::Program;

/// The pin directory of this test.
const PINS: &str = "/sys/fs/bpf/lb-vm";
/// The sizes of its maps.
const SIZES: Sizes = Sizes { services: 1024, backends: 4096, slots: 8192, flows: 4096 };
/// How much of a verifier's log is shown, from its end.
const LOG: usize = 4000;

pub(super) fn run(report: &mut Report, features: Features) {
    for mode in [SocketLb::Tcp, SocketLb::Node, SocketLb::All] {
        let loaded = by_agent(mode, features);
        report.test(format!("the agent loads its programs for --socket-lb {mode:?}"), loaded);
    }
    report.run("the capabilities of the manifests suffice, and each is needed", rights);
    if let Err(error) = each(report) {
        report.test("the object can be loaded", Err(error));
    }
}

/// Loads the programs with the capabilities that the manifests give the agent, and with each of them
/// taken away.
fn rights() -> Result<()> {
    let all = rights::of_manifest()?;
    let load = |capabilities: &[&str]| {
        rights::with_only(capabilities, || by_agent(SocketLb::Tcp, features::features()))
    };
    load(&all).with_context(|| format!("with {}", all.join(", ")))?;
    for without in &all {
        let rest: Vec<&str> = all.iter().copied().filter(|name| name != without).collect();
        ensure!(load(&rest).is_err(), "the programs load without {without}");
    }
    Ok(())
}

/// Loads the programs as an agent does, and reads the maps as it does then.
fn by_agent(mode: SocketLb, features: Features) -> Result<()> {
    let pins = Pins::new(Path::new(PINS));
    let loaded = prepare::load(&pins, &SIZES, Constants::new(mode, features)?);
    let readable = loaded.as_ref().map_or(Ok(()), |_| adopt(&pins));
    let removed = std::fs::remove_dir_all(PINS).context("cannot remove the pins");
    loaded?;
    readable.and(removed)
}

/// Reads every map whose entries an agent adopts when it starts.
fn adopt(pins: &Pins) -> Result<()> {
    read_state(pins).context("cannot read the Services")?;
    Sources::open(pins).context("cannot read the sources of routes").map(drop)
}

fn each(report: &mut Report) -> Result<()> {
    let (programs, refused) = Programs::load_each(&[])?;
    for (name, _) in programs.programs() {
        let refusal = refused.iter().find(|(other, _)| other == name);
        let result = refusal.map_or(Ok(()), |(_, error)| Err(shortened(error)));
        report.test(format!("program {name} is accepted"), result);
    }
    if refused.is_empty() {
        let count = |(name, program): (&str, _)| {
            let verified = Program::of(program_descriptor(program)?)?.verified;
            Ok((name.to_owned(), verified.into()))
        };
        let counts = programs.programs().into_iter().map(count).collect::<Result<Map<_, Value>>>();
        report.fact("instructions", counts?);
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
