//! Datagrams of netlink: the first byte of an input chooses the protocol, the rest is one datagram.

use lb_agent::programs::hook::LinkHeader;
use lb_agent::{
    conntrack::table,
    network::{
        interfaces::{Network, attach_points},
        messages::{self, Stale},
    },
    options::values::Patterns,
};
use netlink_packet_route::RouteNetlinkMessage;
use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};

/// Reads a datagram of rtnetlink or of ctnetlink.
pub(crate) fn run(bytes: &[u8]) {
    match bytes.split_first() {
        Some((0, datagram)) => routes(datagram),
        Some((1, datagram)) => connections(datagram),
        _ => {}
    }
}

/// Applies each message, and asks what the agent asks of the network after it.
fn routes(mut datagram: &[u8]) {
    const HEADER: usize = 16;
    let mut network = Network::default();
    while let Some(length) = datagram.first_chunk().map(|length| u32::from_ne_bytes(*length)) {
        let length = (length as usize).max(HEADER);
        let Some(bytes) = datagram.get(..length) else { return };
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
        let Ok(message) = NetlinkMessage::<RouteNetlinkMessage>::deserialize(bytes) else {
            continue;
        };
        let NetlinkPayload::InnerMessage(message) = message.payload else { continue };
        messages::apply(&mut network, message, &mut Stale::default());
        check(&network);
    }
}

fn check(network: &Network) {
    let named = Patterns::Named(vec!["eth*".to_owned()]);
    for devices in [Patterns::Auto, named] {
        let (roles, excess) = network.roles_and_excess(&devices, &Patterns::Auto, &[]);
        let is_known = |index: &u32| network.links.contains_key(index);
        assert!(roles.keys().all(is_known), "{roles:?}");
        assert!(excess.iter().all(|interface| !roles.contains_key(&interface.index)));
        let node = network.node(&roles);
        assert_eq!(node.devices.len(), network.devices(&roles).len());
        let header =
            |index: u32| network.links.get(&index).map_or(LinkHeader::Other, |link| link.header);
        let points = attach_points(&roles, header);
        assert!(points.len() <= 2 * roles.len(), "{points:?}");
        assert!(points.keys().all(|(index, _)| is_known(index)), "{points:?}");
    }
}

/// What is found is no more than there is room for in the datagram.
fn connections(datagram: &[u8]) {
    const LEAST: usize = 20;
    let messages = table::messages(datagram).take(datagram.len() + 1).count();
    assert!(messages <= datagram.len() / 16 + 1, "{messages} messages");
    let found = table::messages(datagram).filter_map(|message| match message.payload {
        NetlinkPayload::InnerMessage(message) => table::reply(&message),
        _ => None,
    });
    let found = found.take(datagram.len() + 1).count();
    assert!(found <= datagram.len() / LEAST, "{found} entries");
}
