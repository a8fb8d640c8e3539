mod packet;
mod sizes;

use std::collections::{BTreeMap, BTreeSet};

use lb_common::abi::{backend::IN_CLUSTER_SET, frontend::FrontendKind};
use proptest::prelude::*;

use super::*;
use crate::{
    dataplane::{Capacity, Dataplane, fake::Fake},
    desired::{DesiredBackend, DesiredPort, frontends},
    execute::perform,
};
use packet::{Allowed, Noted, Reads, check, meaning};

const GRACE: u64 = 100;

const ROOMY: Capacity = Capacity {
    services: 64,
    slots: 512,
    backends4: 256,
    backends6: 256,
    frontends4: 64,
    frontends6: 64,
    ranges4: 64,
    ranges6: 64,
    nodes4: 64,
    nodes6: 64,
};

/// Too small for most states.
const TIGHT: Capacity = Capacity {
    services: 7,
    slots: 24,
    backends4: 16,
    backends6: 12,
    frontends4: 5,
    frontends6: 4,
    ranges4: 3,
    ranges6: 2,
    nodes4: 2,
    nodes6: 2,
};

type State = BTreeMap<Arc<str>, DesiredService>;

/// A random Service: which number its address has, and its ports.
type Recipe = (u8, Vec<PortRecipe>);

/// Whether clients inside are kept on the node, seconds of affinity, of each possible
/// backend the sets (0: not there), and the addresses for clients outside.
type PortRecipe = (bool, u32, Vec<u8>, Outside);

/// The kind of the address outside if there is one, which ranges of clients it is for (0:
/// everybody), whether clients outside are kept on the node, and whether their packets are
/// encapsulated.
type Outside = (Option<FrontendKind>, u8, bool, bool);

fn recipes() -> impl Strategy<Value = Vec<Option<Recipe>>> {
    let sets = prop_oneof![3 => Just(0u8), 1 => Just(1), 2 => Just(2), 1 => Just(3), 1 => Just(4)];
    let kind = prop_oneof![Just(FrontendKind::EXTERNAL), Just(FrontendKind::NODE_PORT)];
    let outside = (prop::option::of(kind), 0u8..4, any::<bool>(), any::<bool>());
    let port = (any::<bool>(), 0u32..2, prop::collection::vec(sets, 0..14), outside);
    let service = (0u8..6, prop::collection::vec(port, 1..4));
    prop::collection::vec(prop::option::weighted(0.8, service), 1..5)
}

/// No two Services have the same frontend: the first one gets it.
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
                frontends: vec![frontends::of_address(ip)],
                ranges: Arc::default(),
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

/// The ranges of clients with this number.
fn ranges(family: IpFamily, number: u8) -> Vec<IpNet> {
    let length = if family == IpFamily::V4 { 16 } else { 32 };
    let range = |bit: u8| IpNet::new(ip(family, 100 + bit, 0), length).expect("a prefix");
    (0..2).filter(|bit| number & 1 << bit != 0).map(range).collect()
}

