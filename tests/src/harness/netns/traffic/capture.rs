//! What passes a device: frames as a packet socket sees them, with what the kernel knows of
//! their checksums, of the segments that they are to be cut into, and of VLAN tags.
//!
//! What comes in is seen after the driver (and XDP there) and before tc, what goes out after
//! tc.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result, bail, ensure};
use lb_common::abi::address::{Ipv4, Ipv6};
use lb_testing::family::TestFamily;
use lb_testing::frame::{ETHERNET, checksum, transport_sum};

use crate::harness::netns::actors::exec::tool;
use crate::harness::netns::topology::namespace::Netns;

/// Protocol numbers of TCP and UDP.
pub const TCP: u8 = 6;
/// See [`TCP`].
pub const UDP: u8 = 17;

/// What the kernel knows of the transport checksum of a frame.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Checksum {
    /// The sum over the pseudo header stands there; a device is to finish it.
    Unfinished,
    /// It is right.
    Verified,
    /// Nothing: what stands there counts.
    Unknown,
}

/// A frame that passed.
#[derive(Clone, Debug)]
pub struct Captured {
    /// Whether it left by the device.
    pub is_outgoing: bool,
    /// All of it.
    pub bytes: Vec<u8>,
    /// Its transport checksum.
    pub checksum: Checksum,
    /// How many bytes each segment is to carry that it is cut into, 0 for one that is not.
    pub segment: u16,
    /// The VLAN tag beside it (TCI).
    pub tag: Option<u16>,
}

/// A packet socket on a device.
#[derive(Debug)]
pub struct Capture {
    socket: OwnedFd,
}

const SOL_PACKET: libc::c_int = 263;
/// `struct virtio_net_hdr`, which stands before each frame.
const OFFLOAD_HEADER: usize = 10;

impl Capture {
    /// Sees everything that passes a device of a namespace from now on.
    ///
    /// # Errors
    /// No privileges, or no such device.
    pub fn on(netns: &Netns, device: &str) -> Result<Self> {
        netns.run(|| Self::here(device))
    }

    /// [`Capture::on`] in the namespace of the calling thread.
    ///
    /// # Errors
    /// As [`Capture::on`].
    pub fn here(device: &str) -> Result<Self> {
        const PACKET_AUXDATA: libc::c_int = 8;
        const PACKET_VNET_HDR: libc::c_int = 15;
        const SO_RCVBUFFORCE: libc::c_int = 33;
        const ROOM: libc::c_int = 1 << 28;
        let socket = packet_socket(0).context("cannot make a packet socket")?;
        set(&socket, SOL_PACKET, PACKET_VNET_HDR, 1)?;
        set(&socket, SOL_PACKET, PACKET_AUXDATA, 1)?;
        set(&socket, libc::SOL_SOCKET, SO_RCVBUFFORCE, ROOM)?;
        bind(&socket, device, libc::ETH_P_ALL as u16)?;
        Ok(Self { socket })
    }

    /// What has passed since the last time.
    ///
    /// # Errors
    /// The kernel lost a frame for lack of room, or says something else that is not known.
    pub fn take(&self) -> Result<Vec<Captured>> {
        let mut frames = Vec::new();
        let mut buffer = vec![0; OFFLOAD_HEADER + (1 << 17)];
        loop {
            match receive(&self.socket, &mut buffer) {
                Ok(frame) => frames.push(frame),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error).context("cannot read a packet socket"),
            }
        }
        ensure!(self.lost()? == 0, "a packet socket had no room");
        Ok(frames)
    }

    /// How many frames there was no room for.
    fn lost(&self) -> Result<u32> {
        const PACKET_STATISTICS: libc::c_int = 6;
        let mut statistics = [0u32; 2];
        let mut length = size_of_val(&statistics) as libc::socklen_t;
        // SAFETY: the kernel writes at most `length` bytes.
        let result = unsafe {
            libc::getsockopt(
                self.socket.as_raw_fd(),
                SOL_PACKET,
                PACKET_STATISTICS,
                statistics.as_mut_ptr().cast(),
                &raw mut length,
            )
        };
        ensure!(result == 0, "no statistics: {}", io::Error::last_os_error());
        Ok(statistics[1])
    }
}

/// Puts a frame, from its Ethernet header on, on a device of a namespace as it is.
///
/// # Errors
/// As [`Capture::on`], or the device takes no such frame.
pub fn send(netns: &Netns, device: &str, frame: &[u8]) -> Result<()> {
    let sender = Sender::on(netns, device)?;
    sender.send(frame).with_context(|| format!("not sent by {device}"))
}

/// Puts frames on a device.
#[derive(Debug)]
pub struct Sender {
    socket: OwnedFd,
}

