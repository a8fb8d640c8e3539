//! Rows of `get counters`.

use lb_common::abi::counter::{Hook, Reason};
use serde::Serialize;

/// How often a program ended for a reason, since the maps were made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CounterRow {
    /// The hook of the program.
    pub hook: &'static str,
    /// The reason of the decision.
    pub reason: &'static str,
    /// How often; reasons that never occurred are left out.
    pub count: u64,
}

/// The rows of `get counters`, by hook and reason as they are numbered.
pub(crate) fn counters(sums: &[u64]) -> Vec<CounterRow> {
    Hook::ALL
        .iter()
        .flat_map(|hook| Reason::ALL.iter().map(move |reason| (hook, reason)))
        .map(|(hook, reason)| CounterRow {
            hook: hook.name(),
            reason: reason.name(),
            count: sums.get(hook.counter(*reason) as usize).copied().unwrap_or_default(),
        })
        .filter(|row| row.count > 0)
        .collect()
}
