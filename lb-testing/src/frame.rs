//! Frames, built byte by byte with checksums computed over the whole, and the check of
//! frames that came out of a program. Shares nothing with the code under test.

use lb_common::{
    abi::{
        address::Be16,
        flow::Tuple,
        frontend::{TCP, UDP},
    },
    balance::{Answer, Endpoint},
    packet::{ACK, Packet, PacketKind, RST, quote::Quote},
};

use super::{
    bytes::{header_sum, pseudo, update_header_checksum},
    family::TestFamily,
    tunnel::encapsulated,
};

pub use super::{
    bytes::{ETHERNET, addresses, checksum, transport_sum},
    family::Fragment,
};

/// Destination and source MAC of every frame that is built.
pub const MACS: [u8; 12] = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];

/// TTL or hop limit of a frame that is not given another.
const TTL: u8 = 63;

/// What follows the IP header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body {
    /// TCP with these flags.
    Tcp(u8),
    /// UDP.
    Udp,
    /// UDP without a checksum, as IPv4 allows.
    UdpWithoutChecksum,
    /// ICMP of the family: type and code.
    Icmp(u8, u8),
    /// Another protocol.
    Other(u8),
}

/// A frame to build.
#[derive(Clone, Debug)]
pub struct Frame<F: TestFamily> {
    /// The sender.
    pub source: Endpoint<F::Address>,
    /// The receiver.
    pub destination: Endpoint<F::Address>,
    /// What follows the IP header.
    pub body: Body,
    /// TTL or hop limit.
    pub ttl: u8,
    /// See [`TestFamily::ip_header`].
    pub options: Vec<(u8, Vec<u8>)>,
    /// TCP options, in whole words.
    pub tcp_options: Vec<u8>,
    /// Set for a fragment.
    pub fragment: Option<Fragment>,
    /// What follows the transport header.
    pub payload: Vec<u8>,
    /// Source and destination of the outer header, if the frame is encapsulated.
    pub tunnel: Option<[F::Address; 2]>,
}

impl<F: TestFamily> Frame<F> {
    /// A plain frame with a payload of odd length.
    pub fn new(
        source: Endpoint<F::Address>,
        destination: Endpoint<F::Address>,
        body: Body,
    ) -> Self {
        Self {
            source,
            destination,
            body,
            ttl: TTL,
            options: Vec::new(),
            tcp_options: vec![2, 4, 5, 0xb4],
            fragment: None,
            payload: b"payload".to_vec(),
            tunnel: None,
        }
    }

    /// The frame of `protocol` (TCP or UDP), TCP with `flags`.
    pub fn of(
        protocol: u8,
        source: Endpoint<F::Address>,
        destination: Endpoint<F::Address>,
        flags: u8,
    ) -> Self {
        Self::new(source, destination, if protocol == TCP { Body::Tcp(flags) } else { Body::Udp })
    }

    /// With these bytes behind the transport header.
    pub fn payload(mut self, payload: &[u8]) -> Self {
        self.payload = payload.to_vec();
        self
    }

    /// With options or extension headers, see [`TestFamily::ip_header`].
    pub fn options(mut self, options: &[(u8, Vec<u8>)]) -> Self {
        self.options = options.to_vec();
        self
    }

    /// Encapsulated, with this source and destination of the outer header.
    pub fn encapsulated(mut self, from: F::Address, to: F::Address) -> Self {
        self.tunnel = Some([from, to]);
        self
    }

    /// With this TTL or hop limit.
    pub fn ttl(mut self, ttl: u8) -> Self {
        self.ttl = ttl;
        self
    }

    /// As a fragment.
    pub fn fragment(self, offset: u16, more: bool) -> Self {
        self.fragment_of(9, offset, more)
    }

    /// As a fragment of a certain datagram.
    pub fn fragment_of(mut self, identification: u16, offset: u16, more: bool) -> Self {
        self.fragment = Some(Fragment { offset, more, identification });
        self
    }

    /// The bytes.
    pub fn bytes(&self) -> Vec<u8> {
        let ports = [self.source.port.get(), self.destination.port.get()];
        let ports: Vec<u8> = ports.iter().flat_map(|port| port.to_be_bytes()).collect();
        let (protocol, mut body, field) = match self.body {
            Body::Tcp(flags) => {
                assert!(self.tcp_options.len().is_multiple_of(4), "options in words");
                let words = 5 + self.tcp_options.len() as u8 / 4;
                let rest = [1, 2, 3, 4, 5, 6, 7, 8, words << 4, flags, 0xfa, 0xf0, 0, 0, 0, 0];
                (TCP, [&ports, &rest[..], &self.tcp_options, &self.payload].concat(), Some(16))
            }
            Body::Udp | Body::UdpWithoutChecksum => {
                let length = (8 + self.payload.len() as u16).to_be_bytes();
                let body = [&ports, &length[..], &[0, 0], &self.payload].concat();
                (UDP, body, (self.body == Body::Udp).then_some(6))
            }
            Body::Icmp(kind, code) => {
                (F::ICMP, [&[kind, code, 0, 0, 0, 7, 0, 1], &self.payload[..]].concat(), Some(2))
            }
            Body::Other(protocol) => (protocol, self.payload.clone(), None),
        };
        let addresses = [self.source.address, self.destination.address];
        if let Some(field) = field {
            let sum = checksum(&[&pseudo::<F>(addresses, protocol, body.len()), &body]);
            let sum = if sum == 0 && protocol == UDP { 0xffff } else { sum };
            body[field..field + 2].copy_from_slice(&sum.to_be_bytes());
        }
        let header = F::ip_header(addresses, protocol, &self.options, self.fragment, body.len());
        let mut frame = [&MACS[..], &F::ETHERTYPE.to_be_bytes(), &header, &body].concat();
        frame[F::TTL] = self.ttl;
        update_header_checksum::<F>(&mut frame);
        match self.tunnel {
            Some(ends) => encapsulated::<F>(&frame, ends),
            None => frame,
        }
    }
}

