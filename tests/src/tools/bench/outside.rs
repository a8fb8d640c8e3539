//! Rows 7 and 8 of docs/performance.md for clients outside the cluster: a node port whose
//! backend runs on another node, at tc and at XDP.
//!
//! Known flows remember their next hop, and the limits assume that. New flows look up the route.
//! Known flows do so once a second, which is not measured here; the look-up alone is among the
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
        HOT, Limits, MANY, Plan, REPLY_NOT_SERVICE, REQUEST_NOT_SERVICE, USUAL, data, first,
        protocol_name,
    },
    floors::{self, HIT, HIT_64K, INSERTION, floor_lane},
    flows::{FlowKind, Flows},
    harness::{Pace, Shot, Wrapper},
    lanes::{FloorLane, Lane, Verdict},
    namespace::{MAC, OTHER_NODE, ROUTER},
    tables::{CLIENTS, ELSEWHERE, NODES, Side, THIS_NODE},
};
use crate::harness::flows::clear;

/// How clients outside reach a backend on another node.
struct Outside {
    name: &'static str,
    kind: FlowKind,
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

const KINDS: [Outside; 2] = [
    Outside {
        name: "SNAT",
        kind: FlowKind::Snat,
        known: &[
            Known::request(Hook::FromDevice, Verdict::REDIRECT),
            Known::reply(Hook::FromDevice, Verdict::REDIRECT),
            Known::request(Hook::Xdp, Verdict::XDP_TX),
            Known::reply(Hook::Xdp, Verdict::XDP_TX),
        ],
        new: New { limits: (900.0, 1_300.0), inserts: (2, "open"), pace: Pace::Running },
    },
    // The kernel refuses to encapsulate a socket buffer twice.
    Outside {
        name: "DSR",
        kind: FlowKind::Dsr,
        known: &[
            Known { pace: Pace::Single, ..Known::request(Hook::FromDevice, Verdict::REDIRECT) },
            Known::request(Hook::Xdp, Verdict::XDP_TX),
        ],
        new: New { limits: (330.0, 450.0), inserts: (1, "enter"), pace: Pace::Single },
    },
];

impl Plan<'_> {
    /// Measures a family. Many flows, and new flows, are measured separately, because lanes that
    /// share rounds also share caches, and the floor has its table for itself.
    ///
    /// # Errors
    /// The kernel refuses an entry, or there is no room.
    pub fn outside<F: Side>(&mut self) -> Result<()> {
        self.hot_outside::<F>()?;
        self.measure();
        let many = floor_lane::<F>("LRU hit, 64k", HIT_64K);
        for kind in &KINDS {
            // Flows of one kind alone, as many as in the other rows.
            clear(&self.datapath.flows::<F>()?);
            floors::fill::<F>(&self.harness, &self.establish_outside::<F>(kind.kind, USUAL)?)?;
            for hook in [Hook::FromDevice, Hook::Xdp] {
                let hit = floors::hit::<F>(&mut self.harness, "LRU hit, 64k", USUAL)?;
                let is_meant = |known: &Known| known.hook == hook && known.pace == Pace::Running;
                self.known_by::<F>(kind, is_meant, (USUAL, "64k flows"), MANY, &many)?;
                if !self.lanes.is_empty() {
                    self.lanes.push(hit);
                    self.measure_long();
                }
            }
        }
        for kind in &KINDS {
            let known = Flows::<F>::known(kind.kind, TCP);
            known.crowd(&self.datapath.flows::<F>()?, USUAL, self.datapath.time()?);
            self.opened_by::<F>(kind, TCP)?;
            self.opened_by::<F>(kind, UDP)?;
            self.measure();
        }
        Ok(())
    }

    /// Puts so many flows into the programs' table, and returns their numbers.
    fn establish_outside<F: Side>(&self, kind: FlowKind, count: u32) -> Result<Vec<u32>> {
        let (flows, now) = (self.datapath.flows::<F>()?, self.datapath.time()?);
        Flows::<F>::known(kind, TCP).establish(&[&flows], count, now)
    }

    /// Traffic that is not a Service's, and one flow of each kind.
    fn hot_outside<F: Side>(&mut self) -> Result<()> {
        for kind in &KINDS {
            self.establish_outside::<F>(kind.kind, 1)?;
        }
        floors::fill::<F>(&self.harness, &[0])?;
        for pace in [Pace::Running, Pace::Single] {
            let hit = floors::hit::<F>(&mut self.harness, "LRU hit", 1)?;
            let route = floors::route::<F>(&mut self.harness, self.datapath.device.ifindex)?;
            self.lanes.extend([hit.at(pace), route.at(pace)]);
        }
        self.lanes.extend(floors::rooms::<F>(&mut self.harness)?);
        let hot = floor_lane::<F>("LRU hit", HIT);
        self.not_service_traffic_outside::<F>(&hot)?;
        KINDS
            .iter()
            .try_for_each(|kind| self.known_by::<F>(kind, |_| true, (1, "hot"), HOT, &hot))?;
        let both = self.lanes.iter().find(|lane| lane.name == at_both_paces::<F>()).cloned();
        let single = both.map(|lane| Lane { row: 0, limits: None, floor: None, ..lane });
        self.lanes.extend(single.map(|lane| lane.at(Pace::Single)));
        Ok(())
    }

