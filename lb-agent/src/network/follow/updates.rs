//! Keeps what is known of the network namespace up to date: by messages, and by reading all of it
//! again after messages were lost.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use futures::TryStreamExt;
use rtnetlink::packet_core::NetlinkPayload;
use tokio::time::timeout;
use tracing::{debug, warn};

use super::{Interfaces, Message, inbox::Received};
use crate::network::{
    error::InterfaceError,
    interfaces::Network,
    messages::{Stale, apply, parse_link, read, read_routes},
    own_packets,
};

/// How long to wait for more messages of the same change, and for all of them.
const GATHER: Duration = Duration::from_micros(500);
const GATHER_ALL: Duration = Duration::from_millis(5);
/// At most so many messages are applied before their consequences are.
const BATCH: usize = 1_024;

impl Interfaces {
    /// Applies a message and those that follow within [`GATHER`]. After a change of a link, only
    /// those that are there already, so that its programs are attached at once.
    pub(super) async fn gather(&mut self, first: Received<Message>) -> Stale {
        let mut stale = Stale::default();
        self.apply(first, &mut stale);
        let end = Instant::now() + GATHER_ALL;
        for _ in 1..BATCH {
            let next = if stale.link_changed || Instant::now() >= end {
                self.messages.try_next()
            } else {
                timeout(GATHER, self.messages.next()).await.ok()
            };
            match next {
                // The loop sees the end when it asks again.
                None | Some(Received::Closed) => break,
                Some(received) => self.apply(received, &mut stale),
            }
        }
        stale
    }

    fn apply(&mut self, received: Received<Message>, stale: &mut Stale) {
        match received {
            Received::Message((message, _)) => match message.payload {
                NetlinkPayload::InnerMessage(message) => apply(&mut self.network, message, stale),
                NetlinkPayload::Overrun(_) => self.overrun("the kernel"),
                _ => {}
            },
            Received::Overrun => self.overrun("the agent"),
            Received::Closed => {}
        }
    }

    fn overrun(&mut self, dropped_by: &str) {
        self.resync.overrun();
        let within = self.resync.at().saturating_duration_since(Instant::now());
        warn!(dropped_by, ?within, "netlink messages were dropped: reading all interfaces again");
        if let Some(metrics) = &self.options.metrics {
            metrics.netlink_overran();
        }
    }

    /// Reads everything again.
    pub(super) async fn read_all(&mut self) -> Result<(), InterfaceError> {
        self.attached.clear();
        self.xdp.recheck_all();
        let neighbours = std::mem::take(&mut self.network.neighbours);
        self.network = Network { neighbours, ..read(&self.handle).await? };
        self.find_unparsed();
        // Others set sysctls too.
        own_packets::accept();
        self.resync.done(Instant::now());
        Ok(())
    }

    /// Finds interfaces whose description netlink-packet-route cannot parse and drops: they exist,
    /// and are missing for the second time. An interface that has just come is missing once.
    fn find_unparsed(&mut self) {
        let all = match nix::net::if_::if_nameindex() {
            Ok(all) => all,
            Err(error) => return debug!(%error, "cannot count the interfaces"),
        };
        let missing: BTreeMap<u32, String> = all
            .iter()
            .filter(|interface| !self.network.links.contains_key(&interface.index()))
            .map(|interface| (interface.index(), interface.name().to_string_lossy().into_owned()))
            .collect();
        let again = missing.iter().filter(|(index, _)| self.undescribed.contains_key(index));
        self.unparsed = again
            .map(|(_, name)| {
                format!("the kernel's description of {name} cannot be parsed: its Service traffic is not handled; please report it")
            })
            .collect();
        self.undescribed = missing;
    }

    /// Reads what messages do not say. Returns whether anything is other than before.
    pub(super) async fn refresh(&mut self, stale: Stale) -> Result<bool, InterfaceError> {
        let mut is_changed = stale.interfaces;
        for index in stale.peers {
            let mut links = self.handle.link().get().match_index(index).execute();
            // The interface may be gone already.
            if let Ok(Some(message)) = links.try_next().await {
                let (index, link) = parse_link(&message);
                let known = self.network.links.insert(index, link);
                is_changed |= known.as_ref() != self.network.links.get(&index);
            }
        }
        if stale.routes {
            let default_routes = read_routes(&self.handle).await?;
            is_changed |= self.network.default_routes != default_routes;
            self.network.default_routes = default_routes;
        }
        Ok(is_changed)
    }
}
