//! kubectl with every right, in the namespace of the control plane.

use std::ffi::OsStr;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::plan::Plan;
use crate::harness::controlplane::programs::program;
use crate::harness::netns::topology::namespace::Netns;

/// How a cluster is spoken to.
#[derive(Clone, Debug)]
pub struct Kubectl {
    program: PathBuf,
    arguments: Vec<String>,
    netns: Arc<Netns>,
}

impl Kubectl {
    pub(super) fn new(plan: &Plan, netns: Arc<Netns>) -> Result<Self> {
        let cache = plan.directory().join("kubectl-cache");
        let arguments = vec![
            format!("--kubeconfig={}", plan.kubeconfig("admin").display()),
            format!("--cache-dir={}", cache.display()),
        ];
        Ok(Self { program: program("kubectl")?, arguments, netns })
    }

    /// The program and its first arguments, to be run in the namespace of the control plane.
    pub fn command_line(&self) -> Vec<String> {
        let program = self.program.display().to_string();
        [program].into_iter().chain(self.arguments.iter().cloned()).collect()
    }

    /// Runs kubectl to its end, with this on its standard input.
    ///
    /// # Errors
    /// It cannot be started. That it failed is in the output's status.
    pub fn output<S: AsRef<OsStr> + Sync>(&self, arguments: &[S], input: &str) -> Result<Output> {
        self.netns.run(|| {
            let mut child = Command::new(&self.program)
                .args(&self.arguments)
                .args(arguments)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .context("cannot start kubectl")?;
            if let Some(mut stdin) = child.stdin.take() {
                // If it fails before it has read everything, it says why on stderr.
                stdin.write_all(input.as_bytes()).ok();
            }
            child.wait_with_output().context("cannot wait for kubectl")
        })
    }

    /// Runs kubectl and returns what it prints.
    ///
    /// # Errors
    /// It fails; with what it said.
    pub fn run(&self, arguments: &[&str]) -> Result<String> {
        self.run_with(arguments, "")
    }

    /// [`Kubectl::run`] with this on its standard input.
    ///
    /// # Errors
    /// It fails; with what it said.
    pub fn run_with(&self, arguments: &[&str], input: &str) -> Result<String> {
        let output = self.output(arguments, input)?;
        ensure!(
            output.status.success(),
            "`kubectl {}`: {}: {}{}",
            arguments.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim(),
            String::from_utf8_lossy(&output.stdout).trim()
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Objects as JSON.
    ///
    /// # Errors
    /// There are none, or no API server answers.
    pub fn get(&self, arguments: &[&str]) -> Result<Value> {
        let text = self.run(&[&["get", "-o", "json"], arguments].concat())?;
        serde_json::from_str(&text).context("kubectl printed no JSON")
    }

    /// Applies the objects of a YAML or JSON document.
    ///
    /// # Errors
    /// The API server refuses one.
    pub fn apply(&self, objects: &str) -> Result<()> {
        self.run_with(&["apply", "--server-side", "--force-conflicts", "-f", "-"], objects)
            .map(drop)
    }
}
