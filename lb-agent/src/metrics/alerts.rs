//! The alert rules of `manifests/monitoring` name metrics that exist.

use std::collections::BTreeSet;

use lb_common::abi::counter::{Class, Reason};
use serde_json::Value;

const RULES: &str = include_str!("../../../manifests/monitoring/prometheusrule.yaml");
const PAGE: &str = include_str!("../../../docs/metrics.md");

/// The words of PromQL that the rules use.
const WORDS: [&str; 2] = ["increase", "changes"];

fn rules() -> Vec<Value> {
    let rule: Value = serde_saphyr::from_str(RULES).expect("YAML");
    assert_eq!(rule["kind"], "PrometheusRule");
    let groups = rule["spec"]["groups"].as_array().expect("groups");
    groups.iter().flat_map(|group| group["rules"].as_array().expect("rules")).cloned().collect()
}

/// The metrics of the page, and `up`, which Prometheus makes.
fn metrics() -> BTreeSet<&'static str> {
    let rows = PAGE.lines().filter_map(|row| row.strip_prefix("| `")?.split_once('`'));
    rows.map(|(name, _)| name).chain(["up"]).collect()
}

/// The identifiers of an expression outside of label matchers and durations.
fn identifiers(expression: &str) -> Vec<String> {
    let (mut depth, mut bare) = (0, String::new());
    for character in expression.chars() {
        match character {
            '{' | '[' => depth += 1,
            '}' | ']' => depth -= 1,
            _ if depth > 0 => continue,
            _ => {}
        }
        bare.push(character);
    }
    let words = bare.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    let is_name = |word: &&str| word.starts_with(|c: char| c.is_ascii_alphabetic());
    words.filter(is_name).map(str::to_owned).collect()
}

/// Whether every bracket and quote is closed, in order.
fn is_balanced(expression: &str) -> bool {
    let (mut open, mut in_text) = (Vec::new(), false);
    for character in expression.chars() {
        match character {
            '"' => in_text = !in_text,
            _ if in_text => {}
            '(' => open.push(')'),
            '[' => open.push(']'),
            '{' => open.push('}'),
            ')' | ']' | '}' if open.pop() != Some(character) => return false,
            _ => {}
        }
    }
    open.is_empty() && !in_text
}

#[test]
fn the_alerts_name_metrics_that_exist_and_say_what_to_do() {
    let metrics = metrics();
    let mut names = BTreeSet::new();
    for rule in rules() {
        let text = |value: &Value| value.as_str().unwrap_or_default().trim().to_owned();
        let (name, expression) = (text(&rule["alert"]), text(&rule["expr"]));
        assert!(name.starts_with("Lb") && names.insert(name.clone()), "{name}");
        assert!(is_balanced(&expression), "{name}: {expression}");
        let identifiers = identifiers(&expression);
        assert!(!identifiers.is_empty(), "{name}: {expression}");
        for word in identifiers.iter().filter(|word| !WORDS.contains(&word.as_str())) {
            assert!(metrics.contains(word.as_str()), "{name}: no metric {word}");
        }
        let is_comparison = [" > ", " < ", " == "].iter().any(|sign| expression.contains(sign));
        assert!(is_comparison, "{name} always fires: {expression}");
        let severity = text(&rule["labels"]["severity"]);
        assert!(["critical", "warning"].contains(&severity.as_str()), "{name}: {severity}");
        for part in ["summary", "description"] {
            let text = text(&rule["annotations"][part]);
            assert!(text.len() > 20 && is_balanced(&text.replace('\'', "")), "{name}: {part}");
        }
    }
    assert!(names.len() > 10, "{names:?}");
}

#[test]
fn the_alert_on_packets_has_every_reason_that_is_an_alarm() {
    let rules = rules();
    let rule = rules.iter().find(|rule| rule["alert"] == "LbDatapathAlarm").expect("a rule");
    let expression = rule["expr"].as_str().expect("a text");
    let (_, reasons) = expression.split_once("reason=~\"").expect("reasons");
    let (reasons, _) = reasons.split_once('"').expect("a text");
    let listed: BTreeSet<&str> = reasons.split('|').collect();
    let alarms = Reason::ALL.iter().filter(|reason| reason.class() == Class::Alarm);
    assert_eq!(listed, alarms.map(|reason| reason.name()).collect());
}
