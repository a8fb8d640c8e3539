//! The node's own tools, as processes.

use std::{
    io::{self, Write},
    process::{Command, Stdio},
};

/// Runs `program` to its end with `input` on its standard input; what it prints.
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
    // While it reads, it may fill the pipe that it writes to.
    let writer = std::thread::spawn(move || stdin.map(|mut to| to.write_all(text.as_bytes())));
    let output = child.wait_with_output().map_err(|error| failed(error.to_string()))?;
    // A tool that fails before it has read everything says why itself.
    drop(writer.join());
    let said = String::from_utf8_lossy(&output.stderr);
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(failed(match said.trim().lines().next() {
        Some(line) => line.to_owned(),
        None => output.status.to_string(),
    }))
}

/// Whether `program` is there at all.
pub(super) fn is_there(program: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).is_file()))
}

/// The outcome, but for a tool that is missing: what it shows cannot be there then.
pub(super) fn unless_missing<T: Default>(result: Result<T, ToolError>) -> Result<T, ToolError> {
    match result {
        Err(ToolError::Missing { .. }) => Ok(T::default()),
        result => result,
    }
}

/// The package of Debian and most others that a tool comes with.
fn package(program: &str) -> &'static str {
    match program {
        "nft" => "nftables",
        "ipset" => "ipset",
        "ipvsadm" => "ipvsadm",
        "ip" => "iproute2",
        _ => "iptables",
    }
}

/// A tool of the node could not be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ToolError {
    /// It is not installed.
    #[error("{program} is missing, which is needed to see kube-proxy's rules: install {package}")]
    Missing {
        /// Its name.
        program: String,
        /// What to install.
        package: &'static str,
    },
    /// It failed.
    #[error("`{command}` failed: {text}")]
    Failed {
        /// What was run.
        command: String,
        /// What it said.
        text: String,
    },
}

impl ToolError {
    /// Whether the kernel lacks what the tool is for, so that nothing can be there.
    pub(super) fn is_of_kernel(&self) -> bool {
        const SAID: [&str; 3] =
            ["Protocol not supported", "Operation not supported", "Protocol not available"];
        matches!(self, Self::Failed { text, .. } if SAID.iter().any(|said| text.contains(said)))
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
    fn a_tool_reads_all_that_it_is_told_and_says_why_it_fails() {
        let long = "line\n".repeat(100_000);
        assert_eq!(run("cat", &[], &long).as_deref(), Ok(&*long));
        let error = run("sh", &["-c", "echo first >&2; echo second >&2; exit 3"], &long);
        let text = error.expect_err("a failure").to_string();
        assert!(text.ends_with("failed: first"), "{text}");
    }
}
