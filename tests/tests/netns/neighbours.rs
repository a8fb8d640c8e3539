//! Programs of other owners on the hooks of a pod's interface.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use lb_tests::harness::echo::{Probe, Transport};
use lb_tests::harness::netns::actors::agent::{self, cleanup};
use lb_tests::harness::netns::actors::host::Serve;
use lb_tests::harness::netns::topology::cluster::Cluster;
use lb_tests::harness::netns::topology::plan::{Family, cluster_ip, node_port};
use lb_tests::harness::netns::traffic::foreign::{Foreign, Hook};
use lb_tests::harness::netns::words::expectations::Expectations;
use lb_tests::harness::netns::words::frontends::{SILENT, kinds};
use lb_tests::harness::netns::words::scenario::{PORT, SMALL_MAPS, Scenario, TARGET};
use lb_tests::harness::wait::{PATIENCE, eventually};
use nix::sys::socket::sockopt::OriginalDst;

const WEB: u8 = 1;

/// Pod `a` of node 1 asks a Service whose backend is pod `b` of node 2, packet by packet.
fn start() -> Result<Scenario> {
    let arguments = [&["--socket-lb", "off"][..], &SMALL_MAPS].concat();
    let builder = Cluster::builder().pod(1, "a").pod(2, "b");
    let mut scenario = Scenario::start(builder, &arguments)?;
    scenario.serve(&["b"])?;
    scenario.publish(&scenario.service("web", WEB), &scenario.endpoints(&["b"]))?;
    Ok(scenario)
}

/// Attaches the programs of a policy agent to the interface of pod `a`, in both directions: pods
/// know the Service, not its backend.
fn attach(scenario: &Scenario, hooks: &[Hook]) -> Result<Vec<Foreign>> {
    let IpAddr::V4(backend) = scenario.cluster.pod("b").ip(Family::V4) else { bail!("not IPv4") };
    let (node1, a) = (scenario.cluster.node(1), scenario.cluster.pod("a"));
    let load = |hook: &Hook| {
        Foreign::load_policy(*hook, backend)?.attach_device(node1.netns(), a.host_device())
    };
    hooks.iter().map(load).collect()
}

fn ask(scenario: &Scenario) -> Result<()> {
    let a = scenario.cluster.pod("a");
    let mut expectations = Expectations::default();
    for transport in [Transport::Tcp, Transport::Udp] {
        let to = (cluster_ip(WEB).v4, PORT).into();
        let answer = a.ask(Probe::new(transport, to))?;
        expectations.is_true(format!("{transport:?}: {answer:?}"), answer.name() == Some("b"));
    }
    expectations.finish()
}

fn checked(scenario: &Scenario) -> Result<String> {
    let node1 = scenario.cluster.node(1);
    let mut command = agent::lb_agent()?;
    command.arg("check").arg("--bpf-dir").arg(node1.bpf_dir());
    let mut shell = Command::new("sh");
    // Other findings of a namespace that is no node are of no interest.
    shell.args(["-c", "\"$@\" || true", "sh"]).arg(command.get_program());
    shell.args(command.get_args());
    node1.output(shell, PATIENCE)
}

#[test]
fn a_policy_program_that_was_there_first_sees_the_service_in_both_directions() -> Result<()> {
    let mut scenario = start()?;
    scenario.take_agent(1)?.terminate()?;
    cleanup(&scenario.cluster.node(1))?;
    let policy = attach(&scenario, &[Hook::Ingress, Hook::Egress])?;
    scenario.start_agent(1)?;
    ask(&scenario)?;
    for program in &policy {
        ensure!(program.runs()? > 0, "{program:?} did not run");
    }
    let said = checked(&scenario)?;
    ensure!(!said.contains(" order "), "{said}");
    Ok(())
}

#[test]
fn a_policy_program_that_is_attached_later_sees_answers_of_the_service() -> Result<()> {
    let scenario = start()?;
    let _policy = attach(&scenario, &[Hook::Egress])?;
    ask(&scenario)
}

