//! Keeps programs on interfaces as these come and go, by rtnetlink.
//!
//! It does not read /sys/class/net, which shows the namespace that mounted it: netlink
//! shows the one that the agent is in.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::{StreamExt, TryStreamExt, channel::mpsc::UnboundedReceiver};
use lb_control::{
    dataplane::DataplaneError,
    model::network::{Interface, NodeNetwork},
};
use netlink_packet_route::RouteNetlinkMessage;
use rtnetlink::{
    Handle, MulticastGroup,
    packet_core::{NetlinkMessage, NetlinkPayload},
    sys::SocketAddr,
};
use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{sleep, timeout},
};
use tracing::{debug, info, warn};

use super::{
    interfaces::{Network, in_order, places},
    messages::{Stale, apply, parse_link, read, read_routes},
};
use crate::{
    maps::{
        devices::Devices,
        pins::{PinError, Pins},
    },
    options::{
        modes::{TcAttach, XdpMode},
        values::Patterns,
    },
    programs::{
        hook::{Direction, Place, Role},
        load::Programs,
        tc::{AttachError, TcAttacher, is_gone},
        xdp::XdpAttacher,
    },
};

pub use super::survey::survey;

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
}

/// How often everything is read anew, in case a message was lost or somebody took a
/// program off.
const RESYNC: Duration = Duration::from_secs(60);
/// How often it is looked whether every program is still where it was put.
const NOTICE: Duration = Duration::from_secs(2);
/// How soon something that failed is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// Flows are told no more often than this to ask for their way anew.
const FORGET: Duration = Duration::from_millis(10);
/// How long messages of one change are gathered for, once one has come.
const GATHER: Duration = Duration::from_micros(500);

type Messages = UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, SocketAddr)>;

/// The programs on the interfaces of this network namespace.
pub struct Interfaces {
    options: InterfaceOptions,
    programs: Arc<Programs>,
    attacher: TcAttacher,
    xdp: XdpAttacher,
    devices: Devices,
    handle: Handle,
    messages: Messages,
    connection: JoinHandle<()>,
    network: Network,
    /// Of the Node object; `None` until it was asked for.
    node_addresses: Option<Vec<IpAddr>>,
    /// What an earlier agent took interfaces for, until the addresses are known.
    held: BTreeMap<u32, Role>,
    attached: BTreeMap<Place, &'static str>,
    /// Places whose program somebody has taken off.
    lost: BTreeSet<Place>,
    /// When flows may next be told to ask for their way anew, and whether they have to.
    forget_at: Instant,
    forgets: bool,
    /// Devices that cannot be supported, which was said.
    warned: BTreeSet<u32>,
    published: watch::Sender<NodeNetwork>,
}

impl Interfaces {
    /// Attaches programs to the interfaces that there are, in the place of those of an
    /// earlier agent. `node_addresses` are those of the Node object, or `None` if they
    /// are not known yet: a device may be external by them alone, and until then every
    /// interface keeps the programs it has. After that, what the earlier agent left on
    /// interfaces that are none of ours is detached.
    ///
    /// # Errors
    /// [`InterfaceError`] if the kernel cannot be asked or the pins be opened; what
    /// cannot be attached is told by [`NodeNetwork::problems`].
    pub async fn open(
        pins: &Pins,
        programs: Arc<Programs>,
        options: InterfaceOptions,
        node_addresses: Option<Vec<IpAddr>>,
    ) -> Result<Self, InterfaceError> {
        let groups = [
            MulticastGroup::Link,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
            MulticastGroup::Ipv4Rule,
            MulticastGroup::Ipv6Rule,
            MulticastGroup::Neigh,
        ];
        let (connection, handle, messages) = rtnetlink::new_multicast_connection(&groups)
            .map_err(|source| InterfaceError::Connect { source })?;
        let mut interfaces = Self {
            attacher: TcAttacher::new(pins, options.attach)?,
            xdp: XdpAttacher::new(pins, options.xdp)?,
            devices: Devices::open(pins)?,
            options,
            programs,
            handle,
            messages,
            connection: tokio::spawn(connection),
            network: Network::default(),
            node_addresses,
            held: BTreeMap::new(),
            attached: BTreeMap::new(),
            lost: BTreeSet::new(),
            forget_at: Instant::now(),
            forgets: true,
            warned: BTreeSet::new(),
            published: watch::Sender::default(),
        };
        interfaces.network = read(&interfaces.handle).await?;
        if interfaces.node_addresses.is_none() {
            let links = interfaces.network.links.keys();
            interfaces.held = links
                .filter_map(|index| Some((*index, interfaces.attacher.held_role(*index)?)))
                .collect();
        }
        let wanted = interfaces.reconcile()?;
        if interfaces.node_addresses.is_some() {
            interfaces.detach_strangers(&wanted);
        }
        accept_own_packets();
        Ok(interfaces)
    }

    /// What is known of the network namespace, now and whenever it changes.
    pub fn subscribe(&self) -> watch::Receiver<NodeNetwork> {
        self.published.subscribe()
    }

