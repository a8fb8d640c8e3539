//! Runs a program again and again on a packet that is put back before each run, against an
//! empty program under the same wrapper, turn about.

use std::{
    fs,
    os::fd::{AsFd, OwnedFd},
    path::Path,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use aya::{
    Ebpf, EbpfLoader,
    maps::{Map, MapData, ProgramArray},
    programs::{ProgramFd, SchedClassifier, TestRun, TestRunOptions},
};
use bytemuck::Pod;
use lb_agent::dataplane::sys::TypedMap;

use super::{
    abi::{Lane, MAX_TARGETS},
    stats::Estimate,
};

/// The empty target's index.
const EMPTY: u32 = 0;

/// The wrapper programs and their targets.
pub struct Harness {
    object: Ebpf,
    lane: TypedMap<u32, Lane>,
    targets: ProgramArray<MapData>,
    count: u32,
    effort: Effort,
}

/// How long to measure.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Rounds of each measurement; a round is a run of the target and one of the empty one.
    pub rounds: usize,
    /// How long either run of a round should take.
    pub run: Duration,
}

/// A packet, the wrapper that restores it and the program it is given to.
#[derive(Clone, Debug)]
pub struct Shot<'a> {
    /// Name of the wrapper.
    pub wrapper: &'static str,
    /// The frame.
    pub frame: &'a [u8],
    /// How many flows the wrapper goes through, a power of two; 0 = always a new one.
    pub flows: u32,
    /// What [`Harness::add`] returned.
    pub target: u32,
    /// The device that the packet is at; 0 = loopback.
    pub ifindex: u32,
}

/// A step that a program cannot do without, and that others on the machine make slow.
#[derive(Clone, Debug)]
pub struct Step<'a> {
    /// The step alone.
    pub shot: Shot<'a>,
    /// How often the program takes it.
    pub times: f64,
    /// What it cost where the limits are from, ns.
    pub anchor: f64,
}

/// What a program costs.
#[derive(Clone, Copy, Debug)]
pub struct Measurement {
    /// Nanoseconds of a packet above an empty program.
    pub cost: Estimate,
    /// How much of it is what the steps cost beyond their anchors in the same rounds.
    pub allowance: f64,
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
    /// Loads the wrappers and the floors.
    ///
    /// # Errors
    /// No such object, no privileges, or the kernel refuses a program.
    pub fn load(object: &Path, effort: Effort) -> Result<Self> {
        let mut object = load_object(object, &[])?;
        load_programs(&mut object)?;
        let lane = map(&object, "LANE")?;
        let targets = object.take_map("TARGETS").context("no map TARGETS")?;
        let targets = ProgramArray::try_from(targets)?;
        let mut harness = Self { object, lane, targets, count: 0, effort };
        let index = harness.floor("empty")?;
        ensure!(index == EMPTY, "the empty program is not the first target");
        Ok(harness)
    }

    /// The rounds and the time of each run.
    pub fn effort(&self) -> Effort {
        self.effort
    }

    /// A map of the floors.
    ///
    /// # Errors
    /// No such map, or of another layout.
    pub fn map<K: Pod, V: Pod>(&self, name: &str) -> Result<TypedMap<K, V>> {
        map(&self.object, name)
    }

    /// Makes one of the floors a target.
    ///
    /// # Errors
    /// No such program, or no room.
    pub fn floor(&mut self, name: &str) -> Result<u32> {
        let descriptor = classifier(&self.object, name)?.fd()?.try_clone()?;
        self.add(&descriptor)
    }

    /// Makes a program a target.
    ///
    /// # Errors
    /// No room, or the kernel refuses to tail-call the program.
    pub fn add(&mut self, program: &ProgramFd) -> Result<u32> {
        ensure!((self.count as usize) < MAX_TARGETS, "more than {MAX_TARGETS} targets");
        self.targets.set(self.count, program, 0).context("the program cannot be tail-called")?;
        self.count += 1;
        Ok(self.count - 1)
    }

    /// Forgets all targets added after `count`.
    pub fn truncate(&mut self, count: u32) {
        self.count = self.count.min(count);
    }

    /// How many targets there are.
    pub fn targets(&self) -> u32 {
        self.count
    }

    /// Measures `shot` and, turn about with it, the `steps` that it is judged by. `check` is
    /// called before each run of the target with `None`, and after it with what there was of
    /// it.
    ///
    /// # Errors
    /// Those of BPF_PROG_TEST_RUN and of `check`.
    pub fn measure(
        &self,
        shot: &Shot,
        steps: &[Step],
        mut check: impl FnMut(Option<Run>) -> Result<()>,
    ) -> Result<Measurement> {
        let repeat = self.repeat(shot)?;
        let empty = Shot { target: EMPTY, ..shot.clone() };
        let repeats: Vec<u32> =
            steps.iter().map(|step| self.repeat(&step.shot)).collect::<Result<_>>()?;
        let mut allowances = Vec::with_capacity(self.effort.rounds);
        let mut costs = Vec::with_capacity(self.effort.rounds);
        let mut target = || {
            check(None)?;
            let run = self.run(shot, repeat)?;
            check(Some(run))?;
            anyhow::Ok(run.nanoseconds)
        };
        for round in 0..self.effort.rounds {
            let first = if round % 2 == 0 { None } else { Some(target()?) };
            let empty = self.run(&empty, repeat)?.nanoseconds;
            let mut allowance = 0.0;
            for (step, repeat) in steps.iter().zip(&repeats) {
                let cost = self.run(&step.shot, *repeat)?.nanoseconds - empty;
                allowance += (cost - step.anchor).max(0.0) * step.times;
            }
            let cost = first.map_or_else(&mut target, Ok)? - empty;
            allowances.push(cost - allowance);
            costs.push(cost);
        }
        let (cost, judged) = (Estimate::of(costs), Estimate::of(allowances));
        Ok(Measurement { cost, allowance: cost.median - judged.median })
    }

    /// Nanoseconds of `more` above `less`.
    ///
    /// # Errors
    /// Those of BPF_PROG_TEST_RUN.
    pub fn compare(&self, more: &Shot, less: &Shot) -> Result<Estimate> {
        let repeat = self.repeat(more)?;
        let mut samples = Vec::with_capacity(self.effort.rounds);
        for _ in 0..self.effort.rounds {
            let below = self.run(less, repeat)?.nanoseconds;
            samples.push(self.run(more, repeat)?.nanoseconds - below);
        }
        Ok(Estimate::of(samples))
    }

    /// How many packets take as long as a run should.
    fn repeat(&self, shot: &Shot) -> Result<u32> {
        let trial = self.run(shot, 2_000)?.nanoseconds;
        let run = self.effort.run.as_nanos() as f64;
        // Enough to meet every flow of those that a cache could hold.
        let least = shot.flows.clamp(1_000, 1 << 16);
        Ok(((run / trial.max(1.0)) as u32).clamp(least, 1_000_000))
    }

    fn run(&self, shot: &Shot, repeat: u32) -> Result<Run> {
        let lane = Lane {
            target: shot.target,
            mask: shot.flows.wrapping_sub(1),
            ..super::frames::lane(shot.frame)
        };
        self.lane.set(&0, &lane).context("cannot set LANE")?;
        let mut context = [0u8; 44];
        context[40..].copy_from_slice(&shot.ifindex.to_ne_bytes());
        let mut options = TestRunOptions::new();
        options.data_in = Some(shot.frame);
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

fn processor_time() -> Result<Duration> {
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
