//! Rows 7 and 8 of docs/performance.md for clients outside the cluster: a node port whose
//! backend runs on another node, at tc and at XDP.
//!
//! Known flows remember where their packets go, as the limits have it. New ones ask the kernel,
//! and so do known ones once a second, which is left out here: the look-up alone is among the
//! floors.

use anyhow::Result;
use lb_common::{
    abi::{
        address::Be16,
        counter::{Hook, Reason},
        flow::Tuple,
        frontend::{TCP, UDP},
    },
    packet::IP_OFFSET,
};

use super::{
    datapath::{
        HOT, Limits, MANY, Plan, REPLY_NOT_OURS, REQUEST_NOT_OURS, USUAL, data, first,
        protocol_name,
    },
    floors::{self, HIT, HIT_64K, INSERTION, footing},
    flows::{Flows, Way},
    harness::{Pace, Shot, Wrapper},
    lanes::{Footing, Lane, Verdict},
    namespace::{MAC, OTHER_NODE, ROUTER},
    tables::{CLIENTS, ELSEWHERE, NODES, Side, THIS_NODE},
};

/// A way from clients outside to a backend on another node.
struct Outside {
    name: &'static str,
    way: Way,
    /// Packets of known flows.
    known: &'static [Known],
    new: New,
}

/// A direction of a known flow, at a hook.
struct Known {
    hook: Hook,
    reason: Reason,
    verdict: Verdict,
    next_hop: [u8; 6],
    pace: Pace,
}

/// A new flow.
struct New {
    /// Aim and must, ns.
    limits: Limits,
    /// How many entries it takes, and the program that adds as many.
    inserts: (u32, &'static str),
    pace: Pace,
}

impl Known {
    const fn request(hook: Hook, verdict: Verdict) -> Self {
        let reason = Reason::Request;
        Self { hook, reason, verdict, next_hop: OTHER_NODE, pace: Pace::Running }
    }

    const fn reply(hook: Hook, verdict: Verdict) -> Self {
        let reason = Reason::Reply;
        Self { hook, reason, verdict, next_hop: ROUTER, pace: Pace::Running }
    }

    /// 0 for requests, 1 for replies.
    fn direction(&self) -> usize {
        usize::from(self.reason == Reason::Reply)
    }
}

const WAYS: [Outside; 2] = [
    Outside {
        name: "SNAT",
        way: Way::Snat,
        known: &[
            Known::request(Hook::FromDevice, Verdict::REDIRECT),
            Known::reply(Hook::FromDevice, Verdict::REDIRECT),
            Known::request(Hook::Xdp, Verdict::XDP_TX),
            Known::reply(Hook::Xdp, Verdict::XDP_TX),
        ],
        new: New { limits: (900.0, 1_300.0), inserts: (2, "open"), pace: Pace::Running },
    },
    // The kernel does not put a socket buffer into a second tunnel, wherever the first one is.
    Outside {
        name: "DSR",
        way: Way::Dsr,
        known: &[
            Known { pace: Pace::Single, ..Known::request(Hook::FromDevice, Verdict::REDIRECT) },
            Known::request(Hook::Xdp, Verdict::XDP_TX),
        ],
        new: New { limits: (330.0, 450.0), inserts: (1, "enter"), pace: Pace::Single },
    },
];

impl Plan<'_> {
    /// Measures a family. Many flows, and new ones, have their turns by themselves: what one
    /// lane leaves in the caches, another finds there, and the floor is alone with its table.
    ///
    /// # Errors
    /// The kernel refuses an entry, or there is no room.
    pub fn outside<F: Side>(&mut self) -> Result<()> {
        self.hot_outside::<F>()?;
        self.measure();
        floors::fill::<F>(&self.harness, USUAL)?;
        let many = footing::<F>("LRU hit, 64k", HIT_64K);
        for way in &WAYS {
            for hook in [Hook::FromDevice, Hook::Xdp] {
                let hit = floors::hit::<F>(&mut self.harness, "LRU hit, 64k", USUAL)?;
                let is_meant = |known: &Known| known.hook == hook && known.pace == Pace::Running;
                self.known_by::<F>(way, is_meant, (USUAL, "64k flows"), MANY, &many)?;
                if !self.lanes.is_empty() {
                    self.lanes.push(hit);
                    self.measure_long();
                }
            }
        }
        for way in &WAYS {
            self.opened_by::<F>(way, TCP)?;
            self.opened_by::<F>(way, UDP)?;
            self.measure();
        }
        Ok(())
    }