    /// The cost of every other packet while there are node ports.
    fn not_service_traffic_outside<F: Side>(&mut self, hit: &FloorLane) -> Result<()> {
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
            let name =
                format!("not Service traffic, NodePorts, {side}, {}, TCP {}", hook.name(), F::NAME);
            let frame = data::<F>(&tuple, TCP);
            let lane = self.at_device::<F>(name, (hook, reason, verdict), 0, frame)?;
            let (limits, floor) = match reason {
                Reason::NoFlow => (REPLY_NOT_SERVICE, Some(hit.clone())),
                _ => (REQUEST_NOT_SERVICE, None),
            };
            self.lanes.push(Lane { row: 7, limits: Some(limits), floor, ..lane });
        }
        Ok(())
    }

    /// Packets of so many known flows, in the directions and at the hooks that are meant.
    fn known_by<F: Side>(
        &mut self,
        Outside { name, kind, known, .. }: &Outside,
        is_meant: impl Fn(&Known) -> bool,
        (count, text): (u32, &str),
        limits: Limits,
        floor: &FloorLane,
    ) -> Result<()> {
        let flows = Flows::<F>::known(*kind, TCP);
        for known in known.iter().filter(|known| is_meant(known)) {
            let Known { hook, reason, verdict, next_hop, pace } = *known;
            let direction = known.direction();
            let name = known_name::<F>(name, text, reason.name(), hook.name());
            let (comes, goes) = flows.tuples(0)[direction];
            let frame = data::<F>(&comes, TCP);
            let onward = (count == 1).then(|| head::<F>(*kind, next_hop, &goes, &frame));
            let lane = self.at_device::<F>(name, (hook, reason, verdict), direction, frame)?;
            let lane = lane.at(pace);
            self.lanes.push(Lane {
                row: 7,
                limits: Some(limits),
                floor: Some(floor.clone().at(pace)),
                onward,
                shot: Shot { flows: count, ..lane.shot },
                pace: (pace == Pace::Single).then(at_both_paces::<F>),
                ..lane
            });
        }
        Ok(())
    }

    /// New flows at tc alone, and together with XDP, which leaves them to tc.
    fn opened_by<F: Side>(&mut self, outside: &Outside, protocol: u8) -> Result<()> {
        let Outside { name, kind, new, .. } = outside;
        let (size, suffix) = if protocol == TCP { ("16k", "_small") } else { ("256k", "") };
        let (count, program) = new.inserts;
        let plural = if count == 1 { "" } else { "s" };
        let step = format!("LRU miss, 64k, and {count} LRU insert{plural}, {size}");
        let floor = floors::open::<F>(&mut self.harness, &step, &format!("{program}{suffix}"))?;
        self.lanes.push(floor.at(new.pace));
        let floor = floor_lane::<F>(&step, HIT_64K + f64::from(count) * INSERTION).at(new.pace);
        let frame = first::<F>(&Flows::<F>::fresh(*kind, protocol).tuples(0)[0].0, protocol);
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
                floor: Some(floor.clone()),
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

fn known_name<F: Side>(kind: &str, flows: &str, direction: &str, hook: &str) -> String {
    format!("NodePort ({kind}) {flows}, {direction}, {hook}, TCP {}", F::NAME)
}

/// The lane that is measured at both paces: a packet with source NAT takes about the same path
/// through the program as one that is encapsulated, and can be restored.
fn at_both_paces<F: Side>() -> String {
    known_name::<F>("SNAT", "hot", Reason::Request.name(), Hook::FromDevice.name())
}

fn wrapper<F: Side>(hook: Hook, direction: usize) -> Wrapper {
    match hook {
        Hook::Xdp => F::XDP_WRAPPERS[direction],
        _ => F::WRAPPERS[direction],
    }
}

/// The head, up to its ports, of the frame that goes to the next hop with the addresses and
/// ports of `goes`. With DSR the start of the original packet is in the place of the ports.
fn head<F: Side>(
    kind: FlowKind,
    next_hop: [u8; 6],
    goes: &Tuple<F::Address>,
    frame: &[u8],
) -> Vec<u8> {
    let mut head = data::<F>(goes, TCP);
    let ports = IP_OFFSET + F::IP_HEADER..IP_OFFSET + F::IP_HEADER + 4;
    head.truncate(ports.end);
    head[..6].copy_from_slice(&next_hop);
    head[6..12].copy_from_slice(&MAC);
    if kind == FlowKind::Dsr {
        head[ports].copy_from_slice(&frame[IP_OFFSET..IP_OFFSET + 4]);
    }
    head
}
