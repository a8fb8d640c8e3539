//! Whether every promise of `docs/contract.md` has a test that proves it.
//!
//! Nothing but the page and the sources are read: that the tests pass is the tests' business.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

const PAGE: &str = include_str!("../../../docs/contract.md");

/// A promise of the page.
struct Promise<'a> {
    /// Its number, e.g. `3.4b`.
    number: &'a str,
    /// The tests that it names.
    tests: Vec<&'a str>,
}

fn promises(page: &str) -> Vec<Promise<'_>> {
    let rows = page.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| row"));
    rows.filter_map(|line| {
        let mut cells = line.trim_matches('|').split(" | ").map(str::trim);
        let (number, _, tests) = (cells.next()?, cells.next()?, cells.next().unwrap_or_default());
        Some(Promise { number, tests: tests.split('`').skip(1).step_by(2).collect() })
    })
    .collect()
}

/// The file that a test's name begins with.
fn source(file: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let places = [
        ("cases/", "lb-testing/src/cases"),
        ("agent/", "lb-agent/src"),
        ("control/", "lb-control/src"),
        ("core/", "lb-testing/src"),
    ];
    let place = places
        .iter()
        .find_map(|(prefix, dir)| file.strip_prefix(prefix).map(|rest| root.join(dir).join(rest)));
    let path = place.unwrap_or_else(|| root.join("tests/tests").join(file));
    if path.extension().is_some() { path } else { path.with_extension("rs") }
}

/// What is wrong with a name of a test.
fn fault(test: &str) -> Option<String> {
    let Some((file, function)) = test.split_once("::") else {
        return Some(format!("{test}: no FILE::TEST"));
    };
    let path = source(file);
    let Ok(text) = fs::read_to_string(&path) else {
        return Some(format!("{test}: there is no {}", path.display()));
    };
    let is_case = file.starts_with("cases/");
    let declaration = if is_case { format!("=> {function},") } else { format!("fn {function}(") };
    // A test made by a macro is named alone in its call.
    let is_there = text.contains(&declaration) || text.contains(&format!("{function}:"));
    (!is_there).then(|| format!("{test}: {} has no such test", path.display()))
}

#[test]
fn every_promise_names_tests_that_exist() {
    let promises = promises(PAGE);
    let without = promises.iter().filter(|promise| promise.tests.is_empty());
    let mut faults: Vec<_> =
        without.map(|promise| format!("{}: no test", promise.number)).collect();
    for promise in &promises {
        let wrong = promise.tests.iter().filter_map(|test| fault(test));
        faults.extend(wrong.map(|fault| format!("{}: {fault}", promise.number)));
    }
    assert!(faults.is_empty(), "docs/contract.md:\n{}", faults.join("\n"));
}

#[test]
fn no_promise_is_left_out() -> Result<()> {
    let promises = promises(PAGE);
    let numbers: BTreeSet<_> = promises.iter().map(|promise| promise.number).collect();
    assert_eq!(numbers.len(), promises.len(), "a number stands twice");
    let mut last = (0, 0);
    for number in promises.iter().map(|promise| promise.number) {
        let (section, row) = number.split_once('.').with_context(|| number.to_owned())?;
        let row = row.trim_end_matches(char::is_alphabetic);
        let at: (u32, u32) = (section.parse()?, row.parse()?);
        let follows = [(last.0, last.1), (last.0, last.1 + 1), (last.0 + 1, 1)];
        assert!(follows.contains(&at), "{number} does not follow {}.{}", last.0, last.1);
        last = at;
    }
    assert_eq!(last.0, 11, "the contract has eleven sections");
    Ok(())
}

#[test]
fn a_test_that_is_not_there_is_found() {
    let page = "| row | promise | tests |\n|---|---|---|\n| 1.1 | a | |\n| 1.2 | b | `x::y` |\n";
    let found = promises(page);
    assert!(found[0].tests.is_empty());
    assert_eq!(found[1].tests, ["x::y"]);
    assert!(fault("x::y").is_some());
    assert!(fault("cases/outside::nothing_of_the_kind").is_some());
    assert!(fault("cases/outside::a_backend_elsewhere_sees_this_node").is_none());
}
