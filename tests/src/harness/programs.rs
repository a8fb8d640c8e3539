//! The eBPF object, loaded for tests: maps of its own that nothing pins, and programs that
//! are run on frames by BPF_PROG_TEST_RUN.
//!
//! Programs run in the network namespace of the calling thread; [`in_private_namespace`]
//! is where tests do it, so that devices have the numbers and addresses they expect.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::process::Command;
use std::{env, panic, thread};

use anyhow::{Context, Result, bail, ensure};
use aya::maps::{Map, MapData};
use aya::programs::{Program, SchedClassifier, TestRun, TestRunOptions, Xdp};
use aya::{Ebpf, EbpfLoader, TestRunResult};
use bytemuck::Pod;
use lb_agent::programs::features;
use lb_agent::programs::load::load_one;
use lb_sys::{PerCpuCounters, TypedMap};
use lb_testing::world::{EXTERNAL, EXTERNAL_TOO, POD_DEVICE, mac};
use nix::sched::{CloneFlags, unshare};

/// The object: where `LB_OBJECT` says, else where `cargo xtask build-ebpf` leaves it.
pub fn object_path() -> PathBuf {
    if let Some(path) = env::var_os("LB_OBJECT") {
        return path.into();
    }
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../target/ebpf/lb-ebpf.o"))
}

/// What this kernel has, as the constants of the object.
fn constants() -> [(&'static str, u32); 3] {
    let features = features::features();
    [
        ("HAS_SET_RETVAL", features.has_set_retval.into()),
        ("HAS_NETNS_COOKIE", features.has_netns_cookie.into()),
        ("HAS_CSUM_IPV6", features.has_csum_ipv6.into()),
    ]
}

/// The loaded object.
#[derive(Debug)]
pub struct Programs {
    ebpf: Ebpf,
}

/// What a classifier did with a frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ran {
    /// What it returned, a TC_ACT constant.
    pub returned: i32,
    /// The frame as it left it.
    pub frame: Vec<u8>,
}

/// What BPF_PROG_TEST_RUN of this kernel lets a test say of a frame.
#[derive(Clone, Copy, Debug)]
pub struct Runs {
    /// The device that a classifier's frame came in by, beside the one that it is at.
    pub ingress: bool,
    /// The device of an XDP program's frame (5.15).
    pub xdp: bool,
}

impl Programs {
    /// Loads maps and programs, with all that this kernel has switched on; `entries` are
    /// sizes of maps other than in the object.
    ///
    /// # Errors
    /// Without the object or privileges, or if the kernel refuses a program.
    pub fn load(entries: &[(&str, u32)]) -> Result<Self> {
        let (programs, refused) = Self::load_each(entries)?;
        match refused.into_iter().next() {
            None => Ok(programs),
            Some((_, error)) => Err(error),
        }
    }

    /// [`Programs::load`] that goes on after a program that the kernel refuses; gives the
    /// names of those too.
    ///
    /// # Errors
    /// Without the object or privileges, or if the kernel refuses a map.
    pub fn load_each(entries: &[(&str, u32)]) -> Result<(Self, Vec<(String, anyhow::Error)>)> {
        let path = object_path();
        let mut loader = EbpfLoader::new();
        for (name, entries) in entries {
            loader.map_max_entries(name, *entries);
        }
        let constants = constants();
        for (name, value) in &constants {
            loader.override_global(name, value, true);
        }
        let ebpf = loader.load_file(&path).with_context(|| {
            format!("cannot load {} (cargo xtask build-ebpf makes it)", path.display())
        })?;
        let mut programs = Self { ebpf };
        let mut refused = Vec::new();
        for (name, program) in programs.ebpf.programs_mut() {
            let Some(loaded) = load_one(program) else {
                bail!("program {name} is of an unexpected kind: {program:?}")
            };
            let loaded = loaded.with_context(|| format!("the kernel refused program {name}"));
            refused.extend(loaded.err().map(|error| (name.to_owned(), error)));
        }
        Ok((programs, refused))
    }

    /// Every program, in the order of their names.
    pub fn programs(&self) -> Vec<(&str, &Program)> {
        let mut programs: Vec<_> = self.ebpf.programs().collect();
        programs.sort_by_key(|(name, _)| *name);
        programs
    }

    /// Every map but those of the compiler (sections such as .rodata), in the order of
    /// their names.
    pub fn maps(&self) -> Vec<(&str, &MapData)> {
        let mut maps: Vec<_> = self
            .ebpf
            .maps()
            .filter(|(name, _)| !name.starts_with('.'))
            .filter_map(|(name, map)| Some((name, data(map)?)))
            .collect();
        maps.sort_by_key(|(name, _)| *name);
        maps
    }

