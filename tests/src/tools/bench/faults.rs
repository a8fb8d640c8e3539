//! `lb-bench faults`: what floods, forged resets and lost entries do to those who use the table of
//! flows. A pod that means harm sends from any address.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use comfy_table::Table;
use comfy_table::presets::NOTHING;
use lb_agent::maps::flow_table::{FlowTable, Flows};
use lb_agent::maps::pins::Pins;
use lb_agent::maps::sweep::flow_events;
use lb_common::abi::address::{Address4, Be16, Ipv4};
use lb_common::abi::frontend::{TCP, UDP};
use lb_common::balance::Endpoint;
use lb_common::flow_table::Class;
use lb_common::packet::{RST, SYN};
use lb_testing::frame::Frame;
use serde::Serialize;

use crate::harness::echo::{Probe, crowd, load};
use crate::harness::netns::actors::client::Crowd;
use crate::harness::netns::actors::host::Serve;
use crate::harness::netns::topology::cluster::Cluster;
use crate::harness::netns::topology::node::Pod;
use crate::harness::netns::topology::plan::cluster_ip;
use crate::harness::netns::traffic::capture::{Sender, link_address};
use crate::harness::netns::words::scenario::{PORT, SMALL_MAPS, Scenario, TARGET};
use crate::harness::wait::PATIENCE;

/// `--max-flows` of the nodes: three times as many as there are connections. Among connections that
/// fill more than half of the places, a new one may find no room, without any flood.
const PLACES: u32 = 32_768;
/// Connections that must not notice anything.
const HELD: usize = 10_000;
/// The source port of the first of them.
const FIRST: u16 = 20_000;
/// New connections a second.
const RATE: u64 = 1_000;
/// The packets of a flood, each of another flow.
const FLOOD: u64 = 10 * PLACES as u64;
/// The Service that is used.
const USED: u8 = 1;
/// The Service that is flooded.
const FLOODED: u8 = 2;
/// How much slower a new connection may be during a flood, as docs/performance.md has it.
const SLOWER: f64 = 1.2;

/// What happened to those who use a Service.
#[derive(Clone, Debug, Serialize)]
pub struct Fault {
    /// What was done.
    pub name: &'static str,
    /// Packets that were sent to do it.
    pub packets: u64,
    /// Established connections that broke.
    pub broken: u64,
    /// New connections that failed, and how many there were.
    pub new: Option<[u64; 2]>,
    /// The 99th percentile of the time that a new connection took, ms: without, and with it.
    pub p99_ms: Option<[f64; 2]>,
    /// Flows that made room for others meanwhile, by class.
    pub evicted: Vec<(&'static str, u64)>,
}

impl Fault {
    /// Whether nobody was harmed. What is slower is reported: it is no fault on a busy machine.
    pub fn is_harmless(&self) -> bool {
        let established = Class::Established.name();
        let is_evicted = |(class, count): &(&str, u64)| *class == established && *count > 0;
        self.broken == 0
            && self.new.is_none_or(|[failed, _]| failed == 0)
            && !self.evicted.iter().any(is_evicted)
    }
}

/// Runs all of them; a flood takes `time`.
///
/// # Errors
/// The nodes cannot be built.
pub fn measure(time: Duration) -> Result<Vec<Fault>> {
    let lab = Lab::new(time)?;
    let quiet = lab.load()?;
    let mut faults = Vec::new();
    for (name, protocol, flags) in [("flood of SYNs", TCP, SYN), ("flood of datagrams", UDP, 0)] {
        faults.push(lab.observe(name, || {
            let (packets, report) = lab.flooded(protocol, flags)?;
            Ok((packets, Some((report, &quiet))))
        })?);
    }
    faults.push(lab.observe("forged RST for every connection", || Ok((lab.reset()?, None)))?);
    faults.push(lab.observe("half of the flows lost", || {
        // Those of datagrams heal; connections are not asked for more than a RST.
        Ok((lab.lose_half()?, None))
    })?);
    Ok(faults)
}

/// The report of all of them, as a table.
pub fn table(faults: &[Fault]) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING);
    table.set_header(["fault", "packets", "broken", "new failed", "p99 ms", "evicted", ""]);
    for fault in faults {
        let of = |[failed, all]: [u64; 2]| format!("{failed} of {all}");
        let times = |[quiet, with]: [f64; 2]| {
            let ratio = with / quiet;
            let mark = if ratio > SLOWER { ", aim missed" } else { "" };
            format!("{quiet:.2} -> {with:.2} (x {ratio:.2}{mark})")
        };
        let evicted = fault.evicted.iter().filter(|(_, count)| *count > 0);
        let evicted: Vec<_> = evicted.map(|(class, count)| format!("{class} {count}")).collect();
        table.add_row([
            fault.name.to_owned(),
            fault.packets.to_string(),
            format!("{} of {HELD}", fault.broken),
            fault.new.map_or_else(String::new, of),
            fault.p99_ms.map_or_else(String::new, times),
            evicted.join(", "),
            if fault.is_harmless() { "ok" } else { "FAILED" }.to_owned(),
        ]);
    }
    format!("{table}\n")
}

