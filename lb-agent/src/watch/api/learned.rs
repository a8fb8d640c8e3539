//! What the watch has learned of the API servers, kept on the node's disk for the next start:
//! the endpoints of the Service `default/kubernetes`, its ClusterIPs, and which server answered
//! last.
//!
//! Invariant: the file holds either what one write put there or nothing that is used: it is
//! replaced as a whole, and checked field by field when it is read. An address in it is no
//! credential: a server must still prove itself by its certificate.

mod file;

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use axum::http::Uri;
use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};
use lb_control::model::{
    event::{Object, ObjectEvent, ObjectKind, ObjectName},
    keys::SERVICE_LABEL,
};

pub(super) use file::is_usable;
use file::{FILE, Known};

/// The namespace and the name of the Service of the API servers.
const NAMESPACE: &str = "default";
const NAME: &str = "kubernetes";
/// The port of the Service and of its endpoints.
const PORT_NAME: &str = "https";

/// What is known of the API servers; clones share it.
#[derive(Clone, Debug, Default)]
pub struct Learned(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    directory: Option<PathBuf>,
    known: Known,
    /// The endpoints by slice, since this agent watches.
    slices: BTreeMap<String, Vec<SocketAddr>>,
    /// The log says already that the file cannot be written.
    has_warned: bool,
}

impl Learned {
    /// Reads the file of an earlier agent in `directory`. A file that is damaged is logged and
    /// counts as absent. Without a directory nothing is kept.
    pub fn open(directory: Option<&Path>) -> Self {
        let known = directory.map(|directory| match file::read(directory) {
            Ok(known) => known,
            Err(error) => {
                let path = directory.join(FILE);
                tracing::warn!(path = %path.display(), %error, "the learned endpoints of the API server are not usable and ignored: only the configured servers are tried until the watch has learned them again");
                Known::default()
            }
        });
        let directory = directory.map(Path::to_owned);
        let known = known.unwrap_or_default();
        Self(Arc::new(Mutex::new(State { directory, known, ..State::default() })))
    }

    /// The endpoints of the API servers.
    pub fn endpoints(&self) -> Vec<SocketAddr> {
        self.state().known.endpoints.clone()
    }

    /// The URL of the server that answered last.
    pub(super) fn last(&self) -> Option<String> {
        self.state().known.last.clone()
    }

    /// The Service `default/kubernetes` and its endpoints, as objects; none if they are unknown.
    pub fn objects(&self) -> Option<(Service, Vec<EndpointSlice>)> {
        file::objects(&self.state().known)
    }

    /// A server answered.
    pub(super) fn answered(&self, server: &Uri) {
        self.update(|state| state.known.last = Some(server.to_string()));
    }

    /// Learns from what the watch sees.
    pub(super) fn observe(&self, event: &ObjectEvent) {
        match event {
            ObjectEvent::Replaced(ObjectKind::Service, objects) => {
                if let Some(service) = objects.iter().find_map(service) {
                    self.update(|state| state.known.set_service(service));
                }
            }
            ObjectEvent::Replaced(ObjectKind::EndpointSlice, objects) => self.update(|state| {
                state.slices = objects.iter().filter_map(slice).collect();
                state.merge_slices();
            }),
            ObjectEvent::ReplacedExcept(_, objects, _) => {
                objects.iter().for_each(|object| self.observe_object(object));
            }
            ObjectEvent::Applied(object) => self.observe_object(object),
            ObjectEvent::Deleted(ObjectKind::EndpointSlice, ObjectName { namespace, name })
                if namespace == NAMESPACE && self.state().slices.contains_key(name) =>
            {
                self.update(|state| {
                    state.slices.remove(name);
                    state.merge_slices();
                });
            }
            ObjectEvent::Replaced(..) | ObjectEvent::Unreadable(..) | ObjectEvent::Deleted(..) => {}
        }
    }

    fn observe_object(&self, object: &Object) {
        if let Some(service) = service(object) {
            self.update(|state| state.known.set_service(service));
        }
        if let Some((name, endpoints)) = slice(object) {
            self.update(|state| {
                state.slices.insert(name, endpoints);
                state.merge_slices();
            });
        }
    }

    /// Changes the learned servers, and writes the file if they differ.
    fn update(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.state();
        let before = state.known.clone();
        change(&mut state);
        let Some(directory) = state.directory.clone() else { return };
        // Whoever empties the directory must not cost the next start its servers.
        let is_kept = before == Known::default() || directory.join(FILE).exists();
        if state.known == before && is_kept {
            return;
        }
        match file::write(&directory, &state.known) {
            Ok(()) => state.has_warned = false,
            Err(error) if !state.has_warned => {
                let path = directory.join(FILE);
                tracing::warn!(path = %path.display(), %error, "cannot keep the endpoints of the API server: the next start knows only the configured servers; make --state-dir writable");
                state.has_warned = true;
            }
            Err(_) => {}
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// The endpoints of all slices. An empty list teaches nothing: it comes from API servers
    /// that are just starting or ending.
    fn merge_slices(&mut self) {
        let mut endpoints: Vec<_> = self.slices.values().flatten().copied().collect();
        endpoints.sort_unstable();
        endpoints.dedup();
        if !endpoints.is_empty() {
            self.known.endpoints = endpoints;
        }
    }
}

/// The Service of the API servers, if it is this object.
fn service(object: &Object) -> Option<&Service> {
    let Object::Service(service) = object else { return None };
    let ObjectName { namespace, name } = object.name();
    (namespace == NAMESPACE && name == NAME).then_some(service)
}

/// The name and the endpoints of a slice of that Service.
fn slice(object: &Object) -> Option<(String, Vec<SocketAddr>)> {
    let Object::EndpointSlice(slice) = object else { return None };
    let ObjectName { namespace, name } = object.name();
    if namespace != NAMESPACE || SERVICE_LABEL.label(&slice.metadata) != Some(NAME) {
        return None;
    }
    let ports = slice.ports.iter().flatten();
    let ports: Vec<u16> = ports
        .filter(|port| port.name.as_deref() == Some(PORT_NAME))
        .filter_map(|port| u16::try_from(port.port?).ok())
        .collect();
    let is_ready = |ready: Option<bool>| ready.unwrap_or(true);
    let endpoints = slice.endpoints.iter().flatten();
    let endpoints = endpoints
        .filter(|endpoint| {
            endpoint.conditions.as_ref().is_none_or(|conditions| is_ready(conditions.ready))
        })
        .filter_map(|endpoint| endpoint.addresses.first()?.parse::<IpAddr>().ok())
        .flat_map(|address| ports.iter().map(move |port| SocketAddr::new(address, *port)))
        .filter(is_usable);
    Some((name, endpoints.collect()))
}

#[cfg(test)]
mod tests;