    /// Follows the changes of the network namespace, and of the addresses of the Node
    /// object, until the kernel can no longer be listened to. Dropping it ends it;
    /// programs stay where they are.
    ///
    /// # Errors
    /// [`InterfaceError`] if the netlink socket breaks.
    pub async fn run(
        mut self,
        mut node_addresses: watch::Receiver<Option<Vec<IpAddr>>>,
    ) -> Result<(), InterfaceError> {
        let mut resync_at = Instant::now() + RESYNC;
        let mut notice_at = Instant::now() + NOTICE;
        loop {
            let was_known = self.node_addresses.is_some();
            let failing = !self.published.borrow().problems.is_empty();
            let until = |at: Instant| at - Instant::now().min(at);
            let mut wait = until(resync_at).min(until(notice_at));
            if failing {
                wait = wait.min(RETRY);
            }
            if self.forgets {
                wait = wait.min(until(self.forget_at));
            }
            let stale = tokio::select! {
                message = self.messages.next() => {
                    let Some((message, _)) = message else { return Err(InterfaceError::Closed) };
                    self.gather(message).await
                }
                Ok(()) = node_addresses.changed() => {
                    self.node_addresses = node_addresses.borrow_and_update().clone();
                    Stale { interfaces: true, ..Stale::default() }
                }
                () = sleep(wait) => {
                    Stale { all: Instant::now() >= resync_at, interfaces: failing, ..Stale::default() }
                }
            };
            let mut stale = stale;
            if Instant::now() >= notice_at {
                stale.interfaces |= self.notice();
                notice_at = Instant::now() + NOTICE;
            }
            let all = stale.all;
            self.forgets |= all || stale.ways;
            if self.forgets && Instant::now() >= self.forget_at {
                self.devices.forget_ways()?;
                self.forgets = false;
                self.forget_at = Instant::now() + FORGET;
            }
            if !(all || stale.interfaces) {
                continue;
            }
            if all {
                self.attached.clear();
                self.xdp.unsettle();
                self.network = read(&self.handle).await?;
                resync_at = Instant::now() + RESYNC;
            } else {
                self.refresh(stale).await?;
            }
            let wanted = self.reconcile()?;
            if self.node_addresses.is_some() && (all || !was_known) {
                self.detach_strangers(&wanted);
            }
        }
    }

    /// Looks whether every program is still where it was put, for the cost of a system call
    /// or two each; what is not is to be attached anew. Whether there is any.
    fn notice(&mut self) -> bool {
        let is_lost = |(place, program): &(&Place, &&'static str)| {
            !self.attacher.is_attached(&self.programs, program, **place)
        };
        let lost = self.attached.iter().filter(is_lost).map(|(place, _)| *place);
        let lost: Vec<Place> = lost.collect();
        for place in &lost {
            self.attached.remove(place);
        }
        self.lost.extend(&lost);
        self.xdp.notice(&self.programs) || !lost.is_empty()
    }

    /// Takes in a message and those that come right behind it. The links are attended
    /// to at once, while the rest of the change still comes.
    async fn gather(&mut self, first: NetlinkMessage<RouteNetlinkMessage>) -> Stale {
        let mut stale = Stale::default();
        self.apply(first, &mut stale);
        if stale.link_changed {
            return stale;
        }
        while let Ok(Some((message, _))) = timeout(GATHER, self.messages.next()).await {
            self.apply(message, &mut stale);
            if stale.link_changed {
                break;
            }
        }
        stale
    }

    fn apply(&mut self, message: NetlinkMessage<RouteNetlinkMessage>, stale: &mut Stale) {
        match message.payload {
            NetlinkPayload::InnerMessage(message) => apply(&mut self.network, message, stale),
            NetlinkPayload::Overrun(_) => {
                warn!("the kernel dropped netlink messages: reading everything anew");
                stale.all = true;
            }
            _ => {}
        }
    }

    async fn refresh(&mut self, stale: Stale) -> Result<(), InterfaceError> {
        for index in stale.peers {
            let mut links = self.handle.link().get().match_index(index).execute();
            // The interface may be gone already.
            if let Ok(Some(message)) = links.try_next().await {
                let (index, link) = parse_link(&message);
                self.network.links.insert(index, link);
            }
        }
        if stale.routes {
            self.network.default_routes = read_routes(&self.handle).await?;
        }
        Ok(())
    }

