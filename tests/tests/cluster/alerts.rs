//! The alert rules, as Prometheus reads them: promtool accepts them, and each fires where it should
//! and nowhere else. `tests/alerts` has the series.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use lb_tests::harness::controlplane::programs::promtool;
use serde_json::Value;

const RULES: &str = include_str!("../../../manifests/monitoring/prometheusrule.yaml");
const TESTS: &str = include_str!("../../alerts/alerts.yaml");

/// The rules in Prometheus' own format.
fn rules() -> Result<Value> {
    let object: Value = serde_saphyr::from_str(RULES)?;
    ensure!(object["spec"]["groups"].is_array(), "no groups: {object:#}");
    Ok(object["spec"].clone())
}

/// The same without descriptions, which the tests would repeat word by word.
fn without_descriptions(mut rules: Value) -> Value {
    for group in rules["groups"].as_array_mut().into_iter().flatten() {
        for rule in group["rules"].as_array_mut().into_iter().flatten() {
            if let Some(texts) = rule["annotations"].as_object_mut() {
                texts.remove("description");
            }
        }
    }
    rules
}

/// Runs promtool in a directory; an error has what it printed.
fn run(directory: &Path, arguments: &[&str]) -> Result<()> {
    let mut command = Command::new(promtool()?);
    command.current_dir(directory).args(arguments);
    let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
    let [out, err] = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text));
    ensure!(output.status.success(), "{command:?}:\n{out}{err}");
    Ok(())
}

/// Runs the tests on rules.
fn test(rules: &Value) -> Result<()> {
    let directory = tempfile::tempdir()?;
    std::fs::write(directory.path().join("alerts.yaml"), TESTS)?;
    std::fs::write(directory.path().join("rules.yaml"), rules.to_string())?;
    run(directory.path(), &["test", "rules", "alerts.yaml"])
}

#[test]
fn prometheus_takes_the_alert_rules() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let check = |text: String| {
        std::fs::write(directory.path().join("rules.yaml"), text)?;
        run(directory.path(), &["check", "rules", "--lint-fatal", "rules.yaml"])
    };
    let text = rules()?.to_string();
    check(text.clone())?;
    // The question is one that can be answered with no.
    ensure!(check(text.replace("increase(", "increaze(")).is_err(), "an unknown function passes");
    Ok(())
}

#[test]
fn each_alert_fires_where_it_should_and_nowhere_else() -> Result<()> {
    let rules = without_descriptions(rules()?);
    test(&rules)?;
    let text = rules.to_string();
    for (from, to) in [("> 900", "> 9000"), ("> 900", "> 90"), ("lb_missing_pins", "lb_pins")] {
        ensure!(text.contains(from), "{from} is in no rule");
        let wrong: Value = serde_json::from_str(&text.replace(from, to))?;
        ensure!(test(&wrong).is_err(), "{to} instead of {from} passes");
    }
    Ok(())
}

#[test]
fn each_alert_has_a_test_in_which_it_fires_and_one_in_which_it_does_not() -> Result<()> {
    let (rules, tests): (Value, Value) = (rules()?, serde_saphyr::from_str(TESTS)?);
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let name = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let groups = list(&rules["groups"]);
    let all: BTreeSet<_> = groups
        .iter()
        .flat_map(|group| list(&group["rules"]))
        .map(|rule| name(&rule["alert"]))
        .collect();
    let tests: Vec<_> =
        list(&tests["tests"]).iter().flat_map(|test| list(&test["alert_rule_test"])).collect();
    let named = |fires: bool| -> BTreeSet<_> {
        let of_kind = tests.iter().filter(|test| list(&test["exp_alerts"]).is_empty() != fires);
        of_kind.map(|test| name(&test["alertname"])).collect()
    };
    ensure!(all.len() >= 15, "{all:?}");
    for fires in [true, false] {
        let missing: Vec<_> = all.difference(&named(fires)).cloned().collect();
        ensure!(missing.is_empty(), "no test in which these fire ({fires}): {missing:?}");
        let unknown: Vec<_> = named(fires).difference(&all).cloned().collect();
        ensure!(unknown.is_empty(), "tests of unknown alerts: {unknown:?}");
    }
    Ok(())
}
