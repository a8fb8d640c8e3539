//! `lb-bench listing`: how long `lb-agent get flows` takes with a million flows, and how much memory.
//!
//! The flows are written into the table of an agent's node, as if that many clients had called. What is
//! printed is read by a pipe and counted, so none of it is kept.

use std::io::Read;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use comfy_table::Table;
use comfy_table::presets::NOTHING;
use lb_agent::maps::flow_table::{FlowTable, Flows, LiveFlow};
use lb_agent::maps::pins::Pins;
use lb_agent::maps::read::read_settings;
use lb_common::abi::address::{Address4, Be16};
use lb_common::balance::Endpoint;
use serde::Serialize;

use crate::harness::echo::Probe;
use crate::harness::flows::insert_like;
use crate::harness::netns::actors::agent::lb_agent;
use crate::harness::netns::topology::cluster::Cluster;
use crate::harness::netns::topology::plan::cluster_ip;
use crate::harness::netns::words::scenario::{PORT, SMALL_MAPS, Scenario};

/// The longest time that a listing should take.
const AIM: Duration = Duration::from_secs(1);
/// The pods: one that calls, and the backends of a Service each.
const CLIENT: &str = "client";
const SERVICES: [(&str, u8); 4] = [("web", 1), ("dns", 2), ("shop", 3), ("mail", 4)];

/// What a command printed, and what that took.
#[derive(Clone, Debug, Serialize)]
pub struct Listing {
    /// The arguments.
    pub command: String,
    /// How many flows it has to print.
    pub flows: u64,
    /// How many it has printed.
    pub printed: u64,
    /// What it has printed, bytes.
    pub bytes: u64,
    /// From its start to its end.
    pub seconds: f64,
    /// The time that it had a CPU, seconds.
    pub cpu: f64,
    /// The most memory that it had, with what it maps of the table, bytes.
    pub peak: u64,
}

impl Listing {
    /// Whether it has printed every flow and no other.
    pub fn is_complete(&self) -> bool {
        self.flows == self.printed
    }
}

/// Fills the table with so many flows, and lists them in several ways.
///
/// # Errors
/// The node cannot be built, or a command fails.
pub fn measure(flows: u32) -> Result<Vec<Listing>> {
    // Half as many more, of which some stay free.
    let places = (flows + flows / 2).to_string();
    let own = ["--socket-lb", "off", "--max-flows", &places];
    let builder =
        SERVICES.iter().fold(Cluster::builder().nodes(1).pod(1, CLIENT), |builder, (name, _)| {
            builder.pod(1, name)
        });
    let mut scenario = Scenario::start(builder, &[&own[..], &SMALL_MAPS].concat())?;
    scenario.serve(&SERVICES.map(|(name, _)| name))?;
    let mut connections = Vec::new();
    for (name, number) in SERVICES {
        scenario.publish(&scenario.service(name, number), &scenario.endpoints(&[name]))?;
        let to: SocketAddr = (cluster_ip(number).v4, PORT).into();
        // It stays open: the flows that are like it are established, and make no room for one another.
        let connection = scenario.cluster.pod(CLIENT).open(Probe::tcp(to))?;
        ensure!(connection.first().name() == Some(name), "{:?}", connection.first());
        connections.push(connection);
    }
    let pins = Pins::new(scenario.cluster.node(1).bpf_dir());
    let table = FlowTable::<Address4>::writable(&pins)?;
    fill(&pins, &table, flows)?;
    let all: Vec<LiveFlow<Address4>> = table.live().collect();
    let (like, address) = (all.first().context("no flow")?, client(flows / 2));
    let of = |is_meant: &dyn Fn(&LiveFlow<Address4>) -> bool| {
        all.iter().filter(|flow| is_meant(flow)).count() as u64
    };
    let of_service = of(&|flow| flow.entry.service == like.entry.service);
    let of_address = of(&|flow| flow.entry.request.source == address.address);
    let service = SERVICES
        .into_iter()
        .find(|(_, number)| like.entry.request.destination == cluster_ip(*number).v4.into())
        .context("a flow of no Service")?;
    let service = format!("default/{}:tcp-{PORT}", service.0);
    let ip = Ipv4Addr::from(address.address).to_string();
    let every = all.len() as u64;
    drop(all);
    let commands: [(&[&str], u64); 4] = [
        (&["get", "flows"], every),
        (&["get", "flows", "-o", "json"], every),
        (&["get", "flows", "--service", &service], of_service),
        (&["get", "flows", "--address", &ip], of_address),
    ];
    let list = |(arguments, flows): (&[&str], u64)| {
        let mut command = lb_agent()?;
        command.args(arguments).arg("--bpf-dir").arg(scenario.cluster.node(1).bpf_dir());
        run(command, flows, arguments)
    };
    commands.into_iter().map(list).collect()
}

