//! The cluster of network namespaces itself, without a load balancer in it.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lb_tests::harness::echo::{Answer, Probe, Transport};
use lb_tests::harness::netns::actors::agent::{Agent, Options};
use lb_tests::harness::netns::actors::host::{Host, Serve};
use lb_tests::harness::netns::topology::cgroup;
use lb_tests::harness::netns::topology::cluster::{Builder, Cluster};
use lb_tests::harness::netns::topology::cni::Cni;
use lb_tests::harness::netns::topology::plan::{self, Family};
use lb_tests::harness::netns::words::manifests::{Endpoint, Manifests, Service};

const PORT: u16 = 8080;
const HTTP: u16 = 8081;

/// Asks the server at `to` by both transports, and checks who answered and whom it saw.
fn check(client: &Host, server: &Host, family: Family, seen: &Host) -> Result<()> {
    for transport in [Transport::Tcp, Transport::Udp] {
        let probe = Probe::new(transport, server.at(family, PORT));
        let what = format!("{} -> {}, {transport:?} {family:?}", client.name(), server.name());
        let answer = client.ask(probe.clone())?;
        let reached = answer.reached().with_context(|| format!("{what}: {answer:?}"))?;
        ensure!(reached.greeting.name == server.name(), "{what}: {answer:?}");
        ensure!(reached.greeting.client_address == seen.ip(family), "{what}: {answer:?}");
        ensure!(reached.greeting.local_address == probe.to, "{what}: {answer:?}");
        ensure!(reached.peer == probe.to, "{what}: {answer:?}");
    }
    Ok(())
}

fn five_pods(cni: Cni) -> Builder {
    Cluster::builder().cni(cni).pod(1, "a").pod(1, "b").pod(2, "c").pod(2, "d").pod(2, "e")
}

/// Every pair that a network without Services promises to join.
fn check_all_pairs(cluster: &Cluster) -> Result<()> {
    let pods = ["a", "b", "c"].map(|name| cluster.pod(name));
    let (node1, node2) = (cluster.node(1), cluster.node(2));
    let outside = cluster.outside();
    let serve = Serve::on(PORT);
    let _servers = [pods[0].serve(&serve)?, pods[1].serve(&serve)?, pods[2].serve(&serve)?];
    let _node_server = node1.serve(&serve)?;
    for family in Family::ALL {
        for client in &pods {
            for server in &pods {
                check(client, server, family, client)?;
            }
        }
        // The node's address nearest to its pod, which under a bridge is the bridge's.
        let near = node1.tcp(pods[0].at(family, PORT))?;
        ensure!(near.name() == Some("a"), "{near:?}");
        check(&node2, &pods[0], family, &node2)?;
        check(&node2, &node1, family, &node2)?;
        check(outside, &node1, family, outside)?;
        check(outside, &pods[2], family, outside)?;
    }
    Ok(())
}

#[test]
fn point_to_point_pods_reach_each_other_with_their_own_address() -> Result<()> {
    let start = Instant::now();
    let cluster = five_pods(Cni::PointToPoint).build()?;
    let took = start.elapsed();
    check_all_pairs(&cluster)?;
    let (node1, d) = (cluster.node(1), cluster.pod("d"));
    let _server = d.serve(&Serve::on(PORT))?;
    for family in Family::ALL {
        check(&node1, &d, family, &node1)?;
    }
    eprintln!("2 nodes and 5 pods took {took:?}");
    Ok(())
}

#[test]
fn bridged_pods_reach_each_other_with_their_own_address() -> Result<()> {
    check_all_pairs(&five_pods(Cni::Bridge).build()?)
}

