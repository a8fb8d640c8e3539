use proptest::prelude::*;

use super::*;

#[track_caller]
fn check(cidrs: &[&str], ips: &[&str], family: IpFamily, expected: &[&str], service_cidrs: usize) {
    let nets = |list: &[&str]| -> Vec<IpNet> {
        list.iter().map(|text| text.parse().expect("a prefix")).collect()
    };
    let ips: Vec<IpAddr> = ips.iter().map(|text| text.parse().expect("an address")).collect();
    let chosen = choose(&nets(cidrs), &ips, &[], family);
    assert_eq!(chosen, ServicePrefixes { prefixes: nets(expected), service_cidrs });
}

#[test]
fn service_cidrs_come_first_and_cover_what_lies_in_them() {
    let cidrs = ["10.96.0.0/16", "fd00:96::/112"];
    check(&cidrs, &["10.96.3.4"], IpFamily::V4, &["10.96.0.0/16"], 1);
    check(&cidrs, &["10.96.3.4"], IpFamily::V6, &["fd00:96::/112"], 1);
    let expected = ["10.96.0.0/16", "10.2.0.1/32"];
    check(&cidrs, &["10.96.3.4", "10.2.0.1"], IpFamily::V4, &expected, 1);
}

#[test]
fn few_addresses_are_let_in_one_by_one() {
    let ips = ["10.0.0.1", "10.0.0.2", "172.30.0.41"];
    let expected = ["10.0.0.1/32", "10.0.0.2/32", "172.30.0.41/32"];
    check(&[], &ips, IpFamily::V4, &expected, 0);
    check(&[], &[], IpFamily::V6, &[], 0);
}

#[test]
fn many_addresses_are_merged_where_they_are_closest() {
    let ips = [
        "10.0.0.1",
        "10.0.0.2",
        "10.0.1.1",
        "10.1.0.1",
        "10.4.0.1",
        "10.8.0.1",
        "10.16.0.1",
        "10.32.0.1",
        "10.64.0.1",
    ];
    let expected = [
        "10.0.0.0/30",
        "10.0.1.1/32",
        "10.1.0.1/32",
        "10.4.0.1/32",
        "10.8.0.1/32",
        "10.16.0.1/32",
        "10.32.0.1/32",
        "10.64.0.1/32",
    ];
    check(&[], &ips, IpFamily::V4, &expected, 0);
}

#[test]
fn service_cidrs_that_do_not_fit_are_merely_covered() {
    let cidrs: Vec<String> = (0..9).map(|n| format!("10.{}.0.0/16", n * 2)).collect();
    let cidrs: Vec<&str> = cidrs.iter().map(String::as_str).collect();
    let mut expected = cidrs[..7].to_vec();
    // 10.14.0.0/16 and 10.16.0.0/16 have no narrower prefix in common.
    expected.push("10.0.0.0/11");
    check(&cidrs, &[], IpFamily::V4, &expected, 7);
}

proptest! {
    #[test]
    fn every_cluster_ip_is_let_in(
        ips in prop::collection::vec(any::<u32>(), 0..40),
        cidrs in prop::collection::vec((any::<u32>(), 8u8..30), 0..12),
    ) {
        let ips: Vec<IpAddr> = ips.iter().map(|bits| Ipv4Addr::from_bits(*bits).into()).collect();
        let cidrs: Vec<IpNet> = cidrs
            .iter()
            .filter_map(|(bits, length)| IpNet::new(Ipv4Addr::from_bits(*bits).into(), *length).ok())
            .map(|net| net.trunc())
            .collect();
        let chosen = choose(&cidrs, &ips, &[], IpFamily::V4);
        prop_assert!(chosen.prefixes.len() <= MAX_PREFIXES);
        for ip in &ips {
            prop_assert!(chosen.prefixes.iter().any(|prefix| prefix.contains(ip)));
        }
        for cidr in &cidrs {
            prop_assert!(chosen.prefixes.iter().any(|prefix| prefix.contains(cidr)));
        }
    }
}
