//! Expectations of a test: all of them are tried, and the failed ones are reported together.

use anyhow::{Result, bail};

/// How many were tried, and which failed.
#[derive(Debug, Default)]
pub struct Expectations {
    tried: usize,
    failed: Vec<String>,
}

impl Expectations {
    /// Records the outcome of a check.
    pub fn check(&mut self, what: impl std::fmt::Display, outcome: Result<()>) {
        self.tried += 1;
        if let Err(error) = outcome {
            self.failed.push(format!("{what}: {error:#}"));
        }
    }

    /// Records whether a condition is met.
    pub fn is_true(&mut self, what: impl std::fmt::Display, is_met: bool) {
        self.tried += 1;
        if !is_met {
            self.failed.push(what.to_string());
        }
    }

    /// Ends the test.
    ///
    /// # Errors
    /// The expectations that failed, or that none was tried.
    pub fn finish(self) -> Result<()> {
        if self.tried == 0 {
            bail!("no expectation was tried");
        }
        if !self.failed.is_empty() {
            let (failed, tried) = (self.failed.len(), self.tried);
            bail!("{failed} of {tried} expectations failed:\n{}", self.failed.join("\n"));
        }
        Ok(())
    }
}
