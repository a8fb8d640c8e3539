//! A real Kubernetes cluster of three nodes on this machine: `lb_tests::harness::real` as a
//! program.

use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};
use lb_tests::harness::real::addons::EXAMPLE_PORT;
use lb_tests::harness::real::cni::Cni;
use lb_tests::harness::real::plan::{DEFAULT_NAME, Plan, node};
use lb_tests::harness::real::scripts::{KUBECTL, script};
use lb_tests::harness::real::{self, Options, Proxy, control_plane};

/// A real Kubernetes cluster of three nodes, in network namespaces of this machine.
#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make it, and return when it serves.
    Up {
        #[command(flatten)]
        name: Name,
        /// The network of pods.
        #[arg(long, default_value = "bridge")]
        cni: Cni,
        /// Who serves Services.
        #[arg(long, default_value = "lb")]
        proxy: Proxy,
    },
    /// Remove it, or what is left of it.
    Down(Name),
    /// Be its control plane.
    #[command(name = control_plane::COMMAND, hide = true)]
    ControlPlane(Name),
}

#[derive(Args)]
struct Name {
    /// The cluster's name; several may be up at once.
    #[arg(long, default_value = DEFAULT_NAME)]
    name: String,
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Up { name, cni, proxy } => {
            let plan = Plan::new(&name.name)?;
            real::up(&plan, &Options { cni, proxy }, &|line| println!("{line}"))?;
            explain(&plan, proxy);
            Ok(())
        }
        Command::Down(name) => {
            let was_there = real::down(&Plan::new(&name.name)?)?;
            let outcome = if was_there { "is removed" } else { "was not up" };
            println!("cluster {} {outcome}", name.name);
            Ok(())
        }
        Command::ControlPlane(name) => control_plane::run(&Plan::new(&name.name)?),
    }
}

fn explain(plan: &Plan, proxy: Proxy) {
    let kubectl = script(plan, KUBECTL);
    println!("\nTry:");
    println!("  {} get pods --all-namespaces --output wide", kubectl.display());
    println!(
        "  {} curl -s http://{}:{EXAMPLE_PORT}/clientip",
        script(plan, "outside").display(),
        node(1).v4
    );
    let third = match proxy {
        Proxy::Lb => "exec --namespace kube-system daemonset/lb-agent -- lb-agent get services",
        Proxy::KubeProxy | Proxy::None => "get services,endpointslices --all-namespaces",
    };
    println!("  {} {third}", kubectl.display());
    println!("`{}` removes it.", plan.command_down());
}
