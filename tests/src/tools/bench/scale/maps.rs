//! How soon a change is in the pinned maps.

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lb_agent::maps::{mapped::MappedArray, pins::Pins, read::read_state};
use lb_common::abi::address::{Address4, Be16};
use lb_common::abi::frontend::{FrontendKey, TCP};
use lb_common::abi::service::Service;

use super::objects::{PORT, cluster_ip};

/// How long a change may take.
const PATIENCE: Duration = Duration::from_secs(20);
/// How often the map is read: the agent has the other processor meanwhile.
const POLL: Duration = Duration::from_micros(20);

/// SERVICES, and where each Service is there.
pub struct Watcher {
    services: MappedArray<Service>,
    /// The index of each Service's port.
    indices: Vec<u32>,
}

impl Watcher {
    /// The maps of an agent that has programmed all of `count` Services.
    ///
    /// # Errors
    /// The maps cannot be read, or a Service is missing.
    pub fn open(bpf_dir: &Path, count: u32) -> Result<Self> {
        let pins = Pins::new(bpf_dir);
        let frontends: HashMap<_, _> = read_state(&pins)?.frontends4.into_iter().collect();
        let index_of = |service: u32| {
            let ip: Ipv4Addr = cluster_ip(service);
            let key = FrontendKey::new(Address4::from(ip), Be16::new(PORT), TCP);
            let frontend = frontends.get(&key);
            frontend.map(|frontend| frontend.service).with_context(|| format!("no frontend {ip}"))
        };
        let indices = (0..count).map(index_of).collect::<Result<_>>()?;
        let services = MappedArray::readable(pins.open("SERVICES")?)?;
        Ok(Self { services, indices })
    }

    /// Waits until a Service has so many backends. Returns when it was seen.
    ///
    /// # Errors
    /// It takes longer than [`PATIENCE`].
    pub fn wait(&mut self, service: u32, backends: u32) -> Result<Instant> {
        let start = Instant::now();
        loop {
            let found = self.services.load(self.indices[service as usize])?.cluster.length();
            let now = Instant::now();
            if found == backends {
                return Ok(now);
            }
            ensure!(
                now - start < PATIENCE,
                "Service {service} has {found} backends, not {backends}, after {PATIENCE:?}"
            );
            thread::sleep(POLL);
        }
    }
}
