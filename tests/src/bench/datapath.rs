//! Rows 7 and 8: what a packet costs in the programs at tc.

use std::{collections::BTreeMap, path::Path};

use anyhow::{Result, ensure};
use lb_common::{
    abi::{
        address::{Be16, Ipv4, Ipv6},
        counter::{Hook, Reason},
        flow::Tuple,
        frontend::{TCP, UDP},
        settings::Device,
    },
    packet::{ACK, SYN},
};

use super::{
    floors::Floors,
    frames,
    harness::{Harness, Measurement, Shot},
    report::{Figure, Outcome},
    tables::{
        Datapath, ELSEWHERE, EMPTY_PORTS, NEW_PODS, NODES, PODS, Side, THIS_NODE, flow_tuples,
    },
};

/// How many flows the table of a usual size holds.
const USUAL: u32 = 1 << 16;
const MILLION: u32 = 1 << 20;
/// Entries of a table that a million flows fill but for a few: what the kernel keeps ready
/// for each processor.
const LARGE_TABLE: u32 = (2 << 20) + (1 << 12);
const USUAL_TABLE: u32 = 1 << 18;
const SMALL_TABLE: u32 = 1 << 12;

/// A figure to measure.
struct Lane {
    row: u8,
    name: String,
    limits: Option<(f64, f64)>,
    hook: Hook,
    reason: Reason,
    wrapper: &'static str,
    frame: Vec<u8>,
    flows: u32,
    ifindex: u32,
    floor: &'static [(&'static str, u32)],
}

/// Measures the figures whose name holds `only`.
///
/// # Errors
/// The kernel refuses the programs or an entry of a map.
pub fn measure(
    harness: &mut Harness,
    object: &Path,
    device: Device,
    floors: &Floors,
    only: &str,
    is_quick: bool,
) -> Result<Vec<Figure>> {
    let mut figures = Vec::new();
    let datapath = Datapath::load(object, [USUAL_TABLE; 2], device)?;
    let mut lanes = Vec::new();
    usual::<Ipv4>(&datapath, device, &mut lanes)?;
    usual::<Ipv6>(&datapath, device, &mut lanes)?;
    opened::<Ipv4>(&mut lanes, 0);
    opened::<Ipv6>(&mut lanes, 0);
    run(harness, &datapath, floors, only, lanes, &mut figures)?;
    drop(datapath);

    let datapath = Datapath::load(object, [LARGE_TABLE, SMALL_TABLE], device)?;
    let mut lanes = Vec::new();
    million::<Ipv4>(&datapath, &mut lanes)?;
    opened::<Ipv4>(&mut lanes, MILLION);
    run(harness, &datapath, floors, only, lanes, &mut figures)?;
    drop(datapath);

    if !is_quick {
        let datapath = Datapath::load(object, [SMALL_TABLE, LARGE_TABLE], device)?;
        let mut lanes = Vec::new();
        million::<Ipv6>(&datapath, &mut lanes)?;
        opened::<Ipv6>(&mut lanes, MILLION);
        run(harness, &datapath, floors, only, lanes, &mut figures)?;
    }
    Ok(figures)
}

fn run(
    harness: &mut Harness,
    datapath: &Datapath,
    floors: &Floors,
    only: &str,
    lanes: Vec<Lane>,
    figures: &mut Vec<Figure>,
) -> Result<()> {
    let before = harness.targets();
    let mut targets = BTreeMap::new();
    for lane in lanes.into_iter().filter(|lane| lane.name.contains(only)) {
        let target = match targets.get(lane.hook.name()) {
            Some(target) => *target,
            None => {
                let target = harness.add(datapath.program(lane.hook)?)?;
                targets.insert(lane.hook.name(), target);
                target
            }
        };
        let (outcome, allowance) = match one(harness, datapath, floors, &lane, target) {
            Ok(measurement) => (Outcome::Measured(measurement.cost), measurement.allowance),
            Err(error) => (Outcome::Invalid(format!("{error:#}")), 0.0),
        };
        figures.push(Figure {
            row: lane.row,
            name: lane.name,
            unit: "ns",
            aim: lane.limits.map(|limits| limits.0),
            must: lane.limits.map(|limits| limits.1),
            outcome,
            allowance,
            floor: floors.sum(lane.floor),
        });
    }
    harness.truncate(before);
    Ok(())
}

