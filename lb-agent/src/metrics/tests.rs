use std::time::Instant;

use lb_control::model::event::ObjectKind;

use super::*;

const PAGE: &str = include_str!("../../../docs/metrics.md");

#[derive(Debug)]
struct Fake;

impl DatapathStats for Fake {
    fn counters(&self) -> Vec<(Hook, Reason, u64)> {
        vec![
            (Hook::FromPod, Reason::FlowCreated, 3),
            (Hook::ToPod, Reason::Reply, 5),
            (Hook::ToPod, Reason::Request, 0),
            (Hook::Xdp, Reason::FlowTableFull, 0),
        ]
    }

    fn map_fill(&self) -> Vec<(&'static str, u64, u64)> {
        vec![("FLOW_TABLE4", 7, 1024), ("SERVICES", 1, 64)]
    }

    fn flows(&self) -> Vec<(IpFamily, Class, u64)> {
        vec![(IpFamily::V4, Class::Established, 4), (IpFamily::V6, Class::Unanswered, 5)]
    }

    fn source_ports(&self) -> Vec<PortUse> {
        vec![PortUse {
            address: [10, 0, 0, 1].into(),
            backend: ([10, 1, 0, 1], 53).into(),
            protocol: "udp".to_owned(),
            used: 30,
            ports: 40,
        }]
    }

    fn flow_events(&self) -> Option<[u64; EVENTS]> {
        Some([20, 0, 0, 0, 3, 9])
    }
}

fn now() -> Timestamp {
    Timestamp::from_millisecond(1_500).unwrap()
}

/// Metrics that have counted something of each kind.
fn all() -> Metrics {
    let metrics = Metrics::new();
    metrics.set_datapath(Arc::new(Fake));
    metrics.set_problems(Problems::default());
    let liveness = Liveness::default();
    liveness.lives(ObjectKind::Service, Instant::now() - Duration::from_secs(90));
    liveness.listed(ObjectKind::Service);
    liveness.unreadable(ObjectKind::Service);
    liveness.broke(ObjectKind::Node, "refused", Instant::now());
    metrics.set_liveness(liveness);
    metrics.set_refusals(&Refusals::logged());
    metrics.set_shortages([(Map::Slots, 2)].into_iter());
    metrics.queued(Change::Service, 1, now());
    metrics.queued(Change::Endpoint, 2, now());
    metrics.set_programmed_objects(1, 2, 3);
    metrics.set_no_local_endpoints(IpFamily::V4, 1, 0);
    metrics.faults().get_or_create(&[("part", "interfaces")]).set(1);
    metrics.attach_failed();
    metrics.netlink_overran();
    metrics.healthz_answered(200);
    metrics.livez_answered(503);
    metrics.programmed(IpFamily::V6, Duration::from_millis(20));
    metrics
}

fn encoded(metrics: &Metrics) -> String {
    metrics.encode(Format::Plain).unwrap()
}

