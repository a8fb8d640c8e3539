//! The tiers, in the order in which they run: what fails early is cheap to find.

use std::path::PathBuf;

use anyhow::{Result, bail};

/// One tier of tests.
#[derive(Debug)]
pub(crate) struct Tier {
    /// What `cargo xtask test NAME` calls it.
    pub(crate) name: &'static str,
    source: Source,
    /// Its tests load programs or make namespaces.
    pub(crate) root: bool,
    /// Its tests start programs of the release build.
    pub(crate) programs: bool,
    /// Its tests start a Kubernetes API server.
    pub(crate) control_plane: bool,
}

#[derive(Debug)]
enum Source {
    /// Libraries, programs and documentation: (label, arguments of cargo test).
    Crates(&'static [(&'static str, &'static [&'static str])]),
    /// The integration tests of the tests crate whose name begins so.
    Prefix(&'static str),
    /// The files of flow vectors that the tests crate has.
    Vectors,
    /// A virtual machine with this kernel.
    Machine(&'static str),
}

/// One call of a program that runs tests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Step {
    pub(crate) label: String,
    pub(crate) run: Run,
}

/// What is called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Run {
    /// cargo test with these arguments.
    CargoTest(Vec<String>),
    /// A file of flow vectors; none: those of the tests crate.
    Vectors(Option<PathBuf>),
    /// A virtual machine with this kernel.
    Machine(&'static str),
}

/// What stands for every tier.
pub(crate) const ALL: &str = "all";
/// The tier of flow vectors.
pub(crate) const VECTORS: &str = "vectors";

pub(crate) const TIERS: [Tier; 6] = [
    Tier {
        name: "unit",
        source: Source::Crates(&[
            ("lb-common", &["-p", "lb-common"]),
            ("lb-testing", &["-p", "lb-testing"]),
            ("lb-control", &["-p", "lb-control"]),
            ("lb-sys", &["-p", "lb-sys"]),
            ("lb-agent", &["-p", "lb-agent"]),
            ("lb-tests", &["-p", "lb-tests", "--lib", "--bins"]),
            ("xtask", &["-p", "xtask"]),
        ]),
        root: false,
        programs: false,
        control_plane: false,
    },
    Tier {
        name: "kernel",
        source: Source::Prefix("prog_"),
        root: true,
        programs: true,
        control_plane: false,
    },
    Tier {
        name: VECTORS,
        source: Source::Vectors,
        root: true,
        programs: false,
        control_plane: false,
    },
    Tier {
        name: "netns",
        source: Source::Prefix("netns_"),
        root: true,
        programs: true,
        control_plane: false,
    },
    Tier {
        name: "cluster",
        source: Source::Prefix("cluster_"),
        root: true,
        programs: true,
        control_plane: true,
    },
    Tier {
        name: "vm",
        source: Source::Machine("5.10"),
        root: false,
        programs: true,
        control_plane: false,
    },
];

impl Tier {
    /// What to run, given the integration tests that exist.
    pub(crate) fn steps(&self, tests: &[String]) -> Vec<Step> {
        match self.source {
            Source::Crates(crates) => crates
                .iter()
                .map(|(label, arguments)| Step {
                    label: (*label).to_owned(),
                    run: Run::CargoTest(
                        arguments
                            .iter()
                            .chain(&["--no-fail-fast"])
                            .map(|argument| (*argument).to_owned())
                            .collect(),
                    ),
                })
                .collect(),
            Source::Prefix(prefix) => tests
                .iter()
                .filter(|test| test.starts_with(prefix))
                .map(|test| Step {
                    label: test.clone(),
                    run: Run::CargoTest(
                        ["-p", "lb-tests", "--test", test, "--", "--test-threads=1"]
                            .map(str::to_owned)
                            .to_vec(),
                    ),
                })
                .collect(),
            Source::Vectors => {
                vec![Step { label: "tests/vectors".to_owned(), run: Run::Vectors(None) }]
            }
            Source::Machine(kernel) => {
                vec![Step { label: format!("Linux {kernel}"), run: Run::Machine(kernel) }]
            }
        }
    }
}

/// An integration test that no tier would run is a mistake in its name.
pub(crate) fn refuse_strays(tests: &[String]) -> Result<()> {
    let prefixes: Vec<&str> = TIERS
        .iter()
        .filter_map(|tier| match tier.source {
            Source::Prefix(prefix) => Some(prefix),
            Source::Crates(_) | Source::Vectors | Source::Machine(_) => None,
        })
        .collect();
    for test in tests {
        if !prefixes.iter().any(|prefix| test.starts_with(prefix)) {
            bail!(
                "the test tests/tests/{test} belongs to no tier: its name must begin with one of {}",
                prefixes.join(", ")
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn a_tier_takes_the_tests_of_its_prefix_one_thread_each() {
        let tests = names(&["cluster_services", "netns_pods", "prog_tc", "prog_xdp"]);
        let steps = |name: &str| -> Vec<Step> {
            let tier = TIERS.iter().find(|tier| tier.name == name);
            tier.map(|tier| tier.steps(&tests)).unwrap_or_default()
        };
        let labels = |name: &str| -> Vec<String> {
            steps(name).into_iter().map(|step| step.label).collect()
        };
        assert_eq!(labels("kernel"), ["prog_tc", "prog_xdp"]);
        assert_eq!(labels("netns"), ["netns_pods"]);
        assert_eq!(labels("cluster"), ["cluster_services"]);
        let one_thread = "--test-threads=1".to_owned();
        assert!(steps("kernel").iter().all(|step| matches!(
            &step.run,
            Run::CargoTest(arguments) if arguments.contains(&one_thread)
        )));
    }

    #[test]
    fn a_tier_of_integration_tests_without_any_is_empty() {
        let lengths = TIERS.map(|tier| (tier.name, tier.steps(&[]).len()));
        let of_files = [("kernel", 0), ("vectors", 1), ("netns", 0), ("cluster", 0), ("vm", 1)];
        assert_eq!(lengths[0], ("unit", 7));
        assert_eq!(lengths[1..], of_files);
    }

    #[test]
    fn a_test_of_no_tier_is_refused() {
        assert!(refuse_strays(&names(&["prog_tc", "netns_pods"])).is_ok());
        let error = refuse_strays(&names(&["program"])).map_err(|error| error.to_string());
        assert!(error.is_err_and(|text| text.contains("tests/tests/program")));
    }
}
