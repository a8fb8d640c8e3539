//! `lb-agent status`: this node's agent in one page.
//!
//! The maps and what is attached are read from the kernel, so the page has them without an agent
//! too; the rest is the agent's [report](crate::report). The node is well if an agent runs, is
//! healthy, everything fits, and nothing is broken: an object that is refused for another reason is
//! its owner's business, and is only shown.

use std::{
    collections::BTreeMap,
    fmt::Write,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use jiff::Timestamp;
use lb_common::abi::ABI_VERSION;
use lb_control::model::text::Clean;
use serde::Serialize;

use super::{
    attached::{Attached, attached},
    get::{GetError, rows_as_table},
};
use crate::{
    cli::Output,
    events::EventReason,
    maps::{
        fill::{Fill, fills},
        pins::Pins,
        read::read_settings,
        source_ports::EXHAUSTED,
    },
    report::{self, Report},
};

/// How often `--wait` looks.
const POLL: Duration = Duration::from_millis(100);

/// How many refused objects of one namespace the page shows: a tenant can have thousands.
const SHOWN: usize = 5;

/// The state of this node's agent.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    /// Whether all is well: then the command exits with status 0.
    pub well: bool,
    /// Why it is not.
    pub problems: Vec<String>,
    /// The version of this command.
    pub version: &'static str,
    /// The layout of the maps that this command reads.
    pub maps_version: u32,
    /// What the agent says of itself; null if none runs.
    pub agent: Option<Report>,
    /// The programs of lb that are attached.
    pub attached: Vec<Attached>,
    /// The pinned maps.
    pub maps: Vec<Fill>,
}

/// The state now.
pub fn status(bpf_dir: &Path) -> Status {
    let pins = Pins::new(bpf_dir);
    let mut problems = Vec::new();
    let agent = report::report(bpf_dir).map_err(|error| problems.push(sentence(&error))).ok();
    if let Some(report) = &agent {
        problems.extend(of_agent(report));
    }
    let maps = fills(&pins).map_err(|error| problems.push(sentence(&error)));
    let attached = attached(&pins).map_err(|error| problems.push(sentence(&error)));
    let attached = attached.unwrap_or_default();
    if attached.is_empty() && maps.is_ok() {
        problems.push("no program is attached: no packet is handled".to_owned());
    }
    if read_settings(&pins).is_ok_and(|settings| settings.is_draining()) {
        let text = "`cleanup --drain` was begun: new connections are left to the network stack";
        problems.push(text.to_owned());
    }
    Status {
        well: problems.is_empty(),
        problems,
        version: env!("CARGO_PKG_VERSION"),
        maps_version: ABI_VERSION,
        agent,
        attached,
        maps: maps.unwrap_or_default(),
    }
}

/// The state once all is well, or after `limit`.
pub fn wait(bpf_dir: &Path, limit: Option<Duration>) -> Status {
    let until = Instant::now() + limit.unwrap_or_default();
    loop {
        let status = status(bpf_dir);
        if status.well || Instant::now() >= until {
            return status;
        }
        thread::sleep(POLL);
    }
}

fn of_agent(report: &Report) -> Vec<String> {
    let mut problems: Vec<String> =
        report.faults.iter().map(|(part, text)| format!("{part}: {text}")).collect();
    let own = env!("CARGO_PKG_VERSION");
    if report.version != own {
        let text = format!("the agent is lb-agent {}, this command is {own}", report.version);
        problems.push(text);
    }
    if report.missing_pins > 0 {
        let text = format!(
            "{} pins are missing below {}: traffic is served while the agent runs; if it ended \
             now, translated connections would break",
            report.missing_pins, report.bpf_dir
        );
        problems.push(text);
    }
    if !report.programmed {
        let text = "the agent has not programmed anything yet: the datapath serves what an earlier \
                    agent left, if there was one";
        problems.push(text.to_owned());
    } else if !report.healthy && report.faults.is_empty() {
        problems.push("changes wait for too long to be programmed: see the log".to_owned());
    }
    let broken = report.broken_watches.iter().map(|watch| {
        format!("the watch of {}s is broken for {} s: {}", watch.kind, watch.seconds, watch.error)
    });
    problems.extend(broken);
    problems.extend(shortages(report));
    let exhausted = report.source_ports.iter().filter(|ports| ports.percent() >= EXHAUSTED);
    problems.extend(exhausted.map(|ports| {
        format!("{ports}: some new flows to this backend are refused (no_source_port)")
    }));
    problems
}

