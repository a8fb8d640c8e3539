//! Serves the ClusterIP of `default/kubernetes` from what an earlier run has learned, on a node
//! whose maps are empty, as after a boot: pods, and an agent that only knows the ClusterIP,
//! reach the API server before the first list.
//!
//! Invariant: maps that hold anything are left alone. What is written here is to the agent's
//! planner what an earlier agent left: it is adopted with the first complete lists, which put
//! what is right in its place, and flows that were opened meanwhile stay.

use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};
use lb_control::{
    controller::Controller,
    dataplane::{Dataplane, DataplaneError},
    desired::NodeFacts,
    model::event::{ObjectEvent, ObjectKind},
    options::{ExternalMode, Limits},
};

/// What is known of the Service.
pub(super) type Known = (Service, Vec<EndpointSlice>);

/// Programs the Service if the maps hold nothing.
pub(super) fn serve(
    node_name: &str,
    facts: NodeFacts,
    (service, slices): Known,
    dataplane: &mut impl Dataplane,
) {
    match program(node_name, facts, (service, slices), dataplane) {
        Ok(0) => {}
        Ok(backends) => tracing::info!(
            backends,
            "serving the ClusterIP of default/kubernetes from learned endpoints until the first lists"
        ),
        Err(error) => {
            tracing::warn!(%error, "cannot serve the ClusterIP of default/kubernetes from learned endpoints: it is served after the first lists");
        }
    }
}

/// How many backends were programmed.
fn program(
    node_name: &str,
    facts: NodeFacts,
    (service, slices): Known,
    dataplane: &mut impl Dataplane,
) -> Result<usize, DataplaneError> {
    let state = dataplane.read_state()?;
    if !(state.frontends4.is_empty() && state.frontends6.is_empty()) {
        return Ok(0);
    }
    // Nothing else is in the maps: it may have all of them.
    let limits = Limits { namespace_share: 100, ..Limits::default() };
    let mut controller = Controller::new(node_name, ExternalMode::Snat, []).with_limits(limits);
    let slices = slices.into_iter().map(Into::into).collect();
    controller.apply(ObjectEvent::Replaced(ObjectKind::EndpointSlice, slices));
    controller.apply(ObjectEvent::Replaced(ObjectKind::Service, vec![service.into()]));
    controller.set_facts(facts);
    let outcome = controller.reconcile(0, dataplane)?;
    match outcome.errors.into_iter().next() {
        Some(error) => Err(error),
        None => Ok(controller.counts().backends),
    }
}

#[cfg(test)]
mod tests {
    use lb_control::dataplane::{Capacity, fake::Fake};
    use serde_json::json;

    use super::*;

    fn fake() -> Fake {
        Fake::new(Capacity {
            services: 16,
            slots: 64,
            backends4: 16,
            backends6: 16,
            frontends4: 16,
            frontends6: 16,
            ranges4: 16,
            ranges6: 16,
            nodes4: 16,
            nodes6: 16,
        })
    }

    fn known() -> Known {
        let service = json!({
            "metadata": {"namespace": "default", "name": "kubernetes"},
            "spec": {"clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1"],
                     "ports": [{"name": "https", "protocol": "TCP", "port": 443}]},
        });
        let slice = json!({
            "metadata": {"namespace": "default", "name": "kubernetes-0",
                         "labels": {"kubernetes.io/service-name": "kubernetes"}},
            "addressType": "IPv4",
            "endpoints": [{"addresses": ["192.0.2.1"]}, {"addresses": ["192.0.2.2"]}],
            "ports": [{"name": "https", "protocol": "TCP", "port": 6443}],
        });
        let slice = serde_json::from_value(slice).unwrap();
        (serde_json::from_value(service).unwrap(), vec![slice])
    }

    #[test]
    fn empty_maps_get_the_service_and_others_stay_as_they_are() {
        let mut dataplane = fake();
        let serve =
            |dataplane: &mut Fake| program("a", NodeFacts::default(), known(), dataplane).unwrap();
        assert_eq!(serve(&mut dataplane), 2);
        assert!(!dataplane.read_state().unwrap().frontends4.is_empty());
        assert_eq!(serve(&mut dataplane), 0, "the maps hold something");
    }

    #[test]
    fn the_first_lists_adopt_what_was_served() {
        let mut dataplane = fake();
        program("a", NodeFacts::default(), known(), &mut dataplane).unwrap();
        let backends = dataplane.read_state().unwrap().backends4;
        let (service, slices) = known();
        let mut controller = Controller::new("a", ExternalMode::Snat, []);
        let slices = slices.into_iter().map(Into::into).collect();
        controller.apply(ObjectEvent::Replaced(ObjectKind::EndpointSlice, slices));
        controller.apply(ObjectEvent::Replaced(ObjectKind::Service, vec![service.into()]));
        let outcome = controller.reconcile(0, &mut dataplane).unwrap();
        assert!(outcome.errors.is_empty());
        assert_eq!(controller.counts().backends, 2);
        assert_eq!(dataplane.read_state().unwrap().backends4, backends, "ids stay, so flows do");
    }
}
