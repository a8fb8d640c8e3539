//! Reads the source addresses of routes beside the loop that follows the network: with many routes
//! it takes longer than a message may wait.

use std::{
    collections::BTreeSet,
    net::IpAddr,
    time::{Duration, Instant},
};

use tokio::task::JoinHandle;
use tracing::{info, warn};

use super::Interfaces;
use crate::{
    maps::sources::SourcesByRoute,
    network::{error::InterfaceError, sources},
    programs::hook::Role,
};

/// The minimum interval between two readings of the source addresses of routes.
const READ_SOURCES: Duration = Duration::from_millis(100);

impl Interfaces {
    /// Begins to read the source addresses of routes, if that is due and no reading goes on.
    pub(super) fn read_sources(&mut self) {
        let now = Instant::now();
        if !self.reads_sources || self.sources_read.is_some() || now < self.read_sources_at {
            return;
        }
        self.reads_sources = false;
        self.read_sources_at = now + READ_SOURCES;
        let is_external = |(_, role): &(&u32, &Role)| **role == Role::External;
        let external: BTreeSet<u32> =
            self.roles.iter().filter(is_external).map(|(index, _)| *index).collect();
        self.sources_read =
            Some(tokio::spawn(
                async move { sources::read(|index| external.contains(&index)).await },
            ));
    }

    /// Stores the source addresses of routes and publishes them.
    pub(super) fn apply_sources(
        &mut self,
        read: Result<SourcesByRoute, InterfaceError>,
    ) -> Result<(), InterfaceError> {
        let mut sources = read?;
        // An answer to another address, as one of a link alone, would not be known as this node's.
        let published = self.published.borrow();
        sources.retain(|_, source| published.addresses.contains(source));
        drop(published);
        let left_out = self.sources.set(&sources)?;
        if left_out > 0 {
            warn!(
                left_out,
                "map SOURCES4 or SOURCES6 is full: packets to {left_out} route prefixes get the \
                 source address of the shorter prefix around them"
            );
        }
        let route_sources: BTreeSet<IpAddr> = sources.into_values().collect();
        self.published.send_if_modified(|published| {
            let is_changed = published.route_sources != route_sources;
            if is_changed {
                info!(sources = ?route_sources, "source addresses of routes by external devices");
                published.route_sources = route_sources;
            }
            is_changed
        });
        Ok(())
    }
}

/// The result of a reading that goes on; never ready if there is none.
pub(super) async fn finished(
    reading: &mut Option<JoinHandle<Result<SourcesByRoute, InterfaceError>>>,
) -> Result<SourcesByRoute, InterfaceError> {
    match reading {
        // The task is neither aborted nor does it panic while this one runs.
        Some(task) => task.await.unwrap_or(Err(InterfaceError::Closed)),
        None => std::future::pending().await,
    }
}
