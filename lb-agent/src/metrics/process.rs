//! The metrics of the process, with the names that every exporter has.

use std::fmt;

use procfs::{WithCurrentSystemInfo, process::LimitValue, process::Process};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{counter::ConstCounter, gauge::ConstGauge},
};

/// Reads `/proc/self` at each scrape.
#[derive(Debug)]
pub(super) struct OfProcess;

/// What `/proc/self` says.
struct Figures {
    cpu_seconds: f64,
    resident_bytes: u64,
    virtual_bytes: u64,
    start_seconds: f64,
    threads: i64,
    open_fds: usize,
    max_fds: Option<u64>,
}

fn read() -> procfs::ProcResult<Figures> {
    let process = Process::myself()?;
    let stat = process.stat()?;
    let ticks = procfs::ticks_per_second() as f64;
    let max_fds = match process.limits()?.max_open_files.soft_limit {
        LimitValue::Value(limit) => Some(limit),
        LimitValue::Unlimited => None,
    };
    Ok(Figures {
        cpu_seconds: (stat.utime + stat.stime) as f64 / ticks,
        resident_bytes: stat.rss_bytes().get(),
        virtual_bytes: stat.vsize,
        start_seconds: procfs::boot_time_secs()? as f64 + stat.starttime as f64 / ticks,
        threads: stat.num_threads,
        open_fds: process.fd_count()?,
        max_fds,
    })
}

impl Collector for OfProcess {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let figures = match read() {
            Ok(figures) => figures,
            Err(error) => {
                tracing::debug!(%error, "cannot read /proc/self: this scrape has no process metrics");
                return Ok(());
            }
        };
        let cpu = ConstCounter::new(figures.cpu_seconds);
        let help = "User and system CPU time of the process";
        let out =
            encoder.encode_descriptor("process_cpu_seconds", help, None, cpu.metric_type())?;
        cpu.encode(out)?;
        for (name, help, value) in [
            (
                "process_resident_memory_bytes",
                "Resident memory of the process",
                Some(figures.resident_bytes as f64),
            ),
            (
                "process_virtual_memory_bytes",
                "Virtual memory of the process",
                Some(figures.virtual_bytes as f64),
            ),
            (
                "process_start_time_seconds",
                "When the process started, in seconds since the epoch",
                Some(figures.start_seconds),
            ),
            ("process_threads", "Threads of the process", Some(figures.threads as f64)),
            (
                "process_open_fds",
                "Open file descriptors of the process",
                Some(figures.open_fds as f64),
            ),
            (
                "process_max_fds",
                "Limit of open file descriptors",
                figures.max_fds.map(|limit| limit as f64),
            ),
        ] {
            let Some(value) = value else { continue };
            let gauge = ConstGauge::new(value);
            let out = encoder.encode_descriptor(name, help, None, gauge.metric_type())?;
            gauge.encode(out)?;
        }
        Ok(())
    }
}
