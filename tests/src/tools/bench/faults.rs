//! `lb-bench faults`: what floods, forged resets, lost entries and full tables do to those who use the
//! table of flows, through lb and through kube-proxy. A pod that means harm sends from any address.
//!
//! The lanes come from the benchmark of traffic: clusters that differ only in their proxy. The kernel
//! has one limit of connection tracking (`nf_conntrack_max`) for every network namespace, and lets the
//! initial one alone change it, which a benchmark must not. So that limit is taken as it is, and lb's
//! table gets as many places.

mod counts;
mod full;
mod harm;
mod lab;

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use comfy_table::Table;
use comfy_table::presets::NOTHING;
use lb_common::abi::frontend::{TCP, UDP};
use lb_common::flow_table::Class;
use lb_common::packet::SYN;
use serde::Serialize;

use self::counts::NO_ROOM;
use self::lab::{HELD, Lab, lanes};
use super::traffic::case::Proxy;
use super::traffic::lane::Settings;
use super::traffic::shared::Shared;

/// How much slower a new connection may be during a flood, as docs/performance.md has it.
const SLOWER: f64 = 1.2;
/// How many flows the kernel's connection tracking has room for, in each network namespace.
const CONNTRACK_MAX: &str = "/proc/sys/net/netfilter/nf_conntrack_max";
/// The proxies, in the order of the report.
const PROXIES: [Proxy; 3] = [Proxy::LbTc, Proxy::Nftables, Proxy::Iptables];

/// What is done.
#[derive(Clone, Debug)]
pub struct Plan {
    /// How long a flood takes.
    pub time: Duration,
    /// `--max-flows` of lb, unless it has as many as the kernel's connection tracking.
    pub max_flows: Option<u32>,
    /// Only proxies whose title contains this.
    pub only: String,
}

/// What lb promises of a fault.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Promise {
    /// No connection breaks and every new one is served.
    Unharmed,
    /// No connection breaks, and every packet that finds no room is counted.
    Counted,
}

/// What happened to those who use a Service.
#[derive(Clone, Debug, Serialize)]
pub struct Fault {
    /// What was done.
    pub name: &'static str,
    /// Through which proxy.
    pub proxy: &'static str,
    /// What is promised; nothing of kube-proxy.
    pub promise: Option<Promise>,
    /// Packets that were sent, or entries that were written or removed, to do it.
    pub packets: u64,
    /// Established connections that broke.
    pub broken: u64,
    /// New connections that failed, and how many there were.
    pub new: Option<[u64; 2]>,
    /// The 99th percentile of the time that a new connection took, ms: right before a flood, and during
    /// it.
    pub p99_ms: Option<[f64; 2]>,
    /// What the proxy counted meanwhile: of lb the flows that made room for others, by class, and packets
    /// for which there was no room; of kube-proxy the same of the kernel's connection tracking.
    pub counts: Vec<(&'static str, u64)>,
}

impl Fault {
    /// Whether lb keeps what it promises. What is slower is reported: it is no fault on a busy machine.
    pub fn is_kept(&self) -> bool {
        let failed = self.new.map_or(0, |[failed, _]| failed);
        match self.promise {
            None => true,
            _ if self.broken > 0 => false,
            // A flow of the class `established` that made room was idle, if no connection broke.
            Some(Promise::Unharmed) => failed == 0,
            Some(Promise::Counted) => {
                self.counted(NO_ROOM) >= failed && self.counted(Class::Established.name()) == 0
            }
        }
    }

    fn counted(&self, name: &str) -> u64 {
        let found = self.counts.iter().find(|(counted, _)| *counted == name);
        found.map_or(0, |(_, count)| *count)
    }

    fn cells(&self) -> [String; 8] {
        let of = |[failed, all]: [u64; 2]| format!("{failed} of {all}");
        let times = |[quiet, with]: [f64; 2]| {
            let ratio = with / quiet;
            let is_missed = self.promise.is_some() && ratio > SLOWER;
            let mark = if is_missed { ", aim missed" } else { "" };
            format!("{quiet:.2} -> {with:.2} (x {ratio:.2}{mark})")
        };
        let counts: Vec<_> =
            self.counts.iter().map(|(name, count)| format!("{name} {count}")).collect();
        let verdict = match self.promise {
            None => "",
            Some(_) if self.is_kept() => "ok",
            Some(_) => "FAILED",
        };
        [
            self.name.to_owned(),
            self.proxy.to_owned(),
            self.packets.to_string(),
            format!("{} of {HELD}", self.broken),
            self.new.map_or_else(String::new, of),
            self.p99_ms.map_or_else(String::new, times),
            counts.join(", "),
            verdict.to_owned(),
        ]
    }
}

/// All of them, and how large the tables were.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Places of lb's table.
    pub max_flows: u32,
    /// Room for flows in the kernel's connection tracking.
    pub conntrack_max: u32,
    /// How long a flood took, seconds.
    pub seconds: u64,
    /// The faults, side by side.
    pub faults: Vec<Fault>,
}

