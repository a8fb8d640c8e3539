//! The tiers, in the order in which they run: the fast ones first.

use std::path::PathBuf;

use anyhow::{Result, bail};

/// One tier of tests.
#[derive(Debug)]
pub(crate) struct Tier {
    /// The NAME in `cargo xtask test NAME`.
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
    /// Binaries of integration tests of the tests crate.
    Binaries(&'static [&'static str]),
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

/// The program to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Run {
    /// cargo test with these arguments, and those for the test binary.
    CargoTest(Vec<String>, Vec<String>),
    /// A file of flow vectors; `None` for those of the tests crate.
    Vectors(Option<PathBuf>),
    /// A virtual machine with this kernel.
    Machine(&'static str),
}

/// The name for all tiers.
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
        source: Source::Binaries(&["kernel", "cases"]),
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
        source: Source::Binaries(&["netns"]),
        root: true,
        programs: true,
        control_plane: false,
    },
    Tier {
        name: "cluster",
        source: Source::Binaries(&["cluster"]),
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
    /// Whether its tests have names that can be given.
    pub(crate) fn has_names(&self) -> bool {
        !matches!(self.source, Source::Machine(_))
    }

    /// The programs to run.
    pub(crate) fn steps(&self) -> Vec<Step> {
        match self.source {
            Source::Crates(crates) => crates
                .iter()
                .map(|(label, arguments)| Step {
                    label: (*label).to_owned(),
                    run: Run::CargoTest(
                        owned(&[*arguments, &["--no-fail-fast"]].concat()),
                        Vec::new(),
                    ),
                })
                .collect(),
            Source::Binaries(binaries) => binaries
                .iter()
                .map(|binary| Step {
                    label: format!("tests/tests/{binary}"),
                    run: Run::CargoTest(
                        owned(&["-p", "lb-tests", "--test", binary]),
                        owned(&["--test-threads=1"]),
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

fn owned(arguments: &[&str]) -> Vec<String> {
    arguments.iter().map(|argument| (*argument).to_owned()).collect()
}

/// Fails if no tier runs one of the binaries of integration tests, or if a tier's binary is
/// missing.
pub(crate) fn check_binaries(binaries: &[String]) -> Result<()> {
    let of_tiers: Vec<&str> = TIERS
        .iter()
        .flat_map(|tier| match tier.source {
            Source::Binaries(binaries) => binaries,
            Source::Crates(_) | Source::Vectors | Source::Machine(_) => &[],
        })
        .copied()
        .collect();
    if let Some(other) = binaries.iter().find(|name| !of_tiers.contains(&name.as_str())) {
        bail!(
            "tests/tests/{other} belongs to no tier: make it a module of one of tests/tests/{{{}}}",
            of_tiers.join(",")
        );
    }
    if let Some(missing) =
        of_tiers.iter().find(|of_tier| !binaries.iter().any(|name| name == *of_tier))
    {
        bail!("a tier lacks its tests: tests/tests/{missing}/main.rs is missing");
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
    fn binaries_of_integration_tests_are_run_by_one_thread() {
        let tier = TIERS.iter().find(|tier| tier.name == "kernel").expect("a tier");
        let steps = tier.steps();
        assert_eq!(steps.len(), 2);
        for (step, name) in steps.iter().zip(["kernel", "cases"]) {
            let Run::CargoTest(arguments, of_binary) = &step.run else {
                panic!("{step:?}");
            };
            assert_eq!(arguments[..], ["-p", "lb-tests", "--test", name]);
            assert_eq!(of_binary[..], ["--test-threads=1"]);
        }
    }

    #[test]
    fn every_tier_has_steps() {
        let lengths = TIERS.map(|tier| (tier.name, tier.steps().len()));
        let expected =
            [("unit", 7), ("kernel", 2), ("vectors", 1), ("netns", 1), ("cluster", 1), ("vm", 1)];
        assert_eq!(lengths, expected);
    }

    #[test]
    fn a_binary_of_no_tier_and_a_tier_without_binary_are_errors() {
        let all = ["cases", "cluster", "kernel", "netns"];
        assert!(check_binaries(&names(&all)).is_ok());
        let error = |binaries: &[&str]| {
            check_binaries(&names(binaries)).map_err(|error| error.to_string()).unwrap_err()
        };
        assert!(
            error(&["cases", "cluster", "kernel", "netns", "other"]).contains("tests/tests/other")
        );
        assert!(error(&["cases", "cluster", "kernel"]).contains("tests/tests/netns/main.rs"));
    }
}
