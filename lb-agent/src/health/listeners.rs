//! The sockets of the health check servers of Services.
//!
//! [`health_checks`](lb_control::desired::health_checks) decides which Service listens on which
//! address; this module opens, closes and retries. Invariant: a Service's socket is closed
//! before the same address is bound for another Service.

use std::{collections::BTreeMap, io, net::SocketAddr, sync::Arc};

use lb_control::{
    desired::health_checks::{Layout, Wanted},
    model::{IpFamily, event::ObjectKind},
};
use nix::sys::socket::{setsockopt, sockopt};
use tokio::{
    net::{TcpListener, TcpSocket},
    sync::watch,
    task::JoinHandle,
    time::sleep,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    Health, http,
    server::{BIND_RETRY, ServiceCheck, service_check},
};
use crate::events::{EventReason, Refusals, Subject};

/// How many connections may wait to be accepted.
const BACKLOG: u32 = 128;

/// The health check servers of all Services.
#[derive(Debug)]
pub struct Listeners {
    node_name: String,
    wanted: watch::Receiver<Wanted>,
    health: Health,
    refusals: Refusals,
    open: BTreeMap<SocketAddr, Listener>,
    /// Services with a socket that could not be bound.
    failed: BTreeMap<Arc<str>, Subject>,
    connections: TaskTracker,
}

#[derive(Debug)]
struct Listener {
    service: Arc<str>,
    cancel: CancellationToken,
    accepting: JoinHandle<()>,
}

impl Listeners {
    /// Starts without servers. [`Self::run`] follows `wanted` and publishes addresses that
    /// cannot be bound to `refusals`.
    pub fn new(
        node_name: &str,
        wanted: watch::Receiver<Wanted>,
        health: Health,
        refusals: Refusals,
    ) -> Self {
        Self {
            node_name: node_name.to_owned(),
            wanted,
            health,
            refusals,
            open: BTreeMap::new(),
            failed: BTreeMap::new(),
            connections: TaskTracker::new(),
        }
    }

    /// Runs until cancelled or until the sender of `wanted` is gone, then closes all servers.
    pub async fn run(mut self, cancel: CancellationToken) {
        loop {
            let is_complete = self.follow().await;
            tokio::select! {
                () = cancel.cancelled() => break,
                changed = self.wanted.changed() => if changed.is_err() { break },
                () = sleep(BIND_RETRY), if !is_complete => {}
            }
        }
        self.close_except(&Layout::default()).await;
        self.connections.close();
        self.connections.wait().await;
    }

    /// Closes and opens servers to match `wanted`. Returns whether all could be bound.
    async fn follow(&mut self) -> bool {
        let layout = self.wanted.borrow_and_update().layout();
        self.close_except(&layout).await;
        let mut failures = BTreeMap::new();
        let mut is_complete = true;
        // Only a Service's first failure is published: prefer addresses that clients reach.
        let mut listeners: Vec<_> = layout.listeners.iter().collect();
        listeners.sort_by_key(|(address, _)| address.ip().is_loopback());
        for (address, service) in listeners {
            if self.open.contains_key(address) {
                continue;
            }
            if let Err(error) =
                bind(*address).map(|listener| self.open(listener, *address, service))
            {
                is_complete = false;
                let network = if address.is_ipv4() { "tcp4" } else { "tcp6" };
                let cause = format!("listen {network} {address}: bind: {}", cause(&error));
                failures.entry(Arc::clone(service)).or_insert(cause);
            }
        }
        for (service, owner) in layout.conflicts {
            failures.insert(service, format!("the port belongs to the Service {owner}"));
        }
        self.publish(failures);
        is_complete
    }

    fn open(&mut self, listener: TcpListener, address: SocketAddr, service: &Arc<str>) {
        let router = service_check(ServiceCheck {
            service: Arc::clone(service),
            family: IpFamily::of(address.ip()),
            wanted: self.wanted.clone(),
            health: self.health.clone(),
        });
        let cancel = CancellationToken::new();
        let accepting = http::accept(listener, router, cancel.clone(), self.connections.clone());
        let accepting = tokio::spawn(accepting);
        self.open.insert(address, Listener { service: Arc::clone(service), cancel, accepting });
        tracing::debug!(%service, %address, "health check port opened");
    }

    /// Closes each socket that `layout` does not have, or has for another Service.
    async fn close_except(&mut self, layout: &Layout) {
        let is_obsolete = |address: &SocketAddr, listener: &mut Listener| {
            layout.listeners.get(address) != Some(&listener.service)
        };
        let obsolete: Vec<_> = self.open.extract_if(.., is_obsolete).collect();
        for (_, listener) in &obsolete {
            listener.cancel.cancel();
        }
        for (address, Listener { service, accepting, .. }) in obsolete {
            if let Err(error) = accepting.await {
                tracing::warn!(%service, %address, %error, "health check server failed");
            }
            tracing::debug!(%service, %address, "health check port closed");
        }
    }

    /// Publishes the failures, and withdraws those of Services that have recovered.
    fn publish(&mut self, failures: BTreeMap<Arc<str>, String>) {
        for (service, subject) in std::mem::take(&mut self.failed) {
            if !failures.contains_key(&service) {
                self.refusals.withdraw(subject, EventReason::FailedToStartServiceHealthcheck);
            }
        }
        for (service, cause) in failures {
            let wanted = self.wanted.borrow();
            let Some(check) = wanted.checks.get(&service) else { continue };
            let note = format!(
                "node {} failed to start healthcheck \"{service}\" on port {}: {cause}",
                self.node_name, check.port
            );
            let uid = Some(check.uid.to_string()).filter(|uid| !uid.is_empty());
            let subject = Subject { kind: ObjectKind::Service, name: (&*service).into(), uid };
            drop(wanted);
            let reason = EventReason::FailedToStartServiceHealthcheck;
            self.refusals.refuse(subject.clone(), reason, note);
            self.failed.insert(service, subject);
        }
    }
}

/// Binds one address, or all addresses of an IP family if `address` is unspecified.
fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        let socket = TcpSocket::new_v6()?;
        setsockopt(&socket, sockopt::Ipv6V6Only, &true)?;
        socket
    };
    socket.set_reuseaddr(true)?;
    // During duplicate address detection an IPv6 address can only be bound with IP_FREEBIND.
    setsockopt(&socket, sockopt::IpFreebind, &true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// The error in Go's words, which alerts search for.
fn cause(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::AddrInUse => "address already in use".to_owned(),
        io::ErrorKind::PermissionDenied => "permission denied".to_owned(),
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests;
