//! What single steps cost on this machine, now.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use lb_common::abi::{
    address::{Address4, Ipv4},
    flow::{Flow, FlowKey},
    frontend::TCP,
};

use super::{
    frames,
    harness::{Harness, Shot},
    report::{Figure, Outcome},
    stats::Estimate,
    tables::{PODS, Side, flow_tuples},
};

/// The cost of each floor by name, ns.
pub type Floors = BTreeMap<&'static str, f64>;

/// (name, program, flows; 0 = always a new one)
const STEPS: [(&str, &str, u32); 15] = [
    ("array look-up", "array", 1),
    ("key", "key", 1),
    ("hash hit", "hash", 1),
    ("hash hit, 64k", "hash", HASHED),
    ("LRU hit", "lru_256k", 1),
    ("LRU hit, 64k", "lru_256k", 1 << 16),
    ("LRU hit, 1 M", "lru_1m", MILLION),
    ("ktime", "ktime", 1),
    ("jiffies", "jiffies", 1),
    ("random", "random", 1),
    ("checksum", "checksum", 1),
    ("LRU insert, 16k", "insert_16k", 0),
    ("LRU insert, 256k", "insert_256k", 0),
    ("LRU insert, 1 M", "insert_1m", 0),
    // Last, and nothing but what is left of two runs of the same program: how far all
    // other figures can be trusted.
    (CONTROL, "empty", 1),
];

/// How far the control may be from zero, ns, before the whole run is void.
const CONTROL_MUST: f64 = 2.0;
const CONTROL: &str = "control: empty against empty";
const HASHED: u32 = 1 << 15;
const MILLION: u32 = 1 << 20;

/// Measures every floor.
///
/// # Errors
/// The kernel refuses something.
pub fn measure(harness: &mut Harness) -> Result<(Floors, Vec<Figure>)> {
    let mut floors = Floors::new();
    let mut figures = Vec::new();
    fill(harness)?;
    let targets = harness.targets();
    let [(request, _), _] = flow_tuples::<Ipv4>(TCP, Ipv4::address(PODS, 0), 0);
    let frame = frames::frame::<Ipv4>(&request, TCP, lb_common::packet::ACK, 66, 32);
    for (name, program, flows) in STEPS {
        harness.truncate(targets);
        let target = harness.floor(program)?;
        let shot = Shot { wrapper: Ipv4::WRAPPERS[0], frame: &frame, flows, target, ifindex: 0 };
        let outcome = match harness.measure(&shot, |run| {
            const SHOT: i32 = 2;
            ensure!(run.is_none_or(|run| run.returned != SHOT), "the step failed");
            Ok(())
        }) {
            Ok(estimate) => Outcome::Measured(estimate),
            Err(error) => Outcome::Invalid(format!("{error:#}")),
        };
        if let Outcome::Measured(Estimate { median, .. }) = outcome {
            floors.insert(name, median);
        }
        figures.push(judged(name, outcome));
    }
    harness.truncate(targets);
    figures.push(Figure::told("packet restored", Outcome::Measured(restore(harness, &frame)?)));
    Ok((floors, figures))
}

fn judged(name: &'static str, outcome: Outcome) -> Figure {
    if name != CONTROL {
        return Figure::told(&format!("floor: {name}"), outcome);
    }
    let outcome = match outcome {
        Outcome::Measured(it) if it.median.abs() > CONTROL_MUST => {
            Outcome::Invalid(format!("off by {:.1} ns: something else runs here", it.median))
        }
        other => other,
    };
    Figure::told(name, outcome)
}

fn fill(harness: &Harness) -> Result<()> {
    let client = Ipv4::address(PODS, 0);
    for (name, count) in [("HASH", HASHED), ("LRU_256K", 1 << 16), ("LRU_1M", MILLION)] {
        let map = harness.map::<FlowKey<Address4>, Flow<Address4>>(name)?;
        let keys: Vec<_> = (0..count)
            .map(|number| {
                let tuple = flow_tuples::<Ipv4>(TCP, client, number)[0].0;
                FlowKey { tuple, protocol: TCP.into() }
            })
            .collect();
        map.set_batch(&keys, &vec![Flow::default(); keys.len()]).1?;
    }
    Ok(())
}

/// What the wrapper itself does beyond a tail call.
fn restore(harness: &mut Harness, frame: &[u8]) -> Result<Estimate> {
    let bare = Shot { wrapper: "bare", frame, flows: 1, target: 0, ifindex: 0 };
    harness.compare(&Shot { wrapper: Ipv4::WRAPPERS[0], ..bare.clone() }, &bare)
}
