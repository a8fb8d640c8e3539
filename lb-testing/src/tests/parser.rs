//! The parser, given anything.

use lb_common::{
    abi::address::{Ipv4, Ipv6},
    abi::frontend::{TCP, UDP},
    packet::{Packet, PacketKind},
};
use proptest::{collection::vec, prelude::*};

use crate::{
    bounds,
    family::TestFamily,
    flow::tuple,
    frame::{Body, ETHERNET, Frame},
    world::at,
};

fn stays_inside<F: TestFamily>(frame: &[u8]) -> Result<(), TestCaseError> {
    bounds::check::<F>(frame).map_err(TestCaseError::fail)
}

fn is_read<F: TestFamily>(frame: &Frame<F>, kind: PacketKind) -> Result<(), TestCaseError> {
    let bytes = frame.bytes();
    let mut packet = Packet::<F>::default();
    prop_assert!(F::parse(&bytes[..], &mut packet).is_some());
    prop_assert_eq!(packet.kind, kind, "{:?}", frame);
    if matches!(kind, PacketKind::Tcp | PacketKind::Udp) {
        prop_assert_eq!(*packet.tuple(), tuple(frame.source, frame.destination));
        let at = usize::from(packet.transport);
        prop_assert_eq!(&bytes[at..at + 2], &frame.source.port.get().to_be_bytes());
        let protocol = if kind == PacketKind::Tcp { TCP } else { UDP };
        prop_assert_eq!(packet.protocol(), protocol);
    }
    Ok(())
}

fn options<F: TestFamily>(words: usize) -> Vec<(u8, Vec<u8>)> {
    match F::NUMBER {
        4 if words == 0 => Vec::new(),
        4 => vec![(0, vec![1; words * 4])],
        _ => {
            let kinds = [0, 43, 60, 60];
            kinds[..words.min(4)].iter().map(|kind| (*kind, [0; 7].to_vec())).collect()
        }
    }
}

fn whole<F: TestFamily>(
    ports: [u16; 2],
    flags: u8,
    words: usize,
    payload: &[u8],
    cut: usize,
    changes: &[(prop::sample::Index, u8)],
) -> Result<(), TestCaseError> {
    let ends = [at(F::pod(1), ports[0]), at(F::vip(1), ports[1])];
    let bodies = [
        (Body::Tcp(flags), PacketKind::Tcp),
        (Body::Udp, PacketKind::Udp),
        (Body::Icmp(8, 0), PacketKind::Icmp),
        (Body::Other(132), PacketKind::Other),
    ];
    for (body, kind) in bodies {
        let frame = Frame::<F>::new(ends[0], ends[1], body).payload(payload);
        let frame = frame.options(&options::<F>(words));
        is_read(&frame, kind)?;
        is_read(&frame.clone().fragment(8, true), PacketKind::Fragment)?;
        let mut bytes = frame.bytes();
        for (index, byte) in changes {
            let index = index.index(bytes.len());
            bytes[index] = *byte;
        }
        stays_inside::<F>(&bytes)?;
        stays_inside::<F>(&bytes[..bytes.len().saturating_sub(cut)])?;
    }
    Ok(())
}

/// An ICMP error that quotes a frame, cut short and damaged.
fn quoting<F: TestFamily>(
    words: usize,
    cut: usize,
    changes: &[(prop::sample::Index, u8)],
) -> Result<(), TestCaseError> {
    let (from, to) = (at(F::pod(1), 1000), at(F::vip(1), 80));
    let quoted = Frame::<F>::new(from, to, Body::Udp).options(&options::<F>(words)).bytes();
    let error = Frame::<F>::new(to, from, Body::Icmp(F::SOME_ICMP_ERROR, 1));
    let mut bytes = error.payload(&quoted[ETHERNET..]).bytes();
    stays_inside::<F>(&bytes)?;
    for (index, byte) in changes {
        let index = index.index(bytes.len());
        bytes[index] = *byte;
    }
    stays_inside::<F>(&bytes)?;
    stays_inside::<F>(&bytes[..bytes.len().saturating_sub(cut)])
}

proptest! {
    #[test]
    fn any_bytes_are_read_within_their_bounds(bytes in vec(any::<u8>(), 0..200)) {
        stays_inside::<Ipv4>(&bytes)?;
        stays_inside::<Ipv6>(&bytes)?;
    }

    #[test]
    fn a_whole_frame_is_read_and_a_damaged_one_within_its_bounds(
        ports in any::<[u16; 2]>(),
        flags in any::<u8>(),
        words in 0..5usize,
        payload in vec(any::<u8>(), 0..60),
        cut in 0..100usize,
        changes in vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
    ) {
        whole::<Ipv4>(ports, flags, words, &payload, cut, &changes)?;
        // Four extension headers are followed, of which a fragment's would be one.
        whole::<Ipv6>(ports, flags, words.min(3), &payload, cut, &changes)?;
    }

    #[test]
    fn the_quote_of_an_error_is_read_within_its_bounds(
        words in 0..3usize,
        cut in 0..100usize,
        changes in vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
    ) {
        quoting::<Ipv4>(words, cut, &changes)?;
        quoting::<Ipv6>(words, cut, &changes)?;
    }
}
