//! Bad input and full maps: each is reported, and the other Services are served.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lb_tests::harness::echo::{Probe, Transport};
use lb_tests::harness::netns::actors::agent::{self, Agent, cleanup, lb_agent};
use lb_tests::harness::netns::topology::cgroup::mount_point;
use lb_tests::harness::netns::topology::cluster::Cluster;
use lb_tests::harness::netns::topology::node::Node;
use lb_tests::harness::netns::topology::plan::{Family, cluster_ip};
use lb_tests::harness::netns::words::expectations::Expectations;
use lb_tests::harness::netns::words::manifests::Endpoint;
use lb_tests::harness::netns::words::scenario::{PORT, SMALL_MAPS, Scenario, TARGET, backends_of};
use lb_tests::harness::wait::PATIENCE;
use nix::mount::{MntFlags, umount2};
use serde_json::{Value, json};

fn set_up(own: &[&str]) -> Result<Scenario> {
    let builder = Cluster::builder().nodes(1).pod(1, "a").pod(1, "b");
    let mut scenario = Scenario::start(builder, own)?;
    scenario.serve(&["b"])?;
    Ok(scenario)
}

/// Polls until a condition is met.
fn is_eventually(mut is_met: impl FnMut() -> Result<bool>) -> Result<bool> {
    let start = Instant::now();
    while start.elapsed() < PATIENCE {
        if is_met()? {
            return Ok(true);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(false)
}

fn ask(scenario: &Scenario, number: u8, port: u16, family: Family) -> Result<Option<String>> {
    let to = (cluster_ip(number).get(family), port).into();
    let probe = Probe::tcp(to).timeout(Duration::from_millis(100));
    Ok(scenario.cluster.pod("a").ask(probe)?.name().map(str::to_owned))
}

/// Every kind of access to the Service of this number is answered, or none is.
fn answered(scenario: &Scenario, number: u8) -> Result<Vec<bool>> {
    let mut answered = Vec::new();
    for family in Family::ALL {
        for transport in [Transport::Tcp, Transport::Udp] {
            let to = (cluster_ip(number).get(family), PORT).into();
            let probe = Probe::new(transport, to);
            answered.push(scenario.cluster.pod("a").ask(probe)?.name().is_some());
        }
    }
    Ok(answered)
}

/// Runs an agent's command to its end: exit status and stderr.
fn run(node: &Node, mut command: Command, arguments: &[&str]) -> Result<(Option<i32>, String)> {
    command.args(arguments);
    let mut process = node.spawn_agent("command", command)?;
    let status = process.wait(PATIENCE)?;
    Ok((status.code(), process.stderr()))
}

/// An error is one sentence for people, on the last line and with nothing of the language that
/// the program is written in.
fn is_sentence(said: &str, words: &[&str]) -> bool {
    let last = said.lines().last().unwrap_or_default();
    last.starts_with("lb-agent: ")
        && words.iter().all(|word| last.contains(word))
        && !["panicked", "Os {", "backtrace"].iter().any(|word| said.contains(word))
}

fn check_no_privileges(
    expectations: &mut Expectations,
    node: &Node,
    manifests: &str,
) -> Result<()> {
    let directory = tempfile::tempdir()?;
    std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755))?;
    // Where nobody may execute it.
    let program = directory.path().join("lb-agent");
    std::fs::copy(lb_agent()?.get_program(), &program)?;
    let pins = node.bpf_dir().to_string_lossy();
    let tree = node.cgroup_tree().path().to_string_lossy();
    let elsewhere = directory.path().join("pins").to_string_lossy().into_owned();
    for bpf_dir in [&*pins, &*elsewhere] {
        let mut command = Command::new("setpriv");
        command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]).arg(&program);
        let arguments = ["run", "--manifests", manifests, "--bpf-dir", bpf_dir, "--cgroup", &tree];
        let (status, said) = run(node, command, &arguments)?;
        let is_told = is_sentence(&said, &["CAP_BPF", "run as root"]);
        expectations
            .is_true(format!("nobody, {bpf_dir}: {status:?} {said}"), status == Some(1) && is_told);
    }
    Ok(())
}

