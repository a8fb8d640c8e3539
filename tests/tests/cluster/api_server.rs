//! Several API servers, one of which serves: found, left when it fails, and remembered.

mod certificate;
mod proxy;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use certificate::Authority;
use lb_tests::harness::controlplane::Options;
use lb_tests::harness::controlplane::live::{LiveCluster, PORT, TARGET, service};
use lb_tests::harness::controlplane::peer::{Peer, add_addresses};
use lb_tests::harness::echo::Probe;
use lb_tests::harness::netns::actors::agent;
use lb_tests::harness::netns::actors::process::Process;
use lb_tests::harness::netns::topology::cluster::Cluster;
use lb_tests::harness::netns::topology::node::Node;
use lb_tests::harness::netns::topology::plan::{Family, cluster_ip};
use lb_tests::harness::wait::{PATIENCE, eventually};
use proxy::Proxy;
use serde_json::json;
use tempfile::TempDir;

/// The address of the second API server, of a machine that answers strangely, and of one that
/// is not there.
const PEER: Ipv4Addr = Ipv4Addr::new(172, 18, 0, 201);
const STRANGE: Ipv4Addr = Ipv4Addr::new(172, 18, 0, 202);
const NOBODY: &str = "https://172.18.0.203:6443";

/// Maps that are soon read.
const SMALL: [&str; 6] =
    ["--max-services", "8192", "--max-backends", "8192", "--max-slots", "16384"];

/// A server on the fabric that takes connections and, unless it hangs, answers each with a
/// status. It ends when it is dropped.
struct Stub {
    address: SocketAddr,
    ends: Arc<AtomicBool>,
    server: Option<JoinHandle<()>>,
}

impl Stub {
    fn start(live: &LiveCluster, port: u16, status: Option<&'static str>) -> Result<Self> {
        let address = SocketAddr::new(STRANGE.into(), port);
        let listener = live.cluster.fabric().netns().run(|| Ok(TcpListener::bind(address)?))?;
        listener.set_nonblocking(true)?;
        let ends = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&ends);
        let server = thread::spawn(move || {
            let mut held = Vec::new();
            while !flag.load(Ordering::Relaxed) {
                match (listener.accept(), status) {
                    (Ok((mut stream, _)), Some(status)) => {
                        let mut request = [0; 2048];
                        stream.set_read_timeout(Some(Duration::from_secs(1))).ok();
                        let _asked = stream.read(&mut request).unwrap_or_default();
                        let head = format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\n");
                        write!(stream, "{head}Connection: close\r\n\r\n").ok();
                    }
                    (Ok((stream, _)), None) => held.push(stream),
                    (Err(_), _) => thread::sleep(Duration::from_millis(5)),
                }
            }
        });
        Ok(Self { address, ends, server: Some(server) })
    }
}

impl Drop for Stub {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        if let Some(server) = self.server.take() {
            server.join().ok();
        }
    }
}

fn world() -> Result<LiveCluster> {
    let builder = Cluster::builder().nodes(1).pod(1, "a").pod(1, "b");
    let live = LiveCluster::start(builder, Options::default())?;
    let [peer, strange] = [PEER, STRANGE].map(|address| address.to_string());
    add_addresses(live.cluster.fabric().netns(), &[&peer, &strange])?;
    Ok(live)
}

fn first_url(live: &LiveCluster) -> String {
    format!("https://{}", live.plane.api_server_address())
}

/// The lines of the agent's log that have a text.
fn lines(live: &mut LiveCluster, text: &str) -> Result<usize> {
    let log = live.agent(1)?.process().stderr();
    Ok(log.lines().filter(|line| line.contains(text)).count())
}

