//! The initramfs: programs, the libraries that they are linked to, and the modules.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::cpio::Archive;
use super::debian::{self, Release};
use crate::run;
use crate::workspace::{Workspace, on_path};

/// System programs that the tests run.
const TOOLS: [&str; 2] = ["ip", "nft"];
/// What the parts `devices` and `ipvs` run beside them, and the packages that have it.
const MORE_TOOLS: [&str; 4] = ["wg", "ethtool", "ipvsadm", "ipset"];
const PACKAGES: [&str; 8] = [
    "wireguard-tools",
    "ethtool",
    "ipvsadm",
    "ipset",
    "libipset13",
    "libnl-3-200",
    "libnl-genl-3-200",
    "libpopt0",
];
/// One program by all names that `lb-agent cleanup --kube-proxy` calls it by.
const IPTABLES: &str = "xtables-nft-multi";
const IPTABLES_NAMES: [&str; 4] =
    ["iptables-nft-save", "iptables-nft-restore", "ip6tables-nft-save", "ip6tables-nft-restore"];
/// The object that the tests load.
pub(super) const OBJECT: &str = "/lb-ebpf.o";
/// Where programs are.
pub(super) const PROGRAMS: &str = "/bin";

/// Writes the initramfs for a kernel; `has_more` if a part runs in it that needs more tools.
pub(super) fn write(workspace: &Workspace, release: &Release, has_more: bool) -> Result<PathBuf> {
    let path = workspace.target().join("xtask").join("vm.cpio");
    let shown = || format!("cannot write {}", path.display());
    path.parent().map_or(Ok(()), fs::create_dir_all).with_context(shown)?;
    let mut out = BufWriter::new(File::create(&path).with_context(shown)?);
    // Archives may follow each other.
    let modules = fs::read(&release.modules)
        .with_context(|| format!("cannot read {}", release.modules.display()))?;
    out.write_all(&modules).with_context(shown)?;
    let mut archive = Archive::new(out);
    archive.device("/dev/console", (5, 1)).with_context(shown)?;
    let mut libraries = BTreeSet::new();
    let mut programs = programs(workspace)?;
    let mut apart = None;
    if has_more {
        let tools = debian::tools(workspace, &PACKAGES, &MORE_TOOLS)?;
        let names = MORE_TOOLS.into_iter().map(in_programs);
        programs.extend(tools.programs.into_iter().zip(names));
        let iptables = installed(IPTABLES)?;
        programs.extend(IPTABLES_NAMES.map(|name| (iptables.clone(), in_programs(name))));
        apart = Some(tools.libraries);
    }
    for (from, to) in programs {
        libraries.extend(libraries_of(workspace, &from, apart.as_deref())?);
        add(&mut archive, &from, &to)?;
    }
    for library in libraries {
        let path = Path::new(&library);
        let name = path.strip_prefix(apart.as_deref().unwrap_or(path)).ok();
        let name = name.and_then(Path::to_str).filter(|name| !name.is_empty());
        // The dynamic linker finds libraries of unpacked packages where installed ones are.
        let to = name.map_or_else(|| library.clone(), |name| format!("/lib/{name}"));
        add(&mut archive, path, &to)?;
    }
    add(&mut archive, &workspace.object(), OBJECT)?;
    archive.finish().with_context(shown)?;
    Ok(path)
}

fn programs(workspace: &Workspace) -> Result<Vec<(PathBuf, String)>> {
    let mut programs = vec![
        (workspace.tool("lb-vm"), "/init".to_owned()),
        (workspace.tool("lb-echo"), in_programs("lb-echo")),
        (workspace.release("lb-agent"), in_programs("lb-agent")),
    ];
    for name in TOOLS {
        programs.push((installed(name)?, in_programs(name)));
    }
    Ok(programs)
}

fn in_programs(name: &str) -> String {
    format!("{PROGRAMS}/{name}")
}

/// A program of the machine. Some packages install theirs into directories that PATH may lack.
fn installed(name: &str) -> Result<PathBuf> {
    let sbin = || ["/usr/sbin", "/sbin"].map(|directory| Path::new(directory).join(name));
    let path = on_path(name).or_else(|| sbin().into_iter().find(|path| path.is_file()));
    path.with_context(|| format!("no {name}: run `cargo xtask setup`"))
}

fn add(archive: &mut Archive<impl Write>, from: &Path, to: &str) -> Result<()> {
    let content = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
    archive.file(to, &content).with_context(|| format!("cannot add {to} to the initramfs"))
}

/// The shared libraries of a program, and its dynamic linker. Libraries in the directory `apart`
/// are not installed.
fn libraries_of(
    workspace: &Workspace,
    program: &Path,
    apart: Option<&Path>,
) -> Result<Vec<String>> {
    let mut command = workspace.command("ldd");
    command.envs(apart.map(|apart| ("LD_LIBRARY_PATH", apart)));
    let answer = run::answer(command.arg(program))
        .with_context(|| format!("ldd cannot read {}", program.display()))?;
    ensure!(!answer.contains("not found"), "{}: {answer}", program.display());
    Ok(paths(&answer))
}

/// `NAME => PATH (ADDRESS)` or `PATH (ADDRESS)`; the kernel's vDSO has no path.
fn paths(answer: &str) -> Vec<String> {
    let path = |line: &str| {
        let (before, _) = line.rsplit_once(" (")?;
        let path = before.rsplit("=> ").next()?.trim();
        path.starts_with('/').then(|| path.to_owned())
    };
    answer.lines().filter_map(path).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_have_paths() {
        let answer = "\tlinux-vdso.so.1 (0x00007ffd)\n\
                      \tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)\n\
                      \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        assert_eq!(
            paths(answer),
            ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"]
        );
        assert!(paths("\tstatically linked\n").is_empty());
    }
}
