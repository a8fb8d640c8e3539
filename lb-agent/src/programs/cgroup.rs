//! The connect-time hooks: programs attached to a cgroup by pinned links.

use std::{
    fs, io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
};

use aya_obj::generated::bpf_attach_type::{
    self, BPF_CGROUP_INET_SOCK_RELEASE, BPF_CGROUP_INET4_CONNECT, BPF_CGROUP_INET4_GETPEERNAME,
    BPF_CGROUP_INET6_CONNECT, BPF_CGROUP_INET6_GETPEERNAME, BPF_CGROUP_UDP4_RECVMSG,
    BPF_CGROUP_UDP4_SENDMSG, BPF_CGROUP_UDP6_RECVMSG, BPF_CGROUP_UDP6_SENDMSG,
};
use lb_common::abi::socket::MAX_EXCLUDED_CGROUPS;
use lb_sys::{LinkInfo, LinkTarget};

use super::{
    links::{self, PinnedLink},
    load::Programs,
    tc::AttachError,
};
use crate::{maps::pins::Pins, options::modes::SocketLb};

struct Hook {
    program: &'static str,
    attach_type: bpf_attach_type,
    is_for_udp: bool,
}

const fn hook(program: &'static str, attach_type: bpf_attach_type, is_for_udp: bool) -> Hook {
    Hook { program, attach_type, is_for_udp }
}

impl Hook {
    /// Whether it translates, and does not reverse a translation.
    fn translates(&self) -> bool {
        self.program.starts_with("connect") || self.program.starts_with("sendmsg")
    }
}

/// In the order in which they are attached: first the hooks that forget a translation or reverse it, so
/// that no socket is translated while its getpeername() or recvmsg() would show the backend.
const HOOKS: [Hook; 9] = [
    hook("release", BPF_CGROUP_INET_SOCK_RELEASE, false),
    hook("getpeername4", BPF_CGROUP_INET4_GETPEERNAME, false),
    hook("getpeername6", BPF_CGROUP_INET6_GETPEERNAME, false),
    hook("recvmsg4", BPF_CGROUP_UDP4_RECVMSG, true),
    hook("recvmsg6", BPF_CGROUP_UDP6_RECVMSG, true),
    hook("connect4", BPF_CGROUP_INET4_CONNECT, false),
    hook("connect6", BPF_CGROUP_INET6_CONNECT, false),
    hook("sendmsg4", BPF_CGROUP_UDP4_SENDMSG, true),
    hook("sendmsg6", BPF_CGROUP_UDP6_SENDMSG, true),
];

/// The connect-time hooks of a cgroup.
#[derive(Debug)]
pub struct Hooks {
    pins: Pins,
    directory: PathBuf,
    mode: SocketLb,
    links: Vec<(&'static str, PinnedLink)>,
}

impl Hooks {
    /// Attaches the programs of `mode` to the cgroup at `directory`, replacing the programs of an earlier
    /// agent in place, and detaches the programs that `mode` does not need. Programs of others
    /// stay. Also returns the first failure; the other hooks are attached in spite of it.
    pub fn attach(
        pins: &Pins,
        programs: &Programs,
        directory: &Path,
        mode: SocketLb,
    ) -> (Self, Result<(), AttachError>) {
        let directory = directory.to_owned();
        let mut hooks = Self { pins: pins.clone(), directory, mode, links: Vec::new() };
        let mut result = hooks.repair(programs);
        for hook in HOOKS.iter().rev().filter(|hook| !hooks.wants(hook)) {
            result = result.and(detach_one(pins, hook));
        }
        (hooks, result)
    }

    /// Whether every hook is attached to the cgroup that the directory is now.
    pub fn are_attached(&self, programs: &Programs) -> bool {
        let Ok(cgroup) = fs::metadata(&self.directory) else { return false };
        HOOKS.iter().filter(|hook| self.wants(hook)).all(|hook| {
            let link = self.links.iter().find(|(program, _)| *program == hook.program);
            let is_here =
                |info| is_at(info, hook, &cgroup) && programs.is(hook.program, info.program);
            link.is_some_and(|(_, link)| link.info().is_ok_and(is_here))
        })
    }