#[test]
fn an_overlay_hides_pods_from_the_network_and_the_network_drops_their_addresses() -> Result<()> {
    let cluster = five_pods(Cni::Vxlan).build()?;
    let (a, c, node1) = (cluster.pod("a"), cluster.pod("c"), cluster.node(1));
    let serve = Serve::on(PORT);
    let _servers = [a.serve(&serve)?, c.serve(&serve)?];
    for family in Family::ALL {
        check(&a, &c, family, &a)?;
        let overlay = node1.source_addresses(family)[1];
        let answer = node1.ask(Probe::tcp(c.at(family, PORT)))?;
        let reached = answer.reached().with_context(|| format!("{answer:?}"))?;
        ensure!(reached.greeting.client_address == overlay, "{answer:?}");
    }
    let fabric = cluster.fabric();
    ensure!(fabric.foreign_packets_from(1)? == 0, "packets of the overlay count as foreign");
    // Without the overlay, the same packets have a source that the network does not know.
    let [pod, node2] = [c.ip(Family::V4), cluster.node(2).ip(Family::V4)];
    node1.netns().ip(&format!("route add {pod}/32 via {node2}"))?;
    let answer = a.ask(Probe::tcp(c.at(Family::V4, PORT)).timeout(Duration::from_millis(200)))?;
    ensure!(answer.reached().is_none(), "{answer:?}");
    ensure!(fabric.foreign_packets_from(1)? > 0, "nothing was dropped");
    Ok(())
}

#[test]
fn the_rules_of_other_software_let_the_network_work() -> Result<()> {
    for cni in [Cni::PointToPoint, Cni::Bridge] {
        for rp_filter in [0, 1] {
            let cluster = five_pods(cni)
                .rp_filter(rp_filter)
                .drop_invalid()
                .forward_policy()
                .hairpin()
                .no_tx_checksum_offload()
                .no_bridge_netfilter()
                .build()?;
            let (a, c, outside) = (cluster.pod("a"), cluster.pod("c"), cluster.outside());
            let serve = Serve::on(PORT);
            let _servers = [a.serve(&serve)?, c.serve(&serve)?, outside.serve(&serve)?];
            for family in Family::ALL {
                check(&a, &c, family, &a)?;
                check(&a, &a, family, &a)?;
                check(&a, outside, family, &a)?;
                check(outside, &a, family, outside)?;
            }
        }
    }
    Ok(())
}

#[test]
fn masquerade_shows_the_node_outside_and_the_pod_inside() -> Result<()> {
    let cluster = five_pods(Cni::PointToPoint).masquerade().build()?;
    let (a, c, outside) = (cluster.pod("a"), cluster.pod("c"), cluster.outside());
    let serve = Serve::on(PORT);
    let _servers = [c.serve(&serve)?, outside.serve(&serve)?];
    for family in Family::ALL {
        check(&a, &c, family, &a)?;
        check(&a, outside, family, &cluster.node(1))?;
    }
    Ok(())
}

#[test]
fn a_cluster_ip_that_nobody_translates_dies_in_the_fabric_and_is_counted() -> Result<()> {
    let cluster = Cluster::builder().pod(1, "a").build()?;
    let fabric = cluster.fabric();
    ensure!(fabric.service_packets()? == 0);
    let (node1, a) = (cluster.node(1), cluster.pod("a"));
    let clients: [&Host; 2] = [&node1, &a];
    for client in clients {
        for family in Family::ALL {
            for transport in [Transport::Tcp, Transport::Udp] {
                let before = fabric.service_packets_from(1)?;
                let to = SocketAddr::new(plan::cluster_ip(1).get(family), 80);
                let probe = Probe::new(transport, to).timeout(Duration::from_millis(100));
                let answer = client.ask(probe)?;
                ensure!(answer.error() == Some("timeout"), "{to}: {answer:?}");
                ensure!(fabric.service_packets_from(1)? > before, "{to} was not counted");
            }
        }
    }
    ensure!(fabric.service_packets_from(2)? == 0);
    Ok(())
}