    /// A map whose keys are `K` and whose values are `V`.
    ///
    /// # Errors
    /// No such map, or one of another layout.
    pub fn map<K: Pod, V: Pod>(&self, name: &str) -> Result<TypedMap<K, V>> {
        TypedMap::new(self.descriptor(name)?).with_context(|| format!("map {name}"))
    }

    /// COUNTERS.
    ///
    /// # Errors
    /// No such map.
    pub fn counters(&self) -> Result<PerCpuCounters> {
        Ok(PerCpuCounters::new(self.descriptor("COUNTERS")?)?)
    }

    /// A descriptor of a map.
    ///
    /// # Errors
    /// No such map.
    pub fn descriptor(&self, name: &str) -> Result<OwnedFd> {
        let map = self.ebpf.map(name).with_context(|| format!("the object has no map {name}"))?;
        let map = data(map).with_context(|| format!("map {name} is of an unexpected kind"))?;
        Ok(map.fd().as_fd().try_clone_to_owned()?)
    }

    /// Asks the kernel what a test may say of a frame.
    pub fn runs(&self) -> Runs {
        const LOOPBACK: u32 = 1;
        let frame = [0; 64];
        Runs {
            ingress: self.run("clock", &frame, LOOPBACK, LOOPBACK).is_ok(),
            xdp: self.run_xdp(&frame, LOOPBACK).is_ok(),
        }
    }

    /// Runs a classifier on a frame that is at (and came in by) these devices.
    ///
    /// # Errors
    /// No such classifier, no such device in this namespace, or a frame shorter than an
    /// Ethernet header.
    pub fn run(&self, name: &str, frame: &[u8], ifindex: u32, ingress_ifindex: u32) -> Result<Ran> {
        run_classifier(self.classifier(name)?, frame, ifindex, ingress_ifindex)
            .with_context(|| format!("cannot run {name} on {} bytes", frame.len()))
    }

    /// Runs a classifier on a frame that is at this device, and then so many times in all on what it
    /// has made of the frame.
    ///
    /// # Errors
    /// As for [`Programs::run`].
    pub fn run_on_and_on(&self, name: &str, frame: &[u8], ifindex: u32, times: u32) -> Result<Ran> {
        let program = self.classifier(name)?;
        test_run(program, frame, &classifier_context(ifindex, 0), times)
            .with_context(|| format!("cannot run {name} on {} bytes", frame.len()))
    }

    fn classifier(&self, name: &str) -> Result<&SchedClassifier> {
        let Some(Program::SchedClassifier(program)) = self.ebpf.program(name) else {
            bail!("the object has no classifier {name}");
        };
        Ok(program)
    }

    /// Runs the XDP program on a frame that came in by this device.
    ///
    /// # Errors
    /// As for [`Programs::run`].
    pub fn run_xdp(&self, frame: &[u8], ifindex: u32) -> Result<Ran> {
        const NAME: &str = "xdp_device";
        let Some(Program::Xdp(program)) = self.ebpf.program(NAME) else {
            bail!("the object has no XDP program {NAME}");
        };
        run_xdp(program, frame, ifindex)
            .with_context(|| format!("cannot run {NAME} on {} bytes", frame.len()))
    }
}

/// Runs a classifier on a frame that is at (and came in by) these devices of the calling
/// thread's namespace.
///
/// # Errors
/// No such device, or a frame shorter than an Ethernet header.
pub fn run_classifier(
    program: &SchedClassifier,
    frame: &[u8],
    ifindex: u32,
    ingress_ifindex: u32,
) -> Result<Ran> {
    test_run(program, frame, &classifier_context(ifindex, ingress_ifindex), 1)
}

/// Words of `struct __sk_buff`.
const WORDS: usize = 48;

/// The words that a test may set.
fn classifier_context(ifindex: u32, ingress_ifindex: u32) -> [u32; WORDS] {
    const INGRESS_IFINDEX: usize = 9;
    const IFINDEX: usize = 10;
    let mut context = [0; WORDS];
    context[INGRESS_IFINDEX] = ingress_ifindex;
    context[IFINDEX] = ifindex;
    context
}

/// Runs an XDP program on a frame that came in by this device.
///
/// # Errors
/// As for [`run_classifier`].
pub fn run_xdp(program: &Xdp, frame: &[u8], ifindex: u32) -> Result<Ran> {
    // `struct xdp_md`: data, data_end, data_meta, ingress_ifindex, rx_queue_index,
    // egress_ifindex.
    let context = [0, frame.len() as u32, 0, ifindex, 0, 0];
    test_run(program, frame, &context, 1)
}

