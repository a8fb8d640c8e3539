//! The programs of lb with the state of a node in their maps: a Service with some
//! backends, one with none, and ten thousand others beside them.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::Path,
};

use anyhow::{Context, Result};
use aya::{
    Ebpf,
    programs::{TestRun, TestRunOptions},
};
use bytemuck::Pod;
use lb_agent::maps::flow_table::{FlowAddress, FlowTable};
use lb_common::{
    abi::{
        address::{Address4, Address6, Be16, Family, Ipv4, Ipv6, Prefix},
        backend::{Backend, IN_CLUSTER_SET},
        counter::Hook,
        flow::{Flow, FlowKey},
        frontend::{Frontend, FrontendKey, FrontendKind, TCP, UDP},
        service::{Service, Slot, SlotRange},
        settings::{
            Device, FamilySettings, FormerLifetimes, PortRange, Settings, SettingsPair, Timeouts,
        },
    },
    balance::track,
};
use lb_sys::{PerCpuCounters, TypedMap};

use super::{
    frames::Frame,
    harness::{Wrapper, classifier, load_object, load_programs, map, map_descriptor, program},
};
use crate::harness::flows;

/// A family as the benchmark knows it.
pub trait Side: Frame + Family<Address: FlowAddress> {
    /// `IPv4` or `IPv6`.
    const NAME: &'static str;
    /// Maps: frontends, backends, nodes.
    const MAPS: [&'static str; 3];
    /// tc wrappers that rotate the source and the destination.
    const WRAPPERS: [Wrapper; 2];
    /// The same of XDP.
    const XDP_WRAPPERS: [Wrapper; 2];
    /// The first index of this family in SERVICES.
    const FIRST_SERVICE: u32;

    /// The address of network `network` (a number below 256) with these last two bytes.
    fn address(network: u8, host: u16) -> Self::Address;
    /// The prefix of a network of [`Side::address`].
    fn prefix(network: u8) -> Prefix<Self::Address>;
    /// The address with its last word combined with `bits`.
    fn rotated(address: Self::Address, bits: u32) -> Self::Address;
    /// What fills the family's maps.
    ///
    /// # Errors
    /// The object lacks one, or it has another layout.
    fn fill(object: &Ebpf) -> Result<Fill<Self::Address>>;
    /// What fills a hash or an LRU of flows.
    ///
    /// # Errors
    /// The object lacks it, or it has another layout.
    fn fill_flows(object: &Ebpf, name: &str) -> Result<FlowSetter<Self::Address>>;
}

impl Side for Ipv4 {
    const NAME: &'static str = "IPv4";
    const MAPS: [&'static str; 3] = ["FRONTENDS4", "BACKENDS4", "NODES4"];
    const WRAPPERS: [Wrapper; 2] = [Wrapper::tc("request4"), Wrapper::tc("reply4")];
    const XDP_WRAPPERS: [Wrapper; 2] = [Wrapper::xdp("xdp_request4"), Wrapper::xdp("xdp_reply4")];
    const FIRST_SERVICE: u32 = 0;

    fn address(network: u8, host: u16) -> Address4 {
        let [high, low] = host.to_be_bytes();
        std::net::Ipv4Addr::new(10, network, high, low).into()
    }

    fn prefix(network: u8) -> Prefix<Address4> {
        Prefix {
            address: Self::address(network, 0),
            mask: std::net::Ipv4Addr::new(255, 255, 0, 0).into(),
        }
    }

    fn rotated(address: Address4, bits: u32) -> Address4 {
        Address4 { be32: address.be32 ^ bits }
    }

    fn fill(object: &Ebpf) -> Result<Fill<Address4>> {
        let [frontends, backends, nodes] = Self::MAPS;
        Ok(Fill {
            frontends: setter(object, frontends)?,
            backends: setter(object, backends)?,
            nodes: setter(object, nodes)?,
        })
    }

    fn fill_flows(object: &Ebpf, name: &str) -> Result<FlowSetter<Address4>> {
        setter(object, name)
    }
}

impl Side for Ipv6 {
    const NAME: &'static str = "IPv6";
    const MAPS: [&'static str; 3] = ["FRONTENDS6", "BACKENDS6", "NODES6"];
    const WRAPPERS: [Wrapper; 2] = [Wrapper::tc("request6"), Wrapper::tc("reply6")];
    const XDP_WRAPPERS: [Wrapper; 2] = [Wrapper::xdp("xdp_request6"), Wrapper::xdp("xdp_reply6")];
    const FIRST_SERVICE: u32 = 16;

    fn address(network: u8, host: u16) -> Address6 {
        std::net::Ipv6Addr::new(0xfd00, 0x10, network.into(), 0, 0, 0, 0, host).into()
    }

    fn prefix(network: u8) -> Prefix<Address6> {
        const ALL: u16 = 0xffff;
        Prefix {
            address: Self::address(network, 0),
            mask: std::net::Ipv6Addr::new(ALL, ALL, ALL, ALL, ALL, ALL, ALL, 0).into(),
        }
    }

    fn rotated(address: Address6, bits: u32) -> Address6 {
        let [a, b, c, d] = address.be32;
        Address6 { be32: [a, b, c, d ^ bits] }
    }

    fn fill(object: &Ebpf) -> Result<Fill<Address6>> {
        let [frontends, backends, nodes] = Self::MAPS;
        Ok(Fill {
            frontends: setter(object, frontends)?,
            backends: setter(object, backends)?,
            nodes: setter(object, nodes)?,
        })
    }

    fn fill_flows(object: &Ebpf, name: &str) -> Result<FlowSetter<Address6>> {
        setter(object, name)
    }
}

/// Sets many entries of a map.
type Setter<K, V> = Box<dyn Fn(&[K], &[V]) -> io::Result<()>>;
/// Sets many entries of a hash or an LRU of flows.
pub type FlowSetter<A> = Setter<FlowKey<A>, Flow<A>>;

/// The maps of one family, to be filled.
pub struct Fill<A> {
    frontends: Setter<FrontendKey<A>, Frontend>,
    backends: Setter<u32, Backend<A>>,
    nodes: Setter<A, u32>,
}

fn setter<K: Pod, V: Pod>(object: &Ebpf, name: &str) -> Result<Setter<K, V>> {
    let map: TypedMap<K, V> = map(object, name)?;
    Ok(Box::new(move |keys, values| map.set_batch(keys, values).1))
}

/// Networks, for [`Side::address`]: pods of this node, ClusterIPs, pods of another node,
/// nodes, and other addresses.
pub const PODS: u8 = 244;
const CLUSTER_IPS: u8 = 96;
const REMOTE_PODS: u8 = 245;
/// Pods whose flows are always new ones.
pub const NEW_PODS: u8 = 200;
/// See [`PODS`].
pub const NODES: u8 = 18;
/// See [`PODS`].
pub const ELSEWHERE: u8 = 33;
/// Clients outside.
pub const CLIENTS: u8 = 34;
/// Clients outside whose flows are always new ones.
pub const NEW_CLIENTS: u8 = 35;

/// The node's own host number in [`NODES`].
pub const THIS_NODE: u16 = 11;
/// Ports of the Service with backends, TCP then UDP.
pub const PORTS: [u16; 2] = [80, 53];
/// Ports of the Service without.
pub const EMPTY_PORTS: [u16; 2] = [81, 54];
/// Node ports of the Service with backends, TCP then UDP.
pub const NODE_PORTS: [u16; 2] = [30_080, 30_053];
/// Node ports of a Service with as many backends, in external mode `dsr`.
pub const DSR_NODE_PORTS: [u16; 2] = [30_081, 30_054];
/// The node that backends run on, and how many nodes there are.
const OTHER_NODE: u16 = 12;
const NODE_COUNT: u16 = 1_000;
const TARGET_PORT: u16 = 8080;
/// How many backends the Service has: so many that a full table of flows occupies only few of
/// the source ports for each backend.
pub const BACKENDS: u32 = 64;

/// The frontends of the Service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frontends {
    /// ClusterIPs alone.
    ClusterIps,
    /// Node ports too.
    NodePorts,
}

/// The ClusterIP.
pub fn cluster_ip<F: Side>() -> F::Address {
    F::address(CLUSTER_IPS, 10)
}

/// A backend of the Service's TCP port.
pub fn backend_endpoint<F: Side>() -> (F::Address, Be16) {
    let backend = backend::<F>(F::FIRST_SERVICE, F::FIRST_SERVICE * BACKENDS);
    (backend.address, backend.port)
}

/// The programs and their maps.
pub struct Datapath {
    object: Ebpf,
    /// COUNTERS.
    pub counters: PerCpuCounters,
    /// The external device.
    pub device: Device,
    settings: Settings,
}

impl Datapath {
    /// Loads the programs with so many places for flows, IPv4 and IPv6, and sets up the node;
    /// `device` is its external device.
    ///
    /// # Errors
    /// No such object, or the kernel refuses something.
    pub fn load(
        object: &Path,
        places: [u32; 2],
        device: Device,
        frontends: Frontends,
    ) -> Result<Self> {
        let mut object = load_object(object, &flows::sizes(places))?;
        flows::write_seed(|name| map_descriptor(&object, name), places)?;
        load_programs(&mut object)?;
        let counters = PerCpuCounters::new(map_descriptor(&object, "COUNTERS")?)?;
        let settings = settings(frontends);
        let datapath = Self { object, counters, device, settings };
        let pair = SettingsPair { active: 0, zero: 0, copies: [settings; 2] };
        datapath.map("SETTINGS")?.set(&0u32, &pair).context("cannot set SETTINGS")?;
        datapath.map("DEVICES")?.set(&0u32, &device)?;
        datapath.set_up::<Ipv4>(frontends)?;
        datapath.set_up::<Ipv6>(frontends)?;
        Ok(datapath)
    }

