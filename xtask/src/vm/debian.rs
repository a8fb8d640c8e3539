//! Kernels and qemu from Debian packages, which are unpacked into the cache.

use std::collections::BTreeSet;
use std::env;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::cpio::Archive;
use super::{Kernel, modules};
use crate::debian::{Apt, codename};
use crate::progress::Progress;
use crate::setup::cached;
use crate::workspace::{Workspace, on_path};

const QEMU: &str = "qemu-system-x86_64";

/// The files of a kernel.
pub(super) struct Release {
    pub(super) vmlinuz: PathBuf,
    /// An archive of the modules that the tests need, in the order of their names.
    pub(super) modules: PathBuf,
}

/// A qemu that can be started.
pub(super) struct Qemu {
    pub(super) program: PathBuf,
    pub(super) arguments: Vec<String>,
    /// Where its libraries are, if it is not installed.
    pub(super) libraries: Option<String>,
}

/// The kernel from the cache; it is fetched if the cache lacks it. `extra` modules make a second
/// copy, so that the usual one is not fetched anew.
pub(super) fn kernel(workspace: &Workspace, kernel: &Kernel, extra: &[&str]) -> Result<Release> {
    let suffix = if extra.is_empty() { "" } else { "-more" };
    let directory = workspace.cache().join(format!("kernels-{}{suffix}", kernel.name));
    let wanted = [&modules::WANTED, extra].concat();
    // The file's name depends on the list of modules.
    let mut hasher = DefaultHasher::new();
    wanted.hash(&mut hasher);
    let modules = format!("modules-{:016x}.cpio", hasher.finish());
    cached(workspace, &directory, &["vmlinuz", &modules], |into, _| {
        let progress = Progress::start(format!("fetching Linux {}", kernel.name));
        let apt = Apt::of_suites(workspace, into, kernel.suites)?;
        apt.download(kernel_packages(&apt)?.iter().map(String::as_str))?;
        let root = apt.unpack()?;
        let directory = modules_directory(&root)?;
        let vmlinuz = vmlinuz(&root, &directory)?;
        fs::copy(&vmlinuz, into.join("vmlinuz"))
            .with_context(|| format!("cannot copy {}", vmlinuz.display()))?;
        archive(&modules::collect(&directory, &wanted)?, &into.join(&modules))?;
        progress.done();
        Ok(())
    })?;
    Ok(Release { vmlinuz: directory.join("vmlinuz"), modules: directory.join(modules) })
}

fn archive(modules: &[modules::Module], path: &Path) -> Result<()> {
    let shown = || format!("cannot write {}", path.display());
    let mut archive = Archive::new(fs::File::create(path).with_context(shown)?);
    for (place, module) in modules.iter().enumerate() {
        let name = format!("/modules/{place:03}-{}.ko", module.name);
        archive.file(&name, &module.content).with_context(shown)?;
    }
    archive.finish().with_context(shown)
}

/// Programs of packages that the machine need not have installed, from the cache.
pub(super) struct Tools {
    pub(super) programs: Vec<PathBuf>,
    /// The directory of libraries that only they use.
    pub(super) libraries: PathBuf,
}

/// Fetches packages if the cache lacks them, and picks these programs and all libraries.
pub(super) fn tools(workspace: &Workspace, packages: &[&str], programs: &[&str]) -> Result<Tools> {
    const LIBRARIES: &str = "lib";
    let directory = workspace.cache().join("vm-tools");
    let files = [programs, &[LIBRARIES]].concat();
    cached(workspace, &directory, &files, |into, _| {
        let progress = Progress::start("fetching tools for virtual machines");
        let apt = Apt::of_suites(workspace, into, &[&codename()?])?;
        apt.download(packages.iter().copied())?;
        let root = apt.unpack()?;
        for name in programs {
            let places = ["usr/bin", "usr/sbin", "sbin"].map(|place| root.join(place).join(name));
            let program = places.iter().find(|path| path.is_file());
            let program = program.with_context(|| format!("the packages contain no {name}"))?;
            fs::copy(program, into.join(name)).with_context(|| format!("cannot copy {name}"))?;
        }
        let libraries = into.join(LIBRARIES);
        fs::create_dir_all(&libraries)?;
        let target = format!("{}-linux-gnu", env::consts::ARCH);
        for place in ["usr/lib", "lib"].map(|place| root.join(place).join(&target)) {
            for entry in fs::read_dir(place).into_iter().flatten() {
                let path = entry?.path();
                if let Some(name) = path.file_name().filter(|_| path.is_file()) {
                    fs::copy(&path, libraries.join(name))
                        .with_context(|| format!("cannot copy {}", path.display()))?;
                }
            }
        }
        progress.done();
        Ok(())
    })?;
    Ok(Tools {
        programs: programs.iter().map(|name| directory.join(name)).collect(),
        libraries: directory.join(LIBRARIES),
    })
}

