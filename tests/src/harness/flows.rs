//! The second interpreter of the flow rows: the loaded programs, run on frames in a network
//! namespace of their own.
//!
//! Beside what a row asks for it holds every frame to what no row repeats: bytes that must
//! not change, checksums over the whole, MACs of what is redirected, and exactly one
//! counter.

use std::borrow::Cow;
use std::cell::{Cell, RefCell};

use anyhow::{Context, Result, ensure};
use bytemuck::Pod;
use lb_common::abi::address::{Address, Family, Ipv4, Ipv6};
use lb_common::abi::affinity::{Affinity, AffinityKey};
use lb_common::abi::backend::Backend;
use lb_common::abi::counter::{COUNTERS, Hook, REASONS_PER_HOOK, Reason};
use lb_common::abi::flow::{Flow, FlowKey, Tuple};
use lb_common::abi::fragment::{Fragment, FragmentKey};
use lb_common::abi::frontend::{Frontend, FrontendKey};
use lb_common::abi::range::RangeKey;
use lb_common::abi::service::{Service, Slot};
use lb_common::abi::settings::{Device, SettingsPair};
use lb_common::balance::{Answer, FlowTable};
use lb_common::packet::{Kind, Packet};
use lb_sys::{PerCpuCounters, TypedMap};
use lb_testing::bench::{End, FlowEntries, Lab, Outcome, Place, Untestable};
use lb_testing::family::TestFamily;
use lb_testing::frame::{self, MACS};
use lb_testing::tables::Lookups;
use lb_testing::tunnel;
use lb_testing::world::{EXTERNAL, EXTERNAL_TOO, World, mac};

use crate::harness::programs::{GATEWAY_MAC, MOVED_GATEWAY_MAC, Programs, Ran, Runs};

/// Sizes of the maps of a test: room for every row, quickly read and cleared.
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
    ("FLOWS4", 4096),
    ("FLOWS6", 4096),
    ("EMBRYONIC4", 4096),
    ("EMBRYONIC6", 4096),
    ("FRAGMENTS4", 1024),
    ("FRAGMENTS6", 1024),
    ("AFFINITY", 1024),
];

/// A family whose maps are known.
pub trait KernelFamily: TestFamily {
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
    nodes: TypedMap<F::Address, u32>,
    flows: TypedMap<FlowKey<F::Address>, Flow<F::Address>>,
    embryonic: TypedMap<FlowKey<F::Address>, Flow<F::Address>>,
    fragments: TypedMap<FragmentKey<F::Address>, Fragment>,
    affinity: TypedMap<AffinityKey, Affinity>,
    counters: PerCpuCounters,
    /// What the counters were when they were last looked at.
    counted: RefCell<Vec<u64>>,
    /// What the last frame quotes, if it is an ICMP error that was translated.
    quoted: Cell<Option<Tuple<F::Address>>>,
}