/// What does not fit into the maps: unlike other refused objects, that is for the administrator.
fn shortages(report: &Report) -> Vec<String> {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for refused in report.refused.iter().filter(|it| it.reason == EventReason::MapFull.word()) {
        *counts.entry(&refused.note).or_default() += 1;
    }
    counts.iter().map(|(note, count)| format!("{count} Services do not fit: {note}")).collect()
}

/// An error with its causes.
fn sentence(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(source) = cause {
        let _ = write!(text, ": {source}");
        cause = source.source();
    }
    text
}

impl Status {
    /// The page.
    ///
    /// # Errors
    /// If a table cannot be written.
    pub fn render(&self, output: Output) -> Result<String, GetError> {
        match output {
            Output::Json => Ok(serde_json::to_string_pretty(self)?),
            Output::Table => self.page(),
        }
    }

    fn page(&self) -> Result<String, GetError> {
        let state = if self.well { "well" } else { "NOT WELL" };
        let mut page = format!("{state}: lb-agent {} (maps v{})", self.version, self.maps_version);
        for problem in &self.problems {
            page.push_str(&format!("\n  ! {}", Clean(problem)));
        }
        if let Some(agent) = &self.agent {
            page.push_str(&self::agent(agent, Timestamp::now()));
        }
        for (title, table) in
            [("attached", rows_as_table(&self.attached)?), ("maps", rows_as_table(&self.maps)?)]
        {
            page.push_str(&format!("\n\n{title}\n{table}"));
        }
        Ok(page)
    }
}

fn agent(report: &Report, now: Timestamp) -> String {
    let ago = |time: Timestamp| {
        let seconds = now.duration_since(time).as_secs();
        format!("{seconds} s ago")
    };
    let updated = report.last_updated.map_or_else(|| "never".to_owned(), ago);
    let healthy = if report.healthy { "healthy" } else { "unhealthy" };
    let watch = match report.broken_watches.len() {
        0 => "alive".to_owned(),
        broken => format!("{broken} broken"),
    };
    let mut text = format!(
        "\nnode     {}\nagent    process {}, started {}, {healthy}\nsource   {}, watch {watch}\n\
         maps     hold all changes known {updated}",
        report.node,
        report.process,
        ago(report.started),
        report.source,
    );
    if let Some(since) = report.waiting_since {
        text.push_str(&format!("\nwaiting  a change since {}", ago(since)));
    }
    text.push_str(&refused(&report.refused));
    for ports in &report.source_ports {
        text.push_str(&format!("\nports    {ports}"));
    }
    for manifest in &report.invalid_manifests {
        text.push_str(&format!("\ninvalid  {}", Clean(manifest)));
    }
    text
}

