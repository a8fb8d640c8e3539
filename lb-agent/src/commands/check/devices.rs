//! How the packets of each external device are handled: by the programs that the last agent left
//! attached, or by those that `run` would attach; and devices that no program can be attached to.

use std::os::fd::AsFd;

use lb_common::abi::settings::Device;

use super::{Check, Finding, Severity, finding};
use crate::{
    maps::{pins::Pins, read::read_array},
    network::{
        error::InterfaceError,
        interfaces::Network,
        survey::{NetworkSurvey, survey},
    },
    options::{modes::TcAttach, values::Patterns},
    programs::{
        hook::{Direction, Role},
        names::Names,
        tc::TcAttacher,
        xdp::{Handler, OCCUPIED, pinned_links, wanted},
    },
};

/// One finding for each external device, and for each device whose packets cannot be handled.
pub(super) fn devices(options: &Check) -> Vec<Finding> {
    let NetworkSurvey { network, with_xdp: occupied, needed_marks } = match surveyed() {
        Ok(found) => found,
        Err(error) => return vec![finding(Severity::Warning, "device", error.to_string())],
    };
    let pins = Pins::new(&options.bpf_dir);
    let listed = read_array::<Device>(&pins, "DEVICES").unwrap_or_default();
    let listed: Vec<u32> = listed.iter().map(|device| device.ifindex).filter(|i| *i != 0).collect();
    let external = if listed.is_empty() { found(&network, options) } else { listed.clone() };
    let lines = external.into_iter().filter_map(|index| {
        let link = network.links.get(&index)?;
        let text = if listed.is_empty() {
            would_be(&wanted(options.xdp, link.header), occupied.contains(&index))
        } else {
            let handler = current(&pins, index).unwrap_or_else(|| {
                let wanted = wanted(options.xdp, link.header);
                without_xdp(wanted, occupied.contains(&index))
            });
            format!("packets are handled by {handler}")
        };
        Some(finding(Severity::Fine, "device", format!("{}: {text}", link.name)))
    });
    let mut lines: Vec<Finding> = lines.collect();
    if lines.is_empty() {
        let text = "no external device found: traffic from outside is not handled; give --devices";
        lines.push(finding(Severity::Warning, "device", text));
    }
    lines.extend(order(&network, &pins));
    lines.extend(needed_marks.into_iter().map(routing));
    lines.extend(unsupported(&network, options));
    lines
}

fn routing(mark: u32) -> Finding {
    let text = format!(
        "`ip rule` routes packets with mark {mark:#x} apart from others of the same source: answers \
         of pods of this node to clients outside may leave by another interface; see \
         docs/neighbours.md"
    );
    finding(Severity::Warning, "routing", text)
}

/// The programs of others that are on the wrong side of an attached program of lb.
fn order(network: &Network, pins: &Pins) -> Vec<Finding> {
    if !pins.links().is_dir() {
        return Vec::new();
    }
    let names = Names::pinned(pins).unwrap_or_default();
    let Ok(attacher) = TcAttacher::new(pins, TcAttach::Auto, names) else { return Vec::new() };
    let mut found = Vec::new();
    for (index, link) in &network.links {
        for direction in [Direction::Ingress, Direction::Egress] {
            if !matches!(attacher.attached_program(*index, direction), Ok(Some(_))) {
                continue;
            }
            for program in attacher.misplaced((*index, direction)).unwrap_or_default() {
                let (site, name) = (direction.name(), &link.name);
                let text = format!(
                    "{program} at {site} of {name} sees packets of Services with the addresses of \
                     backends: NetworkPolicies there may drop them; see docs/neighbours.md"
                );
                found.push(finding(Severity::Warning, "order", text));
            }
        }
    }
    found
}

/// Devices with an address by which clients may come, for whose packets lb has no programs.
fn unsupported(network: &Network, options: &Check) -> impl Iterator<Item = Finding> {
    let has_address = |index: u32| network.addresses.iter().any(|(holder, _)| *holder == index);
    let devices = network.unsupported(&options.devices, &[]);
    devices.filter(move |device| has_address(device.index)).map(|device| {
        let text = format!(
            "{}: packets are not handled, because they have no Ethernet header: clients that \
             come by this device do not reach Services; let them come by another device",
            device.name
        );
        finding(Severity::Warning, "device", text)
    })
}

fn surveyed() -> Result<NetworkSurvey, InterfaceError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| InterfaceError::Connect { source })?;
    runtime.block_on(survey())
}

/// The external devices that can be found without the Node object.
fn found(network: &Network, options: &Check) -> Vec<u32> {
    let roles = network.roles(&options.devices, &Patterns::Auto, &[]);
    roles.iter().filter(|(_, role)| **role == Role::External).map(|(index, _)| *index).collect()
}

/// The mode in which lb's XDP program is attached to a device, according to its pin.
fn current(pins: &Pins, index: u32) -> Option<Handler> {
    let pinned = pinned_links(pins.links()).ok()?;
    let path = pinned.get(&index)?;
    let link = lb_sys::obj_get(path).ok()?;
    let is_here = lb_sys::link_info(link.as_fd()).ok()?.target[0] == index;
    is_here.then(|| Handler::of_pin(path)).flatten()
}

/// Why a device has no XDP program although an agent has run.
fn without_xdp(wanted: Handler, is_occupied: bool) -> Handler {
    match wanted {
        Handler::Tc(reason) => Handler::Tc(reason),
        _ if is_occupied => Handler::Tc(OCCUPIED.to_owned()),
        _ => Handler::Tc("its driver rejected XDP, or `run` was started with --xdp off".to_owned()),
    }
}

/// What `run` would do.
fn would_be(wanted: &Handler, is_occupied: bool) -> String {
    match wanted {
        Handler::Tc(_) => format!("packets would be handled by {wanted}"),
        _ if is_occupied => format!("packets would be handled by tc: {OCCUPIED}"),
        _ => format!("packets would be handled by {wanted}, or by tc if its driver rejects XDP"),
    }
}
