//! `tests/e2e/sig-network.txt`: every test of upstream's sig-network, by what is done with it.

use std::collections::BTreeSet;

use anyhow::{Context, Result, bail, ensure};

/// The heading of the tests that are run.
const RUN: &str = "run";
/// What the headings of the others begin with, before the reason.
const LEFT_OUT: &str = "left out: ";

/// The tests by name.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct List {
    /// Those that are run.
    pub run: BTreeSet<String>,
    /// Those that are not, in groups with a reason.
    pub left_out: Vec<Group>,
}

/// Tests that are left out for one reason.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Group {
    /// Why.
    pub reason: String,
    /// Their names.
    pub names: BTreeSet<String>,
}

impl List {
    /// The list of the repository.
    ///
    /// # Errors
    /// It has an error; with its line.
    pub fn of_repository() -> Result<Self> {
        Self::parse(include_str!("../../../e2e/sig-network.txt"))
            .context("tests/e2e/sig-network.txt")
    }

    /// Reads a list: `## run` or `## left out: REASON`, then a name in each line. A line with one
    /// `#` is a comment.
    ///
    /// # Errors
    /// It has an error; with its line.
    pub fn parse(text: &str) -> Result<Self> {
        let mut list = Self::default();
        let mut seen = BTreeSet::new();
        let mut heading = None;
        for (number, line) in (1..).zip(text.lines().map(str::trim)) {
            if let Some(text) = line.strip_prefix("## ") {
                heading = Some(text);
                list.open(text).with_context(|| format!("line {number}"))?;
            } else if !line.is_empty() && !line.starts_with('#') {
                let heading = heading.with_context(|| {
                    format!("line {number}: {line} has no heading `## run` or `## left out: …`")
                })?;
                ensure!(seen.insert(line), "line {number}: {line} is in the list twice");
                match list.left_out.last_mut() {
                    Some(group) if heading != RUN => group.names.insert(line.to_owned()),
                    _ => list.run.insert(line.to_owned()),
                };
            }
        }
        Ok(list)
    }

    fn open(&mut self, heading: &str) -> Result<()> {
        if let Some(reason) = heading.strip_prefix(LEFT_OUT) {
            self.left_out.push(Group { reason: reason.to_owned(), names: BTreeSet::new() });
        } else if heading != RUN {
            bail!("the heading {heading:?} is neither `{RUN}` nor `{LEFT_OUT}REASON`");
        }
        Ok(())
    }

    /// How many tests are left out.
    pub fn count_left_out(&self) -> usize {
        self.left_out.iter().map(|group| group.names.len()).sum()
    }

    /// What is wrong with the list, given the names of all tests that upstream has.
    pub fn differences(&self, upstream: &BTreeSet<String>) -> Vec<String> {
        let left_out = self.left_out.iter().flat_map(|group| &group.names);
        let known: BTreeSet<&String> = self.run.iter().chain(left_out).collect();
        let new = upstream.iter().filter(|name| !known.contains(name));
        let gone = known.iter().filter(|name| !upstream.contains(**name));
        new.map(|name| format!("{name}: new upstream, it is not in the list"))
            .chain(gone.map(|name| format!("{name}: in the list, upstream has no such test")))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn the_list_of_the_repository_is_read() {
        let list = List::of_repository().expect("a list");
        assert!(list.run.iter().all(|name| name.starts_with("[sig-network] ")));
        assert!(list.left_out.iter().all(|group| !group.names.is_empty()), "an empty group");
    }

    #[test]
    fn headings_say_what_is_done_with_the_names_below() {
        let text = "# a comment\n## run\na\n\n## left out: no time\nb\nc\n";
        let expected = List {
            run: names(&["a"]),
            left_out: vec![Group { reason: "no time".to_owned(), names: names(&["b", "c"]) }],
        };
        assert_eq!(List::parse(text).expect("a list"), expected);
        for (text, told) in [
            ("a\n", "line 1: a has no heading"),
            ("## run\na\n## left out: x\na\n", "line 4: a is in the list twice"),
            ("## skip\n", "line 1: the heading \"skip\""),
        ] {
            let error = List::parse(text).map_err(|error| format!("{error:#}"));
            assert!(error.as_ref().is_err_and(|error| error.starts_with(told)), "{error:?}");
        }
    }

    #[test]
    fn new_and_missing_tests_are_differences() {
        let list = List::parse("## run\na\nb\n## left out: x\nc\n").expect("a list");
        assert_eq!(list.differences(&names(&["a", "b", "c"])), [""; 0]);
        let told = list.differences(&names(&["a", "c", "d"]));
        assert_eq!(
            told,
            ["d: new upstream, it is not in the list", "b: in the list, upstream has no such test"]
        );
    }
}
