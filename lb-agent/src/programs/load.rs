//! Loads the programs of the agent's embedded eBPF object against maps that are pinned.
//!
//! It attaches nothing and changes no map entry.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::PathBuf,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use aya::{
    EbpfError, EbpfLoader, VerifierLogLevel,
    programs::{Program, ProgramError},
};
use lb_common::abi::{conversion::ConversionWords, socket::MAX_EXCLUDED_CGROUPS};
use tracing::debug;
#[cfg(feature = "ebpf-log")]
use tracing::warn;

use super::{
    features::Features,
    names::{self, Names},
};
use crate::{
    maps::{
        bpffs::BpffsError,
        pins::{PinError, Pins},
    },
    options::modes::SocketLb,
    privileges::{Privileges, Refusal},
};

/// The eBPF object, built by `cargo xtask build-ebpf`.
static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("LB_EBPF_OBJECT"));
/// The same programs for the time in which maps are taken over that have another layout or size.
static HANDOVER_OBJECT: &[u8] = aya::include_bytes_aligned!(env!("LB_EBPF_HANDOVER_OBJECT"));

/// The constants of the programs, set when they are loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Constants {
    /// The cookie of the node's own network namespace; 0 = unknown.
    pub node_cookie: u64,
    /// Whether the connect-time hooks translate only sockets of that namespace.
    pub only_node: bool,
    /// Whether the connect-time hooks translate UDP.
    pub socket_lb_udp: bool,
    /// Whether the kernel has `bpf_set_retval` for the connect-time hooks.
    pub has_set_retval: bool,
    /// Whether the kernel has `bpf_get_netns_cookie` for the connect-time hooks.
    pub has_netns_cookie: bool,
    /// Whether `bpf_l4_csum_replace` knows BPF_F_IPV6.
    pub has_csum_ipv6: bool,
    /// How many of `excluded_cgroups` there are.
    pub excluded_count: u32,
    /// Ids of cgroups whose sockets the connect-time hooks leave to the packet path.
    pub excluded_cgroups: [u64; MAX_EXCLUDED_CGROUPS],
}

impl Constants {
    /// The constants for `mode` on this kernel and in the network namespace of the caller.
    ///
    /// # Errors
    /// [`LoadError::Cookie`] if the namespace has none and `mode` needs it.
    pub fn new(mode: SocketLb, features: Features) -> Result<Self, LoadError> {
        let only_node = mode == SocketLb::Node;
        let known =
            if features.has_netns_cookie { lb_sys::netns_cookie() } else { Err(unsupported()) };
        let node_cookie = match known {
            Err(source) if only_node => return Err(LoadError::Cookie { source }),
            known => known.unwrap_or_default(),
        };
        Ok(Self {
            node_cookie,
            only_node,
            socket_lb_udp: mode == SocketLb::All,
            has_set_retval: features.has_set_retval,
            has_netns_cookie: features.has_netns_cookie,
            has_csum_ipv6: features.has_csum_ipv6,
            ..Self::default()
        })
    }

    /// The same, with cgroups whose sockets are left to the packet path. Ids beyond the capacity
    /// are ignored.
    #[must_use]
    pub fn excluding(mut self, cgroups: &[u64]) -> Self {
        for (entry, id) in self.excluded_cgroups.iter_mut().zip(cgroups) {
            *entry = *id;
            self.excluded_count += 1;
        }
        self
    }
}

fn unsupported() -> io::Error {
    io::ErrorKind::Unsupported.into()
}

/// The programs, loaded.
#[derive(Debug)]
pub struct Programs {
    programs: Vec<(String, OwnedFd)>,
    /// How long loading took.
    pub elapsed: Duration,
    /// The names of these programs, and of those that they replace.
    pub names: Names,
}

