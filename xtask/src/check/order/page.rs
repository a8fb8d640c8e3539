//! Reads the `order` blocks of ARCHITECTURE.md.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};

const FENCE: &str = "```";
const WORD: &str = "order ";

/// Layers from the top down, each with its names.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Order {
    /// The first line of the block.
    pub(super) line: usize,
    layers: Vec<Vec<String>>,
}

impl Order {
    /// The layer of a name, counted from the top.
    pub(super) fn layer(&self, name: &str) -> Option<usize> {
        self.layers.iter().position(|layer| layer.iter().any(|listed| listed == name))
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.layers.iter().flatten().map(String::as_str)
    }
}

/// Every block, by the name that follows `order`.
pub(super) fn orders(page: &str) -> Result<BTreeMap<String, Order>> {
    let mut orders = BTreeMap::new();
    let mut lines = page.lines().enumerate();
    while let Some((index, line)) = lines.next() {
        let Some(name) = line.strip_prefix(FENCE).and_then(|rest| rest.strip_prefix(WORD)) else {
            continue;
        };
        let layers: Vec<Vec<String>> = lines
            .by_ref()
            .map(|(_, line)| line)
            .take_while(|line| !line.starts_with(FENCE))
            .filter(|line| !line.trim().is_empty())
            .map(|line| line.split_whitespace().map(str::to_owned).collect())
            .collect();
        let order = Order { line: index + 1, layers };
        let mut names: Vec<&str> = order.names().collect();
        names.sort_unstable();
        let twice = names.windows(2).find(|pair| pair[0] == pair[1]);
        ensure!(twice.is_none(), "`order {name}` lists {:?} twice", twice.unwrap_or_default());
        let before = orders.insert(name.trim().to_owned(), order);
        ensure!(before.is_none(), "`order {name}` appears twice");
    }
    Ok(orders)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_has_one_layer_per_line() {
        let page = "# A\n```order lb\nmain\n  run  commands\n\nabi\n```\n```sh\norder no\n```\n";
        let orders = orders(page).expect("a good page");
        assert_eq!(orders.len(), 1);
        let order = &orders["lb"];
        assert_eq!(order.line, 2);
        assert_eq!(order.layer("commands"), Some(1));
        assert_eq!(order.layer("abi"), Some(2));
        assert_eq!(order.layer("order"), None);
    }

    #[test]
    fn a_name_has_one_place() {
        assert!(orders("```order lb\na\na\n```\n").is_err());
        assert!(orders("```order lb\na\n```\n```order lb\na\n```\n").is_err());
    }
}
