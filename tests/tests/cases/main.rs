//! The behaviour cases in the loaded programs: `FILE::CASE::FAMILY::PROTOCOL::PATH`, each a test
//! that can be named. The path is `tc`, or `xdp` where external devices have XDP before tc.
//!
//! All of them run on one thread, in one network namespace. The programs are loaded once for
//! each family and path, when the first case that needs them runs.

use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Result;
use lb_common::abi::address::{Ipv4, Ipv6};
use lb_testing::case::Case;
use lb_testing::cases;
use lb_tests::harness::kernel::{Kernel, KernelFamily};
use lb_tests::harness::programs::in_private_namespace;
use libtest_mimic::{Arguments, Trial};

fn main() -> Result<ExitCode> {
    let arguments = Arguments { test_threads: Some(1), ..Arguments::from_args() };
    let trials =
        [trials::<Ipv4>("tc"), trials::<Ipv6>("tc"), trials::<Ipv4>("xdp"), trials::<Ipv6>("xdp")];
    let trials: Vec<Trial> = trials.into_iter().flatten().collect();
    let run = || Ok(libtest_mimic::run(&arguments, trials).exit_code());
    if arguments.list { run() } else { in_private_namespace(run) }
}

fn trials<F: KernelFamily + 'static>(path: &'static str) -> Vec<Trial> {
    let loaded = Arc::new(Mutex::new(None));
    let trial = |case: Case<F>| {
        let loaded = Arc::clone(&loaded);
        Trial::test(format!("{case}::{path}"), move || {
            let mut loaded = loaded.lock().unwrap_or_else(PoisonError::into_inner);
            let kernel = loaded.get_or_insert_with(|| load(path));
            Ok(case.run(kernel.as_mut().map_err(|error| error.clone())?)?)
        })
    };
    cases::all::<F>().into_iter().map(trial).collect()
}

fn load<F: KernelFamily>(path: &str) -> Result<Kernel<F>, String> {
    let kernel = Kernel::load().map_err(|error| format!("{error:#}"))?;
    Ok(if path == "xdp" { kernel.with_xdp() } else { kernel })
}
