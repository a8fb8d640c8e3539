//! Programs attached as filters of the clsact qdisc, on kernels without tcx.
//!
//! The filters of lb have one priority and one handle, so that a single request replaces the
//! program. Their name distinguishes them from filters of others with the same numbers.

use std::{
    collections::HashSet,
    fmt, io,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
};

use bytemuck::{Pod, Zeroable, bytes_of, pod_read_unaligned};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
};

use super::hook::Direction;

/// Priority (preference) of lb's filters.
pub(super) const PRIORITY: u16 = 0x4c42;
/// Handle of lb's filters.
const HANDLE: u32 = 1;
/// Prefix of the names of lb's filters.
const NAME_PREFIX: &str = "lb_";

const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_BPF_FD: u16 = 6;
const TCA_BPF_NAME: u16 = 7;
const TCA_BPF_FLAGS: u16 = 8;
const TCA_BPF_FLAG_ACT_DIRECT: u32 = 1;
const NESTED: u16 = 1 << 15;
/// `TC_H_CLSACT`: the parent handle of both directions, and with a zero minor the
/// handle of the qdisc.
const CLSACT: u32 = 0xffff_fff1;
const CLSACT_HANDLE: u32 = 0xffff_0000;

/// `struct tcmsg`.
#[derive(Clone, Copy, Default, Pod, Zeroable)]
#[repr(C)]
struct TcMessage {
    family: u32,
    interface: i32,
    handle: u32,
    parent: u32,
    info: u32,
}

/// `struct nlmsghdr`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Header {
    length: u32,
    kind: u16,
    flags: u16,
    sequence: u32,
    port: u32,
}

/// Attaches `program` under the name `name`, or replaces the program of lb's filter if there is
/// one. Creates the qdisc if the interface has none.
pub(crate) fn replace(
    interface: u32,
    direction: Direction,
    program: BorrowedFd<'_>,
    name: &str,
) -> io::Result<()> {
    add_qdisc(interface)?;
    let mut options = Vec::new();
    push(&mut options, TCA_BPF_FD, &program.as_raw_fd().to_ne_bytes());
    push(&mut options, TCA_BPF_NAME, format!("{NAME_PREFIX}{name}\0").as_bytes());
    push(&mut options, TCA_BPF_FLAGS, &TCA_BPF_FLAG_ACT_DIRECT.to_ne_bytes());
    let mut attributes = Vec::new();
    push(&mut attributes, TCA_KIND, b"bpf\0");
    push(&mut attributes, TCA_OPTIONS | NESTED, &options);
    let flags = libc::NLM_F_CREATE | libc::NLM_F_REPLACE;
    request(libc::RTM_NEWTFILTER, flags, filter_of_lb(interface, direction), &attributes)
}

/// Removes lb's filter, if there is one.
pub(crate) fn remove(interface: u32, direction: Direction) -> io::Result<()> {
    if !is_attached(interface, direction)? {
        return Ok(());
    }
    let mut attributes = Vec::new();
    push(&mut attributes, TCA_KIND, b"bpf\0");
    match request(libc::RTM_DELTFILTER, 0, filter_of_lb(interface, direction), &attributes) {
        Err(error) if error.raw_os_error() != Some(libc::ENOENT) => Err(error),
        _ => Ok(()),
    }
}

/// The interfaces that have a clsact qdisc, without which there is no filter.
pub(super) fn interfaces() -> io::Result<HashSet<u32>> {
    let mut found = HashSet::new();
    let connection = connect()?;
    let all = TcMessage::default();
    send(&connection, libc::RTM_GETQDISC, libc::NLM_F_DUMP, all, &[])?;
    receive(&connection, |body| found.extend(interface_of_clsact(body)))?;
    Ok(found)
}

/// The interface of a qdisc, if it is a clsact.
fn interface_of_clsact(body: &[u8]) -> Option<u32> {
    let (head, _) = body.split_at_checked(size_of::<TcMessage>())?;
    let message: TcMessage = pod_read_unaligned(head);
    (message.parent == CLSACT).then_some(message.interface as u32)
}

/// Whether a filter with lb's priority, handle and name exists.
pub(crate) fn is_attached(interface: u32, direction: Direction) -> io::Result<bool> {
    attached_program(interface, direction).map(|name| name.is_some())
}

/// The name of the program of lb's filter, if there is one.
pub(crate) fn attached_program(interface: u32, direction: Direction) -> io::Result<Option<String>> {
    let mut found = None;
    visit(interface, direction, |body| found = found.take().or_else(|| program_of_lb(body)))?;
    Ok(found)
}

