//! Debian packages that are fetched with a separate apt configuration and unpacked, never
//! installed. The machine's own apt and dpkg keep their state.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::run;
use crate::workspace::Workspace;

/// The keys of all Debian releases, from the package debian-archive-keyring.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// apt with lists and packages in a directory of its own.
pub(crate) struct Apt<'a> {
    workspace: &'a Workspace,
    directory: PathBuf,
    configuration: PathBuf,
}

/// A fetched package.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Package {
    pub(crate) name: String,
    pub(crate) version: String,
    pub(crate) architecture: String,
}

impl<'a> Apt<'a> {
    /// Fetches the lists of these releases, from the machine's mirror.
    pub(crate) fn of_suites(
        workspace: &'a Workspace,
        below: &Path,
        suites: &[&str],
    ) -> Result<Self> {
        let sources = format!(
            "Types: deb\nURIs: {}\nSuites: {}\nComponents: main\nSigned-By: {KEYRING}\n",
            mirror(workspace)?,
            suites.join(" ")
        );
        let directory = below.join("apt");
        let shown = directory.display();
        let configuration = format!(
            "Dir::Etc::sourcelist \"/dev/null\";\nDir::Etc::sourceparts \"{shown}/sources\";\n"
        );
        Self::new(workspace, directory, &configuration, &sources)
    }

    /// Fetches the lists of the machine's own sources, for another architecture. No package counts
    /// as installed.
    pub(crate) fn of_architecture(
        workspace: &'a Workspace,
        below: &Path,
        architecture: &str,
    ) -> Result<Self> {
        let directory = below.join("apt");
        let configuration = format!(
            "APT::Architecture \"{architecture}\";\nAPT::Architectures {{ \"{architecture}\"; }};\n\
             Dir::State::status \"{}/status\";\n",
            directory.display()
        );
        Self::new(workspace, directory, &configuration, "")
    }

    fn new(
        workspace: &'a Workspace,
        directory: PathBuf,
        configuration: &str,
        sources: &str,
    ) -> Result<Self> {
        for path in ["lists/partial", "cache/archives/partial", "sources", "root"] {
            let path = directory.join(path);
            fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        }
        let shown = directory.display();
        let configuration = format!(
            "{configuration}\
             Dir::State::lists \"{shown}/lists\";\n\
             Dir::Cache \"{shown}/cache\";\n\
             APT::Sandbox::User \"root\";\n\
             Acquire::Languages \"none\";\n"
        );
        let write = |name: &str, text: &str| {
            let path = directory.join(name);
            fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
        };
        write("sources/debian.sources", sources)?;
        write("status", "")?;
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

    fn archives(&self) -> PathBuf {
        self.directory.join("cache/archives")
    }

    /// Runs apt-get where it puts packages.
    pub(crate) fn get(&self, arguments: &[&str]) -> Result<()> {
        let mut command = self.command("apt-get");
        command.args(arguments).current_dir(self.archives());
        run::logged(&mut command, &self.workspace.log("apt"))
    }

    /// The answer of apt-cache.
    pub(crate) fn ask(&self, arguments: &[&str]) -> Result<String> {
        run::answer(self.command("apt-cache").args(arguments))
            .with_context(|| format!("apt-cache {} has no answer", arguments.join(" ")))
    }

    /// Fetches these packages, `NAME` or `NAME=VERSION`, without their dependencies.
    pub(crate) fn download<'b>(&self, packages: impl IntoIterator<Item = &'b str>) -> Result<()> {
        self.get(&std::iter::once("download").chain(packages).collect::<Vec<_>>())
    }

    /// Unpacks every fetched package; returns the directory.
    pub(crate) fn unpack(&self) -> Result<PathBuf> {
        let root = self.directory.join("root");
        for path in self.fetched()? {
            let mut dpkg = self.workspace.command("dpkg-deb");
            dpkg.arg("--extract").arg(&path).arg(&root);
            run::logged(&mut dpkg, &self.workspace.log("dpkg"))?;
        }
        Ok(root)
    }

    /// Every fetched package, sorted by name.
    pub(crate) fn packages(&self) -> Result<Vec<Package>> {
        let mut packages = Vec::new();
        for path in self.fetched()? {
            let mut dpkg = self.workspace.command("dpkg-deb");
            dpkg.args(["--show", "--showformat", "${Package} ${Version} ${Architecture}"]);
            let line = run::answer(dpkg.arg(&path))
                .with_context(|| format!("dpkg-deb cannot read {}", path.display()))?;
            packages.push(Package::parse(&line)?);
        }
        packages.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(packages)
    }

    fn fetched(&self) -> Result<Vec<PathBuf>> {
        let entries = fs::read_dir(self.archives()).context("cannot list the packages")?;
        let mut paths = Vec::new();
        for entry in entries {
            let path = entry.context("cannot list the packages")?.path();
            if path.extension().is_some_and(|extension| extension == "deb") {
                paths.push(path);
            }
        }
        ensure!(!paths.is_empty(), "apt-get reported success, but fetched no package");
        Ok(paths)
    }
}

impl Package {
    /// Reads `NAME VERSION ARCHITECTURE`.
    pub(crate) fn parse(line: &str) -> Result<Self> {
        let mut words = line.split_whitespace().map(str::to_owned);
        let mut word = || words.next().with_context(|| format!("{line:?} names no package"));
        Ok(Self { name: word()?, version: word()?, architecture: word()? })
    }
}

impl std::fmt::Display for Package {
    fn fmt(&self, formatter: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(formatter, "{} {} {}", self.name, self.version, self.architecture)
    }
}

/// The version of an installed package.
pub(crate) fn installed(workspace: &Workspace, package: &str) -> Option<String> {
    let mut query = workspace.command("dpkg-query");
    let native = format!("{package}:{}", crate::architecture::Architecture::HOST.name());
    // A package for all architectures has none in its name.
    let versions = run::answer(query.args(["--show", "--showformat", "${Version}\n"]).arg(native))
        .or_else(|| {
            let mut query = workspace.command("dpkg-query");
            run::answer(query.args(["--show", "--showformat", "${Version}\n"]).arg(package))
        })?;
    versions.lines().next().map(str::to_owned)
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
pub(crate) fn codename() -> Result<String> {
    const FILE: &str = "/etc/os-release";
    let text = fs::read_to_string(FILE).with_context(|| format!("cannot read {FILE}"))?;
    let name = text.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    name.map(|name| name.trim_matches('"').to_owned())
        .with_context(|| format!("{FILE} names no release of Debian"))
}
