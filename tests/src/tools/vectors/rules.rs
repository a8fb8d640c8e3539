//! What lb must do with a first packet: kube-proxy's answer, changed by the rules in which lb
//! differs on purpose ("ours" in docs/semantics.md). A rule sees the client, the destination,
//! and the place of the endpoints; it never sees a name. Where a rule decides, the file must have
//! the answer that kube-proxy gives ([`kube_proxy`]): a wrong one is never replaced unnoticed.

use std::collections::BTreeSet;
use std::fmt;
use std::net::SocketAddr;

use anyhow::{Result, bail, ensure};
use k8s_openapi::api::core::v1::{Service, ServicePort};

use super::format::{Flow, Protocol, Verdict};
use super::kube_proxy::{self, Answer, is_in_ranges};
use super::outcome::{Decided, Outcome, Refusal, Source};
use super::view::{Client, Endpoints, Frontend, View, is_local};

/// A rule by which lb's answer may differ from kube-proxy's. The number is that of the row in
/// docs/semantics.md.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Rule {
    /// 3.2
    Hairpin,
    /// 3.4
    Pod,
    /// 3.4b
    OtherPod,
    /// 3.5
    Client,
    /// 3.9
    Loopback,
    /// 3.10
    Routed,
    /// 3.14
    Sctp,
    /// 4.1
    Reset,
    /// 4.3 and 4.4
    AtConnect,
    /// 4.5
    OtherPort,
    /// 4.6
    ServiceCidr,
    /// 4.10
    Returning,
    /// 5.2
    Primary,
}

impl fmt::Display for Rule {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Sctp => "3.14  SCTP is refused",
            Self::Hairpin => {
                "3.2   a pod that reaches itself sees the node, other backends see the pod"
            }
            Self::Pod => "3.4   a pod keeps its address and gets the cluster set",
            Self::OtherPod => {
                "3.4b  a pod of another node gets what a client outside gets at a node port, and keeps its \
                 address if the backend is on this node"
            }
            Self::Client => {
                "3.5   a client outside keeps its address if the backend is on this node"
            }
            Self::Loopback => "3.9   node ports are served on loopback addresses, IPv6 and UDP too",
            Self::Routed => {
                "3.10  a client outside that calls a ClusterIP keeps its address if the backend is \
                 on this node"
            }
            Self::Reset => "4.1   TCP is rejected with a reset",
            Self::OtherPort => "4.5   a port of a live ClusterIP that no Service has is rejected",
            Self::ServiceCidr => {
                "4.6   a packet to a ClusterIP that no Service has never leaves the node"
            }
            Self::Returning => {
                "4.10  a packet to another port of an external address never returns to its router"
            }
            Self::AtConnect => "4.3   connect() fails where a packet would be dropped",
            Self::Primary => "5.2   node ports are served on the primary address by default",
        })
    }
}

/// The outcome that a first packet must have.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Expect {
    /// It goes to one of these endpoints, and over enough flows to each of them.
    To(Vec<(SocketAddr, Source)>),
    /// Anything else.
    Only(Outcome),
}

impl Expect {
    /// The outcomes that are allowed; each must be seen.
    pub fn outcomes(&self) -> Vec<Outcome> {
        match self {
            Self::Only(outcome) => vec![*outcome],
            Self::To(endpoints) => {
                endpoints.iter().map(|(to, source)| Outcome::To(*to, *source)).collect()
            }
        }
    }

    /// Compares the outcomes of several first packets with the allowed ones.
    ///
    /// # Errors
    /// One is not allowed, or an allowed one is not among them.
    pub fn judge(&self, seen: &[Outcome]) -> Result<()> {
        let allowed = self.outcomes();
        if let Some(got) = seen.iter().find(|got| !allowed.contains(got)) {
            bail!("got {got}");
        }
        let missing = allowed.iter().filter(|outcome| !seen.contains(outcome));
        let missing: Vec<String> = missing.map(ToString::to_string).collect();
        ensure!(missing.is_empty(), "never seen: {}", missing.join(", "));
        Ok(())
    }
}

/// The outcome that a first packet must have, and the rules that make it differ from
/// kube-proxy's answer.
#[derive(Clone, Debug)]
pub struct Expected {
    /// The outcome.
    pub what: Expect,
    /// The rules; none if kube-proxy does the same.
    pub rules: BTreeSet<Rule>,
}

