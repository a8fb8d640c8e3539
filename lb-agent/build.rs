//! Finds the eBPF objects that the agent carries.

use std::{env, path::Path, process::ExitCode};

fn main() -> ExitCode {
    let manifest = env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
    let is_next = env::var_os("CARGO_FEATURE_NEXT_LAYOUT").is_some();
    let name = if is_next { "lb-ebpf-next" } else { "lb-ebpf" };
    for (variable, suffix) in [("LB_EBPF_OBJECT", ""), ("LB_EBPF_HANDOVER_OBJECT", "-handover")] {
        let path = format!("../target/ebpf/{name}{suffix}.o");
        let object = Path::new(&manifest).join(path);
        println!("cargo:rerun-if-changed={}", object.display());
        if !object.is_file() {
            eprintln!("the eBPF object is not there yet: run cargo xtask build-ebpf");
            return ExitCode::FAILURE;
        }
        println!("cargo:rustc-env={variable}={}", object.display());
    }
    ExitCode::SUCCESS
}
