//! What kube-proxy does with a first packet, derived from the objects: the iptables and nftables
//! rules that it writes, as decisions. The rules of lb's own start from it, so that a file that
//! has another answer there is noticed. Of the mode ipvs only the differences that follow from
//! its source are here: no file with its answers was at hand.

use std::net::IpAddr;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::{Service, ServicePort};

use super::format::{DetectLocal, Flow, Proxier};
use super::outcome::Decided;
use super::view::{Frontend, View, balancer_ips, is_local};

/// kube-proxy's answer.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Answer {
    /// The verdict.
    pub decided: Decided,
    /// Whether the packet gets the node's address as its source.
    pub masquerades: bool,
}

/// kube-proxy's answer to the first packet of a flow.
pub fn answer(view: View<'_>, flow: &Flow) -> Answer {
    let case = Case { view, flow };
    match view.frontend_of_any_protocol(flow) {
        Frontend::ClusterIp(service, port) => case.internal(service, port),
        Frontend::NodePort(service, port) if case.serves_node_ports() => {
            case.external(service, port)
        }
        Frontend::External { service, port, is_ranged } => match is_ranged {
            true if case.is_blocked(service, port) => plain(Decided::Dropped),
            _ => case.external(service, port),
        },
        // Only iptables has no rule for a live ClusterIP as a whole.
        Frontend::OtherPort if case.proxier() == Proxier::Iptables => plain(Decided::Untouched),
        Frontend::OtherPort => plain(Decided::Refused),
        Frontend::ServiceCidr if case.proxier() == Proxier::Nftables => plain(Decided::Dropped),
        Frontend::NodePort(..)
        | Frontend::ServiceCidr
        | Frontend::OtherProtocol
        | Frontend::Other => plain(Decided::Untouched),
    }
}

fn plain(decided: Decided) -> Answer {
    Answer { decided, masquerades: false }
}

/// A flow and the objects.
struct Case<'a> {
    view: View<'a>,
    flow: &'a Flow,
}

impl Case<'_> {
    fn proxier(&self) -> Proxier {
        self.view.proxier()
    }

    /// A ClusterIP.
    fn internal(&self, service: &Service, port: &ServicePort) -> Answer {
        let node = self.view.node();
        let masquerades = node.masquerade_all == Some(true)
            || (node.detect_local != DetectLocal::Nohow && !self.is_of_a_pod());
        let is_local = is_local(service, |spec| spec.internal_traffic_policy.as_deref());
        self.to(service, port, is_local, masquerades)
    }

    /// A node port, an address of a load balancer, or an external IP.
    fn external(&self, service: &Service, port: &ServicePort) -> Answer {
        if !is_local(service, |spec| spec.external_traffic_policy.as_deref()) {
            return self.to(service, port, false, true);
        }
        // Pods and processes of the node are not external: they get the cluster set.
        if self.is_of_a_pod() {
            return self.to(service, port, false, false);
        }
        let is_of_node = self.view.is_of_node(self.flow.source_ip);
        self.to(service, port, !is_of_node, is_of_node)
    }

    fn to(
        &self,
        service: &Service,
        port: &ServicePort,
        is_local: bool,
        masquerades: bool,
    ) -> Answer {
        let like = self.flow.dest_ip;
        let all = self.view.cluster_set(service, port, like);
        let set = if is_local { self.view.local_set(service, port, like) } else { all.clone() };
        if set.is_empty() {
            return plain(if all.is_empty() { Decided::Refused } else { Decided::Dropped });
        }
        // A file has one answer for all endpoints, so it is that of the client itself.
        let reaches_itself = set.iter().any(|endpoint| endpoint.ip() == self.flow.source_ip);
        let decided = Decided::To(set.into_iter().collect());
        Answer { decided, masquerades: masquerades || reaches_itself }
    }

    /// Whether `--detect-local-mode` finds that the client is a pod.
    fn is_of_a_pod(&self) -> bool {
        let source = self.flow.source_ip;
        let node = self.view.node();
        let is_of_this_node = !self.view.is_of_node(source)
            && node.pod_cidr.0.iter().any(|prefix| prefix.contains(&source));
        match &node.detect_local {
            DetectLocal::Nohow => false,
            // A file names the prefix of one family alone.
            DetectLocal::Prefix(prefix) if prefix.addr().is_ipv4() != source.is_ipv4() => {
                is_of_this_node
            }
            DetectLocal::Prefix(prefix) => prefix.contains(&source),
            DetectLocal::Interface => is_of_this_node,
        }
    }

    /// Whether node ports are served at the destination. No mode serves `::1`, and only iptables
    /// serves 127.0.0.1.
    fn serves_node_ports(&self) -> bool {
        let (node, to) = (self.view.node(), self.flow.dest_ip);
        let listed = &node.node_port_addresses.0;
        let is_listed = listed.iter().any(|prefix| prefix.contains(&to));
        if to.is_loopback() {
            return self.proxier() == Proxier::Iptables
                && to.is_ipv4()
                && node.localhost_node_ports != Some(false)
                && (listed.is_empty() || is_listed);
        }
        match self.proxier() {
            Proxier::Nftables if listed.is_empty() => self.view.primary(to) == Some(to),
            _ => listed.is_empty() || is_listed,
        }
    }

    /// Whether `loadBalancerSourceRanges` keep the client out. A Service without endpoints
    /// rejects everybody.
    fn is_blocked(&self, service: &Service, port: &ServicePort) -> bool {
        let (source, to) = (self.flow.source_ip, self.flow.dest_ip);
        // A node that holds the load balancer's address calls it from that address.
        let is_own_call = service.spec.as_ref().is_some_and(|spec| {
            balancer_ips(service, spec).any(|ip| ip == source)
                && self.view.primary(to).is_some_and(|node| is_in_ranges(service, node))
        });
        !self.view.cluster_set(service, port, to).is_empty()
            && !is_in_ranges(service, source)
            && !is_own_call
    }
}

/// Whether the source ranges of a Service allow an address; ranges of the other family do not count.
pub fn is_in_ranges(service: &Service, ip: IpAddr) -> bool {
    let spec = service.spec.as_ref();
    let texts = spec.and_then(|spec| spec.load_balancer_source_ranges.as_ref());
    let ranges = texts.into_iter().flatten().filter_map(|text| text.trim().parse::<IpNet>().ok());
    let ranges: Vec<_> = ranges.filter(|range| range.addr().is_ipv4() == ip.is_ipv4()).collect();
    ranges.is_empty() || ranges.iter().any(|range| range.contains(&ip))
}

#[cfg(test)]
mod tests {
    use super::super::format::File;
    use super::super::own_files;
    use super::super::rules::given;
    use super::*;

    #[test]
    fn the_files_of_the_repository_have_these_answers() {
        for path in own_files().expect("files") {
            let file = File::read(&path).expect("a file of vectors");
            for (group, flow) in file.flows() {
                let answer = answer(View::new(group), flow);
                let name = format!("{}: {}", group.id, flow.name);
                assert_eq!(answer.decided, given(flow).expect("an answer"), "{name}");
                assert_eq!(answer.masquerades, flow.expect.masquerade, "{name}");
            }
        }
    }
}
