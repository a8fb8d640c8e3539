//! Kernels and qemu from Debian packages. They are found with a separate apt configuration, which
//! uses the machine's mirror, and unpacked into the cache; nothing is installed.

use std::collections::BTreeSet;
use std::env;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::cpio::Archive;
use super::{Kernel, modules};
use crate::progress::Progress;
use crate::run;
use crate::setup::cached;
use crate::workspace::{Workspace, on_path};

/// The keys of all Debian releases, from the package debian-archive-keyring.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
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

/// The kernel from the cache; it is fetched if the cache lacks it.
pub(super) fn kernel(workspace: &Workspace, kernel: &Kernel) -> Result<Release> {
    let directory = workspace.cache().join(format!("kernels-{}", kernel.name));
    // The file's name depends on the list of modules.
    let mut hasher = DefaultHasher::new();
    modules::WANTED.hash(&mut hasher);
    let modules = format!("modules-{:016x}.cpio", hasher.finish());
    cached(workspace, &directory, &["vmlinuz", &modules], |into, _| {
        let progress = Progress::start(format!("fetching Linux {}", kernel.name));
        let apt = Apt::new(workspace, into, kernel.suites)?;
        let packages = apt.kernel_packages()?;
        let root = apt.unpack(&packages)?;
        let directory = modules_directory(&root)?;
        let vmlinuz = vmlinuz(&root, &directory)?;
        fs::copy(&vmlinuz, into.join("vmlinuz"))
            .with_context(|| format!("cannot copy {}", vmlinuz.display()))?;
        archive(&modules::collect(&directory)?, &into.join(&modules))?;
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
        let apt = Apt::new(workspace, into, &[&codename, &updates, &backports])?;
        apt.unpack_with_dependencies("qemu-system-x86", &backports)?;
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

/// apt with lists and packages in a directory of its own.
struct Apt<'a> {
    workspace: &'a Workspace,
    directory: PathBuf,
    configuration: PathBuf,
}

impl<'a> Apt<'a> {
    /// Fetches the lists of these releases.
    fn new(workspace: &'a Workspace, below: &Path, suites: &[&str]) -> Result<Self> {
        let directory = below.join("apt");
        for path in ["lists/partial", "cache/archives/partial", "sources", "root"] {
            let path = directory.join(path);
            fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        }
        let sources = format!(
            "Types: deb\nURIs: {}\nSuites: {}\nComponents: main\nSigned-By: {KEYRING}\n",
            mirror(workspace)?,
            suites.join(" ")
        );
        let shown = directory.display();
        let configuration = format!(
            "Dir::Etc::sourcelist \"/dev/null\";\n\
             Dir::Etc::sourceparts \"{shown}/sources\";\n\
             Dir::State::lists \"{shown}/lists\";\n\
             Dir::Cache \"{shown}/cache\";\n\
             APT::Sandbox::User \"root\";\n\
             Acquire::Languages \"none\";\n"
        );
        let write = |name: &str, text: &str| {
            let path = directory.join(name);
            fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
        };
        write("sources/debian.sources", &sources)?;
        write("apt.conf", &configuration)?;
        let configuration = directory.join("apt.conf");
        let apt = Self { workspace, directory, configuration };
        apt.get(&["update"])?;
        Ok(apt)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = self.workspace.command(program);
        command.env("APT_CONFIG", &self.configuration).env("DEBIAN_FRONTEND", "noninteractive");
        command
    }

    fn get(&self, arguments: &[&str]) -> Result<()> {
        let mut command = self.command("apt-get");
        command.args(arguments).current_dir(self.directory.join("cache/archives"));
        run::logged(&mut command, &self.workspace.log("vm-apt"))
    }

    fn ask(&self, arguments: &[&str]) -> Result<String> {
        run::answer(self.command("apt-cache").args(arguments))
            .with_context(|| format!("apt-cache {} has no answer", arguments.join(" ")))
    }

    /// The packages that the newest kernel is in.
    fn kernel_packages(&self) -> Result<BTreeSet<String>> {
        const META: &str = "linux-image-amd64";
        // Newest first.
        let versions = self.ask(&["madison", META])?;
        let version = versions
            .lines()
            .find_map(|line| line.split('|').nth(1))
            .with_context(|| format!("no package {META}"))?;
        let mut found = BTreeSet::new();
        let mut unseen = vec![format!("{META}={}", version.trim())];
        while let Some(package) = unseen.pop() {
            let said = self.ask(&["show", "--no-all-versions", &package])?;
            for name in parts_of_kernel(&said) {
                if found.insert(name.clone()) {
                    unseen.push(name);
                }
            }
        }
        ensure!(!found.is_empty(), "{META} {version} depends on no kernel");
        Ok(found)
    }

    /// Fetches and unpacks these packages; returns the directory.
    fn unpack(&self, packages: &BTreeSet<String>) -> Result<PathBuf> {
        let names = packages.iter().map(String::as_str);
        self.get(&std::iter::once("download").chain(names).collect::<Vec<_>>())?;
        self.unpack_all()
    }

    /// Does the same for a package and the dependencies that the machine lacks. The result is in
    /// `root`, beside this directory.
    fn unpack_with_dependencies(&self, package: &str, suite: &str) -> Result<()> {
        self.get(&[
            "install",
            "--download-only",
            "--yes",
            "--no-install-recommends",
            "--target-release",
            suite,
            package,
        ])?;
        let root = self.unpack_all()?;
        let to = self.directory.with_file_name("root");
        fs::rename(&root, &to).with_context(|| format!("cannot make {}", to.display()))
    }

    fn unpack_all(&self) -> Result<PathBuf> {
        let root = self.directory.join("root");
        let packages = self.directory.join("cache/archives");
        for entry in fs::read_dir(&packages).context("cannot list the packages")? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "deb") {
                let mut dpkg = self.workspace.command("dpkg");
                dpkg.arg("-x").arg(&path).arg(&root);
                run::logged(&mut dpkg, &self.workspace.log("vm-dpkg"))?;
            }
        }
        Ok(root)
    }
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

/// The mirror of the machine's own release.
fn mirror(workspace: &Workspace) -> Result<String> {
    let codename = codename()?;
    let targets = run::answer(workspace.command("apt-get").args([
        "indextargets",
        "--format",
        "$(CREATED_BY) $(RELEASE) $(REPO_URI)",
    ]))
    .context("apt-get does not list its sources")?;
    let own = |line: &str| {
        let uri = line.strip_prefix(&format!("Packages {codename} "))?;
        Some(uri.to_owned())
    };
    targets
        .lines()
        .find_map(own)
        .with_context(|| format!("apt has no source for Debian {codename}"))
}

/// The name of the machine's Debian release.
fn codename() -> Result<String> {
    const FILE: &str = "/etc/os-release";
    let text = fs::read_to_string(FILE).with_context(|| format!("cannot read {FILE}"))?;
    let name = text.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    name.map(|name| name.trim_matches('"').to_owned())
        .with_context(|| format!("{FILE} names no release of Debian"))
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