#[test]
fn a_client_names_the_error_that_it_saw() -> Result<()> {
    let cluster = Cluster::builder().nodes(1).pod(1, "a").pod(1, "b").build()?;
    let (a, b) = (cluster.pod("a"), cluster.pod("b"));
    for family in Family::ALL {
        let to = b.at(family, PORT);
        for probe in [Probe::tcp(to), Probe::udp(to), Probe::udp(to).connected()] {
            let answer = a.ask(probe)?;
            ensure!(answer.error() == Some("ECONNREFUSED"), "{to}: {answer:?}");
        }
    }
    Ok(())
}

#[test]
fn a_probe_is_sent_as_it_was_described() -> Result<()> {
    let cluster = Cluster::builder().nodes(1).pod(1, "a").pod(1, "b").build()?;
    let (a, b) = (cluster.pod("a"), cluster.pod("b"));
    let _server = b.serve(&Serve::on(PORT).http(HTTP))?;
    let to = b.at(Family::V4, PORT);
    for probe in [Probe::tcp(to).reset(), Probe::udp(to), Probe::udp(to).connected()] {
        let answer = a.ask(probe.clone().v4_mapped().source_port(4242))?;
        let reached = answer.reached().with_context(|| format!("{probe:?}: {answer:?}"))?;
        ensure!(reached.greeting.client_address == a.ip(Family::V4), "{answer:?}");
        ensure!(reached.greeting.client_port == 4242, "{answer:?}");
        ensure!(reached.peer.is_ipv6() && reached.peer.ip().to_canonical() == to.ip());
    }
    let large = "x".repeat(60_000);
    ensure!(a.ask(Probe::tcp(to).payload(large.clone()))?.name() == Some("b"));
    ensure!(a.ask(Probe::udp(to).payload(large))?.name() == Some("b"), "a fragmented datagram");
    let mut curl = Command::new("curl");
    curl.args(["-sS", "--noproxy", "*", &format!("http://{}/", b.at(Family::V6, HTTP))]);
    let page = a.output(curl, Duration::from_secs(5))?;
    ensure!(page.contains(&format!("client_address={}\n", a.ip(Family::V6))), "{page}");
    ensure!(page.contains("name=b\n"), "{page}");
    Ok(())
}

#[test]
fn a_connection_stays_open_between_questions() -> Result<()> {
    let cluster = Cluster::builder().pod(1, "a").pod(2, "b").build()?;
    let (a, b) = (cluster.pod("a"), cluster.pod("b"));
    let mut server = b.serve(&Serve::on(PORT))?;
    let second = Duration::from_secs(1);
    for transport in [Transport::Tcp, Transport::Udp] {
        let connection = a.open(Probe::new(transport, b.at(Family::V6, PORT)))?;
        let first = connection.first().reached().context("no answer")?.clone();
        let later = connection.exchange("again", second)?;
        ensure!(later.reached().map(|reached| reached.source) == Some(first.source), "{later:?}");
    }
    let connection = a.open(Probe::tcp(b.at(Family::V4, PORT)))?;
    server.kill()?;
    let after = connection.exchange("again", second)?;
    ensure!(matches!(after, Answer::Failed(_)), "{after:?}");
    Ok(())
}

#[test]
fn a_load_is_bounded_and_counted() -> Result<()> {
    let cluster = Cluster::builder().pod(1, "a").pod(2, "b").build()?;
    let (a, b) = (cluster.pod("a"), cluster.pod("b"));
    let _server = b.serve(&Serve::on(PORT))?;
    let half = Duration::from_millis(500);
    let to = b.at(Family::V4, PORT);
    for probe in [Probe::tcp(to), Probe::udp(to), Probe::udp(to).connected()] {
        let report = a.load(&probe, 200, half)?.finish()?;
        ensure!((90..=100).contains(&report.sent), "{report:?}");
        ensure!(report.ok == report.sent && report.failures() == 0, "{report:?}");
        ensure!(report.answers.get("b") == Some(&report.ok), "{report:?}");
    }
    let report = a.load_keepalive(&Probe::tcp(to), 200, half)?.finish()?;
    ensure!(report.failures() == 0 && (1..=8).contains(&report.connections), "{report:?}");
    let refused = a.load(&Probe::tcp(a.at(Family::V4, PORT)), 100, half)?.finish()?;
    ensure!(refused.failed.get("ECONNREFUSED") == Some(&refused.sent), "{refused:?}");
    let stopped = a.load(&Probe::tcp(to), 100, Duration::from_secs(60))?.stop()?;
    ensure!(stopped.seconds < 5.0, "{stopped:?}");
    Ok(())
}