#[test]
fn a_bad_start_ends_with_a_sentence() -> Result<()> {
    let cluster = Cluster::builder().nodes(1).build()?;
    let node = cluster.node(1);
    let mut expectations = Expectations::default();
    let directory = tempfile::tempdir()?;
    let manifests = directory.path().to_string_lossy().into_owned();
    let pins = node.bpf_dir().to_string_lossy().into_owned();
    check_no_privileges(&mut expectations, &node, &manifests)?;
    for arguments in [
        &["run", "--max-services", "many"][..],
        &["run", "--max-slots", "0"],
        &["run", "--socket-lb", "nonsense"],
        &["run", "--no-such-flag"],
        &["run", "--healthz-bind-address", "here"],
        &["get", "nonsense"],
        &["nonsense"],
        &[],
    ] {
        let (status, said) = run(&node, lb_agent()?, arguments)?;
        let is_told = said.contains("Usage") || said.contains("--help");
        expectations
            .is_true(format!("{arguments:?}: {status:?} {said}"), status == Some(2) && is_told);
    }
    let missing = directory.path().join("missing").to_string_lossy().into_owned();
    let broken = directory.path().join("broken").to_string_lossy().into_owned();
    std::fs::write(&broken, "clusters: 7\n")?;
    let tree = node.cgroup_tree().path().to_string_lossy().into_owned();
    for (own, words) in [
        (&["--manifests", &manifests, "--cgroup", "/no/such/cgroup"][..], &["/no/such/cgroup"][..]),
        (&["--manifests", &manifests, "--cgroup", &manifests], &[manifests.as_str()]),
        (&["--manifests", &missing], &[missing.as_str()]),
        (&["--kubeconfig", &missing], &[missing.as_str(), "--kubeconfig"]),
        (&["--kubeconfig", &broken], &[broken.as_str(), "--kubeconfig"]),
        (&["--manifests", &manifests, "--bpf-dir", "/proc/lb"], &["/proc/lb", "--bpf-dir"]),
    ] {
        let mut all = vec!["run"];
        let defaults = [("--bpf-dir", pins.as_str()), ("--cgroup", tree.as_str())];
        for (flag, value) in defaults.into_iter().filter(|(flag, _)| !own.contains(flag)) {
            all.extend([flag, value]);
        }
        let own = [&all, own].concat();
        let (status, said) = run(&node, lb_agent()?, &own)?;
        let is_told = is_sentence(&said, words);
        expectations.is_true(format!("{own:?}: {status:?} {said}"), status == Some(1) && is_told);
        // Some of them have loaded programs before they fail.
        cleanup(&node)?;
    }
    expectations.finish()
}

/// Where the agent mounted a bpffs; unmounts it.
struct Mounted<'a>(&'a Path);

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        umount2(self.0, MntFlags::MNT_DETACH).ok();
    }
}

#[test]
fn an_agent_mounts_a_bpffs_and_works_without_cgroup2() -> Result<()> {
    let mut scenario = set_up(&SMALL_MAPS)?;
    let mut expectations = Expectations::default();
    scenario.publish(&scenario.service("here", 1), &scenario.endpoints(&["b"]))?;
    scenario.take_agent(1)?.terminate()?;
    let node = scenario.cluster.node(1);
    cleanup(&node)?;

    // No bpffs at --bpf-dir.
    let directory = tempfile::tempdir()?;
    let pins = directory.path().join("pins");
    let guard = Mounted(&pins);
    let mut command = lb_agent()?;
    command.args(["run", "--hostname-override", "node1", "--manifests"]);
    command.arg(scenario.manifests.path()).arg("--cgroup").arg(node.cgroup_tree().path());
    command.args(SMALL_MAPS).arg("--bpf-dir").arg(&pins);
    let mut agent = node.spawn_agent("elsewhere", command)?;
    let served = is_eventually(|| Ok(ask(&scenario, 1, PORT, Family::V4)?.is_some()))?;
    expectations.is_true(format!("not served with a new bpffs: {}", agent.tail()), served);
    let said = agent.stderr();
    let is_told = said.lines().any(|line| line.contains("mounted") && line.contains("bpffs"));
    expectations.is_true(format!("a mount is not told: {said}"), is_told);
    agent.kill()?;
    let mut command = lb_agent()?;
    command.args(["cleanup", "--bpf-dir"]).arg(&pins);
    node.output(command, PATIENCE)?;
    drop(guard);

    // No cgroup2 anywhere.
    let mut command = Command::new("unshare");
    let script = "umount -l \"$0\" && exec \"$@\"";
    command.args(["--mount", "sh", "-c", script]).arg(mount_point()?);
    command.arg(lb_agent()?.get_program());
    command.args(["run", "--hostname-override", "node1", "--manifests"]);
    command.arg(scenario.manifests.path()).arg("--bpf-dir").arg(node.bpf_dir()).args(SMALL_MAPS);
    let agent = node.spawn_agent("no-cgroup", command)?;
    let served = is_eventually(|| Ok(ask(&scenario, 1, PORT, Family::V4)?.is_some()))?;
    expectations.is_true(format!("not served without cgroup2: {}", agent.tail()), served);
    let said = agent.stderr();
    let is_told = |line: &str| line.contains("WARN") && line.contains("cgroup2");
    expectations.is_true(format!("no warning: {said}"), said.lines().any(is_told));
    let flows = agent::get(&node, "flows")?;
    let is_packets = flows.as_array().is_some_and(|flows| !flows.is_empty());
    expectations.is_true(format!("not by packets: {flows}"), is_packets);
    expectations.finish()
}

