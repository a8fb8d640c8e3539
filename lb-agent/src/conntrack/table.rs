//! Reads and adds entries of the conntrack table, by ctnetlink.
//!
//! It knows nothing of lb: [`ports`](super::ports) decides what an entry means.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
    conntrack::{
        ConntrackAttribute, ConntrackMessage, IPTuple, ProtoInfo, ProtoInfoTCP, ProtoTuple,
        Protocol, Status, Tuple,
    },
};
use rtnetlink::{
    packet_core::{
        NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage,
        NetlinkPayload,
    },
    sys::{Socket, protocols::NETLINK_NETFILTER},
};

/// One direction of a connection, with the tuple of its packets as they are received.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Direction {
    /// The source.
    pub source: SocketAddr,
    /// The destination.
    pub destination: SocketAddr,
    /// TCP, else UDP.
    pub is_tcp: bool,
}

impl Direction {
    /// The direction of the replies of an untranslated connection.
    #[must_use]
    pub fn reversed(self) -> Self {
        Self { source: self.destination, destination: self.source, ..self }
    }
}

/// The table of the caller's network namespace.
#[derive(Debug)]
pub struct Conntrack {
    socket: Socket,
    buffer: Vec<u8>,
}

/// Size of the receive buffer, bytes: the kernel sends at most this much at once.
const BUFFER: usize = 64 * 1024;
/// `enum tcp_conntrack`: from LAST_ACK on, both ends have closed.
const TCP_ESTABLISHED: u8 = 3;
const TCP_LAST_ACK: u8 = 6;

impl Conntrack {
    /// Opens the table; `None` if the kernel has no conntrack.
    ///
    /// # Errors
    /// Those of socket(2).
    pub fn open() -> io::Result<Option<Self>> {
        let mut socket = match Socket::new(NETLINK_NETFILTER) {
            Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => return Ok(None),
            socket => socket?,
        };
        socket.bind_auto()?;
        Ok(Some(Self { socket, buffer: vec![0; BUFFER] }))
    }

    /// Calls `visit` with the direction of replies of every connection that is not closed.
    ///
    /// # Errors
    /// Those of netlink.
    pub fn replies(&mut self, mut visit: impl FnMut(Direction)) -> io::Result<()> {
        let get = ConntrackMessage::Get(Vec::new());
        self.send(NetfilterProtoFamily::Unspec, NLM_F_DUMP, get)?;
        loop {
            let size = self.socket.recv(&mut &mut self.buffer[..], 0)?;
            for message in messages(&self.buffer[..size]) {
                match message.payload {
                    NetlinkPayload::Done(_) => return Ok(()),
                    NetlinkPayload::Error(error) => return Err(error.to_io()),
                    NetlinkPayload::InnerMessage(message) => {
                        reply(&message).into_iter().for_each(&mut visit);
                    }
                    _ => {}
                }
            }
        }
    }

    /// Adds an untranslated connection, given the direction of its requests. An existing entry
    /// stays. The entry expires after `timeout` without a packet.
    ///
    /// # Errors
    /// Those of netlink.
    pub fn add(&mut self, request: Direction, timeout: Duration) -> io::Result<()> {
        let family = match request.source {
            SocketAddr::V4(_) => NetfilterProtoFamily::IPv4,
            SocketAddr::V6(_) => NetfilterProtoFamily::IPv6,
        };
        let seconds = u32::try_from(timeout.as_secs()).unwrap_or(u32::MAX);
        let mut attributes = vec![
            ConntrackAttribute::CtaTupleOrig(tuple(request)),
            ConntrackAttribute::CtaTupleReply(tuple(request.reversed())),
            ConntrackAttribute::CtaTimeout(seconds),
            ConntrackAttribute::CtaStatus(Status::SeenReply | Status::Assured | Status::Confirmed),
        ];
        if request.is_tcp {
            let state = ProtoInfoTCP::State(TCP_ESTABLISHED);
            attributes.push(ConntrackAttribute::CtaProtoInfo(vec![ProtoInfo::TCP(vec![state])]));
        }
        let flags = NLM_F_CREATE | NLM_F_EXCL | NLM_F_ACK;
        self.send(family, flags, ConntrackMessage::New(attributes))?;
        let size = self.socket.recv(&mut &mut self.buffer[..], 0)?;
        match messages(&self.buffer[..size]).next().map(|message| message.payload) {
            Some(NetlinkPayload::Error(error)) if error.code.is_some() => {
                let error = error.to_io();
                if error.raw_os_error() == Some(libc::EEXIST) { Ok(()) } else { Err(error) }
            }
            _ => Ok(()),
        }
    }

    fn send(
        &self,
        family: NetfilterProtoFamily,
        flags: u16,
        message: ConntrackMessage,
    ) -> io::Result<()> {
        let header = NetfilterHeader::new(family, 0, 0);
        let mut request = NetlinkMessage::from(NetfilterMessage::new(header, message));
        request.header.flags = NLM_F_REQUEST | flags;
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.socket.send(&bytes, 0).map(drop)
    }
}