impl Sender {
    /// On a device of a namespace.
    ///
    /// # Errors
    /// As [`Capture::on`].
    pub fn on(netns: &Netns, device: &str) -> Result<Self> {
        netns.run(|| {
            let socket = packet_socket(0).context("cannot make a packet socket")?;
            bind(&socket, device, 0)?;
            Ok(Self { socket })
        })
    }

    /// Sends a frame as it is. A frame begins with its Ethernet header.
    ///
    /// # Errors
    /// The device takes no such frame, or is full.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        let (fd, length) = (self.socket.as_raw_fd(), frame.len());
        // SAFETY: the kernel reads as many bytes as there are.
        let sent = unsafe { libc::send(fd, frame.as_ptr().cast(), length, 0) };
        if sent == length as isize { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

/// The link-layer address of a device of a namespace.
///
/// # Errors
/// No such device.
pub fn link_address(netns: &Netns, device: &str) -> Result<[u8; 6]> {
    let said = netns.run(|| tool("ip", &["-o", "link", "show", device], ""))?;
    let mut words = said.split_whitespace().skip_while(|word| *word != "link/ether");
    let text = words.nth(1).with_context(|| format!("no address in {said:?}"))?;
    let bytes: Result<Vec<u8>, _> =
        text.split(':').map(|byte| u8::from_str_radix(byte, 16)).collect();
    let bytes = bytes.with_context(|| format!("no address: {text}"))?;
    bytes.try_into().ok().with_context(|| format!("no address: {text}"))
}

/// A packet socket that gets frames of this EtherType, in network byte order, 0 for none.
fn packet_socket(protocol: u16) -> io::Result<OwnedFd> {
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: plain numbers.
    let fd = unsafe { libc::socket(libc::AF_PACKET, kind, libc::c_int::from(protocol)) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it was just made and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Binds to a device of the calling thread's namespace and to an EtherType.
fn bind(socket: &OwnedFd, device: &str, protocol: u16) -> Result<()> {
    let index = nix::net::if_::if_nametoindex(device).context("no such device")?;
    // SAFETY: plain numbers, for which zero is valid.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol.to_be();
    address.sll_ifindex = i32::try_from(index)?;
    let length = size_of_val(&address) as libc::socklen_t;
    // SAFETY: a whole sockaddr_ll that lives until the call returns.
    let result = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
    ensure!(result == 0, "cannot bind to {device}: {}", io::Error::last_os_error());
    Ok(())
}

fn set(socket: &OwnedFd, level: libc::c_int, option: libc::c_int, value: i32) -> Result<()> {
    let length = size_of_val(&value) as libc::socklen_t;
    let value = (&raw const value).cast();
    // SAFETY: the kernel reads an int.
    let result = unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, value, length) };
    ensure!(result == 0, "cannot set option {option}: {}", io::Error::last_os_error());
    Ok(())
}

fn receive(socket: &OwnedFd, buffer: &mut [u8]) -> io::Result<Captured> {
    const OUTGOING: u8 = 4;
    let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    let mut control = [0u64; 16];
    // SAFETY: plain numbers and null pointers, for which zero is valid.
    let mut from: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    // SAFETY: as above.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_name = (&raw mut from).cast();
    message.msg_namelen = size_of_val(&from) as libc::socklen_t;
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control);
    // SAFETY: everything that the message points to lives until the call returns.
    let length = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, 0) };
    let Ok(length) = usize::try_from(length) else { return Err(io::Error::last_os_error()) };
    let (header, frame) = buffer[..length].split_at(OFFLOAD_HEADER);
    let checksum = match header[0] {
        flags if flags & 1 != 0 => Checksum::Unfinished,
        flags if flags & 2 != 0 => Checksum::Verified,
        _ => Checksum::Unknown,
    };
    let is_cut = header[1] != 0;
    let segment = if is_cut { u16::from_ne_bytes([header[4], header[5]]) } else { 0 };
    Ok(Captured {
        is_outgoing: from.sll_pkttype == OUTGOING,
        bytes: frame.to_vec(),
        checksum,
        segment,
        tag: tag(bytemuck::cast_slice(&control[..message.msg_controllen / 8])),
    })
}

/// The VLAN tag in the one control message, a `struct tpacket_auxdata`.
fn tag(control: &[u8]) -> Option<u16> {
    const HEADER: usize = size_of::<libc::cmsghdr>();
    const TAG: usize = HEADER + 16;
    const IS_TAGGED: u32 = 1 << 4;
    let status = control.get(HEADER..HEADER + 4)?;
    let status = u32::from_ne_bytes([status[0], status[1], status[2], status[3]]);
    let tag = control.get(TAG..TAG + 2)?;
    (status & IS_TAGGED != 0).then(|| u16::from_ne_bytes([tag[0], tag[1]]))
}

impl AsFd for Capture {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Captured {
    fn is_of<F: TestFamily>(&self) -> bool {
        self.bytes.len() >= F::ADDRESSES + 2 * F::ADDRESS_LENGTH
            && self.bytes[12..ETHERNET] == F::ETHERTYPE.to_be_bytes()
    }

