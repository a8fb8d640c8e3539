//! The flows of the agent before, where they are in other maps than those of this agent, and how they
//! get into them.
//!
//! Releases up to 0.1.0 had hash maps: one entry for each direction of a flow, and TCP handshakes that
//! are not complete in maps of their own. Later ones have a table, which `--max-flows` gives another
//! size. Invariant: a flow is in the table of this agent before it is gone from the maps before, so
//! that programs that look in both always find it.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
};

use bytemuck::Pod;
use lb_common::{
    abi::{
        address::{Address4, Address6},
        conversion::{IN_HASHES, IN_TABLE},
        flow::{ANSWERED, Action, CONFIRMED, Flow, FlowKey},
        flow_table::Direction,
        frontend::TCP,
        layout,
        settings::{Lifetimes, Settings},
    },
    balance::track,
    flow_table::{InsertError, NewFlow, PROTECTED, note},
};
use lb_sys::TypedMap;

use super::{
    flow_table::{self, FlowAddress, FlowMaps, FlowTable, Flows, LiveFlow},
    pins::{PinError, Pins},
    timeouts,
};

/// The hash maps of flows, and the version of their layout.
const HASHES: [&str; 4] = ["FLOWS4", "FLOWS6", "EMBRYONIC4", "EMBRYONIC6"];
const HASHES_VERSION: u32 = 1;

/// A map of the agent before.
#[derive(Debug)]
pub struct FormerMap {
    /// Its name.
    pub name: &'static str,
    /// The version of its layout.
    pub version: u32,
    /// Where it is pinned.
    pub path: PathBuf,
    /// The map.
    pub map: OwnedFd,
}

/// The flows of the agent before.
#[derive(Debug)]
pub struct Former {
    is_table: bool,
    /// The maps that they are in.
    pub maps: Vec<FormerMap>,
}

impl Former {
    /// The pinned flows of an agent before whose maps are not those of this agent; `None` if there
    /// are none. `is_table` says that it had a table.
    ///
    /// # Errors
    /// [`PinError`] if a pin cannot be read.
    pub fn found(pins: &Pins, is_table: bool) -> Result<Option<Self>, PinError> {
        let names: &[&'static str] = if is_table { &flow_table::MAPS } else { &HASHES };
        let mut maps = Vec::new();
        for name in names {
            if let Some(found) = pins.found(name)?
                && found.version == version_of(name)
            {
                let (version, path, map) = (found.version, found.path, found.map);
                maps.push(FormerMap { name, version, path, map });
            }
        }
        // One without the others is of no use.
        Ok((maps.len() == names.len()).then_some(Self { is_table, maps }))
    }

    /// The same, of maps that were found in another way.
    pub fn of(maps: Vec<FormerMap>) -> Option<Self> {
        let has_all =
            |names: &[&str]| names.iter().all(|name| maps.iter().any(|map| map.name == *name));
        let is_table = has_all(&flow_table::MAPS);
        (is_table || has_all(&HASHES)).then_some(Self { is_table, maps })
    }

    /// The name of a map that a former release had, or this one has; `None` if it has no flows.
    pub fn known(name: &str) -> Option<&'static str> {
        HASHES.iter().chain(&flow_table::MAPS).copied().find(|known| *known == name)
    }

    /// What the programs of the handover are told: [`IN_HASHES`] or [`IN_TABLE`].
    pub fn kind(&self) -> u32 {
        if self.is_table { IN_TABLE } else { IN_HASHES }
    }

    /// The name of a map before in the object of the handover.
    pub fn name_in_object(name: &str) -> &'static str {
        match name {
            "FLOWS4" => "PREVIOUS_FLOWS4",
            "FLOWS6" => "PREVIOUS_FLOWS6",
            "EMBRYONIC4" => "PREVIOUS_EMBRYONIC4",
            "EMBRYONIC6" => "PREVIOUS_EMBRYONIC6",
            "FLOW_TABLE4" => "PREVIOUS_TABLE4",
            "FLOW_TABLE6" => "PREVIOUS_TABLE6",
            "FLOW_REPLIES4" => "PREVIOUS_REPLIES4",
            "FLOW_REPLIES6" => "PREVIOUS_REPLIES6",
            "FLOW_FILTER4" => "PREVIOUS_FILTER4",
            "FLOW_FILTER6" => "PREVIOUS_FILTER6",
            _ => "PREVIOUS_SEED",
        }
    }

    /// Moves all flows into the table whose maps `new` finds by their names. Programs insert no more
    /// flows into the maps before.
    ///
    /// # Errors
    /// Those of the maps; what is not moved stays known to the programs of the handover.
    pub fn move_into(&self, new: &dyn Fn(&str) -> Option<OwnedFd>) -> io::Result<Moved> {
        let moment = Moment::now()?;
        let mut moved = Moved::default();
        self.move_family::<Address4>(new, "FLOWS4", "EMBRYONIC4", &moment, &mut moved)?;
        self.move_family::<Address6>(new, "FLOWS6", "EMBRYONIC6", &moment, &mut moved)?;
        Ok(moved)
    }

    fn move_family<A: FlowAddress>(
        &self,
        new: &dyn Fn(&str) -> Option<OwnedFd>,
        flows: &str,
        embryonic: &str,
        moment: &Moment,
        moved: &mut Moved,
    ) -> io::Result<()> {
        let table = FlowMaps::<A>::of(new)?.map(true)?;
        if self.is_table {
            let old = FlowMaps::<A>::of(&|name| self.map(name))?.map(true)?;
            move_table(&old, &table, moment, moved);
            return Ok(());
        }
        for (name, is_established) in [(flows, true), (embryonic, false)] {
            let missing = || io::Error::from(io::ErrorKind::NotFound);
            let map = TypedMap::new(self.map(name).ok_or_else(missing)?)?;
            move_hash(&map, is_established, &table, moment, moved)?;
        }
        Ok(())
    }

    fn map(&self, name: &str) -> Option<OwnedFd> {
        let found = self.maps.iter().find(|map| map.name == name)?;
        found.map.as_fd().try_clone_to_owned().ok()
    }
}

