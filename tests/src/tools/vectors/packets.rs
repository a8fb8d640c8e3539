//! First packets of pods and of clients outside: frames that are run through the attached
//! programs in the kernel's order.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, bail, ensure};
use lb_common::abi::address::{Be16, Ipv4, Ipv6};
use lb_common::balance::Endpoint;
use lb_common::packet::{Packet, PacketKind, RST, SYN};
use lb_testing::family::TestFamily;
use lb_testing::frame::{Body, Frame, MACS};

use super::format::{Flow, Protocol};
use super::outcome::{Outcome, Refusal, Source};
use super::view::{Client, View};
use super::world::Hooks;
use crate::harness::programs::{Ran, run_classifier, run_xdp};

const TCP: u8 = 6;
const UDP: u8 = 17;
const SCTP: u8 = 132;

/// Sends the first packet of a flow from a port and returns its outcome.
///
/// # Errors
/// A program returned a verdict or a frame that has no explanation.
pub(super) fn send(view: View<'_>, hooks: &Hooks, flow: &Flow, port: u16) -> Result<Outcome> {
    let route = Route { view, hooks };
    match (flow.source_ip, flow.dest_ip) {
        (IpAddr::V4(_), IpAddr::V4(_)) => route.send::<Ipv4>(flow, port),
        (IpAddr::V6(_), IpAddr::V6(_)) => route.send::<Ipv6>(flow, port),
        _ => bail!("source and destination are of different families"),
    }
}

/// The path of a frame through the node.
struct Route<'a> {
    view: View<'a>,
    hooks: &'a Hooks,
}

/// What a program did with a frame.
enum Step {
    /// It passed the frame to the stack.
    Stack(Vec<u8>),
    /// It redirected the frame.
    Sent(Vec<u8>),
    Dropped,
}

impl Route<'_> {
    fn send<F: TestFamily>(&self, flow: &Flow, port: u16) -> Result<Outcome> {
        let ends = [(flow.source_ip, port), (flow.dest_ip, flow.dest_port)]
            .map(|(ip, port)| Endpoint { address: F::address(&octets(ip)), port: Be16::new(port) });
        let before = match flow.protocol {
            Protocol::Tcp => Frame::<F>::of(TCP, ends[0], ends[1], SYN),
            Protocol::Udp => Frame::of(UDP, ends[0], ends[1], 0),
            Protocol::Sctp => {
                let ports = [port, flow.dest_port].map(u16::to_be_bytes).concat();
                Frame::new(ends[0], ends[1], Body::Other(SCTP))
                    .payload(&[&ports[..], &[0; 12]].concat())
            }
        }
        .bytes();
        let client = self.view.client(flow.source_ip);
        let after = match self.receive(client, &before)? {
            Step::Stack(frame) => self.forward::<F>(client, frame)?,
            step => step,
        };
        match after {
            Step::Dropped => Ok(Outcome::Dropped),
            Step::Stack(frame) | Step::Sent(frame) => self.judge::<F>(&before, &frame),
        }
    }

    /// The device that receives the packets of a client.
    fn origin(&self, client: Client) -> u32 {
        if client == Client::Pod { self.hooks.pods } else { self.hooks.external }
    }

    /// Runs the programs of the device that receives the packet.
    fn receive(&self, client: Client, frame: &[u8]) -> Result<Step> {
        let hooks = self.hooks;
        if client == Client::Pod {
            return step(run_classifier(&hooks.from_pod, frame, hooks.pods, hooks.pods)?);
        }
        let frame = match by_xdp(run_xdp(&hooks.xdp, frame, hooks.external)?)? {
            Step::Stack(frame) => frame,
            step => return Ok(step),
        };
        let ran = run_classifier(&hooks.from_device, &frame, hooks.external, hooks.external)?;
        step(ran)
    }

    /// Runs the program of the device to which the node's routes lead.
    fn forward<F: TestFamily>(&self, client: Client, frame: Vec<u8>) -> Result<Step> {
        let hooks = self.hooks;
        let Some([_, to]) = ends::<F>(&frame) else { return Ok(Step::Stack(frame)) };
        let to = to.ip();
        if self.view.is_of_node(to) {
            return Ok(Step::Stack(frame));
        }
        let (program, device) = match self.view.is_here(to) {
            true => (&hooks.to_pod, hooks.pods),
            false => (&hooks.to_device, hooks.external),
        };
        step(run_classifier(program, &frame, device, self.origin(client))?)
    }

    /// The outcome, judged by the bytes of the frame before and after.
    fn judge<F: TestFamily>(&self, before: &[u8], after: &[u8]) -> Result<Outcome> {
        if before[MACS.len()..] == after[MACS.len()..] {
            return Ok(Outcome::Untouched);
        }
        let [client, frontend] =
            ends::<F>(before).context("the frame that was sent is too short")?;
        let [source, to] = ends::<F>(after).context("the resulting frame is too short")?;
        if to.ip() == client.ip() && source.ip() == frontend.ip() {
            return refusal::<F>(after).map(Outcome::Refused);
        }
        ensure!(to != frontend, "the destination stayed, but {client} became {source}");
        let seen = if source == client {
            Source::Kept
        } else if self.view.node().local_ips.contains(&source.ip()) {
            Source::Node
        } else {
            bail!("{to} sees {source}, which is neither {client} nor the node");
        };
        Ok(Outcome::To(to, seen))
    }
}

