use super::{effects::Effect, flags::FLAGS, *};
use crate::cli::{Command, parse};

/// As kubeadm 1.36 writes it.
const KUBEADM: &str = include_str!("../../../tests/golden/kube-proxy/kubeadm.yaml");
/// What kube-proxy 1.36 makes of that.
const COMPLETE: &str = include_str!("../../../tests/golden/kube-proxy/complete.yaml");

fn flags(arguments: &[&str]) -> KubeProxyFlags {
    let all = ["lb-agent", "run"].into_iter().chain(arguments.iter().copied());
    match parse(all).expect("the arguments are good").command {
        Command::Run(run) => run.kube_proxy,
        other => panic!("{other:?} is not run"),
    }
}

/// The configuration of flags without a file.
fn of_flags(arguments: &[&str]) -> Value {
    let all = KubeProxyConfiguration::load(None, &flags(arguments), None);
    all.expect("the flags are good").to_json()
}

fn file(fields: &str) -> String {
    format!("apiVersion: {API_VERSION}\nkind: {KIND}\n{fields}\n")
}

#[track_caller]
fn check_fault(text: &str, expected: &str) {
    match KubeProxyConfiguration::parse(text) {
        Ok(_) => panic!("{text:?} is accepted"),
        Err(error) => assert_eq!(error.to_string(), expected, "{text}"),
    }
}

#[test]
fn a_file_of_another_type_is_refused() {
    let rows = [
        ("", "apiVersion: missing: it must be kubeproxy.config.k8s.io/v1alpha1"),
        (
            "kind: KubeProxyConfiguration",
            "apiVersion: missing: it must be kubeproxy.config.k8s.io/v1alpha1",
        ),
        (
            "{apiVersion: kubeproxy.config.k8s.io/v1alpha2, kind: KubeProxyConfiguration}",
            "apiVersion: expected kubeproxy.config.k8s.io/v1alpha1, found \
             \"kubeproxy.config.k8s.io/v1alpha2\"",
        ),
        (
            "apiVersion: kubeproxy.config.k8s.io/v1alpha1",
            "kind: missing: it must be KubeProxyConfiguration",
        ),
        (
            "{apiVersion: kubeproxy.config.k8s.io/v1alpha1, kind: Config}",
            "kind: expected KubeProxyConfiguration, found \"Config\"",
        ),
    ];
    for (text, expected) in rows {
        check_fault(text, expected);
    }
}

#[test]
fn unknown_fields_are_named_and_ignored() {
    let text = file(
        "clusterCidr: 10.0.0.0/8\nmode: nftables\nudpIdleTimeout: 250ms\n\
         conntrack: {maxPerCor: 1, min: 7}\n\
         logging: {options: {json: {infoBuferSize: 1}}, \
                   vmodule: [{filePattern: a, verbosity: 1, x: 2}]}",
    );
    let all = KubeProxyConfiguration::parse(&text).expect("a configuration");
    let mut unknown = all.unknown().to_vec();
    unknown.sort();
    let expected = [
        "clusterCidr",
        "conntrack.maxPerCor",
        "logging.options.json.infoBuferSize",
        "logging.vmodule[0].x",
        "udpIdleTimeout",
    ];
    assert_eq!(unknown, expected);
    assert_eq!(all.conntrack.min, Some(7), "what is known counts");
    assert!(!all.to_yaml().contains("udpIdleTimeout"), "it is not written");
}

