//! Rules of policy routing by which packets of Services may take another way than beside kube-proxy.

use std::collections::BTreeSet;

use futures::TryStreamExt;
use netlink_packet_route::rule::{RuleAttribute, RuleMessage};
use rtnetlink::{Handle, IpVersion};

use super::error::InterfaceError;

/// Marks that rules ask for, if other rules route packets by their source address. Some CNIs mark
/// connections in PREROUTING, so that answers of pods with an address of a second interface leave by
/// the first one (AWS VPC CNI). Packets of Services have the pod's address by then, and get no mark.
///
/// # Errors
/// [`InterfaceError`] if netlink cannot be read.
pub(super) async fn needed_marks(handle: &Handle) -> Result<BTreeSet<u32>, InterfaceError> {
    let mut marks = BTreeSet::new();
    let mut is_by_source = false;
    for version in [IpVersion::V4, IpVersion::V6] {
        let rules: Vec<RuleMessage> = handle
            .rule()
            .get(version)
            .execute()
            .try_collect()
            .await
            .map_err(|source| InterfaceError::Read { source })?;
        is_by_source |= rules.iter().any(|rule| rule.header.src_len > 0);
        marks.extend(rules.iter().filter_map(mark));
    }
    Ok(if is_by_source { marks } else { BTreeSet::new() })
}

/// The mark that a rule asks for.
fn mark(rule: &RuleMessage) -> Option<u32> {
    rule.attributes.iter().find_map(|attribute| match attribute {
        RuleAttribute::FwMark(mark) if *mark != 0 => Some(*mark),
        _ => None,
    })
}
