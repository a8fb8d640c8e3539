//! The bench that rows run on: an interpreter of the datapath, a world, and words for
//! conversations between a client and a Service.

use lb_common::{
    abi::{
        address::Address,
        affinity::{Affinity, AffinityKey},
        counter::{Hook, Reason},
        flow::{FlowKey, Tuple},
        frontend::{TCP, UDP},
    },
    balance::{Answer, Endpoint, FlowTable, Site},
    packet::{ACK, SYN},
};

use super::{
    family::TestFamily,
    frame::Frame,
    tables::Lookups,
    world::{EXTERNAL, EXTERNAL_TOO, POD_DEVICE, TICKS, World},
};

pub use super::tables::FlowEntries;

/// Where a frame is caught.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// It comes out of a pod.
    FromPod,
    /// It goes into a pod.
    ToPod,
    /// It comes in by [`EXTERNAL`].
    FromDevice,
    /// It comes in by [`EXTERNAL_TOO`].
    FromOtherDevice,
    /// A node process sends it out of [`EXTERNAL`].
    ToDevice,
    /// It came from elsewhere and leaves by [`EXTERNAL`].
    ToDeviceForwarded,
    /// It goes from this node to itself.
    Loopback,
}

impl Place {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::FromPod,
        Self::ToPod,
        Self::FromDevice,
        Self::FromOtherDevice,
        Self::ToDevice,
        Self::ToDeviceForwarded,
        Self::Loopback,
    ];

    /// The place as the core knows it.
    pub fn site(self) -> Site {
        match self {
            Self::FromPod => Site::FromPod,
            Self::ToPod => Site::ToPod,
            Self::FromDevice | Self::FromOtherDevice => Site::FromDevice,
            Self::ToDevice => Site::ToDevice { ifindex: EXTERNAL, ingress: 0 },
            Self::ToDeviceForwarded => Site::ToDevice { ifindex: EXTERNAL, ingress: POD_DEVICE },
            Self::Loopback => Site::Loopback,
        }
    }

    /// The hook that catches it.
    pub fn hook(self) -> Hook {
        match self {
            Self::FromPod => Hook::FromPod,
            Self::ToPod => Hook::ToPod,
            Self::FromDevice | Self::FromOtherDevice => Hook::FromDevice,
            Self::ToDevice | Self::ToDeviceForwarded => Hook::ToDevice,
            Self::Loopback => Hook::Loopback,
        }
    }

    /// The device that the hook is on.
    pub fn ifindex(self) -> u32 {
        match self {
            Self::FromPod | Self::ToPod => POD_DEVICE,
            Self::FromDevice | Self::ToDevice | Self::ToDeviceForwarded => EXTERNAL,
            Self::FromOtherDevice => EXTERNAL_TOO,
            Self::Loopback => 1,
        }
    }

    /// The device that the frame came in by, 0 for one that the node made.
    pub fn ingress_ifindex(self) -> u32 {
        match self {
            Self::ToDevice | Self::Loopback => 0,
            Self::ToDeviceForwarded | Self::ToPod => POD_DEVICE,
            other => other.ifindex(),
        }
    }
}

/// What became of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End<A: Address> {
    /// It goes on, bit for bit as it came.
    Untouched,
    /// It is gone.
    Dropped,
    /// It goes on where it was going, with these addresses and ports.
    Onward(Tuple<A>),
    /// It goes back out of the device that it came in by.
    Bounced(Tuple<A>),
    /// It goes where a route look-up says.
    Routed(Tuple<A>),
    /// The same, one hop further on, as by a router.
    Forwarded(Tuple<A>),
    /// It goes on as it came, one hop further on, in a tunnel with these ends.
    Tunnelled(Tuple<A>),
    /// Onward, and segments are to be smaller by the header of a tunnel.
    Clamped(Tuple<A>),
    /// It comes in by the loopback device.
    IntoLoopback(Tuple<A>),
    /// It comes in by the device with this index.
    IntoDevice(Tuple<A>, u32),
    /// Its sender is answered.
    Answered(Answer),
}

