//! Developer tasks of lb, run as `cargo xtask COMMAND`.
//!
//! This file only dispatches; each command is a module. Nothing here is part of the product.
//! xtask depends on no crate of the workspace, because it must build when they do not.
#![forbid(unsafe_code)]

mod architecture;
mod bench;
mod build;
mod build_ebpf;
mod check;
mod cluster;
mod debian;
mod demo;
mod fuzz;
mod image;
mod progress;
mod run;
mod setup;
mod test;
mod vm;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::workspace::Workspace;

#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Install the missing prerequisites of all other commands; a second run changes nothing
    Setup(setup::Args),
    /// Build the eBPF object and target/release/lb-agent
    Build,
    /// Build only the eBPF object
    BuildEbpf(build_ebpf::Args),
    /// Make the agent's image, target/image/lb-agent.tar
    Image(image::Args),
    /// Show every kind of access on two nodes made of network namespaces
    Demo(demo::Args),
    /// Set up, build and run all tests, or the named tiers
    Test(test::Args),
    /// Check formatting, module order, references, licences, lints, and layout and verifier goldens
    Check(check::Args),
    /// Look for inputs that break a promise, with libFuzzer
    Fuzz(fuzz::Args),
    /// Run the benchmarks and write the report
    Bench(bench::Args),
    /// Make or remove a real Kubernetes cluster of three nodes on this machine
    Cluster(cluster::Args),
    /// Test lb on other kernels, each in a virtual machine
    Vm(vm::Args),
}

fn main() -> ExitCode {
    let command = Cli::parse().command;
    let result = Workspace::find().and_then(|workspace| match command {
        Command::Setup(args) => setup::run(&workspace, &args),
        Command::Build => build::run(&workspace),
        Command::BuildEbpf(args) => build_ebpf::run(&workspace, &args),
        Command::Image(args) => image::run(&workspace, &args),
        Command::Demo(args) => demo::run(&workspace, &args),
        Command::Test(args) => test::run(&workspace, &args),
        Command::Check(args) => check::run(&workspace, &args),
        Command::Fuzz(args) => fuzz::run(&workspace, &args),
        Command::Bench(args) => bench::run(&workspace, &args),
        Command::Cluster(args) => cluster::run(&workspace, &args),
        Command::Vm(args) => vm::run(&workspace, &args),
    });
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