/// Publishes Services until one does not fit; returns its number.
fn fill(scenario: &mut Scenario, flag: &str) -> Result<u8> {
    for number in 1..=60 {
        let service = scenario.service(&format!("s{number}"), number);
        scenario.manifests.publish(&service, &scenario.endpoints(&["b"]))?;
        let name = service.name();
        let mut is_full = false;
        let decided = is_eventually(|| {
            let agent = scenario.agent(1)?;
            let log = agent.process().stderr();
            is_full = log.lines().any(|line| {
                line.contains(&name) && line.contains(flag) && line.contains("is full")
            });
            Ok(is_full || backends_of(scenario.agent(1)?, &service)? == Some(4))
        })?;
        ensure!(
            decided,
            "{name} is neither there nor refused: {}",
            scenario.agent(1)?.process().tail()
        );
        if is_full {
            return Ok(number);
        }
    }
    anyhow::bail!("all 60 Services fit: {}", scenario.agent(1)?.process().tail())
}

/// All Services are in one namespace, which may fill the maps.
const COMMON: [&str; 4] = ["--socket-lb", "off", "--max-namespace-share", "100"];

fn check_full(
    scenario: &mut Scenario,
    expectations: &mut Expectations,
    flag: &str,
    map: &str,
) -> Result<()> {
    let last = fill(scenario, flag)?;
    println!("{flag}: Service number {last} does not fit");
    ensure!(last > 2, "not even two Services fit");
    let log = scenario.agent(1)?.process().stderr();
    let is_told = log.lines().any(|line| line.contains(map) && line.contains(flag));
    expectations.is_true(format!("{flag}: no word of {map}: {log}"), is_told);
    for number in 1..last {
        let all = answered(scenario, number)?;
        expectations
            .is_true(format!("{flag}: number {number}: {all:?}"), all.iter().all(|one| *one));
    }
    let none = answered(scenario, last)?;
    expectations.is_true(format!("{flag}: half a Service: {none:?}"), none.iter().all(|one| !one));
    let (status, body) = scenario.agent(1)?.http(10256, "/livez")?;
    expectations.is_true(format!("{flag}: /livez {status} {body}"), status == 200);
    // A Service that grows beyond the map stays as it was.
    let first = scenario.service("s1", 1);
    let many: Vec<_> = (1..=200u8).map(|host| Endpoint::at([10, 244, 200, host])).collect();
    if flag != "--max-services" {
        let all = [scenario.endpoints(&["b"]), many].concat();
        scenario.manifests.endpoints(&first, &all)?;
        let is_told = is_eventually(|| {
            let log = scenario.agent(1)?.process().stderr();
            Ok(log.lines().any(|line| {
                line.contains("default/s1 ") && line.contains(flag)
                    || line.contains("default/s1\"") && line.contains(flag)
            }))
        })?;
        expectations.is_true(format!("{flag}: growing is not refused"), is_told);
        let all = answered(scenario, 1)?;
        expectations.is_true(format!("{flag}: grown: {all:?}"), all.iter().all(|one| *one));
    }
    scenario.delete(&first)?;
    let comes_in = is_eventually(|| Ok(answered(scenario, last)?.iter().all(|one| *one)))?;
    expectations.is_true(format!("{flag}: it does not come in when there is room"), comes_in);
    for number in 2..=last {
        scenario.manifests.delete(&scenario.service(&format!("s{number}"), number))?;
    }
    Ok(())
}

#[test]
fn a_service_that_does_not_fit_is_reported_and_the_others_are_served() -> Result<()> {
    let cases: [(&str, &str, &[&str]); 3] = [
        ("--max-services", "SERVICES", &["--max-services", "24"]),
        ("--max-backends", "BACKENDS", &["--max-backends", "10"]),
        ("--max-slots", "SLOTS", &["--max-slots", "24"]),
    ];
    let mut scenario = set_up(&[&COMMON[..], cases[0].2].concat())?;
    let mut expectations = Expectations::default();
    for (index, (flag, map, own)) in cases.into_iter().enumerate() {
        if index > 0 {
            scenario.take_agent(1)?.terminate()?;
            cleanup(&scenario.cluster.node(1))?;
            scenario.set_arguments(&[&COMMON[..], own].concat());
            scenario.start_agent(1)?;
        }
        check_full(&mut scenario, &mut expectations, flag, map).context(flag)?;
    }
    expectations.finish()
}