fn one(
    harness: &Harness,
    datapath: &Datapath,
    floors: &Floors,
    lane: &Lane,
    target: u32,
) -> Result<Measurement> {
    let shot = Shot {
        wrapper: lane.wrapper,
        frame: &lane.frame,
        flows: lane.flows,
        target,
        ifindex: lane.ifindex,
    };
    let expected = lane.hook.counter(lane.reason) as usize;
    let mut before = Vec::new();
    harness.measure(&shot, &floors.anchored(lane.floor), |run| {
        let now = datapath.counters.sums()?;
        let Some(run) = run else {
            before = now;
            return Ok(());
        };
        let met = now[expected] - before[expected];
        let all = now.iter().sum::<u64>() - before.iter().sum::<u64>();
        let (name, packets) = (lane.reason.name(), u64::from(run.packets));
        ensure!(
            met == packets && all == packets,
            "{met} of {packets} packets ended as {name}, {all} were counted"
        );
        Ok(())
    })
}

const REQUEST_NOT_OURS: (f64, f64) = (10.0, 30.0);
const REPLY_NOT_OURS: (f64, f64) = (40.0, 60.0);
const HOT: (f64, f64) = (45.0, 70.0);
const MANY: (f64, f64) = (70.0, 110.0);
const MOST: (f64, f64) = (230.0, 300.0);
const NEW: (f64, f64) = (620.0, 800.0);

const ONE_HIT: &[(&str, u32)] = &[("LRU hit", 1)];
const HIT_AND_SUMS: &[(&str, u32)] = &[("LRU hit", 1), ("checksum", 2)];
const HIT_64K_AND_SUMS: &[(&str, u32)] = &[("LRU hit, 64k", 1), ("checksum", 2)];
const HIT_1M_AND_SUMS: &[(&str, u32)] = &[("LRU hit, 1 M", 1), ("checksum", 2)];
const OPEN_TCP: &[(&str, u32)] = &[
    ("LRU insert, 16k", 2),
    ("LRU miss, 64k", 2),
    ("LRU hit", 1),
    ("hash hit", 1),
    ("checksum", 2),
];
const OPEN_TCP_LARGE: &[(&str, u32)] = &[
    ("LRU insert, 16k", 2),
    ("LRU miss, 1 M", 2),
    ("LRU hit", 1),
    ("hash hit", 1),
    ("checksum", 2),
];
const OPEN_UDP: &[(&str, u32)] =
    &[("LRU insert, 256k", 2), ("LRU miss, 64k", 1), ("hash hit", 1), ("checksum", 2)];
const OPEN_UDP_LARGE: &[(&str, u32)] =
    &[("LRU insert, 1 M", 2), ("LRU miss, 1 M", 1), ("hash hit", 1), ("checksum", 2)];
const REFUSED: &[(&str, u32)] = &[("LRU hit", 2), ("hash hit", 1)];

/// A frame as a data packet is: TCP with timestamps, UDP with a few bytes.
fn data<F: Side>(tuple: &Tuple<F::Address>, protocol: u8) -> Vec<u8> {
    frames::frame::<F>(tuple, protocol, ACK, 14 + F::IP_HEADER + 32, 32)
}

fn protocol_name(protocol: u8) -> &'static str {
    if protocol == TCP { "TCP" } else { "UDP" }
}

fn usual<F: Side>(datapath: &Datapath, device: Device, lanes: &mut Vec<Lane>) -> Result<()> {
    datapath.pod_flows::<F>(TCP, USUAL)?;
    datapath.pod_flows::<F>(UDP, 1)?;
    datapath.node_flow::<F>(UDP)?;
    not_for_us::<F>(lanes);
    for (flows, text, limits, floor) in
        [(1, "hot", HOT, HIT_AND_SUMS), (USUAL, "64k flows", MANY, HIT_64K_AND_SUMS)]
    {
        established::<F>(TCP, flows, text, limits, floor, lanes);
    }
    established::<F>(UDP, 1, "hot", HOT, HIT_AND_SUMS, lanes);
    node::<F>(device, lanes);
    refused::<F>(lanes);
    Ok(())
}

fn million<F: Side>(datapath: &Datapath, lanes: &mut Vec<Lane>) -> Result<()> {
    datapath.pod_flows::<F>(TCP, MILLION)?;
    established::<F>(TCP, MILLION, "1 M flows", MOST, HIT_1M_AND_SUMS, lanes);
    Ok(())
}

