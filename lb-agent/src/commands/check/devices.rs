//! How the packets of each external device are taken: as the last agent left it, or as one
//! would find it.

use std::{collections::BTreeSet, os::fd::AsFd};

use lb_common::abi::settings::Device;

use super::{Check, Finding, Severity, finding};
use crate::{
    maps::{pins::Pins, read::read_array},
    network::{error::InterfaceError, interfaces::Network, survey::survey},
    options::values::Patterns,
    programs::{
        hook::Role,
        xdp::{OCCUPIED, Taken, pinned_links, wanted},
    },
};

/// One line a device.
pub(super) fn devices(options: &Check) -> Vec<Finding> {
    let (network, occupied) = match surveyed() {
        Ok(found) => found,
        Err(error) => return vec![finding(Severity::Warning, "device", error.to_string())],
    };
    let pins = Pins::new(&options.bpf_dir);
    let left = read_array::<Device>(&pins, "DEVICES").unwrap_or_default();
    let left: Vec<u32> = left.iter().map(|device| device.ifindex).filter(|i| *i != 0).collect();
    let external = if left.is_empty() { found(&network, options) } else { left.clone() };
    let lines = external.into_iter().filter_map(|index| {
        let link = network.links.get(&index)?;
        let text = if left.is_empty() {
            would_be(&wanted(options.xdp, link.is_veth), occupied.contains(&index))
        } else {
            let taken = now(&pins, index).unwrap_or_else(|| {
                without_xdp(wanted(options.xdp, link.is_veth), occupied.contains(&index))
            });
            format!("packets are taken by {taken}")
        };
        Some(finding(Severity::Fine, "device", format!("{}: {text}", link.name)))
    });
    let lines: Vec<Finding> = lines.collect();
    if lines.is_empty() {
        let text = "none faces the outside: name them by --devices";
        return vec![finding(Severity::Warning, "device", text)];
    }
    lines
}

fn surveyed() -> Result<(Network, BTreeSet<u32>), InterfaceError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| InterfaceError::Connect { source })?;
    runtime.block_on(survey())
}

/// The external devices, as far as they are known without the Node object.
fn found(network: &Network, options: &Check) -> Vec<u32> {
    let roles = network.roles(&options.devices, &Patterns::Auto, &[]);
    roles.iter().filter(|(_, role)| **role == Role::External).map(|(index, _)| *index).collect()
}

/// The mode of XDP in which our program is on a device, by its pin.
fn now(pins: &Pins, index: u32) -> Option<Taken> {
    let pinned = pinned_links(&pins.links()).ok()?;
    let path = pinned.get(&index)?;
    let link = lb_sys::obj_get(path).ok()?;
    let is_here = lb_sys::link_info(link.as_fd()).ok()?.target[0] == index;
    is_here.then(|| Taken::of_pin(path)).flatten()
}

/// Why a device whose agent has run has no program of ours for XDP.
fn without_xdp(wanted: Taken, is_occupied: bool) -> Taken {
    match wanted {
        Taken::Tc(reason) => Taken::Tc(reason),
        _ if is_occupied => Taken::Tc(OCCUPIED.to_owned()),
        _ => Taken::Tc("its driver refused XDP, or run was told not to use it".to_owned()),
    }
}

/// What `run` would do.
fn would_be(wanted: &Taken, is_occupied: bool) -> String {
    match wanted {
        Taken::Tc(_) => format!("packets would be taken by {wanted}"),
        _ if is_occupied => format!("packets would be taken by tc: {OCCUPIED}"),
        _ => format!("packets would be taken by {wanted}, or by tc if its driver refuses that"),
    }
}