impl<F: KernelFamily> Kernel<F> {
    /// Loads the object.
    ///
    /// # Errors
    /// Those of [`Programs::load`].
    pub fn load() -> Result<Self> {
        let programs = Programs::load(ENTRIES)?;
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
            nodes: programs.map(&name("NODES"))?,
            flows: programs.map(&name("FLOWS"))?,
            embryonic: programs.map(&name("EMBRYONIC"))?,
            fragments: programs.map(&name("FRAGMENTS"))?,
            affinity: programs.map("AFFINITY")?,
            counted: RefCell::new(counters.sums()?),
            counters,
            runs,
            programs,
            quoted: Cell::new(None),
            has_xdp: false,
        })
    }

    fn table(&self, table: FlowTable) -> &TypedMap<FlowKey<F::Address>, Flow<F::Address>> {
        match table {
            FlowTable::Flows => &self.flows,
            FlowTable::Embryonic => &self.embryonic,
        }
    }

    /// Has what comes in by an external device go through XDP first.
    pub fn with_xdp(mut self) -> Self {
        self.has_xdp = true;
        self
    }

    /// Whether this kernel can run the programs as they would be at `place`.
    fn can_run(&self, place: Place) -> bool {
        match place {
            Place::ToDeviceForwarded => self.runs.ingress,
            Place::FromDevice | Place::FromOtherDevice => !self.has_xdp || self.runs.xdp,
            Place::FromPod | Place::ToPod | Place::ToDevice | Place::Loopback => true,
        }
    }

    /// Puts a frame through XDP; gives the frame and, unless that is left to tc, its end.
    fn run_xdp(&self, place: Place, before: &[u8]) -> Result<ByXdp<F>> {
        const DROP: i32 = 1;
        const PASS: i32 = 2;
        const TX: i32 = 3;
        let ran = self.programs.run_xdp(before, place.ifindex())?;
        let reason = self.moved(Hook::Xdp)?;
        let changed = ran.frame != before;
        let end = match (ran.returned, changed) {
            (DROP, _) => End::Dropped,
            (PASS, false) => {
                let is_left = reason == Reason::LeftToTc;
                let passed = Outcome { reason, end: End::Untouched };
                return Ok(((!is_left).then_some(passed), ran.frame));
            }
            (PASS, true) => End::Onward(checked::<F>(before, &ran.frame, 0)?),
            (TX, true) if ran.frame.len() > before.len() => {
                End::Tunnelled(wrapped::<F>(before, &ran.frame)?)
            }
            (TX, true) => End::Forwarded(checked::<F>(before, &ran.frame, 1)?),
            other => anyhow::bail!("no such verdict of XDP: {other:?}"),
        };
        Ok((Some(Outcome { reason, end }), ran.frame))
    }

    /// Puts a frame through the programs at `place`; says what became of it and how the
    /// frame left.
    ///
    /// # Errors
    /// A sentence, where a program broke a promise.
    pub fn run(&self, place: Place, before: &[u8]) -> Result<(Outcome<F::Address>, Vec<u8>)> {
        if !self.has_xdp || !matches!(place, Place::FromDevice | Place::FromOtherDevice) {
            return self.run_tc(place, before);
        }
        let (by_xdp, frame) = self.run_xdp(place, before).with_context(|| format!("{place:?}"))?;
        match by_xdp {
            None => self.run_tc(place, before),
            Some(Outcome { reason, end: end @ (End::Untouched | End::Onward(_)) }) => {
                let (by_tc, after) = self.run_tc(place, &frame)?;
                ensure!(by_tc.end == End::Untouched && after == frame, "XDP and tc: {by_tc:?}");
                Ok((Outcome { reason, end }, after))
            }
            Some(outcome) => Ok((outcome, frame)),
        }
    }

    /// Puts a frame through the tc program at `place`.
    ///
    /// # Errors
    /// A sentence, where the program broke a promise.
    fn run_tc(&self, place: Place, before: &[u8]) -> Result<(Outcome<F::Address>, Vec<u8>)> {
        let hook = place.hook();
        let ingress = if self.runs.ingress { place.ingress_ifindex() } else { 0 };
        let ran = self.programs.run(hook.name(), before, place.ifindex(), ingress)?;
        let reason = self.moved(hook)?;
        self.quoted.set(None);
        let end = end::<F>(place, reason, before, &ran, &self.quoted)
            .with_context(|| format!("{reason:?} at {place:?}, returned {}", ran.returned))?;
        Ok((Outcome { reason, end }, ran.frame))
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

/// What XDP made of a frame, unless it left it to tc, and the frame.
type ByXdp<F> = (Option<Outcome<<F as Family>::Address>>, Vec<u8>);

/// The addresses and ports of a frame that was rewritten, held to what else must not change.
fn checked<F: TestFamily>(before: &[u8], after: &[u8], hops: u8) -> Result<Tuple<F::Address>> {
    let before = &inside::<F>(before, after)[..];
    let mut packet = Packet::<F>::default();
    F::parse(before, &mut packet).context("a frame without addresses was changed")?;
    let tuple = tuple_of::<F>(after, usize::from(packet.transport));
    frame::check_rewrite(before, after, &packet, &tuple, hops).map_err(anyhow::Error::msg)?;
    let macs = &after[..MACS.len()];
    let is_right = if hops == 0 { macs == &before[..12] } else { is_to_gateway(macs) };
    ensure!(is_right, "the MACs became {macs:02x?}");
    Ok(tuple)
}

/// The frame as it came, without the tunnel that it came in if `after` is without it.
fn inside<'a, F: TestFamily>(before: &'a [u8], after: &[u8]) -> Cow<'a, [u8]> {
    match after.len() + tunnel::length::<F>() == before.len() {
        true => tunnel::unwrapped::<F>(before).into(),
        false => before.into(),
    }
}

