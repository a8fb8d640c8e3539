//! Waits for a change of the configuration in the file of `--config`.
//!
//! Like kube-proxy, the agent exits when its file changes, and expects to be restarted. It keeps
//! running if the new file is invalid or makes the same configuration. The kubelet updates a
//! mounted ConfigMap by replacing a symbolic link, so this watches directories, not the file.

use std::{path::Path, time::Duration};

use notify::{RecursiveMode, Watcher as _};
use tokio::{sync::mpsc, time::timeout};

use crate::config::Config;

/// How long a file must be unchanged before it is read.
const QUIET: Duration = Duration::from_millis(50);
/// How often the file is read without a notification: some file systems send none.
const POLL: Duration = Duration::from_secs(60);

/// Returns when the file is valid and makes a configuration different from `config`.
///
/// A directory that cannot be watched is logged; the file is then read every minute.
pub(super) async fn changed(config: &Config, file: &Path) {
    let (sender, mut notices) = mpsc::channel(1);
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        if !event.is_ok_and(|event| event.kind.is_access()) {
            // A full channel already has a notice that covers this one.
            let _ = sender.try_send(());
        }
    });
    let mut last_error = None;
    loop {
        match &mut watcher {
            Ok(watcher) => watch(watcher, file),
            Err(error) => {
                tracing::debug!(%error, "cannot use inotify: the file is read every minute")
            }
        }
        if is_different(config, file, &mut last_error) {
            return;
        }
        let notice = timeout(POLL, notices.recv()).await;
        if let Ok(None) = notice {
            tokio::time::sleep(POLL).await;
        }
        while let Ok(Some(())) = timeout(QUIET, notices.recv()).await {}
    }
}

/// Watches the directory of the file and the directory of the file that its links lead to. Both
/// are watched again each time, because the kubelet may have replaced a directory; watching the
/// same one twice has no effect.
fn watch(watcher: &mut notify::RecommendedWatcher, file: &Path) {
    let target = file.canonicalize().ok();
    for path in [Some(file), target.as_deref()].into_iter().flatten() {
        let directory = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        if let Err(error) = watcher.watch(directory, RecursiveMode::NonRecursive) {
            let directory = directory.display();
            tracing::debug!(%directory, %error, "cannot watch: the file is read every minute");
        }
    }
}

/// Whether the file makes another configuration. An invalid file does not; its error is logged
/// once.
fn is_different(config: &Config, file: &Path, last_error: &mut Option<String>) -> bool {
    match config.reload() {
        Ok(new) => {
            if last_error.take().is_some() {
                tracing::info!(file = %file.display(), "the configuration is valid again");
            }
            new.kube_proxy != config.kube_proxy
        }
        Err(error) => {
            let text = format!("{:#}", anyhow::Error::from(error));
            if last_error.as_ref() != Some(&text) {
                tracing::error!(
                    error = %text,
                    "the changed configuration is invalid: keeping the previous one; \
                     correct the file"
                );
            }
            *last_error = Some(text);
            false
        }
    }
}