    /// Where the transport header starts, and what it is of; `None` for a frame without one, or
    /// with IPv6 extension headers.
    fn transport(&self) -> Option<(usize, u8)> {
        if self.is_of::<Ipv4>() {
            let length = usize::from(self.bytes[ETHERNET] & 0xf) * 4;
            let is_first = self.bytes[ETHERNET + 6] & 0x1f | self.bytes[ETHERNET + 7] == 0;
            return is_first.then_some((ETHERNET + length, self.bytes[ETHERNET + 9]));
        }
        self.is_of::<Ipv6>().then(|| (ETHERNET + 40, self.bytes[ETHERNET + 6]))
    }

    /// Protocol, source and destination with their ports, of TCP and UDP.
    pub fn ends(&self) -> Option<(u8, [(IpAddr, u16); 2])> {
        let (transport, protocol) = self.transport()?;
        if protocol != TCP && protocol != UDP {
            return None;
        }
        let [source, destination] = self.addresses()?;
        let port = |at: usize| {
            let bytes = self.bytes.get(at..at + 2)?;
            Some(u16::from_be_bytes([bytes[0], bytes[1]]))
        };
        Some((protocol, [(source, port(transport)?), (destination, port(transport + 2)?)]))
    }

    /// The flags of a TCP segment.
    pub fn tcp_flags(&self) -> Option<u8> {
        let (transport, TCP) = self.transport()? else { return None };
        self.bytes.get(transport + 13).copied()
    }

    /// The segment size (MSS) that the answer to a SYN names, as its first option.
    pub fn segment_size(&self) -> Option<u16> {
        const SYN_ACK: u8 = 0x12;
        const OPTIONS: usize = 20;
        let (transport, TCP) = self.transport()? else { return None };
        let header = self.bytes.get(transport..transport + OPTIONS + 4)?;
        let is_answer = header[13] & SYN_ACK == SYN_ACK && header[OPTIONS..OPTIONS + 2] == [2, 4];
        is_answer.then(|| u16::from_be_bytes([header[OPTIONS + 2], header[OPTIONS + 3]]))
    }

    /// Source and destination.
    pub fn addresses(&self) -> Option<[IpAddr; 2]> {
        if self.is_of::<Ipv4>() {
            let addresses = lb_testing::frame::addresses::<Ipv4>(&self.bytes);
            return Some(addresses.map(|address| std::net::Ipv4Addr::from(address).into()));
        }
        self.is_of::<Ipv6>().then(|| {
            let addresses = lb_testing::frame::addresses::<Ipv6>(&self.bytes);
            addresses.map(|address| std::net::Ipv6Addr::from(address).into())
        })
    }

    /// The field of the transport checksum.
    pub fn checksum_field(&self) -> Option<u16> {
        let (transport, protocol) = self.transport()?;
        let at = transport + if protocol == TCP { 16 } else { 6 };
        let field = self.bytes.get(at..at + 2)?;
        Some(u16::from_be_bytes([field[0], field[1]]))
    }

    /// Whether every checksum of a TCP or UDP frame is as right as it can be by now.
    ///
    /// # Errors
    /// It is not, or it is no such frame.
    pub fn check(&self) -> Result<()> {
        if self.is_of::<Ipv4>() {
            let length = usize::from(self.bytes[ETHERNET] & 0xf) * 4;
            let sum = checksum(&[&self.bytes[ETHERNET..ETHERNET + length]]);
            ensure!(sum == 0, "wrong IPv4 header checksum: {self:02x?}");
            return self.check_transport::<Ipv4>();
        }
        self.check_transport::<Ipv6>()
    }

    fn check_transport<F: TestFamily>(&self) -> Result<()> {
        let (Some((transport, protocol)), Some(field)) = (self.transport(), self.checksum_field())
        else {
            bail!("neither TCP nor UDP: {self:02x?}");
        };
        if field == 0 && protocol == UDP && F::NUMBER == 4 {
            return Ok(());
        }
        let is_right = if self.checksum == Checksum::Unfinished {
            field == !checksum(&[&self.pseudo_header::<F>(transport, protocol)])
        } else {
            transport_sum::<F>(&self.bytes, transport, protocol) == 0xffff
        };
        ensure!(is_right, "wrong transport checksum: {self:02x?}");
        Ok(())
    }

    fn pseudo_header<F: TestFamily>(&self, transport: usize, protocol: u8) -> Vec<u8> {
        let addresses = &self.bytes[F::ADDRESSES..F::ADDRESSES + 2 * F::ADDRESS_LENGTH];
        let length = (self.bytes.len() - transport) as u32;
        [addresses, &length.to_be_bytes(), &[0, 0, 0, protocol]].concat()
    }
}
