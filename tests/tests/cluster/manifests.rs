//! What `kubectl apply -k` and Helm install: it renders, the API server takes it, and the chart is
//! the same as the base.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use lb_tests::harness::controlplane::programs::{KUBERNETES_VERSION, Programs, helm};
use lb_tests::harness::controlplane::{ControlPlane, Options};
use lb_tests::harness::netns::topology::cluster::Cluster;
use lb_tests::harness::netns::topology::plan::Family;
use lb_tests::harness::netns::words::expectations::Expectations;
use serde_json::{Value, json};

/// The ways in which clusters are made.
const OVERLAYS: [&str; 6] = ["kubeadm", "kind", "k3s", "rke2", "talos", "eks"];

/// What may be added to any of them.
const COMPONENTS: [&str; 2] = ["labelled-nodes", "startup-taint"];

/// What a user of the chart may set, all at once.
const VALUES: [&str; 10] = [
    "image.repository=registry.example/lb",
    "image.tag=9.9.9",
    "image.pullPolicy=Always",
    "imagePullSecrets[0].name=secret",
    "config.LB_MASTER=https://192.0.2.1:6443",
    "kubeProxyConfigMap=kube-proxy",
    "podAnnotations.a=b",
    "podLabels.c=d",
    "affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution\
     .nodeSelectorTerms[0].matchExpressions[0].operator=Exists",
    "affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution\
     .nodeSelectorTerms[0].matchExpressions[0].key=lb",
];

fn manifests(below: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests").join(below)
}

fn output(mut command: Command) -> Result<String> {
    let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {error}");
    ensure!(error.is_empty(), "{command:?} warns: {error}");
    Ok(String::from_utf8(output.stdout)?)
}

fn kustomize(directory: &str) -> Result<String> {
    let mut command = Command::new(Programs::find()?.kubectl);
    command.arg("kustomize").arg(manifests(directory));
    output(command)
}

fn chart(values: &[&str]) -> Result<String> {
    let home = tempfile::tempdir()?;
    let mut command = Command::new(helm()?);
    command.args(["template", "lb", "--namespace", "kube-system"]).arg(manifests("chart"));
    command.args(["--kube-version", KUBERNETES_VERSION]);
    command.args(values.iter().flat_map(|value| ["--set", value]));
    if !values.is_empty() {
        // As a file of values has it: a number, not a text.
        command.args(["--set-json", "config.LB_MAX_FLOWS=1048576"]);
    }
    for variable in ["HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME"] {
        command.env(variable, home.path());
    }
    output(command)
}

/// The objects of a stream of YAML, by kind and name.
fn objects(yaml: &str) -> Result<Vec<(String, Value)>> {
    let parsed: Vec<Value> = serde_saphyr::from_multiple(yaml)?;
    let named = |object: Value| {
        let name = object["metadata"]["name"].as_str().unwrap_or_default();
        (format!("{} {name}", object["kind"].as_str().unwrap_or_default()), object)
    };
    let mut objects: Vec<_> =
        parsed.into_iter().filter(|object| !object.is_null()).map(named).collect();
    objects.sort_by(|one, other| one.0.cmp(&other.0));
    Ok(objects)
}

fn daemon_set(yaml: &str) -> Result<Value> {
    let found = objects(yaml)?.into_iter().find(|(name, _)| name == "DaemonSet lb-agent");
    Ok(found.context("no DaemonSet lb-agent")?.1)
}

/// An overlay with a component, as a user makes one.
fn with_component(component: &str) -> Result<String> {
    let directory = tempfile::tempdir_in(manifests(""))?;
    let kustomization = json!({
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": ["../base"],
        "components": [format!("../components/{component}")],
    });
    std::fs::write(directory.path().join("kustomization.yaml"), kustomization.to_string())?;
    let name = directory.path().file_name().context("no name")?;
    kustomize(name.to_str().context("a name that is no text")?)
}

#[test]
fn the_api_server_takes_every_manifest() -> Result<()> {
    let cluster = Cluster::builder().nodes(1).build()?;
    let node = cluster.node(1);
    let namespace = Path::new("/run/netns").join(node.netns().name());
    let options = Options {
        api_server_arguments: vec!["--allow-privileged=true".to_owned()],
        ..Options::default()
    };
    let plane = ControlPlane::start(&namespace, node.ip(Family::V4), options)?;
    let mut expectations = Expectations::default();
    expectations.check("base", kustomize("base").and_then(|yaml| plane.try_apply(&yaml)));
    for overlay in OVERLAYS {
        let rendered = kustomize(&format!("overlays/{overlay}"));
        expectations.check(overlay, rendered.and_then(|yaml| plane.try_apply(&yaml)));
    }
    for component in COMPONENTS {
        let rendered = with_component(component).and_then(|yaml| plane.try_apply(&yaml));
        expectations.check(format!("with components/{component}"), rendered);
    }
    for values in [&[][..], &VALUES] {
        let rendered = chart(values).and_then(|yaml| plane.try_apply(&yaml));
        expectations.check(format!("chart {values:?}"), rendered);
    }
    // The question is one that can be answered with no.
    let wrong = kustomize("base")?.replace("hostNetwork", "hostNetwrok");
    expectations.is_true("an unknown field passes", plane.try_apply(&wrong).is_err());
    expectations.finish()
}

