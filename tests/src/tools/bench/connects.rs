//! What the hooks add to connect(), row 6 of docs/performance.md, and to close().
//!
//! Every call is a real one, of a fresh TCP socket, in a network namespace that leads nowhere.
//! Nothing is sent, so the hook is most of the difference between a call with it and a call
//! without it. The error says which destination the call had: routes to the backends fail
//! with another error than the route to the Service.

use std::{
    fs,
    mem::size_of,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use aya::programs::ProgramFd;
use lb_common::abi::{
    address::{Address, Be16, Ipv4, Ipv6},
    counter::{Hook, Reason},
};
use lb_sys::{LinkTarget, link_create};

use super::{
    datapath::Bench,
    harness::{load_object, load_programs, processor_time, program},
    report::{Figure, Floor, Outcome, control},
    stats::Estimate,
    tables::{Datapath, ELSEWHERE, Frontends, PORTS, Side, backend_endpoint, cluster_ip},
};
use crate::harness::netns::topology::cgroup::Cgroup;

/// Aim and must, ns, above no hook at all.
const SERVICE: (f64, f64) = (250.0, 400.0);
const NOT_A_SERVICE: (f64, f64) = (200.0, 400.0);
/// What an empty hook adds on the reference machine of docs/performance.md, ns.
const EMPTY_HOOK: f64 = 176.0;
/// The hook of close(), of both families, and its attach type.
const RELEASE: (&str, u32) = ("release", 34);
/// Sockets that are open at a time: few enough to stay in the nearer caches.
const SOCKETS: usize = 64;
/// How often that many are made in a turn: few enough that what closed sockets leave behind,
/// freed only after a grace period, never runs short.
const BATCHES: usize = 4;
const SMALL_TABLE: u32 = 1 << 12;

/// The hook and the socket addresses of a family.
trait Call: Side {
    const HOOK: Hook;
    /// Its attach type, `enum bpf_attach_type`.
    const ATTACH: u32;
    const DOMAIN: i32;
    const EMPTY: &'static str;

    /// `struct sockaddr_in` or `struct sockaddr_in6`.
    fn socket_address(address: Self::Address, port: Be16) -> Vec<u8> {
        let mut bytes = (Self::DOMAIN as u16).to_ne_bytes().to_vec();
        bytes.extend(port.be16.to_ne_bytes());
        let words = address.words();
        // sin6_flowinfo.
        bytes.resize(if words.len() == 4 { 8 } else { 4 }, 0);
        words.iter().for_each(|word| bytes.extend(word.to_ne_bytes()));
        bytes.resize(Self::SOCKET_ADDRESS, 0);
        bytes
    }
    const SOCKET_ADDRESS: usize;
}

impl Call for Ipv4 {
    const HOOK: Hook = Hook::Connect4;
    const ATTACH: u32 = 10;
    const DOMAIN: i32 = libc::AF_INET;
    const EMPTY: &'static str = "empty_connect4";
    const SOCKET_ADDRESS: usize = size_of::<libc::sockaddr_in>();
}

impl Call for Ipv6 {
    const HOOK: Hook = Hook::Connect6;
    const ATTACH: u32 = 11;
    const DOMAIN: i32 = libc::AF_INET6;
    const EMPTY: &'static str = "empty_connect6";
    const SOCKET_ADDRESS: usize = size_of::<libc::sockaddr_in6>();
}

/// Calls that are measured in turn. Without the program a call goes to `plain`, which is where
/// the hook sends a call to `hooked`.
struct Calls {
    plain: Vec<u8>,
    hooked: Vec<u8>,
    errno: i32,
    ended: Reason,
}

/// Measures both families.
///
/// # Errors
/// The kernel refuses a program, a cgroup or a namespace; a call ends otherwise than it should.
pub fn measure(bench: &Bench) -> Result<Vec<Figure>> {
    super::namespace::enter_dead_end()?;
    let cgroup = Joined::new()?;
    let datapath =
        Datapath::load(bench.object, [SMALL_TABLE; 2], bench.device, Frontends::ClusterIps)?;
    let mut empties = load_object(bench.wrappers, &[])?;
    load_programs(&mut empties)?;
    let mut figures = Vec::new();
    let of_close = program(&empties, "empty_release")?;
    let empty = [program(&empties, Ipv4::EMPTY)?, of_close];
    family::<Ipv4>(bench, &datapath, &cgroup, empty, &mut figures)?;
    let empty = [program(&empties, Ipv6::EMPTY)?, of_close];
    family::<Ipv6>(bench, &datapath, &cgroup, empty, &mut figures)?;
    Ok(figures)
}

fn family<F: Call>(
    bench: &Bench,
    datapath: &Datapath,
    cgroup: &Joined,
    empty: [&ProgramFd; 2],
    figures: &mut Vec<Figure>,
) -> Result<()> {
    let (address, port) = backend_endpoint::<F>();
    let service = Calls {
        plain: F::socket_address(address, port),
        hooked: F::socket_address(cluster_ip::<F>(), Be16::new(PORTS[0])),
        errno: libc::EHOSTUNREACH,
        ended: Reason::SocketTranslated,
    };
    let elsewhere = F::socket_address(F::address(ELSEWHERE, 9), Be16::new(443));
    let other = Calls {
        plain: elsewhere.clone(),
        hooked: elsewhere,
        errno: libc::ENETUNREACH,
        ended: Reason::NotService,
    };
    let kinds = [("a Service", service, SERVICE), ("no Service", other, NOT_A_SERVICE)];
    for (name, calls, limits) in kinds {
        let name = |call: &str| format!("added to {call}(), {name}, TCP {}", F::NAME);
        if ["connect", "close"].iter().any(|call| name(call).contains(bench.only)) {
            let rounds = Rounds::<F>::new(bench, datapath, cgroup, empty);
            figures.extend(rounds.measure(name, &calls, limits)?);
        }
    }
    Ok(())
}

struct Rounds<'a, F> {
    bench: &'a Bench<'a>,
    datapath: &'a Datapath,
    cgroup: &'a Joined,
    /// Of connect() and of close().
    empty: [&'a ProgramFd; 2],
    family: std::marker::PhantomData<F>,
}

impl<'a, F: Call> Rounds<'a, F> {
    fn new(
        bench: &'a Bench,
        datapath: &'a Datapath,
        cgroup: &'a Joined,
        empty: [&'a ProgramFd; 2],
    ) -> Self {
        Self { bench, datapath, cgroup, empty, family: std::marker::PhantomData }
    }

    /// The figures of connect() and of close(), each with its control.
    fn measure(
        &self,
        name: impl Fn(&str) -> String,
        calls: &Calls,
        limits: (f64, f64),
    ) -> Result<Vec<Figure>> {
        let own = [self.program(F::HOOK.name())?, self.program(RELEASE.0)?];
        let [mut none, mut empty, mut hooked, mut again] = [const { Vec::new() }; 4];
        for round in 0..2 * self.bench.rounds {
            let mut turns = [
                (&mut none, None, false),
                (&mut empty, Some(self.empty), false),
                (&mut hooked, Some(own), true),
                (&mut again, None, false),
            ];
            if round % 2 == 1 {
                turns.reverse();
            }
            for (samples, programs, is_hooked) in turns {
                samples.push(self.turn(calls, programs, is_hooked)?);
            }
        }
        let mut figures = Vec::new();
        for (place, (call, limits)) in
            [("connect", Some(limits)), ("close", None)].into_iter().enumerate()
        {
            let [none, empty, hooked, again] = [&none, &empty, &hooked, &again].map(|samples| {
                samples.iter().map(|sample: &[f64; 2]| sample[place]).collect::<Vec<_>>()
            });
            let above = |samples: &[f64]| {
                let bare =
                    none.iter().zip(&again).map(|(none, again)| f64::midpoint(*none, *again));
                Estimate::of(samples.iter().zip(bare).map(|(sample, none)| sample - none).collect())
            };
            let floor = Floor {
                steps: "an empty hook".to_owned(),
                cost: above(&empty).median,
                anchor: EMPTY_HOOK,
            };
            let figure = Figure::unjudged(&name(call), Outcome::Measured(above(&hooked)));
            let figure = match limits {
                Some((aim, must)) => Figure { row: 6, aim: Some(aim), must: Some(must), ..figure },
                None => figure,
            };
            figures.push(figure.with_floor(floor));
            figures.push(control(&format!("{}, no hook", name(call)), &none, &again));
        }
        Ok(figures)
    }

    fn program(&self, name: &str) -> Result<&ProgramFd> {
        program(self.datapath.object(), name)
    }

    /// Nanoseconds of a connect() and of a close() with hooks for both.
    fn turn(
        &self,
        calls: &Calls,
        programs: Option<[&ProgramFd; 2]>,
        is_hooked: bool,
    ) -> Result<[f64; 2]> {
        let attach = |program: &ProgramFd, kind| {
            let target = LinkTarget::Cgroup(self.cgroup.directory.as_fd());
            link_create(program.as_fd(), target, kind).context("cannot attach to the cgroup")
        };
        let attach = |[connect, close]: [&ProgramFd; 2]| {
            Ok::<_, anyhow::Error>([attach(close, RELEASE.1)?, attach(connect, F::ATTACH)?])
        };
        let _links = programs.map(attach).transpose()?;
        let address = if is_hooked { &calls.hooked } else { &calls.plain };
        batch::<F>(address, calls.errno)?;
        let counter = F::HOOK.counter(calls.ended) as usize;
        let before = self.datapath.counters.sums()?[counter];
        let mut spent = [Duration::ZERO; 2];
        for _ in 0..BATCHES {
            let of_batch = batch::<F>(address, calls.errno)?;
            spent = [spent[0] + of_batch[0], spent[1] + of_batch[1]];
        }
        let made = BATCHES * SOCKETS;
        let counted = self.datapath.counters.sums()?[counter] - before;
        let expected = if is_hooked { made as u64 } else { 0 };
        ensure!(
            counted == expected,
            "{counted} calls ended as {}, not {expected}",
            calls.ended.name()
        );
        Ok(spent.map(|spent| spent.as_nanos() as f64 / made as f64))
    }
}

/// Makes sockets, and returns how long their connect() and their close() take together.
fn batch<F: Call>(address: &[u8], errno: i32) -> Result<[Duration; 2]> {
    let sockets: Vec<OwnedFd> = (0..SOCKETS).map(|_| socket(F::DOMAIN)).collect::<Result<_>>()?;
    let mut failures = 0;
    let before = processor_time()?;
    for socket in &sockets {
        // SAFETY: the kernel reads as many bytes as `address` has.
        let result = unsafe {
            libc::connect(socket.as_raw_fd(), address.as_ptr().cast(), address.len() as u32)
        };
        let is_expected =
            result == -1 && std::io::Error::last_os_error().raw_os_error() == Some(errno);
        failures += usize::from(is_expected);
    }
    let connected = processor_time()?;
    let last = std::io::Error::last_os_error();
    ensure!(failures == SOCKETS, "connect() ended otherwise than with error {errno}: {last}");
    let before_close = processor_time()?;
    drop(sockets);
    let closed = processor_time()?;
    Ok([connected - before, closed - before_close])
}

fn socket(domain: i32) -> Result<OwnedFd> {
    let kind = libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: takes numbers alone.
    let socket = unsafe { libc::socket(domain, kind, 0) };
    ensure!(socket >= 0, "cannot make a socket: {}", std::io::Error::last_os_error());
    // SAFETY: the descriptor was just made, and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(socket) })
}

/// A cgroup of the bench's own, which this process is in.
struct Joined {
    cgroup: Cgroup,
    directory: fs::File,
    before: PathBuf,
}

impl Joined {
    fn new() -> Result<Self> {
        let list = fs::read_to_string("/proc/self/cgroup").context("cannot read cgroup")?;
        let path = list.lines().find_map(|line| line.strip_prefix("0::/"));
        let path = path.context("this process is in no cgroup of version 2")?;
        let before = crate::harness::netns::topology::cgroup::mount_point()?.join(path);
        let cgroup = Cgroup::create(&format!("lb-bench-connects-{}", std::process::id()))?;
        let directory = fs::File::open(cgroup.path()).context("cannot open the cgroup")?;
        let joined = Self { cgroup, directory, before };
        fs::write(joined.cgroup.path().join("cgroup.procs"), "0").context("cannot join")?;
        Ok(joined)
    }
}

impl Drop for Joined {
    fn drop(&mut self) {
        // Removing the cgroup kills every process in it.
        match fs::write(self.before.join("cgroup.procs"), "0") {
            Ok(()) => self.cgroup.remove(),
            Err(error) => eprintln!("cannot leave {}: {error}", self.cgroup.path().display()),
        }
    }
}
