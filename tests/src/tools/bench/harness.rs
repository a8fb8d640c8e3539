//! Runs programs repeatedly on packets that are restored before each run. Programs take turns
//! with each other, and each with an empty program under the same wrapper.

use std::{
    cell::Cell,
    fs,
    os::fd::{AsFd, OwnedFd},
    path::Path,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use aya::{
    Ebpf, EbpfLoader,
    maps::{Map, MapData, ProgramArray},
    programs::{
        Program, ProgramFd, SchedClassifier, TestRun, TestRunOptions, TestRunResult, Xdp, XdpMode,
    },
};
use bytemuck::Pod;
use lb_agent::{maps::flow_table::FlowTable, programs::load::load_one};
use lb_common::abi::settings::Settings;
use lb_sys::TypedMap;

use super::{
    abi::{Lane, MAX_TARGETS},
    namespace::IDLE,
    tables::Side,
};
use crate::harness::flows;

/// The empty target's index.
pub const EMPTY: u32 = 0;

const XDP_WRAPPERS: [&str; 4] = ["xdp_request4", "xdp_reply4", "xdp_request6", "xdp_reply6"];

/// What the kernel runs a program on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layer {
    /// A socket buffer.
    Tc,
    /// A bare frame.
    Xdp,
}

/// A program that restores a packet and runs a target on it.
#[derive(Clone, Copy, Debug)]
pub struct Wrapper {
    name: &'static str,
    /// What the wrapper and its targets run on.
    pub layer: Layer,
}

impl Wrapper {
    /// The tc wrapper of this name.
    pub const fn tc(name: &'static str) -> Self {
        Self { name, layer: Layer::Tc }
    }

    /// The XDP wrapper of this name.
    pub const fn xdp(name: &'static str) -> Self {
        Self { name, layer: Layer::Xdp }
    }
}

/// The wrapper programs and their targets.
pub struct Harness {
    object: Ebpf,
    lane: TypedMap<u32, Lane>,
    numbers: TypedMap<u32, u32>,
    tc: Targets,
    xdp: Targets,
    seed: Cell<u64>,
}

/// The targets of the wrappers of one layer.
struct Targets {
    map: ProgramArray<MapData>,
    names: Vec<String>,
}

/// A packet, the wrapper that restores it and the program it is given to.
#[derive(Clone, Debug)]
pub struct Shot {
    /// The wrapper.
    pub wrapper: Wrapper,
    /// The frame.
    pub frame: Vec<u8>,
    /// How many flows the wrapper goes through, a power of two; 0 = always a new one.
    pub flows: u32,
    /// The program, as [`Harness::add`] returned it.
    pub target: u32,
    /// The target whose cost is subtracted: [`EMPTY`], or the one that prepares a step.
    pub base: u32,
    /// The device that the packet is at; 0 = loopback.
    pub ifindex: u32,
    /// How packets follow each other.
    pub pace: Pace,
}

/// How packets follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// Many in one system call, each restored by the wrapper.
    Running,
    /// One new packet in each system call, for a target whose changes no wrapper can undo. The
    /// caches hold other data in between.
    Single,
}

/// The result of a run.
#[derive(Clone, Debug)]
pub struct Run {
    /// How many packets.
    pub packets: u32,
    /// What the target returned for the last one.
    pub returned: i32,
    /// The last packet, as the target left it.
    pub frame: Vec<u8>,
    /// Processor time of a packet with its wrapper.
    pub nanoseconds: f64,
}

