//! What the agent asks of the kernel for its own process.

use std::fs;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::kube_proxy::KubeProxyConfiguration;

const OOM_SCORE_ADJ: &str = "/proc/self/oom_score_adj";

/// Allows as many open files as the system does: what programs are given by default is less
/// than the health checks of some hundred Services take.
pub(super) fn raise_file_limit() {
    let files = Resource::RLIMIT_NOFILE;
    let raised = getrlimit(files).and_then(|(_, hard)| setrlimit(files, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
}

/// Says how readily the process is killed when memory is short: a node without its agent
/// hears of no changes.
pub fn adjust_oom_score(kube_proxy: &KubeProxyConfiguration) {
    let Some(score) = kube_proxy.oom_score_adj else { return };
    if let Err(error) = fs::write(OOM_SCORE_ADJ, score.to_string()) {
        tracing::debug!(score, %error, "cannot set oom_score_adj");
    }
}