/// A filter of another owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Filter {
    /// Its priority (preference): filters run in ascending order.
    pub(super) priority: u16,
    /// The name of its program, else its kind.
    pub(super) name: String,
}

impl fmt::Display for Filter {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "filter {} (pref {})", self.name, self.priority)
    }
}

/// The filters of others, without duplicates.
pub(super) fn others(interface: u32, direction: Direction) -> io::Result<Vec<Filter>> {
    let mut found = Vec::new();
    visit(interface, direction, |body| {
        let filter = filter_of_another(body).filter(|filter| !found.contains(filter));
        found.extend(filter);
    })?;
    Ok(found)
}

/// A filter that is not lb's. A classifier without a filter has no handle.
fn filter_of_another(body: &[u8]) -> Option<Filter> {
    let (head, attributes) = body.split_at_checked(size_of::<TcMessage>())?;
    let message: TcMessage = pod_read_unaligned(head);
    if message.handle == 0 || program_of_lb(body).is_some() {
        return None;
    }
    let find = |attributes, kind| Attributes(attributes).find(|(found, _)| *found == kind);
    let options = find(attributes, TCA_OPTIONS).map(|(_, options)| options);
    let program = options.and_then(|options| find(options, TCA_BPF_NAME));
    let (_, name) = program.or_else(|| find(attributes, TCA_KIND))?;
    Some(Filter { priority: (message.info >> 16) as u16, name: text(name) })
}

/// Calls `each` with every filter of an interface.
fn visit(interface: u32, direction: Direction, each: impl FnMut(&[u8])) -> io::Result<()> {
    let message = TcMessage { handle: 0, info: 0, ..filter_of_lb(interface, direction) };
    let connection = connect()?;
    send(&connection, libc::RTM_GETTFILTER, libc::NLM_F_DUMP, message, &[])?;
    match receive(&connection, each) {
        // No such interface, or no clsact qdisc on it.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENODEV | libc::EINVAL)) => Ok(()),
        result => result,
    }
}

/// The name of the program, if the filter is lb's.
fn program_of_lb(body: &[u8]) -> Option<String> {
    let (head, attributes) = body.split_at_checked(size_of::<TcMessage>())?;
    let message: TcMessage = pod_read_unaligned(head);
    if message.info >> 16 != u32::from(PRIORITY) || message.handle != HANDLE {
        return None;
    }
    let (_, options) = Attributes(attributes).find(|(kind, _)| *kind == TCA_OPTIONS)?;
    let (_, name) = Attributes(options).find(|(kind, _)| *kind == TCA_BPF_NAME)?;
    let name = name.strip_prefix(NAME_PREFIX.as_bytes())?;
    Some(text(name))
}

/// A string of the kernel's, without the zero at its end.
fn text(bytes: &[u8]) -> String {
    let bytes = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(bytes).into_owned()
}

fn filter_of_lb(interface: u32, direction: Direction) -> TcMessage {
    let minor = match direction {
        Direction::Ingress => 0xfff2,
        Direction::Egress => 0xfff3,
    };
    let protocol = (libc::ETH_P_ALL as u16).to_be();
    TcMessage {
        family: 0,
        interface: interface as i32,
        handle: HANDLE,
        parent: CLSACT_HANDLE | minor,
        info: u32::from(PRIORITY) << 16 | u32::from(protocol),
    }
}

fn add_qdisc(interface: u32) -> io::Result<()> {
    let message = TcMessage {
        interface: interface as i32,
        handle: CLSACT_HANDLE,
        parent: CLSACT,
        ..TcMessage::default()
    };
    let mut attributes = Vec::new();
    push(&mut attributes, TCA_KIND, b"clsact\0");
    let flags = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
    match request(libc::RTM_NEWQDISC, flags, message, &attributes) {
        Err(error) if error.raw_os_error() != Some(libc::EEXIST) => Err(error),
        _ => Ok(()),
    }
}

fn request(kind: u16, flags: i32, message: TcMessage, attributes: &[u8]) -> io::Result<()> {
    let connection = connect()?;
    send(&connection, kind, flags | libc::NLM_F_ACK, message, attributes)?;
    receive(&connection, |_| ())
}

fn connect() -> io::Result<OwnedFd> {
    Ok(socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkRoute,
    )?)
}

fn send(
    connection: &OwnedFd,
    kind: u16,
    flags: i32,
    message: TcMessage,
    attributes: &[u8],
) -> io::Result<()> {
    let length = size_of::<Header>() + size_of::<TcMessage>() + attributes.len();
    let header = Header {
        length: length as u32,
        kind,
        flags: (flags | libc::NLM_F_REQUEST) as u16,
        sequence: 1,
        port: 0,
    };
    let bytes = [bytes_of(&header), bytes_of(&message), attributes].concat();
    let kernel = NetlinkAddr::new(0, 0);
    sendto(connection.as_raw_fd(), &bytes, &kernel, MsgFlags::empty())?;
    Ok(())
}

