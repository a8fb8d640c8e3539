//! A node: a network namespace, a cgroup, and a holder process with mounts and a host name of its
//! own, which keeps both for the node's daemons.
//!
//! Everything that a node writes outside of its own directory goes to a mount of its own: nothing
//! is left on the machine when the holder has ended.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::{panic, thread};

use anyhow::{Context, Result, ensure};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::sethostname;

use super::cgroups;
use super::cni;
use super::daemon::{self, Daemon, Namespaces};
use super::plan::{Plan, node_name};
use crate::harness::netns::topology::cgroup::{Cgroup, mount_point};
use crate::harness::netns::topology::namespace::Netns;

/// What kubelet and kube-proxy set for the whole machine: files of the node's take the writes.
/// They hold what kubelet wants, so that it finds nothing to change.
const MACHINE_SYSCTLS: [(&str, &str); 6] = [
    ("kernel/panic", "10"),
    ("kernel/panic_on_oops", "1"),
    ("kernel/keys/root_maxbytes", "25000000"),
    ("kernel/keys/root_maxkeys", "1000000"),
    ("vm/overcommit_memory", "1"),
    ("vm/panic_on_oom", "0"),
];

/// Directories that a node has for itself, empty at first.
const OWN_DIRECTORIES: [&str; 2] = ["/var/lib", "/var/log"];

/// A node of the cluster.
#[derive(Debug)]
pub struct Node {
    number: u8,
    netns: Arc<Netns>,
    cgroup: Cgroup,
    directory: PathBuf,
    holder: u32,
}

impl Node {
    /// Makes the node; its daemons come later.
    pub(super) fn create(plan: &Plan, number: u8, netns: Arc<Netns>) -> Result<Self> {
        let name = node_name(number);
        let cgroup = cgroups::create(plan, &name)?;
        let directory = plan.directory().join(&name);
        fs::create_dir_all(&directory)
            .with_context(|| format!("cannot make {}", directory.display()))?;
        let namespaces = Namespaces { network: netns.file(), holder: None, unshare: true };
        let mut command = Command::new("sleep");
        command.arg("infinity");
        let log = directory.join("holder.log");
        let holder = Daemon::start("holder", command, (&namespaces, &cgroup), &log, false)?.id();
        fs::write(directory.join("holder.pid"), holder.to_string())?;
        let node = Self { number, netns, cgroup, directory, holder };
        node.inside(|| node.mount_own()).with_context(|| format!("cannot set up {name}"))?;
        Ok(node)
    }

    /// Finds a node that [`Node::create`] made.
    pub(super) fn open(plan: &Plan, number: u8, netns: Arc<Netns>) -> Result<Self> {
        let name = node_name(number);
        let directory = plan.directory().join(&name);
        let file = directory.join("holder.pid");
        let holder = fs::read_to_string(&file)
            .with_context(|| format!("cannot read {}: is the cluster up?", file.display()))?;
        let holder = holder.trim().parse().context("no process id")?;
        let cgroup = Cgroup::create(&plan.cgroup(&name))?;
        Ok(Self { number, netns, cgroup, directory, holder })
    }

    /// 1 for `node1`.
    pub fn number(&self) -> u8 {
        self.number
    }

    /// The name of its Node object.
    pub fn name(&self) -> String {
        node_name(self.number)
    }

    /// Its files on the machine: logs, configuration, what its daemons keep.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Its network namespace.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// The id of the process that keeps its namespaces, for nsenter.
    pub fn holder(&self) -> u32 {
        self.holder
    }

    /// The directory of its cgroup of version 2, which its pods are in too.
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// Starts a daemon of the node.
    pub(super) fn daemon(&self, name: &str, command: Command) -> Result<Daemon> {
        let log = self.directory.join(format!("{name}.log"));
        let label = format!("{name} of {}", self.name());
        Daemon::start(&label, command, (&self.namespaces(), &self.cgroup), &log, false)
    }

    /// Runs a program of the node to its end.
    ///
    /// # Errors
    /// It cannot be started. That it failed is in the output's status.
    pub fn run(&self, mut command: Command) -> Result<Output> {
        let shown = format!("{command:?}");
        daemon::enter(&mut command, &self.namespaces(), &self.cgroup)?;
        command.stdin(Stdio::null()).output().with_context(|| format!("cannot start {shown}"))
    }

