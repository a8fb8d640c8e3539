//! Tests only: the agent with the layouts of the feature `next-layout`, as a next release may have
//! them. It is the same program otherwise.

#[path = "../main.rs"]
mod agent;

fn main() -> std::process::ExitCode {
    agent::main()
}
