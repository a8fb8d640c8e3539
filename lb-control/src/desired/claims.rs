//! Which Service owns an address that several claim: the oldest one, and of two with the same
//! age the one whose name comes first. The order of arrival and what is programmed now do not
//! matter, so that every node decides alike and a restart changes nothing.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use k8s_openapi::jiff::Timestamp;
use lb_common::abi::frontend::FrontendKind;

use super::{Conflict, DesiredFrontend, FrontendAddress};

/// The frontends that each Service claims, and who owns each.
#[derive(Debug, Default)]
pub struct Claims {
    services: HashMap<Arc<str>, (Age, Vec<DesiredFrontend>)>,
    claimants: HashMap<FrontendAddress, Claimants>,
}

/// A Service whose age is not known counts as younger than all others.
type Age = (bool, Option<Timestamp>);

#[derive(Debug)]
struct Claimants {
    owner: Arc<str>,
    /// The Services that claim it too; almost always none.
    #[expect(clippy::box_collection, reason = "8 bytes for each frontend instead of 24")]
    losers: Option<Box<BTreeSet<Arc<str>>>>,
}

impl Claims {
    /// Replaces the claims of a Service, and adds to `affected` the other Services that won or
    /// lost an address by it. Returns its former claims, if they changed.
    pub fn set(
        &mut self,
        service: &Arc<str>,
        created: Option<Timestamp>,
        frontends: Vec<DesiredFrontend>,
        affected: &mut BTreeSet<Arc<str>>,
    ) -> Option<Vec<DesiredFrontend>> {
        let age = (created.is_none(), created);
        let is_same = |held: &(Age, Vec<DesiredFrontend>)| held.0 == age && held.1 == frontends;
        if self.services.get(service).map_or(frontends.is_empty(), is_same) {
            return None;
        }
        let before = self.services.remove(service).map(|(_, held)| held).unwrap_or_default();
        for frontend in &before {
            self.withdraw(service, frontend.at, affected);
        }
        if !frontends.is_empty() {
            self.services.insert(Arc::clone(service), (age, frontends.clone()));
        }
        for frontend in frontends {
            self.claim(service, frontend.at, affected);
        }
        Some(before)
    }

    /// The frontends that a Service claims.
    pub fn of(&self, service: &str) -> &[DesiredFrontend] {
        self.services.get(service).map_or(&[], |(_, frontends)| frontends)
    }

    /// Whether the Service owns the frontend.
    pub fn is_owner(&self, service: &str, frontend: &FrontendAddress) -> bool {
        self.claimants.get(frontend).is_some_and(|claimants| *claimants.owner == *service)
    }

    /// The frontends that the Service claims and does not own. A ClusterIP as a whole is not
    /// reported. A node port that another Service owns on any node is one conflict, however
    /// many addresses it has.
    pub fn conflicts(&self, service: &Arc<str>) -> Vec<Conflict> {
        let Some((_, frontends)) = self.services.get(service) else { return Vec::new() };
        let lost = |frontend: &DesiredFrontend| {
            let owner = &self.claimants.get(&frontend.at)?.owner;
            (owner != service && frontend.at.protocol != 0).then_some((*frontend, owner))
        };
        let lost: Vec<_> = frontends.iter().filter_map(lost).collect();
        let node_port = |at: FrontendAddress, owner| (at.port, at.protocol, owner);
        let of_any_node = lost.iter().filter(|(frontend, _)| frontend.at.is_of_any_node());
        let mut lost_everywhere: HashMap<_, bool> =
            of_any_node.map(|(frontend, owner)| (node_port(frontend.at, *owner), false)).collect();
        lost.iter()
            .filter(|(DesiredFrontend { at, kind, .. }, owner)| {
                if *kind != FrontendKind::NODE_PORT {
                    return true;
                }
                let is_reported = lost_everywhere.get_mut(&node_port(*at, *owner));
                // Of both families and all addresses, only the first of any node is reported.
                is_reported.is_none_or(|is_reported| {
                    at.is_of_any_node() && !std::mem::replace(is_reported, true)
                })
            })
            .map(|(frontend, owner)| Conflict {
                service: Arc::clone(service),
                owner: Arc::clone(owner),
                frontend: frontend.at,
            })
            .collect()
    }

    fn claim(
        &mut self,
        service: &Arc<str>,
        frontend: FrontendAddress,
        affected: &mut BTreeSet<Arc<str>>,
    ) {
        let Some(claimants) = self.claimants.get_mut(&frontend) else {
            let claimants = Claimants { owner: Arc::clone(service), losers: None };
            self.claimants.insert(frontend, claimants);
            return;
        };
        if claimants.owner == *service {
            return;
        }
        let rank =
            |name: &Arc<str>| (self.services.get(name).map(|(age, _)| *age), Arc::clone(name));
        let mut loser = Arc::clone(service);
        if rank(service) < rank(&claimants.owner) {
            affected.insert(Arc::clone(&claimants.owner));
            std::mem::swap(&mut claimants.owner, &mut loser);
        }
        claimants.losers.get_or_insert_default().insert(loser);
    }

    fn withdraw(
        &mut self,
        service: &Arc<str>,
        frontend: FrontendAddress,
        affected: &mut BTreeSet<Arc<str>>,
    ) {
        let Some(claimants) = self.claimants.get_mut(&frontend) else { return };
        if claimants.owner != *service {
            if let Some(losers) = &mut claimants.losers {
                losers.remove(service);
            }
            return;
        }
        let age = |name: &Arc<str>| self.services.get(name).map(|(age, _)| *age);
        let next = claimants
            .losers
            .as_ref()
            .and_then(|losers| losers.iter().min_by_key(|name| (age(name), Arc::clone(name))))
            .cloned();
        match next {
            None => {
                self.claimants.remove(&frontend);
            }
            Some(next) => {
                if let Some(losers) = &mut claimants.losers {
                    losers.remove(&next);
                }
                affected.insert(Arc::clone(&next));
                claimants.owner = next;
            }
        }
    }
}
