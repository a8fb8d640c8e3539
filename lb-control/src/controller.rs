//! The whole decision of the agent in one type: events in, writes out.
//!
//! It owns no task and no clock. Its caller applies events, and calls
//! [`Controller::reconcile`] after that, when [`Outcome::next_due`] is reached, and, with
//! back-off, when [`Outcome::errors`] is not empty.

mod refused;
mod shortages;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;
use lb_common::abi::settings::Settings;

use crate::{
    dataplane::{Dataplane, DataplaneError},
    desired::{
        self, Conflict, DesiredFrontend, FrontendAddress, Locality, NodeFacts,
        claims::Claims,
        health_checks::{self, Checks},
        no_local_endpoints, settings,
        taken::{self, ApiServers, Holder, Taken},
    },
    execute::execute,
    model::{
        Refusal,
        event::{ObjectEvent, ObjectKind, ObjectName},
    },
    options::{ExternalMode, Limits},
    plan::{Counts, Draft, Map, Op, Planner, Shortage},
    snapshot::{Dirty, Entry, Snapshot, Trigger},
};

use shortages::Shortages;

/// How long entries stay unchanged after they were taken out of use, in milliseconds: far
/// longer than a program works on a packet.
pub const GRACE: u64 = 1_000;

/// After so many failed reconciliations in a row the maps are read again, instead of
/// repeating the same writes for ever.
const MAX_FAILURES: u32 = 16;

/// Keeps the maps up to date with the source of objects.
#[derive(Debug)]
pub struct Controller {
    snapshot: Snapshot,
    /// How clients outside reach backends on other nodes, unless the Service says it.
    external_mode: ExternalMode,
    facts: NodeFacts,
    claims: Claims,
    in_use: settings::InUse,
    /// Absent before the first complete state and after too many failures; the next
    /// reconciliation then adopts the maps.
    planner: Option<Planner>,
    /// Ops of earlier plans that are still to be done.
    unfinished: Vec<Op>,
    /// How many reconciliations in a row left ops undone.
    failures: u32,
    is_everything_dirty: bool,
    /// The addresses of node ports changed.
    are_node_ports_dirty: bool,
    are_settings_dirty: bool,
    /// The addresses that Services cannot have changed.
    are_claims_dirty: bool,
    taken: Taken,
    /// The frontends that each Service wants but cannot have on this node.
    withheld: BTreeMap<Arc<str>, BTreeSet<(FrontendAddress, Holder)>>,
    /// Services that did not fit, to be tried again when there is room.
    shortages: Shortages,
    /// What each Service had lost to others when it was planned last, which is what was reported.
    conflicts: BTreeMap<Arc<str>, Vec<Conflict>>,
    limits: Limits,
    /// Services with more backends than the limit; to the maps they do not exist.
    too_large: BTreeSet<Arc<str>>,
    /// How many addresses of nodes do not fit.
    nodes_left_out: usize,
    health_checks: Checks,
    /// How often they changed.
    health_checks_version: u64,
    no_local_endpoints: no_local_endpoints::Sum,
    /// The causes of changes that are not all in the maps yet.
    triggers: Vec<Trigger>,
}

/// What a reconciliation did.
#[derive(Debug, Default)]
pub struct Outcome {
    /// How many writes it took.
    pub ops: usize,
    /// How many Services were planned.
    pub services: usize,
    /// New refusals, for Warning Events.
    pub refusals: Vec<Refusal>,
    /// Objects of which less is refused than before: [`Controller::refusal_reasons`] has what is
    /// left.
    pub resolved: Vec<(ObjectKind, ObjectName)>,
    /// ClusterIPs that are left, from now on, to a process of this node, with their Services.
    pub left_to_processes: Vec<(Arc<str>, IpAddr)>,
    /// Services that do not fit, since now or for another reason than before.
    pub shortages: Vec<Shortage>,
    /// Services that fit again.
    pub fitting: Vec<Arc<str>>,
    /// How many addresses of nodes do not fit.
    pub nodes_left_out: usize,
    /// The writes that failed.
    pub errors: Vec<DataplaneError>,
    /// The causes of the changes that are in the maps since this call.
    pub triggers: Vec<Trigger>,
    /// When to call again even if nothing happens, on the caller's clock.
    pub next_due: Option<u64>,
}