#[test]
fn a_server_that_cannot_serve_is_passed_over_and_the_log_says_why() -> Result<()> {
    let mut live = world()?;
    let denies = live.plane.start_peer(PEER.into(), &["--authorization-mode=AlwaysDeny"])?;
    let trusting = live.plane.agent_kubeconfig_for(&[&denies])?;
    let distrusting = live.plane.agent_kubeconfig();
    let good = first_url(&live);
    let unavailable = Stub::start(&live, 8080, Some("503 Service Unavailable"))?;
    let missing = Stub::start(&live, 8081, Some("404 Not Found"))?;
    let hanging = Stub::start(&live, 8443, None)?;
    let http = |stub: &Stub| format!("http://{}", stub.address);
    let cases = [
        (NOBODY.to_owned(), "No route to host", &trusting),
        (format!("https://{STRANGE}:1"), "Connection refused", &trusting),
        (format!("https://{}", hanging.address), "no connection within 5s", &trusting),
        (http(&unavailable), "503", &trusting),
        (http(&missing), "404", &trusting),
        (denies.url(), "403 services is forbidden", &trusting),
        (denies.url(), "UnknownIssuer", &distrusting),
        (
            "https://api.nowhere.invalid:6443".to_owned(),
            "api.nowhere.invalid does not resolve",
            &trusting,
        ),
    ];
    for (bad, reason, kubeconfig) in cases {
        let options = agent::Options::kubeconfig(kubeconfig).arguments(&SMALL);
        let masters = format!("{bad},{good}");
        let state = live.cluster.node(1).state_dir();
        std::fs::remove_dir_all(&state).ok();
        live.spawn_agent_with(1, &options.arguments(&["--master", &masters]))?.wait_ready()?;
        let log = live.agent(1)?.process().stderr();
        let down = format!("cannot serve: trying the next one server={bad}/");
        let is_said = log.lines().any(|line| line.contains(&down) && line.contains(reason));
        ensure!(is_said, "{bad}: no line with {reason:?}:\n{log}");
        let found = format!("answers: watching it server={good}/");
        ensure!(log.contains(&found), "{bad}: {found:?} is missing:\n{log}");
        live.take_agent(1)?.terminate()?;
    }
    denies.kill()
}

/// A Service with one endpoint, made with the help of another API server.
fn create_at(live: &LiveCluster, peer: &Peer, name: &str, number: u8, pod: &str) -> Result<()> {
    let [server, authority] = peer.kubectl_arguments();
    let mut service = service(name, number);
    service["spec"].as_object_mut().context("a spec")?.remove("selector");
    let address = live.cluster.pod(pod).ip(Family::V4);
    let ports = service["spec"]["ports"].as_array().context("ports")?.iter();
    let ports: Vec<_> = ports
        .map(|port| json!({"name": port["name"], "protocol": port["protocol"], "port": TARGET}))
        .collect();
    let slice = json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"namespace": "default", "name": format!("{name}-1"),
                     "labels": {"kubernetes.io/service-name": name}},
        "addressType": "IPv4",
        "endpoints": [{"addresses": [address], "nodeName": "node1"}],
        "ports": ports,
    });
    for object in [service, slice] {
        let file = live.plane.directory().join("object.json");
        std::fs::write(&file, object.to_string())?;
        let path = file.to_string_lossy().into_owned();
        live.kubectl(&["apply", "-f", &path, &server, &authority])?;
    }
    Ok(())
}

