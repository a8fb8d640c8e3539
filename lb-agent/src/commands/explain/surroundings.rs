//! The surroundings of the maps: routes, interfaces, and attached programs.

use std::{collections::BTreeMap, io, net::IpAddr};

use futures::TryStreamExt;
use lb_common::abi::counter::Hook;
use netlink_packet_route::{
    link::{LinkAttribute, LinkMessage},
    route::{RouteAddress, RouteAttribute, RouteMessage, RouteType},
};
use rtnetlink::{Handle, RouteMessageBuilder};

use super::ExplainError;
use crate::{
    maps::pins::Pins,
    options::modes::TcAttach,
    programs::{cgroup, hook::Direction, names::Names, tc::TcAttacher, xdp},
};

/// An interface of this network namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Device {
    /// The kernel's index.
    pub(super) index: u32,
    /// The name.
    pub(super) name: String,
}

/// A route lookup of the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Route {
    /// To an address of this node.
    Local,
    /// Through a device, to the router `via` or to the destination itself.
    Device {
        /// The device.
        device: Device,
        /// The next router.
        via: Option<IpAddr>,
    },
    /// The packet cannot be routed, and why.
    Unreachable(String),
}

/// The device that a route leads out of, and the next router.
pub(super) fn device_text(device: &Device, via: Option<IpAddr>) -> String {
    match via {
        Some(via) => format!("through {} via {via}", device.name),
        None => format!("through {}", device.name),
    }
}

/// What an explanation reads from a node beside the maps.
pub(super) trait Surroundings {
    /// The route to an address.
    fn route(&self, to: IpAddr) -> Route;
    /// The device of this name.
    fn device(&self, name: &str) -> Option<Device>;
    /// The name of the device with this index.
    fn name(&self, index: u32) -> String;
    /// The lb program on a device.
    fn program(&self, device: u32, direction: Direction) -> Option<Hook>;
    /// The mode of lb's XDP program on a device, if it has one.
    fn xdp(&self, device: u32) -> Option<String>;
    /// The devices that are ports of this bridge.
    fn ports(&self, bridge: u32) -> Vec<Device>;
    /// Whether a connect-time hook is attached.
    fn has_socket_hook(&self, hook: Hook) -> bool;
    /// The cookie of this network namespace.
    fn netns_cookie(&self) -> u64;
}

/// The network namespace that this process is in.
pub(super) struct Here {
    runtime: tokio::runtime::Runtime,
    handle: Handle,
    links: BTreeMap<u32, Link>,
    programs: TcAttacher,
    xdp: BTreeMap<u32, String>,
    socket_hooks: Vec<&'static str>,
}

struct Link {
    name: String,
    bridge: Option<u32>,
}

impl Here {
    /// Reads the interfaces and the attached programs.
    ///
    /// # Errors
    /// [`ExplainError`] if the kernel or the pins cannot be read.
    pub(super) fn look(pins: &Pins) -> Result<Self, ExplainError> {
        let failed = |source| ExplainError::Surroundings { source };
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
        let (handle, links) = runtime
            .block_on(async {
                let (connection, handle, _) = rtnetlink::new_connection()?;
                tokio::spawn(connection);
                let links = handle.link().get().execute().try_collect::<Vec<_>>().await;
                let links = links.map_err(io::Error::other)?;
                Ok((handle, links.iter().map(parse_link).collect()))
            })
            .map_err(failed)?;
        let attached = xdp::pinned_links(pins.links()).map_err(failed)?;
        let attached = attached
            .into_iter()
            .filter_map(|(index, path)| Some((index, xdp::Handler::of_pin(&path)?.to_string())));
        Ok(Self {
            runtime,
            handle,
            links,
            programs: TcAttacher::new(pins, TcAttach::Auto, Names::pinned(pins).map_err(failed)?)
                .map_err(io::Error::other)
                .map_err(failed)?,
            xdp: attached.collect(),
            socket_hooks: cgroup::attached(pins),
        })
    }

    async fn look_up(&self, to: IpAddr) -> Result<RouteMessage, String> {
        let bits = if to.is_ipv4() { 32 } else { 128 };
        let request = RouteMessageBuilder::<IpAddr>::new()
            .destination_prefix(to, bits)
            .map_err(|error| error.to_string())?;
        let mut answers = self.handle.route().get(request.build()).execute();
        let answer = answers.try_next().await.map_err(|error| match error {
            rtnetlink::Error::NetlinkError(message) => message.to_io().to_string(),
            other => other.to_string(),
        })?;
        answer.ok_or_else(|| "the kernel sent no answer".to_owned())
    }

    fn device_at(&self, index: u32) -> Device {
        Device { index, name: self.name(index) }
    }
}

fn parse_link(message: &LinkMessage) -> (u32, Link) {
    let mut link = Link { name: String::new(), bridge: None };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Controller(index) => link.bridge = Some(*index),
            _ => {}
        }
    }
    (message.header.index, link)
}

impl Surroundings for Here {
    fn route(&self, to: IpAddr) -> Route {
        let answer = match self.runtime.block_on(self.look_up(to)) {
            Ok(answer) => answer,
            Err(error) => return Route::Unreachable(error),
        };
        match answer.header.kind {
            RouteType::Local | RouteType::Broadcast | RouteType::Multicast => return Route::Local,
            RouteType::Unicast => {}
            other => return Route::Unreachable(format!("the route is of type {other:?}")),
        }
        let (mut device, mut via) = (None, None);
        for attribute in answer.attributes {
            match attribute {
                RouteAttribute::Oif(index) => device = Some(self.device_at(index)),
                RouteAttribute::Gateway(RouteAddress::Inet(ip)) => via = Some(ip.into()),
                RouteAttribute::Gateway(RouteAddress::Inet6(ip)) => via = Some(ip.into()),
                _ => {}
            }
        }
        match device {
            Some(device) => Route::Device { device, via },
            None => Route::Unreachable("the route has no device".to_owned()),
        }
    }

    fn device(&self, name: &str) -> Option<Device> {
        let found = self.links.iter().find(|(_, link)| link.name == name)?;
        Some(self.device_at(*found.0))
    }

    fn name(&self, index: u32) -> String {
        self.links.get(&index).map_or_else(|| format!("#{index}"), |link| link.name.clone())
    }

    fn program(&self, device: u32, direction: Direction) -> Option<Hook> {
        let name = self.programs.attached_program(device, direction).ok()??;
        Hook::ALL.iter().copied().find(|hook| hook.name() == name)
    }

    fn xdp(&self, device: u32) -> Option<String> {
        self.xdp.get(&device).cloned()
    }

    fn ports(&self, bridge: u32) -> Vec<Device> {
        let ports = self.links.iter().filter(|(_, link)| link.bridge == Some(bridge));
        ports.map(|(index, _)| self.device_at(*index)).collect()
    }

    fn has_socket_hook(&self, hook: Hook) -> bool {
        self.socket_hooks.contains(&hook.name())
    }

    fn netns_cookie(&self) -> u64 {
        lb_sys::netns_cookie().unwrap_or_default()
    }
}
