//! A node in memory: its tables, interfaces and routes.

use std::{cell::RefCell, net::IpAddr};

use lb_common::{
    abi::{
        address::{Address4, Ipv4},
        affinity::{Affinity, AffinityKey},
        backend::Backend,
        counter::Hook,
        frontend::{Frontend, FrontendKey},
        service::Service,
        settings::Settings,
    },
    balance::{Entry, Tables},
};
use lb_testing::{
    family::TestFamily,
    tables::FakeTables,
    world::{EXTERNAL, POD_DEVICE, World},
};

use super::super::{
    At, ExplainError, Explanation, Question, explanation,
    pinned::PinnedFamily,
    surroundings::{Device, Route, Surroundings},
    tables::Reader,
};
use crate::{
    maps::flow_table::{FlowTable, Flows as _},
    options::values::Protocol,
    programs::hook::Direction,
};

/// The tables of a test.
pub(super) struct Lab {
    pub(super) tables: RefCell<FakeTables<Ipv4>>,
    pub(super) flows: FlowTable<Address4>,
    pub(super) world: World<Ipv4>,
    /// Whether connect-time hooks are attached.
    pub(super) has_sockets: bool,
    /// Whether programs are attached to the pod's interface.
    pub(super) has_pods: bool,
}

impl Lab {
    pub(super) fn new(world: World<Ipv4>) -> Self {
        let mut tables = FakeTables::new(1_000_000);
        tables.load(&world);
        let flows = FlowTable::anonymous(64).expect("memory");
        Self { tables: RefCell::new(tables), flows, world, has_sockets: false, has_pods: true }
    }

    pub(super) fn ask(
        &self,
        from: Address4,
        to: (Address4, u16),
        protocol: Protocol,
        at: At,
    ) -> Explanation {
        self.try_ask(from, to, protocol, at).expect("an explanation")
    }

    pub(super) fn try_ask(
        &self,
        from: Address4,
        (to, port): (Address4, u16),
        protocol: Protocol,
        at: At,
    ) -> Result<Explanation, ExplainError> {
        let from = (Ipv4::ip(from), 40_000).into();
        let question = Question { from, to: (Ipv4::ip(to), port).into(), protocol, at };
        let before = self.dump();
        let explained = explanation::<Ipv4, _, _>(self, self, &question);
        assert_eq!(self.dump(), before, "something was written");
        explained
    }

    fn dump(&self) -> String {
        let tables = self.tables.borrow();
        let flows: Vec<_> = self.flows.live().collect();
        format!("{flows:?} {:?}", tables.affinities())
    }
}

impl Reader<Ipv4> for Lab {
    type Flows = FlowTable<Address4>;

    fn settings(&self) -> Settings {
        self.world.settings
    }
    fn now(&self) -> u32 {
        Tables::<Ipv4>::now(&*self.tables.borrow())
    }
    fn frontend(&self, key: &FrontendKey<Address4>) -> Option<Frontend> {
        self.tables.borrow_mut().frontend(key)
    }
    fn is_in_range(&self, service: u32, client: Address4) -> bool {
        self.tables.borrow_mut().is_in_range(service, &client)
    }
    fn route_source(&self, destination: Address4) -> Option<Address4> {
        let mut source = Address4::default();
        let is_found = self.tables.borrow_mut().route_source(&destination, &mut source);
        is_found.then_some(source)
    }

    fn is_node(&self, address: Address4) -> bool {
        self.tables.borrow_mut().is_node(&address)
    }
    fn service(&self, index: u32) -> Option<Service> {
        self.tables.borrow_mut().service(index)
    }
    fn slot(&self, position: u32) -> Option<u32> {
        self.tables.borrow_mut().slot(position)
    }
    fn backend(&self, id: u32) -> Option<Backend<Address4>> {
        self.tables.borrow_mut().backend(id)
    }
    fn device(&self, ifindex: u32) -> Option<u32> {
        self.tables.borrow_mut().device(ifindex)
    }
    fn flows(&self) -> &FlowTable<Address4> {
        &self.flows
    }
    fn affinity(&self, key: &AffinityKey) -> Option<Affinity> {
        self.tables.borrow_mut().affinity(key).map(|entry| *entry.get())
    }
    fn name(&self, service: u32) -> String {
        format!("default/web{service}")
    }
    fn ranges(&self, _service: u32) -> Vec<String> {
        vec!["10.2.0.0/24".to_owned()]
    }
    fn backends_of(&self, service: u32) -> Vec<(u32, Backend<Address4>)> {
        let is_its = |backend: &Backend<Address4>| backend.sets != 0 && backend.service == service;
        let all = (0..).zip(self.world.backends.iter().copied());
        all.filter(|(_, backend)| is_its(backend)).collect()
    }
}

fn device(index: u32) -> Device {
    let name = match index {
        1 => "lo",
        EXTERNAL => "eth0",
        POD_DEVICE => "veth1",
        _ => "tun0",
    };
    Device { index, name: name.to_owned() }
}

impl Surroundings for Lab {
    fn route(&self, to: IpAddr) -> Route {
        let IpAddr::V4(ip) = to else { return Route::Unreachable("IPv6".to_owned()) };
        match ip.octets() {
            _ if to == Ipv4::ip(Ipv4::node()) || ip.is_loopback() => Route::Local,
            [10, 1, 0, _] => Route::Device { device: device(POD_DEVICE), via: None },
            [10, 2, 0, _] => {
                let via = Some(Ipv4::ip(Ipv4::other_node()));
                Route::Device { device: device(EXTERNAL), via }
            }
            [240, ..] => Route::Unreachable("Network is unreachable".to_owned()),
            _ => Route::Device { device: device(EXTERNAL), via: "192.0.2.1".parse().ok() },
        }
    }
    fn device(&self, name: &str) -> Option<Device> {
        [1, EXTERNAL, POD_DEVICE, 99].map(device).into_iter().find(|device| device.name == name)
    }
    fn name(&self, index: u32) -> String {
        device(index).name
    }
    fn program(&self, device: u32, direction: Direction) -> Option<Hook> {
        match (device, direction) {
            (1, Direction::Egress) => Some(Hook::Loopback),
            (EXTERNAL, Direction::Ingress) => Some(Hook::FromDevice),
            (EXTERNAL, Direction::Egress) => Some(Hook::ToDevice),
            (POD_DEVICE, Direction::Ingress) if self.has_pods => Some(Hook::FromPod),
            (POD_DEVICE, Direction::Egress) if self.has_pods => Some(Hook::ToPod),
            _ => None,
        }
    }
    fn xdp(&self, device: u32) -> Option<String> {
        (device == EXTERNAL).then(|| "XDP in the driver".to_owned())
    }
    fn ports(&self, _bridge: u32) -> Vec<Device> {
        Vec::new()
    }
    fn has_socket_hook(&self, hook: Hook) -> bool {
        self.has_sockets && hook == Hook::Connect4
    }
    fn netns_cookie(&self) -> u64 {
        7
    }
}
