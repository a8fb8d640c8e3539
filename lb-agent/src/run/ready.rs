//! The file of `--ready-file`, by which a startup probe knows that this agent may take over.
//!
//! The file exists only while its content is true of this process: it is removed at the start.

use std::{fs, io, path::Path};

use anyhow::Context as _;

use crate::config::Config;

/// This agent has loaded its programs and listed the objects, and waits for another one to end.
pub(super) const PREPARED: &str = "prepared";
/// This agent serves, and the maps hold the first complete state.
pub(super) const PROGRAMMED: &str = "programmed";

/// Removes the file of an earlier agent.
///
/// # Errors
/// If it is there and cannot be removed: it would say something of this agent.
pub(super) fn remove(config: &Config) -> anyhow::Result<()> {
    let Some(file) = &config.ready_file else { return Ok(()) };
    match fs::remove_file(file) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error)
            .with_context(|| format!("cannot remove {}: correct --ready-file", file.display())),
        _ => Ok(()),
    }
}

/// Says `what` in the file.
pub(super) fn write(config: &Config, what: &str) {
    let Some(file) = &config.ready_file else { return };
    if let Err(error) = replace(file, what) {
        tracing::error!(
            %error,
            file = %file.display(),
            "cannot write the file of --ready-file: startup probes that wait for it fail; make its \
             directory writable"
        );
    }
}

/// By a rename, so that whoever reads the file reads all of it.
fn replace(file: &Path, what: &str) -> io::Result<()> {
    let mut name = file.as_os_str().to_owned();
    name.push(".new");
    fs::write(&name, format!("{what}\n"))?;
    fs::rename(&name, file)
}