/// The messages of one datagram. A message that cannot be parsed is skipped.
pub fn messages(bytes: &[u8]) -> impl Iterator<Item = NetlinkMessage<NetfilterMessage>> + '_ {
    const ALIGNMENT: usize = 4;
    const HEADER: usize = 16;
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let length = rest.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes) as usize)?;
        // A shorter length would not lead past the message.
        let length = length.max(HEADER);
        let message = rest.get(..length)?;
        rest = rest.get(length.next_multiple_of(ALIGNMENT)..).unwrap_or_default();
        Some(NetlinkMessage::deserialize(message).ok())
    })
    .flatten()
}

/// Whether the attribute says that a TCP connection is closed.
fn is_closed(attribute: &ConntrackAttribute) -> bool {
    let ConntrackAttribute::CtaProtoInfo(protocols) = attribute else { return false };
    protocols.iter().any(|protocol| match protocol {
        ProtoInfo::TCP(parts) => parts
            .iter()
            .any(|part| matches!(part, ProtoInfoTCP::State(state) if *state >= TCP_LAST_ACK)),
        _ => false,
    })
}

/// The direction of replies of a TCP or UDP entry that is not closed.
pub fn reply(message: &NetfilterMessage) -> Option<Direction> {
    let NetfilterMessageInner::Conntrack(ConntrackMessage::New(attributes)) = &message.inner else {
        return None;
    };
    if attributes.iter().any(is_closed) {
        return None;
    }
    let parts = attributes.iter().find_map(|attribute| match attribute {
        ConntrackAttribute::CtaTupleReply(parts) => Some(parts),
        _ => None,
    })?;
    let (mut source, mut destination) = (None::<IpAddr>, None::<IpAddr>);
    let (mut source_port, mut destination_port, mut is_tcp) = (None, None, None);
    for part in parts {
        match part {
            Tuple::Ip(addresses) => addresses.iter().for_each(|address| match address {
                IPTuple::SourceAddress(ip) => source = Some(*ip),
                IPTuple::DestinationAddress(ip) => destination = Some(*ip),
                _ => {}
            }),
            Tuple::Proto(protocol) => protocol.iter().for_each(|protocol| match protocol {
                ProtoTuple::Protocol(Protocol::Tcp) => is_tcp = Some(true),
                ProtoTuple::Protocol(Protocol::Udp) => is_tcp = Some(false),
                ProtoTuple::SourcePort(port) => source_port = Some(*port),
                ProtoTuple::DestinationPort(port) => destination_port = Some(*port),
                _ => {}
            }),
            _ => {}
        }
    }
    Some(Direction {
        source: SocketAddr::new(source?, source_port?),
        destination: SocketAddr::new(destination?, destination_port?),
        is_tcp: is_tcp?,
    })
}

fn tuple(direction: Direction) -> Vec<Tuple> {
    let Direction { source, destination, is_tcp } = direction;
    let protocol = if is_tcp { Protocol::Tcp } else { Protocol::Udp };
    vec![
        Tuple::Ip(vec![
            IPTuple::SourceAddress(source.ip()),
            IPTuple::DestinationAddress(destination.ip()),
        ]),
        Tuple::Proto(vec![
            ProtoTuple::Protocol(protocol),
            ProtoTuple::SourcePort(source.port()),
            ProtoTuple::DestinationPort(destination.port()),
        ]),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_length_that_no_message_can_have_is_skipped() {
        for length in [0u32, 1, 15, 17, u32::MAX] {
            let mut datagram = vec![0; 64];
            datagram[..4].copy_from_slice(&length.to_ne_bytes());
            assert_eq!(messages(&datagram).take(100).count(), 0, "{length}");
        }
    }

    /// An entry as the kernel sends it.
    fn entry(reply: Direction, state: u8) -> Vec<u8> {
        let state = ProtoInfo::TCP(vec![ProtoInfoTCP::State(state)]);
        let entry = ConntrackMessage::New(vec![
            ConntrackAttribute::CtaTupleOrig(tuple(reply.reversed())),
            ConntrackAttribute::CtaTupleReply(tuple(reply)),
            ConntrackAttribute::CtaProtoInfo(vec![state]),
        ]);
        let header = NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, 0);
        let mut message = NetlinkMessage::from(NetfilterMessage::new(header, entry));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        bytes
    }

    #[test]
    fn a_direction_is_read_as_it_was_written() {
        for (source, destination, is_tcp) in [
            ("10.244.2.2:8080", "172.18.0.11:2000", true),
            ("[fd00::2]:53", "[fd00::11]:2001", false),
        ] {
            let [source, destination] =
                [source, destination].map(|at| at.parse().expect("an address"));
            let expected = Direction { source, destination, is_tcp };
            let states = [TCP_ESTABLISHED, TCP_LAST_ACK, TCP_ESTABLISHED, TCP_LAST_ACK + 2];
            let entries = states.map(|state| entry(expected, state)).concat();
            let read: Vec<Direction> = messages(&entries)
                .filter_map(|message| match message.payload {
                    NetlinkPayload::InnerMessage(message) => reply(&message),
                    _ => None,
                })
                .collect();
            assert_eq!(read, [expected, expected], "closed connections are skipped");
        }
    }
}
