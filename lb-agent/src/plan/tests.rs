use std::collections::{BTreeMap, BTreeSet, HashMap};

use lb_common::abi::backend::{IN_CLUSTER_SET, IN_LOCAL_SET};
use proptest::prelude::*;

use super::*;
use crate::{
    dataplane::{Capacity, Dataplane, fake::Fake},
    desired::{DesiredBackend, DesiredPort},
    execute::perform,
};

const GRACE: u64 = 100;

const ROOMY: Capacity = Capacity {
    services: 64,
    slots: 512,
    backends4: 256,
    backends6: 256,
    frontends4: 64,
    frontends6: 64,
};

/// Too small for most states.
const TIGHT: Capacity =
    Capacity { services: 7, slots: 24, backends4: 16, backends6: 12, frontends4: 5, frontends6: 4 };

type State = BTreeMap<Arc<str>, DesiredService>;

/// What tells service ports apart.
type PortName = (Arc<str>, PortKey);

/// What a client finds: no front end, or a service port.
type Answer = Option<PortName>;

/// A random Service: which number its address has, and for each port whether clients
/// are kept on the node, and of each possible backend the sets (0: not there).
type Recipe = (u8, Vec<(bool, u32, Vec<u8>)>);

fn recipes() -> impl Strategy<Value = Vec<Option<Recipe>>> {
    let sets = prop_oneof![3 => Just(0u8), 1 => Just(1), 2 => Just(2), 1 => Just(3), 1 => Just(4)];
    let port = (any::<bool>(), 0u32..2, prop::collection::vec(sets, 0..14));
    let service = (0u8..6, prop::collection::vec(port, 1..4));
    prop::collection::vec(prop::option::weighted(0.8, service), 1..5)
}

/// No two Services have the same front end: the first one gets it.
fn state(recipes: &[Option<Recipe>]) -> State {
    let mut taken = BTreeSet::new();
    let mut state = State::new();
    for (number, recipe) in recipes.iter().enumerate() {
        let Some((address, ports)) = recipe else { continue };
        if !taken.insert(*address) {
            continue;
        }
        let mut desired = DesiredService::default();
        for family in [IpFamily::V4, IpFamily::V6] {
            let ip = ip(family, 200, *address);
            for (port_number, port) in ports.iter().enumerate() {
                desired.ports.push(port_of(family, ip, number as u8, port_number as u8, port));
            }
            desired.ports.push(DesiredPort {
                key: PortKey { family, protocol: 0, port: "".into() },
                frontends: vec![FrontendAddress { ip, port: 0, protocol: 0 }],
                kind: FrontendKind::CLUSTER_IP_ADDRESS,
                affinity_seconds: 0,
                flags: Service::ADDRESS,
                has_backend: !ports.is_empty(),
                backends: Vec::new(),
            });
        }
        desired.ports.sort_by(|a, b| a.key.cmp(&b.key));
        state.insert(format!("ns/s{number}").into(), desired);
    }
    state
}

fn ip(family: IpFamily, high: u8, low: u8) -> IpAddr {
    match family {
        IpFamily::V4 => [10, high, 0, low].into(),
        IpFamily::V6 => [0xfd00, high.into(), 0, 0, 0, 0, 0, low.into()].into(),
    }
}

fn port_of(
    family: IpFamily,
    ip_of_service: IpAddr,
    service: u8,
    number: u8,
    (is_local, affinity_seconds, sets): &(bool, u32, Vec<u8>),
) -> DesiredPort {
    let backend = |(at, sets): (usize, &u8)| {
        let allowed = if *is_local { 3 } else { IN_CLUSTER_SET };
        (*sets != 0).then_some(DesiredBackend {
            ip: ip(family, service * 16 + number, at as u8 + 1),
            port: 8080,
            sets: sets & allowed,
            flags: sets & 1,
        })
    };
    DesiredPort {
        key: PortKey { family, protocol: 6, port: format!("p{number}").into() },
        frontends: vec![FrontendAddress {
            ip: ip_of_service,
            port: 80 + u16::from(number),
            protocol: 6,
        }],
        kind: FrontendKind::CLUSTER_IP,
        affinity_seconds: *affinity_seconds,
        flags: if *is_local { Service::INTERNAL_LOCAL } else { 0 },
        has_backend: false,
        backends: sets.iter().enumerate().filter_map(backend).collect(),
    }
}

