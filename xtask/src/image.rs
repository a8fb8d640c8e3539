//! `cargo xtask image`: the agent's image, `target/image/lb-agent.tar`, made from nothing but the
//! agent and what it is linked to. The same commit makes the same bytes.

mod check;
mod contents;
pub(crate) mod elf;
mod emulated;
mod git;
pub(crate) mod layer;
mod licences;
pub(crate) mod oci;
mod sbom;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};

use contents::{Component, Origin};
use layer::Layer;
use oci::{Image, Process};

use crate::architecture::Architecture;
use crate::setup::cross;
use crate::workspace::Workspace;
use crate::{build, run, setup};

/// The image's name without its tag.
pub(crate) const NAME: &str = "localhost/lb-agent";
/// The version of lb, which is the image's tag.
pub(crate) const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Where the agent is in the image.
const AGENT: &str = "/usr/local/bin/lb-agent";
/// Where licences and the bill of materials are.
const DOCUMENTS: &str = "/usr/share/doc";
/// The certificates that Debian's ca-certificates trusts unless the machine's owner decides
/// otherwise.
const CERTIFICATES: &str = "/usr/share/ca-certificates/mozilla";
/// Files first: an address in a host alias of the pod is not asked of a DNS server.
const NSSWITCH: &str = "hosts: files dns\n";
/// Nodes pull it over slow lines too.
const LARGEST: u64 = 20 << 20;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The tag of the image's name [default: the version of lb]
    #[arg(long, value_name = "TAG")]
    tag: Option<String>,
    /// The architecture to build for [default: that of this machine]
    #[arg(long, value_name = "ARCHITECTURE", conflicts_with = "agent")]
    arch: Option<Architecture>,
    /// Put this agent into the image instead of building one
    #[arg(long, value_name = "FILE")]
    agent: Option<PathBuf>,
    /// Write the image here [default: target/image/lb-agent.tar, lb-agent-arm64.tar with --arch arm64]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Build the image a second time, in a new clone of the commit at another path, and compare
    #[arg(long, conflicts_with = "agent")]
    check: bool,
}

pub(crate) fn run(workspace: &Workspace, args: &Args) -> Result<ExitCode> {
    let tag = args.tag.as_deref().unwrap_or(VERSION);
    let architecture = match &args.agent {
        Some(agent) => elf::architecture(&read(agent)?)?,
        None => args.arch.unwrap_or(Architecture::HOST),
    };
    let out = args.out.clone().unwrap_or_else(|| path(workspace, architecture));
    if let Some(agent) = &args.agent {
        // What another agent was made of is not known here.
        write(workspace, agent, &[], tag, &out)?;
    } else {
        architecture.ensure_buildable()?;
        if setup::can_install() {
            setup::ensure(workspace, setup::Scope::Build)?;
        }
        build_and_write(workspace, architecture, tag, &out)?;
    }
    if args.check {
        check::in_another_clone(workspace, &out, |clone, out| {
            build_and_write(clone, architecture, tag, out)
        })?;
    }
    println!("{}", out.display());
    Ok(ExitCode::SUCCESS)
}

/// Where the image is.
fn path(workspace: &Workspace, architecture: Architecture) -> PathBuf {
    let name = if architecture == Architecture::HOST {
        "lb-agent.tar".to_owned()
    } else {
        format!("lb-agent-{}.tar", architecture.name())
    };
    workspace.target().join("image").join(name)
}

/// Writes the image of the agent of the release build to `target/image/lb-agent.tar`.
pub(crate) fn make(workspace: &Workspace) -> Result<()> {
    let out = path(workspace, Architecture::HOST);
    build_and_write(workspace, Architecture::HOST, VERSION, &out)
}

/// Builds the agent, and writes its image. An agent for another architecture is run once from the
/// image, by qemu.
fn build_and_write(
    workspace: &Workspace,
    architecture: Architecture,
    tag: &str,
    out: &Path,
) -> Result<()> {
    if architecture == Architecture::HOST {
        build::agent(workspace)?;
        return write_documented(workspace, architecture, tag, out);
    }
    build::agent_for_arm64(workspace)?;
    write_documented(workspace, architecture, tag, out)?;
    emulated::check(workspace, out, &workspace.documents(architecture))
}

/// Writes an image of a program that tests run in pods: the program and its libraries.
pub(crate) fn write_tool(program: &Path, name: &str, out: &Path) -> Result<()> {
    let binary = fs::read(program).with_context(|| format!("cannot read {}", program.display()))?;
    let file = program.file_name().context("a program without a name")?.to_string_lossy();
    let place = format!("/usr/bin/{file}");
    let process = Process {
        entrypoint: vec![place.clone()],
        arguments: Vec::new(),
        environment: vec!["PATH=/usr/bin".to_owned()],
        user: "0:0".to_owned(),
    };
    let mut image = Image::new(&[name], elf::architecture(&binary)?, process)?;
    let mut layer = Layer::default();
    layer.program(&place, program)?;
    image.uncompressed_layer(&layer)?;
    image.write(out)
}

/// Writes the image of the agent that was built, with its documents.
fn write_documented(
    workspace: &Workspace,
    architecture: Architecture,
    tag: &str,
    out: &Path,
) -> Result<()> {
    let agent = workspace.agent(architecture);
    let libraries = elf::libraries(&read(&agent)?, &root(workspace, architecture)?)?;
    let components = contents::components(workspace, architecture, &libraries)?;
    write(workspace, &agent, &components, tag, out)
}

