//! `cargo xtask build-ebpf`: builds the eBPF programs as `target/ebpf/lb-ebpf.o`, and for `bench`
//! the programs that measure them as `target/ebpf/lb-bench-ebpf.o`.
//!
//! rustup's stable toolchains have no `core` for the BPF target, so these crates need another
//! compiler: Debian's `rustc-web`, which includes it, or a nightly that builds `core` from source.
//! The build has a target directory of its own, so that it and host builds do not invalidate each
//! other.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};

use crate::run;
use crate::setup::linker;
use crate::workspace::{DEBIAN_CARGO, DEBIAN_RUSTC, FLAG_SEPARATOR, Workspace, on_path};

const TARGET: &str = "bpfel-unknown-none";
const PROGRAMS: &str = "lb-ebpf";
const BENCH_PROGRAMS: &str = "lb-bench-ebpf";
/// `core` of Debian's libstd-rust-web-dev-bpf.
const DEBIAN_CORE: &str = "/usr/lib/rustlib/bpfel-unknown-none/lib";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Let the programs log through aya-log; not for a shipped object
    #[arg(long)]
    log: bool,
    /// Build the objects of lb-agent-next too, whose maps have other layouts; for tests
    #[arg(long)]
    next: bool,
}

/// A compiler that has, or can build, `core` for the BPF target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Toolchain {
    Debian,
    Nightly,
}

pub(crate) fn run(workspace: &Workspace, args: &Args) -> Result<ExitCode> {
    object(workspace, args.log)?;
    if args.next {
        next_objects(workspace)?;
    }
    println!("{}", workspace.object().display());
    Ok(ExitCode::SUCCESS)
}

/// Builds the object, and the one that serves while maps are taken over, and puts them where
/// lb-agent embeds them from.
pub(crate) fn object(workspace: &Workspace, log: bool) -> Result<()> {
    let (features, handover): (&[&str], _) =
        if log { (&["--features", "log"], "handover,log") } else { (&[], "handover") };
    package(workspace, PROGRAMS, &["--features", handover], &workspace.handover_object())?;
    package(workspace, PROGRAMS, features, &workspace.object())
}

/// Builds the objects of `lb-agent-next`, whose maps have other layouts.
pub(crate) fn next_objects(workspace: &Workspace) -> Result<()> {
    let [programs, handover] = workspace.next_objects();
    package(workspace, PROGRAMS, &["--features", "next-layout"], &programs)?;
    package(workspace, PROGRAMS, &["--features", "next-layout,handover"], &handover)
}

/// Builds the programs that measure the others and puts them beside the object.
pub(crate) fn bench_object(workspace: &Workspace) -> Result<()> {
    package(workspace, BENCH_PROGRAMS, &[], &workspace.bench_object())
}

fn package(workspace: &Workspace, name: &str, arguments: &[&str], to: &Path) -> Result<()> {
    let toolchain = find_toolchain(workspace)?;
    let mut build = cargo(workspace, toolchain, "build", &[])?;
    run::shown(build.args(["-p", name]).args(arguments))
        .with_context(|| format!("the eBPF programs of {name} could not be built"))?;
    copy_if_changed(&target_dir(workspace).join(TARGET).join("release").join(name), to)
}

/// The command that compiles the programs for the BPF target with warnings denied.
pub(crate) fn deny_warnings(workspace: &Workspace) -> Result<Command> {
    let toolchain = find_toolchain(workspace)?;
    let mut check = cargo(workspace, toolchain, "check", &["-Dwarnings"])?;
    // In a directory of its own: with other flags, cargo would build everything again in the first.
    check.env("CARGO_TARGET_DIR", workspace.target().join("ebpf-check"));
    check.args(["-p", PROGRAMS, "-p", BENCH_PROGRAMS]);
    Ok(check)
}

/// The command that runs clippy over the programs with warnings denied.
///
/// Clippy needs `core` of its own toolchain, which has none for BPF: the
/// programs are linted as if for the host, where they are never linked.
pub(crate) fn clippy(workspace: &Workspace, features: &[&str]) -> Command {
    let mut clippy = workspace.cargo("clippy");
    clippy
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_PROFILE_DEV_PANIC", "abort")
        .env("CARGO_TARGET_DIR", workspace.target().join("ebpf-clippy"))
        .args(["-p", PROGRAMS, "-p", BENCH_PROGRAMS])
        .args(features)
        .args(["--", "-Dwarnings"]);
    clippy
}

