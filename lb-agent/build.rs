//! Finds the eBPF object that the agent carries.

use std::{env, path::Path, process::ExitCode};

fn main() -> ExitCode {
    let manifest = env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
    let object = Path::new(&manifest).join("../target/ebpf/lb-ebpf.o");
    println!("cargo:rerun-if-changed={}", object.display());
    if !object.is_file() {
        eprintln!("the eBPF object is not there yet: run cargo xtask build-ebpf");
        return ExitCode::FAILURE;
    }
    println!("cargo:rustc-env=LB_EBPF_OBJECT={}", object.display());
    ExitCode::SUCCESS
}
