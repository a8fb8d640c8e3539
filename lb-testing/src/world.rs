//! What the agent would write for a few Services: settings, frontends, services, slots
//! and backends of one family, ready for fake tables and for kernel maps.

use lb_common::{
    abi::{
        address::{Be16, Family, Prefix},
        backend::{Backend, IN_CLUSTER_SET, IN_LOCAL_SET, NOT_SERVING, ON_THIS_NODE, THIS_HOST},
        frontend::{Frontend, FrontendKey, FrontendKind},
        service::{Service, Slot, SlotRange},
        settings::{Device, FamilySettings, PortRange, Settings, Timeouts},
    },
    balance::{Endpoint, track},
};

use super::family::TestFamily;

/// Ticks in a second of the tests' clock.
pub const TICKS: u32 = 250;
/// The external device that DEVICES has first.
pub const EXTERNAL: u32 = 7;
/// The external device that DEVICES has second.
pub const EXTERNAL_TOO: u32 = 9;
/// The host side of a pod's interface.
pub const POD_DEVICE: u32 = 11;

/// The range of node ports.
pub const NODE_PORTS: PortRange = PortRange { first: 30_000, count: 2_768 };
/// The range of the node's source ports.
pub const SOURCE_PORTS: PortRange = PortRange { first: 10_000, count: 1_000 };

/// The MAC of a device in the tests.
pub const fn mac(ifindex: u32) -> [u8; 6] {
    [2, 0, 0, 0, 1, ifindex as u8]
}

/// How long flows live in the tests, in seconds; see [`Timeouts`].
pub mod seconds {
    /// TCP before the handshake is complete.
    pub const TCP_SYN: u32 = 60;
    /// TCP, established.
    pub const TCP_ESTABLISHED: u32 = 86_400;
    /// TCP, half closed.
    pub const TCP_HALF_CLOSED: u32 = 3_600;
    /// TCP seen in one direction, closed by the client.
    pub const TCP_FIN_ONE_WAY: u32 = 120;
    /// TCP, closed.
    pub const TCP_CLOSING: u32 = 60;
    /// TCP, reset.
    pub const TCP_RESET: u32 = 110;
    /// UDP.
    pub const UDP: u32 = 30;
    /// UDP, for longer than a question and its answer.
    pub const UDP_STREAM: u32 = 180;
}

/// Where a backend runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Location {
    /// In a pod of this node.
    LocalPod,
    /// In the node's own network namespace.
    ThisHost,
    /// On another node, [`other_node`](TestFamily::other_node).
    OtherNode,
}

/// The state that the agent keeps in the maps.
#[derive(Clone, Debug)]
pub struct World<F: Family> {
    /// The settings, of both families.
    pub settings: Settings,
    /// FRONTENDS.
    pub frontends: Vec<(FrontendKey<F::Address>, Frontend)>,
    /// SERVICES.
    pub services: Vec<Service>,
    /// SLOTS.
    pub slots: Vec<Slot>,
    /// BACKENDS.
    pub backends: Vec<Backend<F::Address>>,
    /// NODES.
    pub nodes: Vec<F::Address>,
    /// RANGES, without the look-up by prefix.
    pub ranges: Vec<(u32, Prefix<F::Address>)>,
    /// SOURCES, without the look-up by prefix.
    pub sources: Vec<(Prefix<F::Address>, F::Address)>,
    /// DEVICES.
    pub devices: Vec<Device>,
}

/// How long flows live in the tests, in the unit of the times of flows.
pub fn timeouts() -> Timeouts {
    let times = |seconds: u32| (seconds * TICKS) >> Settings::time_shift_of(TICKS);
    Timeouts {
        tcp_syn: times(seconds::TCP_SYN),
        tcp_established: times(seconds::TCP_ESTABLISHED),
        tcp_half_closed: times(seconds::TCP_HALF_CLOSED),
        tcp_fin_one_way: times(seconds::TCP_FIN_ONE_WAY),
        tcp_closing: times(seconds::TCP_CLOSING),
        tcp_reset: times(seconds::TCP_RESET),
        udp: times(seconds::UDP),
        udp_stream: times(seconds::UDP_STREAM),
    }
}

