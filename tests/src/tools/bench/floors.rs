//! The cost of single steps on this machine: the floors that limits depend on, for each family,
//! and steps that explain a figure.

use anyhow::Result;
use lb_common::{
    abi::{address::Ipv4, flow::Tuple, frontend::TCP},
    packet::ACK,
};

use super::{
    flows::{FlowKind, Flows},
    frames,
    harness::{EMPTY, Harness, Layer, Pace, Shot},
    lanes::{End, FloorLane, Lane, Verdict},
    tables::Side,
};

/// What a look-up costs on the reference machine of docs/performance.md, ns.
pub const HIT: f64 = 25.0;
/// The same among 64k flows.
pub const HIT_64K: f64 = 44.0;
/// The same among a million.
pub const HIT_1M: f64 = 205.0;
/// An insertion: 200 to 250 ns on the reference machine. The larger value raises limits least.
pub const INSERTION: f64 = 250.0;

/// The name of the steps' LRU of flows.
pub fn lru<F: Side>() -> String {
    program::<F>("LRU")
}

/// Puts the flows with these numbers into that map, and has the wrappers go through them.
///
/// # Errors
/// The kernel refuses an entry.
pub fn fill<F: Side>(harness: &Harness, numbers: &[u32]) -> Result<()> {
    harness.set_numbers(numbers)?;
    Flows::<F>::known(FlowKind::Pod, TCP).add(harness.object(), &lru::<F>(), numbers)
}

/// The floor lane of a step of a family, and its cost on the reference machine.
pub fn floor_lane<F: Side>(step: &str, anchor: f64) -> FloorLane {
    FloorLane { step: name::<F>(step), anchor }
}

/// The name of a step of a family.
fn name<F: Side>(step: &str) -> String {
    format!("{step}, {}", F::NAME)
}

fn program<F: Side>(step: &str) -> String {
    format!("{step}{}", F::NAME.trim_start_matches("IPv"))
}

/// A look-up in an LRU that finds one of `flows`. Reading the flow from the packet is
/// subtracted.
///
/// # Errors
/// No room.
pub fn hit<F: Side>(harness: &mut Harness, step: &str, flows: u32) -> Result<Lane> {
    Ok(Lane { is_control: true, ..lane::<F>(harness, step, "hit", flows)? })
}

/// The floor of a new flow: a look-up that finds nothing and the insertion of one direction or
/// both, by `program`.
///
/// # Errors
/// No room.
pub fn open<F: Side>(harness: &mut Harness, step: &str, program: &str) -> Result<Lane> {
    Ok(Lane { is_control: true, ..lane::<F>(harness, step, program, 0)? })
}

/// An insertion. No limit depends on it.
///
/// # Errors
/// No room.
pub fn insert<F: Side>(harness: &mut Harness, step: &str, program: &str) -> Result<Lane> {
    lane::<F>(harness, step, program, 0)
}

/// Look-ups in lb's own table that find one of `flows`, or nothing. No limit depends on them.
///
/// # Errors
/// No room.
pub fn table<F: Side>(harness: &mut Harness, among: &str, flows: u32) -> Result<[Lane; 2]> {
    let hit = lane::<F>(harness, &format!("table hit{among}"), "table_hit", flows)?;
    let miss = lane::<F>(harness, &format!("table miss{among}"), "table_miss", 0)?;
    Ok([hit, miss])
}

/// What a new flow takes in lb's own table: the insertion, and a miss and the insertion.
///
/// # Errors
/// No room.
pub fn table_open<F: Side>(harness: &mut Harness, among: &str) -> Result<[Lane; 2]> {
    let insert = lane::<F>(harness, &format!("table insertion{among}"), "table_insert", 0)?;
    let open = lane::<F>(harness, &format!("table miss and insertion{among}"), "table_open", 0)?;
    Ok([insert, open])
}