/// Calls `visit` with the body of each message of the answer.
fn receive(connection: &OwnedFd, mut visit: impl FnMut(&[u8])) -> io::Result<()> {
    let mut buffer = vec![0; 32 * 1024];
    loop {
        let length = recv(connection.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        let mut rest = &buffer[..length];
        while let Some((head, _)) = rest.split_at_checked(size_of::<Header>()) {
            let header: Header = pod_read_unaligned(head);
            let end = (header.length as usize).clamp(size_of::<Header>(), rest.len());
            let body = &rest[size_of::<Header>()..end];
            match i32::from(header.kind) {
                libc::NLMSG_ERROR => {
                    let code = body.get(..4).map_or(-libc::EBADMSG, pod_read_unaligned::<i32>);
                    return match code {
                        0 => Ok(()),
                        code => Err(io::Error::from_raw_os_error(-code)),
                    };
                }
                libc::NLMSG_DONE => return Ok(()),
                _ => visit(body),
            }
            rest = &rest[end.next_multiple_of(4).min(rest.len())..];
        }
    }
}

/// Appends a `struct rtattr` and its padding.
fn push(attributes: &mut Vec<u8>, kind: u16, value: &[u8]) {
    attributes.extend_from_slice(&((4 + value.len()) as u16).to_ne_bytes());
    attributes.extend_from_slice(&kind.to_ne_bytes());
    attributes.extend_from_slice(value);
    attributes.resize(attributes.len().next_multiple_of(4), 0);
}

/// The attributes of a message: kind and value.
struct Attributes<'a>(&'a [u8]);

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let length: u16 = pod_read_unaligned(self.0.get(..2)?);
        let kind: u16 = pod_read_unaligned(self.0.get(2..4)?);
        let value = self.0.get(4..usize::from(length))?;
        self.0 = self.0.get(usize::from(length).next_multiple_of(4)..).unwrap_or_default();
        Some((kind & !NESTED, value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(priority: u32, handle: u32, name: &[u8]) -> Vec<u8> {
        let mut options = Vec::new();
        push(&mut options, TCA_BPF_FLAGS, &1u32.to_ne_bytes());
        push(&mut options, TCA_BPF_NAME, name);
        let mut attributes = Vec::new();
        push(&mut attributes, TCA_KIND, b"bpf\0");
        push(&mut attributes, TCA_OPTIONS | NESTED, &options);
        let message = TcMessage { handle, info: priority << 16, ..TcMessage::default() };
        [bytes_of(&message), &attributes].concat()
    }

    #[test]
    fn priority_handle_and_name_identify_a_filter_of_lb() {
        let priority = u32::from(PRIORITY);
        let own = filter(priority, HANDLE, b"lb_from_pod\0");
        assert_eq!(program_of_lb(&own).as_deref(), Some("from_pod"));
        assert_eq!(program_of_lb(&filter(priority + 1, HANDLE, b"lb_from_pod\0")), None);
        assert_eq!(program_of_lb(&filter(priority, HANDLE + 1, b"lb_from_pod\0")), None);
        assert_eq!(program_of_lb(&filter(priority, HANDLE, b"cil_from_pod\0")), None);
        assert_eq!(program_of_lb(&filter(priority, HANDLE, b"")), None);
        assert_eq!(program_of_lb(b"short"), None);
    }

    #[test]
    fn only_a_clsact_qdisc_may_hold_filters_of_lb() {
        let qdisc = |parent| TcMessage { interface: 7, parent, ..TcMessage::default() };
        const ROOT: u32 = 0xffff_ffff;
        assert_eq!(interface_of_clsact(bytes_of(&qdisc(CLSACT))), Some(7));
        assert_eq!(interface_of_clsact(bytes_of(&qdisc(ROOT))), None);
        assert_eq!(interface_of_clsact(b"short"), None);
    }

    #[test]
    fn a_filter_of_another_has_a_priority_and_a_name() {
        let other = filter_of_another(&filter(1, 7, b"policy\0"));
        assert_eq!(other, Some(Filter { priority: 1, name: "policy".to_owned() }));
        assert_eq!(filter_of_another(&filter(PRIORITY.into(), HANDLE, b"lb_from_pod\0")), None);
        assert_eq!(filter_of_another(&filter(1, 0, b"")), None);
        assert_eq!(filter_of_another(b"short"), None);
    }
}
