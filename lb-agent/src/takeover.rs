//! What kube-proxy has left on this node: how to find it, and how to take it away.
//!
//! Nothing here is needed for balancing: `run` never calls it. The node's own tools do the
//! work, as they do for kube-proxy. What the kubelet, a network plugin or a user has made stays
//! as it is, whatever it is called.

mod iptables;
mod ipvs;
mod nftables;
mod rules;
mod tool;

use std::{fmt, fs, io};

pub use tool::ToolError;

/// What of ours keeps the kernel translating the connections that kube-proxy had balanced: a
/// chain or a table, so called.
const KEEPER_CHAIN: &str = "LB-TAKEOVER";
const KEEPER_TABLE: &str = "lb-takeover";

/// What kube-proxy has left in one table of one kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leftover {
    /// Where it lies, such as `iptables-nft, table nat`.
    pub place: String,
    /// What it is, such as `12 chains, 3 jumps to them`.
    pub what: String,
    /// What would stay because rules of others make use of it.
    pub kept: Vec<String>,
}

impl fmt::Display for Leftover {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}: {}", self.place, self.what)?;
        if !self.kept.is_empty() {
            let kept = self.kept.join(", ");
            write!(formatter, "; rules of others make use of {kept}: kept")?;
        }
        Ok(())
    }
}

/// What was found or taken away, and what stood in the way of looking everywhere.
#[derive(Debug, Default)]
pub struct Survey {
    /// One for each table.
    pub leftovers: Vec<Leftover>,
    /// Tools that are missing, or failed.
    pub errors: Vec<ToolError>,
}

impl Survey {
    fn add(&mut self, result: Result<Vec<Leftover>, ToolError>) {
        match result {
            Ok(leftovers) => self.leftovers.extend(leftovers),
            Err(error) => self.errors.push(error),
        }
    }
}

/// Whether kube-proxy's leftovers are looked at only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Look,
    Remove,
}

/// Looks for what kube-proxy has left in this network namespace.
pub fn survey() -> Survey {
    go_through(Mode::Look)
}

/// Takes away what kube-proxy has left in this network namespace. What is of one table goes in
/// one transaction. Connections that the kernel translates already go on.
///
/// # Errors
/// [`TakeoverError::Running`] if kube-proxy runs here. That a tool is missing or failed is told
/// in the result, beside what was removed all the same.
pub fn remove() -> Result<Survey, TakeoverError> {
    match running()? {
        Some(process) => Err(TakeoverError::Running { process }),
        None => Ok(go_through(Mode::Remove)),
    }
}

fn go_through(mode: Mode) -> Survey {
    let mut survey = Survey::default();
    // The rules of the mode ipvs name sets, which can't go before them.
    let sets = ipvs::Found::look();
    for variant in iptables::variants() {
        survey.add(iptables::go_through(&variant, mode));
    }
    survey.add(nftables::go_through(mode));
    survey.add(sets.and_then(|found| found.go_through(mode)));
    survey
}

/// Takes away what [`remove`] has left of ours.
///
/// # Errors
/// A tool that fails. What is missing cannot have made anything.
pub fn release() -> Result<(), ToolError> {
    for variant in iptables::variants() {
        tool::unless_missing(iptables::release(&variant))?;
    }
    tool::unless_missing(nftables::release())
}

/// Whether the kernel tracks any connection here, which it may be translating.
fn has_connections() -> bool {
    let count = fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_count");
    count.is_ok_and(|count| count.trim() != "0")
}

/// A kube-proxy that runs in this network namespace, as far as its process can be seen.
///
/// # Errors
/// The processes cannot be listed.
pub fn running() -> Result<Option<u32>, TakeoverError> {
    let failed = |source| TakeoverError::Processes { source };
    let own = fs::read_link("/proc/self/ns/net").map_err(failed)?;
    for entry in fs::read_dir("/proc").map_err(failed)?.flatten() {
        let Some(process) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        // A process may end while it is looked at.
        let is_kube_proxy = fs::read_to_string(entry.path().join("comm"))
            .is_ok_and(|name| name.trim_end() == "kube-proxy");
        if is_kube_proxy && fs::read_link(entry.path().join("ns/net")).is_ok_and(|ns| ns == own) {
            return Ok(Some(process));
        }
    }
    Ok(None)
}

/// kube-proxy's rules could not be taken away.
#[derive(Debug, thiserror::Error)]
pub enum TakeoverError {
    /// It would write them anew.
    #[error(
        "kube-proxy (process {process}) runs in this network namespace and would write its rules \
         anew: stop it first"
    )]
    Running {
        /// Its id.
        process: u32,
    },
    /// It is not known whether it runs.
    #[error("cannot list the processes below /proc")]
    Processes {
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}
