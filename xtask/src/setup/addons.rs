//! What tests on real nodes install as an administrator would: an ingress controller, and
//! MetalLB. Built from the Go modules in `tests/controlplane`, and made into images.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::cached;
use super::go::{Module, Program};
use super::images::image;
use crate::image::layer::Layer;
use crate::run;
use crate::workspace::Workspace;

const METALLB: Module = Module {
    source: "tests/controlplane/metallb",
    made_for: "go.universe.tf/metallb",
    name: "metallb",
    takes: "three minutes",
    programs: &[
        Program::new("controller", "go.universe.tf/metallb/controller"),
        Program::new("speaker", "go.universe.tf/metallb/speaker"),
    ],
};

const TRAEFIK: Module = Module {
    source: "tests/controlplane/traefik",
    made_for: "github.com/traefik/traefik/v3",
    name: "traefik",
    takes: "five minutes",
    programs: &[Program::new("traefik", "github.com/traefik/traefik/v3/cmd/traefik")],
};

/// Traefik's client of certificate authorities, and its package that is left out.
const LEGO: &str = "github.com/go-acme/lego/v5";
const LEFT_OUT: &str = "providers/dns";
/// The directory that Traefik's module replaces it by, and the one with the package instead.
const REPLACEMENT: &str = "lego";
const PACKAGE: &str = "dns";

/// Part of the names in the cache: raise it when an image gets other content.
const REVISION: u32 = 1;

pub(super) fn ensure(workspace: &Workspace) -> Result<bool> {
    let mut changed = METALLB.ensure(workspace)?;
    changed |= TRAEFIK.ensure_in(workspace, |scratch| source_of_traefik(workspace, scratch))?;
    changed |= ensure_images(workspace, &METALLB, "quay.io/metallb")?;
    changed |= ensure_images(workspace, &TRAEFIK, "docker.io/library")?;
    Ok(changed)
}

/// Where the images of this version are in the cache.
pub(super) fn image_directories(workspace: &Workspace) -> Result<[PathBuf; 2]> {
    Ok([image_directory(workspace, &METALLB)?, image_directory(workspace, &TRAEFIK)?])
}

fn image_directory(workspace: &Workspace, module: &Module) -> Result<PathBuf> {
    let version = module.version(workspace)?;
    Ok(workspace.cache().join(format!("images-{}-{version}-{REVISION}", module.name)))
}

/// An image of its own for each program of a module, with the program's name.
fn ensure_images(workspace: &Workspace, module: &Module, registry: &str) -> Result<bool> {
    let version = module.version(workspace)?;
    let dir = image_directory(workspace, module)?;
    let archive = |program: &Program| format!("{}-{}.tar", module.name, program.name);
    let archives: Vec<String> = module.programs.iter().map(archive).collect();
    let archives: Vec<&str> = archives.iter().map(String::as_str).collect();
    cached(workspace, &dir, &archives, |into, missing| {
        let is_missing = |program: &&Program| missing.contains(&&*archive(program));
        for program in module.programs.iter().filter(is_missing) {
            let path = format!("/{}", program.name);
            let mut layer = Layer::default();
            layer.file(&path, module.dir(workspace)?.join(program.name), 0o755);
            let name = format!("{registry}/{}:{version}", program.name);
            image(&[&name], &[&path], &[&layer])
                .and_then(|image| image.write(&into.join(archive(program))))
                .with_context(|| format!("cannot make the image {name}"))?;
        }
        Ok(())
    })
}

/// A copy of Traefik's module beside a copy of lego, in which the package with all providers'
/// clients is the one of this repository.
fn source_of_traefik(workspace: &Workspace, scratch: &Path) -> Result<PathBuf> {
    let source = scratch.join("source");
    copy(&workspace.root().join(TRAEFIK.source), &source, Path::new(PACKAGE))?;
    let version = format!("{LEGO}@{}", TRAEFIK.version_of(workspace, LEGO)?);
    let mut download = workspace.command("go");
    // Beside a go.mod with the replacement there is no such module.
    download.current_dir(scratch).args(["mod", "download", &version]);
    run::logged(&mut download, &workspace.log("go-lego"))?;
    let mut list = workspace.command("go");
    list.current_dir(scratch).args(["list", "-m", "-f", "{{.Dir}}", &version]);
    let published = run::answer(&mut list).filter(|dir| !dir.is_empty());
    let published = published
        .with_context(|| format!("`go list -m {version}` does not say where its source is"))?;
    let lego = source.join(REPLACEMENT);
    copy(Path::new(&published), &lego, Path::new(LEFT_OUT))?;
    let package = workspace.root().join(TRAEFIK.source).join(PACKAGE);
    copy(&package, &lego.join(LEFT_OUT), Path::new(""))?;
    Ok(source)
}

/// Copies a directory but for one below it, with `except` as its path from there.
fn copy(from: &Path, to: &Path, except: &Path) -> Result<()> {
    let shown = || format!("cannot copy {} to {}", from.display(), to.display());
    fs::create_dir_all(to).with_context(shown)?;
    for entry in fs::read_dir(from).with_context(shown)? {
        let entry = entry.with_context(shown)?;
        let name = entry.file_name();
        if Path::new(&name) == except {
            continue;
        }
        let (path, copied) = (entry.path(), to.join(&name));
        if path.is_dir() {
            copy(&path, &copied, except.strip_prefix(&name).unwrap_or(Path::new("")))?;
        } else {
            fs::copy(&path, &copied).with_context(shown)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_lacks_what_is_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        for path in ["a/b/lost", "a/c/kept", "b/kept"] {
            fs::create_dir_all(from.join(path).parent().unwrap()).unwrap();
            fs::write(from.join(path), path).unwrap();
        }
        copy(&from, &to, Path::new("a/b")).unwrap();
        assert!(!to.join("a/b").exists());
        assert_eq!(fs::read_to_string(to.join("a/c/kept")).unwrap(), "a/c/kept");
        assert_eq!(fs::read_to_string(to.join("b/kept")).unwrap(), "b/kept");
    }
}
