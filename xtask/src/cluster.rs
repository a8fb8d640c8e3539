//! `cargo xtask cluster up|down`: a real Kubernetes cluster on this machine, by `lb-cluster` of
//! the tests crate.

use std::process::ExitCode;

use anyhow::{Result, ensure};

use crate::workspace::{Workspace, is_root};
use crate::{build, image, run, setup};

const PROGRAM: &str = "lb-cluster";

/// The networks of pods that a cluster can have.
pub(crate) const NETWORKS: [&str; 3] = ["bridge", "ptp", "flannel"];

/// The name of the image of `lb-echo`.
const ECHO: &str = "localhost/lb-echo:tests";

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Make a cluster of three nodes, with lb from its image and manifests
    Up(Up),
    /// Remove the cluster, or what is left of one
    Down {
        #[command(flatten)]
        name: Name,
    },
}

#[derive(clap::Args)]
struct Up {
    #[command(flatten)]
    name: Name,
    /// The network of pods
    #[arg(long, default_value = "bridge", value_parser = NETWORKS)]
    cni: String,
    /// Who serves Services
    #[arg(long, default_value = "lb", value_parser = ["lb", "kube-proxy", "none"])]
    proxy: String,
}

#[derive(clap::Args)]
struct Name {
    /// The cluster's name, which starts with `lb-`; several may be up at once
    #[arg(long, default_value = "lb-cluster", value_parser = cluster_name)]
    name: String,
}

/// Refuses a name that `lb-cluster` would refuse too, but after everything is built.
fn cluster_name(name: &str) -> Result<String> {
    let is_plain = name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
    ensure!(
        is_plain && name.starts_with("lb-") && name.len() <= 32,
        "a name starts with `lb-` and has small letters, digits and dashes, at most 32 of them"
    );
    Ok(name.to_owned())
}

pub(crate) fn run(workspace: &Workspace, args: &Args) -> Result<ExitCode> {
    ensure!(is_root(), "a cluster needs network namespaces, mounts and cgroups: run it as root");
    let mut command = workspace.command(workspace.tool(PROGRAM));
    match &args.command {
        Command::Up(up) => {
            prepare(workspace)?;
            command.args(["up", "--name", &up.name.name, "--cni", &up.cni, "--proxy", &up.proxy]);
        }
        Command::Down { name } => {
            build::tool(workspace, PROGRAM)?;
            command.args(["down", "--name", &name.name]);
        }
    }
    run::become_it(&mut command)
}

/// What a cluster is made of: programs and images of the cache, images of lb, `lb-cluster`.
fn prepare(workspace: &Workspace) -> Result<()> {
    setup::ensure(workspace, setup::Scope::Nodes)?;
    build::tools(workspace)?;
    images(workspace)
}

/// The images that are made of this clone: the agent's, and the tests' own server and client.
pub(crate) fn images(workspace: &Workspace) -> Result<()> {
    image::make(workspace)?;
    let out = workspace.target().join("image/lb-echo.tar");
    image::write_tool(&workspace.tool("lb-echo"), ECHO, &out)
}
