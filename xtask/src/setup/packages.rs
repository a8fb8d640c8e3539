//! The Debian packages that building and testing need.

use anyhow::{Context, Result, bail, ensure};

use super::can_install;
use crate::progress::Progress;
use crate::run;
use crate::workspace::{Workspace, on_path};

/// What building and most tests need, and why.
pub(super) const BUILD: [&str; 18] = [
    // The programs: a compiler with `core` for the BPF target.
    "rustc-web",
    "cargo-web",
    "libstd-rust-web-dev-bpf",
    // bpf-linker, built against the LLVM of that compiler; g++ for libstdc++.
    "llvm-22-dev",
    "libpolly-22-dev",
    "libzstd-dev",
    "zlib1g-dev",
    "g++",
    // The image: `strip`, and the certificates that it has.
    "binutils",
    "ca-certificates",
    // Tests and demo: reading maps, the API server's store, nodes made of
    // network namespaces with the rules that CNIs and firewalls write, TLS.
    "bpftool",
    "etcd-server",
    "iptables",
    "nftables",
    "iproute2",
    "util-linux",
    "curl",
    "openssl",
];

/// What clusters with real nodes need.
pub(super) const NODES: [&str; 11] = [
    // A node: what kubelet runs pods with, and programs that it starts itself.
    "containerd",
    "runc",
    "containernetworking-plugins",
    "conntrack",
    "socat",
    // The content of the pods' images: a shell with the tools of clients.
    "bash",
    "busybox-static",
    "bind9-dnsutils",
    "iperf3",
    "netcat-openbsd",
    "wget",
];

/// The tools that `bench traffic` measures with beside its own.
pub(super) const BENCH: [&str; 2] = ["iperf3", "wrk"];

pub(super) fn ensure(workspace: &Workspace, packages: &[&'static str]) -> Result<bool> {
    ensure!(
        on_path("dpkg-query").is_some(),
        "setup installs Debian packages, and this machine has no dpkg: install the content of {}",
        packages.join(" ")
    );
    let absent = missing(packages, &installed(workspace, packages)?);
    if absent.is_empty() {
        return Ok(false);
    }
    let names = absent.join(" ");
    if !can_install() {
        bail!(
            "Debian packages are missing, and only root can install them: run \
             `sudo sh -c 'apt-get update && apt-get install --yes --no-install-recommends {names}'`"
        );
    }
    let progress = Progress::start(format!("installing the Debian packages {names}"));
    // A package list that cannot be fetched matters only if a package of it is missing, and
    // then the installation fails.
    let update = apt(workspace, &["update"], "apt-update");
    let mut arguments = vec!["install", "--yes", "--no-install-recommends"];
    arguments.extend(&absent);
    if let Err(install) = apt(workspace, &arguments, "apt-install") {
        return Err(match update {
            Ok(()) => install,
            Err(update) => install.context(format!("{update:#}")),
        })
        .context("the Debian packages could not be installed");
    }
    let absent = missing(packages, &installed(workspace, packages)?);
    ensure!(
        absent.is_empty(),
        "apt-get reported success, but these packages are not installed: {}",
        absent.join(" ")
    );
    progress.done();
    Ok(true)
}

pub(super) fn apt(workspace: &Workspace, arguments: &[&str], log: &str) -> Result<()> {
    let mut command = workspace.command("apt-get");
    command
        .env("DEBIAN_FRONTEND", "noninteractive")
        .args(["-o", "DPkg::Lock::Timeout=300"])
        .args(arguments);
    run::logged(&mut command, &workspace.log(log))
}

/// dpkg's status of the packages. dpkg-query fails for an unknown name, but prints the others.
fn installed(workspace: &Workspace, packages: &[&str]) -> Result<String> {
    let output = workspace
        .command("dpkg-query")
        .args(["--show", "--showformat", "${db:Status-Abbrev}\t${Package}\n"])
        .args(packages)
        .output()
        .context("cannot start dpkg-query")?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The wanted packages that dpkg-query's answer does not call installed.
///
/// The second letter of the abbreviated status is the state ("ii" wanted and
/// installed, "hi" on hold, "rc" removed with its configuration left), a third
/// one would be an error.
fn missing<'a>(wanted: &[&'a str], answer: &str) -> Vec<&'a str> {
    let is_installed = |name: &str| {
        answer.lines().any(|line| {
            line.split_once('\t').is_some_and(|(status, package)| {
                package == name && status.trim_end().get(1..) == Some("i")
            })
        })
    };
    wanted.iter().copied().filter(|name| !is_installed(name)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_dpkg_calls_installed_is_there() {
        let rows: [(&str, &[&str]); 7] = [
            ("ii \ta\nii \tb\n", &[]),
            ("ii \ta\n", &["b"]),
            ("", &["a", "b"]),
            ("hi \ta\nii \tb\n", &[]),
            ("rc \ta\nun \tb\n", &["a", "b"]),
            ("iiR\ta\niU \tb\n", &["a", "b"]),
            ("ii \tab\nii \tb\n", &["a"]),
        ];
        for (answer, expected) in rows {
            assert_eq!(missing(&["a", "b"], answer), expected, "{answer:?}");
        }
    }

    #[test]
    fn an_architecture_that_is_not_installed_hides_none_that_is() {
        assert!(missing(&["a"], "un \ta\nii \ta\n").is_empty());
    }
}
