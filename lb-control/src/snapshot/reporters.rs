//! Which node's agent reports what is refused of an object, so that one does, not thousands.
//!
//! All agents know the names of the nodes that endpoints run on, because all read the same slices. By
//! rendezvous hashing each of them finds the same one for an object, without asking anybody, and
//! a node that comes or goes changes the reporter of its own objects only. Invariant: while agents
//! know the same slices, at most one of them is the reporter of an object. If the reporter has no
//! agent, nobody reports: the log, the metrics and `lb-agent status` of each node have it all the
//! same.

use crate::model::event::{ObjectKind, ObjectName};

/// Whether the node of the name `own` reports an object, if endpoints run on `nodes`, and on it if
/// `is_used`. Where no endpoint names a node there is nobody to agree with: each node reports.
pub(super) fn is_reporter<'a>(
    own: &str,
    is_used: bool,
    nodes: impl Iterator<Item = &'a str>,
    (kind, name): (ObjectKind, &ObjectName),
) -> bool {
    let object = hash(&[kind.name(), &name.namespace, &name.name]);
    let score = |node: &str| mix(hash(&[node]) ^ object.rotate_left(32));
    match nodes.filter(|node| *node != own).map(|node| (score(node), node)).max() {
        None => true,
        Some(best) => is_used && (score(own), own) > best,
    }
}

/// FNV-1a of texts, each with an end. It is part of what agents of different releases agree on.
fn hash(texts: &[&str]) -> u64 {
    let bytes = texts.iter().flat_map(|text| text.bytes().chain([0xff]));
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// The finalizer of MurmurHash3, which spreads names that differ in the last digit.
fn mix(mut hash: u64) -> u64 {
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^ (hash >> 33)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(number: usize) -> (ObjectKind, ObjectName) {
        let name = ObjectName { namespace: "shop".to_owned(), name: format!("web-{number}") };
        (ObjectKind::Service, name)
    }

    fn nodes(count: usize) -> Vec<String> {
        (0..count).map(|number| format!("node-{number:04}")).collect()
    }

    fn reporters(nodes: &[String], used: &[String], number: usize) -> Vec<String> {
        let (kind, name) = object(number);
        let reports = |own: &&String| {
            let others = used.iter().map(String::as_str);
            is_reporter(own, used.contains(own), others, (kind, &name))
        };
        nodes.iter().filter(reports).cloned().collect()
    }

    #[test]
    fn one_node_reports_an_object_and_each_node_some() {
        let all = nodes(50);
        // Endpoints run on some of the nodes; the others never report.
        let used = &all[..20];
        let mut counts = std::collections::BTreeMap::new();
        for number in 0..400 {
            let [reporter] = &reporters(&all, used, number)[..] else {
                panic!("not one for {number}")
            };
            *counts.entry(reporter.clone()).or_insert(0) += 1;
        }
        assert_eq!(counts.len(), 20);
        assert!(counts.values().all(|count| (5..60).contains(count)), "{counts:?}");
    }

    #[test]
    fn a_node_that_goes_changes_the_reporter_of_its_objects_alone() {
        let all = nodes(20);
        for number in 0..100 {
            let before = reporters(&all, &all, number);
            let after = reporters(&all[1..], &all[1..], number);
            assert!(before == after || before == all[..1], "{number}");
            assert_eq!(after.len(), 1);
        }
    }

    #[test]
    fn without_endpoints_each_node_reports() {
        assert_eq!(reporters(&nodes(3), &[], 1).len(), 3);
    }
}