/// Writes an image of an agent that is made of these components.
fn write(
    workspace: &Workspace,
    agent: &Path,
    components: &[Component],
    tag: &str,
    out: &Path,
) -> Result<()> {
    let process = Process {
        entrypoint: vec![AGENT.to_owned()],
        arguments: vec!["run".to_owned()],
        environment: vec![
            "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned(),
        ],
        // The capabilities are the pod's decision; as another user they would be lost at exec.
        user: "0:0".to_owned(),
    };
    let architecture = elf::architecture(&read(agent)?)?;
    let agent = stripped(workspace, architecture, agent)?;
    let mut image = Image::new(&[&format!("{NAME}:{tag}")], architecture, process)?;
    let commit = git::commit(workspace);
    if let Some(commit) = &commit {
        image.created(&commit.time);
        image.label("org.opencontainers.image.revision", &commit.revision);
    }
    for (key, value) in [
        ("title", "lb-agent"),
        ("description", "Services of Kubernetes by eBPF, in place of kube-proxy"),
        ("version", tag),
        ("source", env!("CARGO_PKG_REPOSITORY")),
        ("licenses", "Apache-2.0 AND (Apache-2.0 OR GPL-2.0-only)"),
    ] {
        image.label(&format!("org.opencontainers.image.{key}"), value);
    }
    image.layer(&base(&read(&agent)?, &root(workspace, architecture)?)?)?;
    image.layer(&own(workspace, architecture, &agent, components, tag)?)?;
    image.write(out)?;
    let size = fs::metadata(out).map_or(0, |file| file.len());
    ensure!(size < LARGEST, "{} has {size} bytes; it must have less than {LARGEST}", out.display());
    Ok(())
}

/// What changes less often than the agent: the libraries, the certificates, how names resolve.
fn base(binary: &[u8], root: &Path) -> Result<Layer> {
    let mut layer = Layer::default();
    layer.libraries(binary, root)?;
    layer.bytes("/etc/nsswitch.conf", NSSWITCH, 0o644);
    layer.bytes("/etc/ssl/certs/ca-certificates.crt", certificates()?, 0o644);
    layer.directory("/tmp", 0o1777);
    Ok(layer)
}

/// The agent, and the documents about it.
fn own(
    workspace: &Workspace,
    architecture: Architecture,
    agent: &Path,
    components: &[Component],
    tag: &str,
) -> Result<Layer> {
    let mut layer = Layer::default();
    layer.file(AGENT, agent, 0o755);
    for licence in ["LICENSE-APACHE", "LICENSE-GPL-2.0"] {
        layer.file(
            &format!("{DOCUMENTS}/lb-agent/{licence}"),
            workspace.root().join(licence),
            0o644,
        );
    }
    if components.is_empty() {
        return Ok(layer);
    }
    let sbom = sbom::document(tag, components)?;
    layer.bytes(&format!("{DOCUMENTS}/lb-agent/sbom.cdx.json"), sbom, 0o644);
    for (path, file) in files_below(&workspace.documents(architecture))? {
        layer.file(&format!("/usr/share/{path}"), file, 0o644);
    }
    let third_party = licences::third_party(components)?;
    layer.bytes(&format!("{DOCUMENTS}/lb-agent/THIRD-PARTY.txt"), third_party, 0o644);
    for component in components {
        if let Origin::Debian { .. } = component.origin {
            let to = format!("{DOCUMENTS}/{}/copyright", component.name);
            layer.file(&to, &component.licences, 0o644);
        }
    }
    Ok(layer)
}

/// The files below a directory, with their paths from there.
fn files_below(directory: &Path) -> Result<Vec<(String, PathBuf)>> {
    let shown = || format!("cannot list {}", directory.display());
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).with_context(shown)? {
        let path = entry.with_context(shown)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_dir() {
            let below = files_below(&path)?;
            found.extend(below.into_iter().map(|(path, file)| (format!("{name}/{path}"), file)));
        } else {
            found.push((name, path));
        }
    }
    Ok(found)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// A kubeconfig without a certificate authority means those of the system.
fn certificates() -> Result<Vec<u8>> {
    let shown = || format!("cannot read {CERTIFICATES}: run `cargo xtask setup`");
    let mut files = fs::read_dir(CERTIFICATES)
        .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>, _>>())
        .with_context(shown)?;
    files.sort();
    let mut all = Vec::new();
    for file in files {
        all.extend(fs::read(&file).with_context(shown)?);
    }
    Ok(all)
}

/// The directory that has the libraries of an architecture, in place of `/`.
fn root(workspace: &Workspace, architecture: Architecture) -> Result<PathBuf> {
    if architecture == Architecture::HOST {
        return Ok(PathBuf::from("/"));
    }
    architecture.ensure_buildable()?;
    Ok(cross::find(workspace)?.path())
}

/// The agent without symbols, which are a third of it.
fn stripped(workspace: &Workspace, architecture: Architecture, agent: &Path) -> Result<PathBuf> {
    let to = workspace.target().join("image").join(architecture.name()).join("lb-agent");
    to.parent().map_or(Ok(()), fs::create_dir_all).context("cannot create target/image")?;
    // The header is read first: strip says of another machine's program no more than that it does
    // not recognise it.
    let program = elf::strip(&read(agent)?).with_context(|| agent.display().to_string())?;
    let mut strip = workspace.command(&program);
    run::shown(strip.arg("--strip-all").arg("-o").arg(&to).arg(agent)).with_context(|| {
        format!("the agent could not be stripped: {program} is in Debian's package binutils-*")
    })?;
    Ok(to)
}
