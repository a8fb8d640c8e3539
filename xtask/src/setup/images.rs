//! The images of the pods on real nodes, by the names that upstream's end-to-end tests and the
//! manifests of CoreDNS give them. There is no registry: they are made of the programs that
//! setup has built and of Debian's packages on this machine, and imported by the nodes.

mod content;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::{cached, control_plane};
use crate::architecture::Architecture;
use crate::image::layer::Layer;
use crate::image::oci::{Image, Process};
use crate::progress::Progress;
use crate::run;
use crate::workspace::Workspace;

/// Part of the cache's name: raise it when an image gets other content, and the images are made
/// anew.
const REVISION: u32 = 1;

/// An image: the archive's name, and how its file is made.
type Make = fn(&Sources<'_>) -> Result<Image>;

/// The versions in the names are those of test/utils/image/manifest.go of the Kubernetes release
/// that `tests/controlplane/go.mod` requires.
const IMAGES: [(&str, Make); 8] = [
    ("pause.tar", pause),
    ("coredns.tar", coredns),
    ("agnhost.tar", agnhost),
    ("busybox.tar", busybox),
    ("nginx.tar", nginx),
    ("regression-issue-74839.tar", regression),
    ("flannel.tar", flannel),
    ("kube-proxy.tar", kube_proxy),
];

/// Where the content comes from.
struct Sources<'a> {
    workspace: &'a Workspace,
    /// The Kubernetes programs.
    kubernetes: PathBuf,
    kubernetes_version: String,
    coredns: PathBuf,
    coredns_version: String,
    /// The source of Kubernetes in Go's module cache.
    source: PathBuf,
    /// For intermediate files.
    scratch: &'a Path,
}

pub(super) fn ensure(workspace: &Workspace) -> Result<bool> {
    let dir = directory(workspace)?;
    cached(workspace, &dir, &IMAGES.map(|(name, _)| name), |into, missing| {
        make(workspace, into, missing)
    })
}

/// Where the images of this version are in the cache.
pub(super) fn directory(workspace: &Workspace) -> Result<PathBuf> {
    let version = control_plane::kubernetes(workspace)?;
    Ok(workspace.cache().join(format!("images-{version}-{REVISION}")))
}

/// Writes which directories of the cache have the images that nodes get, a line for each: the cache
/// may hold those of other versions too.
pub(super) fn write_list(workspace: &Workspace, directories: &[PathBuf]) -> Result<()> {
    let list = workspace.target().join("image/directories");
    let lines: String = directories.iter().map(|dir| format!("{}\n", dir.display())).collect();
    list.parent().map_or(Ok(()), fs::create_dir_all).context("cannot create target/image")?;
    fs::write(&list, lines).with_context(|| format!("cannot write {}", list.display()))
}

fn make(workspace: &Workspace, into: &Path, missing: &[&str]) -> Result<()> {
    let progress = Progress::start(format!("making the images {}", missing.join(", ")));
    let scratch = into.join("scratch");
    fs::create_dir_all(&scratch).with_context(|| format!("cannot create {}", scratch.display()))?;
    let (coredns, coredns_version) = control_plane::coredns(workspace)?;
    let sources = Sources {
        workspace,
        kubernetes: control_plane::programs(workspace)?,
        kubernetes_version: control_plane::kubernetes(workspace)?,
        coredns,
        coredns_version,
        source: control_plane::source(workspace)?,
        scratch: &scratch,
    };
    for (name, image) in IMAGES.iter().filter(|(name, _)| missing.contains(name)) {
        image(&sources)
            .and_then(|image| image.write(&into.join(name)))
            .with_context(|| format!("cannot make the image {name}"))?;
    }
    progress.done();
    Ok(())
}

/// An image that runs a program of its own.
pub(super) fn image(names: &[&str], entrypoint: &[&str], layers: &[&Layer]) -> Result<Image> {
    let process = Process {
        entrypoint: entrypoint.iter().map(|word| (*word).to_owned()).collect(),
        environment: vec![format!("PATH={}", content::PATH)],
        ..Process::default()
    };
    let mut image = Image::new(names, Architecture::HOST, process)?;
    for layer in layers {
        image.uncompressed_layer(layer)?;
    }
    Ok(image)
}

fn pause(sources: &Sources<'_>) -> Result<Image> {
    let program = sources.scratch.join("pause");
    let mut compile = sources.workspace.command("cc");
    compile.args(["-Os", "-static", "-s", "-o"]).arg(&program);
    compile.arg(sources.source.join("build/pause/linux/pause.c"));
    run::logged(&mut compile, &sources.workspace.log("pause"))
        .context("pause could not be compiled")?;
    let mut layer = Layer::default();
    layer.file("/pause", program, 0o755);
    image(&["registry.k8s.io/pause:3.10.2"], &["/pause"], &[&layer])
}

