//! Programs of another owner on the hooks that an agent uses too: they let everything pass and
//! the kernel counts how often they ran.

use std::fs::File;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use anyhow::{Context, Result};

use crate::harness::netns::topology::cgroup::Cgroup;
use crate::harness::netns::topology::namespace::Netns;

/// `enum bpf_cmd`.
mod command {
    pub(in crate::harness::netns) const PROG_LOAD: libc::c_long = 5;
    pub(in crate::harness::netns) const OBJ_PIN: libc::c_long = 6;
    pub(in crate::harness::netns) const OBJ_GET_INFO_BY_FD: libc::c_long = 15;
    pub(in crate::harness::netns) const LINK_CREATE: libc::c_long = 28;
    pub(in crate::harness::netns) const ENABLE_STATS: libc::c_long = 32;
}

/// A hook that a foreign program is attached to by a link.
#[derive(Clone, Copy, Debug)]
pub enum Hook {
    /// tcx, packets that come in.
    Ingress,
    /// tcx, packets that go out.
    Egress,
    /// connect() to an IPv4 address.
    Connect4,
    /// XDP, in the driver where it can.
    Xdp,
}

impl Hook {
    /// `enum bpf_attach_type`.
    fn attach_type(self) -> u32 {
        match self {
            Self::Ingress => 46,
            Self::Egress => 47,
            Self::Connect4 => 10,
            Self::Xdp => 37,
        }
    }

    /// `enum bpf_prog_type`.
    fn program_type(self) -> u32 {
        match self {
            Self::Ingress | Self::Egress => 3,
            Self::Connect4 => 18,
            Self::Xdp => 6,
        }
    }

    /// What the program returns: the packet or call goes on.
    fn verdict(self) -> i32 {
        match self {
            Self::Ingress | Self::Egress => -1,
            Self::Connect4 => 1,
            Self::Xdp => 2,
        }
    }
}

/// A program of another owner.
#[derive(Debug)]
pub struct Foreign {
    program: OwnedFd,
    hook: Hook,
    link: Option<OwnedFd>,
    /// As long as anybody has such a descriptor, the kernel counts and times every program.
    _counting: Option<OwnedFd>,
}

impl Foreign {
    /// Loads a program for a hook.
    ///
    /// # Errors
    /// Without privileges.
    pub fn load(hook: Hook) -> Result<Self> {
        Self::load_code(hook, &pass(hook))
    }

    /// [`Foreign::load`] of a program whose runs are not counted, for benchmarks: counting slows
    /// down every program of the machine.
    ///
    /// # Errors
    /// Without privileges.
    pub fn load_uncounted(hook: Hook) -> Result<Self> {
        Self::load_only(hook, &pass(hook))
    }

    /// Loads a program for a hook of tc that drops every packet of this length or more, link-layer
    /// header included; its runs are not counted.
    ///
    /// # Errors
    /// Without privileges.
    pub fn load_drop(hook: Hook, length: u32) -> Result<Self> {
        const DROP: u64 = 2;
        let [pass, end] = pass(hook);
        // r2 = length of the packet; a longer one skips two.
        let code =
            [0x1261, 0x235 | 2 << 16 | u64::from(length) << 32, pass, end, 0xb7 | DROP << 32, end];
        Self::load_only(hook, &code)
    }

    /// Loads the program of a NetworkPolicy agent for a pod's interface, which knows the peers of
    /// the pod by the addresses that it has seen the pod send to: it drops what the pod sends to
    /// `unknown`, or gets from there, and lets everything else go on.
    ///
    /// # Errors
    /// Without privileges.
    pub fn load_policy(hook: Hook, unknown: Ipv4Addr) -> Result<Self> {
        /// Behind the Ethernet header: source and destination of an IPv4 header.
        const SOURCE: u64 = 14 + 12;
        const DESTINATION: u64 = 14 + 16;
        const DROP: u64 = 2;
        let offset = if matches!(hook, Hook::Egress) { SOURCE } else { DESTINATION };
        let verdict = u64::from(hook.verdict() as u32);
        let code = [
            // r6 = context; r0 = the address, or the end with 0 for a shorter packet.
            0x16bf,
            0x20 | offset << 32,
            // if r0 == unknown: skip two.
            0x16 | 2 << 16 | u64::from(unknown.to_bits()) << 32,
            0xb7 | verdict << 32,
            0x95,
            0xb7 | DROP << 32,
            0x95,
        ];
        Self::load_code(hook, &code)
    }

