//! The table of flags.

use serde_json::{Map, Value};

use super::Flag;
use crate::options::values::{boolean, duration};

/// The type of a flag's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    Text,
    Bool,
    Integer,
    Number,
    Duration,
    /// A port. Only 0 has an effect: it disables the server.
    Port,
    /// Texts separated by commas.
    List,
    /// `Name=true` separated by commas.
    Gates,
    /// `pattern=level` separated by commas.
    Modules,
}

impl Shape {
    pub(super) const fn value_name(self) -> &'static str {
        match self {
            Self::Text => "TEXT",
            Self::Bool => "BOOL",
            Self::Integer | Self::Number => "N",
            Self::Duration => "DURATION",
            Self::Port => "PORT",
            Self::List => "LIST",
            Self::Gates => "NAME=BOOL,...",
            Self::Modules => "PATTERN=N,...",
        }
    }

    /// Parses the text into the value that a file would have.
    pub(super) fn value(self, text: &str) -> Result<Value, String> {
        let items = || text.split(',').map(str::trim).filter(|item| !item.is_empty());
        let pairs = || {
            let pair = |item: &'_ str| {
                let (name, value) = item.split_once('=').ok_or("expected NAME=VALUE")?;
                Ok::<_, String>((name.trim().to_owned(), value.trim().to_owned()))
            };
            items().map(pair).collect::<Result<Vec<_>, _>>()
        };
        Ok(match self {
            Self::Text => text.into(),
            Self::Duration => {
                duration(text)?;
                text.into()
            }
            Self::Bool => boolean(text)?.into(),
            Self::Integer => integer(text)?,
            Self::Number => {
                let number: f64 = text.parse().map_err(|_| "expected a number".to_owned())?;
                number.into()
            }
            Self::Port => text
                .parse::<u16>()
                .map_err(|_| "expected a port, or 0 to disable the server".to_owned())?
                .into(),
            Self::List => items().collect(),
            Self::Gates => {
                let gate = |(name, value): (String, String)| Ok((name, boolean(&value)?.into()));
                Value::Object(pairs()?.into_iter().map(gate).collect::<Result<_, String>>()?)
            }
            Self::Modules => {
                let module = |(pattern, level): (String, String)| {
                    let fields = [
                        ("filePattern".to_owned(), Value::String(pattern)),
                        ("verbosity".to_owned(), integer(&level)?),
                    ];
                    Ok::<_, String>(Value::Object(Map::from_iter(fields)))
                };
                Value::Array(pairs()?.into_iter().map(module).collect::<Result<_, _>>()?)
            }
        })
    }
}

fn integer(text: &str) -> Result<Value, String> {
    text.parse::<i64>().map(Value::from).map_err(|_| "expected an integer".to_owned())
}

const fn flag(
    name: &'static str,
    shape: Shape,
    fields: &'static [&'static str],
    help: &'static str,
) -> Flag {
    Flag { name, fields, shape, help }
}

use Shape::{Bool, Duration, Gates, Integer, List, Modules, Number, Port, Text};

