//! What is refused of Services because of other objects, or of what they add up to.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    sync::Arc,
};

use super::{Controller, Outcome};
use crate::{
    desired::{
        Conflict, FrontendAddress, backends,
        taken::{self, Holder},
    },
    model::{
        Refusal, RefusalReason, add_some,
        event::{ObjectKind, ObjectName},
    },
};

impl Controller {
    /// For which reasons an object, or a part of it, is refused now, except that it does not fit.
    pub fn refusal_reasons(&self, kind: ObjectKind, name: &ObjectName) -> BTreeSet<RefusalReason> {
        let own = self.snapshot.refusals_of(kind, name).iter().map(|refusal| refusal.reason);
        let mut reasons: BTreeSet<RefusalReason> = own.collect();
        if kind != ObjectKind::Service {
            return reasons;
        }
        let name = name.to_string();
        let withheld = self.withheld.get(name.as_str()).into_iter().flatten();
        reasons.extend(withheld.filter_map(|(at, holder)| match holder {
            // Where only the address as a whole is withheld, every port is served.
            Holder::ApiServer => (at.protocol != 0).then_some(RefusalReason::AddressInUse),
            Holder::ServiceCidr | Holder::Pod => Some(RefusalReason::ForbiddenAddress),
            Holder::Process => None,
        }));
        let has_lost = self.conflicts.contains_key(name.as_str());
        reasons.extend(has_lost.then_some(RefusalReason::AddressInUse));
        let is_too_large = self.too_large.contains(name.as_str());
        reasons.extend(is_too_large.then_some(RefusalReason::TooLarge));
        reasons
    }

    /// Counts the backends of a Service that changed, before anything is made of them.
    pub(super) fn count_backends(&mut self, name: &Arc<str>, outcome: &mut Outcome) {
        let count = self.snapshot.service(name).map_or(0, backends::count);
        match self.limits.backends.exceeded_by(count) {
            None => {
                if self.too_large.remove(name) {
                    outcome.resolved.push((ObjectKind::Service, (&**name).into()));
                }
            }
            Some(message) => {
                if self.too_large.insert(Arc::clone(name)) {
                    outcome.refusals.push(Refusal {
                        kind: ObjectKind::Service,
                        object: (&**name).into(),
                        uid: String::new(),
                        field: "spec.ports".to_owned(),
                        reason: RefusalReason::TooLarge,
                        message,
                    });
                }
            }
        }
    }

    /// Notes the frontends that a Service cannot have, and reports those that it could have until
    /// now.
    pub(super) fn set_withheld(
        &mut self,
        name: &Arc<str>,
        withheld: BTreeSet<(FrontendAddress, Holder)>,
        outcome: &mut Outcome,
    ) {
        let known = self.withheld.remove(name).unwrap_or_default();
        let new = || withheld.difference(&known);
        let refusal = |(frontend, holder): &(_, _)| taken::refusal(name, *frontend, *holder);
        add_some(&mut outcome.refusals, new().filter_map(refusal));
        // The ClusterIP as a whole stands for its ports.
        if known.difference(&withheld).next().is_some() {
            outcome.resolved.push((ObjectKind::Service, (&**name).into()));
        }
        let left = new().filter(|(at, holder)| *holder == Holder::Process && at.protocol == 0);
        outcome.left_to_processes.extend(left.map(|(at, _)| (Arc::clone(name), at.ip)));
        if !withheld.is_empty() {
            self.withheld.insert(Arc::clone(name), withheld);
        }
    }
}

/// Notes the addresses that a Service has lost to others, and reports those that are new.
pub(super) fn note_conflicts(
    conflicts: &mut BTreeMap<Arc<str>, Vec<Conflict>>,
    name: &Arc<str>,
    lost: Vec<Conflict>,
    outcome: &mut Outcome,
) {
    let known = conflicts.remove(name).unwrap_or_default();
    if lost.len() < known.len() {
        outcome.resolved.push((ObjectKind::Service, (&**name).into()));
    }
    let known: HashSet<_> = known.iter().map(|lost| (lost.frontend, &lost.owner)).collect();
    let new = lost.iter().filter(|lost| !known.contains(&(lost.frontend, &lost.owner)));
    add_some(&mut outcome.refusals, new.map(Conflict::refusal));
    if !lost.is_empty() {
        conflicts.insert(Arc::clone(name), lost);
    }
}
