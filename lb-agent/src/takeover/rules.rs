//! Finds kube-proxy's chains in the output of `iptables-save`, and writes the script for
//! `iptables-restore` that removes them: pure functions of text.
//!
//! It removes only chains that kube-proxy creates, in the tables where it creates them, and its
//! jumps to them from built-in chains. A chain that other rules refer to stays.

use std::collections::BTreeSet;

use super::KEEPER_CHAIN;

/// A table as `iptables-save` prints it.
#[derive(Debug, Default)]
pub(super) struct Table {
    pub(super) name: String,
    chains: Vec<Chain>,
    rules: Vec<Rule>,
}

#[derive(Debug)]
struct Chain {
    name: String,
    /// Whether it is built in, and so has a policy.
    is_builtin: bool,
}

#[derive(Debug)]
struct Rule {
    chain: String,
    /// The text after the chain's name, as printed.
    text: String,
    /// The target of `-j` or `-g`.
    target: Option<String>,
}

/// What to remove from a table.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Removal {
    pub(super) table: String,
    pub(super) chains: usize,
    pub(super) jumps: usize,
    /// Chains of kube-proxy that other rules use, and that stay.
    pub(super) kept: Vec<String>,
    lines: Vec<String>,
}

/// The names of kube-proxy's chains, the tables where it creates them, and whether it jumps to
/// them from built-in chains.
const CHAINS: [(&str, &[&str], bool); 13] = [
    ("KUBE-SERVICES", &["nat", "filter"], true),
    ("KUBE-NODEPORTS", &["nat", "filter"], true),
    ("KUBE-POSTROUTING", &["nat"], true),
    ("KUBE-MARK-MASQ", &["nat"], false),
    ("KUBE-FORWARD", &["filter"], true),
    ("KUBE-PROXY-FIREWALL", &["filter"], true),
    ("KUBE-EXTERNAL-SERVICES", &["filter"], true),
    ("KUBE-PROXY-CANARY", &["nat", "filter", "mangle"], false),
    // Chains of the mode ipvs.
    ("KUBE-LOAD-BALANCER", &["nat"], false),
    ("KUBE-NODE-PORT", &["nat", "filter"], true),
    ("KUBE-SOURCE-RANGES-FIREWALL", &["filter"], true),
    ("KUBE-IPVS-FILTER", &["filter"], true),
    ("KUBE-IPVS-OUT-FILTER", &["filter"], true),
];

/// The prefixes of the chains of single Services and endpoints, all in the table nat.
const PREFIXES: [&str; 6] =
    ["KUBE-SVC-", "KUBE-SVL-", "KUBE-EXT-", "KUBE-FW-", "KUBE-XLB-", "KUBE-SEP-"];
/// The length of the hash in base 32 that follows the prefix.
const HASH: usize = 16;

/// The chain that marks a packet for masquerading, and the chain that masquerades it.
const MARK: &str = "KUBE-MARK-MASQ";
const POSTROUTING: &str = "KUBE-POSTROUTING";

fn is_of_kube_proxy(table: &str, chain: &str) -> bool {
    let is_hash = |text: &str| {
        text.len() == HASH && text.bytes().all(|b| matches!(b, b'A'..=b'Z' | b'2'..=b'7'))
    };
    CHAINS.iter().any(|(name, tables, _)| *name == chain && tables.contains(&table))
        || table == "nat"
            && PREFIXES.iter().any(|prefix| chain.strip_prefix(prefix).is_some_and(is_hash))
}

fn is_entry(chain: &str) -> bool {
    CHAINS.iter().any(|(name, _, is_entry)| *name == chain && *is_entry)
}

/// The tables in the output of `iptables-save`.
pub(super) fn parse(saved: &str) -> Vec<Table> {
    let mut tables = Vec::new();
    for line in saved.lines() {
        if let Some(name) = line.strip_prefix('*') {
            tables.push(Table { name: name.to_owned(), ..Table::default() });
        }
        let Some(table) = tables.last_mut() else { continue };
        if let Some(chain) = line.strip_prefix(':') {
            let mut words = chain.split(' ');
            let name = words.next().unwrap_or_default().to_owned();
            table.chains.push(Chain { name, is_builtin: words.next() != Some("-") });
        } else if let Some((chain, text)) =
            line.strip_prefix("-A ").and_then(|rule| rule.split_once(' '))
        {
            let (chain, text) = (chain.to_owned(), text.to_owned());
            table.rules.push(Rule { chain, target: target(&text), text });
        }
    }
    tables
}