/// Plans from what is programmed to `state`; `programmed` becomes what fits.
fn plan(planner: &mut Planner, state: &State, programmed: &mut State, now: u64) -> Plan {
    let mut draft = planner.begin();
    planner.reclaim(&mut draft, now);
    let names: BTreeSet<Arc<str>> = state.keys().chain(planner.names()).cloned().collect();
    let (gone, wanted): (Vec<_>, Vec<_>) =
        names.into_iter().partition(|name| !state.contains_key(name));
    for name in gone.iter().chain(&wanted) {
        match (planner.program(&mut draft, name, state.get(name)), state.get(name)) {
            (Ok(()), Some(desired)) => {
                programmed.insert(Arc::clone(name), desired.clone());
            }
            (Ok(()), None) => {
                programmed.remove(name);
            }
            (Err(shortage), _) => assert_eq!(&shortage.service, name),
        }
    }
    planner.finish(draft)
}

/// The ops of a plan, with one slot for each op that stores slots.
fn steps(plan: &Plan) -> Vec<Op> {
    let mut steps = Vec::new();
    for op in &plan.ops {
        match &op.action {
            Action::StoreSlots { start, backends } => {
                steps.extend((*start..).zip(backends).map(|(start, id)| Op {
                    owner: op.owner,
                    action: Action::StoreSlots { start, backends: vec![*id] },
                }));
            }
            _ => steps.push(op.clone()),
        }
    }
    steps
}

fn answers(port: &DesiredPort) -> BTreeSet<(IpAddr, u16)> {
    let bit = if port.flags & Service::INTERNAL_LOCAL != 0 { IN_LOCAL_SET } else { IN_CLUSTER_SET };
    let serving = port.backends.iter().filter(|backend| backend.sets & bit != 0);
    serving.map(DesiredBackend::address).collect()
}

/// The answers that each front end may give while states follow each other: it leads to
/// a service port as it was, or as it will be.
#[derive(Default)]
struct Allowed {
    answers: HashMap<FrontendAddress, Vec<Answer>>,
    backends: HashMap<PortName, Vec<BTreeSet<(IpAddr, u16)>>>,
    /// All backends that serve anybody.
    serving: HashMap<PortName, BTreeSet<(IpAddr, u16)>>,
    states: usize,
}

impl Allowed {
    fn add(&mut self, state: &State) {
        for (name, service) in state {
            for port in &service.ports {
                let name = (Arc::clone(name), port.key.clone());
                self.backends.entry(name.clone()).or_default().push(answers(port));
                let serving = port.backends.iter().filter(|backend| backend.sets != 0);
                let known = self.serving.entry(name.clone()).or_default();
                known.extend(serving.map(DesiredBackend::address));
                for frontend in &port.frontends {
                    let new = || vec![None; self.states];
                    self.answers.entry(*frontend).or_insert_with(new).push(Some(name.clone()));
                }
            }
        }
        self.states += 1;
        for list in self.answers.values_mut().filter(|list| list.len() < self.states) {
            list.push(None);
        }
    }

    /// The sets of backends that a front end may lead to.
    fn sets(&self, frontend: &FrontendAddress) -> Vec<&BTreeSet<(IpAddr, u16)>> {
        self.answers[frontend].iter().flatten().flat_map(|name| &self.backends[name]).collect()
    }
}

/// The maps at the four moments when one packet reads them.
struct Reads<'a> {
    frontends: &'a Fake,
    services: &'a Fake,
    slots: &'a Fake,
    backends: &'a Fake,
}

impl<'a> Reads<'a> {
    fn at_once(fake: &'a Fake) -> Self {
        Self { frontends: fake, services: fake, slots: fake, backends: fake }
    }

    fn frontend(&self, frontend: &FrontendAddress) -> Option<u32> {
        let port = lb_common::abi::address::Be16::new(frontend.port);
        let key4 = |ip| lb_common::abi::frontend::FrontendKey::new(ip, port, frontend.protocol);
        match frontend.ip {
            IpAddr::V4(ip) => self.frontends.frontends4.get(&key4(ip.into())).map(|it| it.service),
            IpAddr::V6(ip) => {
                let key =
                    lb_common::abi::frontend::FrontendKey::new(ip.into(), port, frontend.protocol);
                self.frontends.frontends6.get(&key).map(|it| it.service)
            }
        }
    }

