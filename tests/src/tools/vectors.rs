//! Flow vectors: files of Kubernetes objects and first packets with kube-proxy's answers.
//!
//! Each group of objects is served by the agent on a node of its own. Packets go through the
//! programs that the agent attached there, or come from real sockets. Where lb differs on
//! purpose, the expected answer follows from rules ([`rules`]), never from a list of flows. Every
//! answer of a file is then made wrong in each way ([`mutation`]), which must be noticed.

pub mod format;
pub mod kube_proxy;
pub mod mutation;
pub mod outcome;
mod packets;
pub mod report;
pub mod rules;
mod selection;
mod sockets;
pub mod view;
mod world;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, ensure};
use bytemuck::Pod;
use lb_agent::maps::flow_table::SEED;
use lb_common::abi::affinity::{Affinity, AffinityKey};
use lb_sys::TypedMap;

use self::format::{File, Flow, Group};
use self::mutation::Wrong;
use self::outcome::Outcome;
use self::report::Report;
use self::rules::{Expect, Expected, expect};
use self::sockets::Wire;
use self::view::{Client, View};
use self::world::World;
use crate::harness::flows::begin_period;
use crate::harness::netns::topology::cgroup::Cgroup;
use crate::harness::netns::topology::stale;
use crate::harness::programs::in_empty_namespace;

/// The first source port of the flows of pods and clients outside.
const FIRST_PORT: u16 = 40_000;
/// How many flows are opened at most for each endpoint that must be chosen.
const FLOWS_PER_ENDPOINT: usize = 64;
/// How many flows are opened at least, so that a wrong endpoint would be chosen.
const FLOWS: usize = 16;

/// Runs every case of a file whose group has `only` in its id, if that is given.
///
/// # Errors
/// The file cannot be read, or no group can be run at all.
pub fn run(path: &Path, only: Option<&str>, report: &mut Report) -> Result<()> {
    let file = File::read(path)?;
    stale::sweep()?;
    let seat = Seat::take()?;
    let groups = file.groups.iter();
    let chosen = groups.filter(|group| only.is_none_or(|only| group.id.contains(only)));
    for (number, group) in chosen.enumerate() {
        let name = format!("{}-{number}", seat.name);
        let outcomes = in_empty_namespace(|| {
            world::with(group, &name, seat.cgroup.path(), |world| run_group(group, world))
        });
        match outcomes {
            Ok(outcomes) => {
                for (flow, tried) in group.flows.iter().zip(outcomes) {
                    report.flow(group, flow, &tried.expected, tried.result);
                    for (wrong, is_noticed) in tried.wrong {
                        report.wrong(group, flow, wrong, is_noticed);
                    }
                }
            }
            Err(error) => report.group(group, &error),
        }
    }
    if only.is_none() {
        for case in &file.endpoint_selection {
            report.selection(case, selection::check(case));
        }
    }
    Ok(())
}

/// A flow that was run.
struct Tried {
    expected: Result<Expected>,
    result: Result<(), String>,
    /// Wrong answers to it, and for each whether the outcomes show that it is wrong.
    wrong: Vec<(Wrong, bool)>,
}

fn run_group(group: &Group, world: &World) -> Result<Vec<Tried>> {
    let view = View::new(group);
    let wire = Wire::tap()?;
    let specs = group.services.iter().filter_map(|service| service.spec.as_ref());
    let keeps_clients =
        specs.filter_map(|spec| spec.session_affinity.as_deref()).any(|kind| kind != "None");
    let mut port = FIRST_PORT;
    let mut all = Vec::new();
    for flow in &group.flows {
        let send = || match view.client(flow.source_ip) {
            Client::Node => sockets::send(view, &wire, flow),
            _ => {
                port = port.wrapping_add(1).max(FIRST_PORT);
                packets::send(view, &world.hooks, flow, port)
            }
        };
        let forget = || match keeps_clients {
            // Every packet must be the first one of its client.
            true => forget_affinity(world),
            false => Ok(()),
        };
        all.push(try_flow(group, flow, send, forget));
    }
    Ok(all)
}

