//! The interpreter of behaviour cases in the kernel: the loaded programs, run on frames in a
//! network namespace of their own.
//!
//! Beside what a case asserts it holds every frame to the promises about all frames: bytes that
//! must not change, checksums over the whole frame, MACs of redirected frames, and exactly one
//! counter.

mod fate;

use std::borrow::Cow;
use std::cell::{Cell, RefCell};

use anyhow::{Context, Result, ensure};
use bytemuck::Pod;
use lb_agent::maps::flow_table::{FlowAddress, FlowTable, Flows, SEED};
use lb_common::abi::address::{Address, Family, Ipv4, Ipv6};
use lb_common::abi::affinity::{Affinity, AffinityKey};
use lb_common::abi::backend::Backend;
use lb_common::abi::counter::{COUNTERS, Hook, REASONS_PER_HOOK, Reason};
use lb_common::abi::flow::{FlowKey, Tuple};
use lb_common::abi::flow_table::{Direction, FlowSeed};
use lb_common::abi::fragment::{Fragment, FragmentKey};
use lb_common::abi::frontend::{Frontend, FrontendKey};
use lb_common::abi::range::RangeKey;
use lb_common::abi::service::{Service, Slot};
use lb_common::abi::settings::{Device, SettingsPair};
use lb_common::abi::source::SourceKey;
use lb_sys::{PerCpuCounters, TypedMap};
use lb_testing::family::TestFamily;
use lb_testing::frame::MACS;
use lb_testing::interpreter::{Fate, Interpreter, Outcome, Untestable};
use lb_testing::site::TestSite;
use lb_testing::tables::{FlowEntries, Lookups};
use lb_testing::world::{World, mac};

use self::fate::{checked, encapsulated, fate};
use crate::harness::flows;
use crate::harness::programs::{Programs, Runs};

/// Sizes of the maps of a test: enough for every case, and quick to read and clear.
const ENTRIES: &[(&str, u32)] = &[
    ("FRONTENDS4", 1024),
    ("FRONTENDS6", 1024),
    ("SERVICES", 64),
    ("NAMES", 64),
    ("SLOTS", 4096),
    ("BACKENDS4", 256),
    ("BACKENDS6", 256),
    ("NODES4", 256),
    ("NODES6", 256),
    ("FRAGMENTS4", 1024),
    ("FRAGMENTS6", 1024),
    ("AFFINITY", 1024),
];

/// How many flows there is room for.
const FLOWS: u32 = 16_384;

/// A family whose maps are known.
pub trait KernelFamily: TestFamily<Address: Send + FlowAddress> {
    /// What its maps' names end in.
    const SUFFIX: &'static str;
}

impl KernelFamily for Ipv4 {
    const SUFFIX: &'static str = "4";
}

impl KernelFamily for Ipv6 {
    const SUFFIX: &'static str = "6";
}

/// The loaded programs and their maps, for one family.
pub struct Kernel<F: KernelFamily> {
    programs: Programs,
    runs: Runs,
    has_xdp: bool,
    frontends: TypedMap<FrontendKey<F::Address>, Frontend>,
    services: TypedMap<u32, Service>,
    slots: TypedMap<u32, Slot>,
    backends: TypedMap<u32, Backend<F::Address>>,
    settings: TypedMap<u32, SettingsPair>,
    devices: TypedMap<u32, Device>,
    ranges: TypedMap<RangeKey<F::Address>, u32>,
    sources: TypedMap<SourceKey<F::Address>, F::Address>,
    nodes: TypedMap<F::Address, u32>,
    seed: TypedMap<u32, FlowSeed>,
    flows: FlowTable<F::Address>,
    time_shift: u32,
    /// By how many ticks entries are older than the times of flows say, which have a larger unit.
    remainder: u32,
    fragments: TypedMap<FragmentKey<F::Address>, Fragment>,
    affinity: TypedMap<AffinityKey, Affinity>,
    counters: PerCpuCounters,
    /// What the counters were when they were last looked at.
    counted: RefCell<Vec<u64>>,
    /// Whether they are that still.
    is_balanced: bool,
    /// What the last frame quotes, if it is an ICMP error that was translated.
    quoted: Cell<Option<Tuple<F::Address>>>,
}