impl Controller {
    /// A controller for the node of this name. `external_mode` is how clients outside reach
    /// backends on other nodes, unless the Service says it. `expected` are the kinds, beside
    /// Service and EndpointSlice, that the source lists.
    pub fn new(
        node_name: &str,
        external_mode: ExternalMode,
        expected: impl IntoIterator<Item = ObjectKind>,
    ) -> Self {
        Self {
            snapshot: Snapshot::new(node_name, expected),
            external_mode,
            facts: NodeFacts::default(),
            claims: Claims::default(),
            in_use: settings::InUse::default(),
            planner: None,
            unfinished: Vec::new(),
            failures: 0,
            is_everything_dirty: true,
            are_node_ports_dirty: false,
            are_settings_dirty: true,
            are_claims_dirty: false,
            taken: Taken::default(),
            withheld: BTreeMap::new(),
            shortages: Shortages::default(),
            conflicts: BTreeMap::new(),
            limits: Limits::default(),
            too_large: BTreeSet::new(),
            nodes_left_out: 0,
            health_checks: Checks::new(),
            health_checks_version: 0,
            no_local_endpoints: no_local_endpoints::Sum::default(),
            triggers: Vec::new(),
        }
    }

    /// With other limits than the default ones.
    pub fn with_limits(mut self, limits: Limits) -> Self {
        self.snapshot.set_limits(limits);
        self.limits = limits;
        self
    }

    /// Applies a change of the source.
    pub fn apply(&mut self, event: ObjectEvent) {
        self.snapshot.apply(event);
    }

    /// Sets what is known of this node.
    pub fn set_facts(&mut self, facts: NodeFacts) {
        self.is_everything_dirty |= self.facts.addresses != facts.addresses;
        self.are_node_ports_dirty |= self.facts.node_port_addresses != facts.node_port_addresses;
        self.are_claims_dirty |= self.facts.held_addresses != facts.held_addresses
            || self.facts.addresses != facts.addresses
            || self.facts.pod_prefixes != facts.pod_prefixes;
        self.are_settings_dirty |= self.facts != facts;
        self.facts = facts;
    }

    /// Sets the addresses at which this agent looks for API servers.
    pub fn set_api_servers(&mut self, configured: ApiServers) {
        self.are_claims_dirty |= self.taken.set_configured(configured);
    }

    /// What is known of this node.
    pub fn facts(&self) -> &NodeFacts {
        &self.facts
    }

    /// The settings, once something was planned.
    pub fn settings(&self) -> Option<&Settings> {
        self.planner.as_ref().map(Planner::settings)
    }

    /// The state of the source.
    pub fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// No longer waits for a kind, because the source does not serve it.
    pub fn expect_no(&mut self, kind: ObjectKind) {
        self.snapshot.expect_no(kind);
    }

    /// Whether [`Self::reconcile`] has something to do, other than what is due by
    /// [`Outcome::next_due`].
    pub fn has_changes(&self) -> bool {
        self.snapshot.has_changes()
            || self.planner.is_none()
            || self.is_everything_dirty
            || self.are_node_ports_dirty
            || self.are_settings_dirty
            || self.are_claims_dirty
            || !self.unfinished.is_empty()
    }

    /// Whether any Service uses direct server return, for which the addresses of all Nodes are
    /// needed.
    pub fn uses_direct_return(&self) -> bool {
        if self.planner.is_some() {
            return self.in_use.has_direct();
        }
        let services = self.snapshot.names().filter_map(|name| self.snapshot.service(name));
        services
            .filter_map(|entry| entry.service.as_ref())
            .any(|service| desired::is_direct(service, self.external_mode))
    }

    /// How many entries the maps hold.
    pub fn counts(&self) -> Counts {
        self.planner.as_ref().map(Planner::counts).unwrap_or_default()
    }

    /// All Services that do not fit, in the order of their names.
    pub fn shortages(&self) -> impl Iterator<Item = &Shortage> {
        self.shortages.iter()
    }

    /// How many Services do not fit, for each map.
    pub fn shortages_of_maps(&self) -> impl Iterator<Item = (Map, usize)> {
        self.shortages.of_maps()
    }

    /// All conflicts between Services, each with the owner that the address has now. A Service that
    /// waits for an address is not planned again when another waiting one becomes the owner, so its
    /// last Event may name the owner before.
    pub fn conflicts(&self) -> impl Iterator<Item = Conflict> {
        self.conflicts.keys().flat_map(|service| self.claims.conflicts(service))
    }

    /// The health checks that Services ask for, as of the last reconciliation.
    pub fn health_checks(&self) -> &Checks {
        &self.health_checks
    }

    /// How often [`Self::health_checks`] changed.
    pub fn health_checks_version(&self) -> u64 {
        self.health_checks_version
    }