fn not_for_us<F: Side>(lanes: &mut Vec<Lane>) {
    let pod = F::address(PODS, 7);
    let elsewhere = F::address(ELSEWHERE, 9);
    let (pod_port, port) = (Be16::new(40_000), Be16::new(443));
    let out = Tuple {
        source: pod,
        destination: elsewhere,
        source_port: pod_port,
        destination_port: port,
    };
    let to_node = Tuple { destination: F::address(NODES, THIS_NODE), ..out.reversed() };
    for (side, hook, tuple, reason, limits) in [
        ("request side", Hook::FromPod, out, Reason::NotService, REQUEST_NOT_OURS),
        ("request side", Hook::ToDevice, out, Reason::NotService, REQUEST_NOT_OURS),
        ("request side", Hook::FromDevice, out.reversed(), Reason::NotService, REQUEST_NOT_OURS),
        ("reply side", Hook::ToPod, out.reversed(), Reason::NoFlow, REPLY_NOT_OURS),
        ("reply side", Hook::FromDevice, to_node, Reason::NoFlow, REPLY_NOT_OURS),
    ] {
        lanes.push(Lane {
            row: 7,
            name: format!("not for us, {side}, {}, TCP {}", hook.name(), F::NAME),
            limits: Some(limits),
            hook,
            reason,
            wrapper: F::WRAPPERS[0],
            frame: data::<F>(&tuple, TCP),
            flows: 1,
            ifindex: 0,
            floor: if matches!(reason, Reason::NoFlow) { ONE_HIT } else { &[] },
        });
    }
}

fn established<F: Side>(
    protocol: u8,
    flows: u32,
    text: &str,
    limits: (f64, f64),
    floor: &'static [(&'static str, u32)],
    lanes: &mut Vec<Lane>,
) {
    let tuples = flow_tuples::<F>(protocol, F::address(PODS, 0), 0);
    for (direction, hook, reason) in
        [(0, Hook::FromPod, Reason::Request), (1, Hook::ToPod, Reason::Reply)]
    {
        let protocol_name = protocol_name(protocol);
        lanes.push(Lane {
            row: 7,
            name: format!("established {text}, {}, {protocol_name} {}", reason.name(), F::NAME),
            limits: Some(limits),
            hook,
            reason,
            wrapper: F::WRAPPERS[direction],
            frame: data::<F>(&tuples[direction].0, protocol),
            flows,
            ifindex: 0,
            floor,
        });
    }
}

/// A flow of a process of the node: with a route look-up and a redirection, for which there
/// is no target.
fn node<F: Side>(device: Device, lanes: &mut Vec<Lane>) {
    let tuples = flow_tuples::<F>(UDP, F::address(NODES, THIS_NODE), 0);
    for (direction, hook, reason) in
        [(0, Hook::ToDevice, Reason::Request), (1, Hook::FromDevice, Reason::Reply)]
    {
        lanes.push(Lane {
            row: 0,
            name: format!("node process, {}, {}, UDP {}", reason.name(), hook.name(), F::NAME),
            limits: None,
            hook,
            reason,
            wrapper: F::WRAPPERS[direction],
            frame: data::<F>(&tuples[direction].0, UDP),
            flows: 1,
            ifindex: device.ifindex,
            floor: HIT_AND_SUMS,
        });
    }
}

/// The frames are as long as what they become, so that putting them back costs nothing.
fn refused<F: Side>(lanes: &mut Vec<Lane>) {
    let template = flow_tuples::<F>(TCP, F::address(PODS, 0), 0)[0].0;
    let quoted = F::IP_HEADER + 8;
    for (index, protocol, length) in
        [(0, TCP, 14 + F::IP_HEADER + 20), (1, UDP, 14 + F::IP_HEADER + 8 + quoted)]
    {
        let tuple = Tuple { destination_port: Be16::new(EMPTY_PORTS[index]), ..template };
        lanes.push(Lane {
            row: 0,
            name: format!("refused, {} {}", protocol_name(protocol), F::NAME),
            limits: None,
            hook: Hook::FromPod,
            reason: Reason::NoEndpoint,
            wrapper: F::WRAPPERS[0],
            frame: frames::frame::<F>(&tuple, protocol, SYN, length, 20),
            flows: 1,
            ifindex: 0,
            floor: REFUSED,
        });
    }
}

fn opened<F: Side>(lanes: &mut Vec<Lane>, others: u32) {
    for protocol in [TCP, UDP] {
        let tuple = flow_tuples::<F>(protocol, F::address(NEW_PODS, 0), 0)[0].0;
        let among = if others == 0 { "" } else { ", among 1 M" };
        lanes.push(Lane {
            row: 8,
            name: format!("new flow (DNAT){among}, {} {}", protocol_name(protocol), F::NAME),
            // Row 8 is about tables of a usual size; that of handshakes always is.
            limits: (protocol == TCP || others == 0).then_some(NEW),
            hook: Hook::FromPod,
            reason: Reason::FlowCreated,
            wrapper: F::WRAPPERS[0],
            frame: frames::frame::<F>(&tuple, protocol, SYN, 14 + F::IP_HEADER + 40, 40),
            flows: 0,
            ifindex: 0,
            floor: match (protocol, others) {
                (TCP, 0) => OPEN_TCP,
                (TCP, _) => OPEN_TCP_LARGE,
                (_, 0) => OPEN_UDP,
                _ => OPEN_UDP_LARGE,
            },
        });
    }
}
