//! How long loading and attaching the programs takes: row 23 of docs/performance.md.

use std::{
    fs::{self, File},
    os::fd::AsFd,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use aya::maps::Map;
use lb_agent::options::sizes::Sizes;
use lb_agent::{
    maps::pins::Pins,
    programs::{load::Constants, prepare},
};
use lb_sys::{LinkTarget, link_create};

use super::{
    harness::{load_object, load_programs},
    report::{Figure, Outcome},
    stats::Estimate,
};
use crate::harness::{netns::topology::cgroup::Cgroup, verify::LIMIT_INSTRUCTIONS};

/// Program and `enum bpf_attach_type`.
const AT_DEVICE: [(&str, u32); 5] =
    [("from_pod", 46), ("to_pod", 47), ("from_device", 46), ("to_device", 47), ("loopback", 47)];
const AT_CGROUP: [(&str, u32); 9] = [
    ("release", 34),
    ("connect4", 10),
    ("connect6", 11),
    ("sendmsg4", 14),
    ("sendmsg6", 15),
    ("recvmsg4", 19),
    ("recvmsg6", 20),
    ("getpeername4", 29),
    ("getpeername6", 30),
];
const ROUNDS: usize = 5;
/// The agent's defaults.
const SIZES: Sizes =
    Sizes { services: 65_536, backends: 262_144, slots: 1_048_576, flows: 262_144 };

/// Measures load and attachment by the agent's own loader, and reads what the verifier says
/// of `object`. Attaches to `ifindex` and to a cgroup of its own without processes.
///
/// # Errors
/// The kernel refuses the programs or a link.
pub fn measure(object: &Path, ifindex: u32) -> Result<Vec<Figure>> {
    let cgroup = PrivateCgroup(Cgroup::create(&format!("lb-bench-{}", std::process::id()))?);
    let mut times = Vec::with_capacity(ROUNDS);
    for _ in 0..ROUNDS {
        times.push(load_and_attach(ifindex, cgroup.0.path())?.as_secs_f64() * 1e3);
    }
    let mut object = load_object(object, &[])?;
    load_programs(&mut object)?;
    let mut largest = (0, String::new());
    for (name, program) in object.programs() {
        let info = program.info()?;
        let count = info.verified_instruction_count().context("an older kernel than 5.16")?;
        largest = largest.max((count, name.to_owned()));
    }
    let tail_calls = object.maps().filter(|(_, map)| matches!(map, Map::ProgramArray(_))).count();
    let figure = |name: &str, unit, aim, must, estimate| Figure {
        row: 23,
        unit,
        aim: Some(aim),
        must: Some(must),
        ..Figure::unjudged(name, Outcome::Measured(estimate))
    };
    let exactly = |count: usize| Estimate::of(vec![count as f64]);
    Ok(vec![
        figure("load, pin and attach all programs", "ms", 150.0, 1000.0, Estimate::of(times)),
        figure(
            &format!("verified instructions of the largest program, {}", largest.1),
            "",
            99_999.0,
            f64::from(LIMIT_INSTRUCTIONS),
            exactly(largest.0 as usize),
        ),
        figure("maps that programs could tail-call through", "", 0.0, 0.0, exactly(tail_calls)),
    ])
}

fn load_and_attach(ifindex: u32, cgroup: &Path) -> Result<Duration> {
    let directory = PinDirectory::make()?;
    let started = Instant::now();
    let constants =
        Constants { has_set_retval: true, has_netns_cookie: true, ..Default::default() };
    let programs = prepare::load(&Pins::new(&directory.0), &SIZES, constants)?;
    let cgroup = File::open(cgroup)?;
    let mut links = Vec::new();
    for (name, kind) in AT_DEVICE {
        let target = LinkTarget::Interface(ifindex);
        links.push(link_create(programs.get(name)?, target, kind).context(name)?);
    }
    for (name, kind) in AT_CGROUP {
        let target = LinkTarget::Cgroup(cgroup.as_fd());
        links.push(link_create(programs.get(name)?, target, kind).context(name)?);
    }
    Ok(started.elapsed())
}

/// A directory on the bpffs, removed with what it holds.
struct PinDirectory(PathBuf);

impl PinDirectory {
    fn make() -> Result<Self> {
        let path = PathBuf::from(format!("/sys/fs/bpf/lb-bench-{}", std::process::id()));
        fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for PinDirectory {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("cannot remove {}: {error}", self.0.display());
        }
    }
}

struct PrivateCgroup(Cgroup);

impl Drop for PrivateCgroup {
    fn drop(&mut self) {
        self.0.remove();
    }
}
