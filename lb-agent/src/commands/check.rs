//! `lb-agent check`: whether this node has what `run` needs. Changes nothing.

mod devices;

use std::{
    fmt, fs,
    path::{Path, PathBuf},
};

use crate::{
    maps::{
        bpffs,
        pins::{Pins, pinned_maps},
        read::read_settings,
    },
    options::{modes::XdpMode, sizes::Sizes, values::Patterns},
    programs::features,
    takeover::{self, Survey},
};

/// The flags of `lb-agent check`.
#[derive(Clone, Debug)]
pub struct Check {
    /// `--bpf-dir`.
    pub bpf_dir: PathBuf,
    /// `--cgroup`, if given.
    pub cgroup: Option<PathBuf>,
    /// `--devices`.
    pub devices: Patterns,
    /// `--xdp`.
    pub xdp: XdpMode,
}

/// The severity of a finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Nothing to do.
    Fine,
    /// `run` works, with a limitation.
    Warning,
    /// `run` would fail.
    Fatal,
}

/// A finding about this node, one line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The severity.
    pub severity: Severity,
    /// The subject, one word.
    pub about: &'static str,
    /// What was found, what it means, and what to do.
    pub text: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let severity = match self.severity {
            Severity::Fine => "ok",
            Severity::Warning => "warn",
            Severity::Fatal => "fail",
        };
        write!(formatter, "{severity:<5} {:<13} {}", self.about, self.text)
    }
}

/// Checks this node. `run` would fail if any finding is [`Severity::Fatal`].
pub fn check(options: &Check) -> Vec<Finding> {
    let mut findings = vec![kernel(&release()), capabilities(&status()), btf()];
    findings.extend(bpffs(&options.bpf_dir));
    findings.extend(pins(&options.bpf_dir));
    findings.push(cgroup(options.cgroup.as_deref()));
    if findings.iter().all(|finding| finding.severity < Severity::Fatal) {
        findings.extend(features(features::features()));
        findings.extend(devices::devices(options));
        findings.extend(kube_proxy(takeover::running().ok().flatten(), &takeover::survey()));
    }
    findings
}

fn finding(severity: Severity, about: &'static str, text: impl Into<String>) -> Finding {
    Finding { severity, about, text: text.into() }
}

fn release() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default()
}

fn status() -> String {
    fs::read_to_string("/proc/self/status").unwrap_or_default()
}

fn kernel(release: &str) -> Finding {
    const OLDEST: (u32, u32) = (5, 10);
    let release = release.trim();
    let mut numbers = release.split(|character: char| !character.is_ascii_digit());
    let mut number = || numbers.next().and_then(|digits| digits.parse::<u32>().ok());
    match (number(), number()) {
        (Some(major), Some(minor)) if (major, minor) >= OLDEST => {
            finding(Severity::Fine, "kernel", release)
        }
        (Some(_), Some(_)) => finding(
            Severity::Fatal,
            "kernel",
            format!("{release} is too old: 5.10 or newer is needed"),
        ),
        _ => {
            let text = format!("cannot read the version {release:?}: 5.10 or newer is needed");
            finding(Severity::Warning, "kernel", text)
        }
    }
}

/// The bits of capabilities(7) that loading and attaching programs needs.
const NEEDED: [(u32, &str); 3] = [(12, "CAP_NET_ADMIN"), (38, "CAP_PERFMON"), (39, "CAP_BPF")];
const CAP_SYS_ADMIN: u32 = 21;

fn capabilities(status: &str) -> Finding {
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|text| u64::from_str_radix(text.trim(), 16).ok())
        .unwrap_or_default();
    let has = |bit: u32| effective & 1 << bit != 0;
    let missing: Vec<&str> = NEEDED
        .iter()
        .filter(|(bit, _)| !(has(*bit) || *bit > 31 && has(CAP_SYS_ADMIN)))
        .map(|(_, name)| *name)
        .collect();
    if missing.is_empty() {
        return finding(Severity::Fine, "capabilities", "sufficient to load and attach programs");
    }
    let text = format!("missing {}: run as root, or grant them", missing.join(", "));
    finding(Severity::Fatal, "capabilities", text)
}

fn btf() -> Finding {
    if Path::new("/sys/kernel/btf/vmlinux").exists() {
        return finding(Severity::Fine, "btf", "/sys/kernel/btf/vmlinux exists");
    }
    let text = "no /sys/kernel/btf/vmlinux: programs load, but tools show less about them";
    finding(Severity::Warning, "btf", text)
}

fn bpffs(bpf_dir: &Path) -> Vec<Finding> {
    let path = bpf_dir.display();
    if !bpffs::is_bpffs(bpf_dir) {
        let text = format!("no bpffs at {path}: `run` mounts one if it is allowed to");
        return vec![finding(Severity::Warning, "bpffs", text)];
    }
    if bpffs::dies_with_mount_namespace(bpf_dir) == Some(true) {
        let text = format!(
            "{path} is on a bpffs of this mount namespace only: its pins vanish with the last \
             process of the namespace, mount the host's /sys/fs/bpf instead"
        );
        return vec![finding(Severity::Warning, "bpffs", text)];
    }
    vec![finding(Severity::Fine, "bpffs", format!("{path} is on a bpffs"))]
}

