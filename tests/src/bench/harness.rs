//! Runs programs again and again on packets that are put back before each run, in turns
//! with each other and each with an empty program under the same wrapper.

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
    programs::{CgroupSockAddr, ProgramFd, SchedClassifier, TestRun, TestRunOptions},
};
use bytemuck::Pod;
use lb_agent::dataplane::sys::TypedMap;

use super::abi::{Lane, MAX_TARGETS};

/// The empty target's index.
pub const EMPTY: u32 = 0;

/// The wrapper programs and their targets.
pub struct Harness {
    object: Ebpf,
    lane: TypedMap<u32, Lane>,
    targets: ProgramArray<MapData>,
    names: Vec<String>,
    seed: Cell<u64>,
}

/// A packet, the wrapper that restores it and the program it is given to.
#[derive(Clone, Debug)]
pub struct Shot {
    /// Name of the wrapper.
    pub wrapper: &'static str,
    /// The frame.
    pub frame: Vec<u8>,
    /// How many flows the wrapper goes through, a power of two; 0 = always a new one.
    pub flows: u32,
    /// What [`Harness::add`] returned.
    pub target: u32,
    /// The target whose cost is taken off: [`EMPTY`], or what prepares a step.
    pub base: u32,
    /// The device that the packet is at; 0 = loopback.
    pub ifindex: u32,
}

/// What there was of a run.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    /// How many packets.
    pub packets: u32,
    /// What the target returned for the last one.
    pub returned: i32,
    /// Processor time of a packet with its wrapper.
    pub nanoseconds: f64,
}

impl Harness {
    /// Loads the wrappers and the steps; `sizes` are those of maps that differ from the
    /// object's.
    ///
    /// # Errors
    /// No such object, no privileges, or the kernel refuses a program.
    pub fn load(object: &Path, sizes: &[(&str, u32)]) -> Result<Self> {
        let mut object = load_object(object, sizes)?;
        load_programs(&mut object)?;
        let lane = map(&object, "LANE")?;
        let targets = object.take_map("TARGETS").context("no map TARGETS")?;
        let targets = ProgramArray::try_from(targets)?;
        let mut harness = Self { object, lane, targets, names: Vec::new(), seed: Cell::new(0) };
        let index = harness.step("empty")?;
        ensure!(index == EMPTY, "the empty program is not the first target");
        Ok(harness)
    }

    /// The object, for the maps of the steps.
    pub fn object(&self) -> &Ebpf {
        &self.object
    }

    /// Makes one of the steps a target.
    ///
    /// # Errors
    /// No such program, or no room.
    pub fn step(&mut self, name: &str) -> Result<u32> {
        let descriptor = classifier(&self.object, name)?.fd()?.try_clone()?;
        self.add(name, &descriptor)
    }

    /// Makes a program a target, unless that of this name is one.
    ///
    /// # Errors
    /// No room, or the kernel refuses to tail-call the program.
    pub fn add(&mut self, name: &str, program: &ProgramFd) -> Result<u32> {
        if let Some(target) = self.names.iter().position(|other| other == name) {
            return Ok(target as u32);
        }
        let target = self.names.len() as u32;
        ensure!((target as usize) < MAX_TARGETS, "more than {MAX_TARGETS} targets");
        self.targets.set(target, program, 0).context("the program cannot be tail-called")?;
        self.names.push(name.to_owned());
        Ok(target)
    }

    /// Measures all `shots` turn about: nanoseconds of a packet above the base, one a round.
    /// `check` is called before each run of a shot's target with the shot's index and `None`,
    /// and after it with what there was of it; a shot that it refuses is out.
    pub fn measure(
        &self,
        shots: &[Shot],
        rounds: usize,
        mut check: impl FnMut(usize, Option<Run>) -> Result<()>,
    ) -> Vec<Result<Vec<f64>>> {
        let mut lanes: Vec<Result<Vec<f64>>> = shots.iter().map(|_| Ok(Vec::new())).collect();
        let mut order: Vec<usize> = (0..shots.len()).collect();
        for round in 0..rounds {
            // What ran before is still in the caches: it must not always be the same.
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
            check(Some(run))?;
            anyhow::Ok(run.nanoseconds)
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

    fn run(&self, shot: &Shot, target: u32) -> Result<Run> {
        // About a millisecond: what disturbs a turn then disturbs its neighbours too.
        let repeat = match shot.flows {
            0 => 2_048,
            1 => 16_384,
            _ => 8_192,
        };
        // A run through a large table begins anywhere in it; new flows go on where they were.
        let first = if shot.flows == 0 { 0 } else { self.random() };
        let mask = shot.flows.wrapping_sub(1);
        let lane = Lane { target, mask, first, ..super::frames::lane(&shot.frame) };
        self.lane.set(&0, &lane).context("cannot set LANE")?;
        let mut context = [0u8; 44];
        context[40..].copy_from_slice(&shot.ifindex.to_ne_bytes());
        let mut options = TestRunOptions::new();
        options.data_in = Some(&shot.frame);
        options.ctx_in = Some(&context);
        options.repeat = repeat;
        let wrapper = classifier(&self.object, shot.wrapper)?;
        let before = processor_time()?;
        let result =
            wrapper.test_run(options).with_context(|| format!("cannot run {}", shot.wrapper))?;
        let nanoseconds = (processor_time()? - before).as_nanos() as f64 / f64::from(repeat);
        Ok(Run { packets: repeat, returned: result.return_value as i32, nanoseconds })
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
    use aya::programs::Program;
    for (name, program) in object.programs_mut() {
        match program {
            Program::SchedClassifier(program) => program.load(),
            Program::CgroupSockAddr(program) => program.load(),
            Program::Xdp(program) => program.load(),
            _ => bail!("program {name} is of another kind than those of lb"),
        }
        .with_context(|| format!("the kernel refused {name}"))?;
    }
    Ok(())
}

/// A tc program of an object.
///
/// # Errors
/// There is none of this name.
pub fn classifier<'a>(object: &'a Ebpf, name: &str) -> Result<&'a SchedClassifier> {
    let program = object.program(name).with_context(|| format!("no program {name}"))?;
    program.try_into().with_context(|| format!("{name} is no tc program"))
}

/// A cgroup program of an object.
///
/// # Errors
/// There is none of this name.
pub fn sock_addr<'a>(object: &'a Ebpf, name: &str) -> Result<&'a CgroupSockAddr> {
    let program = object.program(name).with_context(|| format!("no program {name}"))?;
    program.try_into().with_context(|| format!("{name} is no program of a socket address"))
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