impl<A: Address> End<A> {
    /// The addresses and ports of a translated frame.
    pub fn tuple(&self) -> Option<Tuple<A>> {
        match self {
            Self::Untouched | Self::Dropped | Self::Answered(_) => None,
            Self::Onward(tuple)
            | Self::Bounced(tuple)
            | Self::Routed(tuple)
            | Self::Forwarded(tuple)
            | Self::Tunnelled(tuple)
            | Self::Clamped(tuple)
            | Self::IntoLoopback(tuple)
            | Self::IntoDevice(tuple, _) => Some(*tuple),
        }
    }
}

/// What became of a frame, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome<A: Address> {
    /// The counter that moved.
    pub reason: Reason,
    /// What became of the frame.
    pub end: End<A>,
}

/// An interpreter of the datapath.
pub trait Lab<F: TestFamily> {
    /// Forgets everything: flows, affinity and the world.
    fn reset(&mut self);
    /// Takes over what the agent would have written.
    fn load(&mut self, world: &World<F>);
    /// Puts a frame through the datapath. Panics where the interpreter breaks a promise
    /// that no row has to repeat: checksums, bytes that must not change, one counter.
    fn send(&mut self, place: Place, frame: &[u8]) -> Outcome<F::Address>;
    /// What the last frame quotes once it is translated, if it was an ICMP error that was.
    fn quoted(&self) -> Option<Tuple<F::Address>>;
    /// Lets time pass.
    fn pass(&mut self, ticks: u32);
    /// Every entry of a flow table.
    fn flows(&mut self, table: FlowTable) -> FlowEntries<F::Address>;
    /// Removes one entry of a flow table, as the sweep does, or the kernel in a full one.
    fn remove_flow(&mut self, table: FlowTable, key: &FlowKey<F::Address>);
    /// Every entry of AFFINITY.
    fn affinities(&mut self) -> Vec<(AffinityKey, Affinity)>;
    /// Look-ups for the last frame, if the interpreter can tell.
    fn lookups(&self) -> Option<Lookups>;
}

/// An interpreter and the world it was given.
pub struct Bench<'a, F: TestFamily> {
    /// The interpreter.
    pub lab: &'a mut dyn Lab<F>,
    /// The world; after a change [`Bench::update`] hands it over.
    pub world: World<F>,
    /// TCP or UDP: what the row runs with.
    pub protocol: u8,
}

/// A conversation between a client and a backend through a Service.
#[derive(Clone, Copy, Debug)]
pub struct Talk<A: Address> {
    /// Where its requests are caught.
    pub place: Place,
    /// The client.
    pub client: Endpoint<A>,
    /// What the client talks to.
    pub front: Endpoint<A>,
    /// What became of its first frame.
    pub end: End<A>,
    /// Addresses and ports as the backend sees them.
    pub sent: Tuple<A>,
}

impl<A: Address> Talk<A> {
    /// The backend it was given.
    pub fn backend(&self) -> Endpoint<A> {
        Endpoint { address: self.sent.destination, port: self.sent.destination_port }
    }

    /// Where packets of the other direction are caught, and what becomes of one that goes on
    /// as `back`.
    pub fn way_back(&self, back: Tuple<A>) -> (Place, End<A>) {
        match self.end {
            End::Onward(_) if self.place == Place::FromDevice => {
                (Place::ToDeviceForwarded, End::Onward(back))
            }
            End::Onward(_) if self.place == Place::Loopback => (Place::Loopback, End::Onward(back)),
            End::Onward(_) => (Place::ToPod, End::Onward(back)),
            End::Bounced(_) => (Place::FromPod, End::Bounced(back)),
            End::Routed(_) if self.place == Place::Loopback => {
                (Place::FromDevice, End::IntoLoopback(back))
            }
            End::Routed(_) => (Place::FromDevice, End::Onward(back)),
            End::Forwarded(_) => (Place::FromDevice, End::Forwarded(back)),
            End::IntoLoopback(_) if matches!(self.place, Place::FromDevice | Place::FromPod) => {
                (Place::Loopback, End::Forwarded(back))
            }
            End::IntoLoopback(_) => (Place::Loopback, End::Onward(back)),
            other => panic!("no request ends as {other:?}"),
        }
    }