/// Checks that `after` is `before` with the addresses and ports `tuple`, a TTL that is smaller
/// by `decrement`, every checksum as right (or as wrong) as it was, and nothing else changed but
/// the MACs. A later fragment keeps what follows its IP header.
///
/// # Errors
/// A sentence that says what differs.
pub fn check_rewrite<F: TestFamily>(
    before: &[u8],
    after: &[u8],
    packet: &Packet<F>,
    tuple: &Tuple<F::Address>,
    decrement: u8,
) -> Result<(), String> {
    let (transport, protocol) = (usize::from(packet.transport), packet.protocol());
    let mut expected = before.to_vec();
    let ends = [F::bytes(tuple.source), F::bytes(tuple.destination)].concat();
    expected[F::ADDRESSES..F::ADDRESSES + ends.len()].copy_from_slice(&ends);
    let ports = [tuple.source_port.get(), tuple.destination_port.get()];
    let ports: Vec<u8> = ports.iter().flat_map(|port| port.to_be_bytes()).collect();
    let has_ports = packet.kind != PacketKind::Fragment;
    if has_ports {
        expected[transport..transport + 4].copy_from_slice(&ports);
    }
    expected[F::TTL] = expected[F::TTL].wrapping_sub(decrement);
    if after.len() != expected.len() {
        return Err(format!("{} bytes became {}", before.len(), after.len()));
    }
    let field = transport + if protocol == TCP { 16 } else { 6 };
    let mut sums = if has_ports { vec![field] } else { Vec::new() };
    if F::NUMBER == 4 {
        sums.push(ETHERNET + 10);
    }
    for at in sums {
        if let (Some(to), Some(from)) = (expected.get_mut(at..at + 2), after.get(at..at + 2)) {
            to.copy_from_slice(from);
        }
    }
    if let Some(at) = (MACS.len()..after.len()).find(|at| expected[*at] != after[*at]) {
        return Err(format!(
            "byte {at} is {:#04x}, expected {:#04x}\n  before {before:02x?}\n  after  {after:02x?}",
            after[at], expected[at]
        ));
    }
    if header_sum::<F>(before) != header_sum::<F>(after) {
        return Err(format!("the IPv4 header checksum is wrong: {after:02x?}"));
    }
    if !has_ports {
        return Ok(());
    }
    let is_udp = protocol == UDP;
    match (before.get(field..field + 2), after.get(field..field + 2)) {
        (Some([0, 0]), Some([0, 0])) if is_udp => return Ok(()),
        (Some([0, 0]), _) if is_udp => return Err("an absent UDP checksum became one".into()),
        (_, Some([0, 0])) if is_udp => return Err("a UDP checksum became absent".into()),
        (None, _) => return Ok(()),
        _ => {}
    }
    let sums = [before, after].map(|frame| transport_sum::<F>(frame, transport, protocol) % 0xffff);
    if sums[0] == sums[1] {
        Ok(())
    } else {
        Err(format!("the transport checksum is wrong: {after:02x?}"))
    }
}