/// The ends of the tunnel that a frame was put into.
fn wrapped<F: TestFamily>(before: &[u8], after: &[u8]) -> Result<Tuple<F::Address>> {
    let [source, destination] =
        tunnel::check_wrapped::<F>(before, after).map_err(anyhow::Error::msg)?;
    let macs = &after[..MACS.len()];
    ensure!(is_to_gateway(macs) || macs == &before[..12], "MACs {macs:02x?}");
    Ok(Tuple { source, destination, ..Tuple::default() })
}

/// Whether these are the MACs of a frame that goes to the gateway of the tests.
fn is_to_gateway(macs: &[u8]) -> bool {
    [GATEWAY_MAC, MOVED_GATEWAY_MAC].iter().any(|gateway| macs[..6] == gateway[..])
        && macs[6..] == mac(EXTERNAL)
}

/// What became of a frame, told from what came out of the program.
fn end<F: TestFamily>(
    place: Place,
    reason: Reason,
    before: &[u8],
    ran: &Ran,
    quoted: &Cell<Option<Tuple<F::Address>>>,
) -> Result<End<F::Address>> {
    const NEXT: i32 = -1;
    const SHOT: i32 = 2;
    const REDIRECT: i32 = 7;
    let after = &ran.frame[..];
    if ran.returned == SHOT {
        return Ok(End::Dropped);
    }
    // What a later fragment of a request to this node's own port carries stays as it is.
    let is_of_flow = matches!(reason, Reason::Request | Reason::Reply);
    if ran.returned == NEXT && after == before && !is_of_flow {
        return Ok(End::Untouched);
    }
    ensure!([NEXT, REDIRECT].contains(&ran.returned), "no such verdict");
    let is_request =
        matches!(reason, Reason::FlowCreated | Reason::Request | Reason::IcmpTranslated);
    if is_request && after.len() == before.len() + tunnel::length::<F>() {
        return wrapped::<F>(before, after).map(End::Tunnelled);
    }
    let before = if is_request { inside::<F>(before, after) } else { before.into() };
    let before = &before[..];
    let mut packet = Packet::<F>::default();
    F::parse(before, &mut packet).context("a frame without addresses was changed")?;
    let macs = &after[..MACS.len()];
    let swapped = [&before[6..12], &before[..6]].concat();
    let into = |to: [u8; 6]| macs[..6] == to && macs[6..] == before[6..12];
    let says = |result: Result<(), String>| result.map_err(anyhow::Error::msg);
    if let Some(answer) = answer(reason, &packet) {
        says(frame::check_answer(before, after, &packet, answer))?;
        ensure!(ran.returned == REDIRECT, "an answer that is not sent back");
        let right = match place {
            Place::FromPod | Place::FromDevice | Place::FromOtherDevice => macs == swapped,
            Place::Loopback => into([0; 6]),
            _ => into(mac(EXTERNAL)),
        };
        ensure!(right, "the answer's MACs are {macs:02x?}");
        return Ok(End::Answered(answer));
    }
    let hops = before[F::HOPS].wrapping_sub(after[F::HOPS]);
    let tuple = if packet.kind == Kind::Fragment {
        let [source, destination] = frame::addresses::<F>(after);
        let tuple = Tuple { source, destination, ..Tuple::default() };
        says(frame::check_rewrite(before, after, &packet, &tuple, hops))?;
        tuple
    } else if reason == Reason::IcmpTranslated {
        let [outer, inner] =
            frame::check_error(before, after, &packet, hops).map_err(anyhow::Error::msg)?;
        quoted.set(Some(inner));
        outer
    } else if let Some(clamped) = tunnel::clamped(before, after, &packet) {
        let tuple = tuple_of::<F>(after, usize::from(packet.transport));
        says(frame::check_rewrite(&clamped, after, &packet, &tuple, hops))?;
        ensure!(ran.returned == NEXT && hops == 0, "a smaller segment size on another way");
        return Ok(End::Clamped(tuple));
    } else {
        let tuple = tuple_of::<F>(after, usize::from(packet.transport));
        says(frame::check_rewrite(before, after, &packet, &tuple, hops))?;
        tuple
    };
    ensure!(hops == 0 || hops == 1 && ran.returned == REDIRECT, "{hops} hops were taken");
    Ok(match ran.returned {
        NEXT => {
            ensure!(macs == &before[..12], "the MACs became {macs:02x?}");
            End::Onward(tuple)
        }
        _ if hops == 1 => {
            ensure!(is_to_gateway(macs) || macs == &before[..12], "MACs {macs:02x?}");
            End::Forwarded(tuple)
        }
        _ if macs == &before[..12] => End::Routed(tuple),
        _ if macs == swapped => End::Bounced(tuple),
        _ if into([0; 6]) => End::IntoLoopback(tuple),
        _ if into(mac(EXTERNAL)) => End::IntoDevice(tuple, EXTERNAL),
        _ if into(mac(EXTERNAL_TOO)) => End::IntoDevice(tuple, EXTERNAL_TOO),
        _ => anyhow::bail!("redirected with MACs {macs:02x?}"),
    })
}

