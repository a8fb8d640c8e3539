//! From kube-proxy to lb and back, under load: the real kube-proxy, a real API server, and
//! clients that do not stop for any of it.

use std::net::SocketAddr;
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lb_tests::harness::controlplane::Options;
use lb_tests::harness::controlplane::kube_proxy::{self, KubeProxy, Mode};
use lb_tests::harness::controlplane::live::exposed::exposed;
use lb_tests::harness::controlplane::live::{LiveCluster, PORT, TARGET};
use lb_tests::harness::controlplane::objects::Endpoint;
use lb_tests::harness::echo::{Probe, Transport};
use lb_tests::harness::netns::actors::agent::{self, lb_agent};
use lb_tests::harness::netns::actors::client::{Crowd, Load};
use lb_tests::harness::netns::actors::host::{Host, Serve};
use lb_tests::harness::netns::actors::process::Process;
use lb_tests::harness::netns::topology::cluster::Cluster;
use lb_tests::harness::netns::topology::cni::Cni;
use lb_tests::harness::netns::topology::node::Node;
use lb_tests::harness::netns::topology::plan::{Family, cidr, cluster_ip};
use lb_tests::harness::netns::words::expectations::Expectations;

/// The Service's pods, on the node that changes hands and on the other one, and a client's.
const NEAR: &str = "near";
const FAR: &str = "far";
const CLIENT: &str = "client";
const NUMBER: u8 = 40;
/// How often each client does each thing in a second.
const RATE: u64 = 25;
/// Datagrams per second of a client that notices an outage of milliseconds.
const DENSE_RATE: u64 = 1_000;
/// The load is to go on for a while with each state of the node.
const WHILE: Duration = Duration::from_millis(1_500);
/// Longer than a test takes.
const LONGEST: Duration = Duration::from_secs(120);
/// How long an answer may take on a machine that has other work.
const PATIENCE: Duration = Duration::from_secs(5);

/// What clients do.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Does {
    /// Keeps connections open and asks on them.
    Keeps,
    /// Opens connections.
    Opens,
    /// Sends datagrams from one socket.
    Streams,
}

/// A way to the Service.
struct Way<'a> {
    from: &'a Host,
    tcp: SocketAddr,
    udp: SocketAddr,
}

/// Loads of which none may fail.
#[derive(Default)]
struct Loads(Vec<(String, Does, Load)>);

impl Loads {
    fn start(&mut self, ways: &[Way], does: &[Does], time: Duration) -> Result<()> {
        for way in ways {
            for does in does {
                let (transport, to) = match does {
                    Does::Streams => (Transport::Udp, way.udp),
                    _ => (Transport::Tcp, way.tcp),
                };
                let probe = Probe::new(transport, to).timeout(PATIENCE);
                let load = match does {
                    Does::Keeps => way.from.load_keepalive(&probe, RATE, time)?,
                    _ => way.from.load(&probe, RATE, time)?,
                };
                let what = format!("{} {does:?} {to}", way.from.name());
                self.0.push((what, *does, load));
            }
        }
        Ok(())
    }

    /// Ends them, or waits for the end of those that have one, and notes what became of them.
    fn check(self, expectations: &mut Expectations, when: &str, stops: bool) -> Result<()> {
        for (what, does, load) in self.0 {
            let report = if stops { load.stop()? } else { load.finish()? };
            println!(
                "{when}: {what}: {} of {} answered in {:.1} s, longest gap {:.0} ms, failed {:?}",
                report.ok, report.sent, report.seconds, report.longest_gap_ms, report.failed
            );
            expectations
                .is_true(format!("{when}: {what}: {:?}", report.failed), report.failures() == 0);
            let enough =
                report.ok >= RATE * 2 && (does == Does::Keeps) <= (report.connections <= 8);
            expectations.is_true(format!("{when}: {what}: {report:?}"), enough);
        }
        Ok(())
    }
}

