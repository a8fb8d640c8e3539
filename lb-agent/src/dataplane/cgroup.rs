//! The connect-time hooks: programs of a cgroup, by pinned links.

use std::{
    fs, io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
};

use aya_obj::generated::bpf_attach_type::{
    self, BPF_CGROUP_INET4_CONNECT, BPF_CGROUP_INET4_GETPEERNAME, BPF_CGROUP_INET6_CONNECT,
    BPF_CGROUP_INET6_GETPEERNAME, BPF_CGROUP_UDP4_RECVMSG, BPF_CGROUP_UDP4_SENDMSG,
    BPF_CGROUP_UDP6_RECVMSG, BPF_CGROUP_UDP6_SENDMSG,
};

use crate::cli::run::SocketLb;

use super::{
    attach::{AttachError, remove_link},
    load::Programs,
    pins::Pins,
    sys::{self, LinkTarget},
};

struct Hook {
    program: &'static str,
    attach_type: bpf_attach_type,
    is_for_udp: bool,
}

const fn hook(program: &'static str, attach_type: bpf_attach_type, is_for_udp: bool) -> Hook {
    Hook { program, attach_type, is_for_udp }
}

/// What a translation is undone with comes before what translates, so that no socket is
/// translated whose peer's name would not be.
const HOOKS: [Hook; 8] = [
    hook("getpeername4", BPF_CGROUP_INET4_GETPEERNAME, false),
    hook("getpeername6", BPF_CGROUP_INET6_GETPEERNAME, false),
    hook("recvmsg4", BPF_CGROUP_UDP4_RECVMSG, true),
    hook("recvmsg6", BPF_CGROUP_UDP6_RECVMSG, true),
    hook("connect4", BPF_CGROUP_INET4_CONNECT, false),
    hook("connect6", BPF_CGROUP_INET6_CONNECT, false),
    hook("sendmsg4", BPF_CGROUP_UDP4_SENDMSG, true),
    hook("sendmsg6", BPF_CGROUP_UDP6_SENDMSG, true),
];

/// Attaches the programs of `mode` to the cgroup at `directory`, in the place of those
/// of an earlier agent, and detaches what only a former mode needed. Programs of others
/// run as well.
///
/// # Errors
/// [`AttachError::Cgroup`].
pub fn attach(
    pins: &Pins,
    programs: &Programs,
    directory: &Path,
    mode: SocketLb,
) -> Result<(), AttachError> {
    let is_wanted = |hook: &&Hook| match mode {
        SocketLb::Off => false,
        SocketLb::Auto | SocketLb::Tcp | SocketLb::Node => !hook.is_for_udp,
        SocketLb::All => true,
    };
    for hook in HOOKS.iter().filter(is_wanted) {
        let program = programs.get(hook.program)?;
        attach_one(pins, hook, program, directory).map_err(|source| AttachError::Cgroup {
            program: hook.program,
            cgroup: directory.to_owned(),
            source,
        })?;
    }
    for hook in HOOKS.iter().rev().filter(|hook| !is_wanted(hook)) {
        detach_one(pins, hook)?;
    }
    Ok(())
}

/// Detaches every connect-time hook that is pinned.
///
/// # Errors
/// [`AttachError::Cgroup`].
pub fn detach(pins: &Pins) -> Result<(), AttachError> {
    HOOKS.iter().rev().try_for_each(|hook| detach_one(pins, hook))
}

/// The connect-time hooks that are pinned.
pub fn attached(pins: &Pins) -> Vec<&'static str> {
    let is_pinned = |hook: &&Hook| pin(pins, hook).exists();
    HOOKS.iter().filter(is_pinned).map(|hook| hook.program).collect()
}

fn pin(pins: &Pins, hook: &Hook) -> PathBuf {
    pins.links().join(format!("cgroup-{}", hook.program))
}

fn detach_one(pins: &Pins, hook: &Hook) -> Result<(), AttachError> {
    let path = pin(pins, hook);
    match remove_link(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result.map_err(|source| AttachError::Cgroup {
            program: hook.program,
            cgroup: path,
            source,
        }),
    }
}

fn attach_one(
    pins: &Pins,
    hook: &Hook,
    program: BorrowedFd<'_>,
    directory: &Path,
) -> io::Result<()> {
    let cgroup = fs::File::open(directory)?;
    let path = pin(pins, hook);
    let attach_type = hook.attach_type as u32;
    if let Ok(link) = sys::obj_get(&path) {
        let info = sys::link_info(link.as_fd())?;
        let id = cgroup.metadata()?.ino();
        let is_same = info.attach_type == attach_type
            && info.target == [id as u32, (id >> 32) as u32]
            && sys::link_update(link.as_fd(), program).is_ok();
        if is_same {
            return Ok(());
        }
        remove_link(&path)?;
    }
    let link = sys::link_create(program, LinkTarget::Cgroup(cgroup.as_fd()), attach_type)?;
    sys::obj_pin(link.as_fd(), &path)
}