/// Makes the lanes, does every harm to one after the other, and removes them.
///
/// # Errors
/// A lane cannot be made or does not serve.
pub fn measure(plan: &Plan) -> Result<Report> {
    let conntrack_max = conntrack_max()?;
    let max_flows = plan.max_flows.unwrap_or(conntrack_max);
    let settings = Settings { max_flows: Some(max_flows), ..Settings::default() };
    let chosen = PROXIES.iter().filter(|proxy| proxy.title().contains(&plan.only));
    let chosen: Vec<_> = chosen.copied().collect();
    let mut shared = Shared::start().context("control plane")?;
    let mut labs = Vec::new();
    for lane in lanes(&mut shared, &chosen, &settings)? {
        let places = if lane.proxy == Proxy::LbTc { max_flows } else { conntrack_max };
        let title = lane.proxy.title();
        labs.push(Lab::new(lane, places, plan.time).context(title)?);
        eprintln!("{title}: {HELD} connections are open");
    }
    let mut faults = Vec::new();
    for (name, protocol, flags) in [("flood of SYNs", TCP, SYN), ("flood of datagrams", UDP, 0)] {
        for lab in &labs {
            faults.push(lab.flood(name, protocol, flags)?);
        }
        eprintln!("{name}: done");
    }
    for lab in &labs {
        faults.push(lab.reset()?);
    }
    for lab in labs.iter().filter(|lab| lab.is_lb()) {
        faults.push(lab.lose_half()?);
    }
    let mut idle = Vec::new();
    for lab in &labs {
        let [in_use, then] = lab.full()?;
        faults.push(in_use);
        idle.push(then);
    }
    faults.extend(idle);
    Ok(Report { max_flows, conntrack_max, seconds: plan.time.as_secs(), faults })
}

/// The limit of the kernel, of this and of every other network namespace.
fn conntrack_max() -> Result<u32> {
    let text = fs::read_to_string(CONNTRACK_MAX);
    let text =
        text.with_context(|| format!("cannot read {CONNTRACK_MAX}: is nf_conntrack loaded?"))?;
    text.trim().parse().with_context(|| format!("{CONNTRACK_MAX} is {text:?}"))
}

impl Report {
    /// Whether lb keeps every promise.
    pub fn is_kept(&self) -> bool {
        self.faults.iter().all(Fault::is_kept)
    }

    /// For people.
    pub fn table(&self) -> String {
        let mut table = Table::new();
        table.load_style(NOTHING);
        let counted = "made room, or found none";
        table.set_header([
            "fault",
            "proxy",
            "packets",
            "broken",
            "new failed",
            "p99 ms",
            counted,
            "",
        ]);
        for fault in &self.faults {
            table.add_row(fault.cells());
        }
        let Self { max_flows, conntrack_max, seconds, .. } = self;
        format!(
            "lb has --max-flows {max_flows}; nf_conntrack_max of this machine is {conntrack_max}. \
             A flood is ten times the table, {} packets of lb's, in {seconds} s: fewer were sent where \
             the machine did not manage more.\n{table}\n",
            10 * u64::from(*max_flows)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(promise: Promise, broken: u64, failed: u64, counts: &[(&'static str, u64)]) -> Fault {
        Fault {
            name: "flood of SYNs",
            proxy: "lb tc",
            promise: Some(promise),
            packets: 10,
            broken,
            new: Some([failed, 100]),
            p99_ms: Some([0.2, 0.5]),
            counts: counts.to_vec(),
        }
    }

    #[test]
    fn a_promise_is_about_connections_and_what_is_not_served_must_be_counted() {
        use Promise::{Counted, Unharmed};
        let rows = [
            (fault(Unharmed, 0, 0, &[("unanswered", 9)]), true),
            (fault(Unharmed, 1, 0, &[]), false),
            (fault(Unharmed, 0, 1, &[(NO_ROOM, 1)]), false),
            (fault(Counted, 0, 7, &[(NO_ROOM, 7)]), true),
            (fault(Counted, 0, 7, &[(NO_ROOM, 6)]), false),
            (fault(Counted, 0, 7, &[("established", 1), (NO_ROOM, 7)]), false),
            (fault(Counted, 1, 7, &[(NO_ROOM, 7)]), false),
        ];
        for (fault, is_kept) in rows {
            assert_eq!(fault.is_kept(), is_kept, "{fault:?}");
            let of_kube_proxy = Fault { promise: None, ..fault };
            assert!(of_kube_proxy.is_kept(), "{of_kube_proxy:?}");
        }
    }

    #[test]
    fn the_table_says_the_sizes_and_what_was_counted() {
        let faults = vec![fault(Promise::Counted, 0, 7, &[("closed", 2), (NO_ROOM, 6)])];
        let text = Report { max_flows: 8, conntrack_max: 9, seconds: 3, faults }.table();
        for part in ["--max-flows 8", "is 9.", "0 of 10000", "7 of 100", "closed 2, no room 6"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(text.contains("x 2.50, aim missed") && text.contains("FAILED"), "{text}");
    }
}