fn ensure_served(live: &LiveCluster, number: u8) -> Result<()> {
    let a = live.cluster.pod("a");
    let start = Instant::now();
    while a.tcp((cluster_ip(number).v4, PORT).into())?.name() != Some("b") {
        ensure!(start.elapsed() < PATIENCE, "Service {number} is not served");
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

#[test]
fn a_watch_goes_on_at_the_next_server_and_a_restart_finds_the_learned_one() -> Result<()> {
    let mut live = world()?;
    let peer = live.plane.start_peer(PEER.into(), &[])?;
    live.serve(&["b"])?;
    live.create_pods("web", &["b"])?;
    live.create_service("web", 20)?;
    let kubeconfig = live.plane.agent_kubeconfig_for(&[&peer])?;
    let options = agent::Options::kubeconfig(&kubeconfig).arguments(&SMALL);
    let masters = format!("{},{}", first_url(&live), peer.url());
    let both = options.clone().arguments(&["--master", &masters]);
    live.spawn_agent_with(1, &both)?.wait_ready()?;
    live.wait_backends("web", Some(1))?;
    let load = live.cluster.pod("a").load(
        &Probe::tcp((cluster_ip(20).v4, PORT).into()),
        100,
        Duration::from_secs(60),
    )?;
    let listed = lines(&mut live, "listed kind=Service ")?;

    live.plane.stop_api_server()?;
    let found = format!("answers: watching it server={}/", peer.url());
    live.wait_log(1, &found)?;
    create_at(&live, &peer, "more", 21, "b")?;
    ensure_served(&live, 21)?;
    ensure!(lines(&mut live, "listed kind=Service ")? == listed, "it listed again");
    let (status, said) = live.agent(1)?.http(10256, "/healthz")?;
    ensure!(status == 200, "{status} {said}");
    let report = load.stop()?;
    ensure!(report.failures() == 0, "{report:?}");

    // Both endpoints of default/kubernetes are on the disk: a dead list is no obstacle.
    live.take_agent(1)?.terminate()?;
    let state = std::fs::read_to_string(live.cluster.node(1).state_dir().join("api-servers.json"))?;
    ensure!(state.contains(&peer.address().to_string()), "{state}");
    let dead = options.arguments(&["--master", NOBODY]);
    live.spawn_agent_with(1, &dead)?.wait_ready()?;
    let learned = format!("{found} learned=true");
    ensure!(lines(&mut live, &learned)? == 1, "{}", live.agent(1)?.process().tail());
    create_at(&live, &peer, "last", 22, "b")?;
    ensure_served(&live, 22)?;

    // A file that is damaged is said and ignored.
    live.take_agent(1)?.terminate()?;
    let file = live.cluster.node(1).state_dir().join("api-servers.json");
    std::fs::write(&file, &state[..state.len() / 2])?;
    live.spawn_agent_with(1, &dead)?;
    live.wait_log(1, "not usable and ignored")?;
    live.wait_log(1, "no API server serves")?;
    Ok(())
}

#[test]
fn a_proxy_is_used_unless_no_proxy_names_the_server() -> Result<()> {
    let mut live = world()?;
    let address = SocketAddr::new(STRANGE.into(), 3128);
    let proxy = Proxy::start(live.cluster.fabric().netns(), address)?;
    let kubeconfig = live.plane.agent_kubeconfig();
    for (excluded, is_used) in
        [("", true), ("10.0.0.0/8,172.18.0.0/24", false), ("10.0.0.0/8", true)]
    {
        let options = agent::Options::kubeconfig(&kubeconfig)
            .arguments(&SMALL)
            .variable("HTTPS_PROXY", &format!("http://{address}"))
            .variable("NO_PROXY", excluded);
        live.spawn_agent_with(1, &options)?.wait_ready()?;
        live.take_agent(1)?.terminate()?;
        let opened = proxy.take();
        ensure!((opened > 0) == is_used, "NO_PROXY={excluded}: {opened} tunnels");
    }
    // A proxy that is not there is named by what the connection says.
    let options = agent::Options::kubeconfig(&kubeconfig)
        .arguments(&SMALL)
        .variable("https_proxy", &format!("http://{STRANGE}:1"));
    live.spawn_agent_with(1, &options)?;
    live.wait_log(1, "Connection refused")?;
    Ok(())
}

#[test]
fn a_token_that_is_rewritten_is_used_without_an_error() -> Result<()> {
    let mut live = world()?;
    let bound = |name: &str| {
        live.kubectl(&["create", "secret", "generic", name, "-n", "kube-system"])?;
        let object = format!("--bound-object-name={name}");
        live.plane.agent_token(&["--bound-object-kind=Secret", &object])
    };
    let (first, second) = (bound("first")?, bound("second")?);
    let (kubeconfig, file) = live.plane.agent_kubeconfig_with_token_file(&first)?;
    let options = agent::Options::kubeconfig(&kubeconfig).arguments(&SMALL);
    live.spawn_agent_with(1, &options)?.wait_ready()?;

    std::fs::write(&file, &second)?;
    live.kubectl(&["delete", "secret", "first", "-n", "kube-system"])?;
    let put = |token: &str| Ok(std::fs::write(&file, token)?);
    check_replaced(&mut live, || put(&first), || put(&second))
}

/// The agent's credentials were replaced while its watches run, and the old ones are worth nothing
/// any more when the watches begin again. It has used the new ones if it is refused with the old
/// ones, which are put back for that.
fn check_replaced(
    live: &mut LiveCluster,
    put_old: impl FnOnce() -> Result<()>,
    put_new: impl FnOnce() -> Result<()>,
) -> Result<()> {
    live.plane.stop_api_server()?;
    live.plane.start_api_server()?;
    live.create_service("web", 20)?;
    live.wait_backends("web", Some(0))?;
    let log = live.agent(1)?.process().stderr();
    ensure!(!log.contains("401 Unauthorized"), "{log}");

    put_old()?;
    live.plane.stop_api_server()?;
    live.plane.start_api_server()?;
    live.wait_log(1, "401 Unauthorized")?;
    put_new()?;
    live.create_service("more", 21)?;
    live.wait_backends("more", Some(0))
}

#[test]
fn a_client_certificate_that_is_replaced_is_used_without_an_error() -> Result<()> {
    const USER: &str = "system:serviceaccount:kube-system:lb-agent";
    let directory = tempfile::tempdir()?;
    let (first, second) =
        (Authority::make(directory.path(), "one")?, Authority::make(directory.path(), "two")?);
    // Those whose certificates the API server believes, from its next start on.
    let trusted = directory.path().join("trusted.crt");
    let trust = |authorities: &[&Authority]| -> Result<()> {
        let all: Result<Vec<_>> = authorities.iter().map(|one| one.certificate()).collect();
        Ok(std::fs::write(&trusted, all?.concat())?)
    };
    trust(&[&first, &second])?;
    let options = Options {
        api_server_arguments: vec![format!("--client-ca-file={}", trusted.display())],
        ..Options::default()
    };
    let builder = Cluster::builder().nodes(1);
    let mut live = LiveCluster::start(builder, options)?;
    let (of_first, of_second) = (first.sign(USER)?, second.sign(USER)?);
    let (certificate, key) =
        (directory.path().join("client.crt"), directory.path().join("client.key"));
    let put = |pair: &certificate::Pair| pair.put(&certificate, &key);
    put(&of_first)?;
    let kubeconfig = live.plane.agent_kubeconfig_with_certificate(&certificate, &key)?;
    let options = agent::Options::kubeconfig(&kubeconfig).arguments(&SMALL);
    live.spawn_agent_with(1, &options)?.wait_ready()?;

    put(&of_second)?;
    trust(&[&second])?;
    check_replaced(&mut live, || put(&of_first), || put(&of_second))
}

#[test]
fn the_cluster_ip_of_the_api_server_is_served_before_the_first_list() -> Result<()> {
    let mut live = world()?;
    live.serve(&["b"])?;
    let peer = live.plane.start_peer(PEER.into(), &[])?;
    let kubeconfig = live.plane.agent_kubeconfig_for(&[&peer])?;
    let url = peer.url();
    peer.kill()?;
    // What an earlier run might have left: the endpoint is a pod that can be recognised.
    let state = live.cluster.node(1).state_dir();
    std::fs::create_dir_all(&state)?;
    let endpoint = live.cluster.pod("b").at(Family::V4, TARGET);
    let known = json!({"format": 1, "clusterIPs": ["10.96.0.1"], "port": 443,
                       "endpoints": [endpoint]});
    std::fs::write(state.join("api-servers.json"), known.to_string())?;
    let options = agent::Options::kubeconfig(&kubeconfig).arguments(&SMALL);
    let options = options.arguments(&["--master", &url, "--socket-lb", "off"]);
    live.spawn_agent_with(1, &options)?;
    live.wait_log(1, "serving the ClusterIP of default/kubernetes from learned endpoints")?;
    let a = live.cluster.pod("a");
    let api = SocketAddr::from((Ipv4Addr::new(10, 96, 0, 1), 443));
    let answer = a.tcp(api)?;
    ensure!(answer.name() == Some("b"), "{answer:?}");
    let (status, _) = live.agent(1)?.http(10256, "/livez")?;
    ensure!(status == 503, "healthy before the first list");
    let connection = a.open(Probe::tcp(api))?;

    // The first lists put the real endpoints in, and the open connection stays.
    let _peer = live.plane.start_peer(PEER.into(), &[])?;
    live.agent(1)?.wait_ready()?;
    let answer = live.curl(&a, &["--insecure", "https://10.96.0.1/livez"])?;
    ensure!(answer == "ok", "{answer}");
    let again = connection.exchange("again", Duration::from_secs(5))?;
    ensure!(again.name() == Some("b"), "{again:?}");

    // Maps that hold something are left alone at the next start.
    live.take_agent(1)?.terminate()?;
    live.spawn_agent_with(1, &options)?.wait_ready()?;
    ensure!(lines(&mut live, "from learned endpoints")? == 0, "it was programmed again");
    Ok(())
}

/// Runs the agent as in a pod: its credentials where a kubelet puts them.
const IN_CLUSTER: &str = r#"#!/bin/sh
set -e
if [ -z "$INSIDE" ]; then
    INSIDE=1 exec unshare --mount --propagation private sh "$0" "$@"
fi
mount -t tmpfs none /run
mkdir -p /run/secrets/kubernetes.io/serviceaccount
cp "$SECRETS"/* /run/secrets/kubernetes.io/serviceaccount/
exec "$@"
"#;

/// The files of a pod of the agent's ServiceAccount.
struct InCluster {
    secrets: TempDir,
    tools: TempDir,
    node: Arc<Node>,
}

impl InCluster {
    fn new(live: &LiveCluster) -> Result<Self> {
        let secrets = tempfile::tempdir()?;
        std::fs::write(secrets.path().join("token"), live.plane.agent_token(&[])?)?;
        std::fs::write(secrets.path().join("namespace"), "kube-system")?;
        let authority = live.plane.directory().join("apiserver.crt");
        std::fs::copy(authority, secrets.path().join("ca.crt"))?;
        let tools = tempfile::tempdir()?;
        std::fs::write(tools.path().join("in-cluster"), IN_CLUSTER)?;
        Ok(Self { secrets, tools, node: live.cluster.node(1) })
    }

    /// Starts the agent in such a pod, with these variables.
    fn run(&self, host: &str, port: &str, variables: &[(&str, &str)]) -> Result<Process> {
        let node = &self.node;
        let mut command = std::process::Command::new("sh");
        command.arg(self.tools.path().join("in-cluster"));
        command.arg(agent::lb_agent()?.get_program()).arg("run").args(SMALL);
        command.args(["--hostname-override", node.name()]).arg("--bpf-dir").arg(node.bpf_dir());
        command.arg("--cgroup").arg(node.cgroup_tree().path()).arg("--state-dir=");
        command.env("SECRETS", self.secrets.path());
        command.env("KUBERNETES_SERVICE_HOST", host).env("KUBERNETES_SERVICE_PORT", port);
        command.envs(variables.iter().copied());
        node.spawn_agent("in-cluster", command)
    }
}

/// Waits for a text in the log.
fn wait(process: &Process, text: &str) -> Result<()> {
    eventually(|| {
        let log = process.stderr();
        ensure!(log.contains(text), "no {text:?} in\n{log}");
        Ok(())
    })
}

#[test]
fn an_in_cluster_address_that_nobody_serves_is_told_with_what_to_set() -> Result<()> {
    let live = world()?;
    let pod = InCluster::new(&live)?;
    let mut process = pod.run("10.96.0.1", "443", &[])?;
    wait(&process, "give --master URL[,URL...], or set KUBERNETES_SERVICE_HOST")?;
    process.kill()?;
    let server = live.plane.api_server_address();
    let mut process = pod.run(&server.ip().to_string(), &server.port().to_string(), &[])?;
    wait(&process, " programmed services=")?;
    process.kill()?;
    Ok(())
}

#[test]
fn proxies_are_used_in_a_pod_as_with_a_kubeconfig() -> Result<()> {
    let live = world()?;
    let pod = InCluster::new(&live)?;
    let address = SocketAddr::new(STRANGE.into(), 3128);
    let proxy = Proxy::start(live.cluster.fabric().netns(), address)?;
    let server = live.plane.api_server_address();
    let (host, port) = (server.ip().to_string(), server.port().to_string());
    let (http, socks) = (format!("http://{address}"), format!("socks5://{address}"));
    for (url, excluded, is_used) in [
        (&http, "", true),
        (&http, "172.18.0.0/24", false),
        (&http, &*host, false),
        (&socks, "", true),
        (&socks, "172.18.0.0/24", false),
    ] {
        let variables = [("HTTPS_PROXY", url.as_str()), ("NO_PROXY", excluded)];
        let mut process = pod.run(&host, &port, &variables)?;
        wait(&process, " programmed services=")?;
        process.kill()?;
        let opened = proxy.take();
        ensure!((opened > 0) == is_used, "{url}, NO_PROXY={excluded}: {opened} tunnels");
    }
    // One that the agent cannot use ends the start, with what it could.
    let variables = [("HTTPS_PROXY", "socks4://172.18.0.202:1080")];
    let mut process = pod.run(&host, &port, &variables)?;
    let status = process.wait(PATIENCE)?;
    let said = process.stderr();
    let words = ["HTTPS_PROXY", "socks4://172.18.0.202:1080", "socks5://"];
    let is_said = words.iter().all(|word| said.contains(word));
    ensure!(status.code() == Some(1) && is_said, "{status}: {said}");
    Ok(())
}
