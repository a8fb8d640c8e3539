//! What kube-proxy's mode ipvs leaves besides rules: virtual servers, ipsets and a device that
//! has the ClusterIPs.
//!
//! A virtual server is kube-proxy's if its address is on that device, or if its port is in one
//! of kube-proxy's sets of NodePorts. Other virtual servers stay, and so does one that has
//! connections: the kernel drops the packets of a connection whose virtual server is removed.

use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
};

use nix::{ifaddrs::getifaddrs, net::if_::if_nametoindex};

use super::{
    Leftover, Mode,
    tool::{self, ToolError},
};

const DEVICE: &str = "kube-ipvs0";
/// The kernel's list of connections of virtual servers.
const CONNECTIONS: &str = "/proc/thread-self/net/ip_vs_conn";
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
    /// How many TCP connections a server has. Datagrams of a flow have none: lb serves the next.
    connections: BTreeMap<SocketAddr, usize>,
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
        // The file is missing if the module is: then there is no virtual server either.
        let connections = connections(&fs::read_to_string(CONNECTIONS).unwrap_or_default());
        Ok(Self { has_device: true, servers, sets, connections })
    }

    /// Describes what was found, and removes it with [`Mode::Remove`], except servers that have
    /// connections. The device, which holds their addresses, and the sets, by which the next run
    /// finds them, stay as well.
    ///
    /// # Errors
    /// [`ToolError`] if a tool is missing or fails.
    pub(super) fn go_through(self, mode: Mode) -> Result<Vec<Leftover>, ToolError> {
        if !self.has_device {
            return Ok(Vec::new());
        }
        let (servers, sets) = (self.servers.len(), self.sets.len());
        let mut what = format!("{servers} virtual servers, {sets} sets, device {DEVICE}");
        let mut kept = Vec::new();
        if mode == Mode::Remove {
            let (used, unused): (Vec<_>, Vec<_>) =
                self.servers.iter().partition(|server| self.connections_of(server) > 0);
            for server in &unused {
                let (kind, at) = server.split_once(' ').unwrap_or_default();
                tool::run("ipvsadm", &["--delete-service", kind, at], "")?;
            }
            if used.is_empty() {
                for set in &self.sets {
                    tool::run("ipset", &["destroy", set], "")?;
                }
                tool::run("ip", &["link", "delete", DEVICE], "")?;
            } else {
                what = format!("{} virtual servers", unused.len());
                let named = |server: &&String| {
                    format!("{server} ({} connections)", self.connections_of(server))
                };
                kept = used.iter().map(named).collect();
            }
        }
        Ok(vec![Leftover { place: "ipvs".to_owned(), what, kept, because: HAS_CONNECTIONS }])
    }

    fn connections_of(&self, server: &str) -> usize {
        let at = server.split_once(' ').filter(|(kind, _)| *kind == "-t");
        let at = at.and_then(|(_, at)| at.parse().ok());
        at.and_then(|at: SocketAddr| self.connections.get(&at)).copied().unwrap_or(0)
    }
}

/// Why a virtual server stays.
const HAS_CONNECTIONS: &str = "they have connections, which end if they are removed; run the \
                               command again later";

/// The TCP connections of each virtual server, except those that have ended, from
/// `ip_vs_conn`: protocol, client, virtual server, real server, each with its port, and the state.
fn connections(listed: &str) -> BTreeMap<SocketAddr, usize> {
    const ENDED: [&str; 2] = ["TIME_WAIT", "CLOSE"];
    let mut counts = BTreeMap::new();
    for line in listed.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let ["TCP", _, _, ip, port, _, _, state, ..] = words[..] else { continue };
        let address = match ip.contains(':') {
            true => ip.trim_matches(['[', ']']).parse::<IpAddr>().ok(),
            false => u32::from_str_radix(ip, 16).ok().map(|ip| Ipv4Addr::from(ip).into()),
        };
        let (Some(address), Ok(port)) = (address, u16::from_str_radix(port, 16)) else { continue };
        if !ENDED.contains(&state) {
            *counts.entry(SocketAddr::new(address, port)).or_default() += 1;
        }
    }
    counts
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

    #[test]
    fn connections_that_have_not_ended_are_counted_by_server() {
        let listed = "Pro FromIP   FPrt ToIP     TPrt DestIP   DPrt State       Expires PEName PEData\n\
                      TCP 0AF40102 9C40 0A600001 0050 0AF40202 1F90 ESTABLISHED     899\n\
                      TCP 0AF40102 9C41 0A600001 0050 0AF40202 1F90 FIN_WAIT        119\n\
                      TCP 0AF40102 9C42 0A600001 0050 0AF40202 1F90 TIME_WAIT       119\n\
                      UDP 0AF40102 9C43 0A600001 0050 0AF40202 1F90 UDP             299\n\
                      TCP fd00:0010:0244:0001:0000:0000:0000:0002 9C40 \
                      fd00:0010:0096:0000:0000:0000:0000:0001 01BB \
                      fd00:0010:0244:0002:0000:0000:0000:0002 1F90 ESTABLISHED     899\n";
        let expected = [("10.96.0.1:80", 2), ("[fd00:10:96::1]:443", 1)]
            .map(|(at, count)| (at.parse().expect("an address"), count));
        assert_eq!(connections(listed), expected.into());
        let found = Found { connections: connections(listed), ..Found::default() };
        let counts = ["-t 10.96.0.1:80", "-u 10.96.0.1:80", "-t 10.96.0.1:81"];
        assert_eq!(counts.map(|server| found.connections_of(server)), [2, 0, 0]);
    }
}
