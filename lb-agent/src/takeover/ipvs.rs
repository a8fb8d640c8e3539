//! What kube-proxy's mode ipvs leaves besides rules: virtual servers, ipsets and a device that
//! has the ClusterIPs.
//!
//! A virtual server is kube-proxy's if its address is on that device, or if its port is in one
//! of kube-proxy's sets of NodePorts. Other virtual servers stay.

use std::net::{IpAddr, SocketAddr};

use nix::{ifaddrs::getifaddrs, net::if_::if_nametoindex};

use super::{
    Leftover, Mode,
    tool::{self, ToolError},
};

const DEVICE: &str = "kube-ipvs0";
/// The prefix of the names of kube-proxy's sets; those for IPv6 have `6-` after it.
const SET: &str = "KUBE-";
/// The rest of the names; a suffix may follow.
const SETS: [&str; 7] = [
    "LOOP-BACK",
    "CLUSTER-IP",
    "EXTERNAL-IP",
    "LOAD-BALANCER",
    "NODE-PORT",
    "HEALTH-CHECK-NODE-PORT",
    "IPVS-IPS",
];

/// What was found before any rule is removed.
#[derive(Debug, Default)]
pub(super) struct Found {
    has_device: bool,
    /// In the form of `ipvsadm`: `-t 10.96.0.1:443`.
    servers: Vec<String>,
    sets: Vec<String>,
}

impl Found {
    /// Lists servers and sets; nothing is found if the device does not exist.
    ///
    /// # Errors
    /// [`ToolError`] if a tool is missing or fails.
    pub(super) fn list() -> Result<Self, ToolError> {
        if if_nametoindex(DEVICE).is_err() {
            return Ok(Self::default());
        }
        let listed = tool::run("ipset", &["list", "-name"], "")?;
        let sets: Vec<String> =
            listed.lines().filter(|name| is_set(name)).map(str::to_owned).collect();
        let mut node_ports = Vec::new();
        for set in sets.iter().filter(|name| name.contains("NODE-PORT")) {
            node_ports.extend(ports(&tool::run("ipset", &["save", set], "")?));
        }
        let saved = tool::run("ipvsadm", &["--save", "--numeric"], "")?;
        let servers = servers(&saved, &addresses(), &node_ports);
        Ok(Self { has_device: true, servers, sets })
    }

    /// Describes what was found, and removes it with [`Mode::Remove`].
    ///
    /// # Errors
    /// [`ToolError`] if a tool is missing or fails.
    pub(super) fn go_through(self, mode: Mode) -> Result<Vec<Leftover>, ToolError> {
        if !self.has_device {
            return Ok(Vec::new());
        }
        if mode == Mode::Remove {
            for server in &self.servers {
                let (kind, at) = server.split_once(' ').unwrap_or_default();
                tool::run("ipvsadm", &["--delete-service", kind, at], "")?;
            }
            for set in &self.sets {
                tool::run("ipset", &["destroy", set], "")?;
            }
            tool::run("ip", &["link", "delete", DEVICE], "")?;
        }
        let (servers, sets) = (self.servers.len(), self.sets.len());
        Ok(vec![Leftover {
            place: "ipvs".to_owned(),
            what: format!("{servers} virtual servers, {sets} sets, device {DEVICE}"),
            kept: Vec::new(),
        }])
    }
}

fn is_set(name: &str) -> bool {
    let Some(rest) = name.strip_prefix(SET) else { return false };
    let rest = rest.strip_prefix("6-").unwrap_or(rest);
    SETS.iter()
        .any(|set| rest.strip_prefix(set).is_some_and(|end| end.is_empty() || end.starts_with('-')))
}

/// The addresses of kube-proxy's device.
fn addresses() -> Vec<IpAddr> {
    let all = getifaddrs().into_iter().flatten();
    let own = all.filter(|entry| entry.interface_name == DEVICE).filter_map(|entry| entry.address);
    own.filter_map(|address| {
        let v4 = address.as_sockaddr_in().map(|v4| v4.ip().into());
        v4.or_else(|| address.as_sockaddr_in6().map(|v6| v6.ip().into()))
    })
    .collect()
}

/// The ports in a set, from the output of `ipset save`: `add KUBE-NODE-PORT-TCP 30080`.
fn ports(saved: &str) -> Vec<u16> {
    let members = saved.lines().filter_map(|line| line.strip_prefix("add ")?.split(' ').nth(1));
    members
        .filter_map(|member| {
            let port = member.rsplit(',').next().unwrap_or(member);
            port.rsplit(':').next().unwrap_or(port).parse().ok()
        })
        .collect()
}

/// kube-proxy's virtual servers in the output of `ipvsadm --save`.
fn servers(saved: &str, addresses: &[IpAddr], node_ports: &[u16]) -> Vec<String> {
    let is_kube_proxys = |server: &&str| {
        let at = server.split(' ').nth(1).and_then(|at| at.parse::<SocketAddr>().ok());
        at.is_some_and(|at| addresses.contains(&at.ip()) || node_ports.contains(&at.port()))
    };
    let added = saved.lines().filter_map(|line| line.strip_prefix("-A "));
    let named = added.filter_map(|line| line.split(" -s ").next());
    named.filter(is_kube_proxys).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_servers_and_sets_of_kube_proxy_are_found() {
        let saved = "-A -t 10.96.0.1:443 -s rr\n\
                     -a -t 10.96.0.1:443 -r 172.18.0.2:6443 -m -w 1\n\
                     -A -u [fd00:10:96::a]:53 -s rr\n\
                     -A -t 172.18.0.11:30080 -s rr -p 10800\n\
                     -A -t 172.18.0.11:8443 -s rr\n\
                     -A -f 7 -s rr\n";
        let addresses = ["10.96.0.1", "fd00:10:96::a"].map(|ip| ip.parse().expect("an address"));
        let found = servers(saved, &addresses, &[30_080]);
        let expected = ["-t 10.96.0.1:443", "-u [fd00:10:96::a]:53", "-t 172.18.0.11:30080"];
        assert_eq!(found, expected);
        let names = ["KUBE-CLUSTER-IP", "KUBE-6-NODE-PORT-TCP", "KUBE-MINE", "KUBER", "mine"];
        assert_eq!(names.map(is_set), [true, true, false, false, false]);
        let saved = "create KUBE-NODE-PORT-TCP bitmap:port range 0-65535\n\
                     add KUBE-NODE-PORT-TCP 30080\n\
                     add KUBE-NODE-PORT-SCTP-HASH 172.18.0.11,sctp:30081\n";
        assert_eq!(ports(saved), [30_080, 30_081]);
    }
}