fn cargo(
    workspace: &Workspace,
    toolchain: Toolchain,
    subcommand: &str,
    flags: &[&str],
) -> Result<Command> {
    let linker = find_linker(workspace)?;
    let mut all = vec![
        format!("-Clinker={}", linker.display()),
        "-Clink-arg=--btf".to_owned(),
        "-Cdebuginfo=2".to_owned(),
        // Compare-and-swap: Linux 5.12.
        "-Ctarget-cpu=v3".to_owned(),
    ];
    all.extend(workspace.remapped_paths()?);
    all.extend(flags.iter().map(|flag| (*flag).to_owned()));
    let mut command = match toolchain {
        Toolchain::Debian => {
            let mut cargo = workspace.debian_cargo();
            // aya-ebpf uses the unstable feature asm_experimental_arch.
            cargo.env("RUSTC_BOOTSTRAP", "1").arg(subcommand);
            cargo
        }
        Toolchain::Nightly => {
            let mut rustup = workspace.command("rustup");
            rustup.args(["run", "nightly", "cargo", subcommand]).args(["-Z", "build-std=core"]);
            rustup
        }
    };
    command
        .env_remove("RUSTUP_TOOLCHAIN")
        .env_remove("RUSTC_WRAPPER")
        // `cargo run` points it at the libraries of the host toolchain.
        .env_remove("LD_LIBRARY_PATH")
        .env("CARGO_TARGET_DIR", target_dir(workspace))
        .env("CARGO_ENCODED_RUSTFLAGS", all.join(FLAG_SEPARATOR))
        .args(["--release", "--target", TARGET]);
    Ok(command)
}

fn target_dir(workspace: &Workspace) -> PathBuf {
    workspace.target().join("ebpf")
}

fn find_toolchain(workspace: &Workspace) -> Result<Toolchain> {
    let debian =
        [DEBIAN_RUSTC, DEBIAN_CARGO, DEBIAN_CORE].iter().all(|path| Path::new(path).exists());
    if debian {
        return Ok(Toolchain::Debian);
    }
    let sysroot = run::answer(
        workspace.command("rustup").args(["run", "nightly", "rustc", "--print", "sysroot"]),
    );
    let has_source =
        |root: &str| Path::new(root).join("lib/rustlib/src/rust/library/core").is_dir();
    if sysroot.as_deref().is_some_and(has_source) {
        return Ok(Toolchain::Nightly);
    }
    bail!(
        "no compiler for the BPF target: run `cargo xtask setup` as root on Debian \
         (packages rustc-web cargo-web libstd-rust-web-dev-bpf), or elsewhere \
         `rustup toolchain install nightly --component rust-src`"
    )
}

/// The linker that setup built, else one that the developer installed.
fn find_linker(workspace: &Workspace) -> Result<PathBuf> {
    let ours = linker::path(workspace);
    if ours.is_file() {
        return Ok(ours);
    }
    on_path("bpf-linker").with_context(|| {
        format!("bpf-linker is neither at {} nor on PATH: run `cargo xtask setup`", ours.display())
    })
}

/// Keeps a file with the same content unchanged, because a new modification time would rebuild
/// everything that embeds it.
fn copy_if_changed(from: &Path, to: &Path) -> Result<()> {
    let bytes = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
    if fs::read(to).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    let partial = to.with_extension("o.partial");
    fs::write(&partial, bytes).with_context(|| format!("cannot write {}", partial.display()))?;
    fs::rename(&partial, to).with_context(|| format!("cannot replace {}", to.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unchanged_object_keeps_its_modification_time() {
        let dir = std::env::temp_dir().join(format!("xtask-object-{}", std::process::id()));
        fs::create_dir_all(&dir).expect("a temporary directory can be made");
        let (from, to) = (dir.join("built"), dir.join("lb-ebpf.o"));
        let old = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1);
        let age = || fs::metadata(&to).and_then(|file| file.modified()).ok();

        fs::write(&from, "one").expect("the file can be written");
        copy_if_changed(&from, &to).expect("the first copy works");
        let file = fs::File::options().write(true).open(&to);
        file.and_then(|file| file.set_modified(old)).expect("the time can be set");
        copy_if_changed(&from, &to).expect("an equal copy works");
        assert_eq!(age(), Some(old));

        fs::write(&from, "two").expect("the file can be written");
        copy_if_changed(&from, &to).expect("a changed copy works");
        assert_ne!(age(), Some(old));
        assert_eq!(fs::read(&to).ok().as_deref(), Some(b"two".as_slice()));
        fs::remove_dir_all(&dir).expect("the directory can be removed");
    }
}
