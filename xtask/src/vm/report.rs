//! The results of the machines, the golden file of instruction counts, and the table.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::progress::seconds;
use crate::test::count::Outcome;
use crate::workspace::Workspace;

/// The prefix of result lines, which `lb_tests::tools::vm` prints.
const PREFIX: &str = "lb-vm: ";
const GOLDEN: &str = "tests/golden/vm.txt";

/// The results of one kernel.
#[derive(Debug, Default)]
pub(super) struct Results {
    kernel: String,
    pub(super) passed: usize,
    pub(super) failed: usize,
    failures: Vec<String>,
    facts: BTreeMap<String, Value>,
    pub(super) took: Duration,
    /// Whether the machine printed the last line, so that all tests have run.
    pub(super) is_whole: bool,
}

impl Results {
    /// Reads the results from a console.
    pub(super) fn parse(kernel: &str, console: &str) -> Self {
        let mut results = Self { kernel: kernel.to_owned(), ..Self::default() };
        for line in console.lines() {
            // A message of the kernel may precede the prefix on the line.
            let Some((_, json)) = line.split_once(PREFIX) else { continue };
            match serde_json::from_str::<Value>(json) {
                Ok(value) => results.take(&value),
                Err(_) => results.fail(json.to_owned()),
            }
        }
        results
    }

    fn take(&mut self, line: &Value) {
        if let Some(test) = line["test"].as_str() {
            match line["error"].as_str() {
                None => self.passed += 1,
                Some(error) => self.fail(format!("{test}: {error}")),
            }
        } else if let Some(fact) = line["fact"].as_str() {
            self.facts.insert(fact.to_owned(), line["value"].clone());
        } else {
            self.is_whole = line["passed"].is_u64();
        }
    }

    /// A kernel that could not be tested.
    pub(super) fn failure(kernel: &str, error: &anyhow::Error) -> Self {
        let mut results = Self { kernel: kernel.to_owned(), ..Self::default() };
        results.fail(format!("{error:#}"));
        results
    }

    pub(super) fn fail(&mut self, what: String) {
        self.failed += 1;
        self.failures.push(what);
    }

    pub(super) fn failures(&self) -> impl Iterator<Item = &String> {
        self.failures.iter()
    }

    /// The same for `cargo xtask test`.
    pub(super) fn outcome(self) -> Outcome {
        let Self { passed, failed, failures, .. } = self;
        Outcome { passed, failed, failures, ..Outcome::default() }
    }

    /// One line with the counts.
    pub(super) fn line(&self) -> String {
        let Self { kernel, passed, failed, took, .. } = self;
        format!(
            "{kernel} ({}): {passed} passed, {failed} failed in {}",
            self.release(),
            seconds(*took)
        )
    }

    fn release(&self) -> &str {
        self.facts.get("kernel").and_then(Value::as_str).unwrap_or("not booted")
    }

    /// The first two numbers of the kernel's version.
    fn series(&self) -> String {
        self.release().split('.').take(2).collect::<Vec<_>>().join(".")
    }

    fn instructions(&self) -> BTreeMap<&str, u64> {
        let counts = self.facts.get("instructions").and_then(Value::as_object);
        let counts = counts.into_iter().flatten();
        counts.filter_map(|(name, count)| Some((name.as_str(), count.as_u64()?))).collect()
    }
}

/// Compares instruction counts with the golden file: a tenth more is allowed. Blessing it keeps
/// the rows of kernels that were not booted.
pub(super) fn compare(workspace: &Workspace, all: &mut [Results], bless: bool) -> Result<()> {
    let path = workspace.root().join(GOLDEN);
    let text = fs::read_to_string(&path).unwrap_or_default();
    let mut golden = parse(&text);
    for results in all.iter_mut() {
        let series = results.series();
        let counts: Vec<(String, u64)> = results
            .instructions()
            .into_iter()
            .map(|(name, count)| (name.to_owned(), count))
            .collect();
        for (program, count) in counts {
            let key = (series.clone(), program);
            if bless {
                golden.insert(key, count);
                continue;
            }
            let Some(known) = golden.get(&key) else { continue };
            if count > known + known / 10 {
                results.fail(format!(
                    "{}: the verifier walks through {count} instructions, a tenth more than the \
                     {known} in {GOLDEN} are allowed (`cargo xtask vm --bless` accepts them)",
                    key.1
                ));
            }
        }
    }
    if bless {
        let mut text =
            String::from("# kernel, program, instructions that the verifier went through\n");
        for ((series, program), count) in &golden {
            writeln!(text, "{series} {program} {count}")?;
        }
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

fn parse(golden: &str) -> BTreeMap<(String, String), u64> {
    let row = |line: &str| {
        let mut words = line.split(' ');
        let key = (words.next()?.to_owned(), words.next()?.to_owned());
        Some((key, words.next()?.parse().ok()?))
    };
    golden.lines().filter(|line| !line.starts_with('#')).filter_map(row).collect()
}

/// The table for `docs/kernels.md`.
pub(super) fn table(all: &[Results]) -> String {
    let mut text = String::from(
        "| kernel | programs | attaches by | cases at tc, IPv4; IPv6 | cases with XDP before tc | \
         largest program, instructions | tests |\n|---|---|---|---|---|---|---|\n",
    );
    for results in all {
        let facts = &results.facts;
        let cases = |family: u8, before: &str| {
            let counts = facts.get(&format!("cases for IPv{family}, {before}"));
            let number = |at: usize| counts.and_then(|counts| counts[at].as_u64()).unwrap_or(0);
            format!("{} of {}", number(0), number(0) + number(1))
        };
        let both = |before| format!("{}; {}", cases(4, before), cases(6, before));
        let counts = results.instructions();
        let largest = counts.iter().max_by_key(|(_, count)| **count);
        let largest = largest.map_or_else(String::new, |(name, count)| format!("`{name}` {count}"));
        let attach = facts.get("attach").and_then(Value::as_str).unwrap_or_default();
        text.push_str(&format!(
            "| {} | {} | {attach} | {} | {} | {largest} | {} passed, {} failed |\n",
            results.release(),
            counts.len(),
            both("at tc"),
            both("with XDP before tc"),
            results.passed,
            results.failed
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONSOLE: &str = "\
[    0.1] booting
lb-vm: {\"fact\":\"kernel\",\"value\":\"6.1.0-50-amd64\"}
lb-vm: {\"test\":\"a\",\"error\":null}
[    3.2] lb-vm: {\"test\":\"b\",\"error\":\"no\"}
lb-vm: {\"fact\":\"instructions\",\"value\":{\"to_pod\":7,\"from_pod\":9}}
";

    #[test]
    fn results_are_read_off_the_console() {
        let results = Results::parse("6.1", CONSOLE);
        assert_eq!((results.passed, results.failed), (1, 1));
        assert_eq!(results.failures, ["b: no"]);
        assert_eq!(results.series(), "6.1");
        assert!(!results.is_whole, "it never said that this was all");
        assert!(table(&[results]).contains("| 6.1.0-50-amd64 | 2 |"));
        let whole = format!("{CONSOLE}lb-vm: {{\"passed\":1,\"failed\":1}}\n");
        assert!(Results::parse("6.1", &whole).is_whole);
    }

    #[test]
    fn a_golden_has_a_row_for_each_kernel_and_program() {
        let golden = parse("# kernel, program, count\n6.1 to_pod 7\n6.12 to_pod 8\n");
        assert_eq!(golden.len(), 2);
        assert_eq!(golden[&("6.12".to_owned(), "to_pod".to_owned())], 8);
    }
}