/// Steps that no limit depends on.
///
/// # Errors
/// No room, or the kernel refuses an entry.
pub fn others(harness: &mut Harness, lanes: &mut Vec<Lane>) -> Result<()> {
    Flows::<Ipv4>::known(FlowKind::Pod, TCP).add(harness.object(), "HASH4", &[0])?;
    lanes.push(lane::<Ipv4>(harness, "hash hit", "hash", 1)?);
    for (name, program) in [
        ("flow read from the packet", "key4"),
        ("array look-up", "array"),
        ("ktime", "ktime"),
        ("jiffies", "jiffies"),
        ("random", "random"),
        ("checksum", "checksum"),
    ] {
        let shot = Shot { target: harness.step(Layer::Tc, program)?, ..shot::<Ipv4>(1) };
        lanes.push(Lane { name: name.to_owned(), shot, ..lane::<Ipv4>(harness, "", "key", 1)? });
    }
    Ok(())
}

/// Look-ups among 64k flows that no limit depends on.
///
/// # Errors
/// No room.
pub fn others_of_many<F: Side>(harness: &mut Harness, lanes: &mut Vec<Lane>) -> Result<()> {
    lanes.push(lane::<F>(harness, "LRU hit and load, 64k", "read", 1 << 16)?);
    lanes.push(lane::<F>(harness, "LRU miss, 64k", "miss", 0)?);
    Ok(())
}

/// Room for the outer header: at tc, and at XDP, where the wrapper takes it back.
///
/// # Errors
/// No room.
pub fn rooms<F: Side>(harness: &mut Harness) -> Result<[Lane; 2]> {
    let tc = lane::<F>(harness, "room for the outer header, tc", "room", 1)?;
    let xdp = lane::<F>(harness, "room for the outer header and back, XDP", "key", 1)?;
    let target = harness.step(Layer::Xdp, &program::<F>("xdp_room"))?;
    let shot = Shot { wrapper: F::XDP_WRAPPERS[0], target, base: EMPTY, ..xdp.shot };
    let end = End::Step(Verdict::XDP_PASS);
    let tc = Lane { shot: Shot { base: EMPTY, ..tc.shot }, ..tc };
    Ok([tc.at(Pace::Single), Lane { shot, end, ..xdp }])
}

/// A look-up of the route to the backend, for a packet that came in by `ifindex`.
///
/// # Errors
/// No room.
pub fn route<F: Side>(harness: &mut Harness, ifindex: u32) -> Result<Lane> {
    let lane = lane::<F>(harness, "route look-up", "fib", 1)?;
    let rewritten = Flows::<F>::known(FlowKind::Snat, TCP).tuples(0)[0].1;
    let Shot { target, base, .. } = lane.shot;
    Ok(Lane { shot: Shot { target, base, ifindex, ..step_shot::<F>(&rewritten, 1) }, ..lane })
}

/// A step; reading the flow from the packet is subtracted.
fn lane<F: Side>(harness: &mut Harness, step: &str, program: &str, flows: u32) -> Result<Lane> {
    let target = harness.step(Layer::Tc, &self::program::<F>(program))?;
    let base = harness.step(Layer::Tc, &self::program::<F>("key"))?;
    Ok(Lane {
        row: 0,
        name: name::<F>(step),
        limits: None,
        floor: None,
        shot: Shot { target, base, ..shot::<F>(flows) },
        end: End::Step(Verdict::NEXT),
        onward: None,
        then: None,
        pace: None,
        is_control: false,
    })
}

/// A packet of one of `flows`, or always of a new one.
fn shot<F: Side>(flows: u32) -> Shot {
    let known = if flows == 0 { Flows::<F>::fresh } else { Flows::<F>::known };
    step_shot::<F>(&known(FlowKind::Pod, TCP).tuples(0)[0].0, flows)
}

fn step_shot<F: Side>(tuple: &Tuple<F::Address>, flows: u32) -> Shot {
    let frame = frames::frame::<F>(tuple, TCP, ACK, 14 + F::IP_HEADER + 32, 32);
    Shot {
        wrapper: F::WRAPPERS[0],
        frame,
        flows,
        target: EMPTY,
        base: EMPTY,
        ifindex: 0,
        pace: Pace::Running,
    }
}
