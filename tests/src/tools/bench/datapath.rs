//! What a packet costs in the programs at tc: rows 7 and 8 of docs/performance.md.
//!
//! A limit grows with its floor. In row 7 the floor is a look-up that finds one of as many
//! flows, in row 8 a look-up that finds nothing and two insertions. A figure without a floor
//! has a fixed limit. The numbers of these rows are those of docs/performance.md.

use std::path::Path;

use anyhow::Result;
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
    floors::{self, HIT, HIT_1M, HIT_64K, INSERTION, floor_lane},
    flows::{FlowKind, Flows},
    frames,
    harness::{EMPTY, Harness, Pace, Shot, Wrapper},
    lanes::{self, End, FloorLane, Lane, Verdict},
    report::{Figure, Outcome},
    tables::{Datapath, ELSEWHERE, EMPTY_PORTS, Frontends, NODES, PODS, Side, THIS_NODE, settings},
};

/// How many flows the table of a usual size holds.
pub const USUAL: u32 = 1 << 16;
const MILLION: u32 = 1 << 20;
/// Entries of an LRU that both directions of a million flows fill, except for the free entries that
/// the kernel keeps ready for each processor.
const LARGE_LRU: u32 = (2 << 20) + (1 << 12);
/// Places for flows: twice as many as there are, and in a sparse table eight times as many.
const LARGE_TABLE: u32 = 2 * MILLION;
const USUAL_TABLE: u32 = 2 * USUAL;
const SPARSE_TABLE: u32 = 8 * USUAL;
/// Places for a single flow.
pub const SMALL_TABLE: u32 = 1 << 12;

/// What to measure, and with what.
pub struct Bench<'a> {
    /// The programs to measure.
    pub object: &'a Path,
    /// The programs to measure with.
    pub wrappers: &'a Path,
    /// The external device.
    pub device: Device,
    /// How many turns each program has.
    pub rounds: usize,
    /// Measure only figures whose name contains this.
    pub only: &'a str,
}

impl Bench<'_> {
    /// Measures all figures; the large table of IPv6 only if `is_complete`.
    ///
    /// # Errors
    /// The kernel refuses the programs or an entry of a map.
    pub fn measure(&self, is_complete: bool) -> Result<Vec<Figure>> {
        let mut figures = self.usual()?;
        figures.extend(self.sparse()?);
        figures.extend(self.outside()?);
        figures.extend(self.million::<Ipv4>([LARGE_TABLE, SMALL_TABLE])?);
        if is_complete {
            figures.extend(self.million::<Ipv6>([SMALL_TABLE, LARGE_TABLE])?);
        }
        Ok(figures)
    }

    fn usual(&self) -> Result<Vec<Figure>> {
        let mut plan = Plan::new(self, &[], [USUAL_TABLE; 2], Frontends::ClusterIps)?;
        plan.hot::<Ipv4>()?;
        plan.hot::<Ipv6>()?;
        floors::others(&mut plan.harness, &mut plan.lanes)?;
        plan.measure();
        plan.many::<Ipv4>("")?;
        plan.measure_long();
        plan.many::<Ipv6>("")?;
        plan.measure_long();
        // They come last because they evict the flows that other lanes look up.
        plan.opened::<Ipv4>(Table::Full)?;
        plan.measure();
        plan.opened::<Ipv6>(Table::Full)?;
        plan.measure();
        Ok(plan.figures)
    }

    /// As many flows in a table with more places.
    fn sparse(&self) -> Result<Vec<Figure>> {
        let mut plan = Plan::new(self, &[], [SPARSE_TABLE; 2], Frontends::ClusterIps)?;
        plan.many::<Ipv4>(" in 512k places")?;
        plan.measure_long();
        plan.many::<Ipv6>(" in 512k places")?;
        plan.measure_long();
        plan.opened::<Ipv4>(Table::Sparse)?;
        plan.measure();
        plan.opened::<Ipv6>(Table::Sparse)?;
        plan.measure();
        Ok(plan.figures)
    }

    /// Traffic of clients outside.
    fn outside(&self) -> Result<Vec<Figure>> {
        let mut plan = Plan::new(self, &[], [USUAL_TABLE; 2], Frontends::NodePorts)?;
        plan.outside::<Ipv4>()?;
        plan.outside::<Ipv6>()?;
        Ok(plan.figures)
    }

    fn million<F: Side>(&self, places: [u32; 2]) -> Result<Vec<Figure>> {
        let steps = [(&*floors::lru::<F>(), LARGE_LRU)];
        let mut plan = Plan::new(self, &steps, places, Frontends::ClusterIps)?;
        plan.most::<F>()?;
        plan.measure_long();
        plan.opened::<F>(Table::FullOfMillion)?;
        plan.measure();
        Ok(plan.figures)
    }
}

