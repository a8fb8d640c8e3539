//! A child process inside a network namespace. It dies with its owner: when
//! the value is dropped, and also when this process is killed.

use std::fs::{self, File};
use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{self, Sender};
use std::thread;

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;

/// How much of a log an error shows, in bytes.
const LOG_TAIL: usize = 4096;

/// A running daemon with its log file.
#[derive(Debug)]
pub(super) struct Process {
    name: &'static str,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `command`, its output appended to `<directory>/<name>.log`.
    pub(super) fn start(
        name: &'static str,
        mut command: Command,
        directory: &Path,
    ) -> Result<Self> {
        let log = directory.join(format!("{name}.log"));
        let output = File::options().create(true).append(true).open(&log)?;
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let child = spawn(command).with_context(|| format!("start {name}"))?;
        Ok(Self { name, child, log })
    }

    /// Fails, with the end of its log, when the process has ended by itself.
    pub(super) fn check_running(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            bail!("{} ended early: {status}\n{}", self.name, self.log_tail());
        }
        Ok(())
    }

    /// The last lines of the log, under a title.
    pub(super) fn log_tail(&self) -> String {
        let text = fs::read(&self.log).unwrap_or_default();
        let tail = &text[text.len().saturating_sub(LOG_TAIL)..];
        format!("--- end of the log of {} ---\n{}", self.name, String::from_utf8_lossy(tail))
    }

    /// Kills the process (SIGKILL) and waits until it is gone. That it had
    /// ended by itself before is an error.
    pub(super) fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        let status = self.child.wait()?;
        if status.signal() != Some(Signal::SIGKILL as i32) {
            bail!("{} ended early: {status}\n{}", self.name, self.log_tail());
        }
        Ok(())
    }

    /// The process id.
    pub(super) fn id(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Makes `command` run in the network namespace `namespace`, and die with the
/// thread that spawns it.
pub(super) fn confine(command: &mut Command, namespace: &File) -> io::Result<()> {
    let namespace = namespace.try_clone()?;
    // SAFETY: setns and prctl are plain system calls, allowed between fork and exec.
    unsafe {
        command.pre_exec(move || {
            setns(&namespace, CloneFlags::CLONE_NEWNET)?;
            set_pdeathsig(Signal::SIGKILL)?;
            Ok(())
        });
    }
    Ok(())
}

/// Spawns from a thread that lives as long as this process: the parent-death
/// signal comes when the spawning *thread* ends (prctl(2)), and the thread of a
/// test may end before the last test that uses its control plane.
fn spawn(command: Command) -> Result<Child> {
    type Job = (Command, Sender<io::Result<Child>>);
    static SPAWNER: OnceLock<Sender<Job>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (sender, jobs) = mpsc::channel::<Job>();
        thread::spawn(move || {
            for (mut command, answer) in jobs {
                // Fails only if the asking thread is gone, and with it the wish.
                let _ = answer.send(command.spawn());
            }
        });
        sender
    });
    let (answer, child) = mpsc::channel();
    spawner.send((command, answer)).ok().context("the thread that starts programs is gone")?;
    Ok(child.recv()??)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sleep() -> Result<(Process, tempfile::TempDir)> {
        let directory = tempfile::tempdir()?;
        let mut command = Command::new("sleep");
        command.arg("60");
        confine(&mut command, &File::open("/proc/self/ns/net")?)?;
        Ok((Process::start("sleep", command, directory.path())?, directory))
    }

    #[test]
    fn a_process_outlives_the_thread_that_started_it() -> Result<()> {
        let (mut process, _directory) = thread::spawn(sleep).join().expect("no panic")?;
        process.check_running()?;
        process.kill()
    }

    #[test]
    fn an_early_end_is_an_error_with_the_log() -> Result<()> {
        let directory = tempfile::tempdir()?;
        let mut command = Command::new("sh");
        command.args(["-c", "echo reason; exit 3"]);
        let mut process = Process::start("sh", command, directory.path())?;
        process.child.wait()?;
        let error = process.check_running().expect_err("it has ended").to_string();
        assert!(error.contains("exit status: 3") && error.contains("reason"), "{error}");
        Ok(())
    }
}