    /// The backends that a packet may be given, with ids and generations.
    fn choices(&self, frontend: &FrontendAddress) -> Option<Vec<(u32, BackendEntry)>> {
        let index = self.frontend(frontend)? as usize;
        let entry = self.services.services[index];
        if entry.flags & Service::ADDRESS != 0 {
            return Some(Vec::new());
        }
        let is_local = entry.flags & Service::INTERNAL_LOCAL != 0;
        let range = if is_local { entry.local } else { entry.cluster };
        let slots = (range.start()..).take(range.length() as usize);
        let choice = |slot: u32| {
            let id = self.slots.slots[slot as usize];
            (id, backend(self.backends, frontend.ip, id))
        };
        Some(slots.map(choice).collect())
    }
}

fn backend(fake: &Fake, family: IpAddr, id: u32) -> BackendEntry {
    let (ip, port, generation, sets, flags, service) = match family {
        IpAddr::V4(_) => {
            let it = fake.backends4[id as usize];
            let ip = std::net::Ipv4Addr::from(it.address);
            (ip.into(), it.port, it.generation, it.sets, it.flags, it.service)
        }
        IpAddr::V6(_) => {
            let it = fake.backends6[id as usize];
            let ip = std::net::Ipv6Addr::from(it.address);
            (ip.into(), it.port, it.generation, it.sets, it.flags, it.service)
        }
    };
    BackendEntry { ip, port: port.get(), generation, sets, flags, service }
}

/// What flows noted, so that a generation never stands for two backends.
type Noted = HashMap<(bool, u32, u16), (IpAddr, u16)>;

fn check(
    reads: &Reads<'_>,
    allowed: &Allowed,
    noted: &mut Noted,
    is_at_once: bool,
) -> Result<(), TestCaseError> {
    for frontend in allowed.answers.keys().copied() {
        let Some(choices) = reads.choices(&frontend) else {
            prop_assert!(allowed.answers[&frontend].contains(&None), "{frontend:?} is gone");
            continue;
        };
        let sets = allowed.sets(&frontend);
        prop_assert!(!sets.is_empty(), "{frontend:?} should not be there");
        let may_be_empty = sets.iter().any(|set| set.is_empty());
        prop_assert!(may_be_empty || !choices.is_empty(), "{frontend:?} has no backend");
        // A packet that saw the old policy may find a set as it is now.
        let backends: BTreeSet<_> = if is_at_once {
            sets.into_iter().flatten().collect()
        } else {
            let names = allowed.answers[&frontend].iter().flatten();
            names.flat_map(|name| &allowed.serving[name]).collect()
        };
        let index = reads.frontend(&frontend);
        for (id, entry) in choices {
            let address = (entry.ip, entry.port);
            prop_assert!(backends.contains(&address), "{frontend:?} leads to {address:?}");
            let first = *noted.entry((entry.ip.is_ipv4(), id, entry.generation)).or_insert(address);
            prop_assert_eq!(first, address, "generation {} of {}", entry.generation, id);
            prop_assert_eq!(Some(entry.service), index, "backend {} of {:?}", id, frontend);
            prop_assert!(!is_at_once || entry.sets != 0, "backend {id} is eligible for nobody");
        }
    }
    Ok(())
}

/// Everything that the maps mean, without the numbers that were chosen for it.
fn meaning(fake: &Fake, state: &State) -> BTreeMap<FrontendAddress, String> {
    let mut meaning = BTreeMap::new();
    let frontends =
        state.values().flat_map(|service| &service.ports).flat_map(|port| &port.frontends);
    for frontend in frontends {
        let Some(index) = Reads::at_once(fake).frontend(frontend) else { continue };
        let (entry, name) = (fake.services[index as usize], fake.names[index as usize]);
        let members = |range: SlotRange| -> BTreeSet<_> {
            let slots = (range.start()..).take(range.length() as usize);
            slots
                .map(|slot| fake.slots[slot as usize])
                .map(|id| {
                    let it = backend(fake, frontend.ip, id);
                    (it.ip, it.port, it.sets, it.flags)
                })
                .collect()
        };
        let sets = if entry.flags & Service::ADDRESS != 0 {
            (BTreeSet::new(), BTreeSet::new())
        } else {
            (members(entry.cluster), members(entry.local))
        };
        let lengths = (entry.cluster.length(), entry.local.length());
        let text = String::from_utf8_lossy(&name.text[..name.length.into()]).into_owned();
        let rest = (name.family, name.protocol, entry.affinity_seconds, entry.flags);
        meaning.insert(*frontend, format!("{text} {rest:?} {lengths:?} {sets:?}"));
    }
    meaning
}