    fn load_code(hook: Hook, code: &[u64]) -> Result<Self> {
        let program = Self::load_only(hook, code)?;
        let counting = bpf(command::ENABLE_STATS, &mut [0]).context("cannot count runs")?;
        Ok(Self { _counting: Some(owned(counting)), ..program })
    }

    fn load_only(hook: Hook, code: &[u64]) -> Result<Self> {
        let license = c"GPL";
        let mut load = [0u64; 9];
        load[0] = u64::from(hook.program_type()) | (code.len() as u64) << 32;
        load[1] = code.as_ptr() as u64;
        load[2] = license.as_ptr() as u64;
        load[6] = u64::from_ne_bytes(*b"somebody");
        load[8] = match hook {
            Hook::Connect4 => u64::from(hook.attach_type()) << 32,
            Hook::Ingress | Hook::Egress | Hook::Xdp => 0,
        };
        let program = bpf(command::PROG_LOAD, &mut load).context("cannot load a program")?;
        Ok(Self { program: owned(program), hook, link: None, _counting: None })
    }

    /// Attaches it to a device of a namespace, behind what is there, until it is dropped.
    ///
    /// # Errors
    /// No such device, or a kernel before 6.6.
    pub fn attach_device(mut self, netns: &Netns, device: &str) -> Result<Self> {
        let link = netns.run(|| {
            let index = nix::net::if_::if_nametoindex(device).context("no such device")?;
            self.link_to(index)
        })?;
        self.link = Some(link);
        Ok(self)
    }

    /// Attaches it to a cgroup, until it is dropped.
    ///
    /// # Errors
    /// The cgroup takes only one program.
    pub fn attach_cgroup(mut self, cgroup: &Cgroup) -> Result<Self> {
        let directory = File::open(cgroup.path())?;
        self.link = Some(self.link_to(u32::try_from(directory.as_raw_fd())?)?);
        Ok(self)
    }

    fn link_to(&self, target: u32) -> Result<OwnedFd> {
        let program = self.program.as_raw_fd() as u32;
        let attach_type = self.hook.attach_type();
        let mut create =
            [u64::from(program) | u64::from(target) << 32, u64::from(attach_type), 0, 0];
        bpf(command::LINK_CREATE, &mut create).map(owned).context("cannot attach a program")
    }

    /// Pins it, for `tc filter add … bpf da pinned FILE`.
    ///
    /// # Errors
    /// No bpffs there.
    pub fn pin(&self, path: &Path) -> Result<()> {
        let name = std::ffi::CString::new(path.as_os_str().as_encoded_bytes())?;
        let mut pin = [name.as_ptr() as u64, self.program.as_raw_fd() as u64];
        bpf(command::OBJ_PIN, &mut pin).map(drop).with_context(|| format!("{}", path.display()))
    }

    /// How often it ran.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn runs(&self) -> Result<u64> {
        /// `run_cnt` of `struct bpf_prog_info`, in words.
        const RUN_COUNT: usize = 25;
        let mut information = [0u64; 28];
        let length = size_of_val(&information) as u64;
        let mut get =
            [self.program.as_raw_fd() as u64 | length << 32, information.as_mut_ptr() as u64];
        bpf(command::OBJ_GET_INFO_BY_FD, &mut get).context("no information on a program")?;
        Ok(information[RUN_COUNT])
    }
}

/// A program that lets everything pass: r0 = verdict; exit.
fn pass(hook: Hook) -> [u64; 2] {
    [0xb7 | u64::from(hook.verdict() as u32) << 32, 0x95]
}

/// A bpf(2) call whose attributes are given in words, little endian pairs in one.
fn bpf(command: libc::c_long, attributes: &mut [u64]) -> io::Result<i32> {
    // SAFETY: the attributes are as long as told, and what they point to is alive in the
    // caller.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            attributes.as_mut_ptr(),
            size_of_val(attributes) as libc::c_ulong,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as i32) }
}

fn owned(fd: i32) -> OwnedFd {
    // SAFETY: the kernel has just made it, and nobody else has it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}
