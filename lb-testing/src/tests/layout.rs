//! The layout of every key and value, compared with a file in the tree. `LB_BLESS=1`
//! writes the file.

use std::{fmt::Write, fs};

use bytemuck::Zeroable;
use lb_common::abi::{
    ABI_VERSION,
    address::{Address4, Address6, Prefix},
    affinity::{Affinity, AffinityKey},
    backend::Backend,
    counter::{COUNTERS, Hook, REASONS_PER_HOOK, Reason},
    flow::{Flow, FlowKey, NextHop, Tuple},
    flow_table::{Bucket, FlowBucket, FlowEntry, FlowFilter, FlowSeed},
    fragment::{Fragment, FragmentKey},
    frontend::{Frontend, FrontendKey},
    layout::MAPS,
    range::{Range, RangeKey},
    service::{Name, Service, Slot, SlotRange},
    settings::{
        Device, FamilySettings, FormerLifetimes, Lifetimes, PortRange, Settings, SettingsPair,
        Timeouts,
    },
    socket::{ConnectedPeer, DatagramKey, Peer},
    source::SourceKey,
    traffic::{DirectFlows, DropKey, Traffic},
};

/// Writes size, alignment and the offset of every field; a type whose fields are not all
/// named does not compile.
macro_rules! layout {
    ($text:ident: $($name:ident $(<$parameter:ty>)? { $($field:ident),+ $(,)? })+) => {$({
        type This = $name $(<$parameter>)?;
        let $name { $($field: _),+ } = This::zeroed();
        let name = stringify!($name $(<$parameter>)?);
        line(&mut $text, &name.replace(' ', ""), size_of::<This>(), align_of::<This>());
        $(writeln!($text, "  {:>4} {}", std::mem::offset_of!(This, $field), stringify!($field))
            .expect("a string takes text");)+
    })+};
}

fn line(text: &mut String, name: &str, size: usize, align: usize) {
    writeln!(text, "{name}: size {size}, align {align}").expect("a string takes text");
}

fn current() -> String {
    let mut text = format!("version {ABI_VERSION}\n");
    layout! { text:
        Tuple<Address4> { source, destination, source_port, destination_port }
        Tuple<Address6> { source, destination, source_port, destination_port }
        FlowKey<Address4> { tuple, protocol }
        FlowKey<Address6> { tuple, protocol }
        NextHop { bytes }
        Flow<Address4> {
            rewrite, action, state, generation, backend, service, last_seen, device, next_hop,
        }
        Flow<Address6> {
            rewrite, action, state, generation, backend, service, last_seen, device, next_hop,
        }
        Bucket { words }
        FlowSeed { factors, buckets, filters }
        FlowFilter { words }
        FlowBucket<Address4> { words, entries }
        FlowBucket<Address6> { words, entries }
        FlowEntry<Address4> {
            request, translated, backend, service, device, generation, actions, next_hops, reply_place, zero,
        }
        FlowEntry<Address6> {
            request, translated, backend, service, device, generation, actions, next_hops, reply_place, zero,
        }
        FragmentKey<Address4> { source, destination, identification, protocol }
        FragmentKey<Address6> { source, destination, identification, protocol }
        Fragment { source_port, destination_port, last_seen }
        FrontendKey<Address4> { address, port, protocol, zero }
        FrontendKey<Address6> { address, port, protocol, zero }
        Frontend { service, kind, flags, zero }
        Backend<Address4> { address, port, generation, sets, flags, zero, service, node }
        Backend<Address6> { address, port, generation, sets, flags, zero, service, node }
        SlotRange { start_and_length }
        Service { cluster, local, affinity_seconds, flags }
        Slot { backend }
        Name { text, length, family, protocol, zero }
        AffinityKey { service, kind, client }
        Affinity { backend, generation, last_seen }
        Peer { address, port, family }
        ConnectedPeer { requested, actual }
        DatagramKey { cookie, actual }
        Prefix<Address4> { address, mask }
        Prefix<Address6> { address, mask }
        FamilySettings<Address4> {
            service_prefixes, node_addresses, pod_prefixes, node_source, service_prefix_count, service_cidr_count,
            node_address_count, pod_prefix_count,
        }
        FamilySettings<Address6> {
            service_prefixes, node_addresses, pod_prefixes, node_source, service_prefix_count, service_cidr_count,
            node_address_count, pod_prefix_count,
        }
        Timeouts {
            tcp_syn, tcp_established, tcp_half_closed, tcp_fin_one_way, tcp_closing, tcp_reset, udp, udp_stream,
        }
        FormerLifetimes { ticks }
        Lifetimes { words }
        Settings {
            ipv4, ipv6, lifetimes, ticks_per_second, flags, node_ports, source_ports, flow_lifetimes,
            time_shift, zero,
        }
        PortRange { first, count }
        Range<Address4> { service, address }
        Range<Address6> { service, address }
        RangeKey<Address4> { prefix_length, range }
        RangeKey<Address6> { prefix_length, range }
        SourceKey<Address4> { prefix_length, address }
        SourceKey<Address6> { prefix_length, address }
        SettingsPair { active, zero, copies }
        Device { ifindex, mac, flags, mtu, epoch }
        Traffic { packets, bytes }
        DirectFlows { begun, ended }
        DropKey { service, reason }
    }
    for map in MAPS {
        writeln!(text, "map {}@{}", map.name, map.version).expect("a string takes text");
    }
    writeln!(text, "counters: {COUNTERS}, {REASONS_PER_HOOK} for each hook")
        .expect("a string takes text");
    let hooks = Hook::ALL.iter().map(|hook| ("hook", *hook as u32, hook.name()));
    let reasons = Reason::ALL.iter().map(|reason| ("reason", *reason as u32, reason.name()));
    for (kind, number, name) in hooks.chain(reasons) {
        writeln!(text, "{kind} {number:>2} {name}").expect("a string takes text");
    }
    text
}

