//! The tiers, in the order in which they run: what fails early is cheap to find.

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
}

/// One call of cargo test.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Step {
    pub(crate) label: String,
    pub(crate) arguments: Vec<String>,
}

pub(crate) const TIERS: [Tier; 4] = [
    Tier {
        name: "unit",
        source: Source::Crates(&[
            ("lb-common", &["-p", "lb-common", "--all-features"]),
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
];

impl Tier {
    /// What to run, given the integration tests that exist.
    pub(crate) fn steps(&self, tests: &[String]) -> Vec<Step> {
        match self.source {
            Source::Crates(crates) => crates
                .iter()
                .map(|(label, arguments)| Step {
                    label: (*label).to_owned(),
                    arguments: arguments
                        .iter()
                        .chain(&["--no-fail-fast"])
                        .map(|argument| (*argument).to_owned())
                        .collect(),
                })
                .collect(),
            Source::Prefix(prefix) => tests
                .iter()
                .filter(|test| test.starts_with(prefix))
                .map(|test| Step {
                    label: test.clone(),
                    arguments: ["-p", "lb-tests", "--test", test, "--", "--test-threads=1"]
                        .map(str::to_owned)
                        .to_vec(),
                })
                .collect(),
        }
    }
}

/// An integration test that no tier would run is a mistake in its name.
pub(crate) fn refuse_strays(tests: &[String]) -> Result<()> {
    let prefixes: Vec<&str> = TIERS
        .iter()
        .filter_map(|tier| match tier.source {
            Source::Prefix(prefix) => Some(prefix),
            Source::Crates(_) => None,
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
        let labels = |index: usize| -> Vec<String> {
            let steps = TIERS[index].steps(&tests);
            steps.into_iter().map(|step| step.label).collect()
        };
        assert_eq!(labels(1), ["prog_tc", "prog_xdp"]);
        assert_eq!(labels(2), ["netns_pods"]);
        assert_eq!(labels(3), ["cluster_services"]);
        assert!(
            TIERS[1]
                .steps(&tests)
                .iter()
                .all(|step| step.arguments.contains(&"--test-threads=1".to_owned()))
        );
    }

    #[test]
    fn a_tier_without_tests_is_empty_and_unit_never_is() {
        assert!(TIERS[1..].iter().all(|tier| tier.steps(&[]).is_empty()));
        assert_eq!(TIERS[0].steps(&[]).len(), 4);
    }

    #[test]
    fn a_test_of_no_tier_is_refused() {
        assert!(refuse_strays(&names(&["prog_tc", "netns_pods"])).is_ok());
        let error = refuse_strays(&names(&["program"])).map_err(|error| error.to_string());
        assert!(error.is_err_and(|text| text.contains("tests/tests/program")));
    }
}