    /// What becomes of a packet of the client's direction that goes on as `onward`.
    pub fn way_there(&self, onward: Tuple<A>) -> End<A> {
        match self.end {
            End::Onward(_) => End::Onward(onward),
            End::Bounced(_) => End::Bounced(onward),
            End::Routed(_) => End::Routed(onward),
            End::Forwarded(_) => End::Forwarded(onward),
            End::IntoLoopback(_) => End::IntoLoopback(onward),
            End::IntoDevice(_, device) => End::IntoDevice(onward, device),
            other => panic!("no request ends as {other:?}"),
        }
    }

    /// The key of the direction of requests.
    pub fn key(&self, protocol: u8) -> FlowKey<A> {
        FlowKey { tuple: tuple(self.client, self.front), protocol: protocol.into() }
    }

    /// The key of the direction of replies.
    pub fn reply_key(&self, protocol: u8) -> FlowKey<A> {
        FlowKey { tuple: self.sent.reversed(), protocol: protocol.into() }
    }
}

/// Addresses and ports from one end to the other.
pub fn tuple<A: Address>(source: Endpoint<A>, destination: Endpoint<A>) -> Tuple<A> {
    Tuple {
        source: source.address,
        destination: destination.address,
        source_port: source.port,
        destination_port: destination.port,
    }
}

impl<F: TestFamily> Bench<'_, F> {
    /// Hands the world over.
    pub fn update(&mut self) {
        self.lab.load(&self.world);
    }

    /// Whether the row runs with TCP.
    pub fn is_tcp(&self) -> bool {
        self.protocol == TCP
    }

    /// Lets seconds pass, and nearly one more, as times are noted to within a second.
    pub fn wait(&mut self, seconds: u32) {
        self.lab.pass(seconds * TICKS);
    }

    /// Sends a frame of the row's protocol; the flags are TCP's.
    #[track_caller]
    pub fn send(
        &mut self,
        place: Place,
        from: Endpoint<F::Address>,
        to: Endpoint<F::Address>,
        flags: u8,
    ) -> Outcome<F::Address> {
        self.send_frame(place, &Frame::of(self.protocol, from, to, flags))
    }

    /// Sends any frame.
    #[track_caller]
    pub fn send_frame(&mut self, place: Place, frame: &Frame<F>) -> Outcome<F::Address> {
        self.lab.send(place, &frame.bytes())
    }

    /// Sends what opens a flow and asserts that one was created.
    #[track_caller]
    pub fn open(
        &mut self,
        place: Place,
        client: Endpoint<F::Address>,
        front: Endpoint<F::Address>,
    ) -> Talk<F::Address> {
        let outcome = self.send(place, client, front, SYN);
        assert_eq!(outcome.reason, Reason::FlowCreated, "{client:?} to {front:?}: {outcome:?}");
        let sent = outcome.end.tuple().expect("a created flow translates");
        Talk { place, client, front, end: outcome.end, sent }
    }

    /// Opens a flow and has it answered; TCP completes the handshake.
    #[track_caller]
    pub fn connect(
        &mut self,
        place: Place,
        client: Endpoint<F::Address>,
        front: Endpoint<F::Address>,
    ) -> Talk<F::Address> {
        let talk = self.open(place, client, front);
        self.reply(&talk, SYN | ACK);
        if self.is_tcp() {
            self.request(&talk, ACK);
        }
        talk
    }

    /// Sends from the client and asserts that the backend gets it.
    #[track_caller]
    pub fn request(&mut self, talk: &Talk<F::Address>, flags: u8) {
        let outcome = self.send(talk.place, talk.client, talk.front, flags);
        assert_eq!(outcome, Outcome { reason: Reason::Request, end: talk.end });
    }

    /// Sends from the backend and asserts that the client gets it, from the Service.
    #[track_caller]
    pub fn reply(&mut self, talk: &Talk<F::Address>, flags: u8) {
        let (place, end) = talk.way_back(tuple(talk.front, talk.client));
        let outcome = self.answer(talk, place, flags);
        assert_eq!(outcome, Outcome { reason: Reason::Reply, end });
    }

    /// Sends from the backend to be caught at `place`.
    #[track_caller]
    pub fn answer(
        &mut self,
        talk: &Talk<F::Address>,
        place: Place,
        flags: u8,
    ) -> Outcome<F::Address> {
        let client = Endpoint { address: talk.sent.source, port: talk.sent.source_port };
        self.send(place, talk.backend(), client, flags)
    }

    /// Asserts what becomes of a frame of the row's protocol.
    #[track_caller]
    pub fn expect(
        &mut self,
        place: Place,
        [from, to]: [Endpoint<F::Address>; 2],
        flags: u8,
        reason: Reason,
        end: End<F::Address>,
    ) {
        let outcome = self.send(place, from, to, flags);
        assert_eq!(outcome, Outcome { reason, end }, "{from:?} to {to:?} at {place:?}");
    }

    /// Asserts what becomes of any frame.
    #[track_caller]
    pub fn expect_frame(
        &mut self,
        place: Place,
        frame: &Frame<F>,
        reason: Reason,
        end: End<F::Address>,
    ) {
        let outcome = self.send_frame(place, frame);
        assert_eq!(outcome, Outcome { reason, end }, "{frame:?} at {place:?}");
    }

    /// Asserts how many hashes the last frame looked into, where that can be told.
    #[track_caller]
    pub fn expect_lookups(&self, hashes: u32) {
        if let Some(lookups) = self.lab.lookups() {
            assert_eq!(lookups.hashes(), hashes, "{lookups:?}");
        }
    }

    /// How many entries the two flow tables have.
    pub fn flow_counts(&mut self) -> [usize; 2] {
        [FlowTable::Flows, FlowTable::Embryonic].map(|table| self.lab.flows(table).len())
    }

    /// A refusal of the row's protocol.
    pub fn refusal(&self) -> End<F::Address> {
        End::Answered(if self.is_tcp() { Answer::Reset } else { Answer::PortUnreachable })
    }
}