    /// The loaded object.
    pub fn object(&self) -> &Ebpf {
        &self.object
    }

    /// The program of a hook.
    ///
    /// # Errors
    /// The object has none.
    pub fn program(&self, hook: Hook) -> Result<&aya::programs::ProgramFd> {
        program(&self.object, hook.name())
    }

    fn map<K: Pod, V: Pod>(&self, name: &str) -> Result<TypedMap<K, V>> {
        map(&self.object, name)
    }

    /// Now, in the unit of the times of flows.
    ///
    /// # Errors
    /// The object has no clock, or the kernel refuses to run it.
    pub fn time(&self) -> Result<u32> {
        let mut options = TestRunOptions::new();
        options.data_in = Some(&[0; 64]);
        let ticks = classifier(&self.object, "clock")?.test_run(options)?.return_value;
        Ok(self.settings.time(ticks))
    }

    /// The table of flows.
    ///
    /// # Errors
    /// The object has none.
    pub fn flows<F: Side>(&self) -> Result<FlowTable<F::Address>> {
        flows::open(|name| map_descriptor(&self.object, name))
    }

    fn set_up<F: Side>(&self, frontends: Frontends) -> Result<()> {
        let (state, fill) = (State::<F>::node(frontends), F::fill(&self.object)?);
        let (keys, values): (Vec<_>, Vec<_>) = state.frontends.into_iter().unzip();
        (fill.frontends)(&keys, &values).context("cannot set frontends")?;
        let (keys, values): (Vec<_>, Vec<_>) = state.backends.into_iter().unzip();
        (fill.backends)(&keys, &values).context("cannot set backends")?;
        let nodes: Vec<_> = state.nodes.into_iter().collect();
        (fill.nodes)(&nodes, &vec![1; nodes.len()]).context("cannot set nodes")?;
        for (index, service) in state.services {
            self.map("SERVICES")?.set(&index, &service)?;
        }
        for (position, backend) in state.slots {
            self.map("SLOTS")?.set(&position, &Slot { backend })?;
        }
        Ok(())
    }
}

/// The entries of a family's tables, except flows.
pub struct State<F: Side> {
    /// FRONTENDS.
    pub frontends: BTreeMap<FrontendKey<F::Address>, Frontend>,
    /// SERVICES.
    pub services: BTreeMap<u32, Service>,
    /// SLOTS.
    pub slots: BTreeMap<u32, u32>,
    /// BACKENDS.
    pub backends: BTreeMap<u32, Backend<F::Address>>,
    /// NODES.
    pub nodes: BTreeSet<F::Address>,
}

impl<F: Side> State<F> {
    /// The node that everything is measured on.
    pub fn node(frontends: Frontends) -> Self {
        let mut state = Self {
            frontends: BTreeMap::new(),
            services: BTreeMap::new(),
            slots: BTreeMap::new(),
            backends: BTreeMap::new(),
            nodes: BTreeSet::new(),
        };
        let frontend = |service, kind| Frontend { service, kind, flags: 0, zero: 0 };
        let others = frontend(F::FIRST_SERVICE + 4, FrontendKind::CLUSTER_IP);
        let address = frontend(others.service, FrontendKind::CLUSTER_IP_ADDRESS);
        state.frontends.insert(FrontendKey::of_address(cluster_ip::<F>()), address);
        for other in 256..10_256 {
            let key = FrontendKey::new(F::address(CLUSTER_IPS, other), Be16::new(80), TCP);
            state.frontends.insert(key, others);
        }
        for (index, protocol) in [TCP, UDP].into_iter().enumerate() {
            for (ports, first) in [(PORTS, 0), (EMPTY_PORTS, 2)] {
                let key = FrontendKey::new(cluster_ip::<F>(), Be16::new(ports[index]), protocol);
                let service = F::FIRST_SERVICE + first + index as u32;
                state.frontends.insert(key, frontend(service, FrontendKind::CLUSTER_IP));
            }
            let service = F::FIRST_SERVICE + index as u32;
            state.add_backends(service, 0);
            if frontends == Frontends::NodePorts {
                let dsr = dsr_service_of::<F>(protocol);
                state.add_backends(dsr, Service::DSR);
                for (service, port) in [(service, NODE_PORTS[index]), (dsr, DSR_NODE_PORTS[index])]
                {
                    let node = F::address(NODES, THIS_NODE);
                    let key = FrontendKey::new(node, Be16::new(port), protocol);
                    state.frontends.insert(key, frontend(service, FrontendKind::NODE_PORT));
                }
            }
        }
        state.nodes = (1..=NODE_COUNT).map(|host| F::address(NODES, host)).collect();
        state
    }

