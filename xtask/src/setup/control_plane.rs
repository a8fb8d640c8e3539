//! The Kubernetes programs that the cluster tests start, built from the Go
//! module in `tests/controlplane`, which names their version.

use std::env;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::cached;
use crate::progress::Progress;
use crate::run;
use crate::workspace::{Workspace, on_path};

const MODULE: &str = "k8s.io/kubernetes";
const PROGRAMS: [&str; 5] =
    ["etcd", "kube-apiserver", "kube-controller-manager", "kube-proxy", "kubectl"];

pub(super) fn ensure(workspace: &Workspace) -> Result<bool> {
    if env::var_os("KUBEBUILDER_ASSETS").is_some_and(|dir| !dir.is_empty()) {
        return Ok(false);
    }
    let source = workspace.root().join("tests/controlplane");
    let go_mod = source.join("go.mod");
    let text = fs::read_to_string(&go_mod).with_context(|| {
        format!(
            "cannot read {}, which names the version of the Kubernetes programs that the tests start",
            go_mod.display()
        )
    })?;
    let version = required_version(&text)
        .with_context(|| format!("{} does not require {MODULE}", go_mod.display()))?;
    let dir = workspace.cache().join(format!("controlplane-{version}"));
    cached(workspace, &dir, &PROGRAMS, |into, missing| {
        build(workspace, &source, version, into, missing)
    })
}

fn build(
    workspace: &Workspace,
    source: &Path,
    version: &str,
    into: &Path,
    programs: &[&str],
) -> Result<()> {
    let names = programs.join(", ");
    ensure!(
        on_path("go").is_some(),
        "{names} of Kubernetes {version} must be built with Go, and PATH has no `go`: install it \
         (https://go.dev/doc/install), or set KUBEBUILDER_ASSETS to a directory with the programs"
    );
    let progress = Progress::start(format!(
        "building {names} of Kubernetes {version}, about five minutes the first time"
    ));
    let mut build = workspace.command("go");
    build
        .current_dir(source)
        .env("CGO_ENABLED", "0")
        .args(["build", "-trimpath", "-ldflags", "-s -w", "-o"])
        .arg(into)
        .args(programs.iter().map(|name| package(name)));
    run::logged(&mut build, &workspace.log("control-plane"))
        .context("the Kubernetes programs could not be built")?;
    progress.done();
    Ok(())
}

/// The Go package of a program. etcd's own is no main package of the module
/// that its server is published in, so `tests/controlplane` has one.
fn package(program: &str) -> String {
    match program {
        "etcd" => "./etcd".to_owned(),
        _ => format!("{MODULE}/cmd/{program}"),
    }
}

/// The version that a go.mod requires of the module, in a block or alone.
fn required_version(go_mod: &str) -> Option<&str> {
    go_mod.lines().find_map(|line| {
        let mut words = line.split_whitespace().skip_while(|word| *word == "require");
        let module = words.next()?;
        words.next().filter(|version| module == MODULE && version.starts_with('v'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_read_from_the_require_line() {
        let rows = [
            ("require k8s.io/kubernetes v1.36.3\n", Some("v1.36.3")),
            (
                "require (\n\tk8s.io/api v0.36.3\n\tk8s.io/kubernetes v1.36.3 // indirect\n)\n",
                Some("v1.36.3"),
            ),
            ("replace (\n\tk8s.io/kubernetes => ../kubernetes\n)\n", None),
            ("tool k8s.io/kubernetes/cmd/kube-apiserver\n", None),
            ("// k8s.io/kubernetes\n", None),
        ];
        for (text, expected) in rows {
            assert_eq!(required_version(text), expected, "{text}");
        }
    }
}
