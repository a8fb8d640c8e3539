//! A conversation: frames of any bytes, given to the core one after the other, each where the input
//! says. Its first byte chooses settings; then there is, for each frame, a byte that chooses where
//! it is received, one with its length, and the frame. A frame of no bytes lets seconds pass.

use lb_common::{
    abi::{
        address::{Ipv4, Ipv6},
        frontend::{FrontendKind, TCP, UDP},
        service::Service,
        settings::Settings,
    },
    packet::{ETHERTYPE_IPV4, ETHERTYPE_IPV6, ethertype},
};
use lb_testing::{
    bounds,
    family::TestFamily,
    host::Host,
    interpreter::{Fate, Interpreter},
    site::TestSite,
    world::{Location, NODE_PORTS, TICKS, World, at},
};

/// No packet costs more look-ups in hash maps than this, whatever it looks like. An encapsulated one
/// that opens a flow has 9.
const MOST_LOOKUPS: u32 = 12;

/// Has the core decide on every frame.
pub(crate) fn run(bytes: &[u8]) {
    let Some((options, mut rest)) = bytes.split_first() else { return };
    let (mut host4, mut host6) = (host::<Ipv4>(*options), host::<Ipv6>(*options));
    while let [site, length, after @ ..] = rest {
        let (frame, others) = after.split_at(after.len().min(usize::from(*length)));
        rest = others;
        let site = TestSite::ALL[usize::from(*site) % TestSite::ALL.len()];
        match ethertype(frame) {
            Some(ETHERTYPE_IPV4) => receive(&mut host4, site, frame),
            Some(ETHERTYPE_IPV6) => receive(&mut host6, site, frame),
            _ => {
                host4.advance(TICKS * u32::from(*length));
                host6.advance(TICKS * u32::from(*length));
            }
        }
    }
}

fn receive<F: TestFamily>(host: &mut Host<F>, site: TestSite, frame: &[u8]) {
    if let Err(problem) = bounds::check::<F>(frame) {
        panic!("{problem}");
    }
    let outcome = host.send(site, frame);
    let lookups = host.lookups().map_or(0, |lookups| lookups.hashes());
    assert!(lookups <= MOST_LOOKUPS, "{lookups} look-ups at {site:?}: {outcome:?}");
    let has_addresses = frame.len() >= F::ADDRESSES + 2 * F::ADDRESS_LENGTH;
    assert!(has_addresses || outcome.fate == Fate::Untouched, "{outcome:?} at {site:?}");
}

/// Services with a backend in a pod of this node, on this node, on another node and none; one with
/// affinity; a node port and an external address.
fn host<F: TestFamily>(options: u8) -> Host<F> {
    let mut world = World::<F>::default();
    let backends = [
        (1, TCP, Some((F::remote_pod(1), Location::OtherNode))),
        (1, UDP, Some((F::pod(1), Location::LocalPod))),
        (2, TCP, Some((F::node(), Location::ThisHost))),
        (2, UDP, Some((F::remote_pod(2), Location::OtherNode))),
        (3, TCP, None),
    ];
    for (number, protocol, backend) in backends {
        let index = world.add_service(at(F::vip(number), 80), protocol);
        if let Some((address, location)) = backend {
            world.add_backend(index, at(address, 8080), location);
        }
        let port = NODE_PORTS.first + u16::from(number);
        let (node_port, external) = (FrontendKind::NODE_PORT, FrontendKind::EXTERNAL);
        world.add_frontend_of_kind(node_port, index, at(F::node(), port), protocol);
        world.add_frontend_of_kind(external, index, at(F::vip_outside_cidrs(number), 80), protocol);
        if options & 1 != 0 {
            world.services[index as usize].flags |= Service::DSR;
        }
        if options & 2 != 0 {
            world.services[index as usize].affinity_seconds = 10_800;
        }
    }
    if options & 4 != 0 {
        world.settings.flags |= Settings::DSR;
    }
    let mut host = Host::new(0);
    host.load(&world);
    host
}
