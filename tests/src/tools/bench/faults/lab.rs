//! A cluster with one proxy, in which pods of node 1 hold connections, open new ones and mean harm. The
//! backends are on node 2.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lb_agent::maps::flow_table::{FlowTable, Flows, LiveFlow};
use lb_agent::maps::pins::Pins;
use lb_common::abi::address::Address4;
use lb_common::abi::frontend::{TCP, UDP};
use lb_common::balance::Endpoint;
use lb_common::packet::RST;

use super::counts::Counts;
use super::full;
use super::harm::{Harm, endpoint};
use super::{Fault, Promise};
use crate::harness::controlplane::live::plain_service;
use crate::harness::echo::{Probe, crowd, load};
use crate::harness::netns::actors::client::Crowd;
use crate::harness::netns::actors::host::Serve;
use crate::harness::netns::actors::process::Process;
use crate::harness::netns::topology::plan::cluster_ip;
use crate::harness::netns::words::scenario::{PORT, TARGET};
use crate::harness::wait::{PATIENCE, eventually};
use crate::tools::bench::traffic::case::Proxy;
use crate::tools::bench::traffic::lane::{Lane, Settings};
use crate::tools::bench::traffic::shared::Shared;

/// Connections that must not notice anything.
pub(super) const HELD: usize = 10_000;
/// The source port of the first of them.
const FIRST: u16 = 20_000;
/// New connections a second.
const RATE: u64 = 1_000;
/// New connections a second while there is no room, and how long one of them tries.
const SLOW: (u64, Duration) = (100, Duration::from_millis(500));
/// How long no room is, at most.
const NO_ROOM: Duration = Duration::from_secs(10);
/// How long established connections must be idle before one makes room, and a bit.
const IDLE: u32 = lb_common::flow_table::PROTECTED + 5;
/// Names and numbers of the Services: one that is used, and one that is flooded.
const USED: (&str, u8) = ("used", 50);
const FLOODED: (&str, u8) = ("flooded", 51);

/// A lane of the benchmark of traffic, with pods of its own.
pub(super) struct Lab {
    /// The places of its table.
    places: u32,
    time: Duration,
    held: Crowd,
    // Before the cluster that it runs in.
    _server: Process,
    lane: Lane,
}

/// The lanes, whose clusters have the same pods and addresses, with their proxies.
///
/// # Errors
/// What cannot be made or started.
pub(super) fn lanes(
    shared: &mut Shared,
    proxies: &[Proxy],
    settings: &Settings,
) -> Result<Vec<Lane>> {
    let mut lanes = Vec::new();
    for proxy in proxies {
        let lane = Lane::new(*proxy, settings)?;
        let pods = [(1, "held"), (1, "new"), (1, "harm"), (2, USED.0), (2, FLOODED.0)];
        for (node, name) in pods {
            lane.cluster.add_pod(node, name)?;
        }
        lanes.push(lane);
    }
    let first = lanes.first().context("no proxy is chosen")?;
    shared.fill(&first.cluster, 0)?;
    for service in [USED, FLOODED] {
        shared.add_backend(&first.cluster.pod(service.0), &plain_service(service.0, service.1))?;
    }
    lanes.iter_mut().try_for_each(|lane| lane.start_proxy(shared))?;
    Ok(lanes)
}

fn frontend((_, number): (&str, u8)) -> Endpoint<Address4> {
    endpoint(cluster_ip(number).v4, PORT)
}

fn used() -> Probe {
    Probe::tcp((cluster_ip(USED.1).v4, PORT).into())
}

impl Lab {
    /// Opens the connections that are held; a flood is to take `time`.
    ///
    /// # Errors
    /// The lane does not serve.
    pub(super) fn new(lane: Lane, places: u32, time: Duration) -> Result<Self> {
        let server = lane.cluster.pod(USED.0).serve(&Serve::default().crowd(TARGET).udp(TARGET))?;
        let (client, new) = (lane.cluster.pod("held"), lane.cluster.pod("new"));
        eventually(|| {
            let answer = new.ask(used())?;
            ensure!(answer.name() == Some(USED.0), "{answer:?}");
            Ok(())
        })?;
        let held = client.crowd(&used().source_port(FIRST).timeout(PATIENCE), HELD)?;
        let opened = held.ask()?;
        ensure!(opened.ok == HELD as u64, "not all connections were opened: {opened:?}");
        Ok(Self { places, time, held, _server: server, lane })
    }

    /// New connections, and the same during a flood of ten times the table.
    pub(super) fn flood(&self, name: &'static str, protocol: u8, flags: u8) -> Result<Fault> {
        let harm = self.harm()?;
        let stop = AtomicBool::new(false);
        let size = (10 * u64::from(self.places), self.time);
        let to = frontend(FLOODED);
        let measure = || load(&self.lane, RATE, Duration::from_secs(3), self.time);
        let (quiet, mut with) = (measure()?.p99_ms, 0.0);
        let fault = self.observe(name, Promise::Unharmed, || {
            thread::scope(|scope| {
                let flood = scope.spawn(|| harm.flood((protocol, flags), to, size, &stop));
                let report = measure();
                stop.store(true, Ordering::Relaxed);
                let sent = flood.join().ok().context("the flood panicked")??;
                let report = report?;
                with = report.p99_ms;
                Ok((sent, Some(report)))
            })
        })?;
        Ok(Fault { p99_ms: Some([quiet, with]), ..fault })
    }