/// What lb must do with the first packet of a flow.
///
/// # Errors
/// The file's answer contradicts itself, or differs from docs/semantics.md and no rule explains
/// the difference.
pub fn expect(view: View<'_>, flow: &Flow) -> Result<Expected> {
    let given = given(flow)?;
    let theirs = kube_proxy::answer(view, flow);
    let client = view.client(flow.source_ip);
    let case = Case { view, flow, client, frontend: view.frontend(flow), theirs };
    let mut rules = BTreeSet::new();
    let mut decided = given.clone();
    if let Some((rule, own)) = case.own_decision() {
        case.check_verdict(rule, &given)?;
        case.check_masquerade(Some(rule))?;
        if own != given {
            rules.insert(rule);
            decided = own;
        }
    }
    let what = match decided {
        Decided::To(endpoints) => Expect::To(case.sources(&endpoints, &mut rules)?),
        Decided::Refused => Expect::Only(Outcome::Refused(case.refusal(&mut rules))),
        Decided::Dropped => Expect::Only(Outcome::Dropped),
        Decided::Denied => Expect::Only(Outcome::Denied),
        Decided::Untouched => Expect::Only(Outcome::Untouched),
    };
    Ok(Expected { what, rules })
}

/// The verdict of a file.
///
/// # Errors
/// It contradicts itself.
pub fn given(flow: &Flow) -> Result<Decided> {
    let endpoints = flow.expect.dnat.iter().flatten().copied().collect::<BTreeSet<_>>();
    Ok(match flow.expect.result {
        Verdict::Dnat if endpoints.is_empty() => bail!("the file says DNAT, but names no endpoint"),
        Verdict::Dnat => Decided::To(endpoints),
        _ if !endpoints.is_empty() => bail!("the file names endpoints, but does not say DNAT"),
        _ if flow.expect.masquerade => bail!("the file says masquerade, but does not say DNAT"),
        Verdict::Reject => Decided::Refused,
        Verdict::Drop => Decided::Dropped,
        Verdict::Accept | Verdict::None => Decided::Untouched,
    })
}

/// A flow, its client and its frontend, and kube-proxy's answer to it.
struct Case<'a> {
    view: View<'a>,
    flow: &'a Flow,
    client: Client,
    frontend: Frontend<'a>,
    theirs: Answer,
}