fn service(name: &str, number: u8, ports: Value) -> Value {
    let ip = cluster_ip(number).v4;
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"namespace": "default", "name": name},
        "spec": {"type": "ClusterIP", "clusterIP": ip, "clusterIPs": [ip], "ports": ports},
    })
}

fn slice(name: &str, number: u16, addresses: &[String], ports: Value) -> Value {
    let endpoints: Vec<_> = addresses.iter().map(|one| json!({"addresses": [one]})).collect();
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "namespace": "default", "name": format!("{name}-{number}"),
            "labels": {"kubernetes.io/service-name": name},
        },
        "addressType": "IPv4", "ports": ports, "endpoints": endpoints,
    })
}

fn port(name: &str, protocol: &str, number: u16) -> Value {
    json!({"name": name, "protocol": protocol, "port": number})
}

struct Objects<'a> {
    scenario: &'a mut Scenario,
    expectations: Expectations,
    b: String,
}

impl Objects<'_> {
    fn write(&self, objects: &[Value]) -> Result<()> {
        for object in objects {
            let name = object["metadata"]["name"].as_str().unwrap_or_default();
            let kind = object["kind"].as_str().unwrap_or_default();
            self.scenario.manifests.write(&format!("{kind}-{name}.json"), &object.to_string())?;
        }
        Ok(())
    }

    /// The port of a ClusterIP is served by `b`, soon.
    fn is_served(&mut self, what: &str, number: u8, port: u16) -> Result<()> {
        let scenario = &*self.scenario;
        let served = is_eventually(|| Ok(ask(scenario, number, port, Family::V4)?.is_some()))?;
        self.expectations.is_true(format!("{what}: port {port} is not served"), served);
        Ok(())
    }

    fn is_not_served(&mut self, what: &str, number: u8, port: u16) -> Result<()> {
        let found = ask(self.scenario, number, port, Family::V4)?;
        self.expectations
            .is_true(format!("{what}: port {port} is served by {found:?}"), found.is_none());
        Ok(())
    }

    /// The log has a line with all of these words.
    fn is_logged(&mut self, what: &str, words: &[&str]) -> Result<()> {
        let agent: &mut Agent = self.scenario.agent(1)?;
        let found = is_eventually(|| {
            let log = agent.process().stderr();
            Ok(log.lines().any(|line| words.iter().all(|word| line.contains(word))))
        })?;
        let tail = if found { String::new() } else { agent.process().tail() };
        self.expectations.is_true(format!("{what}: no line with {words:?}:\n{tail}"), found);
        Ok(())
    }

    fn backends(&mut self, what: &str, name: &str, wanted: u64) -> Result<()> {
        let agent: &mut Agent = self.scenario.agent(1)?;
        let mut found = None;
        let name = format!("default/{name}");
        let is_met = is_eventually(|| {
            let services = agent.get("services")?;
            let row = services.as_array().into_iter().flatten().find(|row| {
                row["name"].as_str().is_some_and(|text| text.split(':').next() == Some(&name))
            });
            found = row.and_then(|row| row["cluster_backends"].as_u64());
            Ok(found == Some(wanted))
        })?;
        self.expectations.is_true(format!("{what}: {found:?} backends, not {wanted}"), is_met);
        Ok(())
    }
}

fn check_ports(objects: &mut Objects<'_>) -> Result<()> {
    let web = || json!([port("web", "TCP", TARGET)]);
    let b = [objects.b.clone()];
    objects.write(&[service("no-ports", 11, json!([])), slice("no-ports", 1, &b, web())])?;
    let twice = json!([port("web", "TCP", 80), port("other", "TCP", 80), port("web2", "TCP", 82)]);
    let two = json!([port("web", "TCP", TARGET), port("web2", "TCP", TARGET)]);
    objects.write(&[slice("twice", 1, &b, two), service("twice", 12, twice)])?;
    objects.is_served("duplicate port", 12, 80)?;
    objects.is_served("beside a duplicate port", 12, 82)?;
    objects.is_logged("duplicate port", &["WARN", "twice"])?;
    let more = json!([port("web", "TCP", 80), port("lonely", "TCP", 81)]);
    objects.write(&[slice("lonely", 1, &b, web()), service("lonely", 13, more)])?;
    objects.is_served("beside a port without slice", 13, 80)?;
    objects.is_not_served("port without slice", 13, 81)?;
    let both = json!([port("sctp", "SCTP", 80), port("web", "TCP", 80)]);
    let ends = json!([port("sctp", "SCTP", TARGET), port("web", "TCP", TARGET)]);
    objects.write(&[slice("sctp", 1, &b, ends), service("sctp", 14, both)])?;
    objects.is_served("beside SCTP", 14, 80)?;
    objects.is_logged("SCTP", &["WARN", "default/sctp", "ProtocolNotSupported", "SCTP"])
}

