//! Paths: the clone, its target directory, the cache outside it.
//!
//! Everything is built below `<clone>/target`, whatever `CARGO_TARGET_DIR` is, because the agent
//! embeds the eBPF object from there and the tests start programs from there.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::architecture::Architecture;

/// Variables that `cargo run` sets for this process and that would make the
/// build scripts below it (they ask to be run again when one changes) differ
/// from those of a plain `cargo build`, or move where results are put.
const NOT_INHERITED: [&str; 9] = [
    "CARGO",
    "CARGO_BIN_NAME",
    "CARGO_BUILD_TARGET",
    "CARGO_CRATE_NAME",
    "CARGO_MANIFEST_DIR",
    "CARGO_MANIFEST_LINKS",
    "CARGO_MANIFEST_PATH",
    "CARGO_PRIMARY_PACKAGE",
    "OUT_DIR",
];

/// The separator of the flags in `CARGO_ENCODED_RUSTFLAGS`.
pub(crate) const FLAG_SEPARATOR: &str = "\x1f";

/// The programs of Debian's packages rustc-web and cargo-web.
pub(crate) const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
pub(crate) const DEBIAN_CARGO: &str = "/usr/bin/cargo";

/// A clone of lb: the one that this xtask belongs to, unless another one is asked for.
pub(crate) struct Workspace {
    root: PathBuf,
    cache: PathBuf,
}

impl Workspace {
    /// Finds the clone from the environment of `cargo run`.
    pub(crate) fn find() -> Result<Self> {
        let package = env::var_os("CARGO_MANIFEST_DIR")
            .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
        let root = package
            .parent()
            .map(Path::to_path_buf)
            .with_context(|| format!("{} has no parent directory", package.display()))?;
        ensure!(
            root.join("lb-ebpf/Cargo.toml").is_file(),
            "{} is not a clone of lb: it has no lb-ebpf/Cargo.toml",
            root.display()
        );
        Ok(Self { root, cache: cache_dir(env::var_os("XDG_CACHE_HOME"), env::var_os("HOME"))? })
    }

    /// Another clone, with the same cache.
    pub(crate) fn at(&self, root: PathBuf) -> Self {
        Self { root, cache: self.cache.clone() }
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// The cache that survives the clone: `$XDG_CACHE_HOME/lb`.
    pub(crate) fn cache(&self) -> &Path {
        &self.cache
    }

    pub(crate) fn target(&self) -> PathBuf {
        self.root.join("target")
    }

    /// The object that lb-agent embeds.
    pub(crate) fn object(&self) -> PathBuf {
        self.target().join("ebpf/lb-ebpf.o")
    }

    /// The object that serves while maps are taken over, which lb-agent embeds too.
    pub(crate) fn handover_object(&self) -> PathBuf {
        self.target().join("ebpf/lb-ebpf-handover.o")
    }

    /// The two objects of `lb-agent-next`.
    pub(crate) fn next_objects(&self) -> [PathBuf; 2] {
        ["ebpf/lb-ebpf-next.o", "ebpf/lb-ebpf-next-handover.o"].map(|path| self.target().join(path))
    }

    /// The object that lb-bench measures with.
    pub(crate) fn bench_object(&self) -> PathBuf {
        self.target().join("ebpf/lb-bench-ebpf.o")
    }

    /// A program of the release build.
    pub(crate) fn release(&self, name: &str) -> PathBuf {
        self.target().join("release").join(name)
    }

    /// A program of the tests crate, which tests and developers' commands start. Only benchmarks
    /// take theirs from the release build.
    pub(crate) fn tool(&self, name: &str) -> PathBuf {
        self.target().join("debug").join(name)
    }

    /// Where programs for an architecture are built.
    pub(crate) fn target_for(&self, architecture: Architecture) -> PathBuf {
        if architecture == Architecture::HOST {
            self.target()
        } else {
            self.target().join(architecture.name())
        }
    }

    /// The agent of the release build for an architecture.
    pub(crate) fn agent(&self, architecture: Architecture) -> PathBuf {
        let mut directory = self.target_for(architecture);
        if architecture != Architecture::HOST {
            directory.push(architecture.target());
        }
        directory.join("release/lb-agent")
    }

    /// That agent's man pages and completions, in the layout of `/usr/share`.
    pub(crate) fn documents(&self, architecture: Architecture) -> PathBuf {
        self.target_for(architecture).join("share")
    }

    /// The log of one command, in `target/xtask`.
    pub(crate) fn log(&self, name: &str) -> PathBuf {
        self.target().join("xtask").join(format!("{name}.log"))
    }

    /// Whether the tests crate has a program of this name.
    pub(crate) fn has_tests_bin(&self, name: &str) -> bool {
        let bins = self.root.join("tests/src/bin");
        bins.join(format!("{name}.rs")).is_file() || bins.join(name).join("main.rs").is_file()
    }

    /// The names of the integration tests of the tests crate, sorted.
    pub(crate) fn integration_tests(&self) -> Result<Vec<String>> {
        let dir = self.root.join("tests/tests");
        if !dir.is_dir() {
            return Ok(Vec::new());
        }
        let mut names = Vec::new();
        for entry in fs::read_dir(&dir).with_context(|| format!("cannot list {}", dir.display()))? {
            let path = entry?.path();
            let name = match path.extension().and_then(OsStr::to_str) {
                Some("rs") => path.file_stem(),
                None if path.join("main.rs").is_file() => path.file_name(),
                _ => None,
            };
            names.extend(name.and_then(OsStr::to_str).map(str::to_owned));
        }
        names.sort();
        Ok(names)
    }

    /// Flags by which rustc writes no path of this machine into what it builds: the clone is
    /// `/lb`, and the sources of dependencies are below `/cargo`.
    pub(crate) fn remapped_paths(&self) -> Result<[String; 2]> {
        let cargo = env::var_os("CARGO_HOME").map(PathBuf::from);
        let cargo = cargo.or_else(|| env::home_dir().map(|home| home.join(".cargo")));
        let cargo = cargo.context("neither CARGO_HOME nor HOME is set")?;
        let flag = |from: &Path, to: &str| format!("--remap-path-prefix={}={to}", from.display());
        Ok([flag(&self.root, "/lb"), flag(&cargo, "/cargo")])
    }

    /// A command that runs in the clone, without the variables that `cargo run` sets.
    pub(crate) fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        command.current_dir(&self.root).env("CARGO_TARGET_DIR", self.target());
        for name in NOT_INHERITED {
            command.env_remove(name);
        }
        for (name, _) in env::vars_os() {
            if name.as_encoded_bytes().starts_with(b"CARGO_PKG_") {
                command.env_remove(name);
            }
        }
        command
    }