/// Behind lb's program a request has the address of its backend. Nothing moves a program of
/// another owner: the agent and `check` tell.
#[test]
fn a_policy_program_behind_that_of_the_agent_is_reported() -> Result<()> {
    let mut scenario = start()?;
    scenario.take_agent(1)?.terminate()?;
    let policy = attach(&scenario, &[Hook::Ingress])?;
    scenario.start_agent(1)?;
    let device = scenario.cluster.pod("a").host_device().to_owned();
    scenario.agent(1)?.wait_log(&["programs of others", &format!("ingress of {device}")])?;
    let metric = |scenario: &mut Scenario| -> Result<String> {
        let (_, text) = scenario.agent(1)?.http(10249, "/metrics")?;
        let line = text.lines().find(|line| line.starts_with("lb_misplaced_programs "));
        line.map(str::to_owned).context("no such metric")
    };
    eventually(|| {
        let line = metric(&mut scenario)?;
        ensure!(line == "lb_misplaced_programs 1", "{line}");
        Ok(())
    })?;
    let said = checked(&scenario)?;
    ensure!(said.contains("order") && said.contains(&device), "{said}");
    drop(policy);
    ask(&scenario)
}

/// A CNI that masquerades pods may give them a port that is a node port, and so may a process.
#[test]
fn answers_to_the_node_reach_it_at_a_port_that_is_a_node_port() -> Result<()> {
    const ECHO: u16 = 8081;
    let scenario = start()?;
    scenario.publish(&scenario.exposed("web", WEB), &scenario.endpoints(&["b"]))?;
    let (outside, node1) = (scenario.cluster.outside(), scenario.cluster.node(1));
    let _server = outside.serve(&Serve::on(ECHO))?;
    let port = node_port(WEB);
    let script = format!(
        "nft -f - <<END
         table inet cni {{
           chain postrouting {{
             type nat hook postrouting priority srcnat; policy accept;
             oifname \"eth0\" meta l4proto udp th dport {ECHO} masquerade to :{port}
           }}
         }}\nEND\n"
    );
    let mut expectations = Expectations::default();
    for family in Family::ALL {
        let probe = Probe::udp(outside.at(family, ECHO)).source_port(port);
        let answer = node1.ask(probe)?;
        let is_right = answer.name() == Some("outside");
        expectations.is_true(format!("a process, {family:?}: {answer:?}"), is_right);
    }
    let mut command = Command::new("sh");
    command.args(["-ec", &script]);
    node1.output(command, PATIENCE)?;
    let a = scenario.cluster.pod("a");
    for family in Family::ALL {
        let answer = a.ask(Probe::udp(outside.at(family, ECHO)))?;
        let is_right = answer.name() == Some("outside");
        expectations.is_true(format!("a masqueraded pod, {family:?}: {answer:?}"), is_right);
        let answer = outside.ask(Probe::udp(node1.at(family, port)))?;
        expectations
            .is_true(format!("a client, {family:?}: {answer:?}"), answer.name() == Some("b"));
    }
    expectations.finish()
}

/// bpf_fib_lookup does not answer for a device that does not forward, nor for some kinds of routes;
/// the stack sends packets of the node itself there.
#[test]
fn datagrams_of_a_node_leave_by_a_device_that_does_not_forward() -> Result<()> {
    let scenario = start()?;
    let node1 = scenario.cluster.node(1);
    let mut command = Command::new("sh");
    command.args([
        "-ec",
        "echo 0 > /proc/sys/net/ipv4/conf/eth0/forwarding
         echo 0 > /proc/sys/net/ipv6/conf/eth0/forwarding",
    ]);
    node1.output(command, PATIENCE)?;
    let mut expectations = Expectations::default();
    for (transport, family) in kinds() {
        let to = (cluster_ip(WEB).get(family), PORT).into();
        let answer = node1.ask(Probe::new(transport, to))?;
        let is_right = answer.name() == Some("b");
        expectations.is_true(format!("{transport:?} {family:?}: {answer:?}"), is_right);
    }
    expectations.finish()
}

/// Rules as the AWS VPC CNI makes them for a pod with an address of a second interface.
#[test]
fn check_names_the_mark_that_policy_routing_asks_for() -> Result<()> {
    let scenario = start()?;
    let (node1, a) = (scenario.cluster.node(1), scenario.cluster.pod("a"));
    node1.netns().ip("rule add fwmark 0x80/0x80 lookup main")?;
    let said = checked(&scenario)?;
    ensure!(!said.contains(" routing "), "a mark alone changes no pod's way: {said}");
    node1.netns().ip(&format!("rule add from {} lookup 2", a.ip(Family::V4)))?;
    let said = checked(&scenario)?;
    ensure!(said.contains(" routing ") && said.contains("mark 0x80 "), "{said}");
    Ok(())
}