    /// What is not for us, and one flow of each way.
    fn hot_outside<F: Side>(&mut self) -> Result<()> {
        floors::fill::<F>(&self.harness, 1)?;
        for pace in [Pace::Running, Pace::Single] {
            let hit = floors::hit::<F>(&mut self.harness, "LRU hit", 1)?;
            let route = floors::route::<F>(&mut self.harness, self.datapath.device.ifindex)?;
            self.lanes.extend([hit.at(pace), route.at(pace)]);
        }
        self.lanes.extend(floors::rooms::<F>(&mut self.harness)?);
        let hot = footing::<F>("LRU hit", HIT);
        self.not_for_us_outside::<F>(&hot)?;
        WAYS.iter().try_for_each(|way| self.known_by::<F>(way, |_| true, (1, "hot"), HOT, &hot))?;
        let both = self.lanes.iter().find(|lane| lane.name == at_both_paces::<F>()).cloned();
        let single = both.map(|lane| Lane { row: 0, limits: None, footing: None, ..lane });
        self.lanes.extend(single.map(|lane| lane.at(Pace::Single)));
        Ok(())
    }

    /// What every other packet costs once there are node ports.
    fn not_for_us_outside<F: Side>(&mut self, hit: &Footing) -> Result<()> {
        let to_client = Tuple {
            source: F::address(NODES, THIS_NODE),
            destination: F::address(CLIENTS, 9),
            source_port: Be16::new(40_000),
            destination_port: Be16::new(443),
        };
        let to_node = to_client.reversed();
        let past = Tuple { destination: F::address(ELSEWHERE, 9), ..to_node };
        for (side, hook, tuple, reason, verdict) in [
            ("request side", Hook::Xdp, past, Reason::NotService, Verdict::XDP_PASS),
            ("reply side", Hook::Xdp, to_node, Reason::NoFlow, Verdict::XDP_PASS),
            ("reply side", Hook::ToDevice, to_client, Reason::NoFlow, Verdict::NEXT),
        ] {
            let name = format!("not for us, NodePorts, {side}, {}, TCP {}", hook.name(), F::NAME);
            let frame = data::<F>(&tuple, TCP);
            let lane = self.at_device::<F>(name, (hook, reason, verdict), 0, frame)?;
            let (limits, footing) = match reason {
                Reason::NoFlow => (REPLY_NOT_OURS, Some(hit.clone())),
                _ => (REQUEST_NOT_OURS, None),
            };
            self.lanes.push(Lane { row: 7, limits: Some(limits), footing, ..lane });
        }
        Ok(())
    }

    /// Packets of so many known flows, in the directions and at the hooks that are meant.
    fn known_by<F: Side>(
        &mut self,
        Outside { name, way, known, .. }: &Outside,
        is_meant: impl Fn(&Known) -> bool,
        (count, text): (u32, &str),
        limits: Limits,
        footing: &Footing,
    ) -> Result<()> {
        let flows = Flows::<F>::known(*way, TCP);
        self.datapath.add(&flows, count)?;
        for known in known.iter().filter(|known| is_meant(known)) {
            let Known { hook, reason, verdict, next_hop, pace } = *known;
            let direction = known.direction();
            let name = known_name::<F>(name, text, reason.name(), hook.name());
            let (comes, goes) = flows.tuples(0)[direction];
            let frame = data::<F>(&comes, TCP);
            let onward = (count == 1).then(|| head::<F>(*way, next_hop, &goes, &frame));
            let lane = self.at_device::<F>(name, (hook, reason, verdict), direction, frame)?;
            let lane = lane.at(pace);
            self.lanes.push(Lane {
                row: 7,
                limits: Some(limits),
                footing: Some(footing.clone().at(pace)),
                onward,
                shot: Shot { flows: count, ..lane.shot },
                pace: (pace == Pace::Single).then(at_both_paces::<F>),
                ..lane
            });
        }
        Ok(())
    }

