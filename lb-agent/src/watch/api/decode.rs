//! Objects and events as an API server sends them, each decoded by itself.
//!
//! An object that cannot be decoded is no error: it becomes an [`Unreadable`], with the name by
//! which its last good version is found.

use std::collections::BTreeMap;

use k8s_openapi::api::{
    core::v1::{Node, Service},
    discovery::v1::EndpointSlice,
    networking::v1::ServiceCIDR,
};
use lb_control::model::event::{Object, ObjectKind, ObjectName, Unreadable};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::value::RawValue;

use super::failure::Failure;

/// The annotation of the bookmark that ends a streamed list.
const INITIAL_EVENTS_END: &str = "k8s.io/initial-events-end";

/// A line of a watch.
#[derive(Debug, Deserialize)]
pub(super) struct Event<'a> {
    /// What happened.
    #[serde(rename = "type")]
    pub(super) change: Change,
    /// The object that it happened to.
    #[serde(borrow)]
    pub(super) object: &'a RawValue,
}

/// The type of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub(super) enum Change {
    Added,
    Modified,
    Deleted,
    Bookmark,
    Error,
    /// A type that this release does not know.
    #[serde(other)]
    Unknown,
}

/// An object, or what is known of it.
#[derive(Debug)]
pub(super) struct Item {
    /// The version of the object.
    pub(super) version: Option<String>,
    pub(super) outcome: Result<Object, Unreadable>,
}

/// A bookmark.
#[derive(Debug)]
pub(super) struct Bookmark {
    pub(super) version: String,
    /// It ends a streamed list.
    pub(super) ends_list: bool,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Metadata {
    name: Option<String>,
    namespace: Option<String>,
    uid: Option<String>,
    resource_version: Option<String>,
    annotations: Option<BTreeMap<String, String>>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct OnlyMetadata {
    metadata: Metadata,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Status {
    code: u16,
    message: String,
}

/// Reads a line of a watch.
pub(super) fn event(line: &[u8]) -> Result<Event<'_>, Failure> {
    serde_json::from_slice(line).map_err(malformed)
}

/// Reads an object.
pub(super) fn item(kind: ObjectKind, json: &[u8]) -> Item {
    let decoded = match kind {
        ObjectKind::Service => object::<Service>(json),
        ObjectKind::EndpointSlice => object::<EndpointSlice>(json),
        ObjectKind::Node => object::<Node>(json),
        ObjectKind::ServiceCidr => object::<ServiceCIDR>(json),
    };
    match decoded {
        Ok(object) => {
            Item { version: object.metadata().resource_version.clone(), outcome: Ok(object) }
        }
        Err((field, error)) => {
            let OnlyMetadata { metadata } = serde_json::from_slice(json).unwrap_or_default();
            let name = ObjectName {
                namespace: metadata.namespace.unwrap_or_default(),
                name: metadata.name.unwrap_or_default(),
            };
            let uid = metadata.uid.unwrap_or_default();
            let unreadable = Unreadable { name, uid, field, error };
            Item { version: metadata.resource_version, outcome: Err(unreadable) }
        }
    }
}

impl Item {
    /// The name of the object; empty if it cannot be read.
    pub(super) fn name(&self) -> ObjectName {
        match &self.outcome {
            Ok(object) => object.name(),
            Err(unreadable) => unreadable.name.clone(),
        }
    }
}

/// The object, or the path of the field that is wrong and why.
fn object<K>(json: &[u8]) -> Result<Object, (String, String)>
where
    K: DeserializeOwned,
    Object: From<K>,
{
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    let decoded: Result<K, _> = serde_path_to_error::deserialize(&mut deserializer);
    decoded.map(Object::from).map_err(|error| {
        let field = error.path().to_string();
        (field, error.into_inner().to_string())
    })
}

/// Reads the object of a bookmark.
pub(super) fn bookmark(object: &RawValue) -> Result<Bookmark, Failure> {
    let OnlyMetadata { metadata } = serde_json::from_str(object.get()).map_err(malformed)?;
    let annotations = metadata.annotations.unwrap_or_default();
    let ends_list = annotations.get(INITIAL_EVENTS_END).is_some_and(|value| value == "true");
    Ok(Bookmark { version: version(metadata.resource_version)?, ends_list })
}

/// The version of a list, from its JSON without items.
pub(super) fn list_version(envelope: &[u8]) -> Result<String, Failure> {
    let OnlyMetadata { metadata } = serde_json::from_slice(envelope)
        .map_err(|error| if error.is_eof() { Failure::CutShort } else { malformed(error) })?;
    version(metadata.resource_version)
}

fn version(version: Option<String>) -> Result<String, Failure> {
    let is_one = |version: &String| !matches!(version.as_str(), "" | "0");
    version.filter(is_one).ok_or_else(|| Failure::Malformed("it has no resourceVersion".to_owned()))
}

/// The error that a stream ends with.
pub(super) fn error_in_stream(object: &RawValue) -> Failure {
    let Status { code, message } = serde_json::from_str(object.get()).unwrap_or_default();
    Failure::Status { code, message, retry_after: None, is_in_stream: true }
}

/// The message of an answer that is an error.
pub(super) fn message(body: &[u8]) -> String {
    match serde_json::from_slice(body) {
        Ok(Status { message, .. }) if !message.is_empty() => message,
        _ => String::from_utf8_lossy(body).trim().chars().take(200).collect(),
    }
}

fn malformed(error: serde_json::Error) -> Failure {
    Failure::Malformed(error.to_string())
}
