//! Which fields have a meaning here. docs/kube-proxy.md says which, and why the others have
//! none; a test holds the page to this list.

use serde_json::Value;

use super::{flags::KubeProxyFlags, types::KubeProxyConfiguration};

/// Whether a field has a meaning here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// It has.
    Used,
    /// It has none: it is accepted, and named in the log where it is set.
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
    ("logging.format", Ignored),
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

/// Whether a field has a meaning here; one that is not known has none.
pub(super) fn effect(path: &str) -> Effect {
    FIELDS.iter().find(|(known, _)| *known == path).map_or(Ignored, |(_, effect)| *effect)
}

impl KubeProxyConfiguration {
    /// The fields that say something else than the defaults and have no meaning here, but
    /// for those that `flags` have set.
    pub fn without_effect(&self, flags: &KubeProxyFlags) -> Vec<&'static str> {
        let defaults = Self::default().with_defaults();
        let defaults = [defaults.to_json(), defaults.completed().to_json()];
        let own = self.to_json();
        let is_default = |path: &&str| {
            let value = at(&own, path);
            // The periods of modes that are not in use are none.
            defaults.iter().any(|default| at(default, path) == value)
                || value.and_then(Value::as_str) == Some("0s")
        };
        let ignored = FIELDS.iter().filter(|(_, effect)| *effect == Ignored);
        let differing = ignored.map(|(path, _)| *path).filter(|path| !is_default(path));
        differing.filter(|path| !flags.sets(path)).collect()
    }
}

fn at<'a>(value: &'a Value, path: &str) -> Option<&'a Value> {
    path.split('.').try_fold(value, |value, name| value.get(name))
}