/// The address and port of a client: 240 of them share an address.
fn client(number: u32) -> Endpoint<Address4> {
    let [_, a, b, c] = (number / 240).to_be_bytes();
    let port = 10_000 + (number % 240) as u16 * 97;
    Endpoint { address: Ipv4Addr::new(10, 128 | a, b, c).into(), port: Be16::new(port) }
}

/// Copies the flows of the table, each with another client, until it has `flows` of them.
fn fill(pins: &Pins, table: &FlowTable<Address4>, flows: u32) -> Result<()> {
    let lifetimes = read_settings(pins)?.flow_lifetimes;
    let like: Vec<_> = table.live().collect();
    ensure!(like.len() >= SERVICES.len(), "{} flows of {} calls", like.len(), SERVICES.len());
    let (wanted, mut filled) = (flows as usize, like.len());
    // Of some clients both buckets are full.
    for number in 0..2 * flows {
        if filled == wanted {
            break;
        }
        let of_service = &like[number as usize % like.len()];
        filled += usize::from(insert_like(table, of_service, client(number), &lifetimes).is_ok());
    }
    ensure!(filled == wanted, "there is room for {filled} flows of {wanted}");
    Ok(())
}

fn run(mut command: Command, flows: u64, arguments: &[&str]) -> Result<Listing> {
    let is_json = arguments.contains(&"json");
    let start = Instant::now();
    let mut child = command.stdout(Stdio::piped()).spawn().context("cannot start lb-agent")?;
    let mut output = child.stdout.take().context("no pipe")?;
    // A row of the table is a line; an object of the JSON has one brace.
    let mark = if is_json { b'{' } else { b'\n' };
    let (mut marks, mut bytes) = (0, 0);
    let mut buffer = vec![0; 1 << 20];
    loop {
        let length = output.read(&mut buffer).context("cannot read the output")?;
        if length == 0 {
            break;
        }
        bytes += length as u64;
        marks += buffer[..length].iter().filter(|byte| **byte == mark).count() as u64;
    }
    let (status, usage) = wait(child.id())?;
    let seconds = start.elapsed().as_secs_f64();
    let command = arguments.join(" ");
    ensure!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0, "{command}: {status:#x}");
    let printed = if is_json { marks } else { marks.saturating_sub(1) };
    let time = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    let cpu = time(usage.ru_utime) + time(usage.ru_stime);
    // In kilobytes.
    let peak = usage.ru_maxrss as u64 * 1024;
    Ok(Listing { command, flows, printed, bytes, seconds, cpu, peak })
}

/// Waits for a child. Returns its status and what it used.
fn wait(child: u32) -> Result<(libc::c_int, libc::rusage)> {
    let mut status = 0;
    // SAFETY: all of its fields are numbers.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: both are written to, and to nothing else.
    let waited = unsafe { libc::wait4(i32::try_from(child)?, &raw mut status, 0, &raw mut usage) };
    ensure!(waited > 0, "cannot wait for lb-agent: {}", std::io::Error::last_os_error());
    Ok((status, usage))
}

/// The report, as a table.
pub fn table(listings: &[Listing]) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING);
    table.set_header(["command", "flows", "printed", "MB", "s", "CPU s", "peak memory, MB", ""]);
    for listing in listings {
        let megabytes = |bytes: u64| format!("{:.1}", bytes as f64 / 1e6);
        let verdict = match listing {
            listing if !listing.is_complete() => "FAILED",
            listing if listing.seconds > AIM.as_secs_f64() => "aim missed",
            _ => "ok",
        };
        table.add_row([
            listing.command.clone(),
            listing.flows.to_string(),
            listing.printed.to_string(),
            megabytes(listing.bytes),
            format!("{:.2}", listing.seconds),
            format!("{:.2}", listing.cpu),
            megabytes(listing.peak),
            verdict.to_owned(),
        ]);
    }
    format!("{table}\n")
}
