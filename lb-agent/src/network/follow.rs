//! Follows interfaces, addresses and routes by rtnetlink, and keeps programs on interfaces.
//!
//! It does not read /sys/class/net, which shows the network namespace that mounted it: netlink
//! shows the agent's.

mod inbox;
mod order;
mod resync;
mod route_sources;
mod updates;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use lb_common::abi::settings::MAX_DEVICES;
use lb_control::model::network::{Interface, NodeNetwork};
use netlink_packet_route::RouteNetlinkMessage;
use rtnetlink::{Handle, MulticastGroup, packet_core::NetlinkMessage, sys::SocketAddr};
use tokio::{sync::watch, task::JoinHandle, time::sleep};
use tracing::{debug, info, warn};

use self::{
    inbox::{Inbox, Received},
    resync::Resync,
    route_sources::finished,
};
use super::{
    error::InterfaceError,
    interfaces::{Network, attach_points, in_order},
    messages::{Stale, read},
    own_packets,
};
use crate::{
    maps::{
        devices::Devices,
        pins::Pins,
        sources::{Sources, SourcesByRoute},
    },
    metrics::Metrics,
    options::{
        modes::{TcAttach, XdpMode},
        values::Patterns,
    },
    programs::{
        hook::{AttachPoint, Direction, Role},
        load::Programs,
        tc::{TcAttacher, is_gone},
        xdp::XdpAttacher,
    },
};

/// Which interfaces get programs, and how.
#[derive(Clone, Debug)]
pub struct InterfaceOptions {
    /// `--devices`.
    pub devices: Patterns,
    /// `--pod-interfaces`.
    pub pods: Patterns,
    /// `--tc-attach`.
    pub attach: TcAttach,
    /// `--xdp`.
    pub xdp: XdpMode,
    /// Where failures are counted.
    pub metrics: Option<Metrics>,
}

/// How often it is checked whether every link is still attached, which the kernel does not announce.
const CHECK: Duration = Duration::from_secs(2);
/// The delay before a failed operation is retried: doubled each time.
const RETRY: Duration = Duration::from_secs(1);
const LONGEST_RETRY: Duration = Duration::from_secs(5);
/// How many messages may wait.
const QUEUE: usize = 8_192;
/// The minimum interval between two invalidations of next hops.
const INVALIDATE: Duration = Duration::from_millis(10);
/// The interval between two looks at the order of programs.
const LOOK_AT_ORDER: Duration = Duration::from_secs(60);

type Message = (NetlinkMessage<RouteNetlinkMessage>, SocketAddr);

/// The programs on the interfaces of this network namespace.
pub struct Interfaces {
    options: InterfaceOptions,
    programs: Arc<Programs>,
    attacher: TcAttacher,
    xdp: XdpAttacher,
    devices: Devices,
    handle: Handle,
    messages: Inbox<Message>,
    resync: Resync,
    connection: JoinHandle<()>,
    network: Network,
    /// The roles of the interfaces.
    roles: BTreeMap<u32, Role>,
    sources: Sources,
    /// When the source addresses of routes may be read again, and whether they have to be.
    read_sources_at: Instant,
    reads_sources: bool,
    /// The reading that goes on.
    sources_read: Option<JoinHandle<Result<SourcesByRoute, InterfaceError>>>,
    /// The addresses of the Node object; `None` until they are known.
    node_addresses: Option<Vec<IpAddr>>,
    /// The roles that an earlier agent gave to interfaces, until the addresses are known.
    held_roles: BTreeMap<u32, Role>,
    attached: BTreeMap<AttachPoint, &'static str>,
    /// Attach points whose program another process has detached.
    lost: BTreeSet<AttachPoint>,
    /// When programs that could not be attached are attached again, and the delay after that.
    retry_at: Option<Instant>,
    retry: Duration,
    /// Interfaces that exist, but that no message described when everything was read last, and
    /// those of them that are missing since the time before.
    undescribed: BTreeMap<u32, String>,
    unparsed: Vec<String>,
    /// When the next hops of flows may be invalidated again, and whether they have to be.
    invalidate_at: Instant,
    invalidates: bool,
    /// Unsupported devices that are logged already.
    warned: BTreeSet<u32>,
    published: watch::Sender<NodeNetwork>,
}

