//! `lb-agent explain`: what would happen to a packet on this node, and why.
//!
//! It runs the same core as the programs over the pinned maps and writes to none of them, so it
//! cannot disagree with them. It adds sentences, the kernel's routes between the programs, and
//! which programs are attached. It must run in the network namespace of the agent.

mod aside;
mod connect;
mod datapath;
mod describe;
mod facts;
mod pinned;
mod report;
mod surroundings;
mod tables;
mod walk;

use std::{
    io,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use lb_common::abi::{
    address::{Be16, Ipv4, Ipv6},
    flow::Tuple,
    frontend::{TCP, UDP},
};

use crate::{
    cli::{ExplainArgs, Output},
    maps::pins::{PinError, Pins},
    options::values::Protocol,
};

use connect::{Socket, connect};
use facts::{Facts, endpoint};
use pinned::{Pinned, PinnedFamily};
use surroundings::{Here, Surroundings};
use tables::Reader;
use walk::Walk;

pub use report::{Candidate, Decision, Explanation, Outcome, Step};

/// The text that `lb-agent explain` prints.
///
/// # Errors
/// [`ExplainError`].
pub fn explain(arguments: &ExplainArgs) -> Result<String, ExplainError> {
    let pins = Pins::new(&arguments.pins.bpf_dir);
    // If nothing is pinned, the error says so; it does not name the first missing map.
    pins.open("SETTINGS")?;
    let around = Here::look(&pins)?;
    let question = Question::new(arguments)?;
    let explanation = if question.from.is_ipv4() {
        explain_pinned::<Ipv4>(&pins, &around, &question)?
    } else {
        explain_pinned::<Ipv6>(&pins, &around, &question)?
    };
    match arguments.output {
        Output::Table => Ok(explanation.to_string()),
        Output::Json => Ok(serde_json::to_string_pretty(&explanation)?),
    }
}

/// The packet in question.
#[derive(Clone, Debug)]
struct Question {
    from: SocketAddr,
    to: SocketAddr,
    protocol: Protocol,
    at: At,
}

/// Where the packet enters the datapath.
#[derive(Clone, Debug)]
enum At {
    /// Sent by a pod of this node.
    Pod,
    /// Sent by a process of this node.
    Node,
    /// Received on this device.
    Device(String),
}

impl Question {
    fn new(arguments: &ExplainArgs) -> Result<Self, ExplainError> {
        // An IPv4-mapped IPv6 address is IPv4, as in connect(2).
        let canonical = |to: SocketAddr| SocketAddr::new(to.ip().to_canonical(), to.port());
        let (from, to) = (canonical(arguments.from), canonical(arguments.to.address));
        if from.is_ipv4() != to.is_ipv4() {
            return Err(ExplainError::Families { from: from.ip(), to: to.ip() });
        }
        let at = match arguments.at.as_str() {
            "pod" => At::Pod,
            "node" => At::Node,
            device => At::Device(device.to_owned()),
        };
        Ok(Self { from, to, protocol: arguments.to.protocol, at })
    }
}

fn explain_pinned<F: PinnedFamily>(
    pins: &Pins,
    around: &Here,
    question: &Question,
) -> Result<Explanation, ExplainError> {
    let reader = Pinned::<F>::open(pins)?;
    let explanation = explanation(&reader, around, question)?;
    reader.checked()?;
    Ok(explanation)
}

/// The explanation, given the tables of the family and the surroundings of the datapath.
fn explanation<F: PinnedFamily, R: Reader<F>, S: Surroundings>(
    reader: &R,
    around: &S,
    question: &Question,
) -> Result<Explanation, ExplainError> {
    let Question { from, to, protocol, .. } = question;
    let families = || ExplainError::Families { from: from.ip(), to: to.ip() };
    let source = F::address(from.ip()).ok_or_else(families)?;
    let destination = F::address(to.ip()).ok_or_else(families)?;
    let [source_port, destination_port] = [from, to].map(|end| Be16::new(end.port()));
    let tuple = Tuple { source, destination, source_port, destination_port };
    let number = match protocol {
        Protocol::Tcp => TCP,
        Protocol::Udp => UDP,
    };
    let mut walk = Walk::new(reader, around, number, &tuple);
    let mut of_packet = match &question.at {
        At::Pod => walk.sent_by_pod(tuple)?,
        At::Node => walk.sent_by_node(tuple)?,
        At::Device(name) => {
            let device = around.device(name);
            let device = device.ok_or_else(|| ExplainError::NoDevice { name: name.clone() })?;
            walk.received(device, tuple)
        }
    };
    let is_forwarded = matches!(of_packet.result, "delivered" | "leaves");
    if is_forwarded && walk.steps.iter().any(|step| step.possible() > 1) {
        of_packet.text = format!("for example {}", of_packet.text);
    }
    let settings = reader.settings();
    let facts = Facts {
        reader,
        settings: &settings,
        source: endpoint::<F>(source, source_port),
        destination: endpoint::<F>(destination, destination_port),
        protocol: number,
    };
    let caller = match question.at {
        At::Pod => Some(Socket { netns: 0, is_node: false }),
        At::Node => Some(Socket { netns: around.netns_cookie(), is_node: true }),
        At::Device(_) => None,
    };
    let called =
        caller.filter(|_| walk.opens()).map(|caller| connect::<F, R, S>(&facts, around, caller));
    let (connect, of_connect) = called.map_or((None, None), |(step, end)| (Some(step), end));
    Ok(Explanation {
        source: from.to_string(),
        destination: to.to_string(),
        protocol: protocol.to_string(),
        connect,
        path: walk.steps,
        outcome: of_connect.unwrap_or(of_packet),
    })
}

/// A packet could not be explained.
#[derive(Debug, thiserror::Error)]
pub enum ExplainError {
    /// A map or program is missing.
    #[error(transparent)]
    Pin(#[from] PinError),
    /// An agent has pinned maps but not programmed them yet.
    #[error(
        "no settings are programmed at {}: the agent has not finished its first sync; try again once \
         it is ready",
        _0.display()
    )]
    NothingProgrammed(PathBuf),
    /// A map could not be read.
    #[error("cannot read map {map}")]
    Read {
        /// The map's name.
        map: &'static str,
        /// The error of the kernel.
        #[source]
        source: io::Error,
    },
    /// Routes, interfaces or links could not be read.
    #[error("cannot read the interfaces of this network namespace or the pinned links")]
    Surroundings {
        /// The error of the kernel.
        #[source]
        source: io::Error,
    },
    /// The client and the destination are of different families.
    #[error(
        "--from {from} and --to {to} are addresses of different families: give two of one family"
    )]
    Families {
        /// The client.
        from: IpAddr,
        /// The destination.
        to: IpAddr,
    },
    /// The device does not exist.
    #[error("--at {name}: no such device on this node; give pod, node or the name of a device")]
    NoDevice {
        /// The name.
        name: String,
    },
    /// The source is not a pod of this node.
    #[error("--from {client} is {why}, not a pod of this node: give --at {at}")]
    NoPod {
        /// The client.
        client: IpAddr,
        /// What the client's address is.
        why: &'static str,
        /// What to give instead.
        at: String,
    },
    /// The source is not this node.
    #[error("--from {client} is not an address of this node, which --at node requires")]
    NoNode {
        /// The client.
        client: IpAddr,
    },
    /// JSON could not be written.
    #[error("cannot write JSON")]
    Json(#[from] serde_json::Error),
}

#[cfg(test)]
mod tests;
