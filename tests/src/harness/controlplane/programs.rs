//! Where the control plane's programs are found. They are built or installed
//! by `cargo xtask setup`, never from here.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The Kubernetes release that `tests/controlplane/go.mod` names.
pub const KUBERNETES_VERSION: &str = "v1.36.3";

/// The release of Helm that `tests/controlplane/helm/go.mod` names.
const HELM_VERSION: &str = "v3.22.0";

/// The release of Prometheus that `tests/controlplane/promtool/go.mod` names.
const PROMETHEUS_VERSION: &str = "v0.316.0";

/// Environment variable that names a directory of ready-made programs.
const ASSETS: &str = "KUBEBUILDER_ASSETS";

/// Paths of the programs that a control plane runs.
#[derive(Debug, Clone)]
pub struct Programs {
    /// The store.
    pub etcd: PathBuf,
    /// The API server.
    pub api_server: PathBuf,
    /// The controllers, of which the tests want the one that writes slices.
    pub controller_manager: PathBuf,
    /// The client that tests speak to the API server with.
    pub kubectl: PathBuf,
}

impl Programs {
    /// Looks for each program in `KUBEBUILDER_ASSETS` when that is set, then in
    /// [`cache_directory`], then in `PATH`; in this order because a ready-made
    /// directory often lacks kube-controller-manager, and a kubectl in `PATH`
    /// may be older than the server.
    ///
    /// # Errors
    /// A program is in none of the three.
    pub fn find() -> Result<Self> {
        let directories = directories()?;
        let find = |name: &str| find_in(&directories, name);
        Ok(Self {
            etcd: find("etcd")?,
            api_server: find("kube-apiserver")?,
            controller_manager: find("kube-controller-manager")?,
            kubectl: find("kubectl")?,
        })
    }
}

/// kube-proxy, from where [`Programs::find`] looks.
///
/// # Errors
/// It is nowhere.
pub fn kube_proxy() -> Result<PathBuf> {
    program("kube-proxy")
}

/// A program of Kubernetes by its name, from where [`Programs::find`] looks.
///
/// # Errors
/// It is nowhere.
pub fn program(name: &str) -> Result<PathBuf> {
    find_in(&directories()?, name)
}

fn directories() -> Result<Vec<PathBuf>> {
    let assets = env::var_os(ASSETS).map(PathBuf::from);
    let path = env::var_os("PATH").unwrap_or_default();
    Ok(assets.into_iter().chain([cache_directory()?]).chain(env::split_paths(&path)).collect())
}

/// The directory that `cargo xtask setup` builds the Kubernetes programs into:
/// `lb/controlplane-<version>` below the user's cache directory.
///
/// # Errors
/// Neither `XDG_CACHE_HOME` nor `HOME` is set.
pub fn cache_directory() -> Result<PathBuf> {
    Ok(cache()?.join(format!("controlplane-{KUBERNETES_VERSION}")))
}

/// Helm, from the cache.
///
/// # Errors
/// It is not there.
pub fn helm() -> Result<PathBuf> {
    find_in(&[cache()?.join(format!("helm-{HELM_VERSION}"))], "helm")
}

/// promtool, from the cache.
///
/// # Errors
/// It is not there.
pub fn promtool() -> Result<PathBuf> {
    find_in(&[cache()?.join(format!("promtool-{PROMETHEUS_VERSION}"))], "promtool")
}

/// nginx, from the cache or else from `PATH`.
///
/// # Errors
/// It is in neither.
pub fn nginx() -> Result<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let directories: Vec<_> =
        [cache()?.join("nginx")].into_iter().chain(env::split_paths(&path)).collect();
    find_in(&directories, "nginx")
}

/// The agent of the last release with the layout of pins v3: `LB_AGENT_V3`, else where
/// `cargo xtask setup` builds it.
///
/// # Errors
/// It is not there.
pub fn agent_v3() -> Result<PathBuf> {
    if let Some(path) = env::var_os("LB_AGENT_V3") {
        return Ok(path.into());
    }
    find_in(&[cache()?.join("agent-v3-c91d844")], "lb-agent")
}

/// What `cargo xtask setup` keeps outside of clones.
///
/// # Errors
/// Neither `XDG_CACHE_HOME` nor `HOME` is set.
pub fn cache() -> Result<PathBuf> {
    let cache = match env::var_os("XDG_CACHE_HOME").filter(|value| !value.is_empty()) {
        Some(cache) => PathBuf::from(cache),
        None => Path::new(&env::var_os("HOME").context("neither XDG_CACHE_HOME nor HOME is set")?)
            .join(".cache"),
    };
    Ok(cache.join("lb"))
}

fn find_in(directories: &[PathBuf], name: &str) -> Result<PathBuf> {
    directories
        .iter()
        .map(|directory| directory.join(name))
        .find(|path| path.is_file())
        .with_context(|| {
            format!("{name} is neither in {ASSETS} nor in the cache nor in PATH: run `cargo xtask setup`")
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_directory_that_has_a_program_wins() -> Result<()> {
        let (first, second) = (tempfile::tempdir()?, tempfile::tempdir()?);
        let directories = [first.path().to_owned(), second.path().to_owned()];
        std::fs::write(second.path().join("etcd"), "")?;
        assert_eq!(find_in(&directories, "etcd")?, second.path().join("etcd"));
        std::fs::write(first.path().join("etcd"), "")?;
        assert_eq!(find_in(&directories, "etcd")?, first.path().join("etcd"));
        Ok(())
    }

    #[test]
    fn a_missing_program_is_named_with_what_to_do() {
        let error = find_in(&[], "kube-apiserver").expect_err("no directories").to_string();
        assert!(error.starts_with("kube-apiserver is neither"), "{error}");
        assert!(error.contains("cargo xtask setup"), "{error}");
    }

    #[test]
    fn the_version_is_the_one_that_the_go_module_names() {
        let rows = [
            (include_str!("../../../controlplane/go.mod"), "k8s.io/kubernetes", KUBERNETES_VERSION),
            (include_str!("../../../controlplane/helm/go.mod"), "helm.sh/helm/v3", HELM_VERSION),
            (
                include_str!("../../../controlplane/promtool/go.mod"),
                "github.com/prometheus/prometheus",
                PROMETHEUS_VERSION,
            ),
        ];
        for (module, name, version) in rows {
            let line = format!("{name} {version}");
            assert!(module.contains(&line), "go.mod does not hold {line:?}");
        }
    }
}
