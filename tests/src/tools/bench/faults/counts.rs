//! What a proxy counts of the flows that it gave up or did not open.

use std::fs;

use anyhow::{Context, Result};
use lb_agent::maps::pins::Pins;
use lb_agent::maps::sweep::flow_events;
use lb_common::flow_table::Class;

use crate::harness::netns::topology::node::Node;
use crate::tools::bench::traffic::lane::Lane;

/// Packets of lb that found no room for their flow.
pub(super) const NO_ROOM: &str = "no room";

/// Counters by name.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(super) struct Counts(pub(super) Vec<(&'static str, u64)>);

impl Counts {
    /// The counts of node 1 so far: with lb the evicted flows by class, and [`NO_ROOM`]; with kube-proxy
    /// the counts of the kernel's connection tracking.
    ///
    /// # Errors
    /// They cannot be read.
    pub(super) fn read(lane: &Lane) -> Result<Self> {
        let node = lane.cluster.node(1);
        let Some(no_room) = lane.counted("flow_table_full")? else { return of_conntrack(&node) };
        let events = flow_events(&Pins::new(node.bpf_dir()))?;
        // The first one counts insertions.
        let evicted = Class::ALL.iter().zip(events.iter().skip(1));
        let evicted = evicted.map(|(class, count)| (class.name(), *count));
        Ok(Self(evicted.chain([(NO_ROOM, no_room)]).collect()))
    }

    /// What was counted since `before`, without what is 0.
    pub(super) fn since(&self, before: &Self) -> Vec<(&'static str, u64)> {
        let both = self.0.iter().zip(&before.0);
        let grown = both.map(|((name, now), (_, then))| (*name, now.saturating_sub(*then)));
        grown.filter(|(_, count)| *count > 0).collect()
    }
}

/// `early_drop`: entries that made room; `drop`: packets for which there was none.
const OF_CONNTRACK: [&str; 3] = ["early_drop", "drop", "insert_failed"];

fn of_conntrack(node: &Node) -> Result<Counts> {
    let path = "/proc/thread-self/net/stat/nf_conntrack";
    let text = node.netns().run(|| fs::read_to_string(path).context(path))?;
    sums(&text)
}

/// The sums over all CPUs, each a line of hexadecimal numbers below the names.
fn sums(text: &str) -> Result<Counts> {
    let mut lines = text.lines();
    let names: Vec<_> = lines.next().unwrap_or_default().split_whitespace().collect();
    let rows: Vec<Vec<u64>> = lines
        .map(|line| line.split_whitespace().map(|word| u64::from_str_radix(word, 16)).collect())
        .collect::<Result<_, _>>()?;
    let sum = |name: &'static str| {
        let column = names.iter().position(|found| *found == name);
        let column = column.with_context(|| format!("nf_conntrack counts no {name}"))?;
        Ok((name, rows.iter().filter_map(|row| row.get(column)).sum()))
    };
    Ok(Counts(OF_CONNTRACK.into_iter().map(sum).collect::<Result<_>>()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_s_counters_are_summed_over_the_cpus_by_name() {
        let text = "entries  found insert_failed drop early_drop\n\
                    0000000a 00000001 00000002 00000010 000000ff\n\
                    0000000a 00000001 00000000 00000001 00000001\n";
        let counts = sums(text).expect("counters");
        assert_eq!(counts.0, [("early_drop", 256), ("drop", 17), ("insert_failed", 2)]);
        let before = Counts(vec![("early_drop", 200), ("drop", 17), ("insert_failed", 0)]);
        assert_eq!(counts.since(&before), [("early_drop", 56), ("insert_failed", 2)]);
        assert!(sums("entries found\n00000001 00000001\n").is_err());
    }
}
