//! Reserves the source ports that connections of the kernel use, so that lb's source NAT does
//! not choose them.

use tokio::task;
use tokio_util::sync::CancellationToken;

use super::agent::Agent;
use crate::{conntrack::ports, maps::pins::Pins};

/// When lb takes over from another proxy: reserves ports before the first Service is programmed, and in a
/// task again once all are: from then on, which `programmed` says, the programs handle all new connections
/// that could get such a port.
pub(super) async fn start(agent: &Agent, programmed: &CancellationToken) {
    let pins = agent.pins.clone();
    let is_takeover = task::spawn_blocking(move || ports::is_takeover(&pins)).await;
    if !matches!(is_takeover, Ok(Ok(true))) {
        return;
    }
    reserve(&agent.pins).await;
    let (pins, cancel, programmed) = (agent.pins.clone(), agent.cancel.clone(), programmed.clone());
    agent.tasks.spawn(async move {
        tokio::select! {
            () = programmed.cancelled() => reserve(&pins).await,
            () = cancel.cancelled() => {}
        }
    });
}

/// Failure is not fatal: few new connections choose a port that is in use.
async fn reserve(pins: &Pins) {
    let pins = pins.clone();
    match task::spawn_blocking(move || ports::reserve(&pins)).await {
        Ok(Ok(0)) | Err(_) => {}
        Ok(Ok(connections)) => {
            tracing::info!(connections, "reserved source ports already used by conntrack");
        }
        Ok(Err(error)) => {
            tracing::warn!(
                %error,
                "cannot read conntrack: its source ports are not reserved, so a few new \
                 connections of external clients may fail"
            );
        }
    }
}