/// The version that a map must have for its flows to be known: that of this release, if it has the map.
fn version_of(name: &str) -> u32 {
    let layout = layout::MAPS.iter().find(|layout| layout.name == name);
    layout.map_or(HASHES_VERSION, |layout| layout.version)
}

/// How many flows were moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moved {
    /// Those that are in the table of this agent now.
    pub flows: u64,
    /// Those that there was no room for.
    pub lost: u64,
}

/// When flows are moved.
struct Moment {
    settings: Settings,
    lifetimes: Lifetimes,
}

impl Moment {
    fn now() -> io::Result<Self> {
        let ticks_per_second = lb_sys::ticks_per_second()?;
        let time_shift = Settings::time_shift_of(ticks_per_second);
        let settings = Settings { ticks_per_second, time_shift, ..Settings::default() };
        let lifetimes = track::lifetimes(&timeouts::timeouts(ticks_per_second));
        Ok(Self { settings, lifetimes })
    }
}

fn move_table<A: FlowAddress>(
    old: &FlowTable<A>,
    new: &FlowTable<A>,
    moment: &Moment,
    moved: &mut Moved,
) {
    for place in 0..old.places() {
        let mut copied = None;
        // Until it is removed unchanged, packets are noted there: what they show is noted of the copy.
        while let Some(flow) = old.flow(place) {
            if copied.is_some_and(|word| flow.word.is_same_flow(word)) {
                note_copy(&flow, new);
            } else if copy(&flow, new, moment, moved) {
                copied = Some(flow.word);
            }
            if old.remove_unchanged(&flow) {
                break;
            }
        }
    }
}

/// Inserts a copy of a flow. Returns false if there is another such flow, or no room.
fn copy<A: FlowAddress>(
    flow: &LiveFlow<A>,
    table: &FlowTable<A>,
    moment: &Moment,
    moved: &mut Moved,
) -> bool {
    let mut copy = NewFlow::default();
    flow.entry.read(Direction::Request, flow.word, &mut copy.flow);
    let [request, reply] = keys(flow);
    (copy.reply_key, copy.reply_action) = (reply, flow.entry.actions[1]);
    insert(table, &request, &mut copy, moment, moved)
}

/// Gives the copy of a flow the state and the time that the flow has by now.
fn note_copy<A: FlowAddress>(flow: &LiveFlow<A>, table: &FlowTable<A>) {
    let [request, reply] = keys(flow);
    let copy = match flow.entry.actions[0].is_one_way() {
        true => table.find(&request, Direction::Request),
        false => table.find(&reply, Direction::Reply),
    };
    if let Some(copy) = copy {
        note(table, &copy.found(), 0, flow.word.state(), flow.word.time());
    }
}

/// How packets of either direction arrive.
fn keys<A: FlowAddress>(flow: &LiveFlow<A>) -> [FlowKey<A>; 2] {
    let protocol = flow.protocol().into();
    let mut reply = FlowKey::default();
    reply.set_reverse(&flow.entry.translated, protocol);
    [FlowKey { tuple: flow.entry.request, protocol }, reply]
}

