//! Tries everything that depends on the kernel. The first process of a virtual machine sets
//! that up before, and switches it off after.

use std::process::ExitCode;

use lb_tests::tools::vm;

fn main() -> ExitCode {
    if vm::boot::is_first() {
        vm::boot::boot();
    }
    if vm::run() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
