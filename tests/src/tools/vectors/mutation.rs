//! Wrong answers: copies of a flow whose answer differs from the file's in one respect. The
//! outcomes that were right for the flow must be wrong for each copy, or else a rule of lb's own
//! answers without looking at the file.

use std::collections::BTreeSet;
use std::fmt;
use std::net::SocketAddr;

use super::format::{Flow, Group, Verdict};
use super::outcome::Outcome;
use super::rules::expect;
use super::view::View;

/// In which respect an answer is wrong.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Wrong {
    /// An endpoint is missing.
    Removed,
    /// There is one more endpoint.
    Added,
    /// An endpoint is replaced by another one.
    Exchanged,
    /// The verdict is another one.
    Verdict(Verdict, Verdict),
    /// The source is kept instead of masqueraded, or masqueraded instead of kept.
    Masquerade,
}

impl fmt::Display for Wrong {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Removed => formatter.write_str("an endpoint removed"),
            Self::Added => formatter.write_str("an endpoint added"),
            Self::Exchanged => formatter.write_str("an endpoint exchanged"),
            Self::Verdict(from, to) => write!(formatter, "{from} changed into {to}"),
            Self::Masquerade => formatter.write_str("masquerade flipped"),
        }
    }
}

/// The wrong answers to a flow, and for each whether the outcomes `seen` show that it is wrong.
pub fn noticed(view: View<'_>, group: &Group, flow: &Flow, seen: &[Outcome]) -> Vec<(Wrong, bool)> {
    let is_noticed = |flow: &Flow| match expect(view, flow) {
        Ok(expected) => expected.what.judge(seen).is_err(),
        Err(_) => true,
    };
    copies(group, flow).into_iter().map(|(wrong, copy)| (wrong, is_noticed(&copy))).collect()
}

fn copies(group: &Group, flow: &Flow) -> Vec<(Wrong, Flow)> {
    let mut copies = Vec::new();
    let mut add = |wrong, change: &dyn Fn(&mut Flow)| {
        let mut copy = flow.clone();
        change(&mut copy);
        copies.push((wrong, copy));
    };
    add(Wrong::Masquerade, &|copy| copy.expect.masquerade ^= true);
    let endpoints: Vec<SocketAddr> = flow.expect.dnat.iter().flatten().copied().collect();
    let others = others(group, flow, &endpoints);
    for at in 0..endpoints.len() {
        let mut fewer = endpoints.clone();
        fewer.remove(at);
        add(Wrong::Removed, &|copy| copy.expect.dnat = Some(fewer.clone()));
        for other in &others {
            let mut exchanged = endpoints.clone();
            exchanged[at] = *other;
            add(Wrong::Exchanged, &|copy| copy.expect.dnat = Some(exchanged.clone()));
        }
    }
    let from = flow.expect.result.settled();
    if from == Verdict::Dnat {
        for other in &others {
            let more = [&endpoints[..], &[*other]].concat();
            add(Wrong::Added, &|copy| copy.expect.dnat = Some(more.clone()));
        }
    }
    for to in [Verdict::Dnat, Verdict::Reject, Verdict::Drop, Verdict::None] {
        let wrong = Wrong::Verdict(from, to);
        match to {
            to if to == from => {}
            Verdict::Dnat => {
                let targets = others.iter().map(|other| vec![*other]).chain([others.clone()]);
                for (targets, masquerade) in
                    targets.flat_map(|to| [(to.clone(), false), (to, true)])
                {
                    add(wrong, &|copy| {
                        copy.expect.result = to;
                        copy.expect.dnat = Some(targets.clone());
                        copy.expect.masquerade = masquerade;
                    });
                }
            }
            to => add(wrong, &|copy| {
                copy.expect.result = to;
                copy.expect.dnat = None;
                copy.expect.masquerade = false;
            }),
        }
    }
    copies
}

/// Endpoints of the group that are not the flow's, and one that is in no slice.
fn others(group: &Group, flow: &Flow, endpoints: &[SocketAddr]) -> Vec<SocketAddr> {
    let mut found = BTreeSet::new();
    for slice in &group.endpoint_slices {
        let numbers =
            slice.ports.iter().flatten().filter_map(|port| u16::try_from(port.port?).ok());
        for number in numbers {
            let ips = slice.endpoints.iter().flatten();
            let ips = ips.filter_map(|endpoint| endpoint.addresses.first()?.parse().ok());
            found.extend(ips.map(|ip| SocketAddr::new(ip, number)));
        }
    }
    let nowhere = if flow.dest_ip.is_ipv4() { "198.18.9.9:9" } else { "[2001:db8:99::9]:9" };
    found.extend(nowhere.parse::<SocketAddr>());
    let is_other = |at: &SocketAddr| {
        at.is_ipv4() == flow.dest_ip.is_ipv4() && at.port() != 0 && !endpoints.contains(at)
    };
    found.into_iter().filter(is_other).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::format::File;
    use super::super::own_files;
    use super::*;

    #[test]
    fn every_wrong_answer_in_a_file_is_noticed() {
        let mut counts: BTreeMap<Wrong, usize> = BTreeMap::new();
        for path in own_files().expect("files") {
            let file = File::read(&path).expect("a file of vectors");
            for (group, flow) in file.flows() {
                let view = View::new(group);
                let right = expect(view, flow).expect("a right answer").what.outcomes();
                for (wrong, is_noticed) in noticed(view, group, flow, &right) {
                    assert!(is_noticed, "{}: {}: {wrong}", group.id, flow.name);
                    *counts.entry(wrong).or_default() += 1;
                }
            }
        }
        // Three kinds of endpoints, each verdict to each other one, and the source.
        assert_eq!(counts.len(), 3 + 4 * 3 + 1, "{counts:?}");
    }
}
