//! Finds and removes what kube-proxy left on this node.
//!
//! Balancing does not need this: `run` never calls it. Like kube-proxy, it uses the node's own
//! tools. Invariant: what the kubelet, a CNI plugin or a user created stays unchanged, whatever
//! its name.

mod iptables;
mod ipvs;
mod nftables;
mod rules;
mod signs;
mod tool;

use std::{fmt, fs, io};

pub use signs::{Sign, signs};
pub use tool::ToolError;

/// The names of the chain and the table that lb creates so that the kernel goes on translating
/// connections that kube-proxy balanced.
const KEEPER_CHAIN: &str = "LB-TAKEOVER";
const KEEPER_TABLE: &str = "lb-takeover";

/// Why chains stay.
const USED_BY_OTHERS: &str = "other rules use them";

/// What kube-proxy left in one table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leftover {
    /// The place, such as `iptables-nft, table nat`.
    pub place: String,
    /// The content, such as `12 chains, 3 jumps to them`.
    pub what: String,
    /// Parts that are not removed.
    pub kept: Vec<String>,
    /// Why they are not.
    pub because: &'static str,
}

impl fmt::Display for Leftover {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}: {}", self.place, self.what)?;
        if !self.kept.is_empty() {
            let kept = self.kept.join(", ");
            write!(formatter, "; kept because {}: {kept}", self.because)?;
        }
        Ok(())
    }
}

/// What was found or removed, and the errors that make it incomplete.
#[derive(Debug, Default)]
pub struct Survey {
    /// One entry for each table.
    pub leftovers: Vec<Leftover>,
    /// Tools that are missing or failed.
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

/// Whether to list or to remove kube-proxy's leftovers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    List,
    Remove,
}

/// Lists what kube-proxy left in this network namespace.
pub fn survey() -> Survey {
    go_through(Mode::List)
}

/// Removes what kube-proxy left in this network namespace, each table in one transaction.
/// Connections that the kernel already translates continue.
///
/// # Errors
/// [`TakeoverError::Running`] if kube-proxy runs here. Tools that are missing or fail are listed
/// in [`Survey::errors`]; what the other tools find is removed.
pub fn remove() -> Result<Survey, TakeoverError> {
    match running()? {
        Some(process) => Err(TakeoverError::Running { process }),
        None => Ok(go_through(Mode::Remove)),
    }
}

fn go_through(mode: Mode) -> Survey {
    let mut survey = Survey::default();
    // Rules of the mode ipvs refer to sets, so the sets are removed after the rules.
    let sets = ipvs::Found::list();
    for variant in iptables::variants() {
        survey.add(iptables::go_through(&variant, mode));
    }
    survey.add(nftables::go_through(mode));
    survey.add(sets.and_then(|found| found.go_through(mode)));
    survey
}

/// Removes the chains and tables that [`remove`] created.
///
/// # Errors
/// If a tool fails. A missing tool cannot have created anything, so it is not an error.
pub fn remove_keepers() -> Result<(), ToolError> {
    for variant in iptables::variants() {
        tool::unless_missing(iptables::remove_keeper(&variant))?;
    }
    tool::unless_missing(nftables::remove_keeper())
}

/// Whether conntrack has any connection here, which the kernel may be translating.
fn has_connections() -> bool {
    let count = fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_count");
    count.is_ok_and(|count| count.trim() != "0")
}

/// The process of a kube-proxy that runs in this network namespace, if it is visible.
///
/// # Errors
/// If the processes cannot be listed.
pub fn running() -> Result<Option<u32>, TakeoverError> {
    let failed = |source| TakeoverError::Processes { source };
    let own = fs::read_link("/proc/self/ns/net").map_err(failed)?;
    for entry in fs::read_dir("/proc").map_err(failed)?.flatten() {
        let Some(process) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        // A process may end while its entries are read.
        let is_kube_proxy = fs::read_to_string(entry.path().join("comm"))
            .is_ok_and(|name| name.trim_end() == "kube-proxy");
        if is_kube_proxy && fs::read_link(entry.path().join("ns/net")).is_ok_and(|ns| ns == own) {
            return Ok(Some(process));
        }
    }
    Ok(None)
}

/// Why kube-proxy's rules could not be removed.
#[derive(Debug, thiserror::Error)]
pub enum TakeoverError {
    /// kube-proxy runs and would recreate them.
    #[error(
        "kube-proxy (process {process}) is running in this network namespace and would recreate \
         its rules: stop it first"
    )]
    Running {
        /// The process ID.
        process: u32,
    },
    /// It is unknown whether kube-proxy runs.
    #[error("cannot list the processes in /proc to see whether kube-proxy is running")]
    Processes {
        /// The error of the kernel.
        #[source]
        source: io::Error,
    },
}