    /// A RST in the name of every client that holds a connection.
    pub(super) fn reset(&self) -> Result<Fault> {
        let harm = self.harm()?;
        let client = self.lane.cluster.pod("held").addresses().v4;
        self.observe("forged RST for every connection", Promise::Unharmed, || {
            for number in 0..HELD as u16 {
                harm.send(TCP, RST, endpoint(client, FIRST + number), frontend(USED))?;
            }
            Ok((HELD as u64, None))
        })
    }

    /// Every other flow of datagrams is removed from lb's table, and all of them are asked again.
    pub(super) fn lose_half(&self) -> Result<Fault> {
        const STREAMS: u16 = 200;
        let pod = self.lane.cluster.pod("new");
        let ask = || -> Result<()> {
            for port in 30_000..30_000 + STREAMS {
                let probe = Probe::udp((cluster_ip(USED.1).v4, PORT).into());
                let answer = pod.ask(probe.source_port(port).connected().timeout(PATIENCE))?;
                ensure!(answer.name() == Some(USED.0), "datagram from port {port}: {answer:?}");
            }
            Ok(())
        };
        // Those of datagrams heal; connections are not asked for more than a RST.
        self.observe("half of the flows of datagrams lost", Promise::Unharmed, || {
            ask()?;
            let table = FlowTable::<Address4>::writable(&self.pins())?;
            let client = pod.addresses().v4.into();
            let is_asked = |flow: &LiveFlow<Address4>| {
                flow.protocol() == UDP && flow.entry.request.source == client
            };
            let datagrams = table.live().filter(is_asked);
            let lost = datagrams.step_by(2).filter(|flow| table.remove_unchanged(flow)).count();
            ensure!(lost > 0, "no flow of datagrams was there");
            ask()?;
            Ok((lost as u64, None))
        })
    }

    /// New connections while the table is full of established ones: of some in use, which must stay, and
    /// then of the same ones, once all but those that are held were idle for so long that lb has them make
    /// room. The kernel's connection tracking knows no such time.
    pub(super) fn full(&self) -> Result<[Fault; 2]> {
        let fill = || {
            if self.is_lb() {
                full::fill_flows(&self.pins())
            } else {
                let node = self.lane.cluster.node(1);
                full::fill_conntrack(&node, frontend(USED), self.places.into())
            }
        };
        self.held.ask()?;
        let in_use = self.observe("table full of connections in use", Promise::Counted, || {
            let filled = fill()?;
            Ok((filled, Some(self.try_new()?)))
        })?;
        if self.is_lb() {
            full::age_flows(&self.pins(), IDLE)?;
        }
        // These are in use again.
        self.held.ask()?;
        let idle = self.observe("table full of idle connections", Promise::Unharmed, || {
            Ok((0, Some(self.try_new()?)))
        })?;
        Ok([in_use, idle])
    }

    fn try_new(&self) -> Result<load::Report> {
        let (rate, timeout) = SLOW;
        load(&self.lane, rate, timeout, self.time.min(NO_ROOM))
    }

    pub(super) fn is_lb(&self) -> bool {
        self.lane.proxy == Proxy::LbTc
    }

    fn pins(&self) -> Pins {
        Pins::new(self.lane.cluster.node(1).bpf_dir())
    }

    fn harm(&self) -> Result<Harm> {
        Harm::of(&self.lane.cluster.pod("harm"), &self.lane.cluster.node(1))
    }

    /// Does harm, which returns how many packets or entries it took and what became of new connections
    /// meanwhile, and sees what became of those that are held.
    fn observe(
        &self,
        name: &'static str,
        promise: Promise,
        harm: impl FnOnce() -> Result<(u64, Option<load::Report>)>,
    ) -> Result<Fault> {
        let before = Counts::read(&self.lane)?;
        let (packets, report) =
            harm().with_context(|| format!("{}: {name}", self.lane.proxy.title()))?;
        let crowd::Report { ok, moved, .. } = self.held.ask()?;
        let counts = Counts::read(&self.lane)?.since(&before);
        let report = report.as_ref();
        Ok(Fault {
            name,
            proxy: self.lane.proxy.title(),
            promise: self.is_lb().then_some(promise),
            packets,
            broken: HELD as u64 - ok + moved,
            new: report.map(|report| [report.failures(), report.sent]),
            p99_ms: None,
            counts,
        })
    }
}

/// New connections, so many a second, each of which tries for `timeout`.
fn load(lane: &Lane, rate: u64, timeout: Duration, time: Duration) -> Result<load::Report> {
    lane.cluster.pod("new").load(&used().timeout(timeout).reset(), rate, time)?.finish()
}
