//! Runs the tests that depend on the kernel. As the first process of a virtual machine it sets
//! the machine up before and switches it off afterwards.

use std::process::ExitCode;

use lb_tests::tools::vm;

fn main() -> ExitCode {
    if vm::boot::is_first() {
        vm::boot::boot();
    }
    if vm::run() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