    /// Attaches what is missing, detaches what has no place any more, and tells.
    /// Answers which places are wanted, attached or not.
    fn reconcile(&mut self) -> Result<BTreeSet<Place>, InterfaceError> {
        let InterfaceOptions { devices, pods, .. } = &self.options;
        let known = self.node_addresses.as_deref();
        let mut roles = self.network.roles(devices, pods, known.unwrap_or_default());
        if known.is_none() {
            self.network.keep(&mut roles, &mut self.held);
        }
        for device in self.network.headerless(devices, known.unwrap_or_default()) {
            if self.warned.insert(device.index) {
                warn!(device = device.name, "has no Ethernet header: not supported yet");
            }
        }
        let wanted = places(&roles);
        self.lost.retain(|place| wanted.contains_key(place));
        // The entries that flows of node processes point to are there before a flow is.
        let unplaced = self.devices.set(&self.network.devices(&roles))?;
        let mut problems: Vec<String> = unplaced
            .iter()
            .map(|device| format!("no entry of DEVICES is left for interface {}", device.ifindex))
            .collect();
        let places: BTreeSet<Place> = wanted.keys().copied().collect();
        let gone = |(place, _): &(&Place, &&str)| !wanted.contains_key(*place);
        let gone = self.attached.iter().filter(gone).map(|(place, program)| (*place, *program));
        for ((index, direction), _) in in_order(gone).into_iter().rev() {
            self.attached.remove(&(index, direction));
            self.detach(index, direction);
        }
        // Interfaces that lack the program that goes first.
        let mut held_back = BTreeSet::new();
        for (place, program) in in_order(wanted) {
            if held_back.contains(&place.0) {
                continue;
            }
            if self.attached.get(&place) == Some(&program) {
                continue;
            }
            let name = self.network.links.get(&place.0).map(|link| link.name.clone());
            let interface = Interface { index: place.0, name: name.unwrap_or_default() };
            match self.attacher.attach(&self.programs, program, &interface, place.1) {
                Ok(()) => {
                    debug!(program, interface = interface.name, "attached");
                    if self.lost.remove(&place) {
                        let interface = &interface.name;
                        warn!(
                            program,
                            interface, "detached by another program, and attached again"
                        );
                    }
                    self.attached.insert(place, program);
                }
                Err(error) if is_gone(&error) => debug!(%error, "the interface has gone"),
                Err(error) => {
                    let source = std::error::Error::source(&error).map(ToString::to_string);
                    warn!(%error, source, "will try again");
                    problems.push(format!("{error}: {}", source.unwrap_or_default()));
                    held_back.insert(place.0);
                }
            }
        }
        self.take_by_xdp(&roles);
        let node = NodeNetwork {
            problems,
            knows_node_object: self.node_addresses.is_some(),
            ..self.network.node(&roles)
        };
        self.publish(node);
        Ok(places)
    }

    /// Has external devices taken by XDP that have our tc programs already.
    fn take_by_xdp(&mut self, roles: &BTreeMap<u32, Role>) {
        let is_external = |index| roles.get(&index) == Some(&Role::External);
        if self.node_addresses.is_some() {
            self.xdp.retain(is_external);
        }
        for (index, link) in self.network.links.iter().filter(|(index, _)| is_external(**index)) {
            let has_tc = self.attached.contains_key(&(*index, Direction::Ingress));
            if has_tc && !self.xdp.is_settled(*index) {
                let interface = Interface { index: *index, name: link.name.clone() };
                self.xdp.settle(&self.programs, &interface, link.is_veth);
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
                "interfaces"
            );
            *published = node;
            true
        });
    }

    fn detach(&mut self, index: u32, direction: Direction) {
        if let Err(error) = self.attacher.detach(index, direction)
            && !is_gone(&error)
        {
            warn!(%error, index, "a program could not be taken off");
        }
    }

    /// Takes off what an earlier agent left on interfaces that are none of ours now.
    fn detach_strangers(&mut self, wanted: &BTreeSet<Place>) {
        let linked: Vec<Place> = self.attacher.linked().collect();
        let others = self
            .network
            .links
            .keys()
            .flat_map(|index| [(*index, Direction::Ingress), (*index, Direction::Egress)]);
        let others: Vec<Place> = others.chain(linked).collect();
        for place in others {
            if !wanted.contains(&place) {
                self.detach(place.0, place.1);
            }
        }
    }
}

impl Drop for Interfaces {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

/// Lets packets of this node to itself in: they come in by the loopback device without
/// a route attached, with a source that is an address of this node, or from and to
/// 127.0.0.1, which the kernel's checks of what is routed in else refuse. Nobody else's
/// packets come in by that device.
fn accept_own_packets() {
    let settings = [
        ("accept_local", "node processes cannot reach backends on this node by UDP"),
        ("route_localnet", "node processes cannot reach node ports by 127.0.0.1"),
    ];
    for (name, consequence) in settings {
        let path = format!("/proc/sys/net/ipv4/conf/lo/{name}");
        if fs::read_to_string(&path).is_ok_and(|value| value.trim() == "1") {
            continue;
        }
        if let Err(error) = fs::write(&path, "1") {
            warn!(path, %error, "{consequence}");
        }
    }
}

/// Interfaces cannot be followed.
#[derive(Debug, thiserror::Error)]
pub enum InterfaceError {
    /// No netlink socket.
    #[error("cannot open a netlink socket")]
    Connect {
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The kernel refused to tell.
    #[error("cannot read interfaces, addresses and routes")]
    Read {
        /// What rtnetlink said.
        #[source]
        source: rtnetlink::Error,
    },
    /// The socket broke.
    #[error("the netlink socket was closed")]
    Closed,
    /// The links cannot be listed.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// DEVICES cannot be opened.
    #[error(transparent)]
    Pin(#[from] PinError),
    /// DEVICES cannot be written.
    #[error(transparent)]
    Devices(#[from] DataplaneError),
}