impl Interfaces {
    /// Attaches programs to the existing interfaces, replacing those of an earlier agent in
    /// place. `node_addresses` are those of the Node object, or `None` if they are not known
    /// yet: they alone may make a device external, so until then every interface keeps the
    /// programs it has. Once they are known, programs of an earlier agent on interfaces without
    /// a role are detached.
    ///
    /// # Errors
    /// [`InterfaceError`] if netlink or the pins cannot be read. Programs that cannot be attached
    /// are reported in [`NodeNetwork::unhandled`].
    pub async fn open(
        pins: &Pins,
        programs: Arc<Programs>,
        options: InterfaceOptions,
        node_addresses: Option<Vec<IpAddr>>,
    ) -> Result<Self, InterfaceError> {
        let attacher = TcAttacher::new(pins, options.attach, programs.names.clone())?;
        let mut groups = vec![
            MulticastGroup::Link,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
            MulticastGroup::Ipv4Rule,
            MulticastGroup::Ipv6Rule,
            MulticastGroup::Neigh,
        ];
        if !attacher.is_by_tcx() {
            groups.push(MulticastGroup::Tc);
        }
        let (connection, handle, messages) = rtnetlink::new_multicast_connection(&groups)
            .map_err(|source| InterfaceError::Connect { source })?;
        let mut interfaces = Self {
            attacher,
            xdp: XdpAttacher::new(pins, options.xdp)?,
            devices: Devices::open(pins)?,
            options,
            programs,
            handle,
            messages: Inbox::new(messages, QUEUE),
            resync: Resync::new(Instant::now()),
            connection: tokio::spawn(connection),
            network: Network::default(),
            roles: BTreeMap::new(),
            sources: Sources::open(pins)?,
            read_sources_at: Instant::now(),
            reads_sources: true,
            sources_read: None,
            node_addresses,
            held_roles: BTreeMap::new(),
            attached: BTreeMap::new(),
            lost: BTreeSet::new(),
            retry_at: None,
            retry: RETRY,
            undescribed: BTreeMap::new(),
            unparsed: Vec::new(),
            invalidate_at: Instant::now(),
            invalidates: true,
            warned: BTreeSet::new(),
            published: watch::Sender::default(),
        };
        let held = interfaces.sources.route_sources();
        interfaces.published.send_modify(|network| network.route_sources = held);
        interfaces.network = read(&interfaces.handle).await?;
        interfaces.attacher.find_filters();
        if interfaces.node_addresses.is_none() {
            let links = interfaces.network.links.keys();
            interfaces.held_roles = links
                .filter_map(|index| Some((*index, interfaces.attacher.attached_role(*index)?)))
                .collect();
        }
        let wanted = interfaces.reconcile()?;
        if interfaces.node_addresses.is_some() {
            interfaces.detach_orphans(&wanted);
        }
        own_packets::accept();
        Ok(interfaces)
    }

    /// Replaces the attached programs in place by others of the same names.
    ///
    /// # Errors
    /// [`InterfaceError`] if a map cannot be written.
    pub fn replace_programs(&mut self, programs: Arc<Programs>) -> Result<(), InterfaceError> {
        self.programs = programs;
        self.attached.clear();
        self.xdp.recheck_all();
        self.reconcile().map(drop)
    }

    /// The state of the network namespace, now and after each change.
    pub fn subscribe(&self) -> watch::Receiver<NodeNetwork> {
        self.published.subscribe()
    }

    /// Follows changes of the network namespace, and of the addresses of the Node object, until
    /// the netlink socket breaks or the future is dropped. Programs stay attached.
    ///
    /// # Errors
    /// [`InterfaceError`] if the netlink socket breaks.
    pub async fn run(
        mut self,
        mut node_addresses: watch::Receiver<Option<Vec<IpAddr>>>,
    ) -> Result<(), InterfaceError> {
        let mut check_at = Instant::now() + CHECK;
        let mut order_at = Instant::now();
        loop {
            let was_known = self.node_addresses.is_some();
            let until = |at: Instant| at - Instant::now().min(at);
            let mut wait = until(self.resync.at()).min(until(check_at));
            if let Some(retry_at) = self.retry_at {
                wait = wait.min(until(retry_at));
            }
            if self.invalidates {
                wait = wait.min(until(self.invalidate_at));
            }
            if self.reads_sources && self.sources_read.is_none() {
                wait = wait.min(until(self.read_sources_at));
            }
            let mut stale = tokio::select! {
                received = self.messages.next() => match received {
                    Received::Closed => return Err(InterfaceError::Closed),
                    received => self.gather(received).await,
                },
                Ok(()) = node_addresses.changed() => {
                    self.node_addresses = node_addresses.borrow_and_update().clone();
                    Stale { interfaces: true, ..Stale::default() }
                }
                read = finished(&mut self.sources_read) => {
                    self.sources_read = None;
                    self.apply_sources(read)?;
                    continue;
                }
                () = sleep(wait) => Stale::default(),
            };
            let now = Instant::now();
            stale.all |= now >= self.resync.at();
            stale.interfaces |= self.retry_at.is_some_and(|at| now >= at);
            stale.interfaces |= self.find_detached_filters(&stale.filters);
            if now >= check_at {
                stale.interfaces |= self.find_detached_links();
                check_at = Instant::now() + CHECK;
                if Instant::now() >= order_at {
                    self.attacher.find_filters();
                    self.find_misplaced();
                    order_at = Instant::now() + LOOK_AT_ORDER;
                }
            }
            let all = stale.all;
            self.invalidates |= all || stale.next_hops;
            if self.invalidates && Instant::now() >= self.invalidate_at {
                self.devices.invalidate_next_hops()?;
                self.invalidates = false;
                self.invalidate_at = Instant::now() + INVALIDATE;
            }
            let is_of_external =
                |index: &u32| *index == 0 || self.roles.get(index) == Some(&Role::External);
            self.reads_sources |= all || stale.sources.iter().any(is_of_external);
            self.read_sources();
            if all {
                self.read_all().await?;
            } else if !self.refresh(stale).await? {
                continue;
            }
            let wanted = self.reconcile()?;
            if self.node_addresses.is_some() && (all || !was_known) {
                self.detach_orphans(&wanted);
            }
        }
    }

