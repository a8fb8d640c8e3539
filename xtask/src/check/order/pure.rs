//! Checks that pure packages have no dependency or path that does I/O or reads a clock.

use std::path::Path;

use super::super::metadata::Package;
use super::super::source::{Crate, Target, at};

/// The packages that must be pure.
const PURE: [&str; 1] = ["lb-control"];

/// Forbidden dependencies, also for tests, and all that have one of these names and a hyphen as
/// prefix.
const DEPENDENCIES: [&str; 12] = [
    "aya",
    "axum",
    "clap",
    "hyper",
    "kube",
    "libc",
    "lb-sys",
    "nix",
    "notify",
    "rtnetlink",
    "tokio",
    "tower",
];

/// Forbidden paths: files, sockets and clocks. Types of addresses and times are allowed.
const PATHS: [&str; 10] = [
    "std::fs",
    "std::net::TcpListener",
    "std::net::TcpStream",
    "std::net::ToSocketAddrs",
    "std::net::UdpSocket",
    "std::os::unix::net",
    "std::time::Instant::now",
    "std::time::SystemTime::now",
    "jiff::Timestamp::now",
    "jiff::Zoned::now",
];

pub(super) fn check(package: &Package, dir: &Path, parsed: &Crate) -> Vec<String> {
    if !PURE.contains(&package.name.as_str()) {
        return Vec::new();
    }
    let mut findings = Vec::new();
    for dependency in &package.dependencies {
        if DEPENDENCIES.iter().any(|name| is_of(name, &dependency.name)) {
            findings.push(format!(
                "{}: `{}` is pure and cannot depend on `{}`: what needs it belongs in lb-agent",
                dir.join("Cargo.toml").display(),
                package.name,
                dependency.name
            ));
        }
    }
    for module in &parsed.modules {
        for written in &module.written {
            let Target::Elsewhere(path) = parsed.target(module, &written.segments) else {
                continue;
            };
            let path = path.join("::");
            let forbidden = PATHS.iter().any(|forbidden| {
                path.strip_prefix(forbidden)
                    .is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
            });
            if forbidden {
                findings.push(format!(
                    "{}: `{}` is pure and cannot use {path}: let the caller pass in what comes \
                     from it",
                    at(&module.file, written.line),
                    package.name
                ));
            }
        }
    }
    findings
}

/// Whether a dependency is this one, or one of its family.
fn is_of(family: &str, name: &str) -> bool {
    name.strip_prefix(family).is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
}