/// Aim and must, ns.
pub type Limits = (f64, f64);

/// Traffic that is not a Service's, on the request side, where nothing is looked up.
pub const REQUEST_NOT_SERVICE: Limits = (10.0, 30.0);
/// Traffic that is not a Service's, on the reply side.
pub const REPLY_NOT_SERVICE: Limits = (40.0, 60.0);
/// A flow that is the only one.
pub const HOT: Limits = (45.0, 70.0);
/// One of 64k flows.
pub const MANY: Limits = (70.0, 110.0);
const MOST: Limits = (230.0, 300.0);
const NEW: Limits = (620.0, 800.0);

/// Where new flows are inserted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Table {
    /// Twice as many places as flows. While it is measured it fills, and each new flow evicts one.
    Full,
    /// Eight times as many places as flows: there is room for new ones.
    Sparse,
    /// As `Full`, with a million flows.
    FullOfMillion,
}

/// The lanes to be measured next, in turn, and the figures of those before.
pub struct Plan<'a> {
    /// The wrappers.
    pub harness: Harness,
    /// The programs to measure.
    pub datapath: Datapath,
    only: &'a str,
    rounds: usize,
    /// The lanes to be measured next.
    pub lanes: Vec<Lane>,
    figures: Vec<Figure>,
}

impl<'a> Plan<'a> {
    /// `steps` are the sizes of the steps' maps, `places` those of the tables of flows.
    fn new(
        bench: &Bench<'a>,
        steps: &[(&str, u32)],
        places: [u32; 2],
        frontends: Frontends,
    ) -> Result<Self> {
        Ok(Self {
            harness: Harness::load(bench.wrappers, steps, places, &settings(frontends))?,
            datapath: Datapath::load(bench.object, places, bench.device, frontends)?,
            only: bench.only,
            rounds: bench.rounds,
            lanes: Vec::new(),
            figures: Vec::new(),
        })
    }

    /// Measures the lanes.
    pub fn measure(&mut self) {
        self.measure_for(self.rounds);
    }

    /// Measures lanes that depend on shared caches, which takes more rounds.
    pub fn measure_long(&mut self) {
        self.measure_for(3 * self.rounds);
    }

    fn measure_for(&mut self, rounds: usize) {
        let mut lanes = std::mem::take(&mut self.lanes);
        lanes.retain(|lane| matches!(lane.end, End::Step(_)) || lane.name.contains(self.only));
        let first = self.figures.len();
        self.figures.extend(lanes::measure(&self.harness, &self.datapath, rounds, &lanes));
        for (index, lane) in lanes.iter().enumerate() {
            let Some(name) = &lane.pace else { continue };
            let cost = lanes::single_cost(&self.figures, name);
            let figure = &mut self.figures[first + index];
            match cost {
                Some(cost) => figure.single = cost,
                None => {
                    let why = format!("{name} was not measured at both paces");
                    figure.outcome = Outcome::Invalid(why);
                }
            }
        }
    }

    /// Puts flows into the tables, of the programs and of the steps: `count` of pods over TCP.
    fn establish<F: Side>(&self, count: u32) -> Result<()> {
        let tables = [&self.datapath.flows::<F>()?, &self.harness.flows::<F>()?];
        let flows = Flows::<F>::known(FlowKind::Pod, TCP);
        let numbers = flows.establish(&tables, count, self.datapath.time()?)?;
        floors::fill::<F>(&self.harness, &numbers)
    }

    fn hot<F: Side>(&mut self) -> Result<()> {
        self.establish::<F>(1)?;
        let (flows, now) = (self.datapath.flows::<F>()?, self.datapath.time()?);
        Flows::<F>::known(FlowKind::Pod, UDP).establish(&[&flows], 1, now)?;
        Flows::<F>::known(FlowKind::NodeProcess, UDP).establish(&[&flows], 1, now)?;
        self.lanes.push(floors::hit::<F>(&mut self.harness, "LRU hit", 1)?);
        self.lanes.extend(floors::table::<F>(&mut self.harness, "", 1)?);
        let hot = floor_lane::<F>("LRU hit", HIT);
        self.not_service_traffic::<F>(&hot)?;
        self.established::<F>(TCP, (1, "hot"), HOT, &hot)?;
        self.established::<F>(UDP, (1, "hot"), HOT, &hot)?;
        self.node::<F>()?;
        self.rejected::<F>()
    }