    /// Finds programs whose filter is no longer there, on these interfaces, and marks them to be
    /// attached again. Returns whether there are any.
    fn find_detached_filters(&mut self, interfaces: &BTreeSet<u32>) -> bool {
        !self.attacher.is_by_tcx() && self.find_detached(|(index, _)| interfaces.contains(index))
    }

    /// Finds programs whose link is no longer attached, at the cost of a system call each, and
    /// marks them to be attached again. Returns whether there are any.
    fn find_detached_links(&mut self) -> bool {
        let by_tcx = self.attacher.is_by_tcx() && self.find_detached(|_| true);
        self.xdp.find_detached(&self.programs) || by_tcx
    }

    fn find_detached(&mut self, is_checked: impl Fn(&AttachPoint) -> bool) -> bool {
        let is_lost = |(point, program): &(&AttachPoint, &&'static str)| {
            is_checked(point) && !self.attacher.is_attached(&self.programs, program, **point)
        };
        let lost = self.attached.iter().filter(is_lost).map(|(point, _)| *point);
        let lost: Vec<AttachPoint> = lost.collect();
        for point in &lost {
            self.attached.remove(point);
        }
        self.lost.extend(&lost);
        !lost.is_empty()
    }

    /// Attaches missing programs, detaches those of interfaces that lost their role, and publishes
    /// the state. Returns the wanted attach points, attached or not.
    fn reconcile(&mut self) -> Result<BTreeSet<AttachPoint>, InterfaceError> {
        let InterfaceOptions { devices, pods, .. } = &self.options;
        let known = self.node_addresses.as_deref();
        let (mut roles, excess) =
            self.network.roles_and_excess(devices, pods, known.unwrap_or_default());
        if known.is_none() {
            self.network.keep_held_roles(&mut roles, &mut self.held_roles);
        }
        let mut unhandled: Vec<String> = excess
            .iter()
            .map(|device| {
                format!(
                    "more than {MAX_DEVICES} external devices: Service traffic of {} is not \
                     handled; choose the devices with --devices",
                    device.name
                )
            })
            .collect();
        for device in self.network.unsupported(devices, known.unwrap_or_default()) {
            if self.warned.insert(device.index) {
                warn!(
                    device = device.name,
                    "packets of this device have neither an Ethernet header nor none, which lb does \
                     not support: its Service traffic is not handled"
                );
            }
        }
        self.reads_sources |= self.roles != roles;
        self.roles.clone_from(&roles);
        let header = |index| self.network.links.get(&index).map(|link| link.header);
        let wanted = attach_points(&roles, |index| header(index).unwrap_or_default());
        // The entries of DEVICES that flows of node processes refer to exist before the flows.
        let unplaced = self.devices.set(&self.network.devices(&roles))?;
        unhandled.extend(self.unparsed.iter().cloned());
        unhandled.extend(unplaced.iter().map(|device| {
            format!("map DEVICES is full: no entry for interface {}", device.ifindex)
        }));
        self.detach_unwanted(&wanted);
        let points = wanted.keys().copied().collect();
        let failures = self.attach_missing(wanted);
        if failures.is_empty() {
            (self.retry_at, self.retry) = (None, RETRY);
        } else {
            self.retry_at = Some(Instant::now() + self.retry);
            self.retry = (self.retry * 2).min(LONGEST_RETRY);
        }
        let (lost, others): (Vec<_>, Vec<_>) =
            failures.into_iter().partition(|(point, _)| self.lost.contains(point));
        let problems = lost.into_iter().map(|(_, sentence)| sentence).collect();
        unhandled.extend(others.into_iter().map(|(_, sentence)| sentence));
        self.attach_xdp(&roles);
        let node = NodeNetwork {
            problems,
            unhandled,
            route_sources: self.published.borrow().route_sources.clone(),
            misplaced: self.published.borrow().misplaced.clone(),
            knows_node_object: self.node_addresses.is_some(),
            ..self.network.node(&roles)
        };
        self.publish(node);
        Ok(points)
    }

