//! How often the core looks into a hash or an LRU, counted: row 9 of docs/performance.md.

use anyhow::{Context, Result};
use lb_common::{
    abi::{
        address::{Be16, Ipv4, Ipv6},
        affinity::{Affinity, AffinityKey},
        backend::Backend,
        counter::Reason,
        flow::{FlowKey, Tuple},
        fragment::{Fragment, FragmentKey},
        frontend::{Frontend, FrontendKey, TCP, UDP},
        service::Service,
        settings::Settings,
    },
    balance::{
        self, Endpoint, Entry, InsertError, Known, NewFlow, Note, Search, Site, Tables, Verdict,
        Work,
        socket::{self, Caller, Decision},
    },
    packet::{ACK, Packet, Parse, SYN},
};

use super::{
    flows::{self, FlowKind, Flows},
    frames,
    report::{Figure, Outcome},
    stats::Estimate,
    tables::{ELSEWHERE, Frontends, PORTS, Side, State, cluster_ip, settings},
};

/// Tables in memory with some flows, which count look-ups.
struct Counting<F: Side> {
    state: State<F>,
    flows: Vec<flows::Entry<F::Address>>,
    look_ups: u32,
}

/// A copy of an entry. Stores to it are ignored.
struct Copied<T>(T);

impl<T> Entry<T> for Copied<T> {
    fn get(&self) -> &T {
        &self.0
    }

    fn store(&self, _value: T) {}
}

impl<F: Side> Tables<F> for Counting<F> {
    type AffinityEntry = Copied<Affinity>;

    fn now(&self) -> u32 {
        0
    }

    fn random(&mut self) -> u32 {
        0
    }

    fn frontend(&mut self, key: &FrontendKey<F::Address>) -> Option<Frontend> {
        self.look_ups += 1;
        self.state.frontends.get(key).copied()
    }

    fn is_in_range(&mut self, _service: u32, _client: &F::Address) -> bool {
        self.look_ups += 1;
        true
    }

    fn node_port(&mut self, port: Be16, protocol: u8) -> Option<Frontend> {
        self.frontend(&FrontendKey::of_any_node(port, protocol))
    }

    fn route_source(&mut self, _destination: &F::Address, _source: &mut F::Address) -> bool {
        self.look_ups += 1;
        false
    }

    fn is_node(&mut self, address: &F::Address) -> bool {
        self.look_ups += 1;
        self.state.nodes.contains(address)
    }

    fn service(&mut self, index: u32) -> Option<Service> {
        self.state.services.get(&index).copied()
    }

    fn slot(&mut self, position: u32) -> Option<u32> {
        self.state.slots.get(&position).copied()
    }

    fn backend(&mut self, id: u32) -> Option<Backend<F::Address>> {
        self.state.backends.get(&id).copied()
    }

    fn device(&mut self, _ifindex: u32) -> Option<u32> {
        Some(0)
    }

    fn spread(&mut self, _key: &AffinityKey, _period: u32) -> u32 {
        0
    }

    fn flow(
        &mut self,
        key: &FlowKey<F::Address>,
        search: Search,
        found: &mut Known<F::Address>,
    ) -> bool {
        let order = match search {
            Search::Requests => &[false][..],
            Search::Replies => &[true],
            Search::RequestsFirst => &[false, true],
            Search::RepliesFirst => &[true, false],
        };
        for is_reply in order {
            self.look_ups += 1;
            let of_key = |(other, flow): &&flows::Entry<F::Address>| {
                other == key && flow.action.is_reply() == *is_reply
            };
            if let Some((_, flow)) = self.flows.iter().find(of_key) {
                found.flow = *flow;
                return true;
            }
        }
        false
    }

    fn may_have_reply(&mut self, key: &FlowKey<F::Address>) -> bool {
        self.look_ups += 1;
        self.flows.iter().any(|(other, flow)| other == key && flow.action.is_reply())
    }

    fn may_have_client(&mut self, key: &FlowKey<F::Address>) -> bool {
        self.flows.iter().any(|(other, _)| other == key)
    }

    fn insert_flow(
        &mut self,
        _key: &FlowKey<F::Address>,
        _new: &mut NewFlow<F::Address>,
        _settings: &Settings,
    ) -> Result<(), InsertError> {
        Ok(())
    }

    fn note_flow(&mut self, _key: &FlowKey<F::Address>, _found: &Known<F::Address>, _note: Note) {}

    fn remove_flow(&mut self, _key: &FlowKey<F::Address>, _found: &Known<F::Address>) {}

    fn has_direct(&self) -> bool {
        false
    }

    fn begin_direct(&mut self) {}

    fn fragment(&mut self, _key: &FragmentKey<F::Address>) -> Option<Fragment> {
        self.look_ups += 1;
        None
    }

    fn insert_fragment(&mut self, _key: &FragmentKey<F::Address>, _fragment: &Fragment) {}

    fn affinity(&mut self, _key: &AffinityKey) -> Option<Self::AffinityEntry> {
        self.look_ups += 1;
        None
    }

