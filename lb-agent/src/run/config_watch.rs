//! Waits for the file of `--config` to say something else.
//!
//! kube-proxy ends when its file changes, to be started again with the new one. So does the
//! agent, but not for a file that it could not start with, nor for one that says the same in
//! other words. A mounted ConfigMap changes by a link that is swapped, so directories are
//! watched and not the file.

use std::{path::Path, time::Duration};

use notify::{RecursiveMode, Watcher as _};
use tokio::{sync::mpsc, time::timeout};

use crate::config::Config;

/// How long a file that is written to must rest before it is read.
const REST: Duration = Duration::from_millis(50);
/// When to look though nobody tells of a change: not every file system does.
const LOOK: Duration = Duration::from_secs(60);

/// Ends when the file is valid and makes another configuration than this one.
///
/// A directory that cannot be watched is told in the log; the file is then read each minute.
pub(super) async fn changed(config: &Config, file: &Path) {
    let (sender, mut notices) = mpsc::channel(1);
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        if !event.is_ok_and(|event| event.kind.is_access()) {
            // One that waits already stands for all.
            let _ = sender.try_send(());
        }
    });
    let mut fault = None;
    loop {
        match &mut watcher {
            Ok(watcher) => watch(watcher, file),
            Err(error) => tracing::debug!(%error, "no inotify: the file is read each minute"),
        }
        if is_different(config, file, &mut fault) {
            return;
        }
        let notice = timeout(LOOK, notices.recv()).await;
        if let Ok(None) = notice {
            tokio::time::sleep(LOOK).await;
        }
        while let Ok(Some(())) = timeout(REST, notices.recv()).await {}
    }
}

/// Watches where the file is, and where the file is that its links lead to. To watch a
/// directory once more is nothing, and it may be another one by now.
fn watch(watcher: &mut notify::RecommendedWatcher, file: &Path) {
    let target = file.canonicalize().ok();
    for path in [Some(file), target.as_deref()].into_iter().flatten() {
        let directory = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        if let Err(error) = watcher.watch(directory, RecursiveMode::NonRecursive) {
            let directory = directory.display();
            tracing::debug!(%directory, %error, "cannot watch: the file is read each minute");
        }
    }
}

fn is_different(config: &Config, file: &Path, fault: &mut Option<String>) -> bool {
    match config.reload() {
        Ok(new) => {
            if fault.take().is_some() {
                tracing::info!(file = %file.display(), "the configuration is valid again");
            }
            new.kube_proxy != config.kube_proxy
        }
        Err(error) => {
            let now = anyhow::Error::from(error);
            let now = format!("{now:#}");
            if fault.as_ref() != Some(&now) {
                tracing::error!(
                    error = %now,
                    "the changed configuration is not valid: going on with the one before"
                );
            }
            *fault = Some(now);
            false
        }
    }
}