/// The refused objects, but no more than [`SHOWN`] of each namespace.
fn refused(objects: &[report::Refused]) -> String {
    let (mut text, mut counts) = (String::new(), BTreeMap::<&str, usize>::new());
    for report::Refused { kind, name, reason, note } in objects {
        let (namespace, _) = name.split_once('/').unwrap_or_default();
        let count = counts.entry(namespace).or_default();
        *count += 1;
        if *count <= SHOWN {
            let _ = write!(text, "\nrefused  {kind} {}: {reason}: {}", Clean(name), Clean(note));
        }
    }
    for (namespace, count) in counts.into_iter().filter(|(_, count)| *count > SHOWN) {
        let more = count - SHOWN;
        let _ = write!(
            text,
            "\nrefused  {more} more in namespace {}: `lb-agent status -o json` lists all",
            Clean(namespace)
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{BrokenWatch, PortUse, Refused};

    fn healthy() -> Report {
        Report {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            node: "node1".to_owned(),
            programmed: true,
            healthy: true,
            ..Report::default()
        }
    }

    #[test]
    fn a_refused_object_is_shown_and_is_no_problem_of_the_node() {
        let refused = Refused {
            kind: "Service".to_owned(),
            name: "default/a".to_owned(),
            reason: "ProtocolNotSupported".to_owned(),
            note: "SCTP".to_owned(),
        };
        let report = Report { refused: vec![refused], ..healthy() };
        assert_eq!(of_agent(&report), [""; 0]);
        let text = agent(&report, Timestamp::now());
        assert!(text.contains("refused  Service default/a: ProtocolNotSupported: SCTP"), "{text}");
    }

    #[test]
    fn no_namespace_fills_the_page_with_what_is_refused_of_it() {
        let object =
            |name: String| Refused { kind: "Service".to_owned(), name, ..Refused::default() };
        let mut refused: Vec<_> = (0..700).map(|n| object(format!("many/{n:03}"))).collect();
        refused.extend((0..SHOWN).map(|n| object(format!("some/{n}"))));
        let text = agent(&Report { refused, ..healthy() }, Timestamp::now());
        let lines = |start: &str| text.lines().filter(|line| line.starts_with(start)).count();
        assert_eq!(lines("refused  Service many/"), SHOWN);
        assert_eq!(lines("refused  Service some/"), SHOWN, "as many as are shown");
        assert_eq!(lines("refused  695 more in namespace many: "), 1, "{text}");
        assert_eq!(lines("refused  "), 2 * SHOWN + 1, "{text}");
    }

    #[test]
    fn source_ports_that_run_out_are_shown_and_are_a_problem_once_flows_are_refused() {
        let report = |used| {
            let ports = PortUse {
                address: [10, 0, 0, 1].into(),
                backend: ([10, 1, 0, 1], 53).into(),
                protocol: "udp".to_owned(),
                used,
                ports: 28_976,
            };
            Report { source_ports: vec![ports], ..healthy() }
        };
        let line = "backend 10.1.0.1:53/udp: 21000 of 28976 source ports of 10.0.0.1 are in use";
        let text = agent(&report(21_000), Timestamp::now());
        assert!(text.contains(&format!("\nports    {line}")), "{text}");
        assert_eq!(of_agent(&report(21_000)), [""; 0]);
        let problems = of_agent(&report(28_000));
        assert!(problems.len() == 1 && problems[0].contains("28000 of 28976"), "{problems:?}");
    }

    #[test]
    fn no_text_of_an_object_moves_the_cursor() {
        let evil = "\u{1b}[2Jwell\r\n";
        let refused =
            Refused { name: evil.to_owned(), note: evil.to_owned(), ..Refused::default() };
        let report = Report {
            refused: vec![refused],
            invalid_manifests: vec![evil.to_owned()],
            ..healthy()
        };
        let text = agent(&report, Timestamp::now());
        assert_eq!(text.matches(r"\u{1b}[2Jwell\r\n").count(), 3, "{text}");
        assert!(!text.contains('\u{1b}') && !text.contains('\r'), "{text:?}");
    }

    #[test]
    fn each_way_to_be_ill_is_a_problem() {
        let watch =
            BrokenWatch { kind: "Node".to_owned(), seconds: 7, error: "refused".to_owned() };
        let fault = ("sweep".to_owned(), "cannot read".to_owned());
        let full = Refused {
            reason: "MapFull".to_owned(),
            note: "map SLOTS is full".to_owned(),
            ..Refused::default()
        };
        for (report, problem) in [
            (Report { missing_pins: 3, ..healthy() }, "3 pins are missing"),
            (Report { programmed: false, healthy: false, ..healthy() }, "not programmed anything"),
            (Report { healthy: false, ..healthy() }, "changes wait for too long"),
            (
                Report { broken_watches: vec![watch], ..healthy() },
                "watch of Nodes is broken for 7 s",
            ),
            (Report { faults: [fault].into(), healthy: false, ..healthy() }, "cannot read"),
            (
                Report {
                    refused: vec![full.clone(), Refused { name: "b".to_owned(), ..full }],
                    ..healthy()
                },
                "2 Services do not fit: map SLOTS is full",
            ),
            (Report { version: "0.0.1".to_owned(), ..healthy() }, "lb-agent 0.0.1"),
        ] {
            let problems = of_agent(&report);
            assert!(problems.len() == 1 && problems[0].contains(problem), "{problems:?}");
        }
    }
}