/// A mesh in a pod's namespace redirects connections to itself, and asks whom they were meant for.
#[test]
fn a_mesh_in_a_pod_sees_the_service_unless_connects_of_pods_are_translated() -> Result<()> {
    const MESH: u16 = 15_001;
    for (arguments, sees_service) in [(&SMALL_MAPS[..], true), (&["--socket-lb", "tcp"], false)] {
        let mut scenario = Scenario::start(Cluster::builder().pod(1, "a").pod(2, "b"), arguments)?;
        scenario.serve(&["b"])?;
        scenario.publish(&scenario.service("web", WEB), &scenario.endpoints(&["b"]))?;
        let (a, b) = (scenario.cluster.pod("a"), scenario.cluster.pod("b"));
        let listener = a.netns().run(|| Ok(TcpListener::bind(("127.0.0.1", MESH))?))?;
        let script = format!(
            "nft -f - <<END
             table ip mesh {{
               chain output {{
                 type nat hook output priority -100; policy accept;
                 meta l4proto tcp redirect to :{MESH}
               }}
             }}\nEND\n"
        );
        let mut command = Command::new("sh");
        command.args(["-ec", &script]);
        a.output(command, PATIENCE)?;
        let vip = SocketAddr::from((cluster_ip(WEB).v4, PORT));
        let asked = a.ask(Probe::tcp(vip).timeout(SILENT))?;
        let (connection, _) = listener.accept().context("nobody came to the mesh")?;
        let meant = nix::sys::socket::getsockopt(&connection, OriginalDst)?;
        let meant = SocketAddr::from((
            Ipv4Addr::from(u32::from_be(meant.sin_addr.s_addr)),
            u16::from_be(meant.sin_port),
        ));
        let expected = if sees_service { vip } else { b.at(Family::V4, TARGET) };
        ensure!(meant == expected, "{arguments:?}: {meant}, not {expected}; {asked:?}");
    }
    Ok(())
}

/// Filters of others that let every packet go on, at both ends of the order.
#[test]
fn filters_of_others_are_reported_if_they_see_the_backend() -> Result<()> {
    let mut scenario = start()?;
    let node1 = scenario.cluster.node(1);
    let device = scenario.cluster.pod("a").host_device().to_owned();
    let program = Foreign::load(Hook::Ingress)?;
    let pin = node1.bpf_dir().join("neighbour");
    program.pin(&pin)?;
    let mut expectations = Expectations::default();
    for (attach, site, preference, is_reported) in [
        ("clsact", "ingress", 1, false),
        ("clsact", "ingress", 49_152, true),
        ("clsact", "egress", 49_152, false),
        ("clsact", "egress", 1, true),
        ("tcx", "ingress", 1, true),
        ("tcx", "egress", 1, false),
    ] {
        scenario.take_agent(1)?.terminate()?;
        cleanup(&node1)?;
        scenario.set_arguments(
            &[&["--socket-lb", "off", "--tc-attach", attach][..], &SMALL_MAPS].concat(),
        );
        scenario.start_agent(1)?;
        let tc = |line: &str| -> Result<String> {
            let mut command = Command::new("tc");
            command.args(line.split(' '));
            node1.output(command, PATIENCE)
        };
        if attach == "tcx" {
            tc(&format!("qdisc replace dev {device} clsact"))?;
        }
        let filter = format!("dev {device} {site} pref {preference}");
        tc(&format!("filter add {filter} bpf da object-pinned {}", pin.display()))?;
        let what = format!("{attach}, {site}, preference {preference}");
        let runs = program.runs()?;
        expectations.check(&what, ask(&scenario));
        expectations.is_true(format!("{what}: it did not run"), program.runs()? > runs);
        let said = checked(&scenario)?;
        let is_said = said.contains("order") && said.contains(&device);
        expectations.is_true(format!("{what}: {said}"), is_said == is_reported);
        tc(&format!("filter del {filter}"))?;
    }
    expectations.finish()
}
