//! kube-proxy's chains in what `iptables-save` prints, and the script for `iptables-restore`
//! that takes them away: a function of text.
//!
//! Only chains that kube-proxy makes, in the tables where it makes them, and its jumps to them
//! from built-in chains. A chain that rules of others refer to stays.

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
    /// It has a policy.
    is_builtin: bool,
}

#[derive(Debug)]
struct Rule {
    chain: String,
    /// All that follows the chain, as it was printed.
    text: String,
    /// Where it jumps to, or goes on.
    target: Option<String>,
}

/// What is to be taken away from a table.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Removal {
    pub(super) table: String,
    pub(super) chains: usize,
    pub(super) jumps: usize,
    /// Chains of kube-proxy that stay.
    pub(super) kept: Vec<String>,
    lines: Vec<String>,
}

/// In which tables kube-proxy makes a chain of this name, and whether it jumps there from
/// built-in chains.
const CHAINS: [(&str, &[&str], bool); 13] = [
    ("KUBE-SERVICES", &["nat", "filter"], true),
    ("KUBE-NODEPORTS", &["nat", "filter"], true),
    ("KUBE-POSTROUTING", &["nat"], true),
    ("KUBE-MARK-MASQ", &["nat"], false),
    ("KUBE-FORWARD", &["filter"], true),
    ("KUBE-PROXY-FIREWALL", &["filter"], true),
    ("KUBE-EXTERNAL-SERVICES", &["filter"], true),
    ("KUBE-PROXY-CANARY", &["nat", "filter", "mangle"], false),
    // Those of the mode ipvs.
    ("KUBE-LOAD-BALANCER", &["nat"], false),
    ("KUBE-NODE-PORT", &["nat", "filter"], true),
    ("KUBE-SOURCE-RANGES-FIREWALL", &["filter"], true),
    ("KUBE-IPVS-FILTER", &["filter"], true),
    ("KUBE-IPVS-OUT-FILTER", &["filter"], true),
];

/// What the names of chains of single Services and endpoints begin with, all in the table nat.
const PREFIXES: [&str; 6] =
    ["KUBE-SVC-", "KUBE-SVL-", "KUBE-EXT-", "KUBE-FW-", "KUBE-XLB-", "KUBE-SEP-"];
/// What follows: so many characters of a hash in base 32.
const HASH: usize = 16;

/// What marks a packet for masquerading, and what then does it.
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

/// The tables in what `iptables-save` prints.
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

/// Where a rule jumps to, or goes on. A comment may hold anything, in quotes then.
fn target(rule: &str) -> Option<String> {
    let mut words = Vec::new();
    let (mut word, mut is_quoted) = (String::new(), false);
    let mut characters = rule.chars();
    while let Some(character) = characters.next() {
        match character {
            '\\' => word.extend(characters.next()),
            // So that no word that was quoted looks like an option.
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
    /// What kube-proxy has in this table; `None` if it is nothing.
    pub(super) fn removal(&self) -> Option<Removal> {
        let is_ours = |chain: &&Chain| is_of_kube_proxy(&self.name, &chain.name);
        let ours: BTreeSet<&str> =
            self.chains.iter().filter(is_ours).map(|chain| &*chain.name).collect();
        let kept = self.kept(&ours);
        let removed: Vec<&str> = ours.difference(&kept).copied().collect();
        let is_removed = |name: &str| removed.binary_search(&name).is_ok();
        let jumps = self.rules.iter().filter(|rule| {
            self.is_builtin(&rule.chain) && rule.target.as_deref().is_some_and(is_removed)
        });
        let mut lines: Vec<String> =
            jumps.map(|rule| format!("-D {} {}", rule.chain, rule.text)).collect();
        let jumps = lines.len();
        // Empties them all, as they refer to each other.
        lines.extend(removed.iter().map(|chain| format!(":{chain} - [0:0]")));
        lines.extend(removed.iter().map(|chain| format!("-X {chain}")));
        (!ours.is_empty()).then(|| Removal {
            table: self.name.clone(),
            chains: removed.len(),
            jumps,
            kept: kept.into_iter().map(str::to_owned).collect(),
            lines,
        })
    }

    /// Those of kube-proxy's chains `ours` that rules of others lead to.
    fn kept<'a>(&'a self, ours: &BTreeSet<&'a str>) -> BTreeSet<&'a str> {
        let mut kept: BTreeSet<&str> = BTreeSet::new();
        loop {
            let before = kept.len();
            for rule in &self.rules {
                let Some(target) = rule.target.as_deref().and_then(|to| ours.get(to)) else {
                    continue;
                };
                let is_its_jump = self.is_builtin(&rule.chain) && is_entry(target);
                let is_of_others = !(ours.contains(&*rule.chain) || is_its_jump);
                if is_of_others || kept.contains(&*rule.chain) {
                    kept.insert(target);
                }
            }
            // Whoever marks packets wants them to be masqueraded.
            if kept.contains(MARK) {
                kept.extend(ours.get(POSTROUTING));
            }
            if kept.len() == before {
                return kept;
            }
        }
    }

    fn is_builtin(&self, name: &str) -> bool {
        self.chains.iter().any(|chain| chain.is_builtin && chain.name == name)
    }

    /// Whether it holds what a removal has left of ours.
    pub(super) fn has_keeper(&self) -> bool {
        self.name == "nat" && self.chains.iter().any(|chain| chain.name == KEEPER_CHAIN)
    }
}

impl Removal {
    /// The script for `iptables-restore --noflush`.
    ///
    /// With the last rule that asks for the state of connections the kernel would stop tracking
    /// them, and with it to translate those that there are. So one is left in their table if
    /// `keeps_connections`, in a chain that no packet comes to.
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

/// The script that takes away what [`Removal::script`] leaves.
pub(super) fn release_script() -> String {
    format!("*nat\n:{KEEPER_CHAIN} - [0:0]\n-X {KEEPER_CHAIN}\nCOMMIT\n")
}

#[cfg(test)]
mod tests;
