//! Processes of a test: in the right namespace and cgroup, logged, and gone when it ends.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, OnceLock, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::sched::{CloneFlags, setns};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::harness::netns::topology::cgroup::Cgroup;
use crate::harness::netns::topology::namespace::Netns;

/// How much of a log a failure shows.
const TAIL_LINES: usize = 40;

/// A running process. Dropping kills it; while a test panics, the end of its log is shown.
#[derive(Debug)]
pub struct Process {
    label: String,
    child: Child,
    stdout: PathBuf,
    stderr: PathBuf,
}

impl Process {
    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it wrote to stdout so far.
    pub fn stdout(&self) -> String {
        fs::read_to_string(&self.stdout).unwrap_or_default()
    }

    /// What it wrote to stderr so far.
    pub fn stderr(&self) -> String {
        fs::read_to_string(&self.stderr).unwrap_or_default()
    }

    /// How it ended, if it has.
    ///
    /// # Errors
    /// It cannot be waited for.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().with_context(|| format!("cannot wait for {}", self.label))
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// It has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(pid_of(&self.child)?, signal)
            .with_context(|| format!("cannot send {signal} to {}", self.label))
    }

    /// Kills it at once and waits for its end.
    ///
    /// # Errors
    /// It cannot be waited for.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        self.child.kill().with_context(|| format!("cannot kill {}", self.label))?;
        self.child.wait().with_context(|| format!("cannot wait for {}", self.label))
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// It still runs after `timeout`; with the end of its log.
    pub fn wait(&mut self, timeout: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if Instant::now() > deadline {
                bail!("{} still runs after {timeout:?}\n{}", self.label, self.tail());
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits until stdout holds `text`.
    ///
    /// # Errors
    /// It ends before, or `timeout` is over; with the end of its log.
    pub fn wait_for_output(&mut self, text: &str, timeout: Duration) -> Result<()> {
        let deadline = Instant::now() + timeout;
        loop {
            let ended = self.ended()?;
            if self.stdout().contains(text) {
                return Ok(());
            }
            if let Some(status) = ended {
                bail!(
                    "{} ended with {status} before it printed {text:?}\n{}",
                    self.label,
                    self.tail()
                );
            }
            if Instant::now() > deadline {
                bail!("{} did not print {text:?} in {timeout:?}\n{}", self.label, self.tail());
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// The end of its log, both streams.
    pub fn tail(&self) -> String {
        let mut tail = String::new();
        for (stream, text) in [("stdout", self.stdout()), ("stderr", self.stderr())] {
            let lines: Vec<_> = text.lines().collect();
            for line in &lines[lines.len().saturating_sub(TAIL_LINES)..] {
                tail.push_str(&format!("  {} {stream}: {line}\n", self.label));
            }
        }
        tail
    }

    /// The pipe to its stdin, if it was asked for.
    pub(in crate::harness::netns) fn take_stdin(&mut self) -> Option<ChildStdin> {
        self.child.stdin.take()
    }

    /// The pipe from its stdout, if it was asked for.
    pub(in crate::harness::netns) fn take_stdout(&mut self) -> Option<std::process::ChildStdout> {
        self.child.stdout.take()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
        if thread::panicking() {
            eprint!("{}", self.tail());
        }
    }
}

/// Where a process is to run and where its output goes.
pub(in crate::harness::netns) struct Place<'a> {
    pub(in crate::harness::netns) netns: &'a Netns,
    pub(in crate::harness::netns) cgroup: &'a Cgroup,
    pub(in crate::harness::netns) logs: PathBuf,
}

impl Place<'_> {
    /// Starts a process whose output goes to files.
    pub(in crate::harness::netns) fn spawn(
        &self,
        label: &str,
        mut command: Command,
    ) -> Result<Process> {
        let (out, err) = self.log_files(label);
        command.stdin(Stdio::null());
        command.stdout(create(&out)?).stderr(create(&err)?);
        self.start(label, command, out, err)
    }

    /// Starts a process that is talked to: stdin and stdout are pipes.
    pub(in crate::harness::netns) fn spawn_piped(
        &self,
        label: &str,
        mut command: Command,
    ) -> Result<Process> {
        let (out, err) = self.log_files(label);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(create(&err)?);
        self.start(label, command, out, err)
    }

    fn log_files(&self, label: &str) -> (PathBuf, PathBuf) {
        static NUMBER: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let file = |kind| self.logs.join(format!("{label}-{number}.{kind}"));
        (file("stdout"), file("stderr"))
    }

    fn start(
        &self,
        label: &str,
        mut command: Command,
        stdout: PathBuf,
        stderr: PathBuf,
    ) -> Result<Process> {
        enter(&mut command, self.netns, self.cgroup)?;
        let shown = format!("{command:?}");
        let child = spawn(command).with_context(|| format!("cannot start {label}: {shown}"))?;
        Ok(Process { label: label.to_owned(), child, stdout, stderr })
    }
}

fn create(path: &PathBuf) -> Result<File> {
    File::create(path).with_context(|| format!("cannot make {}", path.display()))
}

fn pid_of(child: &Child) -> Result<Pid> {
    Ok(Pid::from_raw(i32::try_from(child.id())?))
}

/// Makes the command join the cgroup and the network namespace. The mount namespace stays: a
/// process sees bpffs and the cgroup tree.
fn enter(command: &mut Command, netns: &Netns, cgroup: &Cgroup) -> Result<()> {
    let netns = netns.file();
    let joiner = Arc::new(cgroup.joiner()?);
    // SAFETY: between fork and exec this makes system calls only: it neither allocates nor
    // takes a lock.
    unsafe {
        command.pre_exec(move || {
            set_pdeathsig(Signal::SIGKILL)?;
            (&*joiner).write_all(b"0")?;
            setns(&netns, CloneFlags::CLONE_NEWNET)?;
            Ok(())
        });
    }
    Ok(())
}

type Order = (Command, mpsc::Sender<io::Result<Child>>);

/// Forks on a thread that lives as long as the process does: a death signal is sent when the
/// *thread* that forked ends, and a test may start processes on a thread that does not stay.
fn spawn(command: Command) -> Result<Child> {
    static SPAWNER: OnceLock<mpsc::Sender<Order>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (orders, queue) = mpsc::channel::<Order>();
        thread::spawn(move || {
            for (mut command, done) in queue {
                done.send(command.spawn()).ok();
            }
        });
        orders
    });
    let (done, child) = mpsc::channel();
    spawner.send((command, done)).map_err(|_| anyhow!("the spawning thread is gone"))?;
    Ok(child.recv().context("the spawning thread is gone")??)
}