    /// New flows at tc, and the same with what XDP spends on them before it leaves them to tc.
    fn opened_by<F: Side>(&mut self, outside: &Outside, protocol: u8) -> Result<()> {
        let Outside { name, way, new, .. } = outside;
        let (size, suffix) = if protocol == TCP { ("16k", "_small") } else { ("256k", "") };
        let (count, program) = new.inserts;
        let plural = if count == 1 { "" } else { "s" };
        let step = format!("LRU miss, 64k, and {count} LRU insert{plural}, {size}");
        let floor = floors::open::<F>(&mut self.harness, &step, &format!("{program}{suffix}"))?;
        self.lanes.push(floor.at(new.pace));
        let footing = footing::<F>(&step, HIT_64K + f64::from(count) * INSERTION).at(new.pace);
        let frame = first::<F>(&Flows::<F>::fresh(*way, protocol).tuples(0)[0].0, protocol);
        let protocol = protocol_name(protocol);
        let name = |at: &str| format!("new flow (NodePort, {name}), {at}, {protocol} {}", F::NAME);
        let tc = (Hook::FromDevice, Reason::FlowCreated, Verdict::REDIRECT);
        let xdp = (Hook::Xdp, Reason::LeftToTc, Verdict::XDP_PASS);
        let (alone, both) = (name("tc"), name("XDP and tc"));
        for (end, name, then, pace) in
            [(tc, alone.clone(), None, new.pace), (xdp, both, Some(alone), Pace::Running)]
        {
            let lane = self.at_device::<F>(name, end, 0, frame.clone())?;
            self.lanes.push(Lane {
                row: 8,
                pace: (new.pace == Pace::Single).then(at_both_paces::<F>),
                limits: Some(new.limits),
                footing: Some(footing.clone()),
                shot: Shot { flows: 0, pace, ..lane.shot },
                then,
                ..lane
            });
        }
        Ok(())
    }

    /// A lane of packets at the external device.
    fn at_device<F: Side>(
        &mut self,
        name: String,
        end: (Hook, Reason, Verdict),
        direction: usize,
        frame: Vec<u8>,
    ) -> Result<Lane> {
        let wrapper = wrapper::<F>(end.0, direction);
        let lane = self.lane(name, end, wrapper, frame)?;
        let shot = Shot { ifindex: self.datapath.device.ifindex, ..lane.shot };
        Ok(Lane { shot, ..lane })
    }
}

fn known_name<F: Side>(way: &str, flows: &str, direction: &str, hook: &str) -> String {
    format!("NodePort ({way}) {flows}, {direction}, {hook}, TCP {}", F::NAME)
}

/// The lane that is measured at both paces: with source NAT a packet needs about as much of
/// the program as with a tunnel, and nothing that happens once only.
fn at_both_paces<F: Side>() -> String {
    known_name::<F>("SNAT", "hot", Reason::Request.name(), Hook::FromDevice.name())
}

fn wrapper<F: Side>(hook: Hook, direction: usize) -> Wrapper {
    match hook {
        Hook::Xdp => F::XDP_WRAPPERS[direction],
        _ => F::WRAPPERS[direction],
    }
}

/// The head, up to its ports, of what `frame` becomes on its way from the device to a next
/// hop, with the addresses and ports of `goes`. In a tunnel `frame` itself stands for the ports.
fn head<F: Side>(way: Way, next_hop: [u8; 6], goes: &Tuple<F::Address>, frame: &[u8]) -> Vec<u8> {
    let mut head = data::<F>(goes, TCP);
    let ports = IP_OFFSET + F::IP_HEADER..IP_OFFSET + F::IP_HEADER + 4;
    head.truncate(ports.end);
    head[..6].copy_from_slice(&next_hop);
    head[6..12].copy_from_slice(&MAC);
    if way == Way::Dsr {
        head[ports].copy_from_slice(&frame[IP_OFFSET..IP_OFFSET + 4]);
    }
    head
}