/// How the layout differs from the golden file.
#[derive(Debug, PartialEq, Eq)]
enum Difference {
    None,
    /// Hooks or reasons were appended, and nothing else changed: maps that are pinned keep their
    /// meaning.
    Appended,
    /// Pinned maps would be misread.
    Incompatible,
}

/// Compares the layout with the golden one. Hooks and reasons may only be appended.
fn difference(golden: &str, current: &str) -> Difference {
    let listed = |text: &str, kind: &str| -> Vec<String> {
        text.lines().filter(|line| line.starts_with(kind)).map(str::to_owned).collect()
    };
    let rest = |text: &str| -> Vec<String> {
        let is_rest = |line: &&str| !LISTS.iter().any(|kind| line.starts_with(kind));
        text.lines().filter(is_rest).map(str::to_owned).collect()
    };
    if golden == current {
        Difference::None
    } else if rest(golden) == rest(current)
        && LISTS.iter().all(|kind| listed(current, kind).starts_with(&listed(golden, kind)))
    {
        Difference::Appended
    } else {
        Difference::Incompatible
    }
}

/// How the lines begin that list hooks and reasons by number.
const LISTS: [&str; 2] = ["hook ", "reason "];

#[test]
fn layout_is_that_of_the_golden_file() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/layout.txt");
    let current = current();
    if std::env::var_os("LB_BLESS").is_some() {
        fs::write(path, &current).expect("the golden file can be written");
    }
    let golden = fs::read_to_string(path).unwrap_or_default();
    match difference(&golden, &current) {
        Difference::None => {}
        Difference::Appended => panic!(
            "hooks or reasons were appended, which {path} does not have: no other ABI_VERSION is \
             needed, `cargo xtask check --bless` adds them. The layout is now:\n{current}"
        ),
        Difference::Incompatible => panic!(
            "the layout differs from {path}, or a hook or reason was renumbered, renamed or \
             removed: pinned maps would be misread, so it needs another ABI_VERSION, then \
             `cargo xtask check --bless`. It is now:\n{current}"
        ),
    }
}

#[test]
fn an_appended_reason_keeps_the_layout_and_a_renumbered_or_removed_one_changes_it() {
    let golden = "version 3\nhook  0 a\nreason  0 b\nreason  1 c\n";
    let check = |current: &str| difference(golden, current);
    assert_eq!(check(golden), Difference::None);
    assert_eq!(check(&format!("{golden}reason  2 d\n")), Difference::Appended);
    let with_hook = "version 3\nhook  0 a\nhook  1 e\nreason  0 b\nreason  1 c\n";
    assert_eq!(check(with_hook), Difference::Appended);
    for incompatible in [
        "version 3\nhook  0 a\nreason  0 b\n",
        "version 3\nhook  0 a\nreason  0 b\nreason  1 d\nreason  2 c\n",
        "version 3\nhook  0 a\nreason  0 b\nreason  1 other\n",
        "version 4\nhook  0 a\nreason  0 b\nreason  1 c\n",
    ] {
        assert_eq!(check(incompatible), Difference::Incompatible, "{incompatible}");
    }
}
