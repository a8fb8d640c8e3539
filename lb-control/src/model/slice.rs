//! EndpointSlices.

use std::{net::IpAddr, sync::Arc};

use k8s_openapi::api::discovery::v1::{self, EndpointHints, EndpointSlice};

use super::{
    IpFamily, Parsed, Protocol, RefusalReason, Refusals, SharedNames,
    event::ObjectKind,
    is_label,
    keys::{HEADLESS_LABEL, SERVICE_LABEL},
    parse_address, parse_port,
    text::Quoted,
};

/// Endpoints of a Service in one family.
#[derive(Clone, Debug, PartialEq)]
pub struct Slice {
    /// `namespace/name` of the Service.
    pub service: Arc<str>,
    /// The family of every endpoint.
    pub family: IpFamily,
    /// Where the endpoints listen.
    pub ports: Vec<SlicePort>,
    /// The endpoints, in the order of the slice.
    pub endpoints: Vec<Endpoint>,
}

impl Slice {
    /// How many of its endpoints run on this node.
    pub fn local_endpoints(&self) -> usize {
        self.endpoints.iter().filter(|endpoint| endpoint.is_local).count()
    }
}

/// A port that every endpoint of a slice listens on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlicePort {
    /// The name of the Service's port; may be empty.
    pub name: Box<str>,
    /// The port that packets are sent to.
    pub number: u16,
    /// The protocol.
    pub protocol: Protocol,
}

/// An endpoint: an address and its conditions.
#[derive(Clone, Debug, PartialEq)]
pub struct Endpoint {
    /// The address; further addresses of the object are ignored.
    pub address: IpAddr,
    /// It may get new flows.
    pub is_ready: bool,
    /// It serves, terminating or not.
    pub is_serving: bool,
    /// It is being deleted.
    pub is_terminating: bool,
    /// Its `nodeName` is this node.
    pub is_local: bool,
    /// Its `nodeName`, if that is another node; shared with all endpoints on that node.
    pub node: Option<Arc<str>>,
    /// The nodes and zones that it is meant for; shared with other endpoints of the slice.
    pub hints: Option<Arc<Hints>>,
}

/// Nodes and zones that an endpoint is meant for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hints {
    /// Names of nodes.
    pub nodes: Vec<Box<str>>,
    /// Names of zones.
    pub zones: Vec<Box<str>>,
}

/// Reads a slice. A slice of a headless Service, without a Service, or with host names gives
/// neither a value nor a refusal. `names` are the names of nodes that were read so far.
pub fn parse(slice: &EndpointSlice, node_name: &str, names: &mut SharedNames) -> Parsed<Slice> {
    let mut refusals = Refusals::new(ObjectKind::EndpointSlice, &slice.metadata);
    let value = parse_into(slice, node_name, names, &mut refusals);
    Parsed { value, refusals: refusals.into_list() }
}

fn parse_into(
    slice: &EndpointSlice,
    node_name: &str,
    names: &mut SharedNames,
    refusals: &mut Refusals<'_>,
) -> Option<Slice> {
    let service = SERVICE_LABEL.label(&slice.metadata).filter(|name| !name.is_empty())?;
    if HEADLESS_LABEL.label(&slice.metadata).is_some() {
        return None;
    }
    let family = match slice.address_type.as_str() {
        "IPv4" => IpFamily::V4,
        "IPv6" => IpFamily::V6,
        "FQDN" => return None,
        text => {
            refusals.add(
                RefusalReason::UnknownValue,
                "addressType",
                format!("{} is neither IPv4 nor IPv6", Quoted(text)),
            );
            return None;
        }
    };
    let namespace = super::object_name(&slice.metadata).namespace;
    Some(Slice {
        service: format!("{namespace}/{service}").into(),
        family,
        ports: ports(slice, refusals),
        endpoints: endpoints(slice, family, (node_name, names), refusals),
    })
}

fn ports(slice: &EndpointSlice, refusals: &mut Refusals<'_>) -> Vec<SlicePort> {
    let list = slice.ports.as_deref().unwrap_or_default();
    let mut ports = Vec::with_capacity(list.len());
    for (index, port) in list.iter().enumerate() {
        let (Some(name), Some(number)) = (&port.name, port.port.filter(|number| *number != 0))
        else {
            continue;
        };
        // An unsupported protocol is refused at the port of the Service, not here.
        let Some(protocol) = Protocol::parse(port.protocol.as_deref()) else { continue };
        if !name.is_empty() && !is_label(name) {
            refusals.add(
                RefusalReason::InvalidName,
                format!("ports[{index}].name"),
                format!("{} is not a port name", Quoted(name)),
            );
            continue;
        }
        match parse_port(number) {
            Ok(number) => ports.push(SlicePort { name: name.as_str().into(), number, protocol }),
            Err(message) => {
                refusals.add(RefusalReason::InvalidPort, format!("ports[{index}].port"), message)
            }
        }
    }
    ports
}

fn endpoints(
    slice: &EndpointSlice,
    family: IpFamily,
    (own_node, names): (&str, &mut SharedNames),
    refusals: &mut Refusals<'_>,
) -> Vec<Endpoint> {
    let list = slice.endpoints.as_deref().unwrap_or_default();
    let mut endpoints: Vec<Endpoint> = Vec::with_capacity(list.len());
    let mut latest_hints: Option<Arc<Hints>> = None;
    for (index, endpoint) in list.iter().enumerate() {
        let field = || format!("endpoints[{index}].addresses[0]");
        let Some(text) = endpoint.addresses.first() else {
            refusals.add(RefusalReason::InvalidAddress, field(), "the endpoint has no address");
            continue;
        };
        let address = match parse_address(text) {
            Ok(address) if IpFamily::of(address) == family => address,
            Ok(address) => {
                let message = format!("{address} is not an address of IPv{}", family.number());
                refusals.add(RefusalReason::InvalidAddress, field(), message);
                continue;
            }
            Err(message) => {
                refusals.add(RefusalReason::InvalidAddress, field(), message);
                continue;
            }
        };
        let conditions = endpoint.conditions.as_ref();
        let condition =
            |read: fn(&v1::EndpointConditions) -> Option<bool>| conditions.and_then(read);
        let node = endpoint.node_name.as_deref().filter(|node| !node.is_empty());
        endpoints.push(Endpoint {
            address,
            is_ready: condition(|conditions| conditions.ready).unwrap_or(true),
            is_serving: condition(|conditions| conditions.serving).unwrap_or(true),
            is_terminating: condition(|conditions| conditions.terminating).unwrap_or(false),
            is_local: node == Some(own_node),
            node: node.filter(|node| *node != own_node).map(|node| names.share(node)),
            hints: endpoint.hints.as_ref().and_then(|hints| shared(hints, &mut latest_hints)),
        });
    }
    endpoints
}

/// The hints, shared with the previous endpoint if they are equal.
fn shared(hints: &EndpointHints, latest: &mut Option<Arc<Hints>>) -> Option<Arc<Hints>> {
    let nodes = hints.for_nodes.iter().flatten().map(|node| node.name.as_str().into()).collect();
    let zones = hints.for_zones.iter().flatten().map(|zone| zone.name.as_str().into()).collect();
    let hints = Hints { nodes, zones };
    if hints == Hints::default() {
        return None;
    }
    if latest.as_deref() != Some(&hints) {
        *latest = Some(Arc::new(hints));
    }
    latest.clone()
}

#[cfg(test)]
mod tests;