    /// Service ports without an endpoint on this node, as of the last reconciliation.
    pub fn no_local_endpoints(&self) -> &no_local_endpoints::Sum {
        &self.no_local_endpoints
    }

    /// Brings the maps up to date, at `now` in milliseconds on a clock that never goes
    /// back. Does nothing before the first complete state. Fails if the maps cannot be
    /// read; a write that fails is in the outcome, and the next call repeats it.
    pub fn reconcile(
        &mut self,
        now: u64,
        dataplane: &mut impl Dataplane,
    ) -> Result<Outcome, DataplaneError> {
        if !self.snapshot.is_complete() {
            return Ok(Outcome::default());
        }
        let mut planner = match self.planner.take() {
            Some(planner) => planner,
            None => {
                self.is_everything_dirty = true;
                let state = dataplane.read_state()?;
                let mut planner = Planner::adopt(&state, dataplane.capacity(), GRACE);
                planner.set_namespace_share(self.limits.namespace_share);
                planner
            }
        };
        let mut draft = planner.begin();
        if self.unfinished.is_empty() {
            planner.reclaim(&mut draft, now);
        }
        if planner.take_more_room() {
            self.shortages.note_more_room();
        }
        let mode = self.external_mode;
        let dirty = self.snapshot.take_dirty(|service| desired::is_direct(service, mode));
        let mut outcome = Outcome::default();
        let affected = self.affected(&dirty, &planner, &mut outcome);
        outcome.refusals.extend(dirty.refusals);
        outcome.resolved.extend(dirty.resolved);
        self.triggers.extend(dirty.triggers);
        if dirty.nodes || self.is_everything_dirty {
            let addresses = self.snapshot.nodes().addresses().collect();
            self.nodes_left_out = planner.store_nodes(&mut draft, &addresses);
        }
        outcome.nodes_left_out = self.nodes_left_out;
        if std::mem::take(&mut self.are_settings_dirty) || dirty.service_cidrs {
            let prefixes: Vec<IpNet> = self.snapshot.service_cidrs().collect();
            let before = planner.settings();
            let settings = settings::settings(&self.facts, &prefixes, &self.in_use, before);
            self.in_use.set_covered(&settings);
            planner.store_settings(&mut draft, settings);
        }
        outcome.services = affected.len();
        self.plan(&mut planner, &mut draft, &affected, &mut outcome);
        let mut plan = planner.finish(draft);
        if planner.take_more_room() {
            self.shortages.note_more_room();
        }
        outcome.ops = plan.ops.len();
        // Unfinished ops of earlier plans come first, because later ops build on them.
        plan.ops.splice(..0, std::mem::take(&mut self.unfinished));
        let unfinished = execute(plan, dataplane);
        outcome.errors = unfinished.errors;
        self.unfinished = unfinished.ops;
        self.failures = if self.unfinished.is_empty() { 0 } else { self.failures + 1 };
        if self.unfinished.is_empty() {
            outcome.triggers = std::mem::take(&mut self.triggers);
        }
        self.is_everything_dirty = false;
        if self.failures < MAX_FAILURES {
            let retry = self.shortages.is_waiting().then_some(now);
            outcome.next_due = planner.next_due(now).into_iter().chain(retry).min();
            self.planner = Some(planner);
        } else {
            self.failures = 0;
            self.unfinished.clear();
            self.are_settings_dirty = true;
        }
        Ok(outcome)
    }

    /// The Services to plan, in order. Updates their claims and their health checks.
    fn affected(
        &mut self,
        dirty: &Dirty,
        planner: &Planner,
        outcome: &mut Outcome,
    ) -> Vec<Arc<str>> {
        let mut others = BTreeSet::new();
        if self.is_everything_dirty
            || dirty.services.iter().any(|name| **name == *taken::API_SERVER)
        {
            let entry = self.snapshot.service(taken::API_SERVER);
            self.are_claims_dirty |= self.taken.set_api_servers(entry);
        }
        if self.is_everything_dirty || dirty.service_cidrs {
            let prefixes = self.snapshot.service_cidrs();
            self.are_claims_dirty |= self.taken.set_service_cidrs(prefixes);
        }
        if std::mem::take(&mut self.are_claims_dirty) {
            let names: Vec<_> = self.snapshot.names().cloned().collect();
            for name in names {
                if self.claim(&name, &mut others, outcome) {
                    others.insert(name);
                }
            }
        }
        let mut affected: Vec<Arc<str>> = Vec::new();
        if std::mem::take(&mut self.are_node_ports_dirty) {
            let names = self.snapshot.names().filter(|name| self.has_node_ports(name));
            affected.extend(names.cloned());
        }
        for name in affected.iter().chain(&dirty.services) {
            self.count_backends(name, outcome);
            self.claim(name, &mut others, outcome);
            let check = self.served(name).and_then(health_checks::of_service);
            if self.health_checks.get(name) != check.as_ref() {
                self.health_checks_version += 1;
                match check {
                    Some(check) => self.health_checks.insert(Arc::clone(name), check),
                    None => self.health_checks.remove(name),
                };
            }
        }
        affected.extend(others);
        if self.is_everything_dirty || dirty.everything {
            affected.extend(self.snapshot.names().chain(planner.names()).cloned());
        }
        affected.extend(self.shortages.take_some(|shortage| planner.may_fit(shortage)));
        affected.extend(dirty.services.iter().cloned());
        affected.sort_unstable();
        affected.dedup();
        affected
    }