    /// `places` is in the names of what is measured.
    fn many<F: Side>(&mut self, places: &str) -> Result<()> {
        self.establish::<F>(USUAL)?;
        self.lanes.push(floors::hit::<F>(&mut self.harness, "LRU hit, 64k", USUAL)?);
        let among = format!(", 64k{places}");
        self.lanes.extend(floors::table::<F>(&mut self.harness, &among, USUAL)?);
        floors::others_of_many::<F>(&mut self.harness, &mut self.lanes)?;
        let many = floor_lane::<F>("LRU hit, 64k", HIT_64K);
        self.established::<F>(TCP, (USUAL, &format!("64k flows{places}")), MANY, &many)
    }

    fn most<F: Side>(&mut self) -> Result<()> {
        self.establish::<F>(MILLION)?;
        self.lanes.push(floors::hit::<F>(&mut self.harness, "LRU hit, 1 M", MILLION)?);
        self.lanes.extend(floors::table::<F>(&mut self.harness, ", 1 M", MILLION)?);
        let most = floor_lane::<F>("LRU hit, 1 M", HIT_1M);
        self.established::<F>(TCP, (MILLION, "1 M flows"), MOST, &most)
    }

    /// A lane without a target, of one flow. Its packets are counted at a hook with a reason,
    /// and the program returns a verdict.
    ///
    /// # Errors
    /// No such program, or no room.
    pub fn lane(
        &mut self,
        name: String,
        (hook, reason, verdict): (Hook, Reason, Verdict),
        wrapper: Wrapper,
        frame: Vec<u8>,
    ) -> Result<Lane> {
        let program = self.datapath.program(hook)?;
        let target = self.harness.add(wrapper.layer, hook.name(), program)?;
        // The frame is for this host only on the device with its MAC address.
        let is_received = hook == Hook::FromDevice;
        let ifindex = if is_received { self.datapath.device.ifindex } else { 0 };
        let pace = Pace::Running;
        let shot = Shot { wrapper, frame, flows: 1, target, base: EMPTY, ifindex, pace };
        Ok(Lane {
            row: 0,
            name,
            limits: None,
            floor: None,
            shot,
            end: End::Counted(hook, reason, verdict),
            onward: None,
            then: None,
            pace: None,
            is_control: false,
        })
    }

    fn not_service_traffic<F: Side>(&mut self, hit: &FloorLane) -> Result<()> {
        let (pod, elsewhere) = (F::address(PODS, 7), F::address(ELSEWHERE, 9));
        let out = Tuple {
            source: pod,
            destination: elsewhere,
            source_port: Be16::new(40_000),
            destination_port: Be16::new(443),
        };
        let back = out.reversed();
        let to_node = Tuple { destination: F::address(NODES, THIS_NODE), ..back };
        for (side, hook, tuple, reason) in [
            ("request side", Hook::FromPod, out, Reason::NotService),
            ("request side", Hook::ToDevice, out, Reason::NotService),
            ("request side", Hook::FromDevice, back, Reason::NotService),
            ("reply side", Hook::ToPod, back, Reason::NoFlow),
            ("reply side", Hook::FromDevice, to_node, Reason::NoFlow),
        ] {
            let name = format!("not Service traffic, {side}, {}, TCP {}", hook.name(), F::NAME);
            let frame = data::<F>(&tuple, TCP);
            let lane = self.lane(name, (hook, reason, Verdict::NEXT), F::WRAPPERS[0], frame)?;
            let (limits, floor) = match reason {
                Reason::NoFlow => (REPLY_NOT_SERVICE, Some(hit.clone())),
                _ => (REQUEST_NOT_SERVICE, None),
            };
            self.lanes.push(Lane { row: 7, limits: Some(limits), floor, ..lane });
        }
        Ok(())
    }

    fn established<F: Side>(
        &mut self,
        protocol: u8,
        (flows, text): (u32, &str),
        limits: Limits,
        floor: &FloorLane,
    ) -> Result<()> {
        let tuples = Flows::<F>::known(FlowKind::Pod, protocol).tuples(0);
        for (direction, hook, reason) in
            [(0, Hook::FromPod, Reason::Request), (1, Hook::ToPod, Reason::Reply)]
        {
            let protocol_name = protocol_name(protocol);
            let name =
                format!("established {text}, {}, {protocol_name} {}", reason.name(), F::NAME);
            let frame = data::<F>(&tuples[direction].0, protocol);
            let lane =
                self.lane(name, (hook, reason, Verdict::NEXT), F::WRAPPERS[direction], frame)?;
            self.lanes.push(Lane {
                row: 7,
                limits: Some(limits),
                floor: Some(floor.clone()),
                shot: Shot { flows, ..lane.shot },
                ..lane
            });
        }
        Ok(())
    }

