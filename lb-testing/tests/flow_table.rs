//! The table of flows under several threads at once: a table so small that each flow is always in
//! another's way. `tests/loom.rs` goes through all orders of fewer steps.
#![cfg(not(loom))]

use std::{
    sync::{
        Barrier, Mutex,
        atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering::SeqCst},
    },
    thread,
};

use lb_common::{
    abi::{
        address::{Ipv4, Ipv6},
        affinity::AffinityKey,
        flow::{ANSWERED, CONFIRMED, FlowKey},
        flow_table::Direction,
        frontend::TCP,
    },
    balance::track,
    flow_table::{Found, find_reply, find_request, note, remove, spread},
};
use lb_testing::{
    family::TestFamily,
    flow_table::{
        HostTable,
        invariants::{Contents, check},
        numbered::Numbered,
        seed,
    },
    random::Random,
    world::timeouts,
};

const BUCKETS: u32 = 2;
const THREADS: u64 = 4;

fn random_flow(random: &mut Random, clients: usize) -> Numbered {
    Numbered {
        client: 1 + random.below(clients) as u8,
        service: 1 + random.below(3) as u8,
        backend: 1 + random.below(3) as u8,
    }
}

fn check_all<F: TestFamily>(table: &HostTable) -> Contents {
    check::<F::Address, _>(table, |place| table.entry_at(place))
        .unwrap_or_else(|error| panic!("{error}"))
}

fn remove_found<F: TestFamily>(table: &HostTable, found: &Found<u32>) -> bool {
    remove::<F::Address, _>(table, found)
}

/// Does random things to the table, and returns how many flows were inserted.
fn disturb<F: TestFamily>(table: &HostTable, thread: u64, steps: u32, clients: usize) -> u32 {
    let (mut random, lifetimes) = (Random::new(thread + 1), track::lifetimes(&timeouts()));
    let mut inserted = 0;
    for now in 0..steps {
        let flow = random_flow(&mut random, clients);
        let direction = if random.below(2) == 0 { Direction::Request } else { Direction::Reply };
        match random.below(8) {
            0..3 => inserted += u32::from(flow.insert::<F>(table, now, &lifetimes).is_ok()),
            action => {
                let Some(found) = flow.find::<F>(table, direction) else { continue };
                match action {
                    3..5 => {}
                    5..7 => _ = note::<F::Address, _>(table, &found, 0, ANSWERED | CONFIRMED, now),
                    _ => _ = remove_found::<F>(table, &found),
                }
            }
        }
    }
    inserted
}

/// Runs threads that change a table, and checks it all the time and once they have ended.
fn stress<F: TestFamily>(steps: u32, clients: usize) {
    let table = HostTable::new(BUCKETS);
    let is_over = AtomicBool::new(false);
    let (inserted, checks) = thread::scope(|scope| {
        let start = |thread| {
            let table = &table;
            scope.spawn(move || disturb::<F>(table, thread, steps, clients))
        };
        let threads: Vec<_> = (0..THREADS).map(start).collect();
        let checker = scope.spawn(|| {
            let mut checks = 0;
            while !is_over.load(SeqCst) {
                check_all::<F>(&table);
                checks += 1;
            }
            checks
        });
        // Before any of them fails the test: the checker waits for it.
        let ended: Vec<_> = threads.into_iter().map(|thread| thread.join()).collect();
        is_over.store(true, SeqCst);
        let inserted: u32 = ended.into_iter().map(|ended| ended.expect("a flow is one flow")).sum();
        (inserted, checker.join().expect("the table is in order all the time"))
    });
    assert!(inserted > steps / 100 && checks > 0, "{inserted} flows inserted, {checks} checks");
    let Contents { unfinished, void, .. } = check_all::<F>(&table);
    assert_eq!((unfinished, void), (0, 0), "words that belong to no flow");
}

#[test]
fn flows_that_take_each_others_places_leave_the_table_in_order() {
    stress::<Ipv4>(200_000, 16);
    stress::<Ipv6>(100_000, 16);
}

#[test]
fn flows_with_the_same_requests_and_replies_leave_the_table_in_order() {
    stress::<Ipv4>(200_000, 2);
    stress::<Ipv6>(100_000, 2);
}

/// More have no use: an insertion fails if there are more words with its tag.
const RACERS: usize = 3;

