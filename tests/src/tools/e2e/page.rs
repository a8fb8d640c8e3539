//! `docs/conformance.md`: how the last whole run with each network of pods ended.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::list::List;

/// Where it is in the repository.
const PAGE: &str = "docs/conformance.md";

const HEAD: &str = "\
# Conformance

Upstream's own end-to-end tests of sig-network, as `cargo xtask test e2e` runs them: on a cluster of \
three real nodes on one machine, made by `cargo xtask cluster up`, with lb as its DaemonSet and no \
kube-proxy. The run writes this page. Which tests there are, and which are left out, is in \
[tests/e2e/sig-network.txt](../tests/e2e/sig-network.txt); a test that is new or missing fails the \
run like one that does not pass.

| network of pods | date | Kubernetes | lb | Linux | passed | failed | left out | minutes |
|---|---|---|---|---|---|---|---|---|
";

/// A whole run.
#[derive(Debug)]
pub struct Run<'a> {
    /// The network of pods.
    pub cni: &'a str,
    /// The day, as ISO 8601 has it.
    pub date: String,
    /// Versions of Kubernetes, lb and Linux.
    pub versions: [String; 3],
    /// How many tests passed.
    pub passed: usize,
    /// The tests that did not.
    pub failures: &'a [String],
    /// How long it took.
    pub minutes: u64,
}

/// Replaces what the page says about the network of pods of this run.
///
/// # Errors
/// The page cannot be written.
pub fn update(list: &List, run: &Run<'_>) -> Result<()> {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(PAGE);
    let old = fs::read_to_string(&page).unwrap_or_default();
    fs::write(&page, text(&old, list, run))
        .with_context(|| format!("cannot write {}", page.display()))
}

fn text(old: &str, list: &List, run: &Run<'_>) -> String {
    let [kubernetes, lb, linux] = &run.versions;
    let Run { cni, date, passed, failures, minutes, .. } = run;
    let row = format!(
        "| {cni} | {date} | {kubernetes} | {lb} | {linux} | {passed} | {} | {} | {minutes} |",
        failures.len(),
        list.count_left_out()
    );
    let begins = |line: &str| line.starts_with(&format!("| {cni} |"));
    let rows = old.lines().filter(|line| is_row(line) && !begins(line)).map(str::to_owned);
    let mut rows: Vec<String> = rows.chain([row]).collect();
    rows.sort();
    let mut text = format!("{HEAD}{}\n", rows.join("\n"));
    let failed = |line: &&str| line.starts_with("- ") && !line.starts_with(&format!("- {cni}: "));
    let mut failed: Vec<String> = old.lines().filter(failed).map(str::to_owned).collect();
    failed
        .extend(failures.iter().map(|failure| format!("- {cni}: `{}`", failure.replace('`', "'"))));
    failed.retain(|line| line.contains(": `"));
    failed.sort();
    if !failed.is_empty() {
        let _ = write!(text, "\n## Failed\n\n{}\n", failed.join("\n"));
    }
    text.push_str("\n## Left out\n\n| tests | reason |\n|---|---|\n");
    for group in &list.left_out {
        let _ = writeln!(text, "| {} | {} |", group.names.len(), group.reason);
    }
    text
}

/// Whether a line is that of a run: the second field is a date.
fn is_row(line: &str) -> bool {
    let field = line.split('|').nth(2).map(str::trim);
    field.is_some_and(|field| field.len() == 10 && field.as_bytes()[4] == b'-')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run<'a>(cni: &'a str, passed: usize, failures: &'a [String]) -> Run<'a> {
        let versions = ["v1.36.3", "0.1.0", "6.18"].map(str::to_owned);
        Run { cni, date: "2026-11-29".to_owned(), versions, passed, failures, minutes: 15 }
    }

    #[test]
    fn a_run_replaces_what_the_page_said_about_its_network_and_nothing_else() {
        let list = List::parse("## run\na\nb\n## left out: no time\nc\n").expect("a list");
        let failures = ["b: failed: `x`".to_owned()];
        let first = text("", &list, &run("ptp", 1, &failures));
        assert!(first.contains("| ptp | 2026-11-29 | v1.36.3 | 0.1.0 | 6.18 | 1 | 1 | 1 | 15 |"));
        assert!(first.contains("- ptp: `b: failed: 'x'`"), "{first}");
        assert!(first.ends_with("| 1 | no time |\n"), "{first}");
        let second = text(&first, &list, &run("flannel", 2, &[]));
        assert!(second.contains("- ptp: `b") && second.contains("| flannel |"), "{second}");
        let third = text(&second, &list, &run("ptp", 2, &[]));
        assert!(!third.contains("## Failed"), "{third}");
        assert_eq!(third.matches("| ptp |").count(), 1);
        assert_eq!(third.matches("| flannel |").count(), 1);
        assert_eq!(text(&third, &list, &run("ptp", 2, &[])), third);
    }
}
