//! cargo's metadata of the packages of the workspace.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::workspace::Workspace;

#[derive(Deserialize)]
pub(super) struct Metadata {
    /// Only those of the workspace.
    pub(super) packages: Vec<Package>,
}

#[derive(Deserialize)]
pub(super) struct Package {
    pub(super) name: String,
    pub(super) license: Option<String>,
    pub(super) manifest_path: PathBuf,
    pub(super) dependencies: Vec<Dependency>,
}

#[derive(Deserialize)]
pub(super) struct Dependency {
    pub(super) name: String,
    kind: Option<String>,
}

impl Metadata {
    pub(super) fn of(workspace: &Workspace) -> Result<Self> {
        let output = workspace
            .cargo("metadata")
            .args(["--format-version", "1", "--no-deps"])
            .output()
            .context("cannot start cargo metadata")?;
        if !output.status.success() {
            bail!("{}", String::from_utf8_lossy(&output.stderr).trim_end());
        }
        serde_json::from_slice(&output.stdout).context("cannot read cargo's metadata")
    }
}

impl Package {
    /// Its directory, relative to the workspace.
    pub(super) fn dir(&self, root: &Path) -> Result<PathBuf> {
        let dir = self.manifest_path.parent().unwrap_or(root);
        let relative = dir.strip_prefix(root).with_context(|| {
            format!("{} is outside of the workspace", self.manifest_path.display())
        })?;
        Ok(relative.to_path_buf())
    }
}

impl Dependency {
    pub(super) fn is_for_tests(&self) -> bool {
        self.kind.as_deref() == Some("dev")
    }
}