    /// Attaches the hooks that are not attached.
    ///
    /// # Errors
    /// [`AttachError::Cgroup`] for the first hook that cannot be attached. The others are attached
    /// in spite of it, but for those whose translations it would reverse.
    pub fn repair(&mut self, programs: &Programs) -> Result<(), AttachError> {
        let mut result = Ok(());
        for hook in HOOKS.iter() {
            let is_reversed = result.is_ok() || !hook.translates();
            if !self.wants(hook) || !is_reversed {
                continue;
            }
            let program = programs.get(hook.program)?;
            let attached = self.attach_one(hook, program).map_err(|source| AttachError::Cgroup {
                program: hook.program,
                cgroup: self.directory.clone(),
                source,
            });
            result = result.and(attached);
        }
        result
    }

    fn wants(&self, hook: &Hook) -> bool {
        match self.mode {
            SocketLb::Off => false,
            SocketLb::Auto | SocketLb::Tcp | SocketLb::Node => !hook.is_for_udp,
            SocketLb::All => true,
        }
    }

    fn attach_one(&mut self, hook: &Hook, program: BorrowedFd<'_>) -> io::Result<()> {
        let cgroup = fs::File::open(&self.directory)?;
        let path = pin(&self.pins, hook);
        let known = self.links.iter().position(|(program, _)| *program == hook.program);
        let link = match known {
            Some(position) => Some(self.links.swap_remove(position).1),
            None => PinnedLink::open(&self.pins, path.clone()).ok(),
        };
        if let Some(link) = link {
            let is_same = is_at(link.info()?, hook, &cgroup.metadata()?);
            if is_same && link.update(program).is_ok() {
                self.links.push((hook.program, link));
                return Ok(());
            }
            link.remove()?;
        }
        let (target, attach_type) = (LinkTarget::Cgroup(cgroup.as_fd()), hook.attach_type as u32);
        let link = PinnedLink::create(&self.pins, program, target, attach_type, path)?;
        self.links.push((hook.program, link));
        Ok(())
    }
}

/// Whether a link is attached to a cgroup at the attach point of a hook.
fn is_at(info: LinkInfo, hook: &Hook, cgroup: &fs::Metadata) -> bool {
    let id = cgroup.ino();
    info.attach_type == hook.attach_type as u32 && info.target == [id as u32, (id >> 32) as u32]
}

/// The ids of the cgroups that `--socket-lb-exclude-cgroups` names: paths below `directory`,
/// or from its root. One that does not exist is logged and left out.
///
/// # Errors
/// If there are too many.
pub fn excluded(directory: &Path, listed: &[PathBuf]) -> Result<Vec<u64>, TooMany> {
    if listed.len() > MAX_EXCLUDED_CGROUPS {
        return Err(TooMany(listed.len()));
    }
    let id = |path: &PathBuf| {
        let below = path.strip_prefix(directory).or_else(|_| path.strip_prefix("/"));
        let path = directory.join(below.unwrap_or(path));
        match fs::metadata(&path) {
            Ok(metadata) => Some(metadata.ino()),
            Err(error) => {
                let cgroup = path.display();
                tracing::warn!(
                    %cgroup,
                    %error,
                    "cgroup does not exist: its processes are not excluded; create it and \
                     restart the agent"
                );
                None
            }
        }
    };
    Ok(listed.iter().filter_map(id).collect())
}

/// More cgroups than the programs hold.
#[derive(Debug, thiserror::Error)]
#[error(
    "--socket-lb-exclude-cgroups names {0} cgroups, the maximum is {MAX_EXCLUDED_CGROUPS}: name a \
     common parent instead"
)]
pub struct TooMany(usize);

/// Detaches every connect-time hook that is pinned.
///
/// # Errors
/// [`AttachError::DetachCgroup`].
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
    match links::remove(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result.map_err(|source| AttachError::DetachCgroup {
            program: hook.program,
            link: path,
            source,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn excluded_cgroups_are_below_the_directory_and_there() {
        let root = tempfile::tempdir().expect("a directory");
        let below = root.path().join("a/b");
        fs::create_dir_all(&below).expect("a directory below");
        let id = fs::metadata(&below).expect("it is there").ino();
        let listed = ["a/b", "/a/b", "a/c"].map(PathBuf::from);
        let listed = [&listed[..], &[below]].concat();
        assert_eq!(excluded(root.path(), &listed).expect("few"), [id, id, id]);
        let many = vec![PathBuf::from("a"); MAX_EXCLUDED_CGROUPS + 1];
        let error = excluded(root.path(), &many).expect_err("too many").to_string();
        assert!(error.starts_with("--socket-lb-exclude-cgroups names 9 cgroups"), "{error}");
    }
}