/// The target of `-j` or `-g`. A comment is in quotes and may contain any text.
fn target(rule: &str) -> Option<String> {
    let mut words = Vec::new();
    let (mut word, mut is_quoted) = (String::new(), false);
    let mut characters = rule.chars();
    while let Some(character) = characters.next() {
        match character {
            '\\' => word.extend(characters.next()),
            // Keeps the quote, so that a quoted word never looks like an option.
            '"' => {
                is_quoted = !is_quoted;
                word.push('"');
            }
            ' ' if !is_quoted => words.push(std::mem::take(&mut word)),
            _ => word.push(character),
        }
    }
    words.push(word);
    let at = words.iter().position(|word| word == "-j" || word == "-g")?;
    words.into_iter().nth(at + 1)
}

impl Table {
    /// What to remove from this table; `None` if it has no chain of kube-proxy.
    pub(super) fn removal(&self) -> Option<Removal> {
        let is_kube_proxys = |chain: &&Chain| is_of_kube_proxy(&self.name, &chain.name);
        let chains: BTreeSet<&str> =
            self.chains.iter().filter(is_kube_proxys).map(|chain| &*chain.name).collect();
        let kept = self.kept(&chains);
        let removed: Vec<&str> = chains.difference(&kept).copied().collect();
        let is_removed = |name: &str| removed.binary_search(&name).is_ok();
        let jumps = self.rules.iter().filter(|rule| {
            self.is_builtin(&rule.chain) && rule.target.as_deref().is_some_and(is_removed)
        });
        let mut lines: Vec<String> =
            jumps.map(|rule| format!("-D {} {}", rule.chain, rule.text)).collect();
        let jumps = lines.len();
        // All chains are flushed before any is deleted, because they refer to each other.
        lines.extend(removed.iter().map(|chain| format!(":{chain} - [0:0]")));
        lines.extend(removed.iter().map(|chain| format!("-X {chain}")));
        (!chains.is_empty()).then(|| Removal {
            table: self.name.clone(),
            chains: removed.len(),
            jumps,
            kept: kept.into_iter().map(str::to_owned).collect(),
            lines,
        })
    }

    /// The chains among kube-proxy's `chains` that are reachable from other rules.
    fn kept<'a>(&'a self, chains: &BTreeSet<&'a str>) -> BTreeSet<&'a str> {
        let mut kept: BTreeSet<&str> = BTreeSet::new();
        loop {
            let before = kept.len();
            for rule in &self.rules {
                let Some(target) = rule.target.as_deref().and_then(|to| chains.get(to)) else {
                    continue;
                };
                let is_kube_proxys_jump = self.is_builtin(&rule.chain) && is_entry(target);
                let is_other_rule = !(chains.contains(&*rule.chain) || is_kube_proxys_jump);
                if is_other_rule || kept.contains(&*rule.chain) {
                    kept.insert(target);
                }
            }
            // A rule that marks packets needs the chain that masquerades them.
            if kept.contains(MARK) {
                kept.extend(chains.get(POSTROUTING));
            }
            if kept.len() == before {
                return kept;
            }
        }
    }

    fn is_builtin(&self, name: &str) -> bool {
        self.chains.iter().any(|chain| chain.is_builtin && chain.name == name)
    }

    /// Whether it has the chain that a removal created.
    pub(super) fn has_keeper(&self) -> bool {
        self.name == "nat" && self.chains.iter().any(|chain| chain.name == KEEPER_CHAIN)
    }
}

impl Removal {
    /// The script for `iptables-restore --noflush`.
    ///
    /// The kernel tracks connections, and so translates known ones, only while some rule matches
    /// on connection state. With `keeps_connections` the script therefore adds such a rule to
    /// the table nat, in a chain that no packet reaches.
    pub(super) fn script(&self, keeps_connections: bool) -> String {
        let mut lines = vec![format!("*{}", self.table)];
        if keeps_connections && self.table == "nat" {
            lines.push(format!(":{KEEPER_CHAIN} - [0:0]"));
            lines.push(format!(
                "-A {KEEPER_CHAIN} -m comment --comment \"connections that kube-proxy balanced go \
                 on\" -m conntrack --ctstate ESTABLISHED -j RETURN"
            ));
        }
        lines.extend_from_slice(&self.lines);
        lines.push("COMMIT\n".to_owned());
        lines.join("\n")
    }
}

/// The script that removes the chain that [`Removal::script`] created.
pub(super) fn keeper_removal_script() -> String {
    format!("*nat\n:{KEEPER_CHAIN} - [0:0]\n-X {KEEPER_CHAIN}\nCOMMIT\n")
}

#[cfg(test)]
mod tests;
