//! The labels and annotations that are read, each defined here and only here.
//!
//! Sources of objects drop every other key, see [`is_kept`]. Invariant: a key that the model
//! reads is kept, because the model can read a key only through [`Key`], and [`KEPT`] lists
//! every `Key` but those that exclude an object as a whole.

use std::{collections::BTreeMap, fmt};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::event::ObjectKind;

/// The key of a label or an annotation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key(&'static str);

macro_rules! keys {
    ($(#[$list_doc:meta])* $list:ident: $($(#[$doc:meta])* $name:ident = $text:literal;)+) => {
        $($(#[$doc])* pub const $name: Key = Key($text);)+
        $(#[$list_doc])*
        pub const $list: &[Key] = &[$($name),+];
    };
}

keys! {
    /// The keys whose values are read.
    KEPT:
    /// The label that names a node's zone.
    ZONE_LABEL = "topology.kubernetes.io/zone";
    /// The label that names the Service of a slice.
    SERVICE_LABEL = "kubernetes.io/service-name";
    /// The annotation of a Service that overrides `--external-mode`.
    EXTERNAL_MODE_ANNOTATION = "lb-agent/external-mode";
    /// The annotation of a slice with the time of the event that caused its last change.
    TRIGGER_TIME_ANNOTATION = "endpoints.kubernetes.io/last-change-trigger-time";
}

keys! {
    /// The keys that exclude an object, whatever their value.
    EXCLUDING:
    /// The label of objects that another proxy serves.
    PROXY_NAME_LABEL = "service.kubernetes.io/service-proxy-name";
    /// The label of slices that belong to a headless Service.
    HEADLESS_LABEL = "service.kubernetes.io/headless";
}

/// The labels that exclude an object of this kind.
pub const fn excluding(kind: ObjectKind) -> &'static [Key] {
    match kind {
        ObjectKind::Service => &[PROXY_NAME_LABEL],
        ObjectKind::EndpointSlice => &[HEADLESS_LABEL, PROXY_NAME_LABEL],
        ObjectKind::Node | ObjectKind::ServiceCidr => &[],
    }
}

/// Whether a label or annotation with this key is read.
pub fn is_kept(key: &str) -> bool {
    KEPT.iter().any(|kept| kept.0 == key)
}

impl Key {
    /// The key as an object has it.
    pub const fn text(self) -> &'static str {
        self.0
    }

    /// The value of the label, if the object has it.
    pub fn label(self, metadata: &ObjectMeta) -> Option<&str> {
        self.find(metadata.labels.as_ref())
    }

    /// The value of the annotation, if the object has it.
    pub fn annotation(self, metadata: &ObjectMeta) -> Option<&str> {
        self.find(metadata.annotations.as_ref())
    }

    /// The path of the annotation, for a refusal of its value.
    pub(super) fn annotation_path(self) -> String {
        format!("metadata.annotations[{}]", self.0)
    }

    fn find(self, entries: Option<&BTreeMap<String, String>>) -> Option<&str> {
        entries?.get(self.0).map(String::as_str)
    }
}

impl fmt::Display for Key {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.0)
    }
}

impl From<Key> for String {
    fn from(key: Key) -> Self {
        key.0.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_excluding_key_excludes_objects_of_some_kind() {
        let is_used =
            |key: &&Key| ObjectKind::ALL.iter().any(|kind| excluding(*kind).contains(key));
        assert!(EXCLUDING.iter().all(|key| is_used(&key)));
    }
}
