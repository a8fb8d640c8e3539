//! Checks the dependencies with cargo-deny, by the rules in `deny.toml`.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::silent;
use crate::setup::cargo_deny;
use crate::workspace::Workspace;

/// The prefix of the name of the database's directory; a hash of its address follows.
const DATABASE: &str = "advisory-db-";

/// Checks licences, sources, and banned crates.
pub(super) fn rules(workspace: &Workspace) -> Result<String> {
    let mut deny = workspace.command(cargo_deny::path(workspace));
    deny.args(["--all-features", "check", "--hide-inclusion-graph"]);
    silent(workspace, "cargo-deny", deny.args(["bans", "licenses", "sources"]))
}

/// Checks for known vulnerabilities if their database has been fetched; xtask does not fetch it.
pub(super) fn advisories(workspace: &Workspace) -> Result<String> {
    let program = cargo_deny::path(workspace);
    let databases = databases(env::var_os("CARGO_HOME").map(PathBuf::from), env::home_dir())?;
    if !has_database(&databases) {
        return Ok(format!(
            "advisories: not checked, no database at {}; `{} fetch db` gets it",
            databases.display(),
            program.display()
        ));
    }
    let mut deny = workspace.command(program);
    deny.args(["--offline", "--all-features", "check", "--hide-inclusion-graph", "advisories"]);
    silent(workspace, "cargo-deny-advisories", &mut deny)
}

/// The directory of cargo-deny's databases.
fn databases(cargo_home: Option<PathBuf>, home: Option<PathBuf>) -> Result<PathBuf> {
    let cargo = cargo_home.or_else(|| home.map(|home| home.join(".cargo")));
    Ok(cargo.context("neither CARGO_HOME nor HOME is set")?.join("advisory-dbs"))
}

fn has_database(databases: &Path) -> bool {
    let is_one = |name: &str, path: &Path| name.starts_with(DATABASE) && path.is_dir();
    fs::read_dir(databases).is_ok_and(|entries| {
        entries.flatten().any(|entry| is_one(&entry.file_name().to_string_lossy(), &entry.path()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_database_is_where_cargo_deny_keeps_it() {
        let at = |cargo: Option<&str>, home: Option<&str>| {
            databases(cargo.map(Into::into), home.map(Into::into)).ok()
        };
        assert_eq!(at(Some("/c"), Some("/h")), Some("/c/advisory-dbs".into()));
        assert_eq!(at(None, Some("/h")), Some("/h/.cargo/advisory-dbs".into()));
        assert_eq!(at(None, None), None);
    }

    #[test]
    fn a_lock_file_alone_is_no_database() {
        let dir = tempfile::tempdir().expect("a directory");
        fs::write(dir.path().join("db.lock"), "").expect("a file");
        assert!(!has_database(dir.path()));
        fs::create_dir(dir.path().join("advisory-db-0123")).expect("a directory");
        assert!(has_database(dir.path()));
        assert!(!has_database(&dir.path().join("absent")));
    }
}