impl Case<'_> {
    /// The file must have kube-proxy's verdict where a rule replaces it.
    fn check_verdict(&self, rule: Rule, given: &Decided) -> Result<()> {
        ensure!(
            *given == self.theirs.decided,
            "the file says {given}; kube-proxy's answer is {}, from which rule {rule} starts",
            self.theirs.decided
        );
        Ok(())
    }

    /// The file must say whether kube-proxy masquerades where the source that lb shows does not
    /// depend on it.
    fn check_masquerade(&self, rule: Option<Rule>) -> Result<()> {
        let (given, theirs) = (self.flow.expect.masquerade, self.theirs.masquerades);
        let from = rule.map_or_else(String::new, |rule| format!(", from which rule {rule} starts"));
        ensure!(
            given == theirs,
            "the file says masquerade {given}; kube-proxy's is {theirs}{from}"
        );
        Ok(())
    }

    /// What docs/semantics.md says where lb may differ from kube-proxy's answer.
    fn own_decision(&self) -> Option<(Rule, Decided)> {
        let theirs = &self.theirs.decided;
        let to = self.flow.dest_ip;
        match self.frontend {
            Frontend::OtherProtocol => Some((Rule::Sctp, Decided::Refused)),
            Frontend::OtherPort => Some((Rule::OtherPort, Decided::Refused)),
            Frontend::ServiceCidr => Some((Rule::ServiceCidr, Decided::Dropped)),
            Frontend::Other if self.flow.protocol == Protocol::Sctp => {
                Some((Rule::Sctp, Decided::Untouched))
            }
            Frontend::Other if self.client == Client::Outside && self.view.is_routed_here(to) => {
                Some((Rule::Returning, Decided::Dropped))
            }
            Frontend::NodePort(service, port) if to.is_loopback() => {
                let served = self.view.serves_node_ports_at(to);
                let own = if served { self.cluster(service, port) } else { Decided::Untouched };
                Some((Rule::Loopback, own))
            }
            Frontend::NodePort(..) if !self.view.serves_node_ports_at(to) => {
                Some((Rule::Primary, Decided::Untouched))
            }
            Frontend::External { service, is_ranged: true, .. }
                if *theirs == Decided::Dropped && !is_in_ranges(service, self.flow.source_ip) =>
            {
                self.is_at_connect().then(|| self.denied_at_connect(service)).flatten()
            }
            Frontend::NodePort(service, port)
                if self.client == Client::OtherPod && self.is_external_local() =>
            {
                let set = self.view.local_set(service, port, self.flow.dest_ip);
                let has_other = !self.view.cluster_set(service, port, self.flow.dest_ip).is_empty();
                let own = match (set.is_empty(), has_other) {
                    (true, true) => Decided::Dropped,
                    (true, false) => Decided::Refused,
                    (false, _) => Decided::To(set.into_iter().collect()),
                };
                Some((Rule::OtherPod, own))
            }
            Frontend::NodePort(service, port) | Frontend::External { service, port, .. }
                if matches!(self.client, Client::Pod | Client::OtherPod) =>
            {
                let is_own = self.client == Client::Pod;
                let rule = if is_own { Rule::Pod } else { Rule::OtherPod };
                Some((rule, self.cluster(service, port)))
            }
            Frontend::ClusterIp(service, port)
                if *theirs == Decided::Dropped && self.is_at_connect() =>
            {
                let to = self.flow.dest_ip;
                let is_local = is_local(service, |spec| spec.internal_traffic_policy.as_deref());
                let has_none = self.view.local_set(service, port, to).is_empty();
                (is_local && has_none).then_some((Rule::AtConnect, Decided::Refused))
            }
            _ => None,
        }
    }

    /// Whether the destination is chosen at connect(), which can then fail.
    fn is_at_connect(&self) -> bool {
        self.client == Client::Node
            && self.flow.protocol == Protocol::Tcp
            && !self.flow.dest_ip.is_loopback()
    }

    /// A process is judged by its node's address, because its own is not known yet.
    fn denied_at_connect(&self, service: &Service) -> Option<(Rule, Decided)> {
        let node = self.view.primary(self.flow.dest_ip)?;
        (!is_in_ranges(service, node)).then_some((Rule::AtConnect, Decided::Denied))
    }

    fn cluster(&self, service: &Service, port: &ServicePort) -> Decided {
        let endpoints: Endpoints = self.view.cluster_set(service, port, self.flow.dest_ip);
        match endpoints.is_empty() {
            true => Decided::Refused,
            false => Decided::To(endpoints.into_iter().collect()),
        }
    }

    /// The source that each endpoint sees.
    fn sources(
        &self,
        endpoints: &BTreeSet<SocketAddr>,
        rules: &mut BTreeSet<Rule>,
    ) -> Result<Vec<(SocketAddr, Source)>> {
        let mut found = Vec::new();
        let given = if self.flow.expect.masquerade { Source::Node } else { Source::Kept };
        // If the file says something else than DNAT, another rule has changed the answer already.
        let is_given = self.flow.expect.result == Verdict::Dnat;
        let reaches_itself = endpoints.iter().any(|endpoint| endpoint.ip() == self.flow.source_ip);
        for endpoint in endpoints {
            let (source, rule) = self.source(*endpoint);
            if is_given && (rule.is_some() || reaches_itself || self.client == Client::Node) {
                self.check_masquerade(rule)?;
            }
            match rule {
                _ if source == given || self.client == Client::Node || !is_given => {}
                Some(rule) => drop(rules.insert(rule)),
                // The file has one answer for all endpoints.
                None if reaches_itself => drop(rules.insert(Rule::Hairpin)),
                None => bail!(
                    "the file says that {endpoint} sees {given}; docs/semantics.md says {source}, \
                     and no rule of lb's own explains the difference"
                ),
            }
            found.push((*endpoint, source));
        }
        Ok(found)
    }

    /// The source that an endpoint sees, and the rule by which that may differ from kube-proxy.
    fn source(&self, endpoint: SocketAddr) -> (Source, Option<Rule>) {
        let is_here = self.view.is_here(endpoint.ip());
        let is_internal = matches!(self.frontend, Frontend::ClusterIp(..));
        let masquerades_all = self.view.node().masquerade_all == Some(true);
        let here = if is_here { Source::Kept } else { Source::Node };
        match self.client {
            Client::Node => (Source::Node, None),
            Client::Pod if endpoint.ip() == self.flow.source_ip => {
                (Source::Node, Some(Rule::Hairpin))
            }
            _ if is_internal && masquerades_all => (Source::Node, None),
            Client::Pod if is_internal => (Source::Kept, None),
            Client::Pod => (Source::Kept, Some(Rule::Pod)),
            Client::OtherPod => (here, Some(Rule::OtherPod)),
            Client::Outside if is_internal => (here, Some(Rule::Routed)),
            Client::Outside if self.is_external_local() => (Source::Kept, None),
            Client::Outside => (here, is_here.then_some(Rule::Client)),
        }
    }

    fn is_external_local(&self) -> bool {
        let (Frontend::NodePort(service, _) | Frontend::External { service, .. }) = self.frontend
        else {
            return false;
        };
        is_local(service, |spec| spec.external_traffic_policy.as_deref())
    }

    /// How the client is rejected.
    fn refusal(&self, rules: &mut BTreeSet<Rule>) -> Refusal {
        match self.flow.protocol {
            _ if self.client == Client::Node => Refusal::Connection,
            Protocol::Tcp => {
                rules.insert(Rule::Reset);
                Refusal::Reset
            }
            Protocol::Udp => Refusal::PortUnreachable,
            Protocol::Sctp => Refusal::ProtocolUnreachable,
        }
    }
}
