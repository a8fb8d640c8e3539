//! The initramfs: programs, the libraries that they are linked to, and the modules.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::cpio::Archive;
use super::debian::Release;
use crate::run;
use crate::workspace::{Workspace, on_path};

/// System programs that the tests run.
const TOOLS: [&str; 2] = ["ip", "nft"];
/// The object that the tests load.
pub(super) const OBJECT: &str = "/lb-ebpf.o";
/// Where programs are.
pub(super) const PROGRAMS: &str = "/bin";

/// Writes the initramfs for a kernel.
pub(super) fn write(workspace: &Workspace, release: &Release) -> Result<PathBuf> {
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
    for (from, to) in programs(workspace)? {
        libraries.extend(libraries_of(workspace, &from)?);
        add(&mut archive, &from, &to)?;
    }
    for library in libraries {
        add(&mut archive, Path::new(&library), &library)?;
    }
    add(&mut archive, &workspace.object(), OBJECT)?;
    archive.finish().with_context(shown)?;
    Ok(path)
}

fn programs(workspace: &Workspace) -> Result<Vec<(PathBuf, String)>> {
    let mut programs = vec![
        (workspace.tool("lb-vm"), "/init".to_owned()),
        (workspace.tool("lb-echo"), format!("{PROGRAMS}/lb-echo")),
        (workspace.release("lb-agent"), format!("{PROGRAMS}/lb-agent")),
    ];
    for name in TOOLS {
        // iproute2 and nftables install them into directories that PATH may lack.
        let sbin = || ["/usr/sbin", "/sbin"].map(|dir| Path::new(dir).join(name));
        let path = on_path(name).or_else(|| sbin().into_iter().find(|path| path.is_file()));
        let path = path.with_context(|| format!("no {name}: run `cargo xtask setup`"))?;
        programs.push((path, format!("{PROGRAMS}/{name}")));
    }
    Ok(programs)
}

fn add(archive: &mut Archive<impl Write>, from: &Path, to: &str) -> Result<()> {
    let content = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
    archive.file(to, &content).with_context(|| format!("cannot add {to} to the initramfs"))
}

/// The shared libraries of a program, and its dynamic linker.
fn libraries_of(workspace: &Workspace, program: &Path) -> Result<Vec<String>> {
    let answer = run::answer(workspace.command("ldd").arg(program))
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