    /// Runs a program of the node and returns what it prints.
    ///
    /// # Errors
    /// It fails; with what it said.
    pub fn output(&self, program: &str, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new(program);
        command.args(arguments);
        let output = self.run(command)?;
        ensure!(
            output.status.success(),
            "`{program} {}` on {}: {}: {}",
            arguments.join(" "),
            self.name(),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Writes a file as the node sees it, with the directories above it.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write(&self, path: &str, text: &str) -> Result<()> {
        self.inside(|| write(Path::new(path), text))
    }

    /// Does `work` on a thread of its own that sees the node's files and network.
    fn inside<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let (host_name, mounts) = daemon::of_holder(self.holder)?;
        let network = self.netns.file();
        let thread = || {
            // The kernel gives mounts of their own only to those that share no root directory.
            unshare(CloneFlags::CLONE_FS)?;
            setns(&network, CloneFlags::CLONE_NEWNET)?;
            setns(host_name, CloneFlags::CLONE_NEWUTS)?;
            setns(mounts, CloneFlags::CLONE_NEWNS)?;
            work()
        };
        thread::scope(|scope| scope.spawn(thread).join())
            .unwrap_or_else(|panicked| panic::resume_unwind(panicked))
    }

    fn namespaces(&self) -> Namespaces {
        Namespaces { network: self.netns.file(), holder: Some(self.holder), unshare: false }
    }

    /// Runs in the namespaces of the holder.
    fn mount_own(&self) -> Result<()> {
        const NONE: Option<&str> = None;
        sethostname(self.name())?;
        // First cut off from the machine's mounts, then shared with what the node starts.
        mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)?;
        mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_SHARED, NONE)?;
        self.overlay("etc")?;
        self.overlay(cni::PLUGINS.trim_start_matches('/'))?;
        for path in OWN_DIRECTORIES {
            let own = self.own(path.trim_start_matches('/'))?;
            bind(&own, Path::new(path))?;
        }
        mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), Some("mode=755"))
            .context("cannot mount /run")?;
        fs::create_dir_all("/run/lock")?;
        mount(Some("bpf"), "/sys/fs/bpf", Some("bpf"), MsFlags::empty(), Some("mode=700"))
            .context("cannot mount /sys/fs/bpf")?;
        for (key, value) in MACHINE_SYSCTLS {
            let file = self.directory.join("proc").join(key);
            write(&file, value)?;
            bind(&file, &Path::new("/proc/sys").join(key))?;
        }
        // Nobody answers there: the cluster's own names come from CoreDNS.
        write(Path::new("/etc/resolv.conf"), "nameserver 172.18.0.1\n")
    }

    /// The machine's directory, with changes of the node's own.
    fn overlay(&self, name: &str) -> Result<()> {
        let (upper, work) = (self.own(name)?, self.own(&format!("{name}.work"))?);
        let options =
            format!("lowerdir=/{name},upperdir={},workdir={}", upper.display(), work.display());
        let target = format!("/{name}");
        mount(Some("overlay"), &*target, Some("overlay"), MsFlags::empty(), Some(&*options))
            .with_context(|| format!("cannot mount {target} with {options}"))
    }

    fn own(&self, name: &str) -> Result<PathBuf> {
        let own = self.directory.join(name);
        fs::create_dir_all(&own).with_context(|| format!("cannot make {}", own.display()))?;
        Ok(own)
    }
}

/// Where agents on this node attach their connect-time hooks: a directory of the machine's
/// cgroup mount.
pub(super) fn cgroup_of_nodes(plan: &Plan) -> Result<PathBuf> {
    Ok(mount_point()?.join(plan.name()))
}

fn bind(from: &Path, to: &Path) -> Result<()> {
    mount(Some(from), to, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .with_context(|| format!("cannot mount {} on {}", from.display(), to.display()))
}

fn write(path: &Path, text: &str) -> Result<()> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)
            .with_context(|| format!("cannot make {}", directory.display()))?;
    }
    // A link of the machine's, as /etc/resolv.conf may be, must not be written through.
    if path.is_symlink() {
        fs::remove_file(path)?;
    }
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    File::open(path).map(drop).with_context(|| format!("cannot read {}", path.display()))
}
