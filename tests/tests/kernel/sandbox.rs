//! What every test of the kernel has for itself: a directory of pins, namespaces, cgroups.

use std::{
    fs,
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::{self, Command},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use lb_agent::{
    maps::pins::Pins,
    options::sizes::Sizes,
    programs::{
        hook::Direction,
        load::{Constants, Programs},
        prepare::load,
    },
};
use lb_tests::harness::{
    netns::topology::{cgroup::Cgroup, namespace::Netns},
    wait::PATIENCE,
};

pub(super) const SIZES: Sizes = Sizes { services: 64, backends: 128, slots: 70_000, flows: 1_024 };

/// `TCX_INGRESS` and `TCX_EGRESS` of `enum bpf_attach_type`.
const TCX: [(Direction, u32); 2] = [(Direction::Ingress, 46), (Direction::Egress, 47)];

/// A directory for pins that is taken away with everything in it.
pub(super) struct BpfDir(pub(super) PathBuf);

impl BpfDir {
    pub(super) fn new() -> Self {
        Self(Path::new("/sys/fs/bpf").join(own_name("pins")))
    }

    pub(super) fn pins(&self) -> Pins {
        Pins::new(&self.0)
    }

    pub(super) fn load(&self) -> Result<Programs> {
        Ok(load(&self.pins(), &SIZES, Constants::default())?)
    }
}

impl Drop for BpfDir {
    fn drop(&mut self) {
        if let Err(error) = remove_tree(&self.0) {
            eprintln!("cannot remove {}: {error}", self.0.display());
        }
    }
}

/// A name by which a later run finds what this one leaves behind if it is killed.
fn own_name(suffix: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("lb-{}-{number}-{suffix}", process::id())
}

/// Unpinning the last reference to a link detaches it.
fn remove_tree(path: &Path) -> std::io::Result<()> {
    if !path.exists() {
        return Ok(());
    }
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    fs::remove_dir(path)
}

pub(super) fn namespace(suffix: &str) -> Result<Netns> {
    let netns = Netns::create(&own_name(suffix))?;
    netns.run(|| ip("link set lo up"))?;
    Ok(netns)
}

pub(super) fn ip(arguments: &str) -> Result<()> {
    let output = Command::new("ip").args(arguments.split(' ')).output()?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "ip {arguments}: {error}");
    Ok(())
}

pub(super) fn index_of(name: &str) -> Result<u32> {
    Ok(nix::net::if_::if_nametoindex(name)?)
}

/// The names of the programs on both directions of an interface of the caller's namespace.
pub(super) fn tcx_programs(interface: &str) -> Result<Vec<String>> {
    let index = index_of(interface)?;
    let mut names = Vec::new();
    for (_, attach_type) in TCX {
        for id in lb_sys::tcx_query(index, attach_type)? {
            names.push(lb_sys::program_info(lb_sys::program_by_id(id)?.as_fd())?.name());
        }
    }
    Ok(names)
}

/// Link and program at `pin`.
pub(super) fn link(pin: &Path) -> Result<(u32, u32)> {
    let link = lb_sys::obj_get(pin).with_context(|| format!("no link at {}", pin.display()))?;
    let info = lb_sys::link_info(link.as_fd())?;
    Ok((info.id, info.program))
}

pub(super) fn wait_for(what: &str, mut is_so: impl FnMut() -> Result<bool>) -> Result<Duration> {
    let started = Instant::now();
    while !is_so()? {
        ensure!(started.elapsed() < PATIENCE, "waited too long for {what}");
        thread::sleep(Duration::from_micros(200));
    }
    Ok(started.elapsed())
}

/// A cgroup that is taken away.
pub(super) struct OwnCgroup(pub(super) Cgroup);

impl OwnCgroup {
    pub(super) fn create(suffix: &str) -> Result<Self> {
        Ok(Self(Cgroup::create(&own_name(suffix))?))
    }
}

impl Drop for OwnCgroup {
    fn drop(&mut self) {
        self.0.remove();
    }
}
