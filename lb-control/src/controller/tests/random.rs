//! Random histories: whatever happened, in whatever order, and however many writes failed, the
//! maps end as those of a controller that has only ever seen the last state.
//!
//! `PROPTEST_CASES` sets the number of histories if it is more than 2,000. A million steps:
//! `PROPTEST_CASES=60000 cargo test --release -p lb-control random`.

mod dump;
mod world;

use proptest::prelude::*;

use super::*;
use crate::model::event::Unreadable;
use dump::{backends, check_settings, dump};
use world::{Draw, World};

/// Small maps: they are made anew for each history.
const SMALL: Capacity = Capacity {
    services: 128,
    slots: 1 << 10,
    backends4: 256,
    backends6: 256,
    frontends4: 512,
    frontends6: 512,
    ranges4: 64,
    ranges6: 64,
    nodes4: 16,
    nodes6: 16,
};

/// One thing that happens.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// A Service, slice, Node or ServiceCIDR is created or changed.
    Apply(ObjectKind, u8, Draw),
    /// It is deleted, whether there is one or not.
    Delete(ObjectKind, u8),
    /// It cannot be read any more.
    Unreadable(ObjectKind, u8),
    /// An event of before, so many ago, arrives once more: a duplicate, or an older version.
    Again(u8),
    /// All objects of the kind are listed, but for those in the mask, which are gone, and those in
    /// the second, which cannot be read.
    List(ObjectKind, u8, u8),
    /// What is known of the node changes.
    Facts(u8),
    /// So many milliseconds pass, and the maps are brought up to date; some writes fail.
    Reconcile(u16),
    /// The agent ends after half of its writes, and another one starts.
    Restart,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    use ObjectKind::{EndpointSlice, Node, Service, ServiceCidr};
    let kind = || prop_oneof![4 => Just(Service), 5 => Just(EndpointSlice), 1 => Just(Node), 1 => Just(ServiceCidr)];
    let number = || 0..6_u8;
    let step = prop_oneof![
        12 => (kind(), number(), any::<u32>()).prop_map(|(kind, number, bits)| Step::Apply(kind, number, Draw(bits))),
        4 => (kind(), number()).prop_map(|(kind, number)| Step::Delete(kind, number)),
        1 => (kind(), number()).prop_map(|(kind, number)| Step::Unreadable(kind, number)),
        2 => (0..8_u8).prop_map(Step::Again),
        2 => (kind(), any::<u8>(), any::<u8>()).prop_map(|(kind, gone, broken)| Step::List(kind, gone, broken & !gone & (broken >> 4))),
        1 => any::<u8>().prop_map(Step::Facts),
        8 => (0..1_500_u16).prop_map(Step::Reconcile),
        1 => Just(Step::Restart),
    ];
    prop::collection::vec(step, 1..32)
}

/// An agent, its maps, and what is true.
struct History {
    world: World,
    events: Vec<ObjectEvent>,
    controller: Controller,
    fake: Fake,
    facts: NodeFacts,
    now: u64,
}

impl History {
    fn new(seed: u64) -> Self {
        let mut fake = Fake::new(SMALL);
        fake.fail(10, seed);
        let world = World::default();
        let facts = world::facts(0);
        let controller = controller_of(&world, &facts);
        Self { world, events: Vec::new(), controller, fake, facts, now: 0 }
    }

