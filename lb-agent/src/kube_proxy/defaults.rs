//! kube-proxy's defaults, value by value, so that lb writes the same file as kube-proxy.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{
    API_VERSION, KIND,
    types::KubeProxyConfiguration,
    values::{Bind, DetectLocalMode, Duration, FlushFrequency, LocalMode, Mode},
};
use crate::options::values::{HEALTHZ_PORT, METRICS_PORT};

const SYNC_PERIOD: Duration = Duration::from_secs(30);
const MIN_SYNC_PERIOD: Duration = Duration::from_secs(1);
const CONFIG_SYNC_PERIOD: Duration = Duration::from_secs(15 * 60);
const TCP_ESTABLISHED: Duration = Duration::from_secs(24 * 3600);
const TCP_CLOSE_WAIT: Duration = Duration::from_secs(3600);
const FLUSH_FREQUENCY: Duration = Duration::from_secs(5);

fn set<T: PartialEq + Default>(field: &mut T, default: T) {
    if *field == T::default() {
        *field = default;
    }
}

impl KubeProxyConfiguration {
    /// Fills in fields that are not set.
    pub(super) fn with_defaults(mut self) -> Self {
        set(&mut self.kind, KIND.to_owned());
        set(&mut self.api_version, API_VERSION.to_owned());
        let bind_address = *self.bind_address.get_or_insert(Ipv4Addr::UNSPECIFIED.into());
        let (all, own) = match bind_address {
            IpAddr::V4(_) => (Ipv4Addr::UNSPECIFIED.into(), Ipv4Addr::LOCALHOST.into()),
            IpAddr::V6(_) => (Ipv6Addr::UNSPECIFIED.into(), IpAddr::from(Ipv6Addr::LOCALHOST)),
        };
        set(&mut self.healthz_bind_address, Bind::at(all, HEALTHZ_PORT));
        set(&mut self.metrics_bind_address, Bind::at(own, METRICS_PORT));
        self.oom_score_adj.get_or_insert(-999);
        set(&mut self.config_sync_period, CONFIG_SYNC_PERIOD);
        self.default_modes();
        self.default_conntrack();
        self.default_client_and_log();
        self
    }

    /// Sets the modes that kube-proxy chooses if none is set, and clears the periods of modes
    /// that are not in use, as kube-proxy does before it writes a file.
    pub(super) fn completed(mut self) -> Self {
        set(&mut self.mode, Mode::Iptables);
        set(&mut self.detect_local_mode, LocalMode(Some(DetectLocalMode::ClusterCidr)));
        let Self { mode: chosen, iptables, ipvs, nftables, .. } = &mut self;
        let sections = [
            (Mode::Iptables, &mut iptables.sync_period, &mut iptables.min_sync_period),
            (Mode::Ipvs, &mut ipvs.sync_period, &mut ipvs.min_sync_period),
            (Mode::Nftables, &mut nftables.sync_period, &mut nftables.min_sync_period),
        ];
        for (mode, period, least) in sections {
            if mode != *chosen {
                (*period, *least) = (Duration::default(), Duration::default());
            }
        }
        self
    }

    fn default_modes(&mut self) {
        let Self { iptables, ipvs, nftables, .. } = self;
        for period in [&mut iptables.sync_period, &mut ipvs.sync_period, &mut nftables.sync_period]
        {
            set(period, SYNC_PERIOD);
        }
        for period in [&mut iptables.min_sync_period, &mut nftables.min_sync_period] {
            set(period, MIN_SYNC_PERIOD);
        }
        iptables.localhost_node_ports.get_or_insert(true);
        iptables.masquerade_bit.get_or_insert(14);
        nftables.masquerade_bit.get_or_insert(14);
    }

    fn default_conntrack(&mut self) {
        let conntrack = &mut self.conntrack;
        conntrack.max_per_core.get_or_insert(32 * 1024);
        conntrack.min.get_or_insert(128 * 1024);
        conntrack.tcp_established_timeout.get_or_insert(TCP_ESTABLISHED);
        conntrack.tcp_close_wait_timeout.get_or_insert(TCP_CLOSE_WAIT);
    }

    fn default_client_and_log(&mut self) {
        let client = &mut self.client_connection;
        set(&mut client.content_type, "application/vnd.kubernetes.protobuf".to_owned());
        set(&mut client.qps, 5.0);
        set(&mut client.burst, 10);
        set(&mut self.logging.format, "text".to_owned());
        set(&mut self.logging.flush_frequency, FlushFrequency::Text(FLUSH_FREQUENCY));
    }
}