/// Moves the flows of a hash map by their requests; then the replies that are left, whose requests
/// were evicted or are of no Service.
fn move_hash<A: FlowAddress>(
    map: &TypedMap<FlowKey<A>, Flow<A>>,
    is_established: bool,
    table: &FlowTable<A>,
    moment: &Moment,
    moved: &mut Moved,
) -> io::Result<()>
where
    FlowKey<A>: Pod,
    Flow<A>: Pod,
{
    let mut entries = Vec::new();
    map.visit(|keys, values| {
        entries.extend(keys.iter().copied().zip(values.iter().copied()));
        true
    })?;
    let (requests, replies): (Vec<_>, Vec<_>) =
        entries.into_iter().partition(|(_, flow)| !flow.action.is_reply());
    for (key, flow) in requests {
        let mut new = NewFlow::default();
        new.flow = flow;
        new.reply_key.set_reverse(&flow.rewrite, key.protocol);
        let reply = map.get(&new.reply_key)?;
        new.reply_action = match reply {
            _ if flow.action.is_one_way() => Action::default(),
            Some(reply) => reply.action,
            None => reply_action(flow.action),
        };
        if let Some(reply) = reply {
            new.flow.state |= reply.state;
            new.flow.last_seen = later(flow.last_seen, reply.last_seen);
        }
        complete(&mut new.flow, key.protocol, is_established, moment);
        let reply_key = new.reply_key;
        insert(table, &key, &mut new, moment, moved);
        map.remove(&key)?;
        map.remove(&reply_key)?;
    }
    for (key, flow) in replies {
        if map.get(&key)?.is_none() {
            continue;
        }
        let mut request = FlowKey::default();
        request.set_reverse(&flow.rewrite, key.protocol);
        let mut new = NewFlow::default();
        (new.flow, new.reply_key) = (flow, key);
        new.flow.rewrite.set_reverse(&key.tuple);
        new.flow.action = request_action(flow.action);
        new.reply_action = flow.action;
        complete(&mut new.flow, key.protocol, is_established, moment);
        insert(table, &request, &mut new, moment, moved);
        map.remove(&key)?;
    }
    Ok(())
}

/// The state and time of a flow as this release has them.
fn complete<A>(flow: &mut Flow<A>, protocol: u32, is_established: bool, moment: &Moment) {
    let is_tcp = protocol == u32::from(TCP);
    if is_tcp && is_established && flow.state & ANSWERED != 0 {
        flow.state |= CONFIRMED;
    }
    flow.last_seen = moment.settings.time(flow.last_seen);
}

/// The later of two times in jiffies.
fn later(one: u32, two: u32) -> u32 {
    if two.wrapping_sub(one) < 1 << 31 { two } else { one }
}

/// Inserts a flow that is moved. Returns whether it was inserted.
fn insert<A: FlowAddress>(
    table: &FlowTable<A>,
    key: &FlowKey<A>,
    new: &mut NewFlow<A>,
    moment: &Moment,
    moved: &mut Moved,
) -> bool {
    new.protected = moment.settings.times(PROTECTED);
    let result = table.insert(key, new, &moment.lifetimes);
    match result {
        Ok(()) => moved.flows += 1,
        // A packet has opened the flow anew.
        Err(InsertError::Exists) => {}
        Err(InsertError::Full) => moved.lost += 1,
    }
    result.is_ok()
}

/// The action of requests of a flow of which only the replies' is known.
fn request_action(reply: Action) -> Action {
    match reply {
        Action::REPLY_INTO_DEVICE => Action::REQUEST_ROUTE,
        Action::REPLY_HAIRPIN => Action::REQUEST_HAIRPIN,
        Action::REPLY_FORWARD => Action::REQUEST_FORWARD,
        _ => Action::REQUEST,
    }
}

/// The action of replies of a flow of which only the requests' is known.
fn reply_action(request: Action) -> Action {
    match request {
        Action::REQUEST_ROUTE => Action::REPLY_INTO_DEVICE,
        Action::REQUEST_HAIRPIN => Action::REPLY_HAIRPIN,
        Action::REQUEST_FORWARD => Action::REPLY_FORWARD,
        _ => Action::REPLY,
    }
}

#[cfg(test)]
mod tests {
    use lb_common::abi::{
        flow::SERVER_FIN,
        frontend::{TCP, UDP},
    };

    use super::*;
    use crate::maps::flow_table::tests::{add, key};

    #[test]
    fn a_flow_that_changes_while_it_is_moved_has_its_last_state() {
        let moment = Moment::now().unwrap();
        let mut moved = Moved::default();
        let [old, new] = [64, 128].map(|places| FlowTable::<Address4>::anonymous(places).unwrap());
        for protocol in [TCP, UDP] {
            add(&old, &key(1, protocol), 0, 7).unwrap();
        }
        let before: Vec<_> = old.live().collect();
        assert!(before.iter().all(|flow| copy(flow, &new, &moment, &mut moved)));
        for flow in &before {
            assert!(note(&old, &flow.found(), 0, ANSWERED | SERVER_FIN, 9));
        }
        assert!(!before.iter().any(|flow| old.remove_unchanged(flow)));
        old.live().for_each(|flow| note_copy(&flow, &new));
        for protocol in [TCP, UDP] {
            let [is, should] = [&new, &old].map(|table| {
                let flow = table.find(&key(1, protocol), Direction::Request).unwrap();
                (flow.word.state(), flow.word.time())
            });
            assert_eq!(is, should, "protocol {protocol}");
        }
        assert_eq!(moved, Moved { flows: 2, lost: 0 });
        // What is still there is no other flow.
        move_table(&old, &new, &moment, &mut moved);
        assert_eq!((old.live().count(), new.live().count()), (0, 2));
    }
}
