//! Counting tests from what libtest prints.

/// What a number of tests came to.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) passed: usize,
    pub(crate) failed: usize,
    pub(crate) ignored: usize,
    /// One line for each failure.
    pub(crate) failures: Vec<String>,
}

impl Outcome {
    /// Something other than a test that went wrong: one failure.
    pub(crate) fn failure(what: String) -> Self {
        Self { failed: 1, failures: vec![what], ..Self::default() }
    }

    /// Adds the outcome of a part; its failures are named after the part.
    pub(crate) fn add(&mut self, part: &str, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.ignored += other.ignored;
        self.failures
            .extend(other.failures.into_iter().map(|failure| format!("{part}: {failure}")));
    }
}

/// Reads the output of `cargo test`, line by line.
#[derive(Debug, Default)]
pub(crate) struct Counter {
    outcome: Outcome,
    /// The names below the last line `failures:`, while they are being listed.
    listing: Option<Vec<String>>,
}

impl Counter {
    pub(crate) fn line(&mut self, line: &str) {
        if line == "failures:" {
            self.listing = Some(Vec::new());
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

    /// Ends the count. A command that failed without a failed test (it did not
    /// compile, or a test ended the whole process) counts as one failure.
    pub(crate) fn finish(mut self, status: &str, success: bool) -> Outcome {
        if !success && self.outcome.failed == 0 {
            self.outcome.failed = 1;
            self.outcome.failures.push(format!("did not compile, or died in a test ({status})"));
        }
        self.outcome
    }
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
        // What a child of a test wrote may precede it on the line.
        let (_, rest) = line.split_once("test result: ")?;
        let (_, numbers) = rest.split_once(". ")?;
        let mut tally = Self::default();
        for part in numbers.split("; ") {
            let Some((number, what)) = part.split_once(' ') else {
                continue;
            };
            let field = match what {
                "passed" => &mut tally.passed,
                "failed" => &mut tally.failed,
                "ignored" => &mut tally.ignored,
                _ => continue,
            };
            *field = number.parse().ok()?;
        }
        Some(tally)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(output: &str, success: bool) -> Outcome {
        let mut counter = Counter::default();
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
    fn parts_name_their_failures() {
        let mut all = Outcome::default();
        all.add("prog_tc", Outcome::failure("x".to_owned()));
        all.add("prog_xdp", Outcome { passed: 2, ..Outcome::default() });
        assert_eq!((all.passed, all.failed), (2, 1));
        assert_eq!(all.failures, ["prog_tc: x"]);
    }
}
