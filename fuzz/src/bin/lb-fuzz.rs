//! libFuzzer on one target, which `LB_FUZZ_TARGET` names. `cargo xtask fuzz` builds and runs it.
//!
//! With `LB_FUZZ_SEEDS` it first writes the inputs of the repository into that directory.

#![no_main]

use std::{env, path::PathBuf, sync::OnceLock};

use lb_fuzz::{Target, corpus};
use libfuzzer_sys::fuzz_target;

static TARGET: OnceLock<Target> = OnceLock::new();

fn target() -> Target {
    let name = env::var("LB_FUZZ_TARGET").unwrap_or_default();
    match lb_fuzz::target(&name) {
        Some(target) => target,
        None => panic!("LB_FUZZ_TARGET={name:?} names no target: use cargo xtask fuzz"),
    }
}

fn start() {
    let target = TARGET.get_or_init(target);
    if let Some(directory) = env::var_os("LB_FUZZ_SEEDS").map(PathBuf::from)
        && let Err(error) = corpus::write(target.name, &directory)
    {
        panic!("cannot write the inputs of {} to {}: {error}", target.name, directory.display());
    }
}

fuzz_target!(init: start(), |bytes: &[u8]| { (TARGET.get_or_init(target).run)(bytes) });