impl<F: TestFamily> Default for World<F> {
    fn default() -> Self {
        use lb_common::abi::address::{Ipv4, Ipv6};
        let settings = Settings {
            ipv4: family_settings::<Ipv4>(),
            ipv6: family_settings::<Ipv6>(),
            lifetimes: Default::default(),
            flow_lifetimes: track::lifetimes(&timeouts()),
            ticks_per_second: TICKS,
            flags: 0,
            node_ports: NODE_PORTS,
            source_ports: SOURCE_PORTS,
            time_shift: Settings::time_shift_of(TICKS),
            zero: 0,
        };
        let device = |ifindex| Device { ifindex, mac: mac(ifindex), flags: 0, mtu: 1500, epoch: 1 };
        Self {
            settings,
            frontends: Vec::new(),
            // No Service has index 0 and no backend id 0, so that a mix-up with zero shows.
            services: vec![Service::default()],
            slots: vec![Slot::default()],
            backends: vec![Backend::default()],
            nodes: vec![F::node(), F::other_node()],
            ranges: Vec::new(),
            sources: Vec::new(),
            devices: vec![device(EXTERNAL), device(EXTERNAL_TOO)],
        }
    }
}

fn family_settings<F: TestFamily>() -> FamilySettings<F::Address> {
    let mut settings = FamilySettings::default();
    settings.service_prefixes[..2].copy_from_slice(&F::service_prefixes());
    settings.service_prefix_count = 2;
    settings.service_cidr_count = 1;
    settings.node_addresses[0] = F::node();
    settings.node_address_count = 1;
    let [Prefix { mask, .. }, _] = F::service_prefixes();
    settings.pod_prefixes[0] = Prefix { address: F::remote_pod(0), mask };
    settings.pod_prefix_count = 1;
    settings.node_source = F::node();
    settings
}

impl<F: TestFamily> World<F> {
    /// Adds a service port without backends and returns its index in SERVICES.
    pub fn add_service(&mut self, frontend: Endpoint<F::Address>, protocol: u8) -> u32 {
        let index = self.services.len() as u32;
        self.services.push(Service::default());
        self.add_frontend(index, frontend, protocol);
        let address = FrontendKey::of_address(frontend.address);
        if !self.frontends.iter().any(|(key, _)| *key == address) {
            let whole = self.services.len() as u32;
            self.services.push(Service { flags: Service::ADDRESS, ..Service::default() });
            let kind = FrontendKind::CLUSTER_IP_ADDRESS;
            let frontend = Frontend { service: whole, kind, ..Frontend::default() };
            self.frontends.push((address, frontend));
        }
        index
    }

    /// Adds another frontend of a service port.
    pub fn add_frontend(&mut self, service: u32, frontend: Endpoint<F::Address>, protocol: u8) {
        self.add_frontend_of_kind(FrontendKind::CLUSTER_IP, service, frontend, protocol);
    }

    /// Adds a frontend of any kind.
    pub fn add_frontend_of_kind(
        &mut self,
        kind: FrontendKind,
        service: u32,
        frontend: Endpoint<F::Address>,
        protocol: u8,
    ) {
        self.settings.flags |= Settings::EXTERNAL;
        let key = FrontendKey::new(frontend.address, frontend.port, protocol);
        self.frontends.push((key, Frontend { service, kind, ..Frontend::default() }));
        let whole = FrontendKey::of_address(frontend.address);
        let has_whole = self.frontends.iter().any(|(key, _)| *key == whole);
        if kind == FrontendKind::EXTERNAL && !has_whole {
            let kind = FrontendKind::EXTERNAL_ADDRESS;
            let service = self.services.len() as u32;
            self.services.push(Service { flags: Service::ADDRESS, ..Service::default() });
            self.frontends.push((whole, Frontend { service, kind, ..Frontend::default() }));
        }
    }