fn check_slices(objects: &mut Objects<'_>) -> Result<()> {
    let web = || json!([port("web", "TCP", TARGET)]);
    let b = objects.b.clone();
    let both = [
        slice("both", 1, std::slice::from_ref(&b), web()),
        slice("both", 2, std::slice::from_ref(&b), web()),
    ];
    objects.write(&both)?;
    objects.write(&[service("both", 15, json!([port("web", "TCP", 80)]))])?;
    objects.is_served("in two slices", 15, 80)?;
    objects.backends("in two slices", "both", 1)?;
    let bad = [b.clone(), "10.244.1.300".to_owned(), "b.example".to_owned()];
    objects.write(&[slice("bad", 1, &bad, web())])?;
    objects.write(&[service("bad", 16, json!([port("web", "TCP", 80)]))])?;
    objects.is_served("beside a bad address", 16, 80)?;
    objects.backends("bad address", "bad", 1)?;
    objects.is_logged("bad address", &["WARN", "10.244.1.300"])?;
    let mut nowhere = service("nowhere", 17, json!([port("web", "TCP", 80)]));
    nowhere["spec"]["clusterIP"] = json!("10.96.0.400");
    nowhere["spec"]["clusterIPs"] = json!(["10.96.0.400"]);
    objects.write(&[nowhere])?;
    objects.is_logged("bad ClusterIP", &["WARN", "10.96.0.400"])?;
    objects.write(&[service("large", 18, json!([port("web", "TCP", 80)]))])?;
    for number in 0..10u16 {
        let addresses: Vec<_> =
            (1..=100).map(|host| format!("10.244.{}.{host}", 100 + number)).collect();
        objects.write(&[slice("large", number, &addresses, web())])?;
    }
    objects.backends("1,000 endpoints", "large", 1000)?;
    objects.write(&[slice("large", 0, std::slice::from_ref(&b), web())])?;
    objects.backends("901 endpoints", "large", 901)
}

fn check_files(objects: &mut Objects<'_>) -> Result<()> {
    let b = objects.b.clone();
    objects.write(&[slice("text", 1, &[b], json!([port("web", "TCP", TARGET)]))])?;
    let ip = cluster_ip(19).v4;
    let text = |port: &str| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata:\n  name: text\n  namespace: default\nspec:\n  \
             clusterIP: {ip}\n  clusterIPs: [{ip}]\n  ports:\n  - name: web\n    port: {port}\n"
        )
    };
    let manifests = |text: &str| objects.scenario.manifests.write("text.yaml", text);
    manifests(&text("80"))?;
    objects.is_served("good file", 19, 80)?;
    objects.scenario.manifests.write("text.yaml", &text("eighty"))?;
    objects.is_logged("wrong type", &["WARN", "text.yaml", "11", "port"])?;
    objects.is_served("what the file held before", 19, 80)?;
    objects.scenario.manifests.write("text.yaml", "apiVersion: v1\n  kind: [\n")?;
    objects.is_logged("no YAML", &["WARN", "text.yaml"])?;
    objects.is_served("what the file held before", 19, 80)?;
    objects.is_served("a good file beside it", 15, 80)?;
    objects.scenario.manifests.write("text.yaml", &text("83"))?;
    objects.is_served("repaired file", 19, 83)?;
    objects.is_not_served("repaired file", 19, 80)
}

#[test]
fn bad_objects_are_reported_and_the_others_are_served() -> Result<()> {
    let mut scenario = set_up(&[&["--socket-lb", "off"], &SMALL_MAPS[..]].concat())?;
    let b = scenario.cluster.pod("b").ip(Family::V4).to_string();
    let mut objects = Objects { scenario: &mut scenario, expectations: Expectations::default(), b };
    check_ports(&mut objects)?;
    check_slices(&mut objects)?;
    check_files(&mut objects)?;
    objects.expectations.finish()
}
