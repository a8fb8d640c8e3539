//! Counts tests in the output of the programs that run them.

use std::collections::BTreeMap;

/// At most so many lines of what a failed test printed are repeated in the summary, and so many
/// characters of each.
const SAID: (usize, usize) = (3, 400);

/// The outcome of a number of tests.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) passed: usize,
    pub(crate) failed: usize,
    pub(crate) ignored: usize,
    /// One line for each failure.
    pub(crate) failures: Vec<String>,
    /// What a failed test printed first, by its line in `failures`.
    pub(crate) said: BTreeMap<String, Vec<String>>,
    /// Tests that failed beside others and passed alone.
    pub(crate) repeated: Vec<String>,
}

impl Outcome {
    /// One failure of something that is not a test.
    pub(crate) fn failure(what: String) -> Self {
        Self { failed: 1, failures: vec![what], ..Self::default() }
    }

    /// Adds the outcome of a part; its failures are named after the part.
    pub(crate) fn add(&mut self, part: &str, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.ignored += other.ignored;
        let said = other.said.into_iter();
        self.said.extend(said.map(|(line, said)| (format!("{part}: {line}"), said)));
        let named =
            |lines: Vec<String>| lines.into_iter().map(move |line| format!("{part}: {line}"));
        self.failures.extend(named(other.failures));
        self.repeated.extend(named(other.repeated));
    }

    /// The outcome of a step whose failed tests were run `again`: the second time counts.
    pub(crate) fn repeated(mut self, again: Self) -> Self {
        let is_failed = |name: &String| again.failures.contains(name);
        self.repeated = self.failures.into_iter().filter(|name| !is_failed(name)).collect();
        self.passed += again.passed;
        (self.failed, self.failures, self.said) = (again.failed, again.failures, again.said);
        self
    }
}

/// The form in which a program reports its tests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Form {
    /// The output of libtest.
    #[default]
    Libtest,
    /// A line `FAILED …` for each failure, and `N passed, N failed` in the end.
    Plain,
}

/// Reads the output of a program that runs tests, line by line.
#[derive(Debug, Default)]
pub(crate) struct Counter {
    form: Form,
    outcome: Outcome,
    /// The names below the last line `failures:`, while they are being listed.
    listing: Option<Vec<String>>,
    /// The failed test whose output is being read.
    speaker: Option<String>,
    /// Whether the line with the numbers was read, in [`Form::Plain`].
    has_numbers: bool,
}

impl Counter {
    pub(crate) fn new(form: Form) -> Self {
        Self { form, ..Self::default() }
    }

    pub(crate) fn line(&mut self, line: &str) {
        match self.form {
            Form::Libtest => self.line_of_libtest(line),
            Form::Plain => self.plain_line(line),
        }
    }

    fn plain_line(&mut self, line: &str) {
        if let Some(failure) = line.strip_prefix("FAILED ") {
            self.outcome.failures.push(failure.to_owned());
        } else if let Some(Tally { passed, failed, .. }) = Tally::of_parts(line, ", ") {
            (self.outcome.passed, self.outcome.failed) = (passed, failed);
            self.has_numbers = true;
        }
    }

    fn line_of_libtest(&mut self, line: &str) {
        if line == "failures:" {
            self.listing = Some(Vec::new());
            self.speaker = None;
        } else if let Some(name) = speaker(line).filter(|_| self.listing.is_some()) {
            self.speaker = Some(name.to_owned());
        } else if let Some(name) = &self.speaker {
            let said = self.outcome.said.entry(name.clone()).or_default();
            // What it printed before it failed says less.
            if is_reason(line) && !said.first().is_some_and(|first| is_reason(first)) {
                said.clear();
            }
            if !line.is_empty() && said.len() < SAID.0 {
                said.push(line.chars().take(SAID.1).collect());
            }
        } else if let Some(result) = Tally::parse(line) {
            self.outcome.passed += result.passed;
            self.outcome.failed += result.failed;
            self.outcome.ignored += result.ignored;
            let names = self.listing.take().unwrap_or_default();
            if result.failed > 0 {
                self.outcome.failures.extend(names);
            }
        } else if let (Some(names), Some(name)) = (&mut self.listing, line.strip_prefix("    ")) {
            names.push(name.to_owned());
        }
    }

    /// Ends the count. A command that failed without a failed test (it did not compile, or a
    /// test ended the whole process) counts as one failure, unless it has said that no test
    /// ran.
    pub(crate) fn finish(mut self, status: &str, success: bool) -> Outcome {
        if !success && self.outcome.failed == 0 && !self.has_numbers {
            self.outcome.failed = 1;
            self.outcome.failures.push(format!(
                "the tests did not compile, or their process ended early ({status})"
            ));
        }
        self.outcome
    }
}

/// The test of the line that precedes its output: `---- NAME stdout ----`, or `---- NAME ----`.
fn speaker(line: &str) -> Option<&str> {
    let name = line.strip_prefix("---- ")?.strip_suffix(" ----")?;
    Some(name.strip_suffix(" stdout").unwrap_or(name))
}

/// Whether a line of a test's output begins to say why it failed.
fn is_reason(line: &str) -> bool {
    line.starts_with("Error: ") || line.starts_with("thread '") && line.contains("panicked at ")
}

/// The numbers of one line `test result: …`.
#[derive(Debug, Default, PartialEq, Eq)]
struct Tally {
    passed: usize,
    failed: usize,
    ignored: usize,
}

