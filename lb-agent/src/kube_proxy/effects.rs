//! The fields of kube-proxy's configuration, and whether lb uses or ignores each.
//!
//! docs/kube-proxy.md lists the same and says why a field is ignored; a test compares the two.

/// Whether lb uses a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// lb uses it.
    Used,
    /// lb accepts it, ignores it, and names it in the log if it is set.
    Ignored,
}

use Effect::{Ignored, Used};

/// Every field that can be set.
pub const FIELDS: [(&str, Effect); 60] = [
    ("featureGates", Ignored),
    ("clientConnection.kubeconfig", Used),
    ("clientConnection.acceptContentTypes", Ignored),
    ("clientConnection.contentType", Ignored),
    ("clientConnection.qps", Ignored),
    ("clientConnection.burst", Ignored),
    ("logging.format", Used),
    ("logging.flushFrequency", Ignored),
    ("logging.verbosity", Used),
    ("logging.vmodule", Ignored),
    ("logging.options.text.splitStream", Ignored),
    ("logging.options.text.infoBufferSize", Ignored),
    ("logging.options.json.splitStream", Ignored),
    ("logging.options.json.infoBufferSize", Ignored),
    ("hostnameOverride", Used),
    ("bindAddress", Used),
    ("healthzBindAddress", Used),
    ("metricsBindAddress", Used),
    ("bindAddressHardFail", Used),
    ("enableProfiling", Ignored),
    ("showHiddenMetricsForVersion", Ignored),
    ("mode", Ignored),
    ("iptables.masqueradeBit", Ignored),
    ("iptables.masqueradeAll", Used),
    ("iptables.localhostNodePorts", Used),
    ("iptables.syncPeriod", Used),
    ("iptables.minSyncPeriod", Ignored),
    ("ipvs.syncPeriod", Used),
    ("ipvs.minSyncPeriod", Ignored),
    ("ipvs.scheduler", Ignored),
    ("ipvs.excludeCIDRs", Ignored),
    ("ipvs.strictARP", Ignored),
    ("ipvs.tcpTimeout", Ignored),
    ("ipvs.tcpFinTimeout", Ignored),
    ("ipvs.udpTimeout", Ignored),
    ("nftables.masqueradeBit", Ignored),
    ("nftables.masqueradeAll", Used),
    ("nftables.syncPeriod", Used),
    ("nftables.minSyncPeriod", Ignored),
    ("winkernel.networkName", Ignored),
    ("winkernel.sourceVip", Ignored),
    ("winkernel.enableDSR", Ignored),
    ("winkernel.rootHnsEndpointName", Ignored),
    ("winkernel.forwardHealthCheckVip", Ignored),
    ("detectLocalMode", Used),
    ("detectLocal.bridgeInterface", Ignored),
    ("detectLocal.interfaceNamePrefix", Ignored),
    ("clusterCIDR", Used),
    ("nodePortAddresses", Used),
    ("oomScoreAdj", Used),
    ("conntrack.maxPerCore", Used),
    ("conntrack.min", Used),
    ("conntrack.tcpEstablishedTimeout", Used),
    ("conntrack.tcpCloseWaitTimeout", Used),
    ("conntrack.tcpBeLiberal", Used),
    ("conntrack.udpTimeout", Used),
    ("conntrack.udpStreamTimeout", Used),
    ("configSyncPeriod", Ignored),
    ("portRange", Ignored),
    ("windowsRunAsService", Ignored),
];

/// The effect of a field; a field that is not listed is ignored.
pub(super) fn effect(path: &str) -> Effect {
    FIELDS.iter().find(|(known, _)| *known == path).map_or(Ignored, |(_, effect)| *effect)
}
