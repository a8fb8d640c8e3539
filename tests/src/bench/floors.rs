//! What single steps cost on this machine, now.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use lb_common::{
    abi::{
        address::{Address4, Ipv4},
        flow::{Action, Flow, FlowKey},
        frontend::TCP,
    },
    packet::ACK,
};

use super::{
    frames,
    harness::{Harness, Shot, Step},
    report::{Figure, Outcome},
    tables::{NEW_PODS, PODS, Side, flow_entries, flow_tuples},
};

/// What the steps cost, ns, on the machine that the limits are from, where that depends on
/// how many others use the caches.
const ANCHORS: [(&str, f64); 6] = [
    ("LRU hit, 64k", 44.0),
    ("LRU hit, 1 M", 205.0),
    ("LRU miss, 64k", 44.0),
    ("LRU miss, 1 M", 205.0),
    ("LRU insert, 16k", 225.0),
    ("LRU insert, 256k", 225.0),
];

/// The cost of each floor, and how to measure it again.
pub struct Floors {
    known: Vec<u8>,
    new: Vec<u8>,
    costs: BTreeMap<&'static str, f64>,
    targets: BTreeMap<&'static str, (u32, u32)>,
}

impl Floors {
    /// What the steps cost together, ns, and their names.
    pub fn sum(&self, steps: &[(&'static str, u32)]) -> Option<(f64, String)> {
        let mut sum = 0.0;
        let mut names = Vec::new();
        for (name, times) in steps {
            sum += self.costs.get(name)? * f64::from(*times);
            names.push(if *times == 1 { (*name).to_owned() } else { format!("{times} {name}") });
        }
        (!names.is_empty()).then(|| (sum, names.join(" + ")))
    }

    /// Those of the steps whose cost depends on others, to be measured again.
    pub fn anchored(&self, steps: &[(&'static str, u32)]) -> Vec<Step<'_>> {
        let step = |(name, times): &(&'static str, u32)| {
            let anchor = ANCHORS.iter().find(|anchor| anchor.0 == *name)?.1;
            let (target, flows) = *self.targets.get(name)?;
            Some(Step { shot: self.shot(target, flows), times: f64::from(*times), anchor })
        };
        steps.iter().filter_map(step).collect()
    }

    fn shot(&self, target: u32, flows: u32) -> Shot<'_> {
        let frame = if flows == 0 { &self.new } else { &self.known };
        Shot { wrapper: Ipv4::WRAPPERS[0], frame, flows, target, ifindex: 0 }
    }
}

/// (name, program, flows; 0 = always a new one)
const STEPS: [(&str, &str, u32); 17] = [
    ("array look-up", "array", 1),
    ("key", "key", 1),
    ("hash hit", "hash", 1),
    ("hash hit, 64k", "hash", HASHED),
    ("LRU hit", "lru_256k", 1),
    ("LRU hit, 64k", "lru_256k", 1 << 16),
    ("LRU hit, 1 M", "lru_1m", MILLION),
    ("LRU miss, 64k", "miss_256k", 0),
    ("LRU miss, 1 M", "miss_1m", 0),
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
    fill(harness)?;
    let [known, new] = [PODS, NEW_PODS].map(|network| {
        let [(request, _), _] = flow_tuples::<Ipv4>(TCP, Ipv4::address(network, 0), 0);
        frames::frame::<Ipv4>(&request, TCP, ACK, 66, 32)
    });
    let mut floors = Floors { known, new, costs: BTreeMap::new(), targets: BTreeMap::new() };
    let mut figures = Vec::new();
    for (name, program, flows) in STEPS {
        let target = harness.floor(program)?;
        let measured = harness.measure(&floors.shot(target, flows), &[], |run| {
            const SHOT: i32 = 2;
            ensure!(run.is_none_or(|run| run.returned != SHOT), "the step failed");
            Ok(())
        });
        floors.targets.insert(name, (target, flows));
        let outcome = match measured {
            Ok(measurement) => {
                floors.costs.insert(name, measurement.cost.median);
                Outcome::Measured(measurement.cost)
            }
            Err(error) => Outcome::Invalid(format!("{error:#}")),
        };
        figures.push(judged(name, outcome));
    }
    let bare = Shot { wrapper: "bare", ..floors.shot(0, 1) };
    let restored = harness.compare(&floors.shot(0, 1), &bare)?;
    figures.push(Figure::told("packet restored", Outcome::Measured(restored)));
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

/// The tables of flows hold both directions of each, as those of the programs do.
fn fill(harness: &Harness) -> Result<()> {
    let client = Ipv4::address(PODS, 0);
    let actions = [Action::REQUEST, Action::REPLY];
    for (name, count) in [("HASH", HASHED), ("LRU_256K", 1 << 16), ("LRU_1M", MILLION)] {
        let map = harness.map::<FlowKey<Address4>, Flow<Address4>>(name)?;
        let (keys, flows): (Vec<_>, Vec<_>) = (0..count)
            .flat_map(|number| flow_entries::<Ipv4>(TCP, client, actions, number, 0))
            .unzip();
        map.set_batch(&keys, &flows).1.with_context(|| format!("cannot fill {name}"))?;
    }
    Ok(())
}
