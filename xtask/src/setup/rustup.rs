//! The parts of the host toolchain that `cargo xtask check` needs.

use anyhow::{Context, Result};

use crate::progress::Progress;
use crate::run;
use crate::workspace::Workspace;

/// A component's name, and the cargo subcommand that it brings.
const COMPONENTS: [(&str, &str); 2] = [("rustfmt", "fmt"), ("clippy", "clippy")];

pub(super) fn ensure(workspace: &Workspace) -> Result<bool> {
    let mut changed = false;
    for (component, subcommand) in COMPONENTS {
        if run::answer(workspace.cargo(subcommand).arg("--version")).is_some() {
            continue;
        }
        let progress = Progress::start(format!("adding {component} to the Rust toolchain"));
        run::logged(
            workspace.command("rustup").args(["component", "add", component]),
            &workspace.log("rustup"),
        )
        .with_context(|| {
            format!("the Rust toolchain has no {component}, and rustup cannot add it")
        })?;
        progress.done();
        changed = true;
    }
    Ok(changed)
}
