//! A cheap look at whether kube-proxy's rules are in the kernel: four netlink requests by name, of
//! constant cost, without the node's tools.
//!
//! It sees the modes nftables, and iptables and ipvs over nftables. Rules of legacy iptables are
//! seen by [`survey`](super::survey) alone.

use std::{fmt, io};

use rtnetlink::sys::{Socket, protocols::NETLINK_NETFILTER};

use super::Leftover;

/// `NFNL_SUBSYS_NFTABLES` with `NFT_MSG_GETTABLE` and `NFT_MSG_GETCHAIN`.
const GET_TABLE: u16 = 10 << 8 | 1;
const GET_CHAIN: u16 = 10 << 8 | 4;
/// `NFTA_TABLE_NAME` and `NFTA_CHAIN_TABLE`, `NFTA_CHAIN_NAME`.
const TABLE: u16 = 1;
const NAME: u16 = 3;
/// `NFPROTO_IPV4` and `NFPROTO_IPV6`.
const FAMILIES: [(u8, &str); 2] = [(2, "IPv4"), (10, "IPv6")];

/// Bytes of `struct nlmsghdr` and of `struct nfgenmsg`.
const HEADER: usize = 16;
const NETFILTER_HEADER: usize = 4;
/// More than an answer about one object has.
const BUFFER: usize = 8 * 1024;

/// A part of kube-proxy's rules that exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sign {
    family: &'static str,
    what: &'static str,
}

impl Sign {
    /// The same, as a survey lists it.
    pub fn leftover(&self) -> Leftover {
        let place = self.family.to_owned();
        Leftover { place, what: self.what.to_owned(), kept: Vec::new(), because: "" }
    }
}

impl fmt::Display for Sign {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} ({})", self.what, self.family)
    }
}

/// The parts of kube-proxy's rules that exist in this network namespace.
///
/// # Errors
/// If the kernel cannot be asked, as without CAP_NET_ADMIN. A kernel without nftables has none.
pub fn signs() -> io::Result<Vec<Sign>> {
    let mut socket = match Socket::new(NETLINK_NETFILTER) {
        Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => return Ok(Vec::new()),
        socket => socket?,
    };
    socket.bind_auto()?;
    let mut signs = Vec::new();
    for (number, family) in FAMILIES {
        let table = [(TABLE, "kube-proxy")];
        if exists(&socket, GET_TABLE, number, &table)? {
            signs.push(Sign { family, what: "nft table kube-proxy" });
        }
        let chain = [(TABLE, "nat"), (NAME, "KUBE-SERVICES")];
        if exists(&socket, GET_CHAIN, number, &chain)? {
            signs.push(Sign { family, what: "iptables chain KUBE-SERVICES" });
        }
    }
    Ok(signs)
}

/// Whether the kernel has the object that these names lead to.
fn exists(socket: &Socket, kind: u16, family: u8, names: &[(u16, &str)]) -> io::Result<bool> {
    socket.send(&request(kind, family, names), 0)?;
    let mut buffer = vec![0; BUFFER];
    let size = socket.recv(&mut &mut buffer[..], 0)?;
    match error_of(&buffer[..size]) {
        None => Ok(true),
        Some(libc::ENOENT | libc::EOPNOTSUPP | libc::EAFNOSUPPORT | libc::EINVAL) => Ok(false),
        Some(error) => Err(io::Error::from_raw_os_error(error)),
    }
}

/// A request of the kernel's nfnetlink (`struct nlmsghdr`, `struct nfgenmsg`, attributes).
fn request(kind: u16, family: u8, names: &[(u16, &str)]) -> Vec<u8> {
    let mut body = vec![family, 0, 0, 0];
    for (attribute, name) in names {
        let length = 4 + name.len() + 1;
        body.extend((length as u16).to_ne_bytes());
        body.extend(attribute.to_ne_bytes());
        body.extend(name.bytes().chain([0]));
        body.resize(body.len().next_multiple_of(4), 0);
    }
    debug_assert!(body.len() >= NETFILTER_HEADER);
    let mut message = Vec::with_capacity(HEADER + body.len());
    message.extend(((HEADER + body.len()) as u32).to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend((libc::NLM_F_REQUEST as u16).to_ne_bytes());
    // Sequence and port: the socket asks one thing at a time.
    message.extend([0; 8]);
    message.extend(body);
    message
}

/// The error in an answer; `None` if it is the object.
fn error_of(answer: &[u8]) -> Option<i32> {
    let kind = answer.get(4..6)?;
    if kind != (libc::NLMSG_ERROR as u16).to_ne_bytes() {
        return None;
    }
    let code = answer.get(HEADER..HEADER + 4)?;
    Some(-i32::from_ne_bytes(code.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_as_long_as_it_says() {
        let bytes = request(GET_CHAIN, 2, &[(TABLE, "nat"), (NAME, "KUBE-SERVICES")]);
        assert_eq!(bytes[..4], (bytes.len() as u32).to_ne_bytes());
        assert_eq!(bytes[HEADER..HEADER + 4], [2, 0, 0, 0]);
        // Four bytes of header, "nat" and its zero; then the next attribute, aligned.
        assert_eq!(bytes[20..24], [8, 0, 1, 0]);
        assert_eq!(&bytes[24..28], b"nat\0");
        assert_eq!(bytes[28..32], [18, 0, 3, 0]);
        assert_eq!(bytes.len() % 4, 0);
    }

    #[test]
    fn an_answer_is_an_object_or_an_error() {
        let mut error = vec![0; HEADER + 4];
        error[4..6].copy_from_slice(&2u16.to_ne_bytes());
        error[HEADER..].copy_from_slice(&(-libc::ENOENT).to_ne_bytes());
        assert_eq!(error_of(&error), Some(libc::ENOENT));
        error[4..6].copy_from_slice(&(10u16 << 8).to_ne_bytes());
        assert_eq!(error_of(&error), None);
    }
}
