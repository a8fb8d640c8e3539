//! The table of flows under two threads in every order of their steps, with at most
//! [`PREEMPTIONS`] changes from one to the other that it need not make, and in every order in which
//! their words become visible: `RUSTFLAGS="--cfg loom" cargo test -p lb-testing --test loom
//! --release`.
#![cfg(loom)]

use lb_common::{
    abi::{
        address::{Address4, Ipv4},
        flow::CONFIRMED,
        flow_table::Direction::{Reply, Request},
        settings::Lifetimes,
    },
    balance::track,
    flow_table::{note, remove},
};
use lb_testing::{
    flow_table::{
        HostTable,
        invariants::{Contents, check},
        numbered::Numbered,
    },
    world::timeouts,
};
use loom::{model::Builder, sync::Arc, thread};

const PREEMPTIONS: usize = 2;

/// A table of one or two buckets, and how long flows live.
struct World {
    table: HostTable,
    lifetimes: Lifetimes,
}

impl World {
    fn insert(&self, flow: Numbered) -> bool {
        flow.insert::<Ipv4>(&self.table, 0, &self.lifetimes).is_ok()
    }

    fn remove(&self, flow: Numbered) -> bool {
        let found = flow.find::<Ipv4>(&self.table, Request);
        found.is_some_and(|found| remove::<Address4, _>(&self.table, &found))
    }

    fn confirm(&self, flow: Numbered) -> bool {
        let found = flow.find::<Ipv4>(&self.table, Reply);
        found.is_some_and(|found| note::<Address4, _>(&self.table, &found, 0, CONFIRMED, 0))
    }

    fn is_found(&self, flow: Numbered) -> bool {
        flow.find::<Ipv4>(&self.table, Request).is_some()
    }
}

/// Runs `one` and `other` at the same time on a table that has `known`, in every order. The table is
/// in order after that, and `judge` has what they returned. Where a flow may be in two buckets, it
/// belongs to each of them as well as to the other.
fn model<T: Send + 'static, U: Send + 'static>(
    known: &'static [Numbered],
    one: fn(&World) -> T,
    other: fn(&World) -> U,
    judge: fn(&World, T, U, Contents),
) {
    for buckets in [1, 2] {
        model_of(buckets, known, one, other, judge);
    }
}

/// The same on a table with so many buckets.
fn model_of<T: Send + 'static, U: Send + 'static>(
    buckets: u32,
    known: &'static [Numbered],
    one: fn(&World) -> T,
    other: fn(&World) -> U,
    judge: fn(&World, T, U, Contents),
) {
    let mut builder = Builder::new();
    builder.preemption_bound = Some(PREEMPTIONS);
    builder.max_branches = 100_000;
    builder.check(move || {
        let lifetimes = track::lifetimes(&timeouts());
        let world = Arc::new(World { table: HostTable::new(buckets), lifetimes });
        for flow in known {
            assert!(world.insert(*flow), "{flow:?} is new");
        }
        let of_thread = world.clone();
        let thread = thread::spawn(move || other(&of_thread));
        let one = one(&world);
        let other = thread.join().expect("the thread ends");
        let entry_at = |place| world.table.entry_at(place);
        let contents =
            check::<Address4, _>(&world.table, entry_at).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!((contents.unfinished, contents.void), (0, 0), "words that belong to no flow");
        judge(&world, one, other, contents);
    });
}

const fn flow(client: u8, service: u8, backend: u8) -> Numbered {
    Numbered { client, service, backend }
}

const KNOWN: [Numbered; 1] = [flow(1, 1, 1)];

#[test]
fn of_two_flows_with_one_request_exactly_one_is_inserted() {
    let (one, other) =
        (|world: &World| world.insert(flow(1, 1, 1)), |world: &World| world.insert(flow(1, 1, 2)));
    model(&[], one, other, |_, one, other, contents| {
        assert!(one != other, "{one} {other}");
        assert_eq!(contents.live, 1);
    });
}

#[test]
fn of_two_flows_with_one_reply_exactly_one_is_inserted() {
    let (one, other) =
        (|world: &World| world.insert(flow(1, 1, 1)), |world: &World| world.insert(flow(1, 2, 1)));
    model(&[], one, other, |_, one, other, contents| {
        assert!(one != other, "{one} {other}");
        assert_eq!(contents.live, 1);
    });
}

#[test]
fn a_flow_that_is_inserted_twice_is_inserted_once() {
    let insert = |world: &World| world.insert(flow(1, 1, 1));
    model(&[], insert, insert, |_, one, other, contents| {
        assert!(one != other, "{one} {other}");
        assert_eq!(contents.live, 1);
    });
}

#[test]
fn a_flow_is_found_while_another_is_inserted_and_removed() {
    let one = |world: &World| (world.is_found(flow(1, 1, 1)), world.confirm(flow(1, 1, 1)));
    let other = |world: &World| world.insert(flow(2, 1, 1)) && world.remove(flow(2, 1, 1));
    model(&KNOWN, one, other, |_, one, other, contents| {
        assert_eq!((one, other, contents.live), ((true, true), true, 1));
    });
}

#[test]
fn what_is_read_of_a_flow_is_of_one_flow_when_another_follows() {
    let one = |world: &World| (world.confirm(flow(1, 1, 1)), world.is_found(flow(1, 1, 1)));
    let other = |world: &World| world.remove(flow(1, 1, 1)) && world.insert(flow(1, 1, 2));
    model(&KNOWN, one, other, |world, _, other, contents| {
        assert!(other && world.is_found(flow(1, 1, 2)));
        assert_eq!(contents.live, 1);
    });
}

#[test]
fn a_flow_that_is_removed_twice_is_removed_once() {
    let remove = |world: &World| world.remove(flow(1, 1, 1));
    model(&KNOWN, remove, remove, |_, one, other, contents| {
        assert!(one != other, "{one} {other}");
        assert_eq!(contents.live, 0);
    });
}

/// As many flows as there are places.
const ALL_PLACES: [Numbered; 8] = [
    flow(1, 1, 1),
    flow(2, 1, 1),
    flow(3, 1, 1),
    flow(4, 1, 1),
    flow(5, 1, 1),
    flow(6, 1, 1),
    flow(7, 1, 1),
    flow(8, 1, 1),
];

#[test]
fn two_flows_that_need_the_same_place_leave_the_table_in_order() {
    let (one, other) = (
        |world: &World| world.insert(flow(10, 1, 1)),
        |world: &World| world.insert(flow(11, 1, 1)),
    );
    model_of(1, &ALL_PLACES, one, other, |world, one, other, contents| {
        assert!(one || other);
        assert!(!one || world.is_found(flow(10, 1, 1)) || other);
        assert!(contents.live >= 7, "{contents:?}");
    });
}

#[test]
fn a_flow_whose_place_is_taken_is_gone_or_is_noted() {
    let one = |world: &World| world.insert(flow(10, 1, 1));
    let other = |world: &World| world.confirm(flow(8, 1, 1));
    model_of(1, &ALL_PLACES, one, other, |world, one, other, contents| {
        assert!(one && world.is_found(flow(10, 1, 1)) && contents.live == 8);
        assert!(other || !world.is_found(flow(8, 1, 1)));
    });
}
