//! Keeps ports that the kernel's connections have from being given out again.

use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{conntrack::ports, maps::pins::Pins};

/// Looks before anything is programmed, and in a task of its own once everything is: from then
/// on what may get such a port comes by the programs.
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

/// Without it all but a few new connections find a port of their own.
async fn reserve(pins: &Pins) {
    let pins = pins.clone();
    match tokio::task::spawn_blocking(move || ports::reserve(&pins)).await {
        Ok(Ok(0)) | Err(_) => {}
        Ok(Ok(connections)) => {
            tracing::info!(connections, "ports of connections that the kernel knows are kept");
        }
        Ok(Err(error)) => {
            tracing::warn!(%error, "cannot tell which ports connections of the kernel have");
        }
    }
}
