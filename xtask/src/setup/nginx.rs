//! nginx, which a test runs behind the address of a load balancer. It is unpacked from Debian's
//! package, not installed, because an installation would start a web server on this machine.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::{cached, can_install, packages};
use crate::progress::Progress;
use crate::run;
use crate::workspace::Workspace;

const PROGRAM: &str = "nginx";

pub(super) fn ensure(workspace: &Workspace) -> Result<bool> {
    let dir = workspace.cache().join(PROGRAM);
    cached(workspace, &dir, &[PROGRAM], |into, _| unpack(workspace, into))
}

fn unpack(workspace: &Workspace, into: &Path) -> Result<()> {
    let progress = Progress::start("unpacking nginx from its Debian package");
    if let Err(error) = download(workspace, into) {
        if !can_install() {
            return Err(error).context(
                "the Debian package nginx could not be fetched, maybe because the package \
                 lists are old: run `sudo apt-get update`",
            );
        }
        packages::apt(workspace, &["update"], "apt-update")?;
        download(workspace, into)?;
    }
    let content = into.join("content");
    let mut extract = workspace.command("dpkg-deb");
    extract.arg("--extract").arg(package(into)?).arg(&content);
    run::logged(&mut extract, &workspace.log("nginx"))?;
    let program = into.join(PROGRAM);
    fs::rename(content.join("usr/sbin/nginx"), &program)
        .context("the Debian package nginx has no usr/sbin/nginx")?;
    run::logged(workspace.command(&program).arg("-v"), &workspace.log("nginx"))
        .context("the nginx of Debian's package cannot be started")?;
    progress.done();
    Ok(())
}

fn download(workspace: &Workspace, into: &Path) -> Result<()> {
    let mut command = workspace.command("apt-get");
    // The user of the sandbox may not write into the cache.
    command.args(["-o", "APT::Sandbox::User=root", "download", "nginx"]).current_dir(into);
    run::logged(&mut command, &workspace.log("nginx-download"))
}

/// The downloaded file.
fn package(dir: &Path) -> Result<PathBuf> {
    let entries = fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))?;
    let mut paths = entries.flatten().map(|entry| entry.path());
    paths
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .with_context(|| format!("apt-get reported success, but {} has no package", dir.display()))
}
