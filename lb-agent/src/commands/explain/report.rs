//! An explanation as data, which `-o json` prints, and as lines of text.

use std::fmt::{self, Write as _};

use serde::Serialize;

/// What happens to a packet on this node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Explanation {
    /// `ADDRESS:PORT` of the client.
    pub source: String,
    /// `ADDRESS:PORT` of the destination.
    pub destination: String,
    /// `tcp` or `udp`.
    pub protocol: String,
    /// The decision at connect(); null if the client is not on this node.
    pub connect: Option<Step>,
    /// The packet's path, program by program.
    pub path: Vec<Step>,
    /// What happens to the packet in the end.
    pub outcome: Outcome,
}

/// What one program does with the packet.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Step {
    /// The program, as in `get counters`.
    pub hook: &'static str,
    /// The interface; null for connect().
    pub device: Option<String>,
    /// Whether the program is attached there.
    pub attached: bool,
    /// Source `ADDRESS:PORT` of the packet as the program receives it.
    pub source: String,
    /// Destination `ADDRESS:PORT` of the packet as the program receives it.
    pub destination: String,
    /// `pass`, `drop`, `translate`, `answer`, or `none` if no program sees it.
    pub verdict: &'static str,
    /// The reason that is counted, as in `get counters`.
    pub reason: Option<&'static str>,
    /// The service port.
    pub service: Option<String>,
    /// The kind of its frontend, as in `get frontends`.
    pub frontend: Option<&'static str>,
    /// The set that the client gets: `cluster` or `local`.
    pub set: Option<&'static str>,
    /// Every backend of the service port.
    pub backends: Vec<Candidate>,
    /// Source `ADDRESS:PORT` of the packet after the program, for example.
    pub new_source: Option<String>,
    /// Destination `ADDRESS:PORT` of the packet after the program, for example.
    pub new_destination: Option<String>,
    /// The decisions and their causes, in order.
    pub decisions: Vec<Decision>,
}

/// A backend of the service port.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Candidate {
    /// `ADDRESS:PORT`.
    pub address: String,
    /// `this_node`, `this_host` or `other_node`.
    pub place: &'static str,
    /// Whether this packet may be sent to the backend.
    pub possible: bool,
    /// Why not, if it may not.
    pub why_not: Option<String>,
    /// The client address that the backend sees; null if it is not possible, and for connect().
    pub client_address: Option<String>,
    /// The next hop of packets to the backend.
    pub next_hop: Option<String>,
}

/// A decision and its cause.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Decision {
    /// The subject: `frontend`, `policy` and so on.
    pub about: &'static str,
    /// A sentence.
    pub text: String,
}

/// What happens to the packet in the end.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Outcome {
    /// `delivered` (to this node or to a pod of it), `leaves` (through a device), `answered`
    /// (lb sends an answer to its sender), `dropped`.
    pub result: &'static str,
    /// Source `ADDRESS:PORT` of the packet in the end.
    pub source: String,
    /// Destination `ADDRESS:PORT` of the packet in the end.
    pub destination: String,
    /// A sentence.
    pub text: String,
}

impl Step {
    /// Adds a decision.
    pub fn say(&mut self, about: &'static str, text: impl Into<String>) {
        self.decisions.push(Decision { about, text: text.into() });
    }

    /// How many backends are eligible.
    pub fn possible(&self) -> usize {
        self.backends.iter().filter(|candidate| candidate.possible).count()
    }
}

/// How many backends are listed.
const SHOWN: usize = 16;

impl fmt::Display for Explanation {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { source, destination, protocol, .. } = self;
        writeln!(out, "{source} -> {destination}/{protocol}")?;
        if let Some(step) = &self.connect {
            writeln!(out, "\nconnect()")?;
            step_lines(out, step)?;
            if step.attached && matches!(step.verdict, "translate" | "answer") {
                writeln!(
                    out,
                    "\nThe rest applies to packets of sockets that this hook did not translate:"
                )?;
            }
        }
        for step in &self.path {
            let device = step.device.as_deref().unwrap_or("-");
            writeln!(out, "\n{} {device}: {} -> {}", step.hook, step.source, step.destination)?;
            step_lines(out, step)?;
        }
        write!(out, "\noutcome: {}", self.outcome.text)
    }
}

fn step_lines(out: &mut fmt::Formatter<'_>, step: &Step) -> fmt::Result {
    for Decision { about, text } in &step.decisions {
        writeln!(out, "  {about:<12}{text}")?;
        if *about == BACKENDS {
            candidates(out, &step.backends)?;
        }
    }
    Ok(())
}

/// The subject of the decision below which the backends are listed.
pub(super) const BACKENDS: &str = "backends";

fn candidates(out: &mut fmt::Formatter<'_>, all: &[Candidate]) -> fmt::Result {
    for candidate in all.iter().take(SHOWN) {
        let mut line = format!("{} ({})", candidate.address, place_text(candidate.place));
        if let Some(why_not) = &candidate.why_not {
            write!(line, " not eligible: {why_not}")?;
        }
        if let Some(address) = &candidate.client_address {
            write!(line, ", sees {address}")?;
        }
        if let Some(next_hop) = &candidate.next_hop {
            write!(line, ", {next_hop}")?;
        }
        writeln!(out, "  {:<12}{line}", "")?;
    }
    match all.len().checked_sub(SHOWN) {
        Some(more @ 1..) => writeln!(out, "  {:<12}and {more} more", ""),
        _ => Ok(()),
    }
}

fn place_text(place: &str) -> &'static str {
    match place {
        "this_host" => "a process of this node",
        "this_node" => "on this node",
        _ => "on another node",
    }
}
