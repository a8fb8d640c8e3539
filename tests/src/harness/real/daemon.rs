//! Processes of a cluster: they outlive the one that started them, and end with the cgroup.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::setsid;

use crate::harness::netns::topology::cgroup::Cgroup;

/// How much of a log an error shows, in bytes.
const LOG_TAIL: usize = 4096;

/// The namespaces that a process is to be in.
#[derive(Clone, Debug)]
pub(super) struct Namespaces {
    pub(super) network: Arc<File>,
    /// Mounts and host name of a node, by its holder's id.
    pub(super) holder: Option<u32>,
    /// Makes mounts and host name of its own.
    pub(super) unshare: bool,
}

/// A process that keeps running when its starter ends.
#[derive(Debug)]
pub(super) struct Daemon {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Daemon {
    /// Starts `command`, its output in `log`. Standard output is a pipe if `piped`.
    pub(super) fn start(
        name: &str,
        mut command: Command,
        (namespaces, cgroup): (&Namespaces, &Cgroup),
        log: &Path,
        piped: bool,
    ) -> Result<Self> {
        let output = File::options().create(true).append(true).open(log);
        let output = output.with_context(|| format!("cannot write {}", log.display()))?;
        command.stdin(Stdio::null()).stderr(output.try_clone()?);
        command.stdout(if piped { Stdio::piped() } else { output.into() });
        enter(&mut command, namespaces, cgroup)?;
        // SAFETY: between fork and exec this makes a system call only.
        unsafe {
            command.pre_exec(|| {
                setsid()?;
                Ok(())
            });
        }
        let child = command.spawn().with_context(|| format!("cannot start {name}"))?;
        Ok(Self { name: name.to_owned(), child, log: log.to_owned() })
    }

    /// The process id.
    pub(super) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Its standard output, if it is a pipe and nobody has it.
    pub(super) fn output(&mut self) -> Option<std::process::ChildStdout> {
        self.child.stdout.take()
    }

    /// Fails, with the end of its log, when it has ended.
    pub(super) fn check_running(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            bail!("{} ended: {status}\n{}", self.name, self.log_tail());
        }
        Ok(())
    }

    /// The end of its log, under a title.
    pub(super) fn log_tail(&self) -> String {
        let text = fs::read(&self.log).unwrap_or_default();
        let tail = &text[text.len().saturating_sub(LOG_TAIL)..];
        format!(
            "--- end of {}, the log of {} ---\n{}",
            self.log.display(),
            self.name,
            String::from_utf8_lossy(tail)
        )
    }
}

/// Makes `command` join the cgroup and the namespaces, in this order: the cgroup's file is the
/// machine's.
pub(super) fn enter(command: &mut Command, namespaces: &Namespaces, cgroup: &Cgroup) -> Result<()> {
    let joiner = cgroup.joiner()?;
    let network = namespaces.network.clone();
    let of_holder = namespaces.holder.map(of_holder).transpose()?;
    let own = namespaces.unshare;
    // SAFETY: between fork and exec this makes system calls only: it neither allocates nor
    // takes a lock.
    unsafe {
        command.pre_exec(move || {
            (&joiner).write_all(b"0")?;
            setns(&network, CloneFlags::CLONE_NEWNET)?;
            if let Some((host_name, mounts)) = &of_holder {
                setns(host_name, CloneFlags::CLONE_NEWUTS)?;
                setns(mounts, CloneFlags::CLONE_NEWNS)?;
            }
            if own {
                unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUTS)?;
            }
            Ok(())
        });
    }
    Ok(())
}

/// The namespaces of host name and mounts of a process.
pub(super) fn of_holder(holder: u32) -> Result<(File, File)> {
    let open = |kind: &str| {
        let path = format!("/proc/{holder}/ns/{kind}");
        File::open(&path).with_context(|| format!("cannot open {path}: the node's holder is gone"))
    };
    Ok((open("uts")?, open("mnt")?))
}
