//! The same lanes by tools that everybody knows: iperf3, and wrk against nginx. A pod asks a
//! ClusterIP whose backend is on the other node.
//!
//! A turn is bounded: iperf3 by bytes, wrk, which has no such flag, by a second or two. Without a
//! tool its cases are left out, and the report says so.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lb_testing::random::Random;
use serde::Serialize;
use serde_json::Value;

use super::case::{CLIENT, FAR, Proxy, Route};
use super::lane::{Lane, Settings, TURN};
use super::{Plan, shared};
use crate::harness::controlplane::programs;
use crate::harness::netns::actors::process::Process;
use crate::harness::netns::topology::plan::cluster_ip;
use crate::harness::wait::{PATIENCE, eventually};
use crate::tools::bench::stats::Estimate;

/// How far from the first port of a server or a Service iperf3 and nginx are.
const IPERF3: u16 = 2;
const NGINX: u16 = 3;
/// How much iperf3 sends in a turn, all streams together.
const BYTES: &str = "1G";
/// The connections of wrk.
const CONNECTIONS: u32 = 16;
/// The lanes that are compared.
const LANES: [Proxy; 6] = [
    Proxy::Direct,
    Proxy::Control,
    Proxy::LbConnect,
    Proxy::LbTc,
    Proxy::Nftables,
    Proxy::Iptables,
];

/// What is measured.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Tool {
    /// iperf3 with so many streams; bytes each second.
    Iperf3(u32),
    /// wrk whose connections stay open; requests each second.
    WrkKeepAlive,
    /// wrk with a connection for each request; requests each second.
    WrkClose,
}

impl Tool {
    /// All, in the order of the report.
    pub const ALL: [Self; 5] =
        [Self::Iperf3(1), Self::Iperf3(8), Self::Iperf3(64), Self::WrkKeepAlive, Self::WrkClose];

    /// For people, and for `--only`.
    pub fn title(self) -> String {
        match self {
            Self::Iperf3(1) => "iperf3, 1 stream".to_owned(),
            Self::Iperf3(streams) => format!("iperf3, {streams} streams"),
            Self::WrkKeepAlive => format!("wrk, {CONNECTIONS} connections, keep-alive"),
            Self::WrkClose => format!("wrk, {CONNECTIONS} connections, one for each request"),
        }
    }

    /// The unit that rates are shown in.
    pub fn unit(self) -> &'static str {
        if self.is_iperf3() { "Gbit/s" } else { "thousand requests/s" }
    }

    fn is_iperf3(self) -> bool {
        matches!(self, Self::Iperf3(_))
    }
}

/// What a tool measured in a lane.
#[derive(Clone, Debug, Serialize)]
pub struct Rate {
    /// The tool.
    pub tool: Tool,
    /// The lane.
    pub lane: Proxy,
    /// Bytes or requests each second.
    pub rate: Estimate,
    /// The same, against no proxy in the same round.
    pub ratio: Estimate,
}

impl Rate {
    /// What a rate is multiplied by to be in the unit of its tool.
    pub fn scale(&self) -> f64 {
        if self.tool.is_iperf3() { 8e-9 } else { 1e-3 }
    }
}

/// All rates, and what could not be measured.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Measured {
    /// By tool and lane.
    pub rates: Vec<Rate>,
    /// Tools that are missing, as sentences.
    pub missing: Vec<String>,
}

/// Whether any tool is wanted.
pub fn are_wanted(plan: &Plan) -> bool {
    Tool::ALL.iter().any(|tool| plan.wants(&tool.title()))
}

/// Whether the lane is one of the compared.
pub fn has(proxy: Proxy) -> bool {
    LANES.contains(&proxy)
}

