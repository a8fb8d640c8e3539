//! The tiers, in the order in which they run: the fast ones first.

use std::path::PathBuf;

use anyhow::{Result, bail};

use crate::setup::Scope;

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
    /// It runs only when it is named: it takes long.
    pub(crate) on_request: bool,
    /// What its tests need to be installed.
    pub(crate) scope: Scope,
}

#[derive(Debug)]
enum Source {
    /// Libraries, programs and documentation: (label, arguments of cargo test).
    Crates(&'static [(&'static str, &'static [&'static str])]),
    /// Binaries of integration tests of the tests crate, whose tests run one after the other.
    Binaries(&'static [&'static str]),
    /// A binary whose tests run side by side, and its modules whose tests run alone afterwards,
    /// because they measure times or count losses under load.
    SideBySide(&'static str, &'static [&'static str]),
    /// The files of flow vectors that the tests crate has.
    Vectors,
    /// A virtual machine with this kernel.
    Machine(&'static str),
    /// Upstream's end-to-end tests, on clusters with these networks of pods.
    EndToEnd(&'static [&'static str]),
}

/// One call of a program that runs tests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Step {
    pub(crate) label: String,
    pub(crate) run: Run,
    /// Its tests run beside others, which take processor time from them.
    pub(crate) is_crowded: bool,
}

impl Step {
    pub(crate) fn new(label: impl Into<String>, run: Run) -> Self {
        Self { label: label.into(), run, is_crowded: false }
    }

    /// The step that runs tests of this one again, one after the other.
    pub(crate) fn alone(&self, tests: &[String]) -> Option<Self> {
        let Run::CargoTest(arguments, _) = &self.run else { return None };
        let of_binary = [owned(&["--test-threads=1", "--exact"]), tests.to_vec()].concat();
        Some(Self::new(&*self.label, Run::CargoTest(arguments.clone(), of_binary)))
    }
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
    /// Upstream's end-to-end tests, on a cluster with this network of pods.
    EndToEnd(&'static str),
}

/// How many tests run side by side: most of their time is waiting.
const THREADS: u32 = 3;

/// The name for all tiers.
pub(crate) const ALL: &str = "all";
/// The tier of flow vectors.
pub(crate) const VECTORS: &str = "vectors";

pub(crate) const TIERS: [Tier; 8] = [
    Tier {
        name: "unit",
        source: Source::Crates(&[
            ("lb-common", &["-p", "lb-common"]),
            ("lb-testing", &["-p", "lb-testing"]),
            ("lb-control", &["-p", "lb-control"]),
            ("lb-sys", &["-p", "lb-sys"]),
            ("lb-agent", &["-p", "lb-agent"]),
            ("lb-tests", &["-p", "lb-tests", "--lib", "--bins"]),
            ("lb-fuzz", &["-p", "lb-fuzz"]),
            ("xtask", &["-p", "xtask"]),
        ]),
        root: false,
        programs: false,
        on_request: false,
        scope: Scope::Build,
    },
    Tier {
        name: "kernel",
        source: Source::Binaries(&["kernel", "cases"]),
        root: true,
        programs: true,
        on_request: false,
        scope: Scope::Build,
    },
    Tier {
        name: VECTORS,
        source: Source::Vectors,
        root: true,
        programs: false,
        on_request: false,
        scope: Scope::Build,
    },
    Tier {
        name: "netns",
        source: Source::SideBySide(
            "netns",
            &["affinity", "demo", "lifetime", "mishaps", "upgrade"],
        ),
        root: true,
        programs: true,
        on_request: false,
        scope: Scope::EarlierAgent,
    },
    Tier {
        name: "cluster",
        source: Source::Binaries(&["cluster"]),
        root: true,
        programs: true,
        on_request: false,
        scope: Scope::ControlPlane,
    },
    Tier {
        name: "cluster-real",
        source: Source::Binaries(&["cluster_real"]),
        root: true,
        programs: true,
        on_request: false,
        scope: Scope::Addons,
    },
    Tier {
        name: "vm",
        source: Source::Machine("6.1"),
        root: false,
        programs: true,
        on_request: false,
        scope: Scope::Build,
    },
    Tier {
        name: "e2e",
        source: Source::EndToEnd(&["ptp"]),
        root: true,
        programs: true,
        on_request: true,
        scope: Scope::EndToEnd,
    },
];

impl Tier {
    /// Whether its tests have names that can be given.
    pub(crate) fn has_names(&self) -> bool {
        !matches!(self.source, Source::Machine(_))
    }

    /// Whether its tests unpack or run the agent's image.
    pub(crate) fn needs_image(&self) -> bool {
        self.name == "netns"
    }

    /// Whether its tests upgrade to the agent with other layouts.
    pub(crate) fn needs_next_agent(&self) -> bool {
        self.name == "netns"
    }

