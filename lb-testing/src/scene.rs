//! The scene that a case plays in: an interpreter of the datapath, a world, and words for what
//! clients and backends do.

use lb_common::{
    abi::{counter::Reason, flow::CONFIRMED, flow_table::RequestWord, frontend::TCP},
    balance::{Answer, Endpoint},
    flow_table::IS_UDP,
    packet::{ACK, SYN},
};

use super::{
    family::TestFamily,
    flow::{TestFlow, tuple},
    frame::Frame,
    interpreter::{Fate, Interpreter, Outcome},
    site::TestSite,
    world::{TICKS, World},
};

/// An interpreter and the world that it was given.
pub struct Scene<'a, F: TestFamily> {
    /// The interpreter.
    pub interpreter: &'a mut dyn Interpreter<F>,
    /// The world; after a change [`Scene::update`] loads it into the interpreter.
    pub world: World<F>,
    /// TCP or UDP: the case runs once with each that it holds for.
    pub protocol: u8,
}

impl<F: TestFamily> Scene<'_, F> {
    /// Loads the world into the interpreter.
    pub fn update(&mut self) {
        self.interpreter.load(&self.world);
    }

    /// Begins again, with an empty world.
    pub fn reset(&mut self) {
        self.world = World::default();
        self.forget();
    }

    /// Forgets flows and affinity; the world stays.
    pub fn forget(&mut self) {
        self.interpreter.finish();
        self.interpreter.reset();
        self.update();
    }

    /// Whether the case runs with TCP.
    pub fn is_tcp(&self) -> bool {
        self.protocol == TCP
    }

    /// Lets seconds pass. An entry may look up to a second younger than it is, because entries
    /// are not written for every packet.
    pub fn wait(&mut self, seconds: u32) {
        self.interpreter.advance(seconds * TICKS);
    }

    /// Sends a frame of the case's protocol; `flags` are TCP's.
    #[track_caller]
    pub fn send(
        &mut self,
        site: TestSite,
        from: Endpoint<F::Address>,
        to: Endpoint<F::Address>,
        flags: u8,
    ) -> Outcome<F::Address> {
        self.send_frame(site, &Frame::of(self.protocol, from, to, flags))
    }

    /// Sends any frame.
    #[track_caller]
    pub fn send_frame(&mut self, site: TestSite, frame: &Frame<F>) -> Outcome<F::Address> {
        self.interpreter.send(site, &frame.bytes())
    }

    /// Sends what opens a flow and asserts that one was created.
    #[track_caller]
    pub fn open(
        &mut self,
        site: TestSite,
        client: Endpoint<F::Address>,
        frontend: Endpoint<F::Address>,
    ) -> TestFlow<F::Address> {
        let outcome = self.send(site, client, frontend, SYN);
        assert_eq!(outcome.reason, Reason::FlowCreated, "{client:?} to {frontend:?}: {outcome:?}");
        let sent = outcome.fate.tuple().expect("a created flow translates");
        TestFlow { site, client, frontend, fate: outcome.fate, sent }
    }

    /// Opens a flow and has it answered; TCP completes the handshake.
    #[track_caller]
    pub fn connect(
        &mut self,
        site: TestSite,
        client: Endpoint<F::Address>,
        frontend: Endpoint<F::Address>,
    ) -> TestFlow<F::Address> {
        let flow = self.open(site, client, frontend);
        self.reply(&flow, SYN | ACK);
        if self.is_tcp() {
            self.request(&flow, ACK);
        }
        flow
    }

    /// Sends from the client and asserts that the backend gets it.
    #[track_caller]
    pub fn request(&mut self, flow: &TestFlow<F::Address>, flags: u8) {
        let outcome = self.send(flow.site, flow.client, flow.frontend, flags);
        assert_eq!(outcome, Outcome { reason: Reason::Request, fate: flow.fate });
    }

    /// Sends from the backend and asserts that the client gets it, from the Service.
    #[track_caller]
    pub fn reply(&mut self, flow: &TestFlow<F::Address>, flags: u8) {
        let (site, fate) = flow.reply_path(tuple(flow.frontend, flow.client));
        let outcome = self.answer(flow, site, flags);
        assert_eq!(outcome, Outcome { reason: Reason::Reply, fate });
    }

    /// Sends from the backend; the frame is received at `site`.
    #[track_caller]
    pub fn answer(
        &mut self,
        flow: &TestFlow<F::Address>,
        site: TestSite,
        flags: u8,
    ) -> Outcome<F::Address> {
        let client = Endpoint { address: flow.sent.source, port: flow.sent.source_port };
        self.send(site, flow.backend(), client, flags)
    }

    /// Sends a frame of the case's protocol and asserts its outcome.
    #[track_caller]
    pub fn expect(
        &mut self,
        site: TestSite,
        [from, to]: [Endpoint<F::Address>; 2],
        flags: u8,
        reason: Reason,
        fate: Fate<F::Address>,
    ) {
        let outcome = self.send(site, from, to, flags);
        assert_eq!(outcome, Outcome { reason, fate }, "{from:?} to {to:?} at {site:?}");
    }

    /// Sends any frame and asserts its outcome.
    #[track_caller]
    pub fn expect_frame(
        &mut self,
        site: TestSite,
        frame: &Frame<F>,
        reason: Reason,
        fate: Fate<F::Address>,
    ) {
        let outcome = self.send_frame(site, frame);
        assert_eq!(outcome, Outcome { reason, fate }, "{frame:?} at {site:?}");
    }

    /// Asserts in how many hash maps the last frame was looked up, if the interpreter counts them.
    #[track_caller]
    pub fn expect_lookups(&self, hashes: u32) {
        if let Some(lookups) = self.interpreter.lookups() {
            assert_eq!(lookups.hashes(), hashes, "{lookups:?}");
        }
    }

    /// How many flows there are: first all but TCP handshakes that are not complete, then those.
    pub fn flow_counts(&mut self) -> [usize; 2] {
        let flows = self.interpreter.flows();
        let is_handshake = |word: &RequestWord| word.state() & (IS_UDP | CONFIRMED) == 0;
        let handshakes = flows.iter().filter(|(_, word)| is_handshake(word)).count();
        [flows.len() - handshakes, handshakes]
    }

    /// A refusal of the case's protocol.
    pub fn refusal(&self) -> Fate<F::Address> {
        Fate::Answered(if self.is_tcp() { Answer::Reset } else { Answer::PortUnreachable })
    }
}