/// Sends first packets of a flow. If it gets the right answer, the wrong ones are tried on what
/// was seen.
fn try_flow(
    group: &Group,
    flow: &Flow,
    send: impl FnMut() -> Result<Outcome>,
    forget: impl Fn() -> Result<()>,
) -> Tried {
    let view = View::new(group);
    let expected = expect(view, flow);
    let mut seen = Vec::new();
    let mut wrong = Vec::new();
    let mut result = Ok(());
    if let Ok(expected) = &expected {
        let checked = check(&expected.what, &mut seen, send, forget);
        result = checked.map_err(|error| format!("{error:#}"));
        if result.is_ok() {
            wrong = mutation::noticed(view, group, flow, &seen);
        }
    }
    Tried { expected, result, wrong }
}

/// Sends first packets until every allowed outcome was seen; any other outcome is an error.
fn check(
    expected: &Expect,
    seen: &mut Vec<Outcome>,
    mut send: impl FnMut() -> Result<Outcome>,
    forget: impl Fn() -> Result<()>,
) -> Result<()> {
    let allowed = expected.outcomes();
    let (least, most) = match expected {
        Expect::Only(_) => (1, 1),
        Expect::To(endpoints) => (FLOWS, FLOWS_PER_ENDPOINT * endpoints.len()),
    };
    for number in 1..=most {
        let got = send()?;
        seen.push(got);
        let is_over = number >= least && allowed.iter().all(|outcome| seen.contains(outcome));
        if is_over || !allowed.contains(&got) {
            break;
        }
        forget()?;
    }
    expected.judge(seen)
}

fn forget_affinity(world: &World) -> Result<()> {
    let map: TypedMap<AffinityKey, Affinity> = TypedMap::new(world.pins.open("AFFINITY")?)?;
    clear(&map)?;
    begin_period(&TypedMap::new(world.pins.open(SEED)?)?)
}

fn clear<K: Pod, V: Pod>(map: &TypedMap<K, V>) -> Result<()> {
    let mut found = Vec::new();
    map.visit(|keys, _| {
        found.extend_from_slice(keys);
        true
    })?;
    found
        .iter()
        .try_for_each(|key| map.remove(key).map(drop))
        .context("cannot remove an affinity entry")
}

/// A cgroup that this process has joined, so that connect-time hooks see its sockets. The
/// process moves back on drop.
struct Seat {
    name: String,
    cgroup: Cgroup,
    before: PathBuf,
}

impl Seat {
    fn take() -> Result<Self> {
        let own = fs::read_to_string("/proc/self/cgroup")
            .context("cannot read the cgroup of this process")?;
        let before = own.lines().find_map(|line| line.strip_prefix("0::"));
        let before =
            before.ok_or_else(|| anyhow!("this process is not in a cgroup of version 2"))?;
        let mount = crate::harness::netns::topology::cgroup::mount_point()?;
        let before = mount.join(before.trim_start_matches('/'));
        let name = format!("lb-{}-0-vectors", std::process::id());
        let seat = Self { cgroup: Cgroup::create(&name)?, name, before };
        join(seat.cgroup.path()).with_context(|| format!("cannot join cgroup {}", seat.name))?;
        Ok(seat)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        // If the process cannot move back, the next run removes the directory.
        if join(&self.before).is_ok() {
            fs::remove_dir(self.cgroup.path()).ok();
        }
    }
}

fn join(cgroup: &Path) -> std::io::Result<()> {
    fs::write(cgroup.join("cgroup.procs"), "0")
}

/// The vector files of the repository.
///
/// # Errors
/// There are none.
pub fn own_files() -> Result<Vec<PathBuf>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("vectors");
    let entries =
        fs::read_dir(&directory).with_context(|| format!("cannot list {}", directory.display()))?;
    let mut files: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "json"))
        .collect();
    files.sort();
    ensure!(!files.is_empty(), "no vectors in {}", directory.display());
    Ok(files)
}