    fn add_backends(&mut self, service: u32, flags: u32) {
        // The first backend drains. Known flows use it, so that they occupy no source port of
        // the backends that new flows get.
        let range = SlotRange::new(service * BACKENDS + 1, BACKENDS - 1);
        self.services.insert(service, Service { cluster: range, flags, ..Service::default() });
        for position in service * BACKENDS..(service + 1) * BACKENDS {
            self.slots.insert(position, position);
            self.backends.insert(position, backend::<F>(service, position));
        }
    }
}

/// The settings of the node.
pub fn settings(frontends: Frontends) -> Settings {
    // A day with CONFIG_HZ=100, 2.4 hours with 1000: no flow expires during a run.
    const LONG: u32 = 24 * 3600 * 100;
    let time_shift = Settings::time_shift_of(250);
    let times = LONG >> time_shift;
    let timeouts = Timeouts {
        tcp_syn: times,
        tcp_established: times,
        tcp_half_closed: times,
        tcp_fin_one_way: times,
        tcp_closing: times,
        tcp_reset: times,
        udp: times,
        udp_stream: times,
    };
    Settings {
        ipv4: family_settings::<Ipv4>(),
        ipv6: family_settings::<Ipv6>(),
        lifetimes: FormerLifetimes::default(),
        flow_lifetimes: track::lifetimes(&timeouts),
        // With node ports a second never passes, so that flows do not look up their route again.
        ticks_per_second: if frontends == Frontends::NodePorts { LONG } else { 250 },
        flags: if frontends == Frontends::NodePorts { Settings::EXTERNAL } else { 0 },
        node_ports: match frontends {
            Frontends::ClusterIps => PortRange::default(),
            Frontends::NodePorts => PortRange { first: 30_000, count: 2_768 },
        },
        source_ports: PortRange { first: 1_024, count: 28_976 },
        time_shift,
        zero: 0,
    }
}

fn family_settings<F: Side>() -> FamilySettings<F::Address> {
    let mut family = FamilySettings::default();
    family.service_prefixes[0] = F::prefix(CLUSTER_IPS);
    family.service_prefix_count = 1;
    family.service_cidr_count = 1;
    family.node_addresses[0] = F::address(NODES, THIS_NODE);
    family.node_addresses[1] = F::address(PODS, 1);
    family.node_address_count = 2;
    family.node_source = F::address(NODES, THIS_NODE);
    family.pod_prefixes[..2].copy_from_slice(&[F::prefix(PODS), F::prefix(REMOTE_PODS)]);
    family.pod_prefix_count = 2;
    family
}

/// The index of the Service's entry of a protocol in SERVICES.
pub fn service_of<F: Side>(protocol: u8) -> u32 {
    F::FIRST_SERVICE + u32::from(protocol == UDP)
}

/// The same of the Service in external mode `dsr`.
pub fn dsr_service_of<F: Side>(protocol: u8) -> u32 {
    service_of::<F>(protocol) + 6
}

/// A backend of a service.
pub fn backend<F: Side>(service: u32, id: u32) -> Backend<F::Address> {
    Backend {
        address: F::address(REMOTE_PODS, 2 + id as u16),
        port: Be16::new(TARGET_PORT),
        generation: 0,
        sets: IN_CLUSTER_SET,
        flags: 0,
        zero: 0,
        service,
        node: F::address(NODES, OTHER_NODE),
    }
}