/// The machine's qemu, else one from the cache; it is fetched if the cache lacks it.
pub(super) fn qemu(workspace: &Workspace) -> Result<Qemu> {
    if let Some(program) = on_path(QEMU) {
        return Ok(Qemu { program, arguments: Vec::new(), libraries: None });
    }
    let directory = workspace.cache().join("qemu");
    cached(workspace, &directory, &["root"], |into, _| {
        let progress = Progress::start("fetching qemu");
        let codename = codename()?;
        let backports = format!("{codename}-backports");
        let updates = format!("{codename}-updates");
        // The version in the plain release conflicts with tools that may be installed from
        // backports.
        let apt = Apt::of_suites(workspace, into, &[&codename, &updates, &backports])?;
        let flags = ["install", "--download-only", "--yes", "--no-install-recommends"];
        // Only the dependencies that the machine lacks are fetched.
        apt.get(&[&flags[..], &["--target-release", &backports, "qemu-system-x86"]].concat())?;
        let to = into.join("root");
        fs::rename(apt.unpack()?, &to).with_context(|| format!("cannot make {}", to.display()))?;
        progress.done();
        Ok(())
    })?;
    let root = directory.join("root");
    let below = |path: &str| root.join(path).display().to_string();
    let arguments = ["usr/share/qemu", "usr/share/seabios"]
        .into_iter()
        .flat_map(|path| ["-L".to_owned(), below(path)])
        .collect();
    let target = format!("{}-linux-gnu", env::consts::ARCH);
    let libraries = ["usr/lib", "lib"].map(|path| below(&format!("{path}/{target}"))).join(":");
    let program = root.join("usr/bin").join(QEMU);
    Ok(Qemu { program, arguments, libraries: Some(libraries) })
}

/// The packages that the newest kernel is in.
fn kernel_packages(apt: &Apt) -> Result<BTreeSet<String>> {
    const META: &str = "linux-image-amd64";
    // Newest first.
    let versions = apt.ask(&["madison", META])?;
    let version = versions
        .lines()
        .find_map(|line| line.split('|').nth(1))
        .with_context(|| format!("no package {META}"))?;
    let mut found = BTreeSet::new();
    let mut unseen = vec![format!("{META}={}", version.trim())];
    while let Some(package) = unseen.pop() {
        let said = apt.ask(&["show", "--no-all-versions", &package])?;
        for name in parts_of_kernel(&said) {
            if found.insert(name.clone()) {
                unseen.push(name);
            }
        }
    }
    ensure!(!found.is_empty(), "{META} {version} depends on no kernel");
    Ok(found)
}

/// The packages that contain the kernel, among those on which, by `apt-cache show`, it depends.
fn parts_of_kernel(said: &str) -> Vec<String> {
    const PARTS: [&str; 3] = ["linux-image-", "linux-binary-", "linux-modules-"];
    let depends = said.lines().find_map(|line| line.strip_prefix("Depends: ")).unwrap_or_default();
    let names = depends.split([',', '|']).filter_map(|one| one.split_whitespace().next());
    let is_part = |name: &&str| {
        PARTS.iter().any(|part| {
            name.strip_prefix(part)
                .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
        })
    };
    names.filter(is_part).map(str::to_owned).collect()
}

/// `lib/modules/RELEASE` or, in newer packages, the same below `usr`.
fn modules_directory(root: &Path) -> Result<PathBuf> {
    let of = |path: &str| fs::read_dir(root.join(path)).ok()?.next()?.ok();
    let found = ["usr/lib/modules", "lib/modules"].into_iter().find_map(of);
    found.map(|entry| entry.path()).context("the packages contain no modules")
}

fn vmlinuz(root: &Path, modules: &Path) -> Result<PathBuf> {
    let boot = fs::read_dir(root.join("boot")).into_iter().flatten().flatten();
    let is_kernel = |path: &PathBuf| {
        path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz"))
    };
    boot.map(|entry| entry.path())
        .find(is_kernel)
        .or_else(|| Some(modules.join("vmlinuz")).filter(|path| path.is_file()))
        .context("the packages contain no kernel")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_is_in_one_package_or_in_several() {
        let meta = "Package: linux-image-amd64\nDepends: linux-image-6.1.0-50-amd64 (= 6.1)\n";
        assert_eq!(parts_of_kernel(meta), ["linux-image-6.1.0-50-amd64"]);
        let split = "Depends: dracut | initramfs-tools (>= 0.1) | linux-initramfs-tool, \
                     linux-base-7.3-amd64 (= 7.3), linux-binary-7.3-amd64 (= 7.3), \
                     linux-modules-amd64, linux-modules-7.3-amd64 (= 7.3)\n";
        assert_eq!(parts_of_kernel(split), ["linux-binary-7.3-amd64", "linux-modules-7.3-amd64"]);
        assert!(parts_of_kernel("Package: x\n").is_empty());
    }
}
