//! The agent's own process: resource limits, OOM score, and how it ends by a panic.

use std::{
    backtrace::{Backtrace, BacktraceStatus},
    fs, panic,
};

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

/// Makes a panic of any task or thread end the process, with a line in the log: an agent without
/// its sweep, say, or without a server looks healthy. The datapath goes on, as it does after
/// SIGKILL.
pub fn end_on_panic() {
    panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string);
        let message = panic.payload_as_str().unwrap_or("no message");
        let backtrace = Backtrace::capture();
        let is_captured = backtrace.status() == BacktraceStatus::Captured;
        let backtrace = is_captured.then(|| backtrace.to_string());
        tracing::error!(
            place,
            message,
            backtrace,
            "the agent has a bug and exits: the programs stay attached and serve the last state, a \
             restart continues from it; please report this line"
        );
        std::process::abort();
    }));
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::process::ExitStatusExt,
        process::{Command, Stdio},
        time::Duration,
    };

    use crate::logs;

    /// Set in the process that is to panic.
    const PANICS: &str = "LB_TEST_PANICS";

    #[test]
    fn a_panic_in_a_task_ends_the_process_and_is_logged() {
        if std::env::var_os(PANICS).is_some() {
            logs::start(logs::Format::Json, 0);
            super::end_on_panic();
            let runtime = tokio::runtime::Runtime::new().expect("a runtime");
            runtime.spawn(async { panic!("prepared") });
            let wait = async { tokio::time::sleep(Duration::from_secs(10)).await };
            return runtime.block_on(wait);
        }
        let this = std::env::current_exe().expect("this program");
        let name = "run::process::tests::a_panic_in_a_task_ends_the_process_and_is_logged";
        let mut again = Command::new(this);
        again.args(["--exact", name, "--nocapture"]).env(PANICS, "1").stdout(Stdio::null());
        let output = again.output().expect("this program again");
        let log = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.signal(), Some(libc::SIGABRT), "{log}");
        let line = log.lines().find(|line| line.contains("the agent has a bug")).expect("a line");
        let line: serde_json::Value = serde_json::from_str(line).expect("JSON");
        assert!(line.to_string().contains("prepared"), "{line}");
        assert!(line.to_string().contains("process.rs"), "{line}");
    }
}
