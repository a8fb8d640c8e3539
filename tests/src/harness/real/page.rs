//! The commands of docs/install.md, as an administrator of a cluster that kubeadm made reads them.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

/// The page, from the root of the repository.
const PAGE: &str = "docs/install.md";

/// Blocks of shell commands, in the order in which they are run.
#[derive(Clone, Debug)]
pub struct Steps {
    /// Installs lb beside kube-proxy.
    pub install: String,
    /// Shows that each agent has programmed its node.
    pub wait: String,
    /// Stops kube-proxy.
    pub stop: String,
    /// Removes kube-proxy's rules.
    pub remove_rules: String,
    /// Deletes the pods of `kubectl debug`.
    pub tidy: String,
    /// Looks at what runs.
    pub check: String,
    /// Starts kube-proxy again.
    pub start: String,
    /// Shows that each agent sees kube-proxy's rules.
    pub is_back: String,
    /// Removes the agents.
    pub remove_lb: String,
    /// Detaches the programs, once known connections have ended.
    pub detach: String,
    /// The same, one node after the other.
    pub by_node: ByNode,
}

/// Blocks that take a node's name from the variable `NODE`, but for the first two.
#[derive(Clone, Debug)]
pub struct ByNode {
    /// Lets a label keep kube-proxy off nodes.
    pub label_kube_proxy: String,
    /// Installs lb on nodes with a label, of which there are none.
    pub install: String,
    /// Changes a node to lb.
    pub to_lb: String,
    /// Starts kube-proxy on a node again.
    pub start_kube_proxy: String,
    /// Removes lb from a node.
    pub leave: String,
}

impl Steps {
    /// Reads the page.
    ///
    /// # Errors
    /// A section is not there, or has more or fewer blocks.
    pub fn read() -> Result<Self> {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(PAGE);
        let text = fs::read_to_string(file).with_context(|| format!("cannot read {PAGE}"))?;
        let [install, stop, start] = blocks(&text, "kubeadm")?;
        let [wait, remove_rules, tidy] = blocks(&text, "Install beside kube-proxy, then stop it")?;
        let [check] = blocks(&text, "Check")?;
        let [is_back, remove_lb, detach] = blocks(&text, "Go back")?;
        let [label_kube_proxy, by_label, to_lb, start_kube_proxy, leave] =
            blocks(&text, "One node after the other")?;
        let by_node =
            ByNode { label_kube_proxy, install: by_label, to_lb, start_kube_proxy, leave };
        Ok(Self {
            by_node,
            install,
            wait,
            stop,
            remove_rules,
            tidy,
            check,
            start,
            is_back,
            remove_lb,
            detach,
        })
    }
}

/// The fenced blocks of a section, of which there are so many.
fn blocks<const N: usize>(text: &str, section: &str) -> Result<[String; N]> {
    let heading = format!("## {section}");
    let lines = text.lines().skip_while(|line| *line != heading).skip(1);
    let mut blocks: Vec<String> = Vec::new();
    let mut is_inside = false;
    for line in lines.take_while(|line| !line.starts_with("## ")) {
        if line.trim_start().starts_with("```") {
            is_inside = !is_inside;
            if is_inside {
                blocks.push(String::new());
            }
        } else if let (true, Some(block)) = (is_inside, blocks.last_mut()) {
            block.push_str(line);
            block.push('\n');
        }
    }
    let found = blocks.len();
    blocks
        .try_into()
        .ok()
        .with_context(|| format!("section {section:?} of {PAGE} has {found} blocks, not {N}"))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn the_page_has_every_step_in_the_language_of_the_shell() {
        let steps = Steps::read().expect("all blocks");
        let Steps { install, wait, stop, remove_rules, tidy, check, .. } = &steps;
        let Steps { start, is_back, remove_lb, detach, .. } = &steps;
        for block in [install, wait, stop, remove_rules, tidy, check] {
            check_syntax(block);
        }
        for block in [start, is_back, remove_lb, detach] {
            check_syntax(block);
        }
        let ByNode { label_kube_proxy, install: by_label, to_lb, start_kube_proxy, leave } =
            &steps.by_node;
        for block in [label_kube_proxy, by_label, to_lb, start_kube_proxy, leave] {
            check_syntax(block);
        }
        assert!(install.starts_with("kubectl apply -k "), "{install}");
        assert!(stop.contains("patch daemonset kube-proxy"), "{stop}");
        assert!(remove_rules.contains("cleanup --kube-proxy"), "{remove_rules}");
        assert!(start.contains("\"remove\""), "{start}");
        assert!(remove_lb.trim_start().starts_with("kubectl delete -k "), "{remove_lb}");
        assert!(detach.contains("cleanup --drain"), "{detach}");
    }

    fn check_syntax(block: &str) {
        let status = Command::new("sh").args(["-n", "-c", block]).status().expect("a shell");
        assert!(status.success(), "{block}");
    }

    #[test]
    fn a_section_ends_at_the_next_one_and_has_the_blocks_that_are_asked_for() {
        let text =
            "## A\n- x:\n  ```\n  one\n  two\n  ```\n```\nthree\n```\n## B\n```\nfour\n```\n";
        assert_eq!(blocks(text, "A").unwrap(), ["  one\n  two\n", "three\n"]);
        assert_eq!(blocks(text, "B").unwrap(), ["four\n"]);
        let error = blocks::<1>(text, "A").unwrap_err().to_string();
        assert!(error.contains("has 2 blocks, not 1"), "{error}");
        assert!(blocks::<1>(text, "C").is_err());
    }
}