/// Threads insert flows with the same request or the same reply at the same time, again and again.
/// Returns how often none of them was inserted, one, and so on.
fn race<F: TestFamily>(rounds: u32, flow: impl Fn(u8) -> Numbered) -> [u32; RACERS + 1] {
    let (table, lifetimes) = (HostTable::new(BUCKETS), track::lifetimes(&timeouts()));
    let (barrier, inserted) = (Barrier::new(RACERS), AtomicUsize::new(0));
    let counts = [const { AtomicU32::new(0) }; RACERS + 1];
    let errors = Mutex::new(Vec::new());
    let is_removed = |flow: Numbered| {
        let found = flow.find::<F>(&table, Direction::Reply);
        found.is_some_and(|found| remove_found::<F>(&table, &found))
    };
    // No thread panics: the others would wait for it.
    let fail = |error| errors.lock().expect("no thread panics").push(error);
    let insert = |flow: Numbered| {
        for round in 0..rounds {
            barrier.wait();
            let result = flow.insert::<F>(&table, round, &lifetimes);
            inserted.fetch_add(result.is_ok().into(), SeqCst);
            if barrier.wait().is_leader() {
                counts[inserted.swap(0, SeqCst)].fetch_add(1, SeqCst);
                check::<F::Address, _>(&table, |place| table.entry_at(place))
                    .err()
                    .into_iter()
                    .for_each(fail);
            }
            barrier.wait();
            if result.is_ok() && !is_removed(flow) {
                fail(format!("round {round}: {flow:?} is gone"));
            }
        }
    };
    thread::scope(|scope| {
        for flow in (0..RACERS).map(|racer| flow(racer as u8)) {
            scope.spawn(move || insert(flow));
        }
    });
    let errors = errors.into_inner().expect("no thread panics");
    assert!(errors.is_empty(), "{} errors, first {:?}", errors.len(), errors[0]);
    assert_eq!(check_all::<F>(&table), Contents::default());
    counts.map(AtomicU32::into_inner)
}

#[test]
fn of_flows_with_one_request_exactly_one_is_inserted() {
    let counts = race::<Ipv4>(20_000, |racer| Numbered { client: 1, service: 1, backend: racer });
    assert_eq!(counts, [0, 20_000, 0, 0], "rounds by how many were inserted");
}

#[test]
fn of_flows_with_one_reply_exactly_one_is_inserted() {
    let counts = race::<Ipv4>(20_000, |racer| Numbered { client: 1, service: racer, backend: 1 });
    assert_eq!(counts, [0, 20_000, 0, 0], "rounds by how many were inserted");
}

#[test]
fn a_flow_is_found_while_others_come_and_go_beside_it() {
    const ROUNDS: u32 = 50_000;
    let (table, lifetimes) = (HostTable::new(BUCKETS), track::lifetimes(&timeouts()));
    let come_and_go = |client| {
        let flow = Numbered { client, service: 1, backend: 1 };
        let mut inserted = 0;
        for round in 0..ROUNDS {
            if flow.insert::<Ipv4>(&table, 0, &lifetimes).is_err() {
                continue;
            }
            inserted += 1;
            let by_request = flow.find::<Ipv4>(&table, Direction::Request);
            let by_reply = flow.find::<Ipv4>(&table, Direction::Reply);
            assert!(by_request.is_some() && by_request == by_reply, "{round}: {by_reply:?}");
            assert!(remove_found::<Ipv4>(&table, &by_request.expect("found")), "{round}");
        }
        inserted
    };
    let inserted: Vec<u32> = thread::scope(|scope| {
        let start = |client| scope.spawn(move || come_and_go(client));
        let threads: Vec<_> = (1..=THREADS as u8).map(start).collect();
        threads.into_iter().map(|thread| thread.join().expect("its flow is found")).collect()
    });
    // Where others take the chosen word twice, a flow is not inserted.
    assert!(inserted.iter().all(|inserted| *inserted > ROUNDS / 2), "{inserted:?}");
    assert_eq!(check_all::<Ipv4>(&table), Contents::default());
}

/// In a table that is full twice over every flow that is live is found in both directions.
fn all_are_found<F: TestFamily>() {
    let (table, lifetimes) = (HostTable::new(1 << 10), track::lifetimes(&timeouts()));
    for number in 0..16 << 10 {
        let [.., service, client] = u32::to_be_bytes(number);
        let flow = Numbered { client, service, backend: service };
        _ = flow.insert::<F>(&table, 0, &lifetimes);
    }
    let live = table.live::<F::Address>();
    assert!(live.len() > 7 << 10, "{} flows", live.len());
    for (place, _, entry) in live {
        let request = FlowKey { tuple: entry.request, protocol: TCP.into() };
        let reply = FlowKey { tuple: entry.translated.reversed(), protocol: TCP.into() };
        let found = [find_request(&table, &request), find_reply(&table, &reply)];
        let places = found.map(|found| found.map(|found| found.place));
        assert_eq!(places, [Some(place); 2], "{entry:?}");
    }
}

#[test]
fn every_flow_of_a_full_table_is_found() {
    all_are_found::<Ipv4>();
    all_are_found::<Ipv6>();
}

/// A client chooses anew in every period, for each service port by itself.
#[test]
fn clients_do_not_choose_in_step() {
    let seed = seed([1; 2]);
    let choice = |service, period| {
        let key = AffinityKey { service, ..AffinityKey::default() };
        spread(&key, period, &seed) >> 31
    };
    let choices = |period| (0..64).map(move |service| choice(service, period));
    let in_step = |one: u32, other| {
        choices(one).zip(choices(other)).filter(|(one, other)| one == other).count()
    };
    for period in 1..100 {
        let alternating =
            choices(period).zip(choices(period).skip(1)).filter(|(one, next)| one == next);
        for same in [alternating.count(), in_step(period, period + 1)] {
            // 32, and five standard deviations.
            assert!((12..=52).contains(&same), "period {period}: {same} of 64");
        }
    }
}