    /// The programs to run. If tests are `chosen` by name, they run one after the other.
    pub(crate) fn steps(&self, chosen: bool) -> Vec<Step> {
        match self.source {
            Source::Crates(crates) => crates
                .iter()
                .map(|(label, arguments)| {
                    let arguments = owned(&[*arguments, &["--no-fail-fast"]].concat());
                    Step::new(*label, Run::CargoTest(arguments, Vec::new()))
                })
                .collect(),
            Source::Binaries(binaries) => binaries
                .iter()
                .map(|binary| of_binary(binary, owned(&["--test-threads=1"])))
                .collect(),
            Source::SideBySide(binary, _) if chosen => {
                vec![of_binary(binary, owned(&["--test-threads=1"]))]
            }
            Source::SideBySide(binary, alone) => {
                let names: Vec<String> = alone.iter().map(|name| format!("{name}::")).collect();
                let mut others = vec![format!("--test-threads={THREADS}")];
                for name in &names {
                    others.extend(["--skip".to_owned(), name.clone()]);
                }
                let alone = [owned(&["--test-threads=1"]), names].concat();
                let others = Step { is_crowded: true, ..of_binary(binary, others) };
                vec![others, of_binary(binary, alone)]
            }
            Source::Vectors => {
                vec![Step::new("tests/vectors", Run::Vectors(None))]
            }
            Source::Machine(kernel) => {
                vec![Step::new(format!("Linux {kernel}"), Run::Machine(kernel))]
            }
            Source::EndToEnd(networks) => {
                networks.iter().map(|cni| Step::new(*cni, Run::EndToEnd(cni))).collect()
            }
        }
    }
}

/// The tests of a binary that the arguments of libtest select.
fn of_binary(binary: &str, of_binary: Vec<String>) -> Step {
    let run = Run::CargoTest(owned(&["-p", "lb-tests", "--test", binary]), of_binary);
    Step::new(format!("tests/tests/{binary}"), run)
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
            Source::Binaries(binaries) => binaries.to_vec(),
            Source::SideBySide(binary, _) => vec![binary],
            Source::Crates(_) | Source::Vectors | Source::Machine(_) | Source::EndToEnd(_) => {
                Vec::new()
            }
        })
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
        let steps = tier.steps(false);
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
    fn tests_that_measure_run_alone_and_no_test_runs_twice() {
        let tier = TIERS.iter().find(|tier| tier.name == "netns").expect("a tier");
        let arguments = |chosen| -> Vec<String> {
            let of = |step: &Step| match &step.run {
                Run::CargoTest(_, of_binary) => of_binary.join(" "),
                other => panic!("{other:?}"),
            };
            tier.steps(chosen).iter().map(of).collect()
        };
        let [others, alone] = &arguments(false)[..] else { panic!("{:?}", arguments(false)) };
        assert!(others.starts_with("--test-threads=3 --skip affinity:: --skip"), "{others}");
        assert!(alone.starts_with("--test-threads=1 affinity:: "), "{alone}");
        assert_eq!(others.matches("--skip").count(), alone.matches("::").count());
        assert_eq!(arguments(true), ["--test-threads=1"]);
    }

    #[test]
    fn tests_that_failed_beside_others_are_named_to_the_same_binary() {
        let tier = TIERS.iter().find(|tier| tier.name == "netns").expect("a tier");
        let [others, alone] = &tier.steps(false)[..] else { panic!("{tier:?}") };
        assert!(others.is_crowded && !alone.is_crowded);
        let Some(Step { run: Run::CargoTest(arguments, of_binary), is_crowded: false, .. }) =
            others.alone(&names(&["a::b"]))
        else {
            panic!("{others:?}");
        };
        assert_eq!(arguments, ["-p", "lb-tests", "--test", "netns"]);
        assert_eq!(of_binary, ["--test-threads=1", "--exact", "a::b"]);
    }

    #[test]
    fn every_tier_has_steps() {
        let lengths = TIERS.map(|tier| (tier.name, tier.steps(false).len()));
        let expected = [
            ("unit", 8),
            ("kernel", 2),
            ("vectors", 1),
            ("netns", 2),
            ("cluster", 1),
            ("cluster-real", 1),
            ("vm", 1),
            ("e2e", 1),
        ];
        assert_eq!(lengths, expected);
    }

    #[test]
    fn a_binary_of_no_tier_and_a_tier_without_binary_are_errors() {
        let all = ["cases", "cluster", "cluster_real", "kernel", "netns"];
        assert!(check_binaries(&names(&all)).is_ok());
        let error = |binaries: &[&str]| {
            check_binaries(&names(binaries)).map_err(|error| error.to_string()).unwrap_err()
        };
        let other = [&all[..], &["other"]].concat();
        assert!(error(&other).contains("tests/tests/other"));
        assert!(error(&all[..4]).contains("tests/tests/netns/main.rs"));
    }
}