impl Programs {
    /// The program `name`.
    ///
    /// # Errors
    /// [`LoadError::NoProgram`] if the object has none of this name.
    pub fn get(&self, name: &'static str) -> Result<BorrowedFd<'_>, LoadError> {
        self.programs
            .iter()
            .find(|(program, _)| program == name)
            .map(|(_, descriptor)| descriptor.as_fd())
            .ok_or(LoadError::NoProgram { name })
    }

    /// Whether `id` is the kernel's id of the program `name`.
    pub fn is(&self, name: &'static str, id: u32) -> bool {
        let info = self.get(name).ok().map(lb_sys::program_info);
        info.is_some_and(|info| info.is_ok_and(|info| info.id == id))
    }
}

/// How programs find the entries of the maps before: constants of [`HANDOVER_OBJECT`].
#[derive(Debug)]
pub(super) struct Conversions {
    /// How they convert entries, by the name of the constant.
    pub(super) words: Vec<(&'static str, ConversionWords)>,
    /// Where flows are.
    pub(super) flows_before: u32,
}

/// Where the programs get a map from.
#[derive(Clone, Debug)]
pub(super) struct MapSource {
    /// Its name in the object.
    pub(super) name: &'static str,
    /// Its pin; a new map is pinned there if there is none.
    pub(super) path: PathBuf,
    /// The number of entries of a new map; 0 as in the object.
    pub(super) entries: u32,
}

/// Loads every program of the object, or with `conversions` of that for the handover.
pub(super) fn load_object(
    maps: &[MapSource],
    constants: Constants,
    conversions: Option<&Conversions>,
) -> Result<Programs, LoadError> {
    let started = Instant::now();
    let node_cookie = constants.node_cookie.to_ne_bytes();
    let flags = [
        ("EXCLUDED_COUNT", constants.excluded_count),
        ("ONLY_NODE", u32::from(constants.only_node)),
        ("SOCKET_LB_UDP", u32::from(constants.socket_lb_udp)),
        ("HAS_SET_RETVAL", u32::from(constants.has_set_retval)),
        ("HAS_NETNS_COOKIE", u32::from(constants.has_netns_cookie)),
        ("HAS_CSUM_IPV6", u32::from(constants.has_csum_ipv6)),
    ];
    let mut loader = EbpfLoader::new();
    loader.btf(None).override_global("NODE_COOKIE", &node_cookie, true);
    loader.override_global("EXCLUDED_CGROUPS", &constants.excluded_cgroups[..], true);
    loader.verifier_log_level(VerifierLogLevel::DEBUG | VerifierLogLevel::STATS);
    for (name, value) in &flags {
        loader.override_global(name, value, true);
    }
    for (name, words) in conversions.iter().flat_map(|conversions| &conversions.words) {
        loader.override_global(name, &words[..], true);
    }
    if let Some(Conversions { flows_before, .. }) = conversions {
        loader.override_global("FLOWS_BEFORE", flows_before, true);
    }
    let bytes = if conversions.is_some() { HANDOVER_OBJECT } else { OBJECT };
    for map in maps {
        loader.map_pin_path(map.name, map.path.as_path());
        if map.entries > 0 {
            loader.map_max_entries(map.name, map.entries);
        }
    }
    let object = loader.load(bytes);
    lb_sys::page_out(bytes);
    let mut object = object.map_err(|source| object_error(source.into()))?;
    let maps_done = started.elapsed();
    let programs = verify(object.programs_mut().map(|(name, program)| (name.to_owned(), program)))?;
    #[cfg(feature = "ebpf-log")]
    forward_log(&mut object);
    let elapsed = started.elapsed();
    debug!(?maps_done, ?elapsed, "programs loaded");
    Ok(Programs { programs, elapsed, names: Names::default() })
}

/// Developers only: forwards the log of the programs, if the object was built with it (`cargo
/// xtask build-ebpf --log`). Needs a tokio runtime.
#[cfg(feature = "ebpf-log")]
fn forward_log(object: &mut aya::Ebpf) {
    const INTERVAL: Duration = Duration::from_millis(100);
    let mut logger = match aya_log::EbpfLogger::init(object) {
        Ok(logger) => logger,
        Err(error) => return warn!(%error, "cannot read the log of the programs"),
    };
    tokio::spawn(async move {
        let mut ticks = tokio::time::interval(INTERVAL);
        loop {
            ticks.tick().await;
            logger.flush();
        }
    });
}

/// Pins the programs that tools and the next agent recognise, replacing those of an earlier one,
/// and learns the names of both.
///
/// # Errors
/// [`LoadError::Pin`].
pub fn pin_programs(pins: &Pins, programs: &mut Programs) -> Result<(), LoadError> {
    pin_clock(pins, programs)?;
    programs.names = names::replace(pins, |name| programs.get(name).map_err(io::Error::other))
        .map_err(|source| PinError::Open { path: pins.base().to_owned(), source })?;
    Ok(())
}

/// Pins the program that reads jiffies, replacing an earlier pin.
fn pin_clock(pins: &Pins, programs: &Programs) -> Result<(), LoadError> {
    let path = pins.clock();
    let pin = || {
        let clock = programs.get("clock").map_err(io::Error::other)?;
        pins.kept().pin(&path, Arc::new(clock.try_clone_to_owned()?))
    };
    pin().map_err(|source| LoadError::Pin(PinError::Open { path: path.clone(), source }))
}

/// Loads the programs on as many threads as there are CPUs: the verifier takes most of the time
/// of a start.
fn verify<'a>(
    programs: impl Iterator<Item = (String, &'a mut Program)>,
) -> Result<Vec<(String, OwnedFd)>, LoadError> {
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let mut shares: Vec<Vec<(String, &mut Program)>> = Vec::new();
    shares.resize_with(threads, Vec::new);
    for (position, program) in programs.enumerate() {
        shares[position % threads].push(program);
    }
    thread::scope(|scope| {
        let workers: Vec<_> = shares
            .into_iter()
            .map(|share| {
                scope.spawn(|| {
                    share
                        .into_iter()
                        .map(|(name, program)| verify_one(name, program))
                        .collect::<Result<Vec<_>, _>>()
                })
            })
            .collect();
        let mut loaded = Vec::new();
        for worker in workers {
            match worker.join() {
                Ok(result) => loaded.extend(result?),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        Ok(loaded)
    })
}

/// Has the kernel verify a program; `None` if it is of a kind that lb does not have. A signal that is
/// pending makes the verifier give up (EAGAIN); then it is asked again, as libbpf does
/// (`PROG_LOAD_ATTEMPTS`).
pub fn load_one(program: &mut Program) -> Option<Result<(), ProgramError>> {
    const ATTEMPTS: usize = 5;
    let mut load = || match program {
        Program::SchedClassifier(program) => Some(program.load()),
        Program::CgroupSockAddr(program) => Some(program.load()),
        Program::CgroupSock(program) => Some(program.load()),
        Program::Xdp(program) => Some(program.load()),
        _ => None,
    };
    let mut loaded = load()?;
    for _ in 1..ATTEMPTS {
        match &loaded {
            Err(ProgramError::LoadError { io_error, .. })
                if io_error.raw_os_error() == Some(libc::EAGAIN) =>
            {
                loaded = load()?;
            }
            _ => break,
        }
    }
    Some(loaded)
}

fn verify_one(name: String, program: &mut Program) -> Result<(String, OwnedFd), LoadError> {
    let Some(result) = load_one(program) else { return Err(LoadError::Kind { name }) };
    let descriptor = result.and_then(|()| Ok(program.fd()?.as_fd().try_clone_to_owned()?));
    match descriptor {
        Ok(descriptor) => Ok((name, descriptor)),
        Err(ProgramError::LoadError { io_error, verifier_log }) => {
            debug!(program = name, log = %verifier_log, "the verifier's log");
            Err(privileged(io_error, |source| LoadError::Verifier { name, source }))
        }
        Err(source) => Err(LoadError::Program { name, source }),
    }
}

fn privileged(error: io::Error, otherwise: impl FnOnce(io::Error) -> LoadError) -> LoadError {
    match error.raw_os_error() {
        Some(libc::EPERM) => LoadError::Refused(Privileges::own().refusal()),
        _ => otherwise(error),
    }
}

/// [`LoadError::Refused`] if EPERM is anywhere in the causes.
fn object_error(error: Box<EbpfError>) -> LoadError {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&*error);
    while let Some(current) = cause {
        let system = current.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error);
        if system == Some(libc::EPERM) {
            return LoadError::Refused(Privileges::own().refusal());
        }
        cause = current.source();
    }
    LoadError::Object { source: error }
}

/// The programs could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// There is no bpffs for the pins.
    #[error(transparent)]
    Bpffs(#[from] BpffsError),
    /// A pin cannot be used.
    #[error(transparent)]
    Pin(#[from] PinError),
    /// A directory for pins could not be created.
    #[error("cannot create the directory {}", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// The error of the kernel.
        #[source]
        source: io::Error,
    },
    /// The network namespace of the node has no cookie.
    #[error(
        "--socket-lb node, which --masquerade-all may imply, needs cookies of network namespaces \
         (Linux 5.14 or newer): give --socket-lb off"
    )]
    Cookie {
        /// The error of the kernel.
        #[source]
        source: io::Error,
    },
    /// The kernel refuses bpf(2).
    #[error("cannot load eBPF programs: {0}")]
    Refused(Refusal),
    /// The maps could not be created or the object is broken.
    #[error("cannot load the eBPF object")]
    Object {
        /// The error of aya.
        #[source]
        source: Box<EbpfError>,
    },
    /// The verifier rejected a program.
    #[error("the kernel rejected program {name}: run with log level debug for the verifier's log")]
    Verifier {
        /// The program.
        name: String,
        /// The error of the kernel.
        #[source]
        source: io::Error,
    },
    /// A program could not be loaded for another reason.
    #[error("cannot load program {name}")]
    Program {
        /// The program.
        name: String,
        /// The error of aya.
        #[source]
        source: ProgramError,
    },
    /// The object has a type of program that the agent never attaches.
    #[error("program {name} of the eBPF object has a type that the agent does not attach")]
    Kind {
        /// The program.
        name: String,
    },
    /// The object lacks a program.
    #[error("the eBPF object has no program {name}")]
    NoProgram {
        /// The program.
        name: &'static str,
    },
}