    /// The developer's cargo, for the host.
    pub(crate) fn cargo(&self, subcommand: &str) -> Command {
        let mut command = self.command("cargo");
        command.arg(subcommand);
        command
    }

    /// Debian's cargo and rustc, without the variables that choose another toolchain.
    pub(crate) fn debian_cargo(&self) -> Command {
        let mut command = self.command(DEBIAN_CARGO);
        command
            .env("RUSTC", DEBIAN_RUSTC)
            .env_remove("RUSTUP_TOOLCHAIN")
            .env_remove("RUSTC_WRAPPER")
            // `cargo run` points it at the libraries of the host toolchain.
            .env_remove("LD_LIBRARY_PATH");
        command
    }
}

/// Whether this process may load programs, make namespaces and install packages.
pub(crate) fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0)
}

/// Finds a program on `PATH`.
pub(crate) fn on_path(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    env::split_paths(&path).map(|dir| dir.join(program)).find(|file| file.is_file())
}

fn cache_dir(xdg: Option<std::ffi::OsString>, home: Option<std::ffi::OsString>) -> Result<PathBuf> {
    // The XDG base directory specification: a relative path is to be ignored.
    let xdg = xdg.map(PathBuf::from).filter(|dir| dir.is_absolute());
    let base = match (xdg, home) {
        (Some(dir), _) => dir,
        (None, Some(home)) => PathBuf::from(home).join(".cache"),
        (None, None) => anyhow::bail!("neither XDG_CACHE_HOME nor HOME is set"),
    };
    Ok(base.join("lb"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_follows_xdg_and_falls_back_to_home() {
        let dir = |xdg: Option<&str>, home: Option<&str>| {
            cache_dir(xdg.map(Into::into), home.map(Into::into)).ok()
        };
        assert_eq!(dir(Some("/c"), Some("/h")), Some("/c/lb".into()));
        assert_eq!(dir(None, Some("/h")), Some("/h/.cache/lb".into()));
        assert_eq!(dir(Some("c"), Some("/h")), Some("/h/.cache/lb".into()));
        assert_eq!(dir(Some(""), Some("/h")), Some("/h/.cache/lb".into()));
        assert_eq!(dir(None, None), None);
    }
}
