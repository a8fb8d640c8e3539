//! Runs the node's own tools as processes.

use std::{
    io::{self, Write},
    process::{Command, Stdio},
};

/// Runs `program` to its end with `input` as its standard input; returns its standard output.
///
/// # Errors
/// [`ToolError`] if it is missing or fails.
pub(super) fn run(program: &str, arguments: &[&str], input: &str) -> Result<String, ToolError> {
    let failed = |text: String| ToolError::Failed {
        command: format!("{program} {}", arguments.join(" ")).trim_end().to_owned(),
        text,
    };
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => {
                ToolError::Missing { program: program.to_owned(), package: package(program) }
            }
            _ => failed(error.to_string()),
        })?;
    let stdin = child.stdin.take();
    let text = input.to_owned();
    // The tool may fill its output pipe before it has read all input.
    let writer = std::thread::spawn(move || stdin.map(|mut to| to.write_all(text.as_bytes())));
    let output = child.wait_with_output().map_err(|error| failed(error.to_string()))?;
    // A failed write means that the tool failed early; its own error is reported.
    drop(writer.join());
    let errors = String::from_utf8_lossy(&output.stderr);
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(failed(match errors.trim().lines().next() {
        Some(line) => line.to_owned(),
        None => output.status.to_string(),
    }))
}

/// Whether `program` is on PATH.
pub(super) fn is_installed(program: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).is_file()))
}

/// The result, or the default if the tool is missing: it cannot have created anything then.
pub(super) fn unless_missing<T: Default>(result: Result<T, ToolError>) -> Result<T, ToolError> {
    match result {
        Err(ToolError::Missing { .. }) => Ok(T::default()),
        result => result,
    }
}

/// The package of a tool, on Debian and most other distributions.
fn package(program: &str) -> &'static str {
    match program {
        "nft" => "nftables",
        "ipset" => "ipset",
        "ipvsadm" => "ipvsadm",
        "ip" => "iproute2",
        _ => "iptables",
    }
}

/// Why a tool of the node could not be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ToolError {
    /// The tool is not installed.
    #[error("{program} is missing, so kube-proxy's rules cannot be listed: install {package}")]
    Missing {
        /// The tool's name.
        program: String,
        /// The package to install.
        package: &'static str,
    },
    /// The tool failed.
    #[error("`{command}` failed: {text}")]
    Failed {
        /// The command line.
        command: String,
        /// The error that it printed.
        text: String,
    },
}

impl ToolError {
    /// Whether the kernel does not support the tool's subsystem, which then has no rules.
    pub(super) fn is_of_kernel(&self) -> bool {
        const ABSENT: [&str; 3] =
            ["Protocol not supported", "Operation not supported", "Protocol not available"];
        matches!(self, Self::Failed { text, .. } if ABSENT.iter().any(|it| text.contains(it)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_tool_is_named_with_its_package() {
        let error = run("lb-no-such-tool", &[], "").expect_err("no such tool");
        assert!(error.to_string().contains("lb-no-such-tool is missing"), "{error}");
        assert!(error.to_string().contains("install iptables"), "{error}");
        assert_eq!(unless_missing::<String>(Err(error)), Ok(String::new()));
    }

    #[test]
    fn a_tool_reads_all_its_input_and_its_error_is_reported() {
        let long = "line\n".repeat(100_000);
        assert_eq!(run("cat", &[], &long).as_deref(), Ok(&*long));
        let error = run("sh", &["-c", "echo first >&2; echo second >&2; exit 3"], &long);
        let text = error.expect_err("a failure").to_string();
        assert!(text.ends_with("failed: first"), "{text}");
    }
}