/// Which rejection a frame is.
fn refusal<F: TestFamily>(frame: &[u8]) -> Result<Refusal> {
    let mut packet = Packet::<F>::default();
    F::parse(frame, &mut packet).context("the answer is too short")?;
    let at = usize::from(packet.transport);
    let kind = frame.get(at..at + 2).map(|bytes| (bytes[0], bytes[1]));
    match packet.kind {
        PacketKind::Tcp if packet.detail & RST != 0 => Ok(Refusal::Reset),
        PacketKind::Icmp
            if is_about::<F>(frame, at, SCTP) && kind == Some(F::PROTOCOL_UNREACHABLE) =>
        {
            Ok(Refusal::ProtocolUnreachable)
        }
        PacketKind::Icmp if kind == Some(F::PORT_UNREACHABLE) => Ok(Refusal::PortUnreachable),
        kind => bail!("the answer is not a rejection: {kind:?} {frame:02x?}"),
    }
}

/// Whether the ICMP error at `at` quotes a packet of this protocol: ICMPv6 has one error for
/// ports and protocols.
fn is_about<F: TestFamily>(frame: &[u8], at: usize, protocol: u8) -> bool {
    const ETHERNET: usize = 14;
    const HEADER: usize = 8;
    let field = if F::NUMBER == 4 { 9 } else { 6 };
    frame.get(at + HEADER + field).is_some_and(|byte| *byte == protocol) && at > ETHERNET
}

/// What a classifier did.
fn step(ran: Ran) -> Result<Step> {
    const NEXT: i32 = -1;
    const OK: i32 = 0;
    const SHOT: i32 = 2;
    const REDIRECT: i32 = 7;
    match ran.returned {
        NEXT | OK => Ok(Step::Stack(ran.frame)),
        SHOT => Ok(Step::Dropped),
        REDIRECT => Ok(Step::Sent(ran.frame)),
        other => bail!("unknown tc verdict {other}"),
    }
}

/// What XDP did.
fn by_xdp(ran: Ran) -> Result<Step> {
    const DROP: i32 = 1;
    const PASS: i32 = 2;
    const TX: i32 = 3;
    const REDIRECT: i32 = 4;
    match ran.returned {
        PASS => Ok(Step::Stack(ran.frame)),
        DROP => Ok(Step::Dropped),
        TX | REDIRECT => Ok(Step::Sent(ran.frame)),
        other => bail!("unknown XDP verdict {other}"),
    }
}

/// Source and destination of a frame, with their ports where it has any.
fn ends<F: TestFamily>(frame: &[u8]) -> Option<[SocketAddr; 2]> {
    let mut packet = Packet::<F>::default();
    F::parse(frame, &mut packet)?;
    let tuple = packet.tuple();
    let end = |address, port: Be16| Some(SocketAddr::new(ip(&F::bytes(address))?, port.get()));
    let source = end(tuple.source, tuple.source_port)?;
    Some([source, end(tuple.destination, tuple.destination_port)?])
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// An address from its bytes in a packet.
fn ip(octets: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(octets).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(octets).map(IpAddr::from)).ok()
}
