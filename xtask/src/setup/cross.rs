//! What builds the agent for arm64 on another machine. Only `cargo xtask image --arch arm64` asks
//! for it, `cargo xtask setup` does not.
//!
//! The compiler is Debian's `rustc-web`, because rustup's toolchains have no standard library for
//! arm64. Its standard library for arm64 and the C library come from Debian's arm64 packages, which
//! are unpacked into the cache: dpkg does not learn of the architecture. qemu's user mode runs the
//! agent that was built.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::{cached, packages};
use crate::architecture::Architecture;
use crate::debian::{Apt, Package, installed};
use crate::progress::Progress;
use crate::run;
use crate::workspace::{Workspace, on_path};

/// The C compiler and linker, and the C library that they link against.
const PACKAGES: [&str; 2] = ["gcc-aarch64-linux-gnu", "libc6-dev-arm64-cross"];
/// The compiler.
const RUSTC: &str = "rustc-web";
/// Its standard library.
pub(crate) const STANDARD_LIBRARY: &str = "libstd-rust-web-dev";
/// The packages of the agent's libraries.
pub(crate) const LIBRARIES: [&str; 2] = ["libc6", "libgcc-s1"];
/// The package with the licence of libgcc-s1.
const LICENCE: &str = "gcc-12-base";
/// The file that lists the packages in the root.
const LIST: &str = "packages";
const ROOT: &str = "root";
const QEMU: &str = "qemu-aarch64-static";

/// Debian's packages of another architecture, unpacked.
pub(crate) struct Root {
    directory: PathBuf,
}

/// Installs and fetches what is missing.
pub(crate) fn ensure(workspace: &Workspace) -> Result<Root> {
    packages::ensure(workspace, &PACKAGES)?;
    qemu(workspace)?;
    let root = find(workspace)?;
    cached(workspace, &root.directory, &[ROOT, LIST], |into, _| {
        let progress = Progress::start("fetching Debian's arm64 packages");
        let apt = Apt::of_architecture(workspace, into, Architecture::Arm64.name())?;
        let version = version(workspace, RUSTC)?;
        let standard_library = format!("{STANDARD_LIBRARY}={version}");
        let names = LIBRARIES.into_iter().chain([LICENCE, &standard_library]);
        apt.download(names).with_context(|| {
            format!(
                "the arm64 packages could not be fetched; if Debian has replaced {RUSTC} \
                 {version}, run `apt-get update && apt-get install --only-upgrade {RUSTC}`"
            )
        })?;
        let list: Vec<_> = apt.packages()?.iter().map(Package::to_string).collect();
        fs::write(into.join(LIST), list.join("\n")).context("cannot write the list of packages")?;
        fs::rename(apt.unpack()?, into.join(ROOT)).context("cannot keep the packages")?;
        progress.done();
        Ok(())
    })?;
    Ok(root)
}

/// The root of the versions that are installed here; it may be missing.
///
/// A new version of the machine's C library makes a new root, so that the image gets it too.
pub(crate) fn find(workspace: &Workspace) -> Result<Root> {
    let (compiler, library) = (version(workspace, RUSTC)?, version(workspace, "libc6")?);
    let name = format!("arm64-rustc-{compiler}-libc6-{library}");
    Ok(Root { directory: workspace.cache().join(name) })
}

fn version(workspace: &Workspace, package: &str) -> Result<String> {
    installed(workspace, package)
        .with_context(|| format!("the Debian package {package} is not installed"))
}

impl Root {
    /// The directory that stands for `/` of such a machine.
    pub(crate) fn path(&self) -> PathBuf {
        self.directory.join(ROOT)
    }

    /// The directory in which rustc looks for the standard library.
    pub(crate) fn sysroot(&self) -> PathBuf {
        self.path().join("usr")
    }

    /// The packages in it.
    pub(crate) fn packages(&self) -> Result<Vec<Package>> {
        let path = self.directory.join(LIST);
        let text = fs::read_to_string(&path).with_context(|| {
            format!("cannot read {}: run `cargo xtask image --arch arm64`", path.display())
        })?;
        text.lines().map(Package::parse).collect()
    }
}

/// A qemu that runs programs for arm64: the machine's, else Debian's, unpacked into the cache.
pub(crate) fn qemu(workspace: &Workspace) -> Result<PathBuf> {
    if let Some(program) = on_path(QEMU) {
        return Ok(program);
    }
    let directory = workspace.cache().join("qemu-user");
    cached(workspace, &directory, &[QEMU], |into, _| {
        let progress = Progress::start("fetching qemu's user mode");
        let apt = Apt::of_architecture(workspace, into, Architecture::HOST.name())?;
        apt.download(["qemu-user-static"])?;
        let program = apt.unpack()?.join("usr/bin").join(QEMU);
        run::logged(workspace.command(&program).arg("--version"), &workspace.log("qemu-user"))
            .context("the qemu of Debian's package cannot be started")?;
        fs::rename(&program, into.join(QEMU)).context("cannot keep qemu")?;
        progress.done();
        Ok(())
    })?;
    Ok(Path::new(&directory).join(QEMU))
}