fn test_run<P>(program: &P, frame: &[u8], context: &[u32], repeat: u32) -> Result<Ran>
where
    P: for<'a> TestRun<Opts<'a> = TestRunOptions<'a>, Result = TestRunResult>,
{
    let mut out = vec![0; frame.len() + ROOM];
    let result = program.test_run(TestRunOptions {
        data_in: Some(frame),
        data_out: Some(&mut out),
        ctx_in: Some(bytemuck::cast_slice(context)),
        repeat,
        ..TestRunOptions::new()
    })?;
    out.truncate(result.data_size_out as usize);
    Ok(Ran { returned: result.return_value as i32, frame: out })
}

/// More than any frame grows by.
const ROOM: usize = 256;

/// The gateway of the external device of [`in_private_namespace`].
pub const GATEWAY_MAC: [u8; 6] = [2, 0, 0, 0, 2, 1];
/// The MAC of the gateway after a test has changed it.
pub const MOVED_GATEWAY_MAC: [u8; 6] = [2, 0, 0, 0, 2, 9];

fn data(map: &Map) -> Option<&MapData> {
    Some(match map {
        Map::Array(map)
        | Map::HashMap(map)
        | Map::LpmTrie(map)
        | Map::LruHashMap(map)
        | Map::PerCpuArray(map)
        | Map::PerCpuLruHashMap(map)
        | Map::SkStorage(map) => map,
        _ => return None,
    })
}

/// A descriptor of a loaded program.
///
/// # Errors
/// For a kind of program that the object has none of.
pub fn program_descriptor(program: &Program) -> Result<BorrowedFd<'_>> {
    Ok(match program {
        Program::SchedClassifier(program) => program.fd()?.as_fd(),
        Program::CgroupSockAddr(program) => program.fd()?.as_fd(),
        Program::CgroupSock(program) => program.fd()?.as_fd(),
        Program::Xdp(program) => program.fd()?.as_fd(),
        other => bail!("unexpected kind of program: {:?}", other.prog_type()),
    })
}

/// Does `work` on a thread of its own in a network namespace that ends with it. It has the
/// external devices and the pod interface of the flow rows, with routes to the pods of
/// other nodes and nothing behind them.
///
/// # Errors
/// Without privileges, and what `work` says.
pub fn in_private_namespace<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    in_empty_namespace(|| {
        devices()?;
        work()
    })
}

/// Does `work` on a thread of its own in a network namespace that ends with it, and that has
/// nothing but a loopback device.
///
/// # Errors
/// Without privileges, and what `work` says.
pub fn in_empty_namespace<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let thread = || {
        unshare(CloneFlags::CLONE_NEWNET).context("cannot make a network namespace (no root?)")?;
        work()
    };
    thread::scope(|scope| scope.spawn(thread).join())
        .unwrap_or_else(|panicked| panic::resume_unwind(panicked))
}

fn devices() -> Result<()> {
    let mut lines = vec!["link set lo up".to_owned()];
    for (name, index) in [("ext0", EXTERNAL), ("ext1", EXTERNAL_TOO), ("pod0", POD_DEVICE)] {
        let address = mac(index).map(|byte| format!("{byte:02x}")).join(":");
        lines.push(format!(
            "link add name {name} index {index} address {address} type veth peer name {name}p"
        ));
        lines.push(format!("link set {name} up"));
        lines.push(format!("link set {name}p up"));
    }
    for line in [
        "addr add 192.0.2.10/24 dev ext0",
        "addr add 2001:db8::10/64 dev ext0 nodad",
        "neigh add 192.0.2.1 lladdr 02:00:00:00:02:01 nud permanent dev ext0",
        "neigh add 2001:db8::1 lladdr 02:00:00:00:02:01 nud permanent dev ext0",
        "neigh add 192.0.2.11 lladdr 02:00:00:00:02:01 nud permanent dev ext0",
        "neigh add 2001:db8::b lladdr 02:00:00:00:02:01 nud permanent dev ext0",
        "route add 10.2.0.0/16 via 192.0.2.1",
        "route add fd00:2::/32 via 2001:db8::1",
        "route add 198.51.100.0/24 via 192.0.2.1",
        "route add 2001:db9::/32 via 2001:db8::1",
        "route add 10.1.0.0/16 dev pod0",
        "route add fd00:1::/32 dev pod0",
    ] {
        let family = if line.contains("::") { "-6 " } else { "" };
        lines.push(format!("{family}{line}"));
    }
    for line in lines {
        let output = Command::new("ip").args(line.split(' ')).output().context("cannot run ip")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "`ip {line}`: {}", said.trim());
    }
    for key in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
        let path = format!("/proc/sys/net/{key}");
        std::fs::write(&path, "1").with_context(|| format!("cannot write {path}"))?;
    }
    Ok(())
}
