//! What a reader must know of the machine to compare two reports.

use std::fs;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::harness::controlplane::programs::KUBERNETES_VERSION;

/// The machine, and how busy it was.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Machine {
    /// The model of its first processor.
    pub processor: String,
    /// How many processors there are.
    pub processors: usize,
    /// The release of its kernel.
    pub kernel: String,
    /// The version of kube-proxy.
    pub kube_proxy: &'static str,
    /// The load average of a minute, before and after.
    pub load_average: [f64; 2],
}

impl Machine {
    /// Reads it from /proc; `before` is the load average before the run.
    ///
    /// # Errors
    /// A file is missing.
    pub fn read(before: f64) -> Result<Self> {
        let cpus = fs::read_to_string("/proc/cpuinfo").context("cannot read /proc/cpuinfo")?;
        let values = |key: &str| {
            let of_key = cpus.lines().filter_map(|line| line.split_once(':'));
            let values = of_key.filter(|(name, _)| name.trim() == key);
            values.map(|(_, value)| value.trim().to_owned()).collect::<Vec<_>>()
        };
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease");
        Ok(Self {
            processor: values("model name").into_iter().next().unwrap_or_default(),
            processors: values("processor").len(),
            kernel: kernel.context("cannot read the kernel's release")?.trim().to_owned(),
            kube_proxy: KUBERNETES_VERSION,
            load_average: [before, load_average()?],
        })
    }

    /// For people.
    pub fn title(&self) -> String {
        let Self { processor, processors, kernel, kube_proxy, load_average } = self;
        let [before, after] = load_average;
        format!(
            "{processors} processors, {processor}; Linux {kernel}; kube-proxy {kube_proxy}; load \
             average {before:.1} before, {after:.1} after."
        )
    }
}

/// That of the last minute.
///
/// # Errors
/// /proc is not there.
pub fn load_average() -> Result<f64> {
    let text = fs::read_to_string("/proc/loadavg").context("cannot read the load average")?;
    let first = text.split(' ').next().unwrap_or_default();
    first.parse().with_context(|| format!("/proc/loadavg holds {text:?}"))
}
