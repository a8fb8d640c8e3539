//! The peers of sockets that were translated at connect(): where they are kept, and that close()
//! forgets them.

use anyhow::{Result, ensure};
use lb_agent::maps::pins::Pins;
use lb_common::abi::socket::{CONNECTED_BUCKETS, CONNECTED_WAYS, ConnectedBucket};
use lb_sys::{TypedMap, obj_get};
use lb_tests::harness::echo::{Probe, Transport};
use lb_tests::harness::netns::topology::cluster::Cluster;
use lb_tests::harness::netns::topology::plan::{Family, cluster_ip};
use lb_tests::harness::netns::words::scenario::{PORT, SMALL_MAPS, Scenario};

type Peers = TypedMap<u32, ConnectedBucket>;

fn peers(scenario: &Scenario) -> Result<Peers> {
    let pins = Pins::new(scenario.cluster.node(1).bpf_dir());
    Ok(TypedMap::new(obj_get(&pins.map("CONNECTED_PEERS"))?)?)
}

/// The sockets that have a place.
fn cookies(peers: &Peers) -> Result<Vec<u64>> {
    let mut cookies = Vec::new();
    for index in 0..CONNECTED_BUCKETS {
        let bucket = peers.get(&index)?.unwrap_or_default();
        cookies.extend(bucket.cookies.into_iter().filter(|cookie| *cookie != 0));
    }
    Ok(cookies)
}

fn fill(peers: &Peers, cookie: u64) -> Result<()> {
    let bucket = ConnectedBucket { cookies: [cookie; CONNECTED_WAYS], ..Default::default() };
    for index in 0..CONNECTED_BUCKETS {
        peers.set(&index, &bucket)?;
    }
    Ok(())
}

#[test]
fn a_socket_has_a_place_until_it_is_closed_and_needs_none() -> Result<()> {
    let builder = Cluster::builder().nodes(1).pod(1, "a").pod(1, "b");
    let mut scenario =
        Scenario::start(builder, &[&["--socket-lb", "all"][..], &SMALL_MAPS].concat())?;
    scenario.serve(&["b"])?;
    scenario.publish(&scenario.service("here", 1), &scenario.endpoints(&["b"]))?;
    let peers = peers(&scenario)?;
    let client = scenario.cluster.pod("a");
    for family in Family::ALL {
        for transport in [Transport::Tcp, Transport::Udp] {
            let to = (cluster_ip(1).get(family), PORT).into();
            let open = || client.open(Probe::new(transport, to).connected());
            let seen = |connection: &lb_tests::harness::netns::actors::client::Connection| {
                connection.first().reached().map(|reached| reached.peer)
            };

            let two = [open()?, open()?];
            ensure!(two.iter().all(|one| seen(one) == Some(to)), "{two:?}");
            let held = cookies(&peers)?;
            ensure!(held.len() == 2, "{transport:?} {family:?}: {held:?}");
            let [first, second] = two;
            drop(first);
            let left = cookies(&peers)?;
            ensure!(left.len() == 1 && held.contains(&left[0]), "{held:?}, then {left:?}");
            drop(second);
            let left = cookies(&peers)?;
            ensure!(left.is_empty(), "closed, and still there: {left:?}");

            // The places are others'; this cookie is none that the kernel gives.
            fill(&peers, u64::MAX)?;
            let without = open()?;
            ensure!(seen(&without) == Some(to), "without a place: {without:?}");
            drop(without);
            let held = cookies(&peers)?;
            let places = CONNECTED_BUCKETS as usize * CONNECTED_WAYS;
            ensure!(held == vec![u64::MAX; places], "a place of another socket was taken");
            fill(&peers, 0)?;
        }
    }
    Ok(())
}