#[test]
fn the_metrics_have_their_names_types_and_values() {
    let metrics = all();
    let before = encoded(&metrics);
    metrics.synced(Duration::from_millis(2), now());
    let after = encoded(&metrics);
    let build = format!("lb_build_info{{version=\"{}\"", env!("CARGO_PKG_VERSION"));
    for (text, line) in [
        (&before, "kubeproxy_sync_proxy_rules_endpoint_changes_pending 2"),
        (&before, "kubeproxy_sync_proxy_rules_service_changes_pending 1"),
        (&after, "# TYPE kubeproxy_sync_proxy_rules_duration_seconds histogram"),
        (&before, &build),
        (&after, "kubeproxy_sync_proxy_rules_endpoint_changes_total 2"),
        (&after, "kubeproxy_sync_proxy_rules_endpoint_changes_pending 0"),
        (&after, "kubeproxy_sync_proxy_rules_service_changes_total 1"),
        (&after, "kubeproxy_sync_proxy_rules_duration_seconds_count{ip_family=\"IPv6\"} 1"),
        (&after, "kubeproxy_sync_proxy_rules_last_timestamp_seconds{ip_family=\"IPv4\"} 1.5"),
        (
            &after,
            "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds{ip_family=\"IPv4\"} 1.5",
        ),
        (
            &after,
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total\
             {ip_family=\"IPv4\",traffic_policy=\"internal\"} 1",
        ),
        (&after, "kubeproxy_network_programming_duration_seconds_count{ip_family=\"IPv6\"} 1"),
        (&after, "kubeproxy_proxy_healthz_total{code=\"200\"} 1"),
        (&after, "kubeproxy_proxy_livez_total{code=\"503\"} 1"),
        (&after, "lb_services 1"),
        (&after, "lb_frontends 2"),
        (&after, "lb_endpoints 3"),
        (&after, "lb_datapath_packets_total{hook=\"from_pod\",reason=\"flow_created\"} 3"),
        (&after, "lb_datapath_packets_total{hook=\"to_pod\",reason=\"reply\"} 5"),
        (&after, "lb_datapath_packets_total{hook=\"xdp_device\",reason=\"flow_table_full\"} 0"),
        (&after, "# HELP lb_datapath_packets_total Packets and calls by hook and by the reason"),
        (&after, "lb_map_entries{map=\"FLOW_TABLE4\"} 7"),
        (&after, "lb_map_capacity{map=\"FLOW_TABLE4\"} 1024"),
        (&after, "lb_flow_table_entries{family=\"IPv4\",class=\"established\"} 4"),
        (&after, "lb_flow_table_entries{family=\"IPv6\",class=\"unanswered\"} 5"),
        (&after, "lb_watch_age_seconds{kind=\"Service\"} 9"),
        (&after, "lb_watch_lists_total{kind=\"Service\"} 1"),
        (&after, "lb_watch_failures_total{kind=\"Node\"} 1"),
        (&after, "lb_watch_unreadable_objects_total{kind=\"Service\"} 1"),
        (&after, "lb_faults{part=\"interfaces\"} 1"),
        (&after, "lb_attach_failures_total 1"),
        (&after, "lb_netlink_overruns_total 1"),
        (&after, "process_resident_memory_bytes "),
        (&after, "process_cpu_seconds_total "),
        (&after, "lb_flow_insertions_total 20"),
        (&after, "lb_shortages{map=\"SLOTS\"} 2"),
        (&after, "lb_refusals{reason=\"TooLarge\"} 0"),
        (&after, "lb_flow_evictions_total{class=\"established\"} 0"),
        (&after, "lb_flow_evictions_total{class=\"unanswered\"} 9"),
    ] {
        assert!(text.lines().any(|found| found.starts_with(line)), "{line} is not in\n{text}");
    }
    assert!(!after.contains("reason=\"request\""), "a reason that never was:\n{after}");
}

#[test]
fn an_event_that_changes_nothing_is_no_sync() {
    let metrics = all();
    metrics.nothing_pending();
    let text = encoded(&metrics);
    for (line, is_there) in [
        ("kubeproxy_sync_proxy_rules_endpoint_changes_pending 0", true),
        ("kubeproxy_sync_proxy_rules_endpoint_changes_total 2", true),
        ("kubeproxy_sync_proxy_rules_duration_seconds_count", false),
    ] {
        assert_eq!(text.lines().any(|found| found.starts_with(line)), is_there, "{line}");
    }
}

#[test]
fn bad_manifests_are_counted_where_there_are_any() {
    let metrics = Metrics::new();
    assert!(!encoded(&metrics).contains("lb_manifest_errors"));
    metrics.set_problems(Problems::default());
    assert!(encoded(&metrics).contains("lb_manifest_errors 0"));
}

#[test]
fn the_page_lists_every_metric_with_its_type_and_no_other() {
    let metrics = all();
    metrics.synced(Duration::from_millis(2), now());
    let text = encoded(&metrics);
    let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
    let mut encoded: Vec<_> = types.map(|(name, kind)| format!("| `{name}` | {kind} |")).collect();
    let rows = PAGE.lines().filter(|line| line.starts_with("| `"));
    let mut listed: Vec<_> =
        rows.map(|row| row.split(" | ").take(2).collect::<Vec<_>>().join(" | ") + " |").collect();
    encoded.sort();
    listed.sort();
    assert_eq!(listed, encoded);
}