impl<F: KernelFamily> Kernel<F> {
    /// Loads the object.
    ///
    /// # Errors
    /// Those of [`Programs::load`].
    pub fn load() -> Result<Self> {
        Self::with_places(FLOWS)
    }

    /// Loads the object with so many places for flows, a multiple of 8.
    ///
    /// # Errors
    /// Those of [`Programs::load`].
    pub fn with_places(places: u32) -> Result<Self> {
        let sizes = [ENTRIES, &flows::sizes([places; 2])].concat();
        let programs = Programs::load(&sizes)?;
        flows::write_seed(|name| programs.descriptor(name), [places; 2])?;
        // Before the counters are read: this too is counted.
        let runs = programs.runs();
        let counters = programs.counters()?;
        let name = |map: &str| format!("{map}{}", F::SUFFIX);
        Ok(Self {
            frontends: programs.map(&name("FRONTENDS"))?,
            services: programs.map("SERVICES")?,
            slots: programs.map("SLOTS")?,
            backends: programs.map(&name("BACKENDS"))?,
            settings: programs.map("SETTINGS")?,
            devices: programs.map("DEVICES")?,
            ranges: programs.map(&name("RANGES"))?,
            sources: programs.map(&name("SOURCES"))?,
            nodes: programs.map(&name("NODES"))?,
            seed: programs.map(SEED)?,
            flows: flows::open(|name| programs.descriptor(name))?,
            time_shift: 0,
            remainder: 0,
            fragments: programs.map(&name("FRAGMENTS"))?,
            affinity: programs.map("AFFINITY")?,
            counted: RefCell::new(counters.sums()?),
            counters,
            runs,
            programs,
            quoted: Cell::new(None),
            has_xdp: false,
            is_balanced: false,
        })
    }

    /// The programs and their table of flows, for tests that run them on several threads.
    pub fn into_parts(self) -> (Programs, FlowTable<F::Address>) {
        (self.programs, self.flows)
    }

    /// Has what comes in by an external device go through XDP first.
    pub fn with_xdp(mut self) -> Self {
        self.has_xdp = true;
        self
    }

    /// Whether this kernel can run the programs as they would be at `site`.
    fn can_run(&self, site: TestSite) -> bool {
        match site {
            TestSite::ToDeviceForwarded | TestSite::ToDeviceReturned => self.runs.ingress,
            TestSite::FromDevice | TestSite::FromOtherDevice => !self.has_xdp || self.runs.xdp,
            TestSite::FromPod | TestSite::ToPod | TestSite::ToDevice | TestSite::Loopback => true,
        }
    }

    /// Puts a frame through XDP; gives the frame and, unless XDP leaves it to tc, its fate.
    fn run_xdp(&self, site: TestSite, before: &[u8]) -> Result<ByXdp<F>> {
        const DROP: i32 = 1;
        const PASS: i32 = 2;
        const TX: i32 = 3;
        let ran = self.programs.run_xdp(before, site.ifindex())?;
        let reason = self.moved(Hook::Xdp)?;
        let changed = ran.frame != before;
        let fate = match (ran.returned, changed) {
            (DROP, _) => Fate::Dropped,
            (PASS, false) => {
                let is_left = reason == Reason::LeftToTc;
                let passed = Outcome { reason, fate: Fate::Untouched };
                return Ok(((!is_left).then_some(passed), ran.frame));
            }
            (PASS, true) => Fate::Translated(checked::<F>(before, &ran.frame, 0)?),
            (TX, true) if ran.frame.len() > before.len() => {
                Fate::Encapsulated(encapsulated::<F>(before, &ran.frame)?)
            }
            (TX, true) => Fate::Forwarded(checked::<F>(before, &ran.frame, 1)?),
            other => anyhow::bail!("no such verdict of XDP: {other:?}"),
        };
        Ok((Some(Outcome { reason, fate }), ran.frame))
    }

    /// Puts a frame through the programs at `site`; says what became of it and how the
    /// frame left.
    ///
    /// # Errors
    /// A sentence, where a program broke a promise.
    pub fn run(&self, site: TestSite, frame: &[u8]) -> Result<(Outcome<F::Address>, Vec<u8>)> {
        let before = addressed(site, frame);
        let (outcome, mut after) = self.run_addressed(site, &before)?;
        if before != frame && after.starts_with(&mac(site.ifindex())) {
            after[..6].copy_from_slice(&frame[..6]);
        }
        Ok((outcome, after))
    }