#[test]
fn the_chart_renders_what_the_base_has() -> Result<()> {
    let (base, chart) = (objects(&kustomize("base")?)?, objects(&chart(&[])?)?);
    let names = |objects: &[(String, Value)]| -> Vec<String> {
        objects.iter().map(|(name, _)| name.clone()).collect()
    };
    ensure!(names(&base) == names(&chart), "{:?}, not {:?}", names(&chart), names(&base));
    for ((name, base), (_, chart)) in base.iter().zip(&chart) {
        ensure!(base == chart, "{name}: the base has\n{base:#}\nthe chart\n{chart:#}");
    }
    Ok(())
}

#[test]
fn what_the_chart_is_told_is_in_what_it_renders() -> Result<()> {
    let told = chart(&VALUES)?;
    let pod = &daemon_set(&told)?["spec"]["template"];
    let (meta, spec) = (&pod["metadata"], &pod["spec"]);
    let agent = &spec["containers"][0];
    ensure!(agent["image"] == "registry.example/lb:9.9.9", "{agent:#}");
    ensure!(agent["imagePullPolicy"] == "Always", "{agent:#}");
    ensure!(meta["labels"]["c"] == "d" && meta["annotations"]["a"] == "b", "{meta:#}");
    ensure!(meta["annotations"]["checksum/config"].is_string(), "{meta:#}");
    ensure!(spec["imagePullSecrets"][0]["name"] == "secret", "{spec:#}");
    ensure!(spec["affinity"]["nodeAffinity"].is_object(), "{spec:#}");
    let env = agent["env"].as_array().context("no env")?;
    let config = env.iter().find(|variable| variable["name"] == "LB_CONFIG");
    let file = "/var/lib/kube-proxy/config.conf";
    ensure!(config.is_some_and(|config| config["value"] == file), "{env:?}");
    let objects = objects(&told)?;
    let map = objects.iter().find(|(name, _)| name == "ConfigMap lb-agent");
    let data = &map.context("no ConfigMap")?.1["data"];
    let expected = json!({"LB_MASTER": "https://192.0.2.1:6443", "LB_MAX_FLOWS": "1048576"});
    ensure!(*data == expected, "{data:#}");
    Ok(())
}

#[test]
fn manifests_and_chart_name_the_version_of_lb() -> Result<()> {
    let version = env!("CARGO_PKG_VERSION");
    for yaml in [kustomize("base")?, chart(&[])?] {
        let spec = &daemon_set(&yaml)?["spec"]["template"]["spec"];
        for containers in ["initContainers", "containers"] {
            for container in spec[containers].as_array().context("no containers")? {
                let image = format!("localhost/lb-agent:{version}");
                ensure!(container["image"] == image, "{container:#}");
            }
        }
    }
    let chart = std::fs::read_to_string(manifests("chart/Chart.yaml"))?;
    for field in ["version", "appVersion"] {
        ensure!(chart.contains(&format!("\n{field}: {version}\n")), "{field} in {chart}");
    }
    Ok(())
}

#[test]
fn the_manifests_of_the_benchmark_run_this_version() -> Result<()> {
    let objects = objects(&kustomize("bench")?)?;
    let spec = |name: &str, path: &str| {
        let found = objects.iter().find(|(other, _)| other == name);
        let spec = found.and_then(|(_, object)| object.pointer(path)).cloned();
        spec.with_context(|| format!("no {path} in {name}"))
    };
    let mut expectations = Expectations::default();
    for (name, path) in [("Pod server", "/spec"), ("Job lb-bench", "/spec/template/spec")] {
        let container = &spec(name, path)?["containers"][0];
        let image = format!("localhost/lb-agent:{}", env!("CARGO_PKG_VERSION"));
        expectations.is_true(format!("{name}: {container:#}"), container["image"] == image);
        check_container(&mut expectations, name, container);
    }
    expectations.finish()
}

