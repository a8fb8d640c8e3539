//! A table of expectations: every row is tried, and all that fail are told together.

use anyhow::{Result, bail};

/// The rows that failed so far.
#[derive(Debug, Default)]
pub struct Expectations {
    tried: usize,
    failed: Vec<String>,
}

impl Expectations {
    /// Notes the outcome of a row.
    pub fn check(&mut self, what: impl std::fmt::Display, outcome: Result<()>) {
        self.tried += 1;
        if let Err(error) = outcome {
            self.failed.push(format!("{what}: {error:#}"));
        }
    }

    /// Notes whether something is as it should be.
    pub fn is_true(&mut self, what: impl std::fmt::Display, is_met: bool) {
        self.tried += 1;
        if !is_met {
            self.failed.push(what.to_string());
        }
    }

    /// The verdict on the table.
    ///
    /// # Errors
    /// A row failed, or there was none.
    pub fn finish(self) -> Result<()> {
        if self.tried == 0 {
            bail!("not one row was tried");
        }
        if !self.failed.is_empty() {
            let (failed, tried) = (self.failed.len(), self.tried);
            bail!("{failed} of {tried} rows failed:\n{}", self.failed.join("\n"));
        }
        Ok(())
    }
}