/// All flags of kube-proxy that set a field.
pub static FLAGS: [Flag; 51] = [
    flag(
        "kubeconfig",
        Text,
        &["clientConnection.kubeconfig"],
        "Kubeconfig file [default: in-cluster configuration]",
    ),
    flag(
        "hostname-override",
        Text,
        &["hostnameOverride"],
        "Name of this node [default: the host name]",
    ),
    flag(
        "bind-address",
        Text,
        &["bindAddress"],
        "Primary address of this node for its IP family [default: that of the Node object]",
    ),
    flag(
        "nodeport-addresses",
        List,
        &["nodePortAddresses"],
        "Addresses that serve NodePorts: CIDRs, or primary (the first InternalIP of each family) \
         [default: primary]",
    ),
    flag(
        "cluster-cidr",
        Text,
        &["clusterCIDR"],
        "CIDRs of all pods of the cluster, separated by commas",
    ),
    flag(
        "detect-local-mode",
        Text,
        &["detectLocalMode"],
        "How pods are told apart from external clients: ClusterCIDR, NodeCIDR, \
         BridgeInterface or InterfaceNamePrefix [default: ClusterCIDR]",
    ),
    flag(
        "pod-bridge-interface",
        Text,
        &["detectLocal.bridgeInterface"],
        "Pod interfaces are detected, or named by --pod-interfaces",
    ),
    flag(
        "pod-interface-name-prefix",
        Text,
        &["detectLocal.interfaceNamePrefix"],
        "Pod interfaces are detected, or named by --pod-interfaces",
    ),
    flag(
        "masquerade-all",
        Bool,
        &["iptables.masqueradeAll", "nftables.masqueradeAll"],
        "Masquerade all traffic to ClusterIPs: backends see an address of this node as source",
    ),
    flag(
        "iptables-localhost-nodeports",
        Bool,
        &["iptables.localhostNodePorts"],
        "Serve NodePorts on loopback addresses to processes of this node [default: true]",
    ),
    flag(
        "healthz-bind-address",
        Text,
        &["healthzBindAddress"],
        "Address of /healthz and /livez; empty disables the server [default: 0.0.0.0:10256]",
    ),
    flag(
        "metrics-bind-address",
        Text,
        &["metricsBindAddress"],
        "Address of /metrics, /proxyMode and /configz; empty disables the server \
         [default: 127.0.0.1:10249]",
    ),
    flag(
        "healthz-port",
        Port,
        &["healthzBindAddress"],
        "0 disables the health server; other values change nothing",
    ),
    flag(
        "metrics-port",
        Port,
        &["metricsBindAddress"],
        "0 disables the metrics server; other values change nothing",
    ),
    flag(
        "bind-address-hard-fail",
        Bool,
        &["bindAddressHardFail"],
        "Exit if one of these addresses cannot be bound, instead of retrying",
    ),
    flag(
        "oom-score-adj",
        Integer,
        &["oomScoreAdj"],
        "oom_score_adj of this process [default: -999]",
    ),
    flag(
        "iptables-sync-period",
        Duration,
        &["iptables.syncPeriod", "nftables.syncPeriod"],
        "/healthz answers 503 once a change has waited for twice this time [default: 30s]",
    ),
    flag(
        "ipvs-sync-period",
        Duration,
        &["ipvs.syncPeriod"],
        "The same, with --proxy-mode ipvs [default: 30s]",
    ),
    flag(
        "conntrack-max-per-core",
        Integer,
        &["conntrack.maxPerCore"],
        "nf_conntrack_max per CPU; 0 leaves it unchanged [default: 32768]",
    ),
    flag(
        "conntrack-min",
        Integer,
        &["conntrack.min"],
        "Minimum of nf_conntrack_max, whatever the number of CPUs [default: 131072]",
    ),
    flag(
        "conntrack-tcp-timeout-established",
        Duration,
        &["conntrack.tcpEstablishedTimeout"],
        "nf_conntrack_tcp_timeout_established; 0 leaves it unchanged [default: 24h]",
    ),
    flag(
        "conntrack-tcp-timeout-close-wait",
        Duration,
        &["conntrack.tcpCloseWaitTimeout"],
        "nf_conntrack_tcp_timeout_close_wait; 0 leaves it unchanged [default: 1h]",
    ),
    flag(
        "conntrack-tcp-be-liberal",
        Bool,
        &["conntrack.tcpBeLiberal"],
        "Set nf_conntrack_tcp_be_liberal; false leaves it unchanged",
    ),
    flag(
        "conntrack-udp-timeout",
        Duration,
        &["conntrack.udpTimeout"],
        "nf_conntrack_udp_timeout; 0 leaves it unchanged [default: 0]",
    ),
    flag(
        "conntrack-udp-timeout-stream",
        Duration,
        &["conntrack.udpStreamTimeout"],
        "nf_conntrack_udp_timeout_stream; 0 leaves it unchanged [default: 0]",
    ),
    flag(
        "config-sync-period",
        Duration,
        &["configSyncPeriod"],
        "Changes arrive by watches, there is no periodic sync",
    ),
    flag("boot-id-file", Text, &[], "The file is not read"),
    flag("machine-id-file", Text, &[], "The file is not read"),
    flag("feature-gates", Gates, &["featureGates"], "lb-agent has no feature gates"),
    flag(
        "kube-api-burst",
        Integer,
        &["clientConnection.burst"],
        "Requests are not rate limited, there are few",
    ),
    flag(
        "kube-api-content-type",
        Text,
        &["clientConnection.contentType"],
        "The content type is always JSON",
    ),
    flag(
        "kube-api-qps",
        Number,
        &["clientConnection.qps"],
        "Requests are not rate limited, there are few",
    ),
    flag("proxy-mode", Text, &["mode"], "The mode is always eBPF"),
    flag("profiling", Bool, &["enableProfiling"], "There are no profiling endpoints"),
    flag(
        "show-hidden-metrics-for-version",
        Text,
        &["showHiddenMetricsForVersion"],
        "No metric is hidden",
    ),
    flag("iptables-masquerade-bit", Integer, &["iptables.masqueradeBit"], "No packet mark is used"),
    flag(
        "iptables-min-sync-period",
        Duration,
        &["iptables.minSyncPeriod", "nftables.minSyncPeriod"],
        "Changes are applied immediately",
    ),
    flag(
        "ipvs-min-sync-period",
        Duration,
        &["ipvs.minSyncPeriod"],
        "Changes are applied immediately",
    ),
    flag("ipvs-scheduler", Text, &["ipvs.scheduler"], "Backends are chosen at random"),
    flag("ipvs-exclude-cidrs", List, &["ipvs.excludeCIDRs"], "IPVS is not used"),
    flag("ipvs-strict-arp", Bool, &["ipvs.strictARP"], "No interface has addresses of Services"),
    flag("ipvs-tcp-timeout", Duration, &["ipvs.tcpTimeout"], "IPVS is not used"),
    flag("ipvs-tcpfin-timeout", Duration, &["ipvs.tcpFinTimeout"], "IPVS is not used"),
    flag("ipvs-udp-timeout", Duration, &["ipvs.udpTimeout"], "IPVS is not used"),
    flag(
        "logging-format",
        Text,
        &["logging.format"],
        "How the log is written to stderr: text or json",
    ),
    flag("log-flush-frequency", Duration, &["logging.flushFrequency"], "The log is not buffered"),
    flag("vmodule", Modules, &["logging.vmodule"], "RUST_LOG sets levels by module"),
    flag(
        "log-text-split-stream",
        Bool,
        &["logging.options.text.splitStream"],
        "The log is written to stderr only",
    ),
    flag(
        "log-text-info-buffer-size",
        Text,
        &["logging.options.text.infoBufferSize"],
        "The log is not buffered",
    ),
    flag(
        "log-json-split-stream",
        Bool,
        &["logging.options.json.splitStream"],
        "The log is written to stderr only",
    ),
    flag(
        "log-json-info-buffer-size",
        Text,
        &["logging.options.json.infoBufferSize"],
        "The log is not buffered",
    ),
];