fn port_of(
    family: IpFamily,
    ip_of_service: IpAddr,
    service: u8,
    number: u8,
    (is_local, affinity_seconds, sets, outside): &PortRecipe,
) -> DesiredPort {
    let flag = |is_set: bool, flag| if is_set { flag } else { 0 };
    let (outside, clients, is_outside_local, is_dsr) = outside;
    let flags = flag(*is_local, Service::INTERNAL_LOCAL)
        | flag(*is_outside_local, Service::EXTERNAL_LOCAL)
        | flag(*is_dsr, Service::DSR);
    let backend = |(at, sets): (usize, &u8)| {
        let has_local = outside.is_some() || flags & !Service::DSR != 0;
        let allowed = if has_local { 3 } else { IN_CLUSTER_SET };
        (*sets != 0).then_some(DesiredBackend {
            ip: ip(family, service * 16 + number, at as u8 + 1),
            port: 8080,
            sets: sets & allowed,
            flags: sets & 1,
            node: (sets & 2 != 0).then(|| ip(family, 50, *sets)),
        })
    };
    let at = FrontendAddress { ip: ip_of_service, port: 80 + u16::from(number), protocol: 6 };
    let mut frontends = vec![DesiredFrontend { at, kind: FrontendKind::CLUSTER_IP, flags: 0 }];
    frontends.extend(outside.map(|kind| DesiredFrontend {
        at: FrontendAddress { port: at.port + 30_000, ..at },
        kind,
        flags: if *clients != 0 { Frontend::RANGED } else { 0 },
    }));
    DesiredPort {
        key: PortKey { family, protocol: 6, port: format!("p{number}").into() },
        frontends,
        ranges: if outside.is_some() { ranges(family, *clients) } else { Vec::new() }.into(),
        affinity_seconds: *affinity_seconds,
        flags,
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
        match (planner.plan(&mut draft, name, state.get(name)), state.get(name)) {
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
        match &op.write {
            Write::StoreSlots { start, backends } => {
                steps.extend((*start..).zip(backends).map(|(start, id)| Op {
                    owner: op.owner,
                    write: Write::StoreSlots { start, backends: vec![*id] },
                }));
            }
            _ => steps.push(op.clone()),
        }
    }
    steps
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
        let ranges = |fake: &Fake| fake.ranges4.len() + fake.ranges6.len();
        prop_assert_eq!(ranges(&fake), ranges(&expected));
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
    let mut state = state(&[Some((1, vec![(false, 0, sets, (None, 0, false, false))]))]);
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
    let text = |op: &Op| match &op.write {
        Write::StoreBackend { id, entry } => {
            format!("backend {id} generation {} sets {}", entry.generation, entry.sets)
        }
        Write::StoreSlots { start, backends } => format!("slots {start} {backends:?}"),
        Write::PublishCluster(range) => format!("cluster {} {}", range.start(), range.length()),
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
fn another_address_of_a_backend_s_node_is_one_write_in_place() {
    let mut planner = adopt(&Fake::new(ROOMY));
    let mut programmed = State::new();
    let on = |last: u8| {
        let mut state = service_of(&[0, 1]);
        let ports = state.values_mut().flat_map(|service| &mut service.ports);
        for backend in ports.flat_map(|port| &mut port.backends).skip(1) {
            backend.node = (last != 0).then(|| [192, 0, 2, last].into());
        }
        state
    };
    plan(&mut planner, &on(1), &mut programmed, 0);
    for last in [2, 0] {
        let ops = plan(&mut planner, &on(last), &mut programmed, 1).ops;
        let [Op { write: Write::StoreBackend { id: 2, entry }, .. }] = ops[..] else {
            panic!("{ops:?}");
        };
        let node = (last != 0).then(|| [192, 0, 2, last].into());
        assert_eq!((entry.generation, entry.sets, entry.node), (0, IN_CLUSTER_SET, node));
    }
}

/// What is added and what is deleted, and whether in this order; the last octets.
#[track_caller]
fn check_nodes(planner: &mut Planner, wanted: &[u8], expected: &[&str], left_out: usize) {
    let wanted = wanted.iter().map(|last| IpAddr::from([192, 0, 2, *last])).collect();
    let mut draft = planner.begin();
    assert_eq!(planner.store_nodes(&mut draft, &wanted), left_out);
    planner
        .store_settings(&mut draft, Settings { flags: wanted.len() as u32, ..Settings::default() });
    let text = |op: &Op| match &op.write {
        Write::InsertNode(IpAddr::V4(ip)) => format!("+{}", ip.octets()[3]),
        Write::DeleteNode(IpAddr::V4(ip)) => format!("-{}", ip.octets()[3]),
        Write::StoreSettings(_) => "settings".to_owned(),
        other => format!("{other:?}"),
    };
    assert_eq!(planner.finish(draft).ops.iter().map(text).collect::<Vec<_>>(), expected);
}

#[test]
fn addresses_of_nodes_come_first_and_go_last_unless_their_room_is_needed() {
    let mut planner = adopt(&Fake::new(Capacity { nodes4: 3, ..ROOMY }));
    check_nodes(&mut planner, &[1, 2], &["+1", "+2", "settings"], 0);
    check_nodes(&mut planner, &[2, 3], &["+3", "-1"], 0);
    check_nodes(&mut planner, &[3, 4, 5], &["-2", "+4", "+5", "settings"], 0);
    check_nodes(&mut planner, &[1, 3, 4, 5], &["settings"], 1);
    check_nodes(&mut planner, &[1, 3, 5], &["-4", "+1", "settings"], 0);
    check_nodes(&mut planner, &[], &["settings", "-1", "-3", "-5"], 0);
}

#[test]
fn addresses_of_nodes_are_adopted() {
    let mut fake = Fake::new(ROOMY);
    fake.nodes4.insert(std::net::Ipv4Addr::new(192, 0, 2, 1).into());
    fake.nodes4.insert(std::net::Ipv4Addr::new(192, 0, 2, 2).into());
    check_nodes(&mut adopt(&fake), &[2, 3], &["+3", "settings", "-1"], 0);
}

#[test]
fn the_last_endpoint_leaves_an_empty_set() {
    let mut planner = adopt(&Fake::new(ROOMY));
    let mut programmed = State::new();
    plan(&mut planner, &service_of(&[0]), &mut programmed, 0);
    let plan = plan(&mut planner, &service_of(&[]), &mut programmed, 1);
    let published: Vec<_> =
        plan.ops.iter().filter(|op| matches!(op.write, Write::PublishCluster(_))).collect();
    assert!(matches!(published[..], [Op { write: Write::PublishCluster(SlotRange::EMPTY), .. }]));
}

#[test]
fn the_same_state_gives_an_empty_plan() {
    let mut planner = adopt(&Fake::new(ROOMY));
    let mut programmed = State::new();
    let state = service_of(&[1, 5, 7]);
    assert_ne!(plan(&mut planner, &state, &mut programmed, 0), Plan::default());
    assert_eq!(plan(&mut planner, &state, &mut programmed, 1), Plan::default());
}

#[test]
fn an_address_opens_after_its_ports() {
    let mut planner = adopt(&Fake::new(ROOMY));
    let plan = plan(&mut planner, &service_of(&[0]), &mut State::new(), 0);
    let opened = plan.ops.iter().filter_map(|op| match &op.write {
        Write::UpsertFrontend { frontend, .. } => Some(frontend.at.protocol),
        _ => None,
    });
    // If the address came first, it would reject packets to the port until the port follows.
    assert_eq!(opened.collect::<Vec<_>>(), [6, 0]);
}
