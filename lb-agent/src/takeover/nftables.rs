//! kube-proxy's tables of the mode nftables.

use super::{
    KEEPER_TABLE, Leftover, Mode, has_connections,
    tool::{self, ToolError},
};

const NFT: &str = "nft";
const TABLE: &str = "kube-proxy";

/// Lists kube-proxy's tables, or removes all of them in one transaction.
///
/// # Errors
/// [`ToolError`] if `nft` is missing or fails.
pub(super) fn go_through(mode: Mode) -> Result<Vec<Leftover>, ToolError> {
    let families = families_of(&tables()?, TABLE);
    if mode == Mode::Remove && !families.is_empty() {
        tool::run(NFT, &["-f", "-"], &removal(&families, has_connections()))?;
    }
    let leftover = |family: &&str| Leftover {
        place: NFT.to_owned(),
        what: format!("table {family} {TABLE}"),
        kept: Vec::new(),
        because: "",
    };
    Ok(families.iter().map(leftover).collect())
}

/// Removes the tables that a removal created.
///
/// # Errors
/// [`ToolError`] if `nft` is missing or fails.
pub(super) fn remove_keeper() -> Result<(), ToolError> {
    let families = families_of(&tables()?, KEEPER_TABLE);
    if families.is_empty() {
        return Ok(());
    }
    let lines: String =
        families.iter().map(|family| format!("delete table {family} {KEEPER_TABLE}\n")).collect();
    tool::run(NFT, &["-f", "-"], &lines).map(drop)
}

/// Whether there may be chains whose names start with `prefix`, including those of
/// iptables-nft.
pub(super) fn may_have_chains(prefix: &str) -> bool {
    let has = |chains: String| {
        chains
            .lines()
            .filter_map(|line| line.trim().strip_prefix("chain "))
            .any(|name| name.starts_with(prefix))
    };
    tool::run(NFT, &["list", "chains"], "").map_or(true, has)
}

fn tables() -> Result<String, ToolError> {
    match tool::run(NFT, &["list", "tables"], "") {
        Err(error) if error.is_of_kernel() => Ok(String::new()),
        tables => tables,
    }
}

/// The families that have a table of this name.
fn families_of(tables: &str, name: &str) -> Vec<&'static str> {
    let exists =
        |family: &&str| tables.lines().any(|line| line == format!("table {family} {name}"));
    ["ip", "ip6"].into_iter().filter(exists).collect()
}

/// The script that deletes the tables.
///
/// The kernel translates packets of known connections at the hooks of nat chains, and only while
/// some rule matches on connection state. If kube-proxy's rules are the last ones of that kind,
/// its connections break when they are removed. With `keeps_connections` the script therefore
/// adds a chain with such a rule.
fn removal(families: &[&str], keeps_connections: bool) -> String {
    let mut script = String::new();
    for family in families {
        if keeps_connections {
            script.push_str(&format!(
                "add table {family} {KEEPER_TABLE}\n\
                 add chain {family} {KEEPER_TABLE} prerouting \
                 {{ type nat hook prerouting priority -100; }}\n\
                 flush chain {family} {KEEPER_TABLE} prerouting\n\
                 add rule {family} {KEEPER_TABLE} prerouting ct state established accept \
                 comment \"connections that kube-proxy balanced go on\"\n"
            ));
        }
        script.push_str(&format!("delete table {family} {TABLE}\n"));
    }
    script
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_tables_of_kube_proxy_are_removed() {
        let tables = "table ip nat\ntable inet kube-proxy\ntable ip6 kube-proxy\n\
                      table ip kube-proxy-of-mine\n";
        assert_eq!(families_of(tables, TABLE), ["ip6"]);
        assert_eq!(families_of("", TABLE), [""; 0]);
        assert_eq!(removal(&["ip6"], false), "delete table ip6 kube-proxy\n");
        let kept = removal(&["ip"], true);
        assert!(kept.starts_with("add table ip lb-takeover\n"), "{kept}");
        assert!(kept.ends_with("\ndelete table ip kube-proxy\n"), "{kept}");
    }
}
