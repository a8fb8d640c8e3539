//! kube-proxy's iptables rules, of its modes iptables and ipvs: both of the kernel's rule sets
//! (nft and legacy) and both IP families.

use std::fs;

use super::{
    Leftover, Mode, USED_BY_OTHERS, has_connections, nftables,
    rules::{self, Removal},
    tool::{self, ToolError},
};

/// One rule set of one IP family.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Variant {
    /// The prefix of the tools' names, such as `ip6tables-legacy`.
    program: String,
}

/// The rule sets that may have rules. The legacy one is included only if the kernel has tables
/// of it, because listing them with the legacy tool would create them.
pub(super) fn variants() -> Vec<Variant> {
    let mut variants = Vec::new();
    for (family, legacy_tables) in
        [("iptables", "/proc/net/ip_tables_names"), ("ip6tables", "/proc/net/ip6_tables_names")]
    {
        let has_legacy = fs::read_to_string(legacy_tables).is_ok_and(|names| !names.is_empty());
        let named = |kind: &str| Variant { program: format!("{family}-{kind}") };
        if [named("nft"), named("legacy")].iter().any(Variant::is_installed) {
            variants.push(named("nft"));
            variants.extend(has_legacy.then(|| named("legacy")));
        } else {
            // Before iptables 1.8 there was one rule set, and tools without a suffix.
            variants.push(Variant { program: family.to_owned() });
        }
    }
    variants
}

impl Variant {
    fn is_installed(&self) -> bool {
        tool::is_installed(&self.save())
    }

    fn save(&self) -> String {
        format!("{}-save", self.program)
    }

    /// Runs a script, one transaction for each table.
    fn restore(&self, script: &str) -> Result<(), ToolError> {
        const WAIT_SECONDS: &str = "10";
        let program = format!("{}-restore", self.program);
        tool::run(&program, &["-w", WAIT_SECONDS, "--noflush"], script).map(drop)
    }

    fn tables(&self) -> Result<Vec<rules::Table>, ToolError> {
        match tool::run(&self.save(), &[], "") {
            Err(error) if error.is_of_kernel() => Ok(Vec::new()),
            Err(ToolError::Missing { .. }) if !nftables::may_have_chains("KUBE-") => Ok(Vec::new()),
            saved => Ok(rules::parse(&saved?)),
        }
    }
}

/// Lists or removes kube-proxy's rules.
///
/// # Errors
/// [`ToolError`] if the tools are missing or fail. Tables before the failure are already done.
pub(super) fn go_through(variant: &Variant, mode: Mode) -> Result<Vec<Leftover>, ToolError> {
    let tables = variant.tables()?;
    let removals = tables.iter().filter_map(rules::Table::removal);
    let removals = removals.filter(|removal| mode == Mode::List || removal.chains > 0);
    removals
        .map(|removal| {
            if mode == Mode::Remove {
                variant.restore(&removal.script(has_connections()))?;
            }
            Ok(leftover(variant, removal))
        })
        .collect()
}

/// Removes the chain that a removal created.
///
/// # Errors
/// [`ToolError`] if the tools are missing or fail.
pub(super) fn remove_keeper(variant: &Variant) -> Result<(), ToolError> {
    if variant.tables()?.iter().any(rules::Table::has_keeper) {
        variant.restore(&rules::keeper_removal_script())?;
    }
    Ok(())
}

fn leftover(variant: &Variant, removal: Removal) -> Leftover {
    let Removal { table, chains, jumps, kept, .. } = removal;
    Leftover {
        place: format!("{}, table {table}", variant.program),
        what: format!("{chains} chains, {jumps} jumps to them"),
        kept,
        because: USED_BY_OTHERS,
    }
}
