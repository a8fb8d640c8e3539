//! Resource limits and OOM score of the agent's own process.

use std::fs;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::kube_proxy::KubeProxyConfiguration;

const OOM_SCORE_ADJ: &str = "/proc/self/oom_score_adj";

/// Raises the soft limit of open files to the hard limit: the default is too low for the health
/// check sockets of several hundred Services.
pub(super) fn raise_file_limit() {
    let files = Resource::RLIMIT_NOFILE;
    let raised = getrlimit(files).and_then(|(_, hard)| setrlimit(files, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(%error, "cannot raise the limit of open files, which health checks need");
    }
}

/// Sets how likely the OOM killer ends this process: without its agent, a node does not follow
/// changes.
pub fn adjust_oom_score(kube_proxy: &KubeProxyConfiguration) {
    let Some(score) = kube_proxy.oom_score_adj else { return };
    if let Err(error) = fs::write(OOM_SCORE_ADJ, score.to_string()) {
        tracing::debug!(score, %error, "cannot set oom_score_adj");
    }
}
