//! How old the agent's picture of each kind is, and whether its watch is broken.
//!
//! A watch is broken from an error until a list is complete, or the server takes a watch or sends
//! something on it. A watch without events is therefore not broken. This is the one place that
//! says so: the log, `status`, `/healthz` and the metrics read it here.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use lb_control::model::event::ObjectKind;

/// The state of the watches; clones share it.
#[derive(Clone, Debug, Default)]
pub struct Liveness(Arc<Mutex<BTreeMap<ObjectKind, Watch>>>);

#[derive(Debug, Default)]
struct Watch {
    /// When the server last said something about the kind that is known to be complete.
    heard: Option<Instant>,
    broken: Option<Broken>,
    lists: u64,
    failures: u64,
    unreadable: u64,
}

#[derive(Debug)]
struct Broken {
    since: Instant,
    /// The first error.
    error: String,
}

/// The figures of the watch of a kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Figures {
    /// The kind.
    pub kind: ObjectKind,
    /// How long ago the server last sent an event, a bookmark or a complete list; `None` if the
    /// kind is not served or not listed yet.
    pub age: Option<Duration>,
    /// Complete lists.
    pub lists: u64,
    /// Lists and watches that failed.
    pub failures: u64,
    /// How often an object could not be read.
    pub unreadable: u64,
}

impl Liveness {
    /// The list or watch of a kind failed at `now`.
    pub fn broke(&self, kind: ObjectKind, error: &str, now: Instant) {
        let mut state = self.state();
        let watch = state.entry(kind).or_default();
        watch.failures += 1;
        let broken = || Broken { since: now, error: error.to_owned() };
        watch.broken.get_or_insert_with(broken);
    }

    /// The server sent a complete list, an event or a bookmark, or takes the watch, at `now`.
    /// Returns for how long the watch was broken, if it was.
    pub fn lives(&self, kind: ObjectKind, now: Instant) -> Option<Duration> {
        let mut state = self.state();
        let watch = state.entry(kind).or_default();
        watch.heard = Some(now);
        watch.broken.take().map(|broken| now.saturating_duration_since(broken.since))
    }

    /// A list of a kind is complete.
    pub fn listed(&self, kind: ObjectKind) {
        self.state().entry(kind).or_default().lists += 1;
    }

    /// An object of a kind could not be read.
    pub fn unreadable(&self, kind: ObjectKind) {
        self.state().entry(kind).or_default().unreadable += 1;
    }

    /// The agent continues without the kind.
    pub fn is_absent(&self, kind: ObjectKind) {
        let mut state = self.state();
        let watch = state.entry(kind).or_default();
        (watch.heard, watch.broken) = (None, None);
    }

    /// The kinds whose watch has been broken for longer than `limit` at `now`, as a sentence
    /// that does not change as long as the kinds do not.
    pub fn dead(&self, limit: Duration, now: Instant) -> Option<String> {
        let dead = self.broken(now).into_iter().filter(|(_, since, _)| *since >= limit);
        let texts: Vec<_> = dead.map(|(kind, _, error)| format!("{kind}: {error}")).collect();
        (!texts.is_empty())
            .then(|| format!("no watch for longer than {limit:?}: {}", texts.join("; ")))
    }

    /// The kinds whose watch is broken, for how long at `now`, and the first error.
    pub fn broken(&self, now: Instant) -> Vec<(ObjectKind, Duration, String)> {
        let state = self.state();
        let broken = state.iter().filter_map(|(kind, watch)| {
            let broken = watch.broken.as_ref()?;
            Some((*kind, now.saturating_duration_since(broken.since), broken.error.clone()))
        });
        broken.collect()
    }

    /// The figures of every kind at `now`.
    pub fn figures(&self, now: Instant) -> Vec<Figures> {
        let state = self.state();
        let figures = state.iter().map(|(kind, watch)| Figures {
            kind: *kind,
            age: watch.heard.map(|heard| now.saturating_duration_since(heard)),
            lists: watch.lists,
            failures: watch.failures,
            unreadable: watch.unreadable,
        });
        figures.collect()
    }

    fn state(&self) -> MutexGuard<'_, BTreeMap<ObjectKind, Watch>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_watch_is_dead_once_it_has_been_broken_for_longer_than_the_limit() {
        let (liveness, start) = (Liveness::default(), Instant::now());
        let limit = Duration::from_secs(60);
        let at = |seconds| start + Duration::from_secs(seconds);
        liveness.lives(ObjectKind::Service, at(0));
        assert_eq!(liveness.dead(limit, at(10_000)), None, "silence is no death");
        liveness.broke(ObjectKind::Service, "refused", at(0));
        liveness.broke(ObjectKind::Node, "refused", at(30));
        liveness.broke(ObjectKind::Service, "timed out", at(50));
        assert_eq!(liveness.dead(limit, at(59)), None);
        let dead = liveness.dead(limit, at(60)).unwrap();
        assert_eq!(dead, "no watch for longer than 60s: Service: refused");
        let outage = liveness.lives(ObjectKind::Service, at(61));
        assert_eq!(outage, Some(Duration::from_secs(61)));
        assert_eq!(liveness.dead(limit, at(61)), None);
        assert!(liveness.dead(limit, at(90)).is_some());
    }

    #[test]
    fn the_picture_is_as_old_as_the_last_word_of_the_server() {
        let (liveness, start) = (Liveness::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        let age = |seconds: u64| liveness.figures(at(seconds))[0].age.map(|age| age.as_secs());
        liveness.broke(ObjectKind::Service, "refused", at(0));
        assert_eq!(age(5), None, "nothing is known");
        liveness.listed(ObjectKind::Service);
        liveness.lives(ObjectKind::Service, at(10));
        assert_eq!(age(15), Some(5));
        liveness.broke(ObjectKind::Service, "refused", at(20));
        assert_eq!(age(100), Some(90), "an outage does not make it younger");
        let Figures { lists, failures, .. } = liveness.figures(at(100))[0];
        assert_eq!((lists, failures), (1, 2));
        liveness.is_absent(ObjectKind::Service);
        assert_eq!((age(100), liveness.broken(at(100)).len()), (None, 0));
    }
}
