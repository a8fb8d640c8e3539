//! The tests that run on another kernel, inside a virtual machine: `cargo xtask vm` boots the
//! kernel with `lb-vm` as its first process.
//!
//! Every result is one line on the console: [`PREFIX`], then JSON. The line of
//! [`Report::finish`] is the last one; a console without it is incomplete.

pub mod boot;
mod cases;
mod connections;
mod devices;
mod ipvs;
mod load;

use std::env;
use std::fmt::Display;
use std::panic::{self, AssertUnwindSafe};
use std::time::Instant;

use anyhow::Result;
use lb_agent::programs::features::{self, Features};
use serde_json::{Value, json};

/// What lines of results begin with.
pub const PREFIX: &str = "lb-vm: ";

/// Prints results as they come, and counts them.
#[derive(Debug, Default)]
pub struct Report {
    passed: usize,
    failed: usize,
}

impl Report {
    /// Runs a test and prints its result; a test that panics has failed.
    pub fn run(&mut self, name: impl Display, test: impl FnOnce() -> Result<()>) {
        let started = Instant::now();
        let result = panic::catch_unwind(AssertUnwindSafe(test));
        let panicked = |_| Err(anyhow::anyhow!("the test panicked; the console has the message"));
        let seconds = started.elapsed().as_secs();
        self.test(format_args!("{name} ({seconds} s)"), result.unwrap_or_else(panicked));
    }

    /// Prints the result of a test.
    pub fn test(&mut self, name: impl Display, result: Result<()>) {
        let error = result.err().map(|error| format!("{error:#}"));
        match error {
            None => self.passed += 1,
            Some(_) => self.failed += 1,
        }
        say(&json!({"test": name.to_string(), "error": error}));
    }

    /// Prints a fact about this kernel.
    pub fn fact(&self, name: &str, value: impl Into<Value>) {
        say(&json!({"fact": name, "value": value.into()}));
    }

    /// Prints the last line; returns whether every test passed.
    pub fn finish(self) -> bool {
        say(&json!({"passed": self.passed, "failed": self.failed}));
        self.failed == 0
    }
}

fn say(line: &Value) {
    println!("{PREFIX}{line}");
}

/// Runs the parts that `LB_VM_ONLY` names.
pub fn run() -> bool {
    let mut report = Report::default();
    report.fact(
        "kernel",
        nix::sys::utsname::uname().map_or_else(
            |error| error.to_string(),
            |name| name.release().to_string_lossy().into_owned(),
        ),
    );
    let features = features::features();
    report.fact("features", features_of(features));
    let only = env::var("LB_VM_ONLY").unwrap_or_default();
    let is_asked_for = |part| only.split(',').any(|name| name == part);
    if is_asked_for("load") {
        load::run(&mut report, features);
    }
    if is_asked_for("cases") {
        cases::run(&mut report);
    }
    if is_asked_for("connections") {
        connections::run(&mut report, features);
    }
    if is_asked_for("devices") {
        devices::run(&mut report);
    }
    if is_asked_for("ipvs") {
        ipvs::run(&mut report);
    }
    report.finish()
}

fn features_of(features: Features) -> Value {
    json!({
        "tcx": features.has_tcx,
        "set_retval": features.has_set_retval,
        "netns_cookie": features.has_netns_cookie,
        "csum_ipv6": features.has_csum_ipv6,
    })
}