    fn run_addressed(
        &self,
        site: TestSite,
        before: &[u8],
    ) -> Result<(Outcome<F::Address>, Vec<u8>)> {
        if !self.has_xdp || !matches!(site, TestSite::FromDevice | TestSite::FromOtherDevice) {
            return self.run_tc(site, before);
        }
        let (by_xdp, frame) = self.run_xdp(site, before).with_context(|| format!("{site:?}"))?;
        match by_xdp {
            None => self.run_tc(site, before),
            Some(Outcome { reason, fate: fate @ (Fate::Untouched | Fate::Translated(_)) }) => {
                let (by_tc, after) = self.run_tc(site, &frame)?;
                ensure!(by_tc.fate == Fate::Untouched && after == frame, "XDP and tc: {by_tc:?}");
                Ok((Outcome { reason, fate }, after))
            }
            Some(outcome) => Ok((outcome, frame)),
        }
    }

    /// Puts a frame through the tc program at `site`.
    ///
    /// # Errors
    /// A sentence, where the program broke a promise.
    fn run_tc(&self, site: TestSite, before: &[u8]) -> Result<(Outcome<F::Address>, Vec<u8>)> {
        let hook = site.hook();
        let ingress = if self.runs.ingress { site.ingress_ifindex() } else { 0 };
        let ran = self.programs.run(hook.name(), before, site.ifindex(), ingress)?;
        let reason = self.moved(hook)?;
        self.quoted.set(None);
        let fate = fate::<F>(site, reason, before, &ran, &self.quoted)
            .with_context(|| format!("{reason:?} at {site:?}, returned {}", ran.returned))?;
        Ok((Outcome { reason, fate }, ran.frame))
    }

    /// The one reason that was counted since the last frame, at `hook`; [`Kernel::balance`]
    /// asks whether other hooks' were, as not every kernel reads all of them at once.
    fn moved(&self, hook: Hook) -> Result<Reason> {
        let mut counted = self.counted.borrow_mut();
        let mut moved = Vec::new();
        for &reason in Reason::ALL {
            let index = hook as u32 * REASONS_PER_HOOK + reason as u32;
            let after = self.counters.sum(index)?;
            let before = std::mem::replace(&mut counted[index as usize], after);
            if after != before {
                moved.push((reason, after - before));
            }
        }
        match moved[..] {
            [(reason, 1)] => Ok(reason),
            _ => anyhow::bail!("not one counter moved once, but (reason, times): {moved:?}"),
        }
    }

    /// Whether no counter moved but those that were looked at, after each frame.
    fn balance(&self) -> Result<()> {
        let now = self.counters.sums()?;
        ensure!(now.len() == COUNTERS as usize, "COUNTERS has {} entries", now.len());
        let counted = self.counted.borrow();
        let moved: Vec<_> = (0..now.len()).filter(|index| now[*index] != counted[*index]).collect();
        ensure!(moved.is_empty(), "counted at another hook than the frame's: {moved:?}");
        Ok(())
    }
}

/// The frame with the MAC of the device that receives it, unless it has that of another host.
fn addressed(site: TestSite, frame: &[u8]) -> Cow<'_, [u8]> {
    let is_received = matches!(site, TestSite::FromDevice | TestSite::FromOtherDevice);
    if !is_received || !frame.starts_with(&MACS[..6]) {
        return frame.into();
    }
    [&mac(site.ifindex()), &frame[6..]].concat().into()
}

/// What XDP made of a frame, unless it left it to tc, and the frame.
type ByXdp<F> = (Option<Outcome<<F as Family>::Address>>, Vec<u8>);

fn entries<K: Pod, V: Pod>(map: &TypedMap<K, V>) -> Vec<(K, V)> {
    let mut entries = Vec::new();
    map.visit(|keys, values| {
        entries.extend(keys.iter().copied().zip(values.iter().copied()));
        true
    })
    .expect("a map of the test can be read");
    entries
}

/// Not in a batch: kernels before 5.13 read none of a trie.
fn clear<K: Pod, V: Pod>(map: &TypedMap<K, V>) {
    for key in map.keys().expect("the keys of a map of the test can be read") {
        map.remove(&key).expect("an entry can be removed");
    }
}

