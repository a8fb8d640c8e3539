//! Whether the watch of each kind is alive.
//!
//! A watch is broken from an error until the next successful answer to a request for its kind,
//! be that a list or the beginning of a watch: [`Proofs`] sees those. A watch without events is
//! therefore not broken. A connection that is lost without a sign breaks by the client's read
//! timeout, after less than five minutes.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use axum::http::{Request, Response};
use futures::future::BoxFuture;
use tower::{Layer, Service};

use lb_control::model::event::ObjectKind;

/// Which watches are broken, and since when; clones share it.
#[derive(Clone, Debug, Default)]
pub struct Liveness(Arc<Mutex<BTreeMap<ObjectKind, Broken>>>);

#[derive(Debug)]
struct Broken {
    since: Instant,
    /// The first error.
    error: String,
}

impl Liveness {
    /// The watch of a kind got an error at `now`.
    pub fn broke(&self, kind: ObjectKind, error: &str, now: Instant) {
        let broken = || Broken { since: now, error: error.to_owned() };
        self.state().entry(kind).or_insert_with(broken);
    }

    /// A request for a kind was answered, or the agent continues without the kind.
    pub fn lives(&self, kind: ObjectKind) {
        self.state().remove(&kind);
    }

    /// The kinds whose watch has been broken for longer than `limit` at `now`, as a sentence
    /// that does not change as long as the kinds do not.
    pub fn dead(&self, limit: Duration, now: Instant) -> Option<String> {
        let state = self.state();
        let is_dead = |(_, broken): &(&ObjectKind, &Broken)| {
            now.saturating_duration_since(broken.since) >= limit
        };
        let dead = state.iter().filter(is_dead);
        let texts: Vec<_> =
            dead.map(|(kind, broken)| format!("{kind}: {}", broken.error)).collect();
        (!texts.is_empty())
            .then(|| format!("no watch for longer than {limit:?}: {}", texts.join("; ")))
    }

    /// The kinds whose watch is broken, for how long at `now`, and the first error.
    pub fn broken(&self, now: Instant) -> Vec<(ObjectKind, Duration, String)> {
        let state = self.state();
        let broken = state.iter().map(|(kind, broken)| {
            (*kind, now.saturating_duration_since(broken.since), broken.error.clone())
        });
        broken.collect()
    }

    fn state(&self) -> MutexGuard<'_, BTreeMap<ObjectKind, Broken>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes the client report successful answers to [`Liveness`].
#[derive(Clone, Debug)]
pub(super) struct Proofs(pub(super) Liveness);

impl<S> Layer<S> for Proofs {
    type Service = Proving<S>;

    fn layer(&self, inner: S) -> Proving<S> {
        Proving { inner, liveness: self.0.clone() }
    }
}

/// A client that reports successful answers.
#[derive(Clone, Debug)]
pub(super) struct Proving<S> {
    inner: S,
    liveness: Liveness,
}

impl<S, A, B> Service<Request<A>> for Proving<S>
where
    S: Service<Request<A>, Response = Response<B>>,
    S::Future: Send + 'static,
{
    type Response = Response<B>;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<Response<B>, S::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<A>) -> Self::Future {
        let kind = kind_of(request.uri().path());
        let liveness = self.liveness.clone();
        let answer = self.inner.call(request);
        Box::pin(async move {
            let answer = answer.await?;
            if let Some(kind) = kind.filter(|_| answer.status().is_success()) {
                liveness.lives(kind);
            }
            Ok(answer)
        })
    }
}

/// The kind that a request lists or watches, by the last part of its path.
pub(super) fn kind_of(path: &str) -> Option<ObjectKind> {
    match path.rsplit('/').next()? {
        "services" => Some(ObjectKind::Service),
        "endpointslices" => Some(ObjectKind::EndpointSlice),
        "nodes" => Some(ObjectKind::Node),
        "servicecidrs" => Some(ObjectKind::ServiceCidr),
        _ => None,
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
        assert_eq!(liveness.dead(limit, at(10_000)), None, "silence is no death");
        liveness.broke(ObjectKind::Service, "refused", at(0));
        liveness.broke(ObjectKind::Node, "refused", at(30));
        liveness.broke(ObjectKind::Service, "timed out", at(50));
        assert_eq!(liveness.dead(limit, at(59)), None);
        let dead = liveness.dead(limit, at(60)).unwrap();
        assert_eq!(dead, "no watch for longer than 60s: Service: refused");
        liveness.lives(ObjectKind::Service);
        assert_eq!(liveness.dead(limit, at(61)), None);
        assert!(liveness.dead(limit, at(90)).is_some());
    }

    #[test]
    fn the_kind_is_read_from_a_request() {
        for kind in ObjectKind::ALL {
            let group = kind.api_version();
            let path = format!("/apis/{group}/{}s", kind.name().to_lowercase());
            assert_eq!(kind_of(&path), Some(kind), "{path}");
        }
        assert_eq!(kind_of("/apis/events.k8s.io/v1/namespaces/default/events"), None);
    }
}