#[test]
fn processes_are_in_the_cgroup_and_the_namespace_of_their_host() -> Result<()> {
    let cluster = Cluster::builder().nodes(1).pod(1, "a").build()?;
    let (node, pod) = (cluster.node(1), cluster.pod("a"));
    let root = cgroup::mount_point()?;
    let own = fs::read_link("/proc/self/ns/mnt")?;
    let hosts: [&Host; 2] = [&node, &pod];
    for host in hosts {
        let mut show = Command::new("sh");
        show.args(["-c", "cat /proc/self/cgroup; readlink /proc/self/ns/net /proc/self/ns/mnt"]);
        let shown = host.output(show, Duration::from_secs(5))?;
        let relative = host.cgroup().path().strip_prefix(&root)?;
        ensure!(shown.contains(&format!("0::/{}\n", relative.display())), "{shown}");
        let netns = host.netns().run(|| Ok(fs::read_link("/proc/thread-self/ns/net")?))?;
        ensure!(shown.contains(&netns.display().to_string()), "{shown}");
        ensure!(shown.contains(&own.display().to_string()), "{shown}");
        ensure!(host.cgroup().path().starts_with(node.cgroup_tree().path()));
    }
    Ok(())
}

#[test]
fn pods_come_and_go() -> Result<()> {
    for cni in Cni::ALL {
        let cluster = Cluster::builder().nodes(1).cni(cni).pod(1, "a").build()?;
        let a = cluster.pod("a");
        let b = cluster.add_pod(1, "b")?;
        let _server = b.serve(&Serve::on(PORT))?;
        check(&a, &b, Family::V6, &a)?;
        ensure!(device_is_there(&cluster, b.host_device())?);
        cluster.remove_pod("b")?;
        ensure!(!device_is_there(&cluster, b.host_device())?);
        ensure!(!b.netns().path().exists());
        ensure!(cluster.add_pod(1, "a").is_err(), "two pods of one name");
    }
    Ok(())
}

fn device_is_there(cluster: &Cluster, device: &str) -> Result<bool> {
    // The directory in /proc is that of the thread's namespace; /sys is the test's own.
    let path = format!("/proc/sys/net/ipv4/conf/{device}");
    cluster.node(1).netns().run(|| Ok(Path::new(&path).exists()))
}

#[test]
fn nothing_is_left_of_a_cluster_even_when_a_test_panics() -> Result<()> {
    let mut prefix = String::new();
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let cluster = Cluster::builder().pod(1, "a").build().expect("a cluster");
        prefix = cluster.prefix().to_owned();
        let (node, pod) = (cluster.node(1), cluster.pod("a"));
        fs::create_dir_all(node.bpf_dir().join("v1")).expect("a BPF directory");
        let server = pod.serve(&Serve::on(PORT)).expect("a server");
        assert_ne!(leftovers(&prefix).expect("names"), Vec::<String>::new());
        // What outlives the cluster must not keep it.
        std::mem::forget((server, node, pod));
        std::panic::resume_unwind(Box::new("as a failed assertion does"));
    }));
    ensure!(outcome.is_err() && !prefix.is_empty());
    let left = leftovers(&prefix)?;
    ensure!(left.is_empty(), "left: {left:?}");
    Ok(())
}

