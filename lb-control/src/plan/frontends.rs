//! Which service port each frontend leads to.

use std::collections::{BTreeMap, HashMap};

use lb_common::abi::frontend::Frontend;

use super::family_index;
use crate::desired::{DesiredFrontend, FrontendAddress};

/// The frontends that the maps hold, with the service port each leads to.
#[derive(Debug, Default)]
pub(crate) struct Frontends {
    pub(crate) entries: HashMap<FrontendAddress, Frontend>,
    pub(crate) counts: [usize; 2],
    pub(crate) limits: [u32; 2],
    /// The entries that the draft touched, as they were before it.
    pub(crate) touched: BTreeMap<FrontendAddress, Option<Frontend>>,
    /// Whether frontends were deleted since the planner last looked.
    pub(crate) has_more_room: bool,
}

impl Frontends {
    /// Removes those of `frontends` that still lead to `owner`.
    pub(crate) fn remove_owned_by(&mut self, frontends: &[FrontendAddress], owner: u32) {
        for at in frontends {
            let Some(held) = self.entries.get(at).copied() else { continue };
            if held.service == owner {
                self.touched.entry(*at).or_insert(Some(held));
                self.entries.remove(at);
                self.counts[family_index(at.ip)] -= 1;
            }
        }
    }

    /// Lets `frontends` lead to `owner`, whatever they led to before.
    pub(crate) fn set_owner(&mut self, frontends: &[DesiredFrontend], owner: u32) {
        for DesiredFrontend { at, kind, flags } in frontends {
            let new = Frontend { service: owner, kind: *kind, flags: *flags, zero: 0 };
            let held = self.entries.get(at).copied();
            if held != Some(new) {
                self.touched.entry(*at).or_insert(held);
                self.entries.insert(*at, new);
                self.counts[family_index(at.ip)] += usize::from(held.is_none());
            }
        }
    }

    /// The index of the service port that a frontend leads to.
    pub(crate) fn owner(&self, at: &FrontendAddress) -> Option<u32> {
        self.entries.get(at).map(|frontend| frontend.service)
    }
}
