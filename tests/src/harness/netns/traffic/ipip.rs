//! A container network's tunnel between two nodes, IP in IP of both families: a device that
//! leads into this process, which does by raw sockets what the kernel's own devices do.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, SockaddrStorage, connect, recv, send};

use super::raw;
use crate::harness::netns::topology::node::Node;
use crate::harness::netns::topology::plan::Family;

/// The device's name.
const DEVICE: &str = "tunl0";
/// As large as packets can be that leave room for the tunnel.
const MTU: u16 = 1440;

/// One end of the tunnel; it ends when this is dropped.
#[derive(Debug)]
pub struct Tunnel {
    stop: Arc<AtomicBool>,
    carried: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Tunnel {
    /// Has a node send what is for the pods of `peer` through a tunnel, and take what comes from
    /// there.
    ///
    /// # Errors
    /// No privileges, or no TUN devices.
    pub fn start(node: &Node, peer: &Node) -> Result<Self> {
        let ends = node.netns().run(|| {
            let device = device()?;
            Ok(Ends {
                device,
                sockets: [connected(peer.ip(Family::V4))?, connected(peer.ip(Family::V6))?],
            })
        })?;
        node.netns().ip(&format!("link set {DEVICE} mtu {MTU} up"))?;
        // What comes by a device without an address is refused by the reverse path filter.
        let [pods, _] = node.pod_cidrs();
        node.netns().ip(&format!("addr add {}/32 dev {DEVICE}", pods.network()))?;
        for pods in peer.pod_cidrs() {
            node.netns().ip(&format!("route replace {pods} dev {DEVICE}"))?;
        }
        let (stop, carried) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (is_over, count) = (stop.clone(), carried.clone());
        let thread = thread::spawn(move || {
            while !is_over.load(Ordering::Relaxed) {
                if let Err(error) = ends.carry(&count) {
                    eprintln!("tunnel: {error:#}");
                }
            }
        });
        Ok(Self { stop, carried, thread: Some(thread) })
    }

    /// How many packets came through it.
    pub fn carried(&self) -> u64 {
        self.carried.load(Ordering::Relaxed)
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

/// The device and the raw sockets of IPv4 and IPv6.
struct Ends {
    device: File,
    sockets: [OwnedFd; 2],
}

impl Ends {
    /// Waits a moment for packets, and passes on one from wherever there are any.
    fn carry(&self, count: &AtomicU64) -> Result<()> {
        let [v4, v6] = &self.sockets;
        let mut all = [self.device.as_fd(), v4.as_fd(), v6.as_fd()]
            .map(|end| PollFd::new(end, PollFlags::POLLIN));
        poll(&mut all, PollTimeout::try_from(Duration::from_millis(50))?)?;
        let [from_device, from_v4, from_v6] =
            all.map(|end| end.revents().is_some_and(|events| events.contains(PollFlags::POLLIN)));
        let mut packet = [0; 1 << 16];
        if from_device {
            let length = (&self.device).read(&mut packet)?;
            let socket = if packet[0] >> 4 == 4 { v4 } else { v6 };
            // What nobody takes there is lost, as in any tunnel.
            send(socket.as_raw_fd(), &packet[..length], MsgFlags::empty()).ok();
        }
        for (socket, is_ready) in [(v4, from_v4), (v6, from_v6)] {
            if is_ready {
                let length = recv(socket.as_raw_fd(), &mut packet, MsgFlags::MSG_DONTWAIT)?;
                // A raw IPv4 socket gets the outer header too.
                let outer = if packet[0] >> 4 == 4 { usize::from(packet[0] & 0xf) * 4 } else { 0 };
                let inner = packet.get(outer..length).context("a packet without its header")?;
                (&self.device).write_all(inner)?;
                count.fetch_add(1, Ordering::Relaxed);
            }
        }
        Ok(())
    }
}

/// A raw socket for what is in tunnels to and from `peer`.
fn connected(peer: IpAddr) -> Result<OwnedFd> {
    let socket = raw::socket(raw::tunnelled(peer), peer)?;
    connect(socket.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(peer, 0)))?;
    Ok(socket)
}

/// A device of the calling thread's namespace whose packets can be read and written.
fn device() -> Result<File> {
    const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun");
    let file = file.context("no TUN devices")?;
    // SAFETY: plain numbers, for which zero is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(DEVICE.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as i16;
    // SAFETY: a whole ifreq that lives until the call returns.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request) };
    ensure!(result == 0, "cannot make {DEVICE}: {}", std::io::Error::last_os_error());
    Ok(file)
}
