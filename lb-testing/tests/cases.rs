//! The behaviour cases on the host: `FILE::CASE::FAMILY::PROTOCOL::host`, each a test that can be
//! named.

use std::process::ExitCode;

use lb_common::abi::address::{Ipv4, Ipv6};
use lb_testing::{
    case::Case,
    cases::{self, clock},
    family::TestFamily,
    host::Host,
};
use libtest_mimic::{Arguments, Trial};

/// Each case runs with clocks that start at ordinary times and just before the 32 bits of ticks
/// wrap around.
const STARTS: [u32; 4] = [1_000_000, 0, u32::MAX - 10, u32::MAX - 20_000];

fn main() -> ExitCode {
    let trials = [trials::<Ipv4>(), trials::<Ipv6>()].into_iter().flatten().collect();
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

fn trials<F: TestFamily + 'static>() -> Vec<Trial> {
    let cases = cases::all::<F>().into_iter().chain(clock::cases());
    let trial = |case: Case<F>| {
        Trial::test(format!("{case}::host"), move || {
            STARTS.into_iter().try_for_each(|start| {
                case.run(&mut Host::new(start))
                    .map_err(|failure| format!("with a clock that starts at {start}: {failure}"))
            })?;
            Ok(())
        })
    };
    cases.map(trial).collect()
}