/// A row: a name that says what holds, and what shows it.
pub struct Row<F: TestFamily> {
    /// What holds.
    pub name: &'static str,
    /// Which of TCP and UDP it holds for.
    pub protocols: &'static [u8],
    /// Panics where it does not hold.
    pub run: fn(&mut Bench<F>),
}

/// What a lab panics with (`std::panic::panic_any`) that cannot make such a frame here.
#[derive(Clone, Copy, Debug)]
pub struct Untestable;

/// What rows came to.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// How many held.
    pub held: usize,
    /// The names of those that did not; their panics have said why.
    pub failed: Vec<String>,
    /// The names of those that the lab cannot try here.
    pub untestable: Vec<String>,
}

impl Tally {
    /// Asserts that all held.
    ///
    /// # Panics
    /// One did not, or could not be tried.
    #[track_caller]
    pub fn expect_all(&self) {
        assert!(self.failed.is_empty(), "rows that failed:\n{}", self.failed.join("\n"));
        assert!(self.untestable.is_empty(), "not tried:\n{}", self.untestable.join("\n"));
    }
}

/// Runs rows with every protocol that they hold for.
pub fn run<F: TestFamily>(lab: &mut dyn Lab<F>, rows: &[Row<F>]) -> Tally {
    let mut tally = Tally::default();
    for row in rows {
        for &protocol in row.protocols {
            lab.reset();
            let mut bench = Bench { lab: &mut *lab, world: World::default(), protocol };
            let run = std::panic::AssertUnwindSafe(|| (row.run)(&mut bench));
            let name = || {
                let protocol = if protocol == UDP { "udp" } else { "tcp" };
                format!("{} (IPv{}, {protocol})", row.name, F::NUMBER)
            };
            match std::panic::catch_unwind(run) {
                Ok(()) => tally.held += 1,
                Err(panic) if panic.is::<Untestable>() => tally.untestable.push(name()),
                Err(_) => tally.failed.push(name()),
            }
        }
    }
    tally
}