/// As if nothing had been there before.
fn programmed_afresh(state: &State) -> Fake {
    let mut fake = Fake::new(ROOMY);
    let mut planner = adopt(&fake);
    for op in &plan(&mut planner, state, &mut State::new(), 0).ops {
        perform(op, &mut fake).expect("no op fails");
    }
    fake
}

fn adopt(fake: &Fake) -> Planner {
    let state = fake.read_state().expect("a fake can be read");
    Planner::adopt(&state, fake.capacity(), GRACE)
}

/// Goes through all states, op by op, with packets on the way.
fn walk(
    capacity: Capacity,
    states: &[State],
    pauses: &[u64],
    moments: &[prop::sample::Index],
) -> Result<(), TestCaseError> {
    let mut fake = Fake::new(capacity);
    let mut planner = adopt(&fake);
    let mut programmed = State::new();
    let mut noted = Noted::new();
    let mut now = 0;
    let mut moments = moments.iter().cycle();
    for (state, pause) in states.iter().zip(pauses.iter().cycle()) {
        let mut allowed = Allowed::default();
        allowed.add(&programmed);
        let plan = plan(&mut planner, state, &mut programmed, now);
        allowed.add(&programmed);
        let mut history = vec![fake.clone()];
        for op in steps(&plan) {
            perform(&op, &mut fake).expect("no op fails");
            check(&Reads::at_once(&fake), &allowed, &mut noted, true)?;
            history.push(fake.clone());
        }
        for _ in 0..20 {
            let mut at = [0; 4].map(|_| moments.next().map_or(0, |at| at.index(history.len())));
            at.sort_unstable();
            let [frontends, services, slots, backends] = at.map(|at| &history[at]);
            check(&Reads { frontends, services, slots, backends }, &allowed, &mut noted, false)?;
        }
        now += pause;
    }
    Ok(())
}

fn pauses() -> impl Strategy<Value = Vec<u64>> {
    prop::collection::vec(prop_oneof![Just(1), Just(60), Just(250)], 1..4)
}

fn moments() -> impl Strategy<Value = Vec<prop::sample::Index>> {
    prop::collection::vec(any::<prop::sample::Index>(), 16..64)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 160, ..ProptestConfig::default() })]

    #[test]
    fn every_prefix_answers_as_before_or_after(
        recipes in prop::collection::vec(recipes(), 2..6),
        pauses in pauses(),
        moments in moments(),
    ) {
        let states: Vec<_> = recipes.iter().map(|recipes| state(recipes)).collect();
        walk(ROOMY, &states, &pauses, &moments)?;
    }

    #[test]
    fn maps_that_are_too_small_never_hold_half_a_service(
        recipes in prop::collection::vec(recipes(), 2..6),
        pauses in pauses(),
        moments in moments(),
    ) {
        let states: Vec<_> = recipes.iter().map(|recipes| state(recipes)).collect();
        walk(TIGHT, &states, &pauses, &moments)?;
    }

    #[test]
    fn a_restart_at_any_moment_ends_where_no_restart_would(
        before in recipes(),
        between in recipes(),
        after in recipes(),
        cut in any::<prop::sample::Index>(),
    ) {
        let states = [state(&before), state(&between), state(&after)];
        let mut fake = Fake::new(ROOMY);
        let mut planner = adopt(&fake);
        let mut programmed = State::new();
        for op in &plan(&mut planner, &states[0], &mut programmed, 0).ops {
            perform(op, &mut fake).expect("no op fails");
        }
        let mut allowed = Allowed::default();
        allowed.add(&states[0]);
        allowed.add(&states[1]);
        allowed.add(&states[2]);
        let mut noted = Noted::new();
        let steps_between = steps(&plan(&mut planner, &states[1], &mut programmed, 1));
        for op in &steps_between[..cut.index(steps_between.len() + 1)] {
            perform(op, &mut fake).expect("no op fails");
            check(&Reads::at_once(&fake), &allowed, &mut noted, true)?;
        }
        let mut planner = adopt(&fake);
        for op in steps(&plan(&mut planner, &states[2], &mut programmed, 0)) {
            perform(&op, &mut fake).expect("no op fails");
            check(&Reads::at_once(&fake), &allowed, &mut noted, true)?;
        }
        let expected = programmed_afresh(&states[2]);
        prop_assert_eq!(meaning(&fake, &states[2]), meaning(&expected, &states[2]));
        prop_assert_eq!(&fake.frontends4.len(), &expected.frontends4.len());
        prop_assert_eq!(&fake.frontends6.len(), &expected.frontends6.len());
        for now in [GRACE, 2 * GRACE] {
            for op in &plan(&mut planner, &states[2], &mut programmed, now).ops {
                perform(op, &mut fake).expect("no op fails");
            }
        }
        let mut planner = adopt(&fake);
        prop_assert_eq!(planner.counts().backends, backends_of(&states[2]));
        prop_assert_eq!(plan(&mut planner, &states[2], &mut programmed, 0), Plan::default());
    }
}