    fn bind(&mut self, _key: &AffinityKey, _affinity: &Affinity) {}
}

/// A stream socket of a pod.
struct Stream;

impl Caller for Stream {
    fn netns(&self) -> u64 {
        1
    }

    fn is_node(&self) -> bool {
        false
    }

    fn datagram_socket(&self) -> Option<u64> {
        None
    }
}

/// Counts for every kind of packet, and for connect().
///
/// # Errors
/// The core does not translate connect() to the Service.
pub fn count() -> Result<Vec<Figure>> {
    let mut figures = family::<Ipv4>()?;
    figures.extend(family::<Ipv6>()?);
    Ok(figures)
}

fn family<F: Side + Parse>() -> Result<Vec<Figure>> {
    let pod = [TCP, UDP].map(|protocol| Flows::<F>::known(FlowKind::Pod, protocol));
    let mut tables = counting::<F>(&pod, Frontends::ClusterIps);
    let [(tcp, _), (tcp_reply, _)] = pod[0].tuples(0);
    let [(udp, _), (udp_reply, _)] = pod[1].tuples(0);
    let fresh = |protocol| Flows::<F>::fresh(FlowKind::Pod, protocol).tuples(0)[0].0;
    let away = Tuple { destination: F::address(ELSEWHERE, 9), ..tcp };
    let mut figures = Vec::new();
    for row in [
        ("established, request, TCP", ONE, TCP, ACK, tcp, Site::FromPod, Reason::Request),
        ("established, reply, TCP", ONE, TCP, ACK, tcp_reply, Site::ToPod, Reason::Reply),
        ("established, request, UDP", ONE, UDP, 0, udp, Site::FromPod, Reason::Request),
        ("established, reply, UDP", ONE, UDP, 0, udp_reply, Site::ToPod, Reason::Reply),
        (
            "not Service traffic, request side",
            NONE,
            TCP,
            ACK,
            away,
            Site::FromPod,
            Reason::NotService,
        ),
        (
            "not Service traffic, reply side",
            REPLY,
            TCP,
            ACK,
            away.reversed(),
            Site::ToPod,
            Reason::NoFlow,
        ),
        ("new flow, TCP", None, TCP, SYN, fresh(TCP), Site::FromPod, Reason::FlowCreated),
        ("new flow, UDP", None, UDP, 0, fresh(UDP), Site::FromPod, Reason::FlowCreated),
    ] {
        figures.push(packet(&mut tables, Frontends::ClusterIps, row));
    }
    let outcome = connect(&mut tables).map(|()| counted(tables.look_ups))?;
    figures.push(figure::<F>("connect()", ONE, outcome));
    figures.extend(outside::<F>());
    Ok(figures)
}

/// Traffic of clients outside, and what every other packet costs beside it.
fn outside<F: Side + Parse>() -> Vec<Figure> {
    let known = [FlowKind::Snat, FlowKind::Dsr].map(|kind| Flows::<F>::known(kind, TCP));
    let mut tables = counting::<F>(&known, Frontends::NodePorts);
    let [[(tcp, _), (tcp_reply, _)], [(dsr, _), _]] = known.map(|flows| flows.tuples(0));
    let fresh = |protocol| Flows::<F>::fresh(FlowKind::Snat, protocol).tuples(0)[0].0;
    let fresh_dsr = |protocol| Flows::<F>::fresh(FlowKind::Dsr, protocol).tuples(0)[0].0;
    let away = Tuple { destination: F::address(ELSEWHERE, 9), ..tcp };
    let device = Site::FromDevice;
    let leaving = Site::ToDevice { ifindex: 2, ingress: 0 };
    let rows = [
        ("NodePort (SNAT), request, TCP", ONE, TCP, ACK, tcp, device, Reason::Request),
        ("NodePort (SNAT), reply, TCP", ONE, TCP, ACK, tcp_reply, device, Reason::Reply),
        ("NodePort (SNAT), new flow, TCP", None, TCP, SYN, fresh(TCP), device, Reason::FlowCreated),
        ("NodePort (SNAT), new flow, UDP", None, UDP, 0, fresh(UDP), device, Reason::FlowCreated),
        ("NodePort (DSR), request, TCP", ONE, TCP, ACK, dsr, device, Reason::Request),
        (
            "NodePort (DSR), new flow, TCP",
            None,
            TCP,
            SYN,
            fresh_dsr(TCP),
            device,
            Reason::FlowCreated,
        ),
        (
            "NodePort (DSR), new flow, UDP",
            None,
            UDP,
            0,
            fresh_dsr(UDP),
            device,
            Reason::FlowCreated,
        ),
        (
            "not Service traffic, with NodePorts, leaving",
            REPLY,
            TCP,
            ACK,
            away,
            leaving,
            Reason::NoFlow,
        ),
    ];
    rows.map(|row| packet(&mut tables, Frontends::NodePorts, row)).into()
}

