//! The policy of docs/security.md for the annotation that switches a Service to direct server
//! return.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use lb_tests::harness::controlplane::{ControlPlane, Options};
use lb_tests::harness::netns::topology::cluster::Cluster;
use lb_tests::harness::netns::topology::plan::Family;
use lb_tests::harness::netns::words::expectations::Expectations;
use lb_tests::harness::wait::eventually;
use serde_json::{Value, json};

const PAGE: &str = include_str!("../../../docs/security.md");

/// The block of the page that has the policy and its binding.
fn policy() -> Result<&'static str> {
    let blocks = PAGE.split("```").skip(1).step_by(2);
    let mut blocks = blocks.filter(|block| block.contains("kind: ValidatingAdmissionPolicy"));
    let block = blocks.next().context("docs/security.md has no policy")?;
    Ok(block.trim_start_matches("yaml").trim_start())
}

fn namespace(name: &str, labels: Value) -> String {
    let metadata = json!({ "name": name, "labels": labels });
    json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": metadata }).to_string()
}

fn service(namespace: &str, name: &str, annotations: Value) -> String {
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": { "name": name, "namespace": namespace, "annotations": annotations },
        "spec": { "ports": [{ "port": 80 }] },
    })
    .to_string()
}

#[test]
fn the_policy_admits_the_annotation_in_labelled_namespaces_alone() -> Result<()> {
    let cluster = Cluster::builder().nodes(1).build()?;
    let node = cluster.node(1);
    let netns = Path::new("/run/netns").join(node.netns().name());
    let plane = ControlPlane::start(&netns, node.ip(Family::V4), Options::default())?;
    plane.apply(&namespace("tenant", json!({})))?;
    plane.apply(&namespace("trusted", json!({ "lb-external-mode": "" })))?;
    let annotated = || json!({ "lb-agent/external-mode": "dsr" });
    let asked = service("tenant", "asks", annotated());
    plane.try_apply(&asked).context("without the policy it is admitted")?;
    plane.apply(&service("tenant", "changes", json!({})))?;
    plane.try_apply(policy()?).context("the policy of docs/security.md")?;
    plane.apply(policy()?)?;
    // The API server reads its policies now and then.
    eventually(|| {
        ensure!(plane.try_apply(&asked).is_err(), "the policy is not in force");
        Ok(())
    })?;
    let refused = |object: &str| -> Result<()> {
        let error = plane.try_apply(object).err().context("it is admitted")?;
        let text = format!("{error:#}");
        let message = "lb-agent/external-mode is not allowed in this namespace";
        ensure!(text.contains(message), "{text}");
        Ok(())
    };
    let mut expectations = Expectations::default();
    expectations.check("a new Service with the annotation", refused(&asked));
    let snat = service("tenant", "asks", json!({ "lb-agent/external-mode": "snat" }));
    expectations.check("with any value", refused(&snat));
    let changed = service("tenant", "changes", annotated());
    expectations.check("a Service that gets it later", refused(&changed));
    for (what, object) in [
        ("no annotation", service("tenant", "plain", json!({}))),
        ("another annotation", service("tenant", "other", json!({ "lb-agent/other": "dsr" }))),
        ("a change without it", service("tenant", "changes", json!({ "team": "a" }))),
        ("a labelled namespace", service("trusted", "asks", annotated())),
    ] {
        expectations.check(what, plane.try_apply(&object));
    }
    expectations.finish()
}
