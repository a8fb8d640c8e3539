//! Maps of other sizes that hold the same entries.

use proptest::prelude::*;

use super::{GRACE, ROOMY, State, plan, programmed_afresh, recipes, state};
use crate::{
    dataplane::{Capacity, Dataplane, PinnedState},
    plan::{Plan, Planner},
};

/// What maps of this capacity hold after every entry was copied that they have room for.
fn resized(state: &PinnedState, capacity: Capacity) -> PinnedState {
    let mut state = state.clone();
    state.names.retain(|(index, _)| *index < capacity.services);
    state.services.resize(capacity.services as usize, Default::default());
    state.slots.resize(capacity.slots as usize, 0);
    state.backends4.resize(capacity.backends4 as usize, Default::default());
    state.backends6.resize(capacity.backends6 as usize, Default::default());
    state
}

/// The capacity twice.
fn doubled(capacity: Capacity) -> Capacity {
    Capacity {
        services: 2 * capacity.services,
        slots: 2 * capacity.slots,
        backends4: 2 * capacity.backends4,
        backends6: 2 * capacity.backends6,
        frontends4: 2 * capacity.frontends4,
        frontends6: 2 * capacity.frontends6,
        ranges4: 2 * capacity.ranges4,
        ranges6: 2 * capacity.ranges6,
        ..capacity
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 160, ..ProptestConfig::default() })]

    #[test]
    fn maps_of_another_size_keep_every_index_and_id(recipes in recipes()) {
        let wanted = state(&recipes);
        let fake = programmed_afresh(&wanted);
        let held = fake.read_state().expect("a fake can be read");
        for capacity in [held.needed(), doubled(ROOMY)] {
            let held = resized(&held, capacity);
            let mut planner = Planner::adopt(&held, capacity, GRACE);
            // An entry that had moved would have to be written.
            let plan = plan(&mut planner, &wanted, &mut State::new(), 0);
            prop_assert_eq!(plan, Plan::default(), "{:?}", capacity);
        }
    }
}
