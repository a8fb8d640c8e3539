//! The environment twins of the flags, as a ConfigMap gives them to a container.
//!
//! Kubernetes expands `$(NAME)` in the values that a pod's specification spells out, but not in
//! those that come from a ConfigMap. This module expands the name of the node, so that all nodes
//! share one ConfigMap. It reads the environment and changes nothing.

use std::collections::BTreeSet;

use clap::CommandFactory as _;

use super::Cli;

/// What stands for the name of the node in a value.
const PLACEHOLDER: &str = "$(NODE_NAME)";
/// The variable that holds the name of the node.
const NODE_NAME: &str = "NODE_NAME";
/// The prefix of the twins.
const PREFIX: &str = "LB_";
/// Variables with the prefix that the build and the tests read.
const OF_TOOLS: [&str; 4] = ["LB_EBPF_OBJECT", "LB_BLESS", "LB_AGENT", "LB_VM_ONLY"];

/// The variables whose values change when the name of the node is put in, with the new values.
///
/// # Errors
/// [`NoNodeName`] if a value asks for the name and `NODE_NAME` is not set.
pub fn expanded(
    variables: impl IntoIterator<Item = (String, String)>,
) -> Result<Vec<(String, String)>, NoNodeName> {
    let variables: Vec<_> = variables.into_iter().collect();
    let node = variables.iter().find(|(name, value)| name == NODE_NAME && !value.is_empty());
    let asking = variables
        .iter()
        .filter(|(name, value)| name.starts_with(PREFIX) && value.contains(PLACEHOLDER));
    asking
        .map(|(name, value)| match node {
            Some((_, node)) => Ok((name.clone(), value.replace(PLACEHOLDER, node))),
            None => Err(NoNodeName { variable: name.clone() }),
        })
        .collect()
}

/// The variables that look like the twin of a flag, but are the twin of none. Those by which
/// Kubernetes announces a Service named `lb` are left out.
pub fn unknown(names: impl IntoIterator<Item = String>) -> BTreeSet<String> {
    let command = Cli::command();
    let known: BTreeSet<String> = command
        .get_subcommands()
        .flat_map(|command| command.get_arguments())
        .filter_map(|argument| Some(argument.get_env()?.to_str()?.to_owned()))
        .collect();
    let is_of_a_service =
        |name: &str| name.starts_with("LB_SERVICE_") || name.starts_with("LB_PORT");
    names
        .into_iter()
        .filter(|name| name.starts_with(PREFIX) && !known.contains(name))
        .filter(|name| !is_of_a_service(name) && !OF_TOOLS.contains(&name.as_str()))
        .collect()
}

/// A value asks for the name of the node, which is not known.
#[derive(Debug, thiserror::Error)]
#[error("{variable} contains {PLACEHOLDER}, but {NODE_NAME} is not set: set it to the node's name")]
pub struct NoNodeName {
    variable: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn variables(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn the_name_of_the_node_is_put_into_values() {
        let all = [
            ("NODE_NAME", "a"),
            ("LB_CGROUP", "/c/$(NODE_NAME)/$(NODE_NAME)"),
            ("LB_MASTER", "https://x"),
            ("OTHER", "$(NODE_NAME)"),
        ];
        let found = expanded(variables(&all)).expect("a name");
        assert_eq!(found, variables(&[("LB_CGROUP", "/c/a/a")]));
        let error = expanded(variables(&all[1..])).expect_err("no name").to_string();
        assert!(error.starts_with("LB_CGROUP contains $(NODE_NAME), but NODE_NAME"), "{error}");
        assert_eq!(expanded(variables(&all[2..])).expect("no value asks"), []);
    }

    #[test]
    fn variables_of_no_flag_are_told() {
        let names = [
            "LB_MASTER",
            "LB_MASTR",
            "LB_DRAIN",
            "LB_SERVICE_HOST",
            "LB_PORT_80_TCP",
            "PATH",
            "LB_EBPF_OBJECT",
        ];
        let found = unknown(names.map(str::to_owned));
        assert_eq!(found, BTreeSet::from(["LB_MASTR".to_owned()]));
    }
}
