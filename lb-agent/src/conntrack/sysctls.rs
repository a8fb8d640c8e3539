//! Sets the conntrack sysctls of the node as kube-proxy does. Other traffic of the node depends on
//! them, and so do the timeouts of lb's flows.
//!
//! Invariant: a sysctl that the configuration does not set is never written, and a failed write
//! never stops the agent.

use std::{
    fs,
    path::{Path, PathBuf},
};

use nix::unistd::{SysconfVar, sysconf};

use crate::kube_proxy::{Conntrack, values::Duration};

/// `/proc/sys/net` of the network namespace of the process.
const SYSCTLS: &str = "/proc/sys/net/netfilter";
/// The hash size of the whole machine. Only the initial network namespace can write it.
const HASH_SIZE: &str = "/sys/module/nf_conntrack/parameters/hashsize";

/// The sysctl that only the initial network namespace can write.
const MAX: &str = "nf_conntrack_max";
/// kube-proxy's maximum of a limit that is computed from the number of CPUs.
const MOST_BY_CORES: u64 = 1 << 20;

/// A sysctl and its configured value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Wanted {
    name: &'static str,
    value: u64,
}

/// Writes the sysctls of the configuration that differ from the kernel's.
pub fn apply(conntrack: &Conntrack) {
    let cores = sysconf(SysconfVar::_NPROCESSORS_ONLN).ok().flatten();
    let cores = cores.and_then(|cores| u64::try_from(cores).ok()).unwrap_or(1);
    if !Path::new(SYSCTLS).join(MAX).exists() {
        tracing::info!(
            "nf_conntrack is not available here: conntrack.* of the configuration is not applied"
        );
        return;
    }
    for wanted in wanted(conntrack, cores) {
        let path = Path::new(SYSCTLS).join(wanted.name);
        let is_set = set(&path, wanted.value);
        if wanted.name == MAX && is_set {
            enlarge_hash(wanted.value);
        }
    }
}

/// The sysctls of the configuration on a machine with this number of CPUs.
fn wanted(conntrack: &Conntrack, cores: u64) -> Vec<Wanted> {
    let seconds =
        |timeout: Option<Duration>| timeout.map_or(0, |Duration(timeout)| timeout.as_secs());
    let all = [
        (MAX, max(conntrack, cores)),
        ("nf_conntrack_tcp_timeout_established", seconds(conntrack.tcp_established_timeout)),
        ("nf_conntrack_tcp_timeout_close_wait", seconds(conntrack.tcp_close_wait_timeout)),
        ("nf_conntrack_tcp_be_liberal", conntrack.tcp_be_liberal.into()),
        ("nf_conntrack_udp_timeout", seconds(Some(conntrack.udp_timeout))),
        ("nf_conntrack_udp_timeout_stream", seconds(Some(conntrack.udp_stream_timeout))),
    ];
    let all = all.into_iter().map(|(name, value)| Wanted { name, value });
    all.filter(|wanted| wanted.value > 0).collect()
}

fn max(conntrack: &Conntrack, cores: u64) -> u64 {
    let number = |number: Option<i32>| number.and_then(|number| u64::try_from(number).ok());
    match number(conntrack.max_per_core) {
        None | Some(0) => 0,
        Some(each) if each * cores > MOST_BY_CORES => MOST_BY_CORES,
        Some(each) => (each * cores).max(number(conntrack.min).unwrap_or(0)),
    }
}

/// Writes the value if necessary. Returns whether the sysctl has it now.
fn set(path: &Path, value: u64) -> bool {
    if read(path) == Some(value) {
        return true;
    }
    match fs::write(path, value.to_string()) {
        Ok(()) => {
            tracing::info!(path = %path.display(), value, "sysctl set");
            true
        }
        Err(error) => {
            let path = path.display();
            tracing::warn!(
                %path,
                value,
                %error,
                "cannot set sysctl: it keeps its value (this needs root, and nf_conntrack_max the \
                 initial network namespace)"
            );
            false
        }
    }
}

/// Enlarges the hash table to at least one bucket for four connections.
fn enlarge_hash(max: u64) {
    let path = PathBuf::from(HASH_SIZE);
    let buckets = max / 4;
    if read(&path).is_some_and(|now| now < buckets) {
        set(&path, buckets);
    }
}

fn read(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kube_proxy::KubeProxyConfiguration;

    #[track_caller]
    fn check(fields: &str, cores: u64, expected: &[(&str, u64)]) {
        let text = format!(
            "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n\
             conntrack: {fields}"
        );
        let all = KubeProxyConfiguration::parse(&text).expect("it is good");
        let found = wanted(&all.conntrack, cores);
        let found: Vec<_> = found.iter().map(|wanted| (wanted.name, wanted.value)).collect();
        assert_eq!(found, expected, "{fields}");
    }

    const ESTABLISHED: (&str, u64) = ("nf_conntrack_tcp_timeout_established", 86_400);
    const CLOSE_WAIT: (&str, u64) = ("nf_conntrack_tcp_timeout_close_wait", 3_600);

    #[test]
    fn the_limit_is_by_cores_with_a_minimum_and_a_maximum() {
        let rows = [
            ("{}", 2, 131_072),
            ("{}", 8, 262_144),
            ("{}", 64, 1_048_576),
            ("{min: 2000000}", 64, 1_048_576),
            ("{min: 2000000}", 2, 2_000_000),
            ("{maxPerCore: 100, min: 0}", 3, 300),
        ];
        for (fields, cores, max) in rows {
            check(fields, cores, &[(MAX, max), ESTABLISHED, CLOSE_WAIT]);
        }
        check("{maxPerCore: 0}", 8, &[ESTABLISHED, CLOSE_WAIT]);
    }

    #[test]
    fn a_zero_leaves_a_value_alone_and_null_is_the_default() {
        let none = "{maxPerCore: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}";
        check(none, 2, &[]);
        check("{maxPerCore: 0, tcpEstablishedTimeout: null}", 2, &[ESTABLISHED, CLOSE_WAIT]);
        check(
            "{maxPerCore: 0, tcpEstablishedTimeout: 2h, tcpBeLiberal: true, udpTimeout: 45s, \
             udpStreamTimeout: 2m}",
            2,
            &[
                (ESTABLISHED.0, 7_200),
                CLOSE_WAIT,
                ("nf_conntrack_tcp_be_liberal", 1),
                ("nf_conntrack_udp_timeout", 45),
                ("nf_conntrack_udp_timeout_stream", 120),
            ],
        );
    }
}
