//! Runs other programs, and shows their output or writes it to a log file.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail};

/// Runs a command and shows its output.
pub(crate) fn shown(command: &mut Command) -> Result<()> {
    let status = command
        .stdin(Stdio::null())
        .status()
        .with_context(|| format!("cannot start {}", describe(command)))?;
    if !status.success() {
        bail!("{} failed ({status})", describe(command));
    }
    Ok(())
}

/// Runs a command with its output in a file. The error names the file and quotes the line that
/// explains the failure best.
pub(crate) fn logged(command: &mut Command, log: &Path) -> Result<()> {
    if let Some(dir) = log.parent() {
        fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    }
    let file = File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
    let copy = file.try_clone().context("cannot share the log file")?;
    let status = command
        .stdin(Stdio::null())
        .stdout(file)
        .stderr(copy)
        .status()
        .with_context(|| format!("cannot start {}", describe(command)))?;
    if !status.success() {
        let output = String::from_utf8_lossy(&fs::read(log).unwrap_or_default()).into_owned();
        bail!(
            "{} failed ({status}): {}; the output is in {}",
            describe(command),
            telling_line(&output).unwrap_or("no output"),
            log.display()
        );
    }
    Ok(())
}

/// Returns the output of a command; `None` if it is not installed or fails.
pub(crate) fn answer(command: &mut Command) -> Option<String> {
    let output = command.stdin(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Replaces this process by the command, so that it gets signals and sets the exit status.
pub(crate) fn become_it(command: &mut Command) -> Result<ExitCode> {
    let error = command.exec();
    Err(error).with_context(|| format!("cannot start {}", describe(command)))
}

/// The program's name and its first arguments.
fn describe(command: &Command) -> String {
    let mut words = vec![
        Path::new(command.get_program())
            .file_name()
            .unwrap_or(command.get_program())
            .to_string_lossy()
            .into_owned(),
    ];
    words.extend(command.get_args().take(4).map(|word| word.to_string_lossy().into_owned()));
    format!("`{}`", words.join(" "))
}

/// The line of a failed command's output that best explains it: the first
/// that calls itself an error, else the last one.
fn telling_line(output: &str) -> Option<&str> {
    let lines = || output.lines().map(str::trim).filter(|line| !line.is_empty());
    lines()
        .find(|line| line.starts_with("E:") || line.starts_with("error"))
        .or_else(|| lines().next_back())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_quoted_line_is_the_first_error_or_the_last_line() {
        assert_eq!(
            telling_line("Reading\nE: Unable to locate package x\nE: more\nend\n"),
            Some("E: Unable to locate package x")
        );
        assert_eq!(telling_line("one\ntwo\n\n"), Some("two"));
        assert_eq!(telling_line("\n"), None);
    }

    #[test]
    fn a_failure_names_the_command_and_its_log() {
        let log = std::env::temp_dir().join(format!("xtask-logged-{}", std::process::id()));
        let result = logged(Command::new("sh").args(["-c", "echo 'error: no'; exit 3"]), &log);
        let text = result.map_or_else(|error| error.to_string(), |()| "ok".to_owned());
        fs::remove_file(&log).expect("the log exists");
        assert!(text.contains("exit status: 3"), "{text}");
        assert!(text.contains("error: no"), "{text}");
        assert!(text.contains(&log.display().to_string()), "{text}");
    }
}
