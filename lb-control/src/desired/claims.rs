//! Which Service owns an address that several claim. The kind of the claim decides first: a
//! ClusterIP, then a node port, then a load balancer's address, then an external IP, which anybody
//! may write into a Service. Of claims of one kind the oldest Service's wins, and of two with the
//! same age the one whose name comes first. The order of arrival and what is programmed now do not
//! matter, so that every node decides alike and a restart changes nothing.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use k8s_openapi::jiff::Timestamp;
use lb_common::abi::frontend::FrontendKind;

use super::{Conflict, DesiredFrontend, FrontendAddress};
use crate::work;

/// The kinds of claims, the strongest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ClaimKind {
    /// A ClusterIP, which the API server has allocated.
    ClusterIp,
    /// A node port, which the API server has allocated.
    NodePort,
    /// A load balancer's address, which a controller has set in the status.
    LoadBalancer,
    /// An external IP.
    ExternalIp,
}

impl ClaimKind {
    /// What a user calls it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::ClusterIp => "ClusterIP",
            Self::NodePort => "node port",
            Self::LoadBalancer => "load balancer address",
            Self::ExternalIp => "external IP",
        }
    }
}

/// A frontend that a Service wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// The frontend.
    pub frontend: DesiredFrontend,
    /// By what the Service claims it.
    pub kind: ClaimKind,
}

/// The frontends that each Service claims, and who owns each.
#[derive(Debug, Default)]
pub struct Claims {
    /// The claims of each Service, in the order of addresses.
    services: HashMap<Arc<str>, (Age, Vec<Claim>)>,
    claimants: HashMap<FrontendAddress, Claimants>,
}

/// A Service whose age is not known counts as younger than all others.
type Age = (bool, Option<Timestamp>);

/// The strongest claim comes first.
type Rank = (ClaimKind, Age, Arc<str>);

#[derive(Debug)]
struct Claimants {
    owner: Arc<str>,
    /// The Services that claim it too; almost always none.
    #[expect(clippy::box_collection, reason = "8 bytes for each frontend instead of 24")]
    losers: Option<Box<BTreeSet<Rank>>>,
}

impl Claims {
    /// Replaces the claims of a Service, no two of one address, and adds to `affected` the other
    /// Services that won or lost an address by it. Returns its former claims, if they changed.
    pub fn set(
        &mut self,
        service: &Arc<str>,
        created: Option<Timestamp>,
        mut claims: Vec<Claim>,
        affected: &mut BTreeSet<Arc<str>>,
    ) -> Option<Vec<Claim>> {
        let age = (created.is_none(), created);
        claims.sort_unstable_by_key(|claim| claim.frontend.at);
        let (old_age, before) = self.services.remove(service).unwrap_or((age, Vec::new()));
        if old_age == age && before == claims {
            if !before.is_empty() {
                self.services.insert(Arc::clone(service), (age, before));
            }
            return None;
        }
        let kept = |list: &[Claim], claim: &Claim| {
            old_age == age
                && list
                    .binary_search_by_key(&claim.frontend.at, |claim| claim.frontend.at)
                    .is_ok_and(|at| list[at].kind == claim.kind)
        };
        for claim in before.iter().filter(|claim| !kept(&claims, claim)) {
            self.withdraw(service, old_age, claim, affected);
        }
        for claim in claims.iter().filter(|claim| !kept(&before, claim)) {
            self.claim(service, age, claim, affected);
        }
        if !claims.is_empty() {
            self.services.insert(Arc::clone(service), (age, claims));
        }
        Some(before)
    }

    /// What a Service claims, in the order of addresses.
    pub fn of(&self, service: &str) -> &[Claim] {
        self.services.get(service).map_or(&[], |(_, claims)| claims)
    }

    /// Whether the Service owns the frontend.
    pub fn is_owner(&self, service: &str, frontend: &FrontendAddress) -> bool {
        self.claimants.get(frontend).is_some_and(|claimants| *claimants.owner == *service)
    }