/// Checks that `after` is the ICMP error `before` with other addresses, and other addresses
/// and ports in what it quotes, every checksum of a header as right (or as wrong) as it was,
/// and nothing else changed but the MACs. Returns the addresses and what is quoted.
///
/// # Errors
/// A sentence that says what differs.
pub fn check_error<F: TestFamily>(
    before: &[u8],
    after: &[u8],
    packet: &Packet<F>,
    decrement: u8,
) -> Result<[Tuple<F::Address>; 2], String> {
    let fail = |what: &str| Err(format!("{what}\n  before {before:02x?}\n  after  {after:02x?}"));
    let transport = usize::from(packet.transport);
    let mut quote = Quote::default();
    F::parse_quote(before, packet, &mut quote).ok_or("nothing is quoted")?;
    let (header, ports) = (usize::from(quote.header), usize::from(quote.transport));
    let addresses_at = header + F::ADDRESSES - ETHERNET;
    let both = 2 * F::ADDRESS_LENGTH;
    let mut free = vec![
        (F::ADDRESSES, both),
        (transport + 2, 2),
        (addresses_at, both),
        (ports, 4),
        (F::TTL, 1),
    ];
    if F::NUMBER == 4 {
        free.extend([(ETHERNET + 10, 2), (header + 10, 2)]);
    }
    let mut expected = before.to_vec();
    if after.len() != before.len() || before[F::TTL].wrapping_sub(after[F::TTL]) != decrement {
        return fail("another length, or another TTL");
    }
    for (at, length) in free {
        expected[at..at + length].copy_from_slice(&after[at..at + length]);
    }
    if expected[MACS.len()..] != after[MACS.len()..] {
        return fail("bytes changed that must not change");
    }
    let is_right = |frame: &[u8]| {
        let inner = [&frame[..ETHERNET], &frame[header..]].concat();
        [header_sum::<F>(frame), header_sum::<F>(&inner)]
            .into_iter()
            .chain([transport_sum::<F>(frame, transport, F::ICMP)])
            .map(|sum| sum % 0xffff)
            .collect::<Vec<_>>()
    };
    if is_right(before) != is_right(after) {
        return fail("a checksum is wrong");
    }
    let [source, destination] = addresses::<F>(after);
    let none = Be16::new(0);
    let outer = Tuple { source, destination, source_port: none, destination_port: none };
    let mut quote = Quote::default();
    F::parse_quote(after, packet, &mut quote).ok_or("the quote is gone")?;
    Ok([outer, quote.key.tuple])
}

/// Checks that `after` is the `answer` to `before`, which was parsed into `packet`.
///
/// # Errors
/// A sentence that says what is wrong with it.
pub fn check_answer<F: TestFamily>(
    before: &[u8],
    after: &[u8],
    packet: &Packet<F>,
    answer: Answer,
) -> Result<(), String> {
    let fail = |what: &str| Err(format!("{what}\n  before {before:02x?}\n  after  {after:02x?}"));
    let [source, destination] = addresses::<F>(before);
    if addresses::<F>(after) != [destination, source] {
        return fail("the answer has other addresses");
    }
    let header_residue = match answer {
        Answer::Echo => header_sum::<F>(before),
        _ => 0xffff,
    };
    if after[12..14] != F::ETHERTYPE.to_be_bytes() || header_sum::<F>(after) != header_residue {
        return fail("the answer's IP header is wrong");
    }
    let header = if F::NUMBER == 4 { 20 } else { 40 };
    let (from, to) = (usize::from(packet.transport), ETHERNET + header);
    let kind = match answer {
        Answer::Echo => {
            let mut expected = before.to_vec();
            expected[F::ADDRESSES..F::ADDRESSES + 2 * F::ADDRESS_LENGTH]
                .copy_from_slice(&[F::bytes(destination), F::bytes(source)].concat());
            expected[from..from + 2].copy_from_slice(&[F::ECHO_REPLY, 0]);
            expected[from + 2..from + 4].copy_from_slice(&after[from + 2..from + 4]);
            let sums = [before, after].map(|frame| transport_sum::<F>(frame, from, F::ICMP));
            if expected[12..] != after[12..] || sums[0] % 0xffff != sums[1] % 0xffff {
                return fail("the echo reply is wrong");
            }
            return Ok(());
        }
        Answer::Reset => {
            let length = if F::NUMBER == 4 { &after[16..18] } else { &after[18..20] };
            let promised = if F::NUMBER == 4 { 40 } else { 20u16 };
            let next = before[from + 4..from + 8].try_into().map(u32::from_be_bytes);
            let next = next.unwrap_or_default().wrapping_add(1).to_be_bytes();
            let acknowledged: [u8; 4] = before[from + 8..from + 12].try_into().unwrap_or_default();
            let (sequence, acknowledgment, flags) = match before[from + 13] & ACK != 0 {
                true => (acknowledged, [0; 4], RST),
                false => ([0; 4], next, RST | ACK),
            };
            let segment = &after[to..];
            let right = after.len() == to + 20
                && length == promised.to_be_bytes()
                && segment[..2] == before[from + 2..from + 4]
                && segment[2..4] == before[from..from + 2]
                && segment[4..8] == sequence
                && segment[8..12] == acknowledgment
                && segment[12] == 0x50
                && segment[13] == flags
                && transport_sum::<F>(after, to, TCP) == 0xffff;
            return if right { Ok(()) } else { fail("the reset is wrong") };
        }
        Answer::PortUnreachable => F::PORT_UNREACHABLE,
        Answer::ProtocolUnreachable => F::PROTOCOL_UNREACHABLE,
        Answer::TimeExceeded => F::TIME_EXCEEDED,
    };
    let quote = &before[ETHERNET..from + 8];
    let right = after.len() == to + 8 + quote.len()
        && (after[to], after[to + 1]) == kind
        && after[to + 4..to + 8] == [0; 4]
        && &after[to + 8..] == quote
        && transport_sum::<F>(after, to, F::ICMP) == 0xffff;
    if right { Ok(()) } else { fail("the ICMP error is wrong") }
}