/// Which answer a reason asks for.
fn answer<F: TestFamily>(reason: Reason, packet: &Packet<F>) -> Option<Answer> {
    const TCP: u8 = 6;
    match reason {
        Reason::EchoAnswered => Some(Answer::Echo),
        Reason::NoSuchProtocol => Some(Answer::ProtocolUnreachable),
        Reason::TtlExceeded => Some(Answer::TimeExceeded),
        Reason::NoEndpoint | Reason::NoSuchPort | Reason::NoSourcePort => {
            let is_tcp = packet.protocol() == TCP;
            Some(if is_tcp { Answer::Reset } else { Answer::PortUnreachable })
        }
        _ => None,
    }
}

fn tuple_of<F: TestFamily>(frame: &[u8], transport: usize) -> Tuple<F::Address> {
    use lb_common::abi::address::Be16;
    let [source, destination] = frame::addresses::<F>(frame);
    let port = |at: usize| Be16::new(u16::from_be_bytes([frame[at], frame[at + 1]]));
    let (source_port, destination_port) = (port(transport), port(transport + 2));
    Tuple { source, destination, source_port, destination_port }
}

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

impl<F: KernelFamily> Lab<F> for Kernel<F> {
    fn reset(&mut self) {
        if let Err(error) = self.balance() {
            panic!("the row before: {error:#}");
        }
        clear(&self.flows);
        clear(&self.embryonic);
        clear(&self.fragments);
        clear(&self.affinity);
        clear(&self.frontends);
        clear(&self.ranges);
        clear(&self.nodes);
    }

    fn load(&mut self, world: &World<F>) {
        for (key, _) in entries(&self.frontends) {
            if !world.frontends.iter().any(|(wanted, _)| *wanted == key) {
                self.frontends.remove(&key).expect("a front end can be removed");
            }
        }
        let pair =
            SettingsPair { active: 1, zero: 0, copies: [Default::default(), world.settings] };
        fill(&self.settings, &[pair]);
        let mut devices = world.devices.clone();
        devices.resize(16, Device::default());
        fill(&self.devices, &devices);
        fill(&self.services, &world.services);
        fill(&self.slots, &world.slots);
        fill(&self.backends, &world.backends);
        for (key, frontend) in &world.frontends {
            self.frontends.set(key, frontend).expect("a front end can be set");
        }
        for node in &world.nodes {
            self.nodes.set(node, &1).expect("a node can be set");
        }
        for (service, range) in &world.ranges {
            let length = range.mask.words().iter().map(|word| word.count_ones()).sum();
            let key = RangeKey::new(*service, range.address, length);
            self.ranges.set(&key, &1).expect("a range can be set");
        }
    }

    fn send(&mut self, place: Place, frame: &[u8]) -> Outcome<F::Address> {
        if !self.can_run(place) {
            std::panic::panic_any(Untestable);
        }
        match Kernel::<F>::run(self, place, frame) {
            Ok((outcome, _)) => outcome,
            Err(error) => panic!("{error:#}"),
        }
    }

    fn quoted(&self) -> Option<Tuple<F::Address>> {
        self.quoted.get()
    }

    fn pass(&mut self, ticks: u32) {
        age(&self.flows, |flow| &mut flow.last_seen, ticks);
        age(&self.embryonic, |flow| &mut flow.last_seen, ticks);
        age(&self.fragments, |fragment| &mut fragment.last_seen, ticks);
        age(&self.affinity, |affinity| &mut affinity.last_seen, ticks);
    }

    fn flows(&mut self, table: FlowTable) -> FlowEntries<F::Address> {
        entries(self.table(table))
    }

    fn remove_flow(&mut self, table: FlowTable, key: &FlowKey<F::Address>) {
        self.table(table).remove(key).expect("an entry can be removed");
    }

    fn affinities(&mut self) -> Vec<(AffinityKey, Affinity)> {
        entries(&self.affinity)
    }

    fn lookups(&self) -> Option<Lookups> {
        None
    }
}