impl Harness {
    /// Loads the wrappers and the steps; `sizes` are those of maps that differ from the
    /// object's, and `places` those of the tables of flows, IPv4 and IPv6.
    ///
    /// # Errors
    /// No such object, no privileges, or the kernel refuses a program.
    pub fn load(
        object: &Path,
        sizes: &[(&str, u32)],
        places: [u32; 2],
        settings: &Settings,
    ) -> Result<Self> {
        let mut object = load_object(object, &[sizes, &flows::sizes(places)].concat())?;
        flows::write_seed(|name| map_descriptor(&object, name), places)?;
        map(&object, "SETTINGS")?.set(&0u32, settings).context("cannot set SETTINGS")?;
        load_programs(&mut object)?;
        keep_dispatched(&mut object)?;
        let (lane, numbers) = (map(&object, "LANE")?, map(&object, "NUMBERS")?);
        let tc = Targets::of(&mut object, "TARGETS")?;
        let xdp = Targets::of(&mut object, "XDP_TARGETS")?;
        let mut harness = Self { object, lane, numbers, tc, xdp, seed: Cell::new(0) };
        for (layer, name) in [(Layer::Tc, "empty"), (Layer::Xdp, "xdp_empty")] {
            let index = harness.step(layer, name)?;
            ensure!(index == EMPTY, "the empty program is not the first target");
        }
        Ok(harness)
    }

    /// The object, for the maps of the steps.
    pub fn object(&self) -> &Ebpf {
        &self.object
    }

    /// The steps' table of flows.
    ///
    /// # Errors
    /// The object has none.
    pub fn flows<F: Side>(&self) -> Result<FlowTable<F::Address>> {
        flows::open(|name| map_descriptor(&self.object, name))
    }

    /// Sets the flows that the wrappers go through where there are several.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn set_numbers(&self, numbers: &[u32]) -> Result<()> {
        let keys: Vec<u32> = (0..numbers.len() as u32).collect();
        self.numbers.set_batch(&keys, numbers).1.context("cannot set NUMBERS")
    }

    /// Makes one of the steps a target.
    ///
    /// # Errors
    /// No such program, or no room.
    pub fn step(&mut self, layer: Layer, name: &str) -> Result<u32> {
        let descriptor = program(&self.object, name)?.try_clone()?;
        self.add(layer, name, &descriptor)
    }

    /// Makes a program a target of the wrappers of its layer, unless that of this name is one.
    ///
    /// # Errors
    /// No room, or the kernel refuses to tail-call the program.
    pub fn add(&mut self, layer: Layer, name: &str, program: &ProgramFd) -> Result<u32> {
        let Targets { map, names } = match layer {
            Layer::Tc => &mut self.tc,
            Layer::Xdp => &mut self.xdp,
        };
        if let Some(target) = names.iter().position(|other| other == name) {
            return Ok(target as u32);
        }
        let target = names.len() as u32;
        ensure!((target as usize) < MAX_TARGETS, "more than {MAX_TARGETS} targets");
        map.set(target, program, 0).context("the program cannot be tail-called")?;
        names.push(name.to_owned());
        Ok(target)
    }

    /// Measures all `shots` in turn: nanoseconds of a packet above the base, one sample a round.
    /// `check` is called before each run of a shot's target with the shot's index and `None`,
    /// and after it with the result. A shot that it refuses is not measured any further.
    pub fn measure(
        &self,
        shots: &[Shot],
        rounds: usize,
        mut check: impl FnMut(usize, Option<Run>) -> Result<()>,
    ) -> Vec<Result<Vec<f64>>> {
        let mut lanes: Vec<Result<Vec<f64>>> = shots.iter().map(|_| Ok(Vec::new())).collect();
        let mut order: Vec<usize> = (0..shots.len()).collect();
        for round in 0..rounds {
            // The previous program's data is in the caches, so the order must vary.
            self.shuffle(&mut order);
            for &index in &order {
                let Ok(samples) = &mut lanes[index] else { continue };
                match self.turn(&shots[index], round % 2 == 1, |run| check(index, run)) {
                    Ok(sample) => samples.push(sample),
                    Err(error) => lanes[index] = Err(error),
                }
            }
        }
        lanes
    }

    fn turn(
        &self,
        shot: &Shot,
        is_base_last: bool,
        mut check: impl FnMut(Option<Run>) -> Result<()>,
    ) -> Result<f64> {
        let base = || anyhow::Ok(self.run(shot, shot.base)?.nanoseconds);
        let mut target = || {
            check(None)?;
            let run = self.run(shot, shot.target)?;
            let nanoseconds = run.nanoseconds;
            check(Some(run))?;
            anyhow::Ok(nanoseconds)
        };
        if is_base_last {
            let cost = target()?;
            Ok(cost - base()?)
        } else {
            let below = base()?;
            Ok(target()? - below)
        }
    }

    fn shuffle(&self, order: &mut [usize]) {
        for last in (1..order.len()).rev() {
            order.swap(last, self.random() as usize % (last + 1));
        }
    }

    /// Always the same numbers (the middle of a Weyl sequence).
    fn random(&self) -> u32 {
        self.seed.set(self.seed.get().wrapping_add(0x9e37_79b9_7f4a_7c15));
        let seed = self.seed.get();
        ((seed ^ (seed >> 31)).wrapping_mul(0x7fb5_d329_728e_a185) >> 32) as u32
    }

    /// Gives the target one packet.
    ///
    /// # Errors
    /// The kernel refuses to run the wrapper.
    pub fn once(&self, shot: &Shot) -> Result<Run> {
        self.repeat(shot, shot.target, 1)
    }

    fn run(&self, shot: &Shot, target: u32) -> Result<Run> {
        if shot.pace == Pace::Single {
            return self.repeat(shot, target, 512);
        }
        // About a millisecond: a disturbance then affects neighbouring turns too.
        let repeat = match shot.flows {
            0 => 2_048,
            1 => 16_384,
            _ => 8_192,
        };
        self.repeat(shot, target, repeat)
    }

    fn repeat(&self, shot: &Shot, target: u32, packets: u32) -> Result<Run> {
        // Known flows begin at a random one; new flows continue where the last run ended.
        let first = if shot.flows == 0 { 0 } else { self.random() };
        let mask = shot.flows.wrapping_sub(1);
        let is_numbered = (shot.flows > 1).into();
        let lane = Lane { target, mask, first, is_numbered, ..super::frames::lane(&shot.frame) };
        self.lane.set(&0, &lane).context("cannot set LANE")?;
        let mut frame = vec![0; shot.frame.len() + ROOM];
        let (spent, result) = match shot.pace {
            Pace::Running => {
                let before = processor_time()?;
                let result = self.test_run(shot, &mut frame, packets)?;
                (processor_time()? - before, result)
            }
            Pace::Single => {
                let mut spent = Duration::ZERO;
                for _ in 1..packets {
                    spent += self.test_run(shot, &mut frame, 1)?.duration;
                }
                let last = self.test_run(shot, &mut frame, 1)?;
                (spent + last.duration, last)
            }
        };
        frame.truncate(result.data_size_out as usize);
        let nanoseconds = spent.as_nanos() as f64 / f64::from(packets);
        Ok(Run { packets, returned: result.return_value as i32, frame, nanoseconds })
    }

    fn test_run(&self, shot: &Shot, out: &mut [u8], repeat: u32) -> Result<TestRunResult> {
        let context = context(shot);
        let mut options = TestRunOptions::new();
        options.data_in = Some(&shot.frame);
        options.data_out = Some(out);
        options.ctx_in = Some(bytemuck::cast_slice(&context));
        options.repeat = repeat;
        let name = shot.wrapper.name;
        test_run(&self.object, name, options).with_context(|| format!("cannot run {name}"))
    }
}