/// Two nodes, and a pod each that holds connections, opens new ones, and means harm.
struct Lab {
    scenario: Scenario,
    held: Crowd,
    pins: Pins,
    time: Duration,
}

impl Lab {
    fn new(time: Duration) -> Result<Self> {
        let places = PLACES.to_string();
        let own = ["--socket-lb", "off", "--max-flows", places.as_str()];
        let builder = Cluster::builder()
            .pod(1, "held")
            .pod(1, "new")
            .pod(1, "harm")
            .pod(2, "used")
            .pod(2, "flooded");
        let mut scenario = Scenario::start(builder, &[&own[..], &SMALL_MAPS].concat())?;
        scenario.serve_these("used", &Serve::default().crowd(TARGET).udp(TARGET))?;
        for (number, backend) in [(USED, "used"), (FLOODED, "flooded")] {
            scenario
                .publish(&scenario.service(backend, number), &scenario.endpoints(&[backend]))?;
        }
        let probe = Probe::tcp(used()).source_port(FIRST).timeout(PATIENCE);
        let held = scenario.cluster.pod("held").crowd(&probe, HELD)?;
        let opened = held.ask()?;
        ensure!(opened.ok == HELD as u64, "not all connections were opened: {opened:?}");
        let pins = Pins::new(scenario.cluster.node(1).bpf_dir());
        Ok(Self { scenario, held, pins, time })
    }

    fn load(&self) -> Result<load::Report> {
        let probe = Probe::tcp(used()).timeout(Duration::from_secs(3)).reset();
        self.scenario.cluster.pod("new").load(&probe, RATE, self.time)?.finish()
    }

