//! `lb-agent status --ready-file`: whether an agent is prepared, for a startup probe.
//!
//! It needs no privileges and asks neither the kernel nor the agent: the agent wrote the file.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// What the agent wrote into its ready file: `programmed`, or `prepared` while it waits for another
/// agent.
///
/// # Errors
/// [`NotReady`] if the file is not there or cannot be read.
pub fn ready(file: &Path) -> Result<String, NotReady> {
    fs::read_to_string(file).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => NotReady::Missing { path: file.to_owned() },
        _ => NotReady::Unread { path: file.to_owned(), source },
    })
}

/// The agent is not prepared.
#[derive(Debug, thiserror::Error)]
pub enum NotReady {
    /// The file is not there.
    #[error(
        "not ready: {} is not there; the agent's log says what it still waits for",
        path.display()
    )]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// The file cannot be read.
    #[error("cannot read {}", path.display())]
    Unread {
        /// The file.
        path: PathBuf,
        /// The error of the kernel.
        #[source]
        source: io::Error,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_is_what_the_file_says() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("ready");
        let error = ready(&file).expect_err("no file").to_string();
        assert!(error.contains("is not there"), "{error}");
        fs::write(&file, "programmed\n").expect("a file");
        assert_eq!(ready(&file).expect("a file"), "programmed\n");
    }
}
