//! The first process of the virtual machine: mounts, modules, the tests, and the waits of an
//! init.
//!
//! It always ends by switching the machine off.

use std::path::Path;
use std::process::Command;
use std::{env, fs};

use anyhow::{Context, Result};
use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::wait::{WaitStatus, wait};
use nix::unistd::Pid;

/// Kernel modules in the order in which they are loaded.
const MODULES: &str = "/modules";

/// File systems and their mount points.
const MOUNTS: [(&str, &str); 7] = [
    ("proc", "/proc"),
    ("sysfs", "/sys"),
    ("devtmpfs", "/dev"),
    ("tmpfs", "/run"),
    ("tmpfs", "/tmp"),
    ("bpf", "/sys/fs/bpf"),
    ("cgroup2", "/sys/fs/cgroup"),
];

/// Whether this process is the first one of the machine.
pub fn is_first() -> bool {
    std::process::id() == 1
}

/// Sets the machine up, runs this program again for the tests, and switches the machine off.
pub fn boot() -> ! {
    if let Err(error) = set_up().and_then(|()| run_tests()) {
        println!("{}the machine cannot be set up: {error:#}", super::PREFIX);
    }
    // SAFETY: no preconditions.
    unsafe { libc::sync() };
    loop {
        let Err(error) = reboot(RebootMode::RB_POWER_OFF);
        println!("cannot switch off: {error}");
        std::thread::park();
    }
}

fn set_up() -> Result<()> {
    for (kind, place) in MOUNTS {
        fs::create_dir_all(place).with_context(|| format!("cannot make {place}"))?;
        mount(Some(kind), place, Some(kind), MsFlags::empty(), None::<&str>)
            .with_context(|| format!("cannot mount {kind} on {place}"))?;
    }
    let mut modules: Vec<_> = fs::read_dir(MODULES)
        .with_context(|| format!("cannot list {MODULES}"))?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_>>()?;
    // Their names begin with their place in the order.
    modules.sort();
    modules.iter().try_for_each(|module| insert(module))
}

fn insert(module: &Path) -> Result<()> {
    let file = fs::File::open(module)?;
    finit_module(&file, c"", ModuleInitFlags::empty())
        .with_context(|| format!("the kernel refused {}", module.display()))
}

/// Waits for the tests, and for every orphan that they leave behind.
fn run_tests() -> Result<()> {
    let program = env::current_exe().context("cannot find the running program")?;
    let tests = Command::new(program).spawn().context("cannot start the tests")?;
    let tests = Pid::from_raw(tests.id() as i32);
    loop {
        match wait().context("cannot wait for the tests")? {
            WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, ..) if pid == tests => {
                return Ok(());
            }
            _ => {}
        }
    }
}
