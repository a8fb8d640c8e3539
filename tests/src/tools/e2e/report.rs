//! The report of a run, as ginkgo writes it in JSON.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Deserialize;

/// The one kind of node in the report that is a test.
const TEST: &str = "It";

/// What became of each test that was chosen.
#[derive(Debug, Default)]
pub struct Report {
    tests: BTreeMap<String, Ended>,
    /// Failures outside of tests: what is set up for all of them.
    others: Vec<String>,
}

/// How a test ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// As it should.
    Passed,
    /// It did not run to its end, or found something wrong; with what it said.
    Failed(String),
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Suite {
    spec_reports: Vec<Spec>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Spec {
    container_hierarchy_texts: Option<Vec<String>>,
    leaf_node_type: String,
    leaf_node_text: String,
    state: String,
    failure: Option<Failure>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Failure {
    #[serde(default)]
    message: String,
}

impl Report {
    /// Reads a file.
    ///
    /// # Errors
    /// It cannot be read, or is no report.
    pub fn read(path: &Path) -> Result<Self> {
        let text =
            fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        Self::parse(&text).with_context(|| path.display().to_string())
    }

    fn parse(text: &str) -> Result<Self> {
        let suites: Vec<Suite> = serde_json::from_str(text).context("not a report of ginkgo")?;
        let mut report = Self::default();
        for spec in suites.into_iter().flat_map(|suite| suite.spec_reports) {
            report.add(spec);
        }
        Ok(report)
    }

    fn add(&mut self, spec: Spec) {
        let message = spec.failure.map(|failure| failure.message).unwrap_or_default();
        let said = message.lines().map(str::trim).find(|line| !line.is_empty());
        let ended = match (spec.state.as_str(), said) {
            ("passed", _) => Ended::Passed,
            // Not chosen: ginkgo reports these like those that skip themselves, which say why.
            ("skipped" | "pending", None) => return,
            (state, said) => Ended::Failed(format!("{state}: {}", said.unwrap_or("no message"))),
        };
        if spec.leaf_node_type == TEST {
            let mut words = spec.container_hierarchy_texts.unwrap_or_default();
            words.push(spec.leaf_node_text);
            self.tests.insert(words.join(" "), ended);
        } else if let Ended::Failed(said) = ended {
            self.others.push(format!("{}: {said}", spec.leaf_node_type));
        }
    }

    /// The names of the tests that were chosen.
    pub fn names(&self) -> BTreeSet<String> {
        self.tests.keys().cloned().collect()
    }

    /// How many of the expected tests passed, and what is wrong with the others: a test that
    /// failed, skipped itself or did not run at all.
    pub fn compare(&self, expected: &BTreeSet<String>) -> (usize, Vec<String>) {
        let mut passed = 0;
        let mut failures = self.others.clone();
        for name in expected {
            match self.tests.get(name) {
                Some(Ended::Passed) => passed += 1,
                Some(Ended::Failed(said)) => failures.push(format!("{name}: {said}")),
                None => failures.push(format!("{name}: did not run")),
            }
        }
        (passed, failures)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPORT: &str = r#"[{"SpecReports": [
        {"ContainerHierarchyTexts": null, "LeafNodeType": "SynchronizedBeforeSuite",
         "LeafNodeText": "", "State": "passed"},
        {"ContainerHierarchyTexts": ["[sig-network] A", "B"], "LeafNodeType": "It",
         "LeafNodeText": "passes", "State": "passed"},
        {"ContainerHierarchyTexts": ["[sig-network] A"], "LeafNodeType": "It",
         "LeafNodeText": "fails", "State": "failed",
         "Failure": {"Message": "\n  Unexpected error:\n      no answer\n"}},
        {"ContainerHierarchyTexts": ["[sig-network] A"], "LeafNodeType": "It",
         "LeafNodeText": "skips itself", "State": "skipped",
         "Failure": {"Message": "need 3 zones"}},
        {"ContainerHierarchyTexts": ["[sig-network] A"], "LeafNodeType": "It",
         "LeafNodeText": "was not chosen", "State": "skipped"}
    ]}]"#;

    #[test]
    fn every_expected_test_must_have_passed() {
        let report = Report::parse(REPORT).expect("a report");
        let expected = ["B passes", "fails", "skips itself", "was not chosen"];
        let expected = expected.map(|name| format!("[sig-network] A {name}")).into();
        let (passed, failures) = report.compare(&expected);
        assert_eq!(passed, 1);
        assert_eq!(
            failures,
            [
                "[sig-network] A fails: failed: Unexpected error:",
                "[sig-network] A skips itself: skipped: need 3 zones",
                "[sig-network] A was not chosen: did not run",
            ]
        );
    }

    #[test]
    fn a_failure_before_all_tests_counts() {
        let text = r#"[{"SpecReports": [{"ContainerHierarchyTexts": null,
            "LeafNodeType": "SynchronizedBeforeSuite", "LeafNodeText": "", "State": "failed",
            "Failure": {"Message": "no node is ready"}}]}]"#;
        let report = Report::parse(text).expect("a report");
        let (passed, failures) = report.compare(&BTreeSet::new());
        assert_eq!((passed, failures.len()), (0, 1));
        assert_eq!(failures[0], "SynchronizedBeforeSuite: failed: no node is ready");
    }
}