    /// The frontends that the Service claims and does not own. An address as a whole is not
    /// reported. A node port that another Service owns on any node is one conflict, however
    /// many addresses it has.
    pub fn conflicts(&self, service: &Arc<str>) -> Vec<Conflict> {
        let Some((_, claims)) = self.services.get(service) else { return Vec::new() };
        let lost = |claim: &Claim| {
            let owner = &self.claimants.get(&claim.frontend.at)?.owner;
            (owner != service && claim.frontend.at.protocol != 0).then_some((
                claim.frontend,
                claim.kind,
                owner,
            ))
        };
        let lost: Vec<_> = claims.iter().filter_map(lost).collect();
        let node_port = |at: FrontendAddress, owner| (at.port, at.protocol, owner);
        let of_any_node = lost.iter().filter(|(frontend, ..)| frontend.at.is_of_any_node());
        let mut lost_everywhere: HashMap<_, bool> = of_any_node
            .map(|(frontend, _, owner)| (node_port(frontend.at, *owner), false))
            .collect();
        lost.iter()
            .filter(|(DesiredFrontend { at, kind, .. }, _, owner)| {
                if *kind != FrontendKind::NODE_PORT {
                    return true;
                }
                let is_reported = lost_everywhere.get_mut(&node_port(*at, *owner));
                // Of both families and all addresses, only the first of any node is reported.
                is_reported.is_none_or(|is_reported| {
                    at.is_of_any_node() && !std::mem::replace(is_reported, true)
                })
            })
            .map(|(frontend, kind, owner)| Conflict {
                service: Arc::clone(service),
                owner: Arc::clone(owner),
                frontend: frontend.at,
                stronger: self.kind_of(owner, &frontend.at).filter(|of_owner| of_owner < kind),
            })
            .collect()
    }

    /// By what a Service claims an address.
    fn kind_of(&self, service: &str, at: &FrontendAddress) -> Option<ClaimKind> {
        let (_, claims) = self.services.get(service)?;
        let position = claims.binary_search_by_key(at, |claim| claim.frontend.at).ok()?;
        Some(claims[position].kind)
    }

    /// The rank of the owner of an address.
    fn rank_of(&self, owner: &Arc<str>, at: &FrontendAddress) -> Option<Rank> {
        let (age, _) = self.services.get(owner)?;
        Some((self.kind_of(owner, at)?, *age, Arc::clone(owner)))
    }

    fn claim(
        &mut self,
        service: &Arc<str>,
        age: Age,
        claim: &Claim,
        affected: &mut BTreeSet<Arc<str>>,
    ) {
        work::count(1);
        let at = claim.frontend.at;
        let Some(claimants) = self.claimants.get(&at) else {
            let claimants = Claimants { owner: Arc::clone(service), losers: None };
            self.claimants.insert(at, claimants);
            return;
        };
        let own = (claim.kind, age, Arc::clone(service));
        let (of_owner, owner) = (self.rank_of(&claimants.owner, &at), Arc::clone(&claimants.owner));
        let Some(claimants) = self.claimants.get_mut(&at) else { return };
        let loser = match of_owner {
            Some(of_owner) if of_owner < own => own,
            of_owner => {
                claimants.owner = Arc::clone(service);
                affected.insert(owner);
                let Some(of_owner) = of_owner else { return };
                of_owner
            }
        };
        claimants.losers.get_or_insert_default().insert(loser);
    }

    fn withdraw(
        &mut self,
        service: &Arc<str>,
        age: Age,
        claim: &Claim,
        affected: &mut BTreeSet<Arc<str>>,
    ) {
        work::count(1);
        let Some(claimants) = self.claimants.get_mut(&claim.frontend.at) else { return };
        if claimants.owner != *service {
            if let Some(losers) = &mut claimants.losers {
                losers.remove(&(claim.kind, age, Arc::clone(service)));
            }
            return;
        }
        match claimants.losers.as_mut().and_then(|losers| losers.pop_first()) {
            None => {
                self.claimants.remove(&claim.frontend.at);
            }
            Some((.., next)) => {
                affected.insert(Arc::clone(&next));
                claimants.owner = next;
            }
        }
    }
}