fn coredns(sources: &Sources<'_>) -> Result<Image> {
    let name = format!("registry.k8s.io/coredns/coredns:{}", sources.coredns_version);
    image(&[&name], &["/coredns"], &[&dns_server(sources)])
}

/// The layer of CoreDNS, the first one of every image that has it, so that nodes keep it once.
fn dns_server(sources: &Sources<'_>) -> Layer {
    let mut layer = Layer::default();
    layer.file("/coredns", sources.coredns.join("coredns"), 0o755);
    layer
}

/// Upstream's test server among the tools of clients. The other names are those of images that
/// have the same tools: `dig` and glibc's resolver, `conntrack`.
fn agnhost(sources: &Sources<'_>) -> Result<Image> {
    let porter = sources.source.join("test/images/agnhost/porter");
    let mut server = Layer::default();
    server
        .file("/agnhost", sources.kubernetes.join("agnhost"), 0o755)
        .link("/agnhost-2", "agnhost")
        .file("/localhost.crt", porter.join("localhost.crt"), 0o644)
        .file("/localhost.key", porter.join("localhost.key"), 0o644)
        .directory("/uploads", 0o755);
    let names = [
        "registry.k8s.io/e2e-test-images/agnhost:2.63.0",
        "registry.k8s.io/e2e-test-images/glibc-dns-testing:2.0.0",
        "registry.k8s.io/build-image/distroless-iptables:v0.9.6",
    ];
    let layers = [&dns_server(sources), &content::tools(sources.workspace)?, &server];
    let mut process = Process {
        entrypoint: vec!["/agnhost".to_owned()],
        arguments: vec!["pause".to_owned()],
        ..Process::default()
    };
    process.environment.push(format!("PATH={}", content::PATH));
    let mut image = Image::new(&names, Architecture::HOST, process)?;
    for layer in layers {
        image.uncompressed_layer(layer)?;
    }
    Ok(image)
}

fn busybox(sources: &Sources<'_>) -> Result<Image> {
    let mut layer = content::base();
    content::applets(sources.workspace, &mut layer)?;
    let name = "registry.k8s.io/e2e-test-images/busybox:1.37.0-1";
    image(&[name], &["sh"], &[&layer])
}

fn nginx(sources: &Sources<'_>) -> Result<Image> {
    let layer = content::nginx(sources.workspace)?;
    let names = [
        "registry.k8s.io/e2e-test-images/nginx:1.15-4",
        "registry.k8s.io/e2e-test-images/nginx:1.27-0",
    ];
    image(&names, &["/usr/sbin/nginx", "-c", content::NGINX_CONFIGURATION], &[&layer])
}

fn regression(sources: &Sources<'_>) -> Result<Image> {
    let mut layer = Layer::default();
    let program = sources.kubernetes.join("regression-issue-74839");
    layer.file("/regression-issue-74839", program, 0o755);
    let name = "registry.k8s.io/e2e-test-images/regression-issue-74839:1.4";
    image(&[name], &["/regression-issue-74839"], &[&layer])
}

/// flannel as its own image has it, and its CNI plug-in, which an init container copies to the
/// node.
fn flannel(sources: &Sources<'_>) -> Result<Image> {
    let (daemon, version, plugin) = control_plane::flannel(sources.workspace)?;
    let mut layer = content::base();
    content::applets(sources.workspace, &mut layer)?;
    content::iptables(&mut layer)?;
    layer.file("/opt/bin/flanneld", daemon, 0o755).file("/flannel", plugin, 0o755);
    let name = format!("ghcr.io/flannel-io/flannel:{version}");
    image(&[&name], &["/opt/bin/flanneld"], &[&layer])
}

/// kube-proxy with the tools of its modes iptables and nftables.
fn kube_proxy(sources: &Sources<'_>) -> Result<Image> {
    let mut layer = content::base();
    content::iptables(&mut layer)?;
    content::program(&mut layer, "nft", "/usr/sbin/nft")?;
    layer.file("/usr/local/bin/kube-proxy", control_plane::kube_proxy(sources.workspace)?, 0o755);
    let name = format!("registry.k8s.io/kube-proxy:{}", sources.kubernetes_version);
    image(&[&name], &["/usr/local/bin/kube-proxy"], &[&layer])
}