/// Measures in lanes that serve already.
///
/// # Errors
/// A tool fails.
pub fn measure(plan: &Plan, lanes: &[Lane], settings: &Settings) -> Result<Measured> {
    let mut missing = Vec::new();
    let mut tools: Vec<_> = Tool::ALL.into_iter().filter(|it| plan.wants(&it.title())).collect();
    if plan.is_quick {
        tools.retain(|tool| *tool != Tool::Iperf3(64));
    }
    let programs = [(true, programs::program("iperf3").map(drop)), (false, wrk_and_nginx())];
    for (is_iperf3, found) in programs {
        if let Err(error) = found
            && tools.iter().any(|tool| tool.is_iperf3() == is_iperf3)
        {
            tools.retain(|tool| tool.is_iperf3() != is_iperf3);
            missing.push(format!("{error:#}; `cargo xtask bench traffic` installs it as root"));
        }
    }
    let lanes: Vec<_> = lanes.iter().filter(|lane| has(lane.proxy)).collect();
    let mut _servers = Vec::new();
    for lane in &lanes {
        _servers.push(Servers::start(lane, &tools, settings)?);
    }
    let seconds = if plan.is_quick { 1 } else { 2 };
    let rounds = plan.rounds.div_ceil(5);
    let mut random = Random::new(1);
    let mut samples = BTreeMap::<(Tool, Proxy), Vec<f64>>::new();
    for round in 1..=rounds {
        for tool in &tools {
            let mut lanes = lanes.clone();
            random.shuffle(&mut lanes);
            for lane in lanes {
                let rate = turn(lane, *tool, seconds, settings)
                    .with_context(|| format!("{}: {}", lane.proxy.title(), tool.title()))?;
                samples.entry((*tool, lane.proxy)).or_default().push(rate);
            }
        }
        eprintln!("tools: round {round} of {rounds}");
    }
    Ok(Measured { rates: rates(&samples), missing })
}

fn rates(samples: &BTreeMap<(Tool, Proxy), Vec<f64>>) -> Vec<Rate> {
    let rate = |((tool, lane), of_lane): (&(Tool, Proxy), &Vec<f64>)| {
        let direct = samples.get(&(*tool, Proxy::Direct)).unwrap_or(of_lane);
        let ratios = of_lane.iter().zip(direct).map(|(rate, direct)| rate / direct).collect();
        let (rate, ratio) = (Estimate::of(of_lane.clone()), Estimate::of(ratios));
        Rate { tool: *tool, lane: *lane, rate, ratio }
    };
    samples.iter().map(rate).collect()
}

fn wrk_and_nginx() -> Result<()> {
    programs::program("wrk")?;
    programs::nginx().map(drop)
}

/// The servers of a lane.
struct Servers {
    _processes: Vec<Process>,
    _directory: tempfile::TempDir,
}

impl Servers {
    fn start(lane: &Lane, tools: &[Tool], settings: &Settings) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("lb-bench-nginx-").tempdir()?;
        let pod = lane.cluster.pod(FAR);
        let mut processes = Vec::new();
        if tools.iter().any(|tool| tool.is_iperf3()) {
            let mut command = pinned(&programs::program("iperf3")?, settings.server_processor);
            command.args(["--server", "--port", &(shared::TARGET + IPERF3).to_string()]);
            processes.push(pod.spawn("iperf3", command)?);
        }
        if tools.iter().any(|tool| !tool.is_iperf3()) {
            let path = directory.path();
            let file = path.join("nginx.conf");
            fs::write(&file, configuration(path))?;
            let mut command = pinned(&programs::nginx()?, settings.server_processor);
            command.arg("-e").arg(path.join("error.log")).arg("-c").arg(file);
            let mut nginx = pod.spawn("nginx", command)?;
            eventually(|| {
                ensure!(path.join("nginx.pid").exists(), "nginx does not start\n{}", nginx.tail());
                Ok(())
            })?;
            ensure!(nginx.ended()?.is_none(), "nginx ended\n{}", nginx.tail());
            processes.push(nginx);
        }
        Ok(Self { _processes: processes, _directory: directory })
    }
}

/// On one processor, ahead of everything else there.
fn pinned(program: &Path, processor: usize) -> Command {
    let mut command = Command::new("nice");
    command.args(["-n", "-20", "taskset", "--cpu-list", &processor.to_string()]).arg(program);
    command
}