#[test]
fn what_is_wrong_in_a_file_is_named_by_its_path() {
    let rows = [
        ("conntrack: {maxPerCore: x}", "conntrack.maxPerCore: expected an integer, found \"x\""),
        ("conntrack: {maxPerCore: 1.5}", "conntrack.maxPerCore: expected an integer, found 1.5"),
        (
            "conntrack: {min: 99999999999}",
            "conntrack.min: expected an integer of 32 bits, found 99999999999",
        ),
        ("conntrack: {min: -1}", "conntrack.min: -1 is negative"),
        ("conntrack: [1]", "conntrack: expected a map, found a list"),
        (
            "logging: {vmodule: [{filePattern: a, verbosity: 1}, {filePattern: b, verbosity: x}]}",
            "logging.vmodule[1].verbosity: expected an integer, found \"x\"",
        ),
        (
            "conntrack: {tcpEstablishedTimeout: 86400}",
            "conntrack.tcpEstablishedTimeout: expected a duration such as 15m0s, found 86400",
        ),
        (
            "configSyncPeriod: 15 minutes",
            "configSyncPeriod: expected a duration such as 15m0s, found \"15 minutes\"",
        ),
        (
            "configSyncPeriod: -5s",
            "configSyncPeriod: expected a duration such as 15m0s, found \"-5s\"",
        ),
        ("hostnameOverride: 5", "hostnameOverride: expected a string, found 5"),
        (
            "bindAddressHardFail: yes please",
            "bindAddressHardFail: expected a boolean, found \"yes please\"",
        ),
        (
            "clientConnection: {qps: many}",
            "clientConnection.qps: expected a number, found \"many\"",
        ),
        ("clientConnection: {burst: -1}", "clientConnection.burst: -1 is negative"),
        ("featureGates: {A: 1}", "featureGates.A: expected a boolean, found 1"),
        ("mode: ebpf", "mode: expected iptables, ipvs or nftables, found \"ebpf\""),
        (
            "detectLocalMode: Pods",
            "detectLocalMode: expected ClusterCIDR, NodeCIDR, BridgeInterface or \
             InterfaceNamePrefix, found \"Pods\"",
        ),
        (
            "detectLocalMode: BridgeInterface",
            "detectLocal.bridgeInterface: must not be empty with this detectLocalMode",
        ),
        (
            "clusterCIDR: 10.0.0.0",
            "clusterCIDR: expected CIDRs separated by commas, such as 10.244.0.0/16,fd00::/48, \
             found \"10.0.0.0\"",
        ),
        (
            "nodePortAddresses: [10.0.0.0/8, eth0]",
            "nodePortAddresses[1]: expected a CIDR or primary, found \"eth0\"",
        ),
        (
            "nodePortAddresses: [primary, 10.0.0.0/8]",
            "nodePortAddresses: primary must be alone, without CIDRs",
        ),
        ("nodePortAddresses: primary", "nodePortAddresses: expected a list, found \"primary\""),
        ("bindAddress: here", "bindAddress: expected an IP address, found \"here\""),
        (
            "healthzBindAddress: here:1",
            "healthzBindAddress: expected an address with or without a port, found \"here:1\"",
        ),
        ("oomScoreAdj: 1001", "oomScoreAdj: 1001 is not between -1000 and 1000"),
        ("iptables: {masqueradeBit: 32}", "iptables.masqueradeBit: 32 is not between 0 and 31"),
        (
            "iptables: {syncPeriod: 1s, minSyncPeriod: 2s}",
            "iptables.syncPeriod: 1s is less than minSyncPeriod, 2s",
        ),
    ];
    for (fields, expected) in rows {
        check_fault(&file(fields), expected);
    }
}

#[test]
fn a_text_that_is_no_yaml_is_refused_with_its_place() {
    for text in [file("conntrack: {"), file("mode: a\nmode: b"), file("a: b: c")] {
        let error = KubeProxyConfiguration::parse(&text).expect_err("it is no YAML").to_string();
        assert!(error.contains("line ") && error.lines().count() == 1, "{error}");
    }
}

#[test]
fn the_file_of_kubeadm_is_completed_as_kube_proxy_completes_it() {
    let from_file = KubeProxyConfiguration::parse(KUBEADM).expect("it is good");
    let written = from_file.clone().completed();
    let expected: Value = serde_saphyr::from_str(COMPLETE).expect("it is YAML");
    assert_eq!(written.to_json(), expected);
    assert!(written.without_effect(&KubeProxyFlags::default()).is_empty());
}

#[test]
fn what_is_written_is_read_as_the_same() {
    let all = [
        "--cluster-cidr=10.0.0.0/14,fd00::/48",
        "--nodeport-addresses=10.0.0.0/8,fd00::/8",
        "--bind-address=::",
        "--masquerade-all",
        "--detect-local-mode=InterfaceNamePrefix",
        "--pod-interface-name-prefix=cali",
        "--feature-gates=A=true,B=false",
        "--vmodule=a=3,b*=4",
        "--log-flush-frequency=1m30.5s",
        "--kube-api-qps=6.5",
        "--conntrack-udp-timeout=1h0m1s",
        "--log-json-info-buffer-size=2Ki",
        "--ipvs-exclude-cidrs=10.9.0.0/16",
    ];
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("config.conf");
    for arguments in [&[][..], &all[..], &["--nodeport-addresses=primary", "--proxy-mode=ipvs"]] {
        let first = KubeProxyConfiguration::load(None, &flags(arguments), Some(2)).expect("good");
        first.write(&path).expect("it can be written");
        let again = KubeProxyConfiguration::load(Some(&path), &KubeProxyFlags::default(), None);
        assert_eq!(again.expect("what is written is good"), first);
        let text = serde_json::to_string_pretty(&first).expect("JSON").replace("  ", "\t");
        let json = KubeProxyConfiguration::parse(&text).expect("JSON is read too").completed();
        assert_eq!(json, first);
    }
}