    /// A flow of a node process: with a route look-up and a redirection, which have no target.
    fn node<F: Side>(&mut self) -> Result<()> {
        let tuples = Flows::<F>::known(FlowKind::NodeProcess, UDP).tuples(0);
        for (direction, hook, reason, verdict) in [
            (0, Hook::ToDevice, Reason::Request, Verdict::REDIRECT),
            (1, Hook::FromDevice, Reason::Reply, Verdict::NEXT),
        ] {
            let name = format!("node process, {}, {}, UDP {}", reason.name(), hook.name(), F::NAME);
            let frame = data::<F>(&tuples[direction].0, UDP);
            let lane = self.lane(name, (hook, reason, verdict), F::WRAPPERS[direction], frame)?;
            let shot = Shot { ifindex: self.datapath.device.ifindex, ..lane.shot };
            self.lanes.push(Lane { shot, ..lane });
        }
        Ok(())
    }

    /// The frames are as long as the answers that the program makes of them, so that restoring
    /// them costs nothing.
    fn rejected<F: Side>(&mut self) -> Result<()> {
        let template = Flows::<F>::known(FlowKind::Pod, TCP).tuples(0)[0].0;
        let quoted = F::IP_HEADER + 8;
        for (index, protocol, length) in
            [(0, TCP, 14 + F::IP_HEADER + 20), (1, UDP, 14 + F::IP_HEADER + 8 + quoted)]
        {
            let tuple = Tuple { destination_port: Be16::new(EMPTY_PORTS[index]), ..template };
            let name = format!("rejected, {} {}", protocol_name(protocol), F::NAME);
            let frame = frames::frame::<F>(&tuple, protocol, SYN, length, 20);
            let end = (Hook::FromPod, Reason::NoEndpoint, Verdict::REDIRECT);
            let lane = self.lane(name, end, F::WRAPPERS[0], frame)?;
            self.lanes.push(lane);
        }
        Ok(())
    }

    /// The floor of a TCP flow is a small LRU, that of a UDP flow one as large as the table. Row 8 of
    /// docs/performance.md is about tables of a usual size. In a large one UDP has no limit, because
    /// the insertions into the LRU alone take longer than the row allows.
    fn opened<F: Side>(&mut self, table: Table) -> Result<()> {
        let (among, flows, size, miss, count) = match table {
            Table::Full => ("", "64k", "256k", HIT_64K, USUAL),
            Table::Sparse => (" in 512k places", "64k in 512k places", "256k", HIT_64K, USUAL),
            Table::FullOfMillion => (", among 1 M", "1 M", "2 M", HIT_1M, MILLION),
        };
        let is_large = table == Table::FullOfMillion;
        let (pods, now) = (Flows::<F>::known(FlowKind::Pod, TCP), self.datapath.time()?);
        pods.crowd(&self.datapath.flows::<F>()?, count, now);
        pods.crowd(&self.harness.flows::<F>()?, count, now);
        self.lanes.extend(floors::table_open::<F>(&mut self.harness, &format!(", {flows}"))?);
        for (protocol, size, suffix) in [(TCP, "16k", "_small"), (UDP, size, "")] {
            let insert = (format!("LRU insert, {size}"), format!("insert{suffix}"));
            self.lanes.push(floors::insert::<F>(&mut self.harness, &insert.0, &insert.1)?);
            let step = format!("LRU miss, {flows}, and 2 LRU inserts, {size}");
            self.lanes.push(floors::open::<F>(&mut self.harness, &step, &format!("open{suffix}"))?);
            let tuple = Flows::<F>::fresh(FlowKind::Pod, protocol).tuples(0)[0].0;
            let name = format!("new flow (DNAT){among}, {} {}", protocol_name(protocol), F::NAME);
            let frame = first::<F>(&tuple, protocol);
            let end = (Hook::FromPod, Reason::FlowCreated, Verdict::NEXT);
            let lane = self.lane(name, end, F::WRAPPERS[0], frame)?;
            self.lanes.push(Lane {
                row: 8,
                limits: (protocol == TCP || !is_large).then_some(NEW),
                floor: Some(floor_lane::<F>(&step, miss + 2.0 * INSERTION)),
                shot: Shot { flows: 0, ..lane.shot },
                ..lane
            });
        }
        Ok(())
    }
}

/// A data packet: TCP with timestamps, UDP with a few bytes.
pub fn data<F: Side>(tuple: &Tuple<F::Address>, protocol: u8) -> Vec<u8> {
    frames::frame::<F>(tuple, protocol, ACK, 14 + F::IP_HEADER + 32, 32)
}

/// The first packet of a flow: a SYN with its usual options.
pub fn first<F: Side>(tuple: &Tuple<F::Address>, protocol: u8) -> Vec<u8> {
    frames::frame::<F>(tuple, protocol, SYN, 14 + F::IP_HEADER + 40, 40)
}

/// `TCP` or `UDP`.
pub fn protocol_name(protocol: u8) -> &'static str {
    if protocol == TCP { "TCP" } else { "UDP" }
}
