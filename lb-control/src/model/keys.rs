//! Labels and annotations that are read.

/// The label that names a node's zone.
pub const ZONE_LABEL: &str = "topology.kubernetes.io/zone";
/// The label that names the Service of a slice.
pub const SERVICE_LABEL: &str = "kubernetes.io/service-name";
/// The label of objects that another proxy serves.
pub const PROXY_NAME_LABEL: &str = "service.kubernetes.io/service-proxy-name";
/// The label of slices that belong to a headless Service.
pub const HEADLESS_LABEL: &str = "service.kubernetes.io/headless";
/// The annotation that says for one Service what `--external-mode` says for all.
pub const EXTERNAL_MODE_ANNOTATION: &str = "lb-agent/external-mode";
