//! The file, and the objects that can be made of it.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read as _, Write as _},
    net::{IpAddr, SocketAddr},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::Path,
};

use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{NAME, NAMESPACE, PORT_NAME};

/// The file in the state directory.
pub(super) const FILE: &str = "api-servers.json";
/// The form of the file. Another one is not read.
const FORMAT: u32 = 1;
/// The largest file that is read: far more than any list of API servers takes.
const MAX_SIZE: u64 = 64 * 1024;
/// No cluster has more API servers.
const MAX_ENDPOINTS: usize = 256;

/// What is kept.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Known {
    format: u32,
    /// The URL of the server that answered last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) last: Option<String>,
    /// The ClusterIPs of the Service.
    #[serde(default, rename = "clusterIPs")]
    pub(super) cluster_ips: Vec<IpAddr>,
    /// The Service's port.
    #[serde(default)]
    pub(super) port: u16,
    /// The Service's endpoints.
    #[serde(default)]
    pub(super) endpoints: Vec<SocketAddr>,
}

impl Known {
    /// Takes over what the Service says.
    pub(super) fn set_service(&mut self, service: &Service) {
        let Some(spec) = &service.spec else { return };
        let addresses = spec.cluster_ips.iter().flatten().chain(&spec.cluster_ip);
        let mut cluster_ips: Vec<IpAddr> = Vec::new();
        for address in addresses.filter_map(|address| address.parse().ok()) {
            if !cluster_ips.contains(&address) {
                cluster_ips.push(address);
            }
        }
        let mut ports = spec.ports.iter().flatten();
        let port = ports.find(|port| port.name.as_deref() == Some(PORT_NAME));
        let port = port.and_then(|port| u16::try_from(port.port).ok());
        if let (Some(port), false) = (port, cluster_ips.is_empty()) {
            (self.cluster_ips, self.port) = (cluster_ips, port);
        }
    }

    fn check(&self) -> Result<(), Damage> {
        if self.format != FORMAT {
            return Err(Damage::Format(self.format));
        }
        if self.endpoints.len() > MAX_ENDPOINTS {
            return Err(Damage::TooMany(self.endpoints.len()));
        }
        if let Some(wrong) = self.endpoints.iter().find(|endpoint| !is_usable(endpoint)) {
            return Err(Damage::Address(wrong.to_string()));
        }
        let is_wrong = |ip: &&IpAddr| !is_usable(&SocketAddr::new(**ip, self.port));
        match self.cluster_ips.iter().find(is_wrong) {
            Some(wrong) => Err(Damage::Address(format!("{wrong} port {}", self.port))),
            None => Ok(()),
        }
    }
}

/// Why a file is not used.
#[derive(Debug, thiserror::Error)]
pub(super) enum Damage {
    #[error("cannot read it: {0}")]
    Read(#[from] io::Error),
    #[error("it is larger than {MAX_SIZE} bytes")]
    TooLarge,
    #[error("it is damaged: {0}")]
    Syntax(#[from] serde_json::Error),
    #[error("its format is {0}, not {FORMAT}")]
    Format(u32),
    #[error("it has {0} endpoints, more than {MAX_ENDPOINTS}")]
    TooMany(usize),
    #[error("{0} cannot be the address of an API server")]
    Address(String),
}

/// Whether an API server can be at an address that other nodes use too.
pub(in super::super) fn is_usable(endpoint: &SocketAddr) -> bool {
    let ip = endpoint.ip().to_canonical();
    let is_link_local = match ip {
        IpAddr::V4(ip) => ip.is_link_local() || ip.is_broadcast(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    endpoint.port() != 0
        && !(ip.is_unspecified() || ip.is_loopback() || ip.is_multicast() || is_link_local)
}

/// Reads the file; what is known is empty if there is none.
pub(super) fn read(directory: &Path) -> Result<Known, Damage> {
    let file = match File::open(directory.join(FILE)) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Known::default()),
        Err(error) => return Err(error.into()),
    };
    let mut text = Vec::new();
    file.take(MAX_SIZE + 1).read_to_end(&mut text)?;
    if text.len() as u64 > MAX_SIZE {
        return Err(Damage::TooLarge);
    }
    let known: Known = serde_json::from_slice(&text)?;
    known.check()?;
    Ok(known)
}

/// Replaces the file. A crash leaves the old one or the new one.
pub(super) fn write(directory: &Path, known: &Known) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    let new = directory.join(format!("{FILE}.new"));
    let mut options = OpenOptions::new();
    let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    let known = Known { format: FORMAT, ..known.clone() };
    file.write_all(&serde_json::to_vec_pretty(&known)?)?;
    file.sync_all()?;
    fs::rename(&new, directory.join(FILE))?;
    File::open(directory)?.sync_all()
}

/// The Service and its endpoints as objects, a slice for each family.
pub(super) fn objects(known: &Known) -> Option<(Service, Vec<EndpointSlice>)> {
    if known.cluster_ips.is_empty() || known.endpoints.is_empty() {
        return None;
    }
    let service = json!({
        "metadata": {"namespace": NAMESPACE, "name": NAME},
        "spec": {
            "clusterIP": known.cluster_ips.first(),
            "clusterIPs": known.cluster_ips,
            "ports": [{"name": PORT_NAME, "protocol": "TCP", "port": known.port}],
        },
    });
    let slices = known.endpoints.iter().enumerate().map(|(number, endpoint)| {
        json!({
            "metadata": {
                "namespace": NAMESPACE,
                "name": format!("{NAME}-{number}"),
                "labels": {"kubernetes.io/service-name": NAME},
            },
            "addressType": if endpoint.is_ipv4() { "IPv4" } else { "IPv6" },
            "endpoints": [{"addresses": [endpoint.ip()]}],
            "ports": [{"name": PORT_NAME, "protocol": "TCP", "port": endpoint.port()}],
        })
    });
    let slices: Result<_, _> = slices.map(serde_json::from_value).collect();
    Some((serde_json::from_value(service).ok()?, slices.ok()?))
}
