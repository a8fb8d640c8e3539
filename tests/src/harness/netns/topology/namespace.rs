//! A named network namespace.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{fs, panic, thread};

use anyhow::{Context, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

use crate::harness::netns::actors::exec::ip_batch;

/// Where iproute2 keeps the names, so that `ip netns` and `nsenter` find ours too.
pub(in crate::harness::netns) const DIRECTORY: &str = "/run/netns";

/// A network namespace under `/run/netns`, removed when it is dropped.
///
/// Removing takes the name away: the namespace itself lives until its last process ends.
#[derive(Debug)]
pub struct Netns {
    name: String,
    file: Arc<File>,
    /// Dropping removes the name.
    is_own: bool,
}

impl Netns {
    /// Makes a namespace of this name.
    ///
    /// # Errors
    /// Without privileges, or where the name is taken.
    pub fn create(name: &str) -> Result<Self> {
        fs::create_dir_all(DIRECTORY).with_context(|| format!("cannot make {DIRECTORY}"))?;
        let path = Path::new(DIRECTORY).join(name);
        File::create_new(&path).with_context(|| format!("cannot make network namespace {name}"))?;
        let made = in_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET).context("cannot unshare the network namespace")?;
            mount(
                Some("/proc/thread-self/ns/net"),
                &path,
                None::<&str>,
                MsFlags::MS_BIND,
                None::<&str>,
            )
            .with_context(|| format!("cannot mount the network namespace on {}", path.display()))
        });
        if let Err(error) = made {
            fs::remove_file(&path).ok();
            return Err(error);
        }
        let file = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
        Ok(Self { name: name.to_owned(), file: Arc::new(file), is_own: true })
    }

    /// Finds a namespace that somebody else made, and leaves it when it is dropped.
    ///
    /// # Errors
    /// There is none of this name.
    pub fn open(name: &str) -> Result<Self> {
        let path = Path::new(DIRECTORY).join(name);
        let file = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
        Ok(Self { name: name.to_owned(), file: Arc::new(file), is_own: false })
    }

    /// The namespace of a process, which has no name and ends with its processes.
    ///
    /// # Errors
    /// There is no such process.
    pub fn of_process(id: u32) -> Result<Self> {
        let path = format!("/proc/{id}/ns/net");
        let file = File::open(&path).with_context(|| format!("cannot open {path}"))?;
        Ok(Self { name: format!("of process {id}"), file: Arc::new(file), is_own: false })
    }

    /// Leaves the name when this is dropped.
    pub fn leave(mut self) {
        self.is_own = false;
    }

    /// The name, for `ip netns exec` and `nsenter --net=/run/netns/NAME`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that stands for the namespace.
    pub fn path(&self) -> PathBuf {
        Path::new(DIRECTORY).join(&self.name)
    }

    pub(in crate::harness) fn file(&self) -> Arc<File> {
        self.file.clone()
    }

    /// Does `work` on a thread of its own inside the namespace. Sockets that it returns stay in
    /// the namespace, and so do processes that it starts. The cgroup stays the test's own.
    ///
    /// # Errors
    /// What `work` says.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        in_thread(|| {
            setns(&self.file, CloneFlags::CLONE_NEWNET)
                .with_context(|| format!("cannot enter network namespace {}", self.name))?;
            work()
        })
    }

    /// Runs `ip` with the words of this line.
    ///
    /// # Errors
    /// It fails.
    pub fn ip(&self, line: &str) -> Result<()> {
        self.ip_lines(&[line.to_owned()])
    }

    /// Runs `ip` with the words of each of these lines.
    ///
    /// # Errors
    /// One fails; those after it are not run.
    pub fn ip_lines(&self, lines: &[String]) -> Result<()> {
        self.run(|| ip_batch(lines))
    }

    /// The kernel's number for the namespace, which it gives to socket hooks.
    ///
    /// # Errors
    /// Before Linux 5.14.
    pub fn cookie(&self) -> Result<u64> {
        self.run(|| {
            let socket = std::net::UdpSocket::bind((std::net::Ipv4Addr::LOCALHOST, 0))?;
            let mut cookie = 0u64;
            let mut length = size_of::<u64>() as libc::socklen_t;
            // SAFETY: the kernel writes at most `length` bytes to a u64.
            let result = unsafe {
                libc::getsockopt(
                    socket.as_raw_fd(),
                    libc::SOL_SOCKET,
                    libc::SO_NETNS_COOKIE,
                    (&raw mut cookie).cast(),
                    &raw mut length,
                )
            };
            if result != 0 {
                return Err(std::io::Error::last_os_error()).context("no cookie of the namespace");
            }
            Ok(cookie)
        })
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        if self.is_own {
            remove(&self.name);
        }
    }
}

/// Takes a name away, whoever made it; a name that is not there is no error.
pub(in crate::harness) fn remove(name: &str) {
    let path = Path::new(DIRECTORY).join(name);
    umount2(&path, MntFlags::MNT_DETACH).ok();
    fs::remove_file(&path).ok();
}

fn in_thread<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| scope.spawn(work).join())
        .unwrap_or_else(|panicked| panic::resume_unwind(panicked))
}
