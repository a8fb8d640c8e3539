//! Two L3 devices and a thread that carries packets from each to the other, as a VPN does.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;

use crate::harness::netns::topology::namespace::Netns;

/// Longer than every packet of these devices.
const LONGEST: usize = 65_536;

/// The pair of devices; they are removed when this is dropped.
#[derive(Debug)]
pub struct Tunnel {
    stop: Arc<EventFd>,
    carrier: Option<JoinHandle<Result<()>>>,
}

impl Tunnel {
    /// Makes a device of this name in both namespaces, up and without addresses.
    ///
    /// # Errors
    /// A device of this name is there, or the kernel has no tun devices.
    pub fn between(ends: [&Netns; 2], name: &str) -> Result<Self> {
        let open = |netns: &Netns| -> Result<File> {
            let device = netns.run(|| tun(name))?;
            netns.ip(&format!("link set {name} up"))?;
            Ok(device)
        };
        let devices = [open(ends[0])?, open(ends[1])?];
        let stop = Arc::new(EventFd::new().context("cannot make an eventfd")?);
        let stopped = Arc::clone(&stop);
        let carrier = Some(thread::spawn(move || carry(devices, &stopped)));
        Ok(Self { stop, carrier })
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        self.stop.write(1).ok();
        if let Some(Ok(Err(error))) = self.carrier.take().map(JoinHandle::join) {
            eprintln!("the tunnel: {error:#}");
        }
    }
}

/// Opens a new device without packet information, in this thread's namespace.
fn tun(name: &str) -> Result<File> {
    let options = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .context("cannot open /dev/net/tun")?;
    // SAFETY: plain numbers, for which zero is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    ensure!(name.len() < request.ifr_name.len(), "{name}: too long");
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: the request is of the type that this call reads and writes.
    let result = unsafe { libc::ioctl(options.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    ensure!(result == 0, "cannot make {name}: {}", std::io::Error::last_os_error());
    Ok(options)
}

/// Carries packets until it is told to stop. A packet that a device does not take is lost.
fn carry(mut devices: [File; 2], stop: &EventFd) -> Result<()> {
    let mut buffer = vec![0; LONGEST];
    loop {
        let [one, other] = &devices;
        let mut wanted =
            [stop.as_fd(), one.as_fd(), other.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        poll(&mut wanted, PollTimeout::NONE).context("cannot poll")?;
        let [is_stopped, ready @ ..] = wanted.map(|fd| fd.any().unwrap_or(true));
        if is_stopped {
            return Ok(());
        }
        for (from, _) in ready.into_iter().enumerate().filter(|(_, is_ready)| *is_ready) {
            match devices[from].read(&mut buffer) {
                Ok(length) => drop(devices[1 - from].write(&buffer[..length])),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error).context("cannot read from a device"),
            }
        }
    }
}
