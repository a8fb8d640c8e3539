//! Tables that are full of established connections, written into them entry by entry: nobody has as
//! many sockets.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lb_agent::conntrack::table::{Conntrack, Direction as Tracked};
use lb_agent::maps::flow_table::{FlowTable, Flows};
use lb_agent::maps::pins::Pins;
use lb_agent::maps::read::read_settings;
use lb_common::abi::address::Address4;
use lb_common::balance::Endpoint;
use lb_common::flow_table::Class;

use super::harm::forged;
use crate::harness::flows;
use crate::harness::netns::topology::node::Node;

/// How many entries are tried for each place at most. An entry hits a place at random, so the last free
/// places take many.
const TRIES: u64 = 40;
/// Where the sources of the entries begin, among [`forged`] ones: no flood comes so far.
const FIRST: u64 = 1 << 30;
/// So many in a row for which there is no room, and the conntrack table counts as full: it looks for
/// an entry to give up in a few buckets alone.
const REFUSED: u32 = 2_000;

/// Fills lb's table with flows like the established one that was used last, by other clients. Returns how
/// many there are of class `established`.
///
/// # Errors
/// There is no such flow, or places stay free.
pub(super) fn fill_flows(pins: &Pins) -> Result<u64> {
    let table = FlowTable::<Address4>::writable(pins)?;
    let lifetimes = read_settings(pins)?.flow_lifetimes;
    let established = |table: &FlowTable<Address4>| -> u64 {
        table.live().filter(|flow| flow.class() == Class::Established).count() as u64
    };
    let like = table.live().filter(|flow| flow.class() == Class::Established);
    let like = like.max_by_key(|flow| flow.word.time()).context("no flow is established")?;
    let places = u64::from(table.places());
    let mut number = 0;
    while number < TRIES * places && established(&table) < places {
        for _ in 0..places {
            let client = forged(FIRST + number);
            number += 1;
            // None of them makes room for another one; where there is none, another bucket may have some.
            let _ = flows::insert_like(&table, &like, client, &lifetimes);
        }
    }
    let filled = established(&table);
    // A program may have opened a flow meanwhile.
    ensure!(filled + places / 1000 >= places, "{filled} of {places} places are full");
    Ok(filled)
}

/// Makes all flows of lb's table idle for so long. No packet may pass meanwhile.
///
/// # Errors
/// The table cannot be opened.
pub(super) fn age_flows(pins: &Pins, seconds: u32) -> Result<()> {
    let times = read_settings(pins)?.times(seconds);
    flows::age(&FlowTable::<Address4>::writable(pins)?, times);
    Ok(())
}

/// Fills a node's conntrack table, in which there is room for `most` entries, with connections to `to`.
/// Returns how many were added.
///
/// # Errors
/// Those of netlink; the table does not become full.
pub(super) fn fill_conntrack(node: &Node, to: Endpoint<Address4>, most: u64) -> Result<u64> {
    const ESTABLISHED: Duration = Duration::from_secs(86_400);
    let address =
        |end: Endpoint<Address4>| (std::net::Ipv4Addr::from(end.address), end.port.get()).into();
    node.netns().run(|| {
        let mut conntrack = Conntrack::open()?.context("the kernel has no conntrack")?;
        let (mut added, mut refused) = (0, 0);
        for number in FIRST..FIRST + 3 * most {
            let source = address(forged(number));
            let request = Tracked { source, destination: address(to), is_tcp: true };
            match conntrack.add(request, ESTABLISHED) {
                Ok(()) => (added, refused) = (added + 1, 0),
                Err(error) if error.raw_os_error() == Some(libc::ENOMEM) => refused += 1,
                Err(error) => return Err(error).context("cannot add to the conntrack table"),
            }
            if refused == REFUSED {
                return Ok(added);
            }
        }
        anyhow::bail!("the conntrack table is not full with {added} more entries")
    })
}
