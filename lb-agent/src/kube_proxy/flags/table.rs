//! The table of flags.

use serde_json::{Map, Value};

use super::Flag;
use crate::options::values::{boolean, duration};

/// What the text of a flag is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    Text,
    Bool,
    Integer,
    Number,
    Duration,
    /// A port, of which only 0 means something: no server.
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

    /// The text as the file would have it.
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
                .map_err(|_| "expected a port, or 0 for no server".to_owned())?
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

/// Every flag of kube-proxy that sets a field.
pub static FLAGS: [Flag; 51] = [
    flag(
        "kubeconfig",
        Text,
        &["clientConnection.kubeconfig"],
        "A kubeconfig file [default: in-cluster configuration]",
    ),
    flag(
        "hostname-override",
        Text,
        &["hostnameOverride"],
        "This node's name [default: the host name]",
    ),
    flag(
        "bind-address",
        Text,
        &["bindAddress"],
        "The primary address of this node, for its family [default: that of the Node]",
    ),
    flag(
        "nodeport-addresses",
        List,
        &["nodePortAddresses"],
        "Addresses of NodePorts: CIDRs, or primary: the first InternalIP of each family \
         [default: primary]",
    ),
    flag("cluster-cidr", Text, &["clusterCIDR"], "The addresses of pods, CIDRs with commas"),
    flag(
        "detect-local-mode",
        Text,
        &["detectLocalMode"],
        "How traffic of pods is told from other traffic: ClusterCIDR, NodeCIDR, \
         BridgeInterface or InterfaceNamePrefix [default: ClusterCIDR]",
    ),
    flag(
        "pod-bridge-interface",
        Text,
        &["detectLocal.bridgeInterface"],
        "The bridge of --detect-local-mode BridgeInterface",
    ),
    flag(
        "pod-interface-name-prefix",
        Text,
        &["detectLocal.interfaceNamePrefix"],
        "The prefix of --detect-local-mode InterfaceNamePrefix",
    ),
    flag(
        "masquerade-all",
        Bool,
        &["iptables.masqueradeAll", "nftables.masqueradeAll"],
        "Give every packet to a ClusterIP the node's address as its source",
    ),
    flag(
        "iptables-localhost-nodeports",
        Bool,
        &["iptables.localhostNodePorts"],
        "Serve NodePorts on loopback addresses, for processes of this node [default: true]",
    ),
    flag(
        "healthz-bind-address",
        Text,
        &["healthzBindAddress"],
        "Address of /healthz and /livez; empty: none [default: 0.0.0.0:10256]",
    ),
    flag(
        "metrics-bind-address",
        Text,
        &["metricsBindAddress"],
        "Address of /metrics, /proxyMode and /configz; empty: none [default: 127.0.0.1:10249]",
    ),
    flag("healthz-port", Port, &["healthzBindAddress"], "0: no health server"),
    flag("metrics-port", Port, &["metricsBindAddress"], "0: no metrics server"),
    flag(
        "bind-address-hard-fail",
        Bool,
        &["bindAddressHardFail"],
        "Fail when one of these addresses cannot be bound, instead of trying again",
    ),
    flag(
        "oom-score-adj",
        Integer,
        &["oomScoreAdj"],
        "How readily the kernel kills this process when memory is short [default: -999]",
    ),
    flag(
        "iptables-sync-period",
        Duration,
        &["iptables.syncPeriod", "nftables.syncPeriod"],
        "Half of the time that a change may wait before /healthz answers 503 [default: 30s]",
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
        "nf_conntrack_max for each CPU; 0 leaves it alone [default: 32768]",
    ),
    flag(
        "conntrack-min",
        Integer,
        &["conntrack.min"],
        "The least nf_conntrack_max, however few the CPUs [default: 131072]",
    ),
    flag(
        "conntrack-tcp-timeout-established",
        Duration,
        &["conntrack.tcpEstablishedTimeout"],
        "nf_conntrack_tcp_timeout_established; 0 leaves it alone [default: 24h]",
    ),
    flag(
        "conntrack-tcp-timeout-close-wait",
        Duration,
        &["conntrack.tcpCloseWaitTimeout"],
        "nf_conntrack_tcp_timeout_close_wait; 0 leaves it alone [default: 1h]",
    ),
    flag(
        "conntrack-tcp-be-liberal",
        Bool,
        &["conntrack.tcpBeLiberal"],
        "Set nf_conntrack_tcp_be_liberal",
    ),
    flag(
        "conntrack-udp-timeout",
        Duration,
        &["conntrack.udpTimeout"],
        "nf_conntrack_udp_timeout; 0 leaves it alone [default: 0]",
    ),
    flag(
        "conntrack-udp-timeout-stream",
        Duration,
        &["conntrack.udpStreamTimeout"],
        "nf_conntrack_udp_timeout_stream; 0 leaves it alone [default: 0]",
    ),
    flag("config-sync-period", Duration, &["configSyncPeriod"], "Changes are told as they come"),
    flag("boot-id-file", Text, &[], "Nothing is read from there"),
    flag("machine-id-file", Text, &[], "Nothing is read from there"),
    flag("feature-gates", Gates, &["featureGates"], "There are none here"),
    flag("kube-api-burst", Integer, &["clientConnection.burst"], "Requests are few"),
    flag("kube-api-content-type", Text, &["clientConnection.contentType"], "JSON is spoken"),
    flag("kube-api-qps", Number, &["clientConnection.qps"], "Requests are few"),
    flag("proxy-mode", Text, &["mode"], "The mode is eBPF"),
    flag("profiling", Bool, &["enableProfiling"], "There are no profiles"),
    flag(
        "show-hidden-metrics-for-version",
        Text,
        &["showHiddenMetricsForVersion"],
        "No metric is hidden",
    ),
    flag("iptables-masquerade-bit", Integer, &["iptables.masqueradeBit"], "No packet is marked"),
    flag(
        "iptables-min-sync-period",
        Duration,
        &["iptables.minSyncPeriod", "nftables.minSyncPeriod"],
        "Changes are made at once",
    ),
    flag("ipvs-min-sync-period", Duration, &["ipvs.minSyncPeriod"], "Changes are made at once"),
    flag("ipvs-scheduler", Text, &["ipvs.scheduler"], "Backends are chosen by chance"),
    flag("ipvs-exclude-cidrs", List, &["ipvs.excludeCIDRs"], "IPVS is left alone"),
    flag("ipvs-strict-arp", Bool, &["ipvs.strictARP"], "No interface holds Services' addresses"),
    flag("ipvs-tcp-timeout", Duration, &["ipvs.tcpTimeout"], "IPVS is left alone"),
    flag("ipvs-tcpfin-timeout", Duration, &["ipvs.tcpFinTimeout"], "IPVS is left alone"),
    flag("ipvs-udp-timeout", Duration, &["ipvs.udpTimeout"], "IPVS is left alone"),
    flag("logging-format", Text, &["logging.format"], "The log is text"),
    flag("log-flush-frequency", Duration, &["logging.flushFrequency"], "The log is not buffered"),
    flag("vmodule", Modules, &["logging.vmodule"], "RUST_LOG chooses modules"),
    flag(
        "log-text-split-stream",
        Bool,
        &["logging.options.text.splitStream"],
        "All of the log goes to stderr",
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
        "All of the log goes to stderr",
    ),
    flag(
        "log-json-info-buffer-size",
        Text,
        &["logging.options.json.infoBufferSize"],
        "The log is not buffered",
    ),
];