/// Existing pins that `run` cannot adopt, and an unfinished drain.
fn pins(bpf_dir: &Path) -> Vec<Finding> {
    let pins = Pins::new(bpf_dir);
    // A map of any size can be adopted.
    let maps = pinned_maps(&Sizes { services: 1, backends: 1, slots: 1, flows: 1 });
    let mut errors = maps.iter().filter_map(|map| map.existing_entries(&pins).err());
    if let Some(error) = errors.next() {
        return vec![finding(Severity::Fatal, "pins", error.to_string())];
    }
    if read_settings(&pins).is_ok_and(|settings| settings.is_draining()) {
        let text = "`cleanup --drain` was begun: lb handles no new flows until `run` is started";
        return vec![finding(Severity::Warning, "pins", text)];
    }
    Vec::new()
}

fn cgroup(given: Option<&Path>) -> Finding {
    match given.map(Path::to_owned).or_else(bpffs::cgroup2_mount) {
        Some(path) if bpffs::is_cgroup2(&path) => {
            finding(Severity::Fine, "cgroup2", path.display().to_string())
        }
        Some(path) => {
            let text = format!("{} is not a cgroup v2 directory: give --cgroup", path.display());
            finding(Severity::Fatal, "cgroup2", text)
        }
        None => {
            let text = "not mounted: connect() is not translated, only packets are";
            finding(Severity::Warning, "cgroup2", text)
        }
    }
}

fn features(features: features::Features) -> Vec<Finding> {
    let row = |has: bool, about, yes: &str, no: &str| {
        let severity = if has { Severity::Fine } else { Severity::Warning };
        finding(severity, about, if has { yes } else { no })
    };
    vec![
        row(
            features.has_tcx,
            "tcx",
            "programs attach with tcx",
            "not in this kernel (before 6.6): programs attach as clsact filters",
        ),
        row(
            features.has_set_retval,
            "set_retval",
            "connect() to a Service without endpoints fails at once",
            "not in this kernel: connections without endpoints are rejected by packet",
        ),
        row(
            features.has_netns_cookie && lb_sys::netns_cookie().is_ok(),
            "netns_cookie",
            "--socket-lb node works",
            "not in this kernel (before 5.14): --socket-lb node does not work",
        ),
    ]
}

/// A running kube-proxy, and its rules. The programs see packets before the rules do, so neither
/// prevents `run`. But rules that are no longer updated send node processes to removed endpoints.
fn kube_proxy(process: Option<u32>, survey: &Survey) -> Vec<Finding> {
    const ABOUT: &str = "kube-proxy";
    let mut findings: Vec<Finding> = survey
        .errors
        .iter()
        .map(|error| finding(Severity::Warning, ABOUT, error.to_string()))
        .collect();
    let rules: Vec<String> = survey.leftovers.iter().map(ToString::to_string).collect();
    let rules = rules.join("; ");
    let text = match process {
        Some(process) => format!(
            "it runs here (process {process}): lb works beside it if its health and metrics \
             addresses differ; stop it, then run `lb-agent cleanup --kube-proxy`"
        ),
        None if !rules.is_empty() => format!(
            "its rules exist but are not updated, and may send node processes to removed \
             endpoints: `lb-agent cleanup --kube-proxy` removes them ({rules})"
        ),
        None if findings.is_empty() => {
            findings.push(finding(Severity::Fine, ABOUT, "no kube-proxy rules found"));
            return findings;
        }
        None => return findings,
    };
    findings.push(finding(Severity::Warning, ABOUT, text));
    findings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::takeover::Leftover;

    #[test]
    fn kube_proxy_is_reported_in_one_line() {
        let place = "iptables-nft, table nat".to_owned();
        let leftover = Leftover { place, what: "12 chains".to_owned(), kept: Vec::new() };
        let left = Survey { leftovers: vec![leftover], errors: Vec::new() };
        for (process, survey, severity, text) in [
            (None, &Survey::default(), Severity::Fine, "no kube-proxy rules found"),
            (None, &left, Severity::Warning, "removes them (iptables-nft, table nat: 12 chains)"),
            (Some(7), &left, Severity::Warning, "it runs here (process 7)"),
        ] {
            let found = kube_proxy(process, survey);
            assert!(found.len() == 1 && found[0].text.contains(text), "{found:?}");
            assert_eq!(found[0].severity, severity, "{text}");
        }
    }

    #[test]
    fn a_kernel_is_new_enough_from_5_10_on() {
        for (release, severity) in [
            ("6.18.3-generic\n", Severity::Fine),
            ("5.10.0", Severity::Fine),
            ("5.9.16", Severity::Fatal),
            ("4.19.0-27-amd64", Severity::Fatal),
            ("", Severity::Warning),
        ] {
            assert_eq!(kernel(release).severity, severity, "{release:?}");
        }
    }

    #[test]
    fn missing_capabilities_are_named() {
        assert_eq!(capabilities("CapEff:\t000001ffffffffff\n").severity, Severity::Fine);
        let admin = format!("CapEff:\t{:016x}\n", 1u64 << 12 | 1 << CAP_SYS_ADMIN);
        assert_eq!(capabilities(&admin).severity, Severity::Fine, "as before 5.8");
        let none = capabilities("CapEff:\t0000000000000000\n");
        assert_eq!(none.severity, Severity::Fatal);
        assert_eq!(
            none.text,
            "missing CAP_NET_ADMIN, CAP_PERFMON, CAP_BPF: run as root, or grant them"
        );
    }
}