fn fill<V: Pod>(map: &TypedMap<u32, V>, values: &[V]) {
    assert!(values.len() <= map.max_entries() as usize, "the map of the test is too small");
    for (index, value) in (0..).zip(values) {
        map.set(&index, value).expect("an entry can be set");
    }
}

/// Makes entries older by `ticks`: to the programs it is as if the time had passed.
fn age<K: Pod, V: Pod>(map: &TypedMap<K, V>, last_seen: impl Fn(&mut V) -> &mut u32, ticks: u32) {
    for (key, mut value) in entries(map) {
        let seen = last_seen(&mut value);
        *seen = seen.wrapping_sub(ticks);
        map.set(&key, &value).expect("an entry can be set");
    }
}

impl<F: KernelFamily> Interpreter<F> for Kernel<F> {
    fn reset(&mut self) {
        if !self.is_balanced {
            let counted = self.counters.sums().expect("the counters can be read");
            self.counted.replace(counted);
        }
        self.is_balanced = false;
        flows::clear(&self.flows);
        self.remainder = 0;
        clear(&self.fragments);
        clear(&self.affinity);
        clear(&self.frontends);
        clear(&self.ranges);
        clear(&self.sources);
        clear(&self.nodes);
    }

    fn load(&mut self, world: &World<F>) {
        for (key, _) in entries(&self.frontends) {
            if !world.frontends.iter().any(|(wanted, _)| *wanted == key) {
                self.frontends.remove(&key).expect("a frontend can be removed");
            }
        }
        let pair =
            SettingsPair { active: 1, zero: 0, copies: [Default::default(), world.settings] };
        fill(&self.settings, &[pair]);
        self.time_shift = world.settings.time_shift;
        let mut devices = world.devices.clone();
        devices.resize(16, Device::default());
        fill(&self.devices, &devices);
        fill(&self.services, &world.services);
        fill(&self.slots, &world.slots);
        fill(&self.backends, &world.backends);
        for (key, frontend) in &world.frontends {
            self.frontends.set(key, frontend).expect("a frontend can be set");
        }
        for node in &world.nodes {
            self.nodes.set(node, &1).expect("a node can be set");
        }
        for (service, range) in &world.ranges {
            let length = range.mask.words().iter().map(|word| word.count_ones()).sum();
            let key = RangeKey::new(*service, range.address, length);
            self.ranges.set(&key, &1).expect("a range can be set");
        }
        for (prefix, source) in &world.sources {
            let prefix_length = prefix.mask.words().iter().map(|word| word.count_ones()).sum();
            let key = SourceKey { prefix_length, address: prefix.address };
            self.sources.set(&key, source).expect("a source can be set");
        }
    }

    fn send(&mut self, site: TestSite, frame: &[u8]) -> Outcome<F::Address> {
        if !self.can_run(site) {
            std::panic::panic_any(Untestable);
        }
        match Kernel::<F>::run(self, site, frame) {
            Ok((outcome, _)) => outcome,
            Err(error) => panic!("{error:#}"),
        }
    }

    fn finish(&mut self) {
        if let Err(error) = self.balance() {
            panic!("{error:#}");
        }
        self.is_balanced = true;
    }

    fn quoted(&self) -> Option<Tuple<F::Address>> {
        self.quoted.get()
    }

    fn advance(&mut self, ticks: u32) {
        self.remainder += ticks;
        flows::age(&self.flows, self.remainder >> self.time_shift);
        self.remainder &= (1 << self.time_shift) - 1;
        age(&self.fragments, |fragment| &mut fragment.last_seen, ticks);
        age(&self.affinity, |affinity| &mut affinity.last_seen, ticks);
        flows::begin_period(&self.seed).expect("the seed is there");
    }

    fn flows(&mut self) -> FlowEntries<F::Address> {
        flows::entries(&self.flows)
    }

    fn remove_flow(&mut self, key: &FlowKey<F::Address>) {
        let flow = self.flows.find(key, Direction::Request).expect("the flow is there");
        assert!(self.flows.remove_unchanged(&flow), "nobody else removes it");
    }

    fn affinities(&mut self) -> Vec<(AffinityKey, Affinity)> {
        entries(&self.affinity)
    }

    fn lookups(&self) -> Option<Lookups> {
        None
    }
}
