//! The control plane that other tests build on: its controllers write the
//! slices that lb has to understand, and it goes away without a trace.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{self, Command, Output};
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use lb_tests::harness::controlplane::objects::{Endpoint, Pod};
use lb_tests::harness::controlplane::{ControlPlane, Options};

const LISTEN_ADDRESS: &str = "192.0.2.10";
const LISTEN_ADDRESS_6: &str = "2001:db8::10";
const DEADLINE: Duration = Duration::from_secs(20);

const SERVICE: &str = "
apiVersion: v1
kind: Service
metadata: {name: web, namespace: default}
spec:
  selector: {app: web}
  ipFamilyPolicy: RequireDualStack
  ports: [{name: http, port: 80, targetPort: 8080}]
";

/// A network namespace with nothing but its loopback interface.
struct Namespace(String);

impl Namespace {
    fn new(suffix: &str) -> Result<Self> {
        let namespace = Self(format!("lb-cp-{}-{suffix}", process::id()));
        let name = namespace.0.as_str();
        ip(&["netns", "add", name])?;
        ip(&["-n", name, "link", "set", "lo", "up"])?;
        for address in [LISTEN_ADDRESS, LISTEN_ADDRESS_6] {
            ip(&["-n", name, "address", "add", address, "dev", "lo"])?;
        }
        Ok(namespace)
    }

    fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.0)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if let Err(error) = ip(&["netns", "delete", &self.0]) {
            eprintln!("{error:#}");
        }
    }
}

fn ip(arguments: &[&str]) -> Result<()> {
    let status = Command::new("ip").args(arguments).status()?;
    ensure!(status.success(), "ip {arguments:?}: {status}");
    Ok(())
}

fn address(text: &str) -> IpAddr {
    text.parse().expect("an address literal")
}

fn start(namespace: &Namespace) -> Result<ControlPlane> {
    ControlPlane::start(&namespace.path(), address(LISTEN_ADDRESS), Options::default())
}

fn endpoint(text: &str, node: &str) -> Endpoint {
    Endpoint {
        address: address(text),
        ready: true,
        serving: true,
        terminating: false,
        node: Some(node.to_owned()),
        ports: vec![("http".to_owned(), 8080)],
    }
}

/// Two nodes, and on each a pod of the Service with an address of each family.
fn populate(plane: &ControlPlane) -> Result<()> {
    plane.create_node("node-a", &[address("192.0.2.1"), address("fd00::1")])?;
    plane.create_node("node-b", &[address("192.0.2.2")])?;
    plane.apply(SERVICE)?;
    let pod = Pod {
        namespace: "default",
        name: "web-a",
        labels: &[("app", "web")],
        node: "node-a",
        addresses: &[address("10.0.1.2"), address("fd00:0:1::2")],
        ready: true,
    };
    let other = Pod {
        name: "web-b",
        node: "node-b",
        addresses: &[address("10.0.2.2"), address("fd00:0:2::2")],
        ..pod
    };
    plane.create_pods(&[pod, other])
}

fn all_ready() -> Vec<Endpoint> {
    vec![
        endpoint("10.0.1.2", "node-a"),
        endpoint("10.0.2.2", "node-b"),
        endpoint("fd00:0:1::2", "node-a"),
        endpoint("fd00:0:2::2", "node-b"),
    ]
}

fn expect(plane: &mut ControlPlane, endpoints: &[Endpoint]) -> Result<()> {
    plane.wait_for_slice("default", "web", DEADLINE, |now| now == endpoints)?;
    Ok(())
}

fn may(plane: &ControlPlane, verb: &str, resource: &str) -> Result<bool> {
    let kubeconfig = plane.agent_kubeconfig();
    let arguments = ["auth", "can-i", verb, resource, "--all-namespaces", "--kubeconfig"];
    let mut command = plane.kubectl_command(arguments)?;
    let answer = command.arg(kubeconfig).output()?;
    match String::from_utf8_lossy(&answer.stdout).trim() {
        "yes" => Ok(true),
        "no" => Ok(false),
        _ => bail!("kubectl auth can-i {verb} {resource}: {answer:?}"),
    }
}