fn leftovers(prefix: &str) -> Result<Vec<String>> {
    let mut names = Vec::new();
    let cgroups = cgroup::mount_point()?;
    for directory in
        [&cgroups, Path::new("/run/netns"), Path::new("/sys/fs/bpf"), Path::new("/tmp")]
    {
        for entry in fs::read_dir(directory)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            // The number of another cluster may start with ours.
            let rest = name.strip_prefix(prefix);
            if rest.is_some_and(|rest| !rest.starts_with(|next: char| next.is_ascii_digit())) {
                names.push(format!("{}/{name}", directory.display()));
            }
        }
    }
    Ok(names)
}

#[test]
fn manifests_are_whole_objects_and_go_with_the_service() -> Result<()> {
    let manifests = Manifests::new()?;
    let service = Service::new("web")
        .cluster_ips(plan::cluster_ip(1))
        .tcp(80, PORT)
        .affinity(Duration::from_secs(30));
    let endpoint = Endpoint::at([10, 244, 1, 2]).node("node1").terminating();
    manifests.publish(&service, &[endpoint])?;
    let read = |file: &str| -> Result<serde_json::Value> {
        Ok(serde_json::from_str(&fs::read_to_string(manifests.path().join(file))?)?)
    };
    let object = read(&service.file())?;
    ensure!(object["spec"]["clusterIPs"][1] == "fd00:10:96::1", "{object}");
    ensure!(object["spec"]["sessionAffinityConfig"]["clientIP"]["timeoutSeconds"] == 30);
    let slice = read(&service.slice_file(Family::V4))?;
    ensure!(slice["metadata"]["labels"]["kubernetes.io/service-name"] == "web", "{slice}");
    ensure!(slice["endpoints"][0]["conditions"]["ready"] == false, "{slice}");
    ensure!(slice["ports"][0]["port"] == PORT, "{slice}");
    ensure!(!manifests.path().join(service.slice_file(Family::V6)).exists());
    manifests.delete(&service)?;
    ensure!(fs::read_dir(manifests.path())?.next().is_none());
    Ok(())
}

/// A script in place of the agent: it ends by itself, or answers `/healthz` as a server that
/// knows nothing else.
fn stand_in(directory: &Path, script: &str) -> Result<std::path::PathBuf> {
    let path = directory.join("agent");
    fs::write(&path, format!("#!/bin/sh\n{script}\n"))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

#[test]
fn an_agent_is_waited_for_and_killed() -> Result<()> {
    let cluster = Cluster::builder().nodes(1).build()?;
    let node = cluster.node(1);
    let manifests = Manifests::new()?;
    let directory = tempfile::tempdir()?;
    let echo = env!("CARGO_BIN_EXE_lb-echo");
    let script = format!("echo $*; exec {echo} serve --name agent --http 10256");
    let program = stand_in(directory.path(), &script)?;
    let options = Options::manifests(manifests.path()).program(&program).argument("--more");
    let mut agent = Agent::start(&node, &options)?;
    let said = agent.process().stdout();
    ensure!(said.contains("run --hostname-override node1 --bpf-dir /sys/fs/bpf/lb-"), "{said}");
    ensure!(said.contains("--more"), "{said}");
    let members = fs::read_to_string(node.cgroup_tree().path().join("agent/cgroup.procs"))?;
    ensure!(members.trim() == agent.process().pid().to_string(), "{members}");
    ensure!(agent.http(10256, "/healthz")?.1.contains("client_address=127.0.0.1"));
    agent.kill9()?;
    ensure!(Agent::start(&node, &options)?.terminate()?.signal() == Some(libc::SIGTERM));
    let program = stand_in(directory.path(), "echo no such thing >&2; exit 1")?;
    let failed = Agent::start(&node, &Options::default().program(&program));
    let error = failed.err().context("a dead agent was called healthy")?;
    ensure!(error.to_string().contains("no such thing"), "{error}");
    Ok(())
}