fn turn(lane: &Lane, tool: Tool, seconds: u32, settings: &Settings) -> Result<f64> {
    let is_direct = lane.proxy.is_direct();
    let offset = if tool.is_iperf3() { IPERF3 } else { NGINX };
    let (ip, port) = match is_direct {
        true => (lane.cluster.pod(FAR).addresses().v4, shared::TARGET + offset),
        false => {
            (cluster_ip(shared::number(Route::ClusterIpFar.server())).v4, shared::PORT + offset)
        }
    };
    let program = |name| programs::program(name).map(|path: PathBuf| path);
    let ask = |command| lane.cluster.pod(CLIENT).output(command, TURN);
    if let Tool::Iperf3(streams) = tool {
        let mut command = pinned(&program("iperf3")?, settings.client_processor);
        command.args(["--client", &ip.to_string(), "--port", &port.to_string()]);
        command.args(["--parallel", &streams.to_string(), "--bytes", BYTES, "--json"]);
        command.args(["--connect-timeout", &PATIENCE.as_millis().to_string()]);
        return received(&ask(command)?);
    }
    let mut command = pinned(&program("wrk")?, settings.client_processor);
    command.args(["--threads", "1", "--connections", &CONNECTIONS.to_string()]);
    command.args(["--duration", &format!("{seconds}s"), "--timeout", &timeout(PATIENCE)]);
    if tool == Tool::WrkClose {
        command.args(["--header", "Connection: close"]);
    }
    command.arg(format!("http://{ip}:{port}/"));
    requests(&ask(command)?)
}

fn timeout(time: Duration) -> String {
    format!("{}s", time.as_secs())
}

/// The bytes each second that the server of iperf3 received.
fn received(json: &str) -> Result<f64> {
    let report: Value = serde_json::from_str(json).context("iperf3 wrote no JSON")?;
    let bits = report["end"]["sum_received"]["bits_per_second"].as_f64();
    Ok(bits.with_context(|| format!("iperf3: {}", report["error"]))? / 8.0)
}

/// The requests each second of wrk.
fn requests(text: &str) -> Result<f64> {
    ensure!(!text.contains("Socket errors"), "wrk had errors:\n{text}");
    let rate = text.lines().find_map(|line| line.trim().strip_prefix("Requests/sec:"));
    let rate = rate.with_context(|| format!("wrk says no rate:\n{text}"))?;
    rate.trim().parse().with_context(|| format!("wrk says {rate:?}"))
}

/// Every request has the same small answer, from memory.
fn configuration(directory: &Path) -> String {
    let path = directory.display();
    let port = shared::TARGET + NGINX;
    format!(
        "daemon off;\nmaster_process off;\npid {path}/nginx.pid;\n\
         events {{ worker_connections 1024; }}\n\
         http {{\n\
         access_log off;\nkeepalive_requests 1000000;\nclient_body_temp_path {path};\n\
         proxy_temp_path {path};\nfastcgi_temp_path {path};\nuwsgi_temp_path {path};\n\
         scgi_temp_path {path};\n\
         server {{ listen {port} backlog=1024; location / {{ return 200 'ok\\n'; }} }}\n\
         }}\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_read_from_what_the_tools_write() {
        let json = r#"{"end": {"sum_received": {"bits_per_second": 8e9}}}"#;
        assert_eq!(received(json).expect("a rate"), 1e9);
        let error = received(r#"{"error": "unable to connect", "end": {}}"#).expect_err("an error");
        assert!(error.to_string().contains("unable to connect"), "{error}");
        let text = "  2 requests in 1.00s\nRequests/sec:  20123.5\nTransfer/sec: 1MB\n";
        assert_eq!(requests(text).expect("a rate"), 20_123.5);
        let text = "  Socket errors: connect 0, read 0, write 0, timeout 5\nRequests/sec: 3\n";
        assert!(requests(text).is_err());
    }

    #[test]
    fn ratios_are_taken_round_by_round() {
        let samples = BTreeMap::from([
            ((Tool::WrkClose, Proxy::Direct), vec![100.0, 10.0]),
            ((Tool::WrkClose, Proxy::LbTc), vec![90.0, 9.0]),
        ]);
        let rates = rates(&samples);
        let ratios: Vec<_> = rates.iter().map(|rate| (rate.lane, rate.ratio.median)).collect();
        assert_eq!(ratios, [(Proxy::Direct, 1.0), (Proxy::LbTc, 0.9)]);
    }
}