    /// New connections during a flood, and how many packets that had.
    fn flooded(&self, protocol: u8, flags: u8) -> Result<(u64, load::Report)> {
        let harm = self.harm()?;
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            let flood = scope.spawn(|| harm.flood(protocol, flags, self.time, &stop));
            let report = self.load();
            stop.store(true, Ordering::Relaxed);
            let sent = flood.join().ok().context("the flood panicked")??;
            Ok((sent, report?))
        })
    }

    fn harm(&self) -> Result<Harm> {
        let pod = self.scenario.cluster.pod("harm");
        let router = link_address(self.scenario.cluster.node(1).netns(), pod.host_device())?;
        Harm::of(&pod, router)
    }

    /// Sends a RST in the name of every client that holds a connection.
    fn reset(&self) -> Result<u64> {
        let harm = self.harm()?;
        let client = self.scenario.cluster.pod("held").addresses().v4;
        for number in 0..HELD as u16 {
            let from = endpoint(client, FIRST + number);
            harm.send(TCP, RST, from, endpoint(cluster_ip(USED).v4, PORT))?;
        }
        Ok(HELD as u64)
    }

    /// Removes every other flow of datagrams from the tables of node 1, and asks through all of them
    /// again.
    fn lose_half(&self) -> Result<u64> {
        const STREAMS: usize = 200;
        let pod = self.scenario.cluster.pod("new");
        let probe = |number: usize| {
            let port = 30_000 + number as u16;
            Probe::udp(used()).source_port(port).connected().timeout(PATIENCE)
        };
        let ask = || -> Result<()> {
            for number in 0..STREAMS {
                let answer = pod.ask(probe(number))?;
                ensure!(answer.name() == Some("used"), "datagram {number}: {answer:?}");
            }
            Ok(())
        };
        ask()?;
        let table = FlowTable::<Address4>::writable(&self.pins)?;
        let datagrams = table.live().filter(|flow| flow.protocol() == UDP);
        let lost = datagrams.step_by(2).filter(|flow| table.remove_unchanged(flow)).count();
        ensure!(lost > 0, "no flow of datagrams was there");
        ask()?;
        Ok(lost as u64)
    }

    fn observe<'a>(
        &self,
        name: &'static str,
        harm: impl FnOnce() -> Result<(u64, Option<(load::Report, &'a load::Report)>)>,
    ) -> Result<Fault> {
        let before = flow_events(&self.pins)?;
        let (packets, loads) = harm().with_context(|| name.to_owned())?;
        let crowd::Report { ok, moved, .. } = self.held.ask()?;
        let after = flow_events(&self.pins)?;
        let evicted = Class::ALL.iter().zip(after.iter().zip(before).skip(1));
        Ok(Fault {
            name,
            packets,
            broken: HELD as u64 - ok + moved,
            new: loads.as_ref().map(|(report, _)| [report.failures(), report.sent]),
            p99_ms: loads.as_ref().map(|(report, quiet)| [quiet.p99_ms, report.p99_ms]),
            evicted: evicted
                .map(|(class, (after, before))| (class.name(), after - before))
                .collect(),
        })
    }
}

/// A pod that sends what it likes.
struct Harm {
    sender: Sender,
    router: [u8; 6],
}

impl Harm {
    fn of(pod: &Pod, router: [u8; 6]) -> Result<Self> {
        Ok(Self { sender: Sender::on(pod.netns(), "eth0")?, router })
    }

    fn send(
        &self,
        protocol: u8,
        flags: u8,
        from: Endpoint<Address4>,
        to: Endpoint<Address4>,
    ) -> Result<()> {
        let mut frame = Frame::<Ipv4>::of(protocol, from, to, flags).bytes();
        frame[..6].copy_from_slice(&self.router);
        self.sender.send(&frame).context("cannot send from the pod")
    }

    /// Sends [`FLOOD`] packets in `time`, of another address and port each. Returns how many.
    fn flood(&self, protocol: u8, flags: u8, time: Duration, stop: &AtomicBool) -> Result<u64> {
        let to = endpoint(cluster_ip(FLOODED).v4, PORT);
        let start = Instant::now();
        let mut sent = 0;
        while sent < FLOOD && !stop.load(Ordering::Relaxed) {
            let due = (start.elapsed().as_secs_f64() / time.as_secs_f64() * FLOOD as f64) as u64;
            while sent < due.min(FLOOD) {
                // An odd factor: no two have the same address and port.
                let number = (sent as u32).wrapping_mul(0x9e37_79b1);
                let [a, b, c, d] = number.to_be_bytes();
                let from = endpoint(Ipv4Addr::new(172, 16 | (a & 15), b, c), 1024 + u16::from(d));
                self.send(protocol, flags, from, to)?;
                sent += 1;
            }
            thread::sleep(Duration::from_millis(1));
        }
        Ok(sent)
    }
}

fn used() -> SocketAddr {
    (cluster_ip(USED).v4, PORT).into()
}

fn endpoint(address: Ipv4Addr, port: u16) -> Endpoint<Address4> {
    Endpoint { address: address.into(), port: Be16::new(port) }
}