impl Tally {
    fn parse(line: &str) -> Option<Self> {
        // Output of a test's child process may precede it on the line.
        let (_, rest) = line.split_once("test result: ")?;
        let (_, numbers) = rest.split_once(". ")?;
        Self::of_parts(numbers, "; ")
    }

    /// The numbers of parts such as `2 passed`, if any is one.
    fn of_parts(text: &str, separator: &str) -> Option<Self> {
        let mut tally = None;
        for part in text.split(separator) {
            let Some((number, what)) = part.split_once(' ') else {
                continue;
            };
            let tally: &mut Self = tally.get_or_insert_default();
            let field = match what {
                "passed" => &mut tally.passed,
                "failed" => &mut tally.failed,
                "ignored" => &mut tally.ignored,
                _ => continue,
            };
            *field = number.parse().ok()?;
        }
        tally
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(output: &str, success: bool) -> Outcome {
        count_of(Form::Libtest, output, success)
    }

    fn count_of(form: Form, output: &str, success: bool) -> Outcome {
        let mut counter = Counter::new(form);
        output.lines().for_each(|line| counter.line(line));
        counter.finish("exit status: 101", success)
    }

    #[test]
    fn results_of_several_binaries_add_up() {
        let output = "\
running 2 tests
test a ... ok
test b ... ok

test result: ok. 2 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s

running 0 tests

test result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s
   Doc-tests x
test result: ok. 40 passed; 0 failed; 0 ignored; 0 measured; 3 filtered out; finished in 1.20s
";
        let outcome = count(output, true);
        assert_eq!((outcome.passed, outcome.failed, outcome.ignored), (42, 0, 1));
        assert!(outcome.failures.is_empty());
    }

    #[test]
    fn failures_are_named() {
        let output = "\
test a::b ... FAILED
test c ... ok

failures:

---- a::b stdout ----

thread 'a::b' panicked at src/a.rs:1:1:
    indented text of the panic

failures:
    a::b
    d::e

test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s
";
        let outcome = count(output, false);
        assert_eq!((outcome.passed, outcome.failed), (1, 2));
        assert_eq!(outcome.failures, ["a::b", "d::e"]);
        let panic = ["thread 'a::b' panicked at src/a.rs:1:1:", "    indented text of the panic"];
        assert_eq!(outcome.said["a::b"], panic);
        assert!(!outcome.said.contains_key("d::e"));
    }

    #[test]
    fn the_summary_has_the_first_lines_of_a_failure() {
        let output = "\
test a ... FAILED

failures:

---- a ----
starting
Error: the cluster did not come up

one
two
three
four

failures:
    a

test result: FAILED. 0 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s
";
        let mut all = Outcome::default();
        all.add("part", count(output, false));
        assert_eq!(all.failures, ["part: a"]);
        assert_eq!(all.said["part: a"], ["Error: the cluster did not come up", "one", "two"]);
    }

    #[test]
    fn plain_results_count_as_well() {
        let output = "FAILED a: b: expected dropped, got untouched\n    by rule 4\n\n\
                      3 flows as kube-proxy, 1 by a rule\n     1  4 a rule\n4 passed, 1 failed\n";
        let outcome = count_of(Form::Plain, output, false);
        assert_eq!((outcome.passed, outcome.failed), (4, 1));
        assert_eq!(outcome.failures, ["a: b: expected dropped, got untouched"]);
        let outcome = count_of(Form::Plain, "0 passed, 0 failed\n", false);
        assert_eq!((outcome.passed, outcome.failed), (0, 0));
        let outcome = count_of(Form::Plain, "starting\n", false);
        assert_eq!((outcome.passed, outcome.failed), (0, 1));
    }

    #[test]
    fn a_crash_or_a_compile_error_is_one_failure() {
        let outcome = count("error[E0425]: cannot find value\n", false);
        assert_eq!((outcome.passed, outcome.failed), (0, 1));
        assert!(outcome.failures[0].contains("exit status: 101"));
    }

    #[test]
    fn a_result_behind_stray_output_still_counts() {
        let outcome = count("hellotest result: ok. 1 passed; 0 failed; 0 ignored\n", true);
        assert_eq!(outcome.passed, 1);
    }

    #[test]
    fn the_second_run_of_failed_tests_counts() {
        let failures = || vec!["a".to_owned(), "b".to_owned()];
        let first = || Outcome { passed: 5, failed: 2, failures: failures(), ..Outcome::default() };
        let again =
            Outcome { passed: 1, failed: 1, failures: vec!["b".to_owned()], ..Outcome::default() };
        let both = first().repeated(again);
        assert_eq!((both.passed, both.failed), (6, 1));
        assert_eq!((both.failures, both.repeated), (vec!["b".to_owned()], vec!["a".to_owned()]));
        let both = first().repeated(Outcome::failure("ended early".to_owned()));
        assert_eq!((both.passed, both.failed), (5, 1));
    }

    #[test]
    fn parts_name_their_failures() {
        let mut all = Outcome::default();
        all.add("prog_tc", Outcome::failure("x".to_owned()));
        all.add("prog_xdp", Outcome { passed: 2, ..Outcome::default() });
        assert_eq!((all.passed, all.failed), (2, 1));
        assert_eq!(all.failures, ["prog_tc: x"]);
    }
}