    fn apply(&mut self, event: ObjectEvent) {
        self.world.apply(&event);
        self.controller.apply(event.clone());
        self.events.push(event);
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Apply(kind, number, draw) => {
                self.apply(ObjectEvent::Applied(world::object(kind, number, draw)));
            }
            Step::Delete(kind, number) => {
                self.apply(ObjectEvent::Deleted(kind, world::name(kind, number)));
            }
            Step::Unreadable(kind, number) => {
                self.apply(ObjectEvent::Unreadable(kind, world::unreadable(kind, number)));
            }
            Step::Again(back) => {
                let before = self.events.iter().rev().nth(back.into()).cloned();
                before.into_iter().for_each(|event| self.apply(event));
            }
            Step::List(kind, gone, broken) => {
                let is_in = |mask: u8, number: u8| mask & (1 << number) != 0;
                let numbers = || 0..world::COUNT;
                let objects = numbers().filter(|one| !is_in(gone | broken, *one));
                let objects = objects.filter_map(|one| self.world.get(kind, one)).collect();
                let broken = numbers().filter(|one| is_in(broken, *one));
                let broken: Vec<_> = broken.map(|one| world::unreadable(kind, one)).collect();
                self.apply(if broken.is_empty() {
                    ObjectEvent::Replaced(kind, objects)
                } else {
                    ObjectEvent::ReplacedExcept(kind, objects, broken)
                });
            }
            Step::Facts(bits) => {
                self.facts = world::facts(bits);
                self.controller.set_facts(self.facts.clone());
            }
            Step::Reconcile(time) => {
                self.now += u64::from(time);
                self.reconcile();
            }
            Step::Restart => {
                // Half of the writes are lost with the agent.
                self.fake.fail(50, self.now + 1);
                self.reconcile();
                self.fake.fail(10, self.now + 1);
                self.controller = controller_of(&self.world, &self.facts);
            }
        }
    }

    fn reconcile(&mut self) -> Outcome {
        self.controller.reconcile(self.now, &mut self.fake).expect("a fake can be read")
    }

    /// Nothing fails any more; reconciles until nothing is left to do.
    fn come_to_rest(&mut self) {
        self.fake.fail(0, 1);
        for _ in 0..100 {
            let outcome = self.reconcile();
            assert!(outcome.errors.is_empty(), "{:?}", outcome.errors);
            match outcome.next_due {
                _ if self.controller.has_changes() => {}
                Some(due) => self.now = self.now.max(due),
                None => return,
            }
        }
        panic!("it does not come to rest");
    }
}

/// A controller that has listed what is true.
fn controller_of(world: &World, facts: &NodeFacts) -> Controller {
    let limits = Limits { namespace_share: 100, ..Limits::default() };
    let expected = [ObjectKind::Node, ObjectKind::ServiceCidr];
    let mut controller = Controller::new("here", ExternalMode::Snat, expected).with_limits(limits);
    controller.set_facts(facts.clone());
    for kind in
        [ObjectKind::Service, ObjectKind::EndpointSlice, ObjectKind::Node, ObjectKind::ServiceCidr]
    {
        let objects = (0..world::COUNT).filter_map(|number| world.get(kind, number));
        controller.apply(ObjectEvent::Replaced(kind, objects.collect()));
    }
    controller
}

/// What the controller publishes besides the maps.
fn published(controller: &Controller) -> impl PartialEq + std::fmt::Debug + use<> {
    (
        controller.conflicts().collect::<Vec<_>>(),
        controller.counts(),
        controller.health_checks().clone(),
        controller.no_local_endpoints().of_families().collect::<Vec<_>>(),
        controller.uses_direct_return(),
        controller.shortages().count(),
    )
}

fn check(steps: &[Step], seed: u64) {
    let mut history = History::new(seed);
    for step in steps {
        history.take(*step);
    }
    history.come_to_rest();
    let mut afresh = Fake::new(SMALL);
    let mut other = controller_of(&history.world, &history.facts);
    reconcile(&mut other, 0, &mut afresh);
    assert_eq!(dump(&history.fake), dump(&afresh));
    check_settings(&history.fake, &afresh);
    assert_eq!(published(&history.controller), published(&other));
    // The next agent changes nothing that a packet sees, and wipes what could not be wiped.
    history.controller = controller_of(&history.world, &history.facts);
    history.come_to_rest();
    assert_eq!(dump(&history.fake), dump(&afresh), "after the next agent");
    assert_eq!(backends(&history.fake), backends(&afresh), "entries that nobody owns");
}

#[test]
fn random_histories_end_as_a_controller_that_only_saw_the_last_state() {
    let config = ProptestConfig::default();
    let config = ProptestConfig { cases: config.cases.max(2_000), ..config };
    proptest!(config, |(steps in steps(), seed in any::<u64>())| check(&steps, seed));
}