/// Every way: from a pod and from a process of the node to the ClusterIP, from outside to the
/// node port; both backends serve, the one on this node and the one elsewhere.
fn ways<'a>(live: &LiveCluster, hosts: &'a [&'a Host; 3]) -> Result<Vec<Way<'a>>> {
    let [client, node, outside] = hosts;
    let node_ports = [live.node_port("web", "tcp")?, live.node_port("web", "udp")?];
    let mut ways = Vec::new();
    for family in Family::ALL {
        let inside = SocketAddr::new(cluster_ip(NUMBER).get(family), PORT);
        let [tcp, udp] = node_ports.map(|port| node.at(family, port));
        ways.push(Way { from: client, tcp: inside, udp: inside });
        ways.push(Way { from: node, tcp: inside, udp: inside });
        ways.push(Way { from: outside, tcp, udp });
    }
    Ok(ways)
}

/// `lb-agent` on node 1.
fn start_lb(live: &LiveCluster, arguments: &[&str]) -> Result<Process> {
    let node = live.cluster.node(1);
    let mut command = lb_agent()?;
    command.args(arguments).arg("--bpf-dir").arg(node.bpf_dir());
    command.arg("--cgroup").arg(node.cgroup_tree().path());
    node.spawn_agent("command", command)
}

fn lb(live: &LiveCluster, arguments: &[&str]) -> Result<String> {
    let mut process = start_lb(live, arguments)?;
    let status = process.wait(Duration::from_secs(30))?;
    ensure!(status.success(), "{arguments:?}: {status}\n{}", process.tail());
    Ok(process.stdout())
}

/// All rules of node 1.
fn rules(live: &LiveCluster) -> Result<String> {
    let mut all = String::new();
    for tool in ["iptables-nft-save", "ip6tables-nft-save", "iptables-legacy-save"] {
        all += &live.cluster.node(1).output(Command::new(tool), PATIENCE)?;
    }
    let mut nft = Command::new("nft");
    nft.args(["list", "ruleset"]);
    Ok(all + &live.cluster.node(1).output(nft, PATIENCE)?)
}

fn start(mode: Mode) -> Result<(LiveCluster, KubeProxy)> {
    let builder = Cluster::builder().pod(1, CLIENT).pod(1, NEAR).pod(2, FAR);
    let mut live = LiveCluster::start(builder, Options::default())?;
    live.serve(&[NEAR, FAR])?;
    live.create_pods("web", &[NEAR, FAR])?;
    live.plane.apply(&exposed("web", NUMBER, "NodePort", "web").to_string())?;
    let ready =
        |endpoints: &[Endpoint]| endpoints.iter().filter(|endpoint| endpoint.ready).count() == 4;
    live.plane.wait_for_slice("default", "web", Duration::from_secs(20), ready)?;
    let proxy = start_proxy(&live, mode)?;
    Ok((live, proxy))
}

fn start_proxy(live: &LiveCluster, mode: Mode) -> Result<KubeProxy> {
    let options = kube_proxy::Options::beside_agent(mode);
    KubeProxy::start(&live.plane, &live.cluster.node(1), options)
}

/// kube-proxy gives way to an agent.
fn take_over(
    live: &mut LiveCluster,
    proxy: KubeProxy,
    arguments: &[&str],
    expectations: &mut Expectations,
) -> Result<()> {
    let (client, node) = (live.cluster.pod(CLIENT), live.cluster.node(1));
    let cluster_cidr = cidr::cluster();
    let mut all = vec!["--cluster-cidr", &cluster_cidr];
    all.extend(arguments);
    let mut loads = Loads::default();
    let does = [Does::Keeps, Does::Opens, Does::Streams];
    {
        let hosts = [&**client, &**node, live.cluster.outside()];
        loads.start(&ways(live, &hosts)?, &does, LONGEST)?;
    }
    thread::sleep(WHILE);
    let told = lb(live, &["check"])?;
    expectations.is_true(
        format!("check: {told}"),
        told.contains("kube-proxy") && told.contains("it runs here"),
    );
    live.start_agent(1, &all)?;
    live.wait_backends("web", Some(2))?;
    thread::sleep(WHILE);
    let refused = lb(live, &["cleanup", "--kube-proxy"]);
    expectations.is_true("its rules are removed while it runs", refused.is_err());
    proxy.terminate()?;
    thread::sleep(WHILE);
    let told = lb(live, &["check"])?;
    expectations
        .is_true(format!("check: {told}"), told.contains("cleanup --kube-proxy` removes them"));
    println!("{}", lb(live, &["cleanup", "--kube-proxy"])?);
    let left = rules(live)?;
    let names = ["table ip kube-proxy", "table ip6 kube-proxy", "KUBE-SERVICES", "KUBE-SVC-"];
    let is_left = names.iter().any(|name| left.contains(name));
    expectations.is_true(format!("left: {left}"), !is_left);
    let told = lb(live, &["cleanup", "--kube-proxy"])?;
    expectations.is_true(format!("again: {told}"), told.contains("no kube-proxy rules found"));
    let told = lb(live, &["check"])?;
    expectations.is_true(format!("check: {told}"), told.contains("no kube-proxy rules found"));
    let before = live.agent(1)?.counted("unknown_tcp_flow")?;
    thread::sleep(WHILE * 2);
    let after = live.agent(1)?.counted("unknown_tcp_flow")?;
    expectations.is_true(
        "nothing is left to the stack: is there a connection of kube-proxy's?",
        after > before,
    );
    expectations.is_true("no flow", live.agent(1)?.counted("flow_created")? > 0);
    loads.check(expectations, "take-over", true)
}

/// An agent gives way to kube-proxy. What clients begin before and end within the drain goes
/// on, and so does for good what was translated at connect(), if that is `on_connect`.
fn give_back(
    live: &mut LiveCluster,
    mode: Mode,
    on_connect: bool,
    expectations: &mut Expectations,
) -> Result<()> {
    const ENDING: Duration = Duration::from_secs(12);
    const DRAIN: &str = "15s";
    let (client, node) = (live.cluster.pod(CLIENT), live.cluster.node(1));
    let (mut ending, mut staying) = (Loads::default(), Loads::default());
    {
        let hosts = [&**client, &**node, live.cluster.outside()];
        let ways = ways(live, &hosts)?;
        staying.start(&ways, &[Does::Opens], LONGEST)?;
        for way in &ways {
            let stays = on_connect && way.from.name() != "outside";
            let (loads, time) = if stays { (&mut staying, LONGEST) } else { (&mut ending, ENDING) };
            loads.start(std::slice::from_ref(way), &[Does::Keeps], time)?;
        }
        ending.start(&ways, &[Does::Streams], ENDING)?;
    }
    thread::sleep(WHILE);
    let _proxy = start_proxy(live, mode)?;
    let refused = lb(live, &["cleanup", "--drain", DRAIN]).expect_err("an agent runs");
    let refused = format!("{refused:#}");
    expectations.is_true(
        format!("beside an agent: {refused}"),
        refused.contains("another lb-agent (process"),
    );
    live.take_agent(1)?.terminate()?;
    let mut drain = start_lb(live, &["cleanup", "--drain", DRAIN])?;
    drain.wait_for_output("draining: ", PATIENCE)?;
    thread::sleep(WHILE);
    let left = counted(&node, "draining")?;
    expectations.is_true("no new flow was left to the stack", left > 0);
    let told = lb(live, &["check"])?;
    expectations.is_true(format!("check: {told}"), told.contains("`cleanup --drain` was begun"));
    let opened = counted(&node, "flow_created")?;
    thread::sleep(WHILE);
    expectations.is_true("flows are opened", counted(&node, "flow_created")? == opened);
    ending.check(expectations, "drain", false)?;
    let status = drain.wait(Duration::from_secs(30))?;
    let said = drain.stdout();
    println!("{said}");
    expectations
        .is_true(format!("{status}: {said}"), status.success() && said.contains("detached "));
    expectations.is_true("pins are left", !node.bpf_dir().exists());
    let keepers = rules(live)?.to_lowercase().contains("lb-takeover");
    expectations.is_true("rules of ours are left", !keepers);
    thread::sleep(WHILE);
    staying.check(expectations, "return", true)
}

/// How often a packet of node 1 ended for this reason, whether an agent runs there or not.
fn counted(node: &Node, reason: &str) -> Result<u64> {
    let counters = agent::get(node, "counters")?;
    let rows = counters.as_array().into_iter().flatten().filter(|row| row["reason"] == reason);
    Ok(rows.filter_map(|row| row["count"].as_u64()).sum())
}

fn check(mode: Mode, arguments: &[&str]) -> Result<()> {
    let (mut live, proxy) = start(mode)?;
    let mut expectations = Expectations::default();
    take_over(&mut live, proxy, arguments, &mut expectations).context("take-over")?;
    let on_connect = arguments.contains(&"tcp");
    give_back(&mut live, mode, on_connect, &mut expectations).context("return")?;
    expectations.finish().with_context(|| format!("{mode:?} {arguments:?}"))
}

#[test]
fn connections_outlive_kube_proxy_and_its_tables() -> Result<()> {
    check(Mode::Nftables, &["--socket-lb", "tcp"])
}

#[test]
fn connections_outlive_kube_proxy_and_its_chains() -> Result<()> {
    check(Mode::Iptables, &["--socket-lb", "off"])
}

/// On an overlay requests come in by one device and answers by another one, and their programs are
/// not detached at the same moment.
#[test]
fn streams_of_datagrams_outlive_a_drain_that_cuts_them() -> Result<()> {
    let builder = Cluster::builder().cni(Cni::Vxlan).pod(2, FAR);
    let mut live = LiveCluster::start(builder, Options::default())?;
    live.serve(&[FAR])?;
    live.create_pods("web", &[FAR])?;
    live.plane.apply(&exposed("web", NUMBER, "NodePort", "web").to_string())?;
    let ready = |endpoints: &[Endpoint]| endpoints.iter().filter(|one| one.ready).count() == 2;
    live.plane.wait_for_slice("default", "web", PATIENCE, ready)?;
    live.start_agent(1, &["--cluster-cidr", &cidr::cluster()])?;
    live.wait_backends("web", Some(1))?;
    let _proxy = start_proxy(&live, Mode::Nftables)?;
    let port = live.node_port("web", "udp")?;
    let mut loads = Loads::default();
    for family in Family::ALL {
        let to = live.cluster.node(1).at(family, port);
        let load = live.cluster.outside().load(&Probe::udp(to), DENSE_RATE, LONGEST)?;
        loads.0.push((to.to_string(), Does::Streams, load));
    }
    thread::sleep(WHILE);
    live.take_agent(1)?.terminate()?;
    let said = lb(&live, &["cleanup", "--drain", "2s"])?;
    let mut expectations = Expectations::default();
    expectations.is_true(&said, said.contains("2 flows are cut off"));
    thread::sleep(WHILE);
    loads.check(&mut expectations, "drain", true)?;
    expectations.finish()
}

/// Clients of a node port whose backend is elsewhere, each known to that by a port of the
/// node's: those that kube-proxy gave out and those that lb gives out must not meet.
fn check_ports(mode: Mode, family: Family) -> Result<()> {
    const COUNT: usize = 2_000;
    const FIRST: [u16; 3] = [10_000, 20_000, 30_000];
    let builder = Cluster::builder().pod(2, FAR);
    let mut live = LiveCluster::start(builder, Options::default())?;
    let _server = live.cluster.pod(FAR).serve(&Serve::default().crowd(TARGET))?;
    live.create_pods("web", &[FAR])?;
    live.plane.apply(&exposed("web", NUMBER, "NodePort", "web").to_string())?;
    let port = live.node_port("web", "tcp")?;
    let ready = |endpoints: &[Endpoint]| endpoints.iter().filter(|one| one.ready).count() == 2;
    live.plane.wait_for_slice("default", "web", PATIENCE, ready)?;
    let proxy = start_proxy(&live, mode)?;
    let at = live.cluster.node(1).at(family, port);
    let gather = |live: &LiveCluster, round: usize| {
        let probe = Probe { source_port: FIRST[round], ..Probe::tcp(at).timeout(PATIENCE) };
        live.cluster.outside().crowd(&probe, COUNT)
    };
    let mut expectations = Expectations::default();
    let mut ask = |who: &str, crowd: &Crowd| -> Result<()> {
        let report = crowd.ask()?;
        println!(
            "{who}: {} answered in {:.1} s, failed {:?}",
            report.ok, report.seconds, report.failed
        );
        let all = report.ok == COUNT as u64 && report.moved == 0 && report.shared() == 0;
        expectations
            .is_true(format!("{at}: {who}: {:?}, {} moved", report.failed, report.moved), all);
        Ok(())
    };
    let first = gather(&live, 0)?;
    ask("kube-proxy's", &first)?;
    live.start_agent(1, &["--cluster-cidr", &cidr::cluster()])?;
    live.wait_backends("web", Some(1))?;
    proxy.terminate()?;
    lb(&live, &["cleanup", "--kube-proxy"])?;
    let second = gather(&live, 1)?;
    ask("lb's", &second)?;
    ask("kube-proxy's beside lb's", &first)?;
    ask("lb's again", &second)?;
    let _proxy = start_proxy(&live, mode)?;
    live.take_agent(1)?.terminate()?;
    let mut drain = start_lb(&live, &["cleanup", "--drain", "5m"])?;
    drain.wait_for_output("draining: ", PATIENCE)?;
    let third = gather(&live, 2)?;
    ask("the next kube-proxy's", &third)?;
    ask("lb's beside them", &second)?;
    ask("the first kube-proxy's beside them", &first)?;
    drop(second);
    let status = drain.wait(Duration::from_secs(60))?;
    ensure!(status.success(), "{status}\n{}", drain.tail());
    ask("the next kube-proxy's without lb", &third)?;
    expectations.finish()
}

#[test]
fn ports_of_kube_proxys_connections_are_not_given_out_again() -> Result<()> {
    check_ports(Mode::Nftables, Family::V4)?;
    check_ports(Mode::Iptables, Family::V6)
}