fn counting<F: Side>(flows: &[Flows<F>], frontends: Frontends) -> Counting<F> {
    let flows = flows.iter().flat_map(|flows| flows.entries(0)).collect();
    Counting { state: State::node(frontends), flows, look_ups: 0 }
}

/// Name, allowed look-ups, protocol, TCP flags and tuple of a packet, the site that receives it,
/// and the reason that is counted.
type Row<A> = (&'static str, Option<(f64, f64)>, u8, u8, Tuple<A>, Site, Reason);

fn packet<F: Side + Parse>(
    tables: &mut Counting<F>,
    frontends: Frontends,
    (name, limits, protocol, flags, tuple, site, reason): Row<F::Address>,
) -> Figure {
    let frame = frames::frame::<F>(&tuple, protocol, flags, 14 + F::IP_HEADER + 32, 32);
    let outcome = match decided(tables, &frame, site, frontends) {
        Some(ended) if ended == reason => counted(tables.look_ups),
        ended => Outcome::Invalid(format!("ended as {ended:?}")),
    };
    figure::<F>(name, limits, outcome)
}

const ONE: Option<(f64, f64)> = Some((1.0, 2.0));
const NONE: Option<(f64, f64)> = Some((0.0, 1.0));
const REPLY: Option<(f64, f64)> = Some((1.0, 1.0));

fn counted(look_ups: u32) -> Outcome {
    Outcome::Measured(Estimate::of(vec![f64::from(look_ups)]))
}

fn figure<F: Side>(name: &str, limits: Option<(f64, f64)>, outcome: Outcome) -> Figure {
    Figure {
        row: 9,
        unit: "",
        aim: limits.map(|limits| limits.0),
        must: limits.map(|limits| limits.1),
        ..Figure::unjudged(&format!("hash look-ups, {name}, {}", F::NAME), outcome)
    }
}

fn decided<F: Side + Parse>(
    tables: &mut Counting<F>,
    frame: &[u8],
    site: Site,
    frontends: Frontends,
) -> Option<Reason> {
    let mut packet = Packet::default();
    F::parse(frame, &mut packet)?;
    tables.look_ups = 0;
    let settings = settings(frontends);
    let candidate = balance::candidate::<F>(packet.tuple().destination, site, &settings);
    let mut work = Work::default();
    let verdict = match balance::decide(candidate, &packet, site, &settings, &mut work, tables) {
        Verdict::Pass(reason) => {
            balance::passed(candidate, &packet, site, &settings, reason, &mut work, tables)
        }
        verdict => verdict,
    };
    Some(match verdict {
        Verdict::Pass(reason) | Verdict::Drop(reason) | Verdict::Answer(_, reason) => reason,
        Verdict::Translate(reason) => reason,
    })
}

fn connect<F: Side>(tables: &mut Counting<F>) -> Result<()> {
    let service = Endpoint { address: cluster_ip::<F>(), port: Be16::new(PORTS[0]) };
    tables.look_ups = 0;
    let settings = settings(Frontends::ClusterIps);
    match socket::decide::<F, _>(service, TCP, &Stream, &settings, tables) {
        Decision::Translate(_) => Some(()),
        Decision::Untouched(_) | Decision::Refuse(..) => None,
    }
    .context("connect() to the Service was not translated")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The look-ups of each kind of packet; one more is a slow-down that no quiet machine is needed to
    /// see. Both families have the same.
    const COUNTS: [(&str, f64); 17] = [
        ("established, request, TCP", 1.0),
        ("established, reply, TCP", 1.0),
        ("established, request, UDP", 1.0),
        ("established, reply, UDP", 1.0),
        ("not Service traffic, request side", 0.0),
        ("not Service traffic, reply side", 1.0),
        ("new flow, TCP", 3.0),
        ("new flow, UDP", 3.0),
        ("connect()", 1.0),
        ("NodePort (SNAT), request, TCP", 1.0),
        ("NodePort (SNAT), reply, TCP", 1.0),
        ("NodePort (SNAT), new flow, TCP", 3.0),
        ("NodePort (SNAT), new flow, UDP", 3.0),
        ("NodePort (DSR), request, TCP", 1.0),
        ("NodePort (DSR), new flow, TCP", 5.0),
        ("NodePort (DSR), new flow, UDP", 5.0),
        ("not Service traffic, with NodePorts, leaving", 1.0),
    ];

    #[test]
    fn every_packet_has_the_look_ups_that_it_needs_and_no_more() {
        let counted: Vec<_> = count()
            .expect("the counts")
            .into_iter()
            .map(|figure| match figure.outcome {
                Outcome::Measured(estimate) => (figure.name, estimate.median),
                Outcome::Invalid(why) => panic!("{}: {why}", figure.name),
            })
            .collect();
        let expected = ["IPv4", "IPv6"].into_iter().flat_map(|family| {
            COUNTS.map(|(name, most)| (format!("hash look-ups, {name}, {family}"), most))
        });
        assert_eq!(counted, expected.collect::<Vec<_>>());
    }
}