    /// Detaches the programs of interfaces that lost their role.
    fn detach_unwanted(&mut self, wanted: &BTreeMap<AttachPoint, &'static str>) {
        self.lost.retain(|point| wanted.contains_key(point));
        let unwanted = |(point, _): &(&AttachPoint, &&str)| !wanted.contains_key(*point);
        let unwanted = self.attached.iter().filter(unwanted);
        let unwanted = unwanted.map(|(point, program)| (*point, *program));
        for ((index, direction), _) in in_order(unwanted).into_iter().rev() {
            self.attached.remove(&(index, direction));
            self.detach(index, direction);
        }
    }

    /// Attaches the programs that are not attached yet. Returns the failures as sentences.
    fn attach_missing(
        &mut self,
        wanted: BTreeMap<AttachPoint, &'static str>,
    ) -> Vec<(AttachPoint, String)> {
        let mut failures = Vec::new();
        // Interfaces whose first program could not be attached: their others wait.
        let mut held_back = BTreeSet::new();
        let is_missing = |(point, program): &(AttachPoint, &'static str)| {
            self.attached.get(point) != Some(program)
        };
        let missing: Vec<_> = wanted.into_iter().filter(is_missing).collect();
        if !missing.is_empty() {
            self.attacher.find_filters();
        }
        for (point, program) in in_order(missing) {
            if held_back.contains(&point.0) {
                continue;
            }
            let name = self.network.links.get(&point.0).map(|link| link.name.clone());
            let interface = Interface { index: point.0, name: name.unwrap_or_default() };
            match self.attacher.attach(&self.programs, program, &interface, point.1) {
                Ok(()) => {
                    debug!(program, interface = interface.name, "attached");
                    if self.lost.remove(&point) {
                        let interface = &interface.name;
                        warn!(
                            program,
                            interface, "detached by another program, and attached again"
                        );
                    }
                    self.attached.insert(point, program);
                }
                Err(error) if is_gone(&error) => debug!(%error, "the interface is gone"),
                Err(error) => {
                    let source = std::error::Error::source(&error).map(ToString::to_string);
                    warn!(%error, source, "an interface is not handled: retrying");
                    failures.push((point, format!("{error}: {}", source.unwrap_or_default())));
                    if let Some(metrics) = &self.options.metrics {
                        metrics.attach_failed();
                    }
                    held_back.insert(point.0);
                }
            }
        }
        failures
    }

    /// Attaches XDP to the external devices that have lb's tc programs already.
    fn attach_xdp(&mut self, roles: &BTreeMap<u32, Role>) {
        let is_external = |index| roles.get(&index) == Some(&Role::External);
        if self.node_addresses.is_some() {
            self.xdp.retain(is_external);
        }
        for (index, link) in self.network.links.iter().filter(|(index, _)| is_external(**index)) {
            let has_tc = self.attached.contains_key(&(*index, Direction::Ingress));
            if has_tc && !self.xdp.is_up_to_date(*index) {
                let interface = Interface { index: *index, name: link.name.clone() };
                self.xdp.attach(&self.programs, &interface, link.header);
            }
        }
    }

    fn publish(&self, node: NodeNetwork) {
        self.published.send_if_modified(|published| {
            if *published == node {
                return false;
            }
            info!(
                devices = ?node.devices.iter().map(|device| &device.name).collect::<Vec<_>>(),
                pods = node.pods,
                addresses = ?node.addresses,
                "interfaces of this node"
            );
            *published = node;
            true
        });
    }

    fn detach(&mut self, index: u32, direction: Direction) {
        if let Err(error) = self.attacher.detach(index, direction)
            && !is_gone(&error)
        {
            let advice = "run `lb-agent cleanup` to detach it";
            warn!(%error, index, "a program still handles packets of this interface: {advice}");
        }
    }

    /// Detaches the programs that an earlier agent left on interfaces without a role.
    fn detach_orphans(&mut self, wanted: &BTreeSet<AttachPoint>) {
        let linked: Vec<AttachPoint> = self.attacher.linked().collect();
        let others = self
            .network
            .links
            .keys()
            .flat_map(|index| [(*index, Direction::Ingress), (*index, Direction::Egress)]);
        let others: Vec<AttachPoint> = others.chain(linked).collect();
        for point in others {
            if !wanted.contains(&point) {
                self.detach(point.0, point.1);
            }
        }
    }
}

impl Drop for Interfaces {
    fn drop(&mut self) {
        if let Some(reading) = &self.sources_read {
            reading.abort();
        }
        self.connection.abort();
    }
}