/// What a container runs and what it gets from its environment: command lines of lb-agent.
fn check_container(expectations: &mut Expectations, what: &str, container: &Value) {
    let words = |value: &Value| -> Vec<String> {
        let words = value.as_array().into_iter().flatten();
        words.filter_map(|word| word.as_str().map(str::to_owned)).collect()
    };
    let mut lines = vec![[words(&container["command"]), words(&container["args"])].concat()];
    for probe in ["startupProbe", "livenessProbe", "readinessProbe"] {
        lines.push(words(&container[probe]["exec"]["command"]));
    }
    for hook in ["postStart", "preStop"] {
        lines.push(words(&container["lifecycle"][hook]["exec"]["command"]));
    }
    let agent = "/usr/local/bin/lb-agent";
    for line in lines.iter().filter(|line| !line.is_empty()) {
        let parsed = lb_agent::cli::parse(line);
        expectations.is_true(format!("{what}: {line:?}: {:?}", parsed.as_ref().err()), {
            line[0] == agent && parsed.is_ok()
        });
    }
    expectations.is_true(format!("{what} has no command"), !lines[0].is_empty());
    let env = container["env"].as_array().into_iter().flatten();
    let names = env.filter_map(|variable| variable["name"].as_str().map(str::to_owned));
    let unknown = lb_agent::cli::environment::unknown(names);
    expectations.is_true(format!("{what}: {unknown:?}"), unknown.is_empty());
}

/// Everything in a rendering that lb-agent reads.
fn check_lines(expectations: &mut Expectations, what: &str, yaml: &str) -> Result<()> {
    let spec = &daemon_set(yaml)?["spec"]["template"]["spec"];
    let mut containers = 0;
    for kind in ["initContainers", "containers"] {
        for container in spec[kind].as_array().into_iter().flatten() {
            let what = format!("{what}: {}", container["name"]);
            check_container(expectations, &what, container);
            containers += 1;
        }
    }
    ensure!(containers >= 3, "{what}: only {containers} containers");
    for (name, object) in objects(yaml)? {
        // kustomize adds a hash to the name.
        if !name.starts_with("ConfigMap lb-agent") {
            continue;
        }
        let data = object["data"].as_object().with_context(|| format!("{what}: {name}"))?;
        for (variable, value) in data {
            let twin = lb_agent::cli::environment::unknown([variable.clone()]).is_empty();
            expectations.is_true(format!("{what}: {variable} is of no flag"), twin);
            let Some(flag) = variable.strip_prefix("LB_") else { continue };
            let flag = format!("--{}", flag.to_lowercase().replace('_', "-"));
            let value = value.as_str().unwrap_or_default();
            // kubelet and the agent expand what a manifest cannot know.
            let value = value.replace("$(NODE_NAME)", "node1");
            let run = ["lb-agent".to_owned(), "run".to_owned(), format!("{flag}={value}")];
            let parsed = lb_agent::cli::parse(run);
            let row = format!("{what}: {flag}={value}: {:?}", parsed.as_ref().err());
            expectations.is_true(row, parsed.is_ok());
        }
    }
    Ok(())
}

#[test]
fn the_agent_takes_every_command_line_and_variable_of_the_manifests() -> Result<()> {
    let mut expectations = Expectations::default();
    let mut renderings = vec![("base".to_owned(), kustomize("base")?)];
    for overlay in OVERLAYS {
        renderings.push((overlay.to_owned(), kustomize(&format!("overlays/{overlay}"))?));
    }
    for component in COMPONENTS {
        renderings.push((format!("with {component}"), with_component(component)?));
    }
    renderings.push(("chart".to_owned(), chart(&[])?));
    renderings.push(("chart with values".to_owned(), chart(&VALUES)?));
    for (what, yaml) in &renderings {
        check_lines(&mut expectations, what, yaml)?;
    }
    // The question is one that can be answered with no.
    let mut failing = Expectations::default();
    check_lines(&mut failing, "wrong", &renderings[0].1.replace("--ready-file", "--raedy-file"))?;
    expectations.is_true("an unknown flag passes", failing.finish().is_err());
    expectations.finish()
}

#[test]
fn no_agent_is_privileged_or_sees_the_processes_of_the_node() -> Result<()> {
    for overlay in OVERLAYS {
        let spec = &daemon_set(&kustomize(&format!("overlays/{overlay}"))?)?["spec"]["template"];
        let spec = &spec["spec"];
        ensure!(spec["hostPID"].is_null() && spec["hostIPC"].is_null(), "{overlay}: {spec:#}");
        for container in [&spec["initContainers"][1], &spec["containers"][0]] {
            let rights = &container["securityContext"];
            ensure!(rights["privileged"].is_null(), "{overlay}: {rights:#}");
            ensure!(rights["capabilities"]["drop"] == json!(["ALL"]), "{overlay}: {rights:#}");
            ensure!(rights["readOnlyRootFilesystem"] == true, "{overlay}: {rights:#}");
            let seccomp = &rights["seccompProfile"]["type"];
            ensure!(seccomp == "RuntimeDefault", "{overlay}: {rights:#}");
        }
    }
    Ok(())
}
