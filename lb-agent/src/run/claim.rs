//! One agent in a network namespace: two agents with different `--bpf-dir` would both attach their
//! programs to the same hooks.
//!
//! A socket with an abstract name is the claim: the kernel lets one process of the namespace have
//! it, and takes it back when that process ends.

use std::{
    io,
    os::unix::net::UnixListener,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};

use crate::report::{self, AskError};

/// How long an agent that was asked to end may take to close its sockets.
const PATIENCE: Duration = Duration::from_secs(2);
/// Time between two attempts.
const POLL: Duration = Duration::from_millis(20);

/// Claims the network namespace. `None` if the claim cannot be made, but no agent is known to have
/// it.
///
/// # Errors
/// If another agent serves the namespace; the error names it.
pub(super) async fn claim() -> anyhow::Result<Option<UnixListener>> {
    let started = Instant::now();
    loop {
        match report::listen_for_namespace() {
            Ok(listener) => return Ok(Some(listener)),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            Err(error) => {
                tracing::warn!(%error, "cannot see whether another lb-agent serves this node");
                return Ok(None);
            }
        }
        let asked = tokio::task::spawn_blocking(report::report_of_namespace);
        match asked.await.context("cannot ask the other agent")? {
            Ok((first, process)) if started.elapsed() > PATIENCE => bail!(
                "another lb-agent ({}version {}, started {:.0}) serves this node with --bpf-dir \
                 {}, and two would both translate its packets: end it first; of two DaemonSets or \
                 Helm releases remove one",
                if process > 0 { format!("process {process}, ") } else { String::new() },
                first.version,
                first.started,
                first.bpf_dir
            ),
            Err(error @ AskError::NotRoot(_)) => {
                tracing::warn!(
                    %error,
                    "cannot see whether another lb-agent serves this node: a process that is not \
                     root has taken its socket"
                );
                return Ok(None);
            }
            Err(error) if started.elapsed() > PATIENCE => {
                return Err(error).context(
                    "another process of root holds the socket of this node's lb-agent: end it \
                     first (`ss -xlp` shows @lb-agent/namespace)",
                );
            }
            // It ends just now.
            _ => tokio::time::sleep(POLL).await,
        }
    }
}
