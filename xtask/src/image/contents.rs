//! What is in the image besides lb's own code: crates, Rust's standard library, Debian's packages.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use super::elf::Library;
use crate::architecture::Architecture;
use crate::debian;
use crate::run;
use crate::setup::cross;
use crate::workspace::Workspace;

/// The target that lb-ebpf is compiled for.
const BPF: &str = "bpfel-unknown-none";
/// The component that is Rust's standard library.
const STD: &str = "std";
/// Debian's package of the certificates.
const CERTIFICATES: &str = "ca-certificates";

/// A piece of software in the image.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Component {
    pub(super) name: String,
    pub(super) version: String,
    pub(super) origin: Origin,
    /// Where its files of licences are.
    pub(super) licences: PathBuf,
}

/// Where a component comes from.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Origin {
    /// A crate with its licence as an SPDX expression; `own` if it is one of lb's.
    Crate { licence: String, own: bool },
    /// Rust's standard library.
    Rust,
    /// A package of Debian for an architecture; its licences are a file.
    Debian { architecture: String },
}

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    version: String,
    license: Option<String>,
    source: Option<String>,
    manifest_path: PathBuf,
}

/// Everything in the image, sorted, lb's own crates first.
pub(super) fn components(
    workspace: &Workspace,
    architecture: Architecture,
    libraries: &[Library],
) -> Result<Vec<Component>> {
    let mut all = crates(workspace, architecture)?;
    if architecture == Architecture::HOST {
        all.push(standard_library(workspace)?);
        all.extend(owners(workspace, libraries)?);
    } else {
        all.extend(unpacked(&cross::find(workspace)?)?);
    }
    all.extend(installed(workspace, &BTreeSet::from([CERTIFICATES]))?);
    all.sort_by_key(|component| {
        let own = matches!(component.origin, Origin::Crate { own: true, .. });
        (!own, component.clone())
    });
    Ok(all)
}

/// The crates that are linked: neither those that only build scripts and tests use, nor macros.
fn crates(workspace: &Workspace, architecture: Architecture) -> Result<Vec<Component>> {
    let mut linked = BTreeSet::new();
    for (root, target) in [("lb-agent", architecture.target()), ("lb-ebpf", BPF)] {
        let mut tree = workspace.cargo("tree");
        tree.args(["--locked", "-p", root, "-e", "normal,no-proc-macro"]);
        tree.args(["--prefix", "none", "--format", "{p}", "--target", target]);
        linked.extend(output(&mut tree)?.lines().filter_map(name_and_version));
    }
    let mut metadata = workspace.cargo("metadata");
    metadata.args(["--locked", "--format-version", "1"]);
    let metadata: Metadata =
        serde_json::from_str(&output(&mut metadata)?).context("cargo metadata")?;
    let packages: BTreeMap<_, _> = metadata
        .packages
        .into_iter()
        .map(|package| ((package.name.clone(), package.version.clone()), package))
        .collect();
    let component = |key: (String, String)| {
        let package = packages.get(&key).with_context(|| format!("cargo knows no {}", key.0))?;
        let licence = package.license.clone();
        let licence = licence.with_context(|| format!("{} has no licence", key.0))?;
        let own = package.source.is_none();
        let dir = package.manifest_path.parent().unwrap_or(Path::new("."));
        let licences = if own { workspace.root() } else { dir }.to_owned();
        let (name, version) = key;
        Ok(Component { name, version, origin: Origin::Crate { licence, own }, licences })
    };
    linked.into_iter().map(component).collect()
}

/// `NAME vVERSION`, and a path or a mark.
fn name_and_version(line: &str) -> Option<(String, String)> {
    let mut words = line.split(' ');
    let (name, version) = (words.next()?, words.next()?.strip_prefix('v')?);
    Some((name.to_owned(), version.to_owned()))
}

fn standard_library(workspace: &Workspace) -> Result<Component> {
    let version = output(workspace.command("rustc").arg("--version"))?;
    let version = version.split(' ').nth(1).context("rustc --version names no version")?;
    let sysroot = output(workspace.command("rustc").args(["--print", "sysroot"]))?;
    Ok(Component {
        name: STD.to_owned(),
        version: version.to_owned(),
        origin: Origin::Rust,
        licences: Path::new(sysroot.trim()).join("share/doc/rust/licenses"),
    })
}

/// The installed packages that the libraries belong to.
fn owners(workspace: &Workspace, libraries: &[Library]) -> Result<Vec<Component>> {
    let mut search = workspace.command("dpkg-query");
    search.arg("-S").args(libraries.iter().map(|library| &library.file));
    let owners = output(&mut search)?;
    let names = owners.lines().filter_map(|line| Some(line.rsplit_once(": ")?.0)).collect();
    installed(workspace, &names)
}

/// Installed packages, by their names.
fn installed(workspace: &Workspace, names: &BTreeSet<&str>) -> Result<Vec<Component>> {
    let mut show = workspace.command("dpkg-query");
    show.args(["-W", "-f", "${Package} ${Version} ${Architecture}\n"]).args(names);
    output(&mut show)?
        .lines()
        .map(|line| of_package(debian::Package::parse(line)?, Path::new("/")))
        .collect()
}

/// The standard library and the libraries of another architecture.
fn unpacked(root: &cross::Root) -> Result<Vec<Component>> {
    let mut components = Vec::new();
    for package in root.packages()? {
        if package.name == cross::STANDARD_LIBRARY {
            let Component { licences, version, .. } = of_package(package, &root.path())?;
            let version = version.split('+').next().unwrap_or_default().to_owned();
            // The licences of `std` are all files of a directory.
            let licences = licences.parent().unwrap_or(&licences).to_owned();
            components.push(Component {
                name: STD.to_owned(),
                version,
                origin: Origin::Rust,
                licences,
            });
        } else if cross::LIBRARIES.contains(&package.name.as_str()) {
            components.push(of_package(package, &root.path())?);
        }
    }
    Ok(components)
}

fn of_package(package: debian::Package, root: &Path) -> Result<Component> {
    let debian::Package { name, version, architecture } = package;
    let licences = root.join("usr/share/doc").join(&name).join("copyright");
    ensure!(licences.is_file(), "{name} has no {}", licences.display());
    Ok(Component { name, version, origin: Origin::Debian { architecture }, licences })
}

fn output(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    run::answer(command).with_context(|| {
        let arguments: Vec<_> = command.get_args().map(|word| word.to_string_lossy()).collect();
        format!("`{program} {}` failed", arguments.join(" "))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_the_tree_has_a_name_and_a_version() {
        let expected = Some(("lb-common".to_owned(), "0.1.0".to_owned()));
        assert_eq!(name_and_version("lb-common v0.1.0 (/somewhere/lb-common)"), expected);
        assert_eq!(name_and_version("lb-common v0.1.0"), expected);
        assert_eq!(name_and_version(""), None);
    }

    #[test]
    fn the_image_has_crates_of_both_targets_and_none_that_only_builds() {
        let workspace = Workspace::find().expect("the clone");
        for architecture in [Architecture::Amd64, Architecture::Arm64] {
            let all = crates(&workspace, architecture).expect("crates");
            let has = |name: &str| all.iter().any(|component| component.name == name);
            for name in ["lb-agent", "lb-ebpf", "lb-common", "aya-ebpf", "tokio", "rustls"] {
                assert!(has(name), "{name}");
            }
            for name in ["serde_derive", "cc", "proptest", "xtask", "lb-testing"] {
                assert!(!has(name), "{name}");
            }
        }
    }
}
