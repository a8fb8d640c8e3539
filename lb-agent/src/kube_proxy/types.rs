//! The fields, in kube-proxy's order.

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::values::{
    self, Bind, Duration, FlushFrequency, LocalMode, Mode, NodePorts, Quantity, comma, ip,
};

/// The file. An unset field has Go's zero value: 0, empty or absent.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct KubeProxyConfiguration {
    pub(crate) kind: String,
    pub(crate) api_version: String,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) feature_gates: BTreeMap<String, bool>,
    pub(crate) client_connection: ClientConnection,
    pub(crate) logging: Logging,
    pub(crate) hostname_override: String,
    #[serde(with = "ip")]
    pub(crate) bind_address: Option<IpAddr>,
    #[serde(deserialize_with = "Bind::healthz")]
    pub(crate) healthz_bind_address: Bind,
    #[serde(deserialize_with = "Bind::metrics")]
    pub(crate) metrics_bind_address: Bind,
    pub(crate) bind_address_hard_fail: bool,
    pub(crate) enable_profiling: bool,
    pub(crate) show_hidden_metrics_for_version: String,
    pub(crate) mode: Mode,
    pub(crate) iptables: Iptables,
    pub(crate) ipvs: Ipvs,
    pub(crate) nftables: Nftables,
    pub(crate) winkernel: Winkernel,
    pub(crate) detect_local_mode: LocalMode,
    pub(crate) detect_local: DetectLocal,
    #[serde(rename = "clusterCIDR", with = "comma")]
    pub(crate) cluster_cidr: Vec<IpNet>,
    pub(crate) node_port_addresses: NodePorts,
    pub(crate) oom_score_adj: Option<i32>,
    /// Settings of the kernel's connection tracking.
    pub conntrack: Conntrack,
    pub(crate) config_sync_period: Duration,
    pub(crate) port_range: String,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(crate) windows_run_as_service: bool,
    /// The paths of fields that kube-proxy does not have.
    #[serde(skip)]
    pub(crate) unknown: Vec<String>,
}

/// The connection to the API server.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct ClientConnection {
    pub(crate) kubeconfig: String,
    pub(crate) accept_content_types: String,
    pub(crate) content_type: String,
    #[serde(serialize_with = "values::number")]
    pub(crate) qps: f32,
    pub(crate) burst: i32,
}

/// Settings of the log.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Logging {
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) format: String,
    pub(crate) flush_frequency: FlushFrequency,
    pub(crate) verbosity: u32,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) vmodule: Vec<VModule>,
    pub(crate) options: LogOptions,
}

/// The verbosity of one source file.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct VModule {
    pub(crate) file_pattern: String,
    pub(crate) verbosity: u32,
}

/// Options by log format.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct LogOptions {
    pub(crate) text: LogOutput,
    pub(crate) json: LogOutput,
}

/// Options of one log format.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct LogOutput {
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(crate) split_stream: bool,
    pub(crate) info_buffer_size: Quantity,
}

/// Settings of the mode iptables, some of which the mode ipvs uses too.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Iptables {
    pub(crate) masquerade_bit: Option<i32>,
    pub(crate) masquerade_all: bool,
    pub(crate) localhost_node_ports: Option<bool>,
    pub(crate) sync_period: Duration,
    pub(crate) min_sync_period: Duration,
}

/// Settings of the mode ipvs.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Ipvs {
    pub(crate) sync_period: Duration,
    pub(crate) min_sync_period: Duration,
    pub(crate) scheduler: String,
    #[serde(rename = "excludeCIDRs")]
    pub(crate) exclude_cidrs: Option<Vec<String>>,
    #[serde(rename = "strictARP")]
    pub(crate) strict_arp: bool,
    pub(crate) tcp_timeout: Duration,
    pub(crate) tcp_fin_timeout: Duration,
    pub(crate) udp_timeout: Duration,
}

/// Settings of the mode nftables.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Nftables {
    pub(crate) masquerade_bit: Option<i32>,
    pub(crate) masquerade_all: bool,
    pub(crate) sync_period: Duration,
    pub(crate) min_sync_period: Duration,
}

/// Settings for Windows.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Winkernel {
    pub(crate) network_name: String,
    pub(crate) source_vip: String,
    #[serde(rename = "enableDSR")]
    pub(crate) enable_dsr: bool,
    pub(crate) root_hns_endpoint_name: String,
    pub(crate) forward_health_check_vip: bool,
}

/// The interfaces that `detectLocalMode` recognises pods by.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct DetectLocal {
    pub(crate) bridge_interface: String,
    pub(crate) interface_name_prefix: String,
}

/// Settings of the kernel's connection tracking.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct Conntrack {
    pub(crate) max_per_core: Option<i32>,
    pub(crate) min: Option<i32>,
    pub(crate) tcp_established_timeout: Option<Duration>,
    pub(crate) tcp_close_wait_timeout: Option<Duration>,
    pub(crate) tcp_be_liberal: bool,
    pub(crate) udp_timeout: Duration,
    pub(crate) udp_stream_timeout: Duration,
}