fn backends_of(state: &State) -> usize {
    state.values().flat_map(|service| &service.ports).map(|port| port.backends.len()).sum()
}

fn service_of(backends: &[u8]) -> State {
    let sets = (0..250).map(|at| u8::from(backends.contains(&at))).collect();
    let mut state = state(&[Some((1, vec![(false, 0, sets)]))]);
    for service in state.values_mut() {
        service.ports.retain(|port| port.key.family == IpFamily::V4);
    }
    state
}

/// The ops by phase, as a reader would want to see them.
#[track_caller]
fn check_ops(from: &[u8], to: &[u8], expected: &[&str]) {
    let mut planner = adopt(&Fake::new(ROOMY));
    let mut programmed = State::new();
    plan(&mut planner, &service_of(from), &mut programmed, 0);
    let plan = plan(&mut planner, &service_of(to), &mut programmed, 1);
    let text = |op: &Op| match &op.action {
        Action::StoreBackend { id, entry } => {
            format!("backend {id} generation {} sets {}", entry.generation, entry.sets)
        }
        Action::StoreSlots { start, backends } => format!("slots {start} {backends:?}"),
        Action::PublishCluster(range) => format!("cluster {} {}", range.start(), range.length()),
        other => format!("{other:?}"),
    };
    assert_eq!(plan.ops.iter().map(text).collect::<Vec<_>>(), expected);
}

#[test]
fn one_endpoint_more_is_three_writes() {
    check_ops(
        &[0, 1],
        &[0, 1, 2],
        &["backend 3 generation 0 sets 1", "slots 2 [3]", "cluster 0 3"],
    );
}

#[test]
fn one_endpoint_less_is_three_writes() {
    check_ops(
        &[0, 1, 2],
        &[1, 2],
        &["slots 0 [3]", "cluster 0 2", "backend 1 generation 1 sets 0"],
    );
    check_ops(&[0, 1, 2], &[0, 1], &["cluster 0 2", "backend 3 generation 1 sets 0"]);
}

#[test]
fn one_endpoint_for_another_is_three_writes() {
    let expected =
        ["backend 3 generation 0 sets 1", "slots 0 [3]", "backend 1 generation 1 sets 0"];
    check_ops(&[0, 1], &[1, 2], &expected);
}

#[test]
fn a_set_that_outgrows_its_block_moves_as_a_whole() {
    let expected = [
        "backend 3 generation 0 sets 1",
        "backend 4 generation 0 sets 1",
        "backend 5 generation 0 sets 1",
        "slots 8 [1, 2, 3, 4, 5]",
        "cluster 8 5",
    ];
    check_ops(&[0, 1], &[0, 1, 2, 3, 4], &expected);
}

#[test]
fn the_last_endpoint_leaves_an_empty_set() {
    let mut planner = adopt(&Fake::new(ROOMY));
    let mut programmed = State::new();
    plan(&mut planner, &service_of(&[0]), &mut programmed, 0);
    let plan = plan(&mut planner, &service_of(&[]), &mut programmed, 1);
    let published: Vec<_> =
        plan.ops.iter().filter(|op| matches!(op.action, Action::PublishCluster(_))).collect();
    assert!(matches!(published[..], [Op { action: Action::PublishCluster(SlotRange::EMPTY), .. }]));
}

#[test]
fn the_same_state_gives_an_empty_plan() {
    let mut planner = adopt(&Fake::new(ROOMY));
    let mut programmed = State::new();
    let state = service_of(&[1, 5, 7]);
    assert_ne!(plan(&mut planner, &state, &mut programmed, 0), Plan::default());
    assert_eq!(plan(&mut planner, &state, &mut programmed, 1), Plan::default());
}
