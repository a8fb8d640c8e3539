//! Flows for tests of the table alone, which have numbers for addresses.

use lb_common::{
    abi::{
        flow::{Action, Flow, FlowKey},
        flow_table::{Direction, FlowEntry},
        frontend::TCP,
        settings::Lifetimes,
    },
    flow_table::{Found, InsertError, NewFlow, find_reply, find_request, insert, is_still},
};

use super::HostTable;
use crate::{family::TestFamily, flow::tuple, world::at};

/// A flow by the numbers of its client, Service and backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Numbered {
    /// The client, which has one port.
    pub client: u8,
    /// The Service.
    pub service: u8,
    /// The backend.
    pub backend: u8,
}

impl Numbered {
    /// A request as it arrives.
    pub fn request<F: TestFamily>(self) -> FlowKey<F::Address> {
        let client = at(F::pod(self.client), 40_000);
        FlowKey { tuple: tuple(client, at(F::vip(self.service), 80)), protocol: TCP.into() }
    }

    /// A reply as it arrives: flows of one client to one backend have the same, by whichever Service.
    pub fn reply<F: TestFamily>(self) -> FlowKey<F::Address> {
        let client = at(F::pod(self.client), 40_000);
        let backend = at(F::remote_pod(self.backend), 8080);
        FlowKey { tuple: tuple(backend, client), protocol: TCP.into() }
    }

    /// Inserts the flow.
    ///
    /// # Errors
    /// Those of [`insert`].
    pub fn insert<F: TestFamily>(
        self,
        table: &HostTable,
        now: u32,
        lifetimes: &Lifetimes,
    ) -> Result<(), InsertError> {
        let key = self.request::<F>();
        let mut new = NewFlow::default();
        new.reply_key = self.reply::<F>();
        new.reply_action = Action::REPLY;
        new.flow = Flow {
            rewrite: new.reply_key.tuple.reversed(),
            action: Action::REQUEST,
            backend: self.backend.into(),
            service: self.service.into(),
            last_seen: now,
            ..Flow::default()
        };
        insert(table, &key, &mut new, lifetimes, |place, new| {
            let mut entry = FlowEntry::default();
            entry.write(&key.tuple, &new.flow, new.reply_action);
            table.store(place, entry);
        })
    }

    /// Finds the flow, or one with the same request or reply. Panics if what is found is not of one
    /// flow.
    pub fn find<F: TestFamily>(
        self,
        table: &HostTable,
        direction: Direction,
    ) -> Option<Found<u32>> {
        let found = match direction {
            Direction::Request => find_request(table, &self.request::<F>()),
            Direction::Reply => find_reply(table, &self.reply::<F>()),
        }?;
        let entry = table.entry_at::<F::Address>(found.place);
        if !is_still::<F::Address, _>(table, &found) {
            return None;
        }
        let (service, backend) = (entry.service as u8, entry.backend as u8);
        let read = Self { client: self.client, service, backend };
        assert_eq!(entry.request, read.request::<F>().tuple, "{self:?} {direction:?}");
        assert_eq!(entry.translated, read.reply::<F>().tuple.reversed(), "{self:?} {direction:?}");
        match direction {
            Direction::Request => assert_eq!(service, self.service),
            Direction::Reply => assert_eq!(backend, self.backend),
        }
        Some(found)
    }
}
