//! What is attached where: lb's own programs for `status`, those of everybody on the same hooks
//! for `sysdump`.

use std::{io, os::fd::AsFd, path::Path};

use aya_obj::generated::bpf_attach_type::{BPF_TCX_EGRESS, BPF_TCX_INGRESS};
use nix::net::if_::if_nameindex;
use serde::Serialize;

use crate::{
    maps::pins::Pins,
    options::modes::TcAttach,
    programs::{
        cgroup,
        hook::Direction,
        names::Names,
        tc::{AttachError, TcAttacher},
        xdp,
    },
};

/// The name of the program that lb attaches by XDP.
const XDP: &str = "xdp_device";

/// A program of lb that is attached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Attached {
    /// The interface, or `cgroup`.
    pub place: String,
    /// `ingress`, `egress`, `xdp`, or `connect` for the hooks of sockets.
    pub hook: &'static str,
    /// The program's name.
    pub program: String,
}

/// A program of anybody on a hook that lb uses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct OnHook {
    /// The interface.
    pub place: String,
    /// `ingress` or `egress`.
    pub hook: &'static str,
    /// The kernel's id of the program.
    pub id: u32,
    /// The program's name, cut to 15 bytes by the kernel.
    pub program: String,
}

/// What of lb is attached could not be read.
#[derive(Debug, thiserror::Error)]
pub enum AttachedError {
    /// The pins could not be read.
    #[error(transparent)]
    Pins(#[from] AttachError),
    /// The pinned programs could not be read.
    #[error("cannot read the pinned programs")]
    Programs(#[source] io::Error),
    /// The interfaces could not be listed.
    #[error("cannot list the interfaces")]
    Interfaces(#[source] io::Error),
}

/// The programs of lb that are attached, in the order of the interfaces.
///
/// # Errors
/// [`AttachedError`]; not if a single link cannot be read, which then is left out.
pub fn attached(pins: &Pins) -> Result<Vec<Attached>, AttachedError> {
    let links = pins.links();
    if !links.is_dir() {
        return Ok(Vec::new());
    }
    let names = Names::pinned(pins).map_err(AttachedError::Programs)?;
    let by_tc = TcAttacher::new(pins, TcAttach::Auto, names)?;
    let by_xdp = xdp::pinned_links(links).unwrap_or_default();
    let mut found = Vec::new();
    for (index, place) in interfaces().map_err(AttachedError::Interfaces)? {
        let mut add = |hook, program: Option<String>| {
            found.extend(program.map(|program| Attached { place: place.clone(), hook, program }));
        };
        add("xdp", by_xdp.get(&index).filter(|path| is_attached(path)).map(|_| XDP.to_owned()));
        for direction in [Direction::Ingress, Direction::Egress] {
            let program = by_tc.attached_program(index, direction).ok().flatten();
            add(direction.name(), program);
        }
    }
    let sockets = cgroup::attached(pins).into_iter().map(|program| Attached {
        place: "cgroup".to_owned(),
        hook: "connect",
        program: program.to_owned(),
    });
    found.extend(sockets);
    Ok(found)
}

/// Every program of a tcx hook, in the order in which the kernel runs them.
///
/// # Errors
/// If the interfaces cannot be listed. Kernels without tcx have none.
pub fn on_hooks(pins: &Pins) -> io::Result<Vec<OnHook>> {
    let names = Names::pinned(pins).unwrap_or_default();
    let mut found = Vec::new();
    let hooks = [(BPF_TCX_INGRESS, "ingress"), (BPF_TCX_EGRESS, "egress")];
    for (index, place) in interfaces()? {
        for (attach_type, hook) in hooks {
            for id in lb_sys::tcx_query(index, attach_type as u32).unwrap_or_default() {
                let program = name_of(id, &names);
                found.push(OnHook { place: place.clone(), hook, id, program });
            }
        }
    }
    Ok(found)
}

fn interfaces() -> io::Result<Vec<(u32, String)>> {
    let all = if_nameindex()?;
    let named = all.iter().map(|one| (one.index(), one.name().to_string_lossy().into_owned()));
    Ok(named.collect())
}

/// Whether a link is still attached: the index of its interface is 0 once it is not.
fn is_attached(path: &Path) -> bool {
    let info = lb_sys::obj_get(path).and_then(|link| lb_sys::link_info(link.as_fd()));
    info.is_ok_and(|info| info.target[0] != 0)
}

/// The name of a program. The kernel tells that of a program that lb has not pinned only to
/// processes with CAP_SYS_ADMIN.
fn name_of(id: u32, names: &Names) -> String {
    let by_id = || {
        let program = lb_sys::program_by_id(id)?;
        Ok::<_, io::Error>(lb_sys::program_info(program.as_fd())?.name())
    };
    let pinned = names.of(id).map(str::to_owned);
    pinned.or_else(|| by_id().ok()).unwrap_or_else(|| "unknown".to_owned())
}