/// Attaches the XDP wrappers to idle devices. A program without a device is patched into the
/// kernel's XDP dispatcher before each run and out of it afterwards; during the waits for that
/// other processes would fill the caches.
fn keep_dispatched(object: &mut Ebpf) -> Result<()> {
    for (name, device) in XDP_WRAPPERS.iter().zip(IDLE) {
        let program = object.program_mut(name).with_context(|| format!("no program {name}"))?;
        let program: &mut Xdp = program.try_into()?;
        program
            .attach(device, XdpMode::Skb)
            .with_context(|| format!("cannot attach {name} to {device}"))?;
    }
    Ok(())
}

/// Bytes, more than any frame grows by.
const ROOM: usize = 256;

/// The context of the packet for the kernel.
fn context(shot: &Shot) -> Vec<u32> {
    match shot.wrapper.layer {
        // `struct __sk_buff`, up to `ifindex`.
        Layer::Tc => [[0; 10].as_slice(), &[shot.ifindex]].concat(),
        // `struct xdp_md`: data, data_end, data_meta, ingress_ifindex, rx_queue_index,
        // egress_ifindex.
        Layer::Xdp => vec![0, shot.frame.len() as u32, 0, shot.ifindex, 0, 0],
    }
}

fn test_run(object: &Ebpf, name: &str, options: TestRunOptions) -> Result<TestRunResult> {
    Ok(match object.program(name).with_context(|| format!("no program {name}"))? {
        Program::SchedClassifier(program) => program.test_run(options)?,
        Program::Xdp(program) => program.test_run(options)?,
        _ => bail!("{name} is neither for tc nor for XDP"),
    })
}