    /// Admits only clients of `ranges` at the external frontends of a service port.
    pub fn restrict(&mut self, service: u32, ranges: &[Prefix<F::Address>]) {
        for (_, frontend) in &mut self.frontends {
            if frontend.service == service && frontend.kind == FrontendKind::EXTERNAL {
                frontend.flags |= Frontend::RANGED;
            }
        }
        self.ranges.extend(ranges.iter().map(|range| (service, *range)));
    }

    /// Removes the frontends of a service port, and the one of the whole address if it was the
    /// last one there.
    pub fn remove_frontends(&mut self, service: u32) {
        self.frontends.retain(|(_, frontend)| frontend.service != service);
        let left = self.frontends.clone();
        self.frontends.retain(|(key, _)| {
            key.protocol != 0
                || left.iter().any(|(other, _)| other.protocol != 0 && other.address == key.address)
        });
    }

    /// Adds a backend that is serving, and returns its id.
    pub fn add_backend(
        &mut self,
        service: u32,
        to: Endpoint<F::Address>,
        location: Location,
    ) -> u32 {
        let (flags, local) = match location {
            Location::LocalPod => (ON_THIS_NODE, IN_LOCAL_SET),
            Location::ThisHost => (ON_THIS_NODE | THIS_HOST, IN_LOCAL_SET),
            Location::OtherNode => (0, 0),
        };
        let node = if flags == 0 { F::other_node() } else { F::Address::default() };
        let id = self.backends.len() as u32;
        self.backends.push(Backend {
            address: to.address,
            port: to.port,
            generation: 1,
            sets: IN_CLUSTER_SET | local,
            flags,
            zero: 0,
            service,
            node,
        });
        self.publish();
        id
    }

    /// Removes a backend from every set, as when it terminates but is still in its slice.
    pub fn drain(&mut self, id: u32) {
        self.backends[id as usize].sets = 0;
        self.publish();
    }

    /// Removes a backend from every set, as when its pod is not ready, but is still in its slice.
    pub fn stop_serving(&mut self, id: u32) {
        self.backends[id as usize].flags |= NOT_SERVING;
        self.drain(id);
    }

    /// Makes a backend what it was before it stopped to serve.
    pub fn serve_again(&mut self, id: u32, before: Backend<F::Address>) {
        self.backends[id as usize] = before;
        self.publish();
    }

    /// Removes a backend for good.
    pub fn remove_backend(&mut self, id: u32) {
        let backend = &mut self.backends[id as usize];
        backend.generation += 1;
        backend.sets = 0;
        self.publish();
    }

    /// The address and port of a backend.
    pub fn endpoint(&self, id: u32) -> Endpoint<F::Address> {
        let backend = &self.backends[id as usize];
        Endpoint { address: backend.address, port: backend.port }
    }

    /// Gives every service port new slots, as a change of its backends does.
    fn publish(&mut self) {
        for index in 1..self.services.len() as u32 {
            if self.services[index as usize].flags & Service::ADDRESS == 0 {
                self.services[index as usize].cluster = self.stage(index, IN_CLUSTER_SET);
                self.services[index as usize].local = self.stage(index, IN_LOCAL_SET);
            }
        }
        for (key, frontend) in self.frontends.iter().filter(|(key, _)| key.protocol == 0) {
            let lives = self.frontends.iter().any(|(other, frontend)| {
                other.protocol != 0
                    && other.address == key.address
                    && self.services[frontend.service as usize].cluster.length() > 0
            });
            self.services[frontend.service as usize].cluster = SlotRange::new(0, lives.into());
        }
    }

    fn stage(&mut self, service: u32, set: u8) -> SlotRange {
        let start = self.slots.len() as u32;
        let members = self.backends.iter().enumerate().filter(|(_, backend)| {
            backend.service == service && service != 0 && backend.sets & set != 0
        });
        self.slots.extend(members.map(|(id, _)| Slot { backend: id as u32 }));
        let length = self.slots.len() as u32 - start;
        if length == 0 { SlotRange::EMPTY } else { SlotRange::new(start, length) }
    }
}

/// An address and port.
pub fn at<A: lb_common::abi::address::Address>(address: A, port: u16) -> Endpoint<A> {
    Endpoint { address, port: Be16::new(port) }
}
