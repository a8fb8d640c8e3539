//! `lb-agent check`: whether this node has what `run` needs. Changes nothing.

mod devices;

use std::{
    fmt, fs,
    path::{Path, PathBuf},
};

use crate::{
    cli::CheckArgs,
    maps::{
        bpffs::{self, BpffsError},
        flow_table,
        memory::Memory,
        pins::{Pins, pinned_maps},
        read::read_settings,
    },
    options::{modes::XdpMode, sizes::Sizes, values::Patterns},
    privileges::{self, Capability, Privileges, Refusal},
    programs::features,
    takeover::{self, Sign, Survey, ToolError},
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
    /// `--max-services` and the others.
    pub sizes: Sizes,
}

impl Check {
    /// The flags as they were parsed.
    pub fn of(arguments: &CheckArgs) -> Self {
        Self {
            bpf_dir: arguments.pins.bpf_dir.clone(),
            cgroup: arguments.cgroup.cgroup.clone(),
            devices: arguments.devices.clone(),
            xdp: arguments.xdp,
            sizes: arguments.sizes.into(),
        }
    }
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
    let mut findings = vec![kernel(&release()), privileges(), btf()];
    findings.extend(bpffs(&options.bpf_dir));
    findings.extend(pins(&options.bpf_dir));
    findings.push(memory(&options.sizes));
    findings.push(cgroup(options.cgroup.as_deref()));
    if findings.iter().all(|finding| finding.severity < Severity::Fatal) {
        findings.extend(features(features::features()));
        findings.extend(devices::devices(options));
        let survey = without_tools(takeover::survey(), takeover::signs().ok());
        findings.extend(kube_proxy(takeover::running().ok().flatten(), &survey));
    }
    findings
}

fn finding(severity: Severity, about: &'static str, text: impl Into<String>) -> Finding {
    Finding { severity, about, text: text.into() }
}

fn release() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default()
}

fn kernel(release: &str) -> Finding {
    const OLDEST: (u32, u32) = (5, 12);
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
            format!(
                "{release} is too old: it lacks compare-and-swap in programs, which came with 5.12"
            ),
        ),
        _ => {
            let text = format!("cannot read the version {release:?}: 5.12 or newer is needed");
            finding(Severity::Warning, "kernel", text)
        }
    }
}

/// Whether programs can be loaded, or what refuses it.
fn privileges() -> Finding {
    let (about, refusal) = match privileges::require() {
        Ok(()) => {
            let text = "sufficient to load and attach programs";
            return finding(Severity::Fine, "capabilities", text);
        }
        Err(refusal @ Refusal::Capabilities { .. }) => ("capabilities", refusal),
        Err(refusal @ (Refusal::Seccomp | Refusal::Module)) => ("bpf", refusal),
    };
    finding(Severity::Fatal, about, refusal.to_string())
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
        if !Privileges::own().has(Capability::SysAdmin) {
            let error = BpffsError::Unprivileged { path: bpf_dir.to_owned() };
            return vec![finding(Severity::Fatal, "bpffs", error.to_string())];
        }
        let text = format!("no bpffs at {path}: `run` mounts one");
        return vec![finding(Severity::Warning, "bpffs", text)];
    }
    if bpffs::is_read_only(bpf_dir) {
        let error = BpffsError::ReadOnly { path: bpf_dir.to_owned() };
        return vec![finding(Severity::Fatal, "bpffs", error.to_string())];
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
    let mut errors = maps.iter().filter_map(|map| map.existing(&pins).err());
    if let Some(error) = errors.next() {
        return vec![finding(Severity::Fatal, "pins", error.to_string())];
    }
    if read_settings(&pins).is_ok_and(|settings| settings.is_draining()) {
        let text = "`cleanup --drain` was begun: lb handles no new flows until `run` is started";
        return vec![finding(Severity::Warning, "pins", text)];
    }
    Vec::new()
}

/// How much the maps of these sizes take. It is charged to the pod of the agent.
fn memory(sizes: &Sizes) -> Finding {
    let maps = pinned_maps(sizes);
    let of_flows = maps.iter().filter(|map| flow_table::MAPS.contains(&map.name)).copied();
    let of_flows = Memory::of(&of_flows.collect::<Vec<_>>()).fixed.div_ceil(1 << 20);
    let text = format!(
        "maps take {}; {of_flows} MiB are for {} flows of each IP family (--max-flows)",
        Memory::of(&maps),
        sizes.flows,
    );
    finding(Severity::Fine, "memory", text)
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
            let text = "not mounted: connections are translated packet by packet";
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

/// The survey of a container without the node's tools, which has what the kernel says in place of
/// what a missing tool would have found.
fn without_tools(mut survey: Survey, signs: Option<Vec<Sign>>) -> Survey {
    let is_missing = |error: &ToolError| matches!(error, ToolError::Missing { .. });
    if let Some(signs) = signs
        && survey.errors.iter().any(is_missing)
    {
        survey.errors.retain(|error| !is_missing(error));
        survey.leftovers.extend(signs.iter().map(Sign::leftover));
    }
    survey
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
        let leftover =
            Leftover { place, what: "12 chains".to_owned(), kept: Vec::new(), because: "" };
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
    fn a_container_without_tools_asks_the_kernel() {
        let missing = || Survey {
            leftovers: Vec::new(),
            errors: vec![ToolError::Missing { program: "nft".to_owned(), package: "nftables" }],
        };
        let found = kube_proxy(None, &without_tools(missing(), Some(Vec::new())));
        assert_eq!(found[0].severity, Severity::Fine, "{found:?}");
        let found = kube_proxy(None, &without_tools(missing(), None));
        assert!(found[0].text.starts_with("nft is missing"), "{found:?}");
    }

    #[test]
    fn the_memory_of_flows_is_named() {
        let found = memory(&Sizes { services: 1, backends: 1, slots: 1, flows: 1 << 20 });
        // 92 and 140 bytes for each flow of IPv4 and IPv6.
        assert!(found.text.contains("; 233 MiB are for 1048576 flows"), "{}", found.text);
    }

    #[test]
    fn a_kernel_is_new_enough_from_5_12_on() {
        for (release, severity) in [
            ("6.18.3-generic\n", Severity::Fine),
            ("5.12.0", Severity::Fine),
            ("5.11.22", Severity::Fatal),
            ("4.19.0-27-amd64", Severity::Fatal),
            ("", Severity::Warning),
        ] {
            assert_eq!(kernel(release).severity, severity, "{release:?}");
        }
    }
}
