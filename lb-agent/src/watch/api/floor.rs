//! A list never goes back to an older state than the agent has seen.
//!
//! A watch that is too old lists again, and asks for any version (`resourceVersion=0`), which an
//! API server that lags behind the others answers with what it has: endpoints that are gone would
//! come back. [`Floor`] makes that "at least what was seen". Versions are numbers that grow
//! (KEP-5504); one that is no number counts for nothing.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use axum::http::{Uri, uri::PathAndQuery};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use lb_control::model::event::ObjectKind;

use super::liveness::kind_of;

/// The parameter that asks for any version.
const ANY: &str = "resourceVersion=0";

/// The newest version of each kind that the agent has seen; clones share it.
#[derive(Clone, Debug, Default)]
pub(super) struct Floor(Arc<Mutex<BTreeMap<ObjectKind, Seen>>>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    Version(u64),
    /// The server does not know the version that was seen: only the newest state is certain.
    Unknown,
}

impl Floor {
    /// An object of a kind has this metadata.
    pub(super) fn saw(&self, kind: ObjectKind, metadata: &ObjectMeta) {
        let version: Option<u64> =
            metadata.resource_version.as_deref().and_then(|text| text.parse().ok());
        let Some(version) = version else { return };
        let mut state = self.state();
        match state.get_mut(&kind) {
            Some(Seen::Version(newest)) => *newest = version.max(*newest),
            _ => drop(state.insert(kind, Seen::Version(version))),
        }
    }

    /// A server says that it does not know the version yet, or any more.
    pub(super) fn is_too_large(&self, kind: ObjectKind) {
        if let Some(seen) = self.state().get_mut(&kind) {
            *seen = Seen::Unknown;
        }
    }

    /// The address of a request that asks for no older state.
    pub(super) fn raised(&self, uri: &Uri) -> Option<Uri> {
        let seen = *self.state().get(&kind_of(uri.path())?)?;
        let query = uri.query()?;
        let version = match seen {
            Seen::Version(version) => format!("resourceVersion={version}"),
            Seen::Unknown => "resourceVersion=".to_owned(),
        };
        let raised = query.split('&').map(|part| if part == ANY { &*version } else { part });
        let raised: Vec<_> = raised.collect();
        let mut parts = uri.clone().into_parts();
        let path = format!("{}?{}", uri.path(), raised.join("&"));
        parts.path_and_query = Some(PathAndQuery::try_from(path).ok()?);
        Uri::from_parts(parts).ok()
    }

    fn state(&self) -> MutexGuard<'_, BTreeMap<ObjectKind, Seen>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_asks_for_at_least_what_was_seen() {
        let floor = Floor::default();
        let raised = |text: &str| {
            let raised = floor.raised(&text.parse().unwrap());
            raised.map_or_else(|| text.to_owned(), |uri| uri.to_string())
        };
        let list = "/api/v1/services?watch=true&resourceVersion=0&sendInitialEvents=true";
        assert_eq!(raised(list), list);
        for version in ["7", "12", "9", "x"] {
            let metadata =
                ObjectMeta { resource_version: Some(version.to_owned()), ..ObjectMeta::default() };
            floor.saw(ObjectKind::Service, &metadata);
        }
        assert_eq!(raised(list), list.replace("=0", "=12"));
        for other in ["/api/v1/services?watch=true&resourceVersion=05", "/api/v1/nodes?x=1"] {
            assert_eq!(raised(other), other);
        }
        floor.is_too_large(ObjectKind::Service);
        assert_eq!(raised(list), list.replace("=0", "="));
        floor.is_too_large(ObjectKind::Node);
        assert_eq!(raised("/api/v1/nodes?resourceVersion=0"), "/api/v1/nodes?resourceVersion=0");
    }
}
