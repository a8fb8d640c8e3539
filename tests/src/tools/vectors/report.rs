//! The result of a run: a line for each case that failed, and counts.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use anyhow::Result;

use super::format::{Flow, Group, Selection};
use super::mutation::Wrong;
use super::rules::{Expect, Expected, Rule};

/// The result of a run.
#[derive(Debug, Default)]
pub struct Report {
    /// Flows that get kube-proxy's answer.
    same: usize,
    /// Flows that get another answer by a rule of lb's own.
    own: usize,
    /// How often each rule made a difference.
    rules: BTreeMap<Rule, usize>,
    /// How many wrong answers of each kind were noticed.
    wrong: BTreeMap<Wrong, usize>,
    selections: usize,
    failed: usize,
}

impl Report {
    /// Counts a flow, and prints the difference if it failed.
    pub(super) fn flow(
        &mut self,
        group: &Group,
        flow: &Flow,
        expected: &Result<Expected>,
        result: Result<(), String>,
    ) {
        let expected = match expected {
            Ok(expected) => expected,
            Err(error) => return self.failed(group, flow, &format!("{error:#}")),
        };
        if let Err(got) = result {
            let mut why = format!("expected {}, {got}", said(&expected.what));
            for rule in &expected.rules {
                why.push_str(&format!("\n    by rule {rule}"));
            }
            return self.failed(group, flow, &why);
        }
        match expected.rules.is_empty() {
            true => self.same += 1,
            false => self.own += 1,
        }
        for rule in &expected.rules {
            *self.rules.entry(*rule).or_default() += 1;
        }
    }

    /// Counts a wrong answer that was put into a copy of a flow, and prints it if it was not noticed.
    pub(super) fn wrong(&mut self, group: &Group, flow: &Flow, wrong: Wrong, is_noticed: bool) {
        match is_noticed {
            true => *self.wrong.entry(wrong).or_default() += 1,
            false => self.failed(group, flow, &format!("a wrong answer is not noticed: {wrong}")),
        }
    }

    /// Counts and prints a flow that failed.
    pub(super) fn failed(&mut self, group: &Group, flow: &Flow, why: &str) {
        self.failed += 1;
        let to = SocketAddr::new(flow.dest_ip, flow.dest_port);
        println!(
            "FAILED {}: {} ({} -> {to}/{}): {why}",
            group.id, flow.name, flow.source_ip, flow.protocol
        );
    }

    /// Counts all flows of a group that could not be run.
    pub(super) fn group(&mut self, group: &Group, error: &anyhow::Error) {
        self.failed += group.flows.len();
        println!("FAILED {}, all {} flows: {error:#}", group.id, group.flows.len());
    }

    /// Counts an endpoint selection, and prints the difference if it failed.
    pub(super) fn selection(&mut self, case: &Selection, result: Result<()>) {
        match result {
            Ok(()) => self.selections += 1,
            Err(error) => {
                self.failed += 1;
                println!("FAILED endpoint selection: {}: {error:#}", case.name);
            }
        }
    }

    /// Counts an error that kept a whole file from being run.
    pub fn broken(&mut self, error: &anyhow::Error) {
        self.failed += 1;
        println!("FAILED {error:#}");
    }

    /// Whether nothing failed and something ran.
    pub fn is_good(&self) -> bool {
        self.failed == 0 && self.passed() > 0
    }

    fn passed(&self) -> usize {
        self.same + self.own + self.selections
    }

    /// Prints counts; the last line is `N passed, N failed`.
    pub fn summary(&self) {
        println!(
            "\n{} flows with kube-proxy's answer, {} changed by a rule of lb's own, {} endpoint selections",
            self.same, self.own, self.selections
        );
        for (rule, count) in &self.rules {
            println!("{count:>6}  {rule}");
        }
        let wrong: usize = self.wrong.values().sum();
        println!("{wrong} wrong answers in copies of the flows were noticed");
        for (kind, count) in &self.wrong {
            println!("{count:>6}  {kind}");
        }
        println!("{} passed, {} failed", self.passed(), self.failed);
    }
}

fn said(expected: &Expect) -> String {
    match expected {
        Expect::Only(outcome) => outcome.to_string(),
        Expect::To(endpoints) => {
            let each: Vec<String> = endpoints
                .iter()
                .map(|(endpoint, source)| format!("to {endpoint} from {source}"))
                .collect();
            each.join(" or ")
        }
    }
}
