//! Reserves the source ports that connections of the kernel use, so that lb's source NAT does
//! not choose them.

use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{conntrack::ports, maps::pins::Pins};

/// Reserves ports before the first Service is programmed, and in a task again once all are:
/// from then on the programs handle all new connections that could get such a port.
pub(super) async fn start(
    pins: &Pins,
    programmed: CancellationToken,
    tasks: &TaskTracker,
    cancel: &CancellationToken,
) {
    reserve(pins).await;
    let (pins, cancel) = (pins.clone(), cancel.clone());
    tasks.spawn(async move {
        tokio::select! {
            () = programmed.cancelled() => reserve(&pins).await,
            () = cancel.cancelled() => {}
        }
    });
}

/// Failure is not fatal: few new connections choose a port that is in use.
async fn reserve(pins: &Pins) {
    let pins = pins.clone();
    match tokio::task::spawn_blocking(move || ports::reserve(&pins)).await {
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