#[test]
fn flags_win_over_the_file() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("config.conf");
    let text = file(
        "clusterCIDR: 10.1.0.0/16\nhostnameOverride: a\nlogging: {verbosity: 3}\n\
         nftables: {masqueradeAll: true}\nmetricsBindAddress: 0.0.0.0\nbindAddress: '::'",
    );
    fs::write(&path, text).expect("it can be written");
    let load = |arguments: &[&str], verbosity| {
        let all = KubeProxyConfiguration::load(Some(&path), &flags(arguments), verbosity);
        all.expect("it is good")
    };
    let of_file = load(&[], None);
    assert_eq!((of_file.hostname_override.as_str(), of_file.logging.verbosity), ("a", 3));
    assert_eq!(of_file.healthz_bind_address.0, "[::]:10256".parse().ok());
    assert_eq!(of_file.metrics_bind_address.0, "0.0.0.0:10249".parse().ok());
    let arguments = [
        "--hostname-override=b",
        "--masquerade-all=false",
        "--metrics-port=0",
        "--healthz-port=1",
        "--cluster_cidr=",
    ];
    let both = load(&arguments, Some(0));
    assert_eq!((both.hostname_override.as_str(), both.logging.verbosity), ("b", 0));
    assert!(!both.nftables.masquerade_all && both.cluster_cidr.is_empty());
    assert_eq!(both.metrics_bind_address.0, None);
    assert_eq!(both.healthz_bind_address.0, "[::]:10256".parse().ok());
}

#[test]
fn lines_of_other_installers_are_taken() {
    let rows = [
        "--config=/dev/null --hostname-override=a",
        "--v=2 --config=/dev/null --hostname-override=a",
        "--conntrack-max-per-core=0 --metrics-bind-address=0.0.0.0:10249 --kubeconfig=/k \
         --cluster-cidr= --detect-local-mode=ClusterCIDR --pod-interface-name-prefix= --v=3",
        "--master=https://192.0.2.1 --kubeconfig=/k --cluster-cidr=10.0.0.0/14 --oom-score-adj=-998 \
         --v=2 --feature-gates=A=false,B=true --iptables-sync-period=1m \
         --iptables-min-sync-period=10s --ipvs-sync-period=1m --ipvs-min-sync-period=10s \
         --detect-local-mode=NodeCIDR",
        "--oom-score-adj -998 -v 5 --masquerade-all --proxy-mode iptables --v=1",
        "--nodeport-addresses=10.0.0.0/8 --nodeport-addresses fd00::/8 --profiling=True",
    ];
    for row in rows {
        flags(&row.split_whitespace().collect::<Vec<_>>());
    }
    let twice = of_flags(&["--nodeport-addresses=10.0.0.0/8", "--nodeport-addresses", "fd00::/8"]);
    assert_eq!(twice["nodePortAddresses"], serde_json::json!(["10.0.0.0/8", "fd00::/8"]));
    let last = of_flags(&["--oom-score-adj=1", "--oom-score-adj", "-2"]);
    assert_eq!(last["oomScoreAdj"], -2);
}

#[test]
fn flags_that_are_wrong_are_usage_errors_that_name_the_value() {
    let rows = [
        (
            "--healthz-bind-address=here:1",
            "expected an address with or without a port, found \"here:1\"",
        ),
        ("--nodeport-addresses=primry", "expected a CIDR or primary, found \"primry\""),
        ("--cluster-cidr=10.0.0.0", "found \"10.0.0.0\""),
        ("--conntrack-min=few", "expected an integer"),
        ("--conntrack-udp-timeout=5", "\"5\" is not a duration"),
        ("--masquerade-all=maybe", "\"maybe\" is neither true nor false"),
        ("--feature-gates=A", "expected NAME=VALUE"),
        ("--healthz-port=x", "expected a port"),
    ];
    for (argument, expected) in rows {
        let error = parse(["lb-agent", "run", argument]).expect_err("it is wrong");
        assert_eq!(error.exit_code(), 2, "{argument}");
        let text = error.to_string();
        assert!(text.contains(expected) && text.contains(&argument[..10]), "{text}");
    }
    let together =
        KubeProxyConfiguration::load(None, &flags(&["--detect-local-mode=BridgeInterface"]), None);
    let text = together.expect_err("a name is missing").to_string();
    assert!(
        text.ends_with("detectLocal.bridgeInterface: must not be empty with this detectLocalMode"),
        "{text}"
    );
}