impl Targets {
    fn of(object: &mut Ebpf, name: &str) -> Result<Self> {
        let map = object.take_map(name).with_context(|| format!("no map {name}"))?;
        Ok(Self { map: ProgramArray::try_from(map)?, names: Vec::new() })
    }
}

/// Processor time of the calling thread.
///
/// # Errors
/// Those of clock_gettime(2).
pub fn processor_time() -> Result<Duration> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes a timespec.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    ensure!(result == 0, "cannot read the processor time: {}", std::io::Error::last_os_error());
    Ok(Duration::new(time.tv_sec as u64, time.tv_nsec as u32))
}

/// Loads an object's maps; `sizes` are those that differ from the object's.
///
/// # Errors
/// No such file, or the kernel refuses a map.
pub fn load_object(path: &Path, sizes: &[(&str, u32)]) -> Result<Ebpf> {
    let bytes = fs::read(path)
        .with_context(|| format!("cannot read {}: run cargo xtask bench", path.display()))?;
    let mut loader = EbpfLoader::new();
    loader.btf(None);
    for (name, entries) in sizes {
        loader.map_max_entries(name, *entries);
    }
    for name in ["HAS_SET_RETVAL", "HAS_NETNS_COOKIE", "HAS_CSUM_IPV6"] {
        loader.override_global(name, &1u32, false);
    }
    loader.load(&bytes).with_context(|| format!("cannot load {}", path.display()))
}

/// Gives every program of an object to the verifier.
///
/// # Errors
/// The kernel refuses one.
pub fn load_programs(object: &mut Ebpf) -> Result<()> {
    for (name, program) in object.programs_mut() {
        load_one(program)
            .with_context(|| format!("program {name} is neither for tc, XDP nor a cgroup"))?
            .with_context(|| format!("the kernel refused {name}"))?;
    }
    Ok(())
}

/// A program of an object.
///
/// # Errors
/// There is none of this name.
pub fn program<'a>(object: &'a Ebpf, name: &str) -> Result<&'a ProgramFd> {
    Ok(match object.program(name).with_context(|| format!("no program {name}"))? {
        Program::SchedClassifier(program) => program.fd()?,
        Program::Xdp(program) => program.fd()?,
        Program::CgroupSockAddr(program) => program.fd()?,
        Program::CgroupSock(program) => program.fd()?,
        _ => bail!("{name} is neither for tc, XDP nor a cgroup"),
    })
}

/// A tc program of an object.
///
/// # Errors
/// There is none of this name.
pub fn classifier<'a>(object: &'a Ebpf, name: &str) -> Result<&'a SchedClassifier> {
    let program = object.program(name).with_context(|| format!("no program {name}"))?;
    program.try_into().with_context(|| format!("{name} is no tc program"))
}

/// A map of an object.
///
/// # Errors
/// No such map, or of another layout.
pub fn map<K: Pod, V: Pod>(object: &Ebpf, name: &str) -> Result<TypedMap<K, V>> {
    TypedMap::new(map_descriptor(object, name)?).with_context(|| format!("map {name}"))
}

/// The descriptor of a map of an object.
///
/// # Errors
/// No such map, or of a kind that lb has none of.
pub fn map_descriptor(object: &Ebpf, name: &str) -> Result<OwnedFd> {
    let map = object.map(name).with_context(|| format!("no map {name}"))?;
    let (Map::Array(data) | Map::HashMap(data) | Map::LruHashMap(data) | Map::PerCpuArray(data)) =
        map
    else {
        bail!("map {name} is of another kind");
    };
    Ok(data.fd().as_fd().try_clone_to_owned()?)
}
