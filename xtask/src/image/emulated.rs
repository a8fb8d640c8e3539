//! Runs the agent of an image for another architecture, from the layers of that image and with
//! nothing else: qemu's user mode has the instructions, this machine's kernel the system calls.
//!
//! It shows that the program, its dynamic linker and its libraries fit together. It shows nothing
//! about a kernel of that architecture: the programs are not loaded.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use flate2::read::GzDecoder;
use serde_json::Value;

use super::{AGENT, VERSION};
use crate::run;
use crate::setup::cross;
use crate::workspace::{Workspace, is_root};

/// qemu in the root directory of the image.
const QEMU: &str = "/qemu";

/// Fails unless the image's agent prints its version, and the completions among `documents`.
pub(super) fn check(workspace: &Workspace, image: &Path, documents: &Path) -> Result<()> {
    let directory = tempfile::tempdir().context("cannot create a temporary directory")?;
    let root = directory.path().join("root");
    unpack(image, directory.path(), &root)?;
    let qemu = cross::qemu(workspace)?;
    fs::copy(&qemu, root.join(QEMU.trim_start_matches('/')))
        .with_context(|| format!("cannot copy {}", qemu.display()))?;
    let agent = |arguments: &[&str]| {
        run::answer(in_root(workspace, &root).args([QEMU, AGENT]).args(arguments)).with_context(
            || format!("`lb-agent {}` of {} fails", arguments.join(" "), image.display()),
        )
    };
    let version = agent(&["--version"])?;
    ensure!(version.contains(VERSION), "the image's agent has another version: {version}");
    let completions = documents.join("bash-completion/completions/lb-agent");
    let expected = fs::read_to_string(&completions)
        .with_context(|| format!("cannot read {}", completions.display()))?;
    ensure!(
        agent(&["completions", "bash"])? == expected.trim(),
        "the image's agent prints other completions than {}",
        completions.display()
    );
    println!("under qemu the image's agent answers: {version}");
    Ok(())
}

/// A command in that root directory.
fn in_root(workspace: &Workspace, root: &Path) -> Command {
    let mut command = if is_root() {
        workspace.command("chroot")
    } else {
        let mut unshare = workspace.command("unshare");
        unshare.args(["--user", "--map-root-user", "chroot"]);
        unshare
    };
    command.arg(root);
    command
}

/// Unpacks the layers of an image in their order.
fn unpack(image: &Path, scratch: &Path, root: &Path) -> Result<()> {
    let parts = scratch.join("parts");
    let file = File::open(image).with_context(|| format!("cannot read {}", image.display()))?;
    let unpacked = |path: &Path| format!("cannot unpack {}", path.display());
    tar::Archive::new(file).unpack(&parts).with_context(|| unpacked(image))?;
    let manifest = fs::read(parts.join("manifest.json")).context("the image has no manifest")?;
    let manifest: Value = serde_json::from_slice(&manifest).context("manifest.json")?;
    for layer in manifest[0]["Layers"].as_array().context("the image has no layers")? {
        let layer = parts.join(layer.as_str().context("a layer's path is a text")?);
        let mut bytes = Vec::new();
        let file = File::open(&layer).with_context(|| unpacked(&layer))?;
        GzDecoder::new(file).read_to_end(&mut bytes).with_context(|| unpacked(&layer))?;
        tar::Archive::new(&bytes[..]).unpack(root).with_context(|| unpacked(&layer))?;
    }
    Ok(())
}