#[test]
fn what_has_no_effect_is_named_once() {
    let given = flags(&["--proxy-mode=ipvs", "--cluster-cidr=10.0.0.0/8", "--profiling=false"]);
    assert_eq!(given.without_effect(), ["proxy-mode", "profiling"]);
    let text =
        file("mode: nftables\nportRange: 1-2\nipvs: {scheduler: lc}\nclusterCIDR: 10.0.0.0/8");
    let all = KubeProxyConfiguration::parse(&text).expect("it is good").completed();
    assert_eq!(
        all.without_effect(&KubeProxyFlags::default()),
        ["mode", "ipvs.scheduler", "portRange"]
    );
    assert_eq!(all.without_effect(&given), ["ipvs.scheduler", "portRange"]);
}

/// The paths of all that is no map, but for the type.
fn paths(value: &Value, prefix: &str, found: &mut Vec<String>) {
    for (name, value) in value.as_object().into_iter().flatten() {
        let path = format!("{prefix}{name}");
        match value {
            Value::Object(_) if name != "featureGates" => {
                paths(value, &format!("{path}."), found);
            }
            _ if ["apiVersion", "kind"].contains(&name.as_str()) => {}
            _ => found.push(path),
        }
    }
}

#[test]
fn every_field_is_in_the_list_and_every_flag_sets_fields_that_are() {
    let text = file(
        "featureGates: {A: true}\nwindowsRunAsService: true\nlogging: {vmodule: [{}], options: \
         {text: {splitStream: true}, json: {splitStream: true}}}",
    );
    let all = KubeProxyConfiguration::parse(&text).expect("it is good");
    let mut found = Vec::new();
    paths(&all.to_json(), "", &mut found);
    let mut listed: Vec<_> = FIELDS.iter().map(|(path, _)| (*path).to_owned()).collect();
    found.sort();
    listed.sort();
    assert_eq!(found, listed);
    for field in FLAGS.iter().flat_map(|flag| flag.fields) {
        assert!(listed.iter().any(|path| path == field), "{field}");
    }
}

#[test]
fn configz_has_the_form_of_kube_proxy() {
    let all = KubeProxyConfiguration::parse(KUBEADM).expect("it is good").completed();
    let text = all.to_configz();
    let start = "{\"kubeproxy.config.k8s.io\":{\"kind\":\"KubeProxyConfiguration\",\
        \"apiVersion\":\"kubeproxy.config.k8s.io/v1alpha1\",\"clientConnection\":{\"kubeconfig\":";
    assert!(text.starts_with(start) && text.ends_with("\"portRange\":\"\"}}"), "{text}");
}

#[test]
fn durations_are_written_as_go_writes_them() {
    let rows = [
        ("0", "0s"),
        ("15m", "15m0s"),
        ("24h", "24h0m0s"),
        ("90s", "1m30s"),
        ("1.5s", "1.5s"),
        ("250ms", "250ms"),
        ("1500us", "1.5ms"),
        ("999ns", "999ns"),
        ("1h0.25s", "1h0m0.25s"),
    ];
    for (text, expected) in rows {
        let duration = crate::options::values::duration(text).expect("a duration");
        assert_eq!(values::Duration(duration).to_string(), expected);
    }
}

#[test]
fn the_page_on_kube_proxy_says_of_every_field_and_flag_what_it_does() {
    let page = include_str!("../../../docs/kube-proxy.md");
    let rows: Vec<&str> = page.lines().filter(|line| line.starts_with("| `")).collect();
    let own = ["config", "write-config-to", "cleanup", "init-only", "master", "v"];
    let own = own.map(|flag| (format!("--{flag}"), Effect::Used));
    let fields = FIELDS.iter().map(|(path, effect)| ((*path).to_owned(), *effect));
    let flags = FLAGS.iter().map(|flag| (format!("--{}", flag.name), flag.effect()));
    let expected: Vec<_> = fields.chain(flags).chain(own).collect();
    for (name, effect) in &expected {
        let effect = match effect {
            Effect::Used => "used",
            Effect::Ignored => "ignored",
        };
        let start = format!("| `{name}` | {effect} | ");
        assert_eq!(rows.iter().filter(|row| row.starts_with(&start)).count(), 1, "{start}");
    }
    let differences =
        rows.iter().filter(|row| !row.contains("used |") && !row.contains("ignored |"));
    assert_eq!(rows.len() - differences.count(), expected.len(), "the page has a row too much");
}
