//! Rejects values that have the right type but are invalid, alone or in combination.

use super::{
    decode::FieldError,
    types::KubeProxyConfiguration,
    values::{DetectLocalMode, Duration, Mode},
};
use crate::logs::Format;

impl KubeProxyConfiguration {
    /// Checks the rules that types do not express.
    pub(super) fn validate(&self) -> Result<(), FieldError> {
        let bits = [
            ("iptables.masqueradeBit", self.iptables.masquerade_bit, 0..=31),
            ("nftables.masqueradeBit", self.nftables.masquerade_bit, 0..=31),
            ("oomScoreAdj", self.oom_score_adj, -1000..=1000),
        ];
        for (path, value, range) in bits {
            if let Some(value) = value.filter(|value| !range.contains(value)) {
                let (first, last) = range.into_inner();
                return invalid(path, format!("{value} is not between {first} and {last}"));
            }
        }
        let counts = [
            ("conntrack.maxPerCore", self.conntrack.max_per_core),
            ("conntrack.min", self.conntrack.min),
            ("clientConnection.burst", Some(self.client_connection.burst)),
        ];
        for (path, value) in counts {
            if let Some(value) = value.filter(|value| *value < 0) {
                return invalid(path, format!("{value} is negative"));
            }
        }
        let format = &self.logging.format;
        if !format.is_empty() && Format::of_name(format).is_none() {
            return invalid("logging.format", format!("{format:?} is neither text nor json"));
        }
        if self.client_connection.qps.is_nan() {
            return invalid("clientConnection.qps", "NaN is not a number".to_owned());
        }
        self.validate_periods()?;
        self.validate_local_mode()
    }

    fn validate_periods(&self) -> Result<(), FieldError> {
        let (section, period, least) = self.periods();
        if least > period {
            let message = format!("{period} is less than minSyncPeriod, {least}");
            return invalid(&format!("{section}.syncPeriod"), message);
        }
        for (path, period) in [
            (format!("{section}.syncPeriod"), period),
            ("configSyncPeriod".to_owned(), self.config_sync_period),
        ] {
            if period == Duration::default() {
                return invalid(&path, "must be greater than 0".to_owned());
            }
        }
        Ok(())
    }

    fn validate_local_mode(&self) -> Result<(), FieldError> {
        let detect = &self.detect_local;
        let (path, value) = match self.detect_local_mode.0 {
            Some(DetectLocalMode::BridgeInterface) => {
                ("detectLocal.bridgeInterface", &detect.bridge_interface)
            }
            Some(DetectLocalMode::InterfaceNamePrefix) => {
                ("detectLocal.interfaceNamePrefix", &detect.interface_name_prefix)
            }
            Some(DetectLocalMode::ClusterCidr | DetectLocalMode::NodeCidr) | None => return Ok(()),
        };
        if value.is_empty() {
            return invalid(path, "must not be empty with this detectLocalMode".to_owned());
        }
        Ok(())
    }

    /// The section of the mode in use, with its syncPeriod and minSyncPeriod.
    fn periods(&self) -> (&'static str, Duration, Duration) {
        let Self { iptables, ipvs, nftables, .. } = self;
        match self.mode {
            Mode::Unset | Mode::Iptables => {
                ("iptables", iptables.sync_period, iptables.min_sync_period)
            }
            Mode::Ipvs => ("ipvs", ipvs.sync_period, ipvs.min_sync_period),
            Mode::Nftables => ("nftables", nftables.sync_period, nftables.min_sync_period),
        }
    }

    /// The syncPeriod of the mode in use.
    pub(crate) fn sync_period(&self) -> std::time::Duration {
        self.periods().1.0
    }
}

fn invalid(path: &str, message: String) -> Result<(), FieldError> {
    Err(FieldError::new(path, message))
}