#[test]
fn controllers_write_slices_from_the_status_of_pods() -> Result<()> {
    let namespace = Namespace::new("slices")?;
    let mut plane = start(&namespace)?;
    populate(&plane)?;
    expect(&mut plane, &all_ready())?;

    plane.set_ready("default", "web-a", false)?;
    let mut endpoints = all_ready();
    for endpoint in [0, 2] {
        endpoints[endpoint].ready = false;
        endpoints[endpoint].serving = false;
    }
    expect(&mut plane, &endpoints)?;
    plane.set_ready("default", "web-a", true)?;
    expect(&mut plane, &all_ready())?;

    plane.delete_pod("default", "web-b", Duration::from_secs(600))?;
    let mut endpoints = all_ready();
    for endpoint in [1, 3] {
        endpoints[endpoint].ready = false;
        endpoints[endpoint].terminating = true;
    }
    expect(&mut plane, &endpoints)?;

    plane.delete_pod("default", "web-b", Duration::ZERO)?;
    let mut endpoints = all_ready();
    endpoints.retain(|endpoint| endpoint.node.as_deref() == Some("node-a"));
    expect(&mut plane, &endpoints)?;
    plane.stop()
}

#[test]
fn the_api_server_comes_back_with_its_data() -> Result<()> {
    let namespace = Namespace::new("restart")?;
    let mut plane = start(&namespace)?;
    populate(&plane)?;
    expect(&mut plane, &all_ready())?;

    plane.stop_api_server()?;
    assert!(plane.endpoints("default", "web").is_err());
    plane.start_api_server()?;
    assert_eq!(plane.endpoints("default", "web")?, all_ready());

    plane.delete_pod("default", "web-a", Duration::ZERO)?;
    let mut endpoints = all_ready();
    endpoints.retain(|endpoint| endpoint.node.as_deref() == Some("node-b"));
    expect(&mut plane, &endpoints)?;
    plane.stop()
}

/// What a client gets that asks for a list as a stream (KEP-3157).
fn streaming_list(plane: &ControlPlane) -> Result<Output> {
    plane.kubectl([
        "get",
        "--raw",
        "/api/v1/services?watch=1&sendInitialEvents=true&allowWatchBookmarks=true\
         &resourceVersionMatch=NotOlderThan&timeoutSeconds=1",
    ])
}

#[test]
fn the_api_server_streams_lists_unless_told_otherwise() -> Result<()> {
    let namespace = Namespace::new("stream")?;
    let plane = start(&namespace)?;
    let stream = String::from_utf8(streaming_list(&plane)?.stdout)?;
    assert!(stream.contains("k8s.io/initial-events-end"), "{stream}");
    plane.stop()?;

    let options = Options {
        api_server_arguments: vec!["--feature-gates=WatchList=false".to_owned()],
        ..Options::default()
    };
    let plane = ControlPlane::start(&namespace.path(), address(LISTEN_ADDRESS), options)?;
    let refusal = streaming_list(&plane)?;
    assert!(!refusal.status.success(), "{refusal:?}");
    plane.stop()
}

#[test]
fn the_agent_reads_what_it_programs_and_writes_events_alone() -> Result<()> {
    let namespace = Namespace::new("rbac")?;
    let plane = start(&namespace)?;
    for resource in
        ["services", "nodes", "endpointslices.discovery.k8s.io", "servicecidrs.networking.k8s.io"]
    {
        for verb in ["get", "list", "watch"] {
            assert!(may(&plane, verb, resource)?, "{verb} {resource}");
        }
        for verb in ["create", "update", "patch", "delete"] {
            assert!(!may(&plane, verb, resource)?, "{verb} {resource}");
        }
    }
    for resource in ["events", "events.events.k8s.io"] {
        assert!(may(&plane, "create", resource)?, "create {resource}");
        assert!(may(&plane, "patch", resource)?, "patch {resource}");
    }
    assert!(!may(&plane, "list", "secrets")?);
    assert!(!may(&plane, "update", "services/status")?);
    plane.stop()
}

#[test]
fn nothing_is_left_of_a_control_plane_and_another_can_follow() -> Result<()> {
    let namespace = Namespace::new("again")?;
    for listen_address in [LISTEN_ADDRESS, LISTEN_ADDRESS_6] {
        let plane =
            ControlPlane::start(&namespace.path(), address(listen_address), Options::default())?;
        plane.apply(SERVICE)?;
        let (ids, directory) = (plane.process_ids(), plane.directory().to_owned());
        assert_eq!(ids.len(), 3);
        drop(plane);
        for id in ids {
            assert!(!Path::new(&format!("/proc/{id}")).exists(), "process {id}");
        }
        assert!(!directory.exists(), "{}", directory.display());
    }
    Ok(())
}