    fn has_node_ports(&self, name: &str) -> bool {
        let service = self.served(name).and_then(|entry| entry.service.as_ref());
        service.is_some_and(|service| service.ports.iter().any(|port| port.node_port.is_some()))
    }

    /// A Service with its slices, unless it is too large.
    fn served(&self, name: &str) -> Option<&Entry> {
        self.snapshot.service(name).filter(|_| !self.too_large.contains(name))
    }

    /// Updates the claims of a Service. Returns whether they changed.
    fn claim(
        &mut self,
        name: &Arc<str>,
        affected: &mut BTreeSet<Arc<str>>,
        outcome: &mut Outcome,
    ) -> bool {
        let service = self.served(name).and_then(|entry| entry.service.as_ref());
        let (created, mut wanted) = match service {
            Some(service) => {
                (service.created, desired::claims(service, &self.facts.node_port_addresses))
            }
            None => (None, Vec::new()),
        };
        let mut withheld = BTreeSet::new();
        wanted.retain(|claim| {
            let holder = self.taken.holder(name, claim, &self.facts);
            withheld.extend(holder.map(|holder| (claim.frontend.at, holder)));
            holder.is_none()
        });
        let is_direct =
            service.is_some_and(|service| desired::is_direct(service, self.external_mode));
        self.are_settings_dirty |= self.in_use.set_direct(name, is_direct);
        self.set_withheld(name, withheld, outcome);
        let Some(before) = self.claims.set(name, created, wanted, affected) else { return false };
        for claim in &before {
            self.are_settings_dirty |= self.in_use.remove(&claim.frontend);
        }
        for claim in self.claims.of(name) {
            self.are_settings_dirty |= self.in_use.add(&claim.frontend);
        }
        true
    }

    fn plan(
        &mut self,
        planner: &mut Planner,
        draft: &mut Draft,
        affected: &[Arc<str>],
        outcome: &mut Outcome,
    ) {
        let snapshot = &self.snapshot;
        let locality = Locality {
            node: snapshot.node_name(),
            zone: snapshot.node().and_then(|node| node.zone.as_deref()),
            addresses: &self.facts.addresses,
            node_port_addresses: &self.facts.node_port_addresses,
            nodes: snapshot.nodes(),
            external_mode: self.external_mode,
        };
        let served =
            |name: &Arc<str>| snapshot.service(name).filter(|_| !self.too_large.contains(name));
        let is_wanted =
            |name: &&Arc<str>| served(name).is_some_and(|entry| entry.service.is_some());
        // Removed Services first: they make room for new ones.
        let (wanted, gone): (Vec<_>, Vec<_>) = affected.iter().partition(is_wanted);
        for name in gone.into_iter().chain(wanted) {
            let mut desired = served(name).and_then(|entry| desired::service(entry, locality));
            if let Some(desired) = &mut desired {
                desired.ports.retain_mut(|port| {
                    port.frontends.retain(|frontend| self.claims.is_owner(name, &frontend.at));
                    if !port.frontends.iter().any(DesiredFrontend::is_ranged) {
                        port.ranges = Arc::default();
                    }
                    !port.frontends.is_empty()
                });
            }
            refused::note_conflicts(
                &mut self.conflicts,
                name,
                self.claims.conflicts(name),
                outcome,
            );
            self.no_local_endpoints.set(name, desired.as_ref());
            let shortage = planner.plan(draft, name, desired.as_ref()).err();
            match self.shortages.set(name, shortage.clone()) {
                shortages::Change::None => {}
                shortages::Change::New => outcome.shortages.extend(shortage),
                shortages::Change::Gone => outcome.fitting.push(Arc::clone(name)),
            }
        }
    }
}

#[cfg(test)]
mod tests;
