//! Programs on their hooks, against the kernel: links are replaced in place, follow interfaces
//! and options, and `cleanup` leaves none behind.

use std::{
    fs,
    net::IpAddr,
    panic,
    path::PathBuf,
    process::Command,
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use lb_agent::{
    commands::cleanup,
    network::follow::{InterfaceOptions, Interfaces},
    options::{
        modes::{SocketLb, TcAttach, XdpMode},
        values::Patterns,
    },
    programs::{cgroup::Hooks, hook::Direction, names::Names, tc::TcAttacher},
};
use lb_common::abi::settings::Device;
use lb_control::model::network::{Interface, NodeNetwork};
use lb_sys::TypedMap;
use tokio::sync::{oneshot, watch};

use crate::sandbox::{BpfDir, OwnCgroup, index_of, ip, link, namespace, tcx_programs, wait_for};

#[test]
fn the_next_agent_replaces_programs_on_the_links_of_the_last_one() -> Result<()> {
    let dir = BpfDir::new();
    let netns = namespace("adopt")?;
    netns.run(|| {
        let pins = dir.pins();
        let interface = Interface { index: 1, name: "lo".into() };
        let start = || -> Result<(u32, u32)> {
            let programs = dir.load()?;
            TcAttacher::new(&pins, TcAttach::Tcx, Names::default())?.attach(
                &programs,
                "loopback",
                &interface,
                Direction::Egress,
            )?;
            link(&pins.links().join("1-lo-egress"))
        };
        let (first, second) = (start()?, start()?);
        ensure!(first.0 == second.0, "the link is another one");
        ensure!(first.1 != second.1, "the program is the old one");
        ensure!(tcx_programs("lo")? == ["loopback"]);
        Ok(())
    })
}

#[test]
fn a_change_between_tcx_and_clsact_leaves_one_program_and_the_filters_of_others() -> Result<()> {
    let dir = BpfDir::new();
    let netns = namespace("clsact")?;
    netns.run(|| {
        let programs = dir.load()?;
        let interface = Interface { index: 1, name: "lo".into() };
        let attach = |mode| -> Result<()> {
            let mut attacher = TcAttacher::new(&dir.pins(), mode, Names::default())?;
            Ok(attacher.attach(&programs, "loopback", &interface, Direction::Egress)?)
        };
        attach(TcAttach::Tcx)?;
        tc("qdisc add dev lo clsact")?;
        tc("filter add dev lo egress pref 77 protocol ip u32 match u32 0 0 classid 1:1")?;
        attach(TcAttach::Clsact)?;
        ensure!(tcx_programs("lo")?.is_empty());
        attach(TcAttach::Clsact)?;
        let filters = tc("filter show dev lo egress")?;
        ensure!(filters.matches("lb_loopback").count() == 1, "{filters}");
        attach(TcAttach::Tcx)?;
        ensure!(tcx_programs("lo")? == ["loopback"]);
        attach(TcAttach::Clsact)?;
        let cleaned = cleanup::cleanup(&dir.0, false)?;
        ensure!(cleaned.filters == 1 && cleaned.links == 0, "{cleaned:?}");
        let filters = tc("filter show dev lo egress")?;
        ensure!(!filters.contains("lb_loopback") && filters.contains("pref 77"), "{filters}");
        Ok(())
    })
}

fn tc(arguments: &str) -> Result<String> {
    let output = Command::new("tc").args(arguments.split(' ')).output()?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "tc {arguments}: {error}");
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn options() -> InterfaceOptions {
    InterfaceOptions {
        devices: Patterns::Auto,
        pods: Patterns::Auto,
        attach: TcAttach::Auto,
        xdp: XdpMode::Auto,
        metrics: None,
    }
}

/// Runs `work` beside an agent's interfaces in the namespace of the caller.
fn with_interfaces(
    dir: &BpfDir,
    work: impl FnOnce(watch::Receiver<NodeNetwork>) -> Result<()>,
) -> Result<()> {
    with_interfaces_of(dir, Some(Vec::new()), |node, _| work(node))
}

/// The addresses of the Node object, as far as they are known.
type NodeAddresses = Option<Vec<IpAddr>>;

/// As [`with_interfaces`], with these addresses of the Node object at first.
fn with_interfaces_of(
    dir: &BpfDir,
    addresses: NodeAddresses,
    work: impl FnOnce(watch::Receiver<NodeNetwork>, &watch::Sender<NodeAddresses>) -> Result<()>,
) -> Result<()> {
    let programs = Arc::new(dir.load()?);
    let pins = dir.pins();
    let (ready, is_ready) = mpsc::channel();
    let (tell, node_addresses) = watch::channel(addresses.clone());
    thread::scope(|scope| {
        let (stop, stopped) = oneshot::channel::<()>();
        let agent = scope.spawn(move || -> Result<()> {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let interfaces = Interfaces::open(&pins, programs, options(), addresses).await?;
                ready.send(interfaces.subscribe())?;
                tokio::select! {
                    result = interfaces.run(node_addresses) => Ok(result?),
                    _ = stopped => Ok(()),
                }
            })
        });
        let result = is_ready.recv().context("no interfaces").and_then(|node| work(node, &tell));
        drop(stop);
        agent.join().unwrap_or_else(|panicked| panic::resume_unwind(panicked))?;
        result
    })
}

#[test]
fn programs_follow_interfaces_as_they_come_and_go() -> Result<()> {
    let dir = BpfDir::new();
    let (netns, pod) = (namespace("node")?, namespace("pod")?);
    let add =
        |name: &str| ip(&format!("link add {name} type veth peer name eth0 netns {}", pod.name()));
    netns.run(|| {
        add("up0")?;
        ip("address add 192.0.2.1/24 dev up0")?;
        ip("link set up0 up")?;
        pod.run(|| ip("link set eth0 name up1").and_then(|()| ip("link set up1 up")))?;
        ip("route add default via 192.0.2.2")?;
        with_interfaces(&dir, |node| {
            ensure!(tcx_programs("up0")? == ["from_device", "to_device"]);
            ensure!(tcx_programs("lo")? == ["loopback"]);
            let known = node.borrow().clone();
            ensure!(known.devices == [Interface { index: index_of("up0")?, name: "up0".into() }]);
            ensure!(known.addresses == ["192.0.2.1".parse::<IpAddr>()?], "{known:?}");
            ensure!(known.default_sources == known.addresses);
            for name in ["accept_local", "route_localnet"] {
                let path = format!("/proc/sys/net/ipv4/conf/lo/{name}");
                ensure!(fs::read_to_string(path)? == "1\n", "{name}");
            }

            add("veth.7")?;
            let took = wait_for("a new veth", || Ok(tcx_programs("veth.7")?.len() == 2))?;
            ensure!(tcx_programs("veth.7")? == ["from_pod", "to_pod"]);
            println!("a new veth had its programs after {took:?}");
            let index = index_of("veth.7")?;
            let pin = dir.pins().links().join(format!("{index}-veth_7-ingress"));
            wait_for("the pin", || Ok(pin.exists()))?;
            link(&pin)?;
            ip("link delete veth.7")?;
            wait_for("the pin to go", || Ok(!pin.exists()))?;

            // Without a default route, the subnet of its address makes the device external.
            ip("route delete default")?;
            ip("address delete 192.0.2.1/24 dev up0")?;
            wait_for("the role to change", || Ok(tcx_programs("up0")? == ["from_pod", "to_pod"]))?;
            ip("address add 192.0.2.1/24 dev up0")?;
            wait_for("the role to change back", || {
                Ok(tcx_programs("up0")? == ["from_device", "to_device"])
            })?;
            Ok(())
        })
    })
}

#[test]
fn a_change_of_routes_rules_or_neighbours_begins_a_new_epoch() -> Result<()> {
    let dir = BpfDir::new();
    let netns = namespace("ways")?;
    netns.run(|| {
        ip("link add up0 mtu 1400 type veth peer name down0")?;
        ip("address add 192.0.2.1/24 dev up0")?;
        ip("link set up0 up")?;
        ip("route add default via 192.0.2.2")?;
        with_interfaces(&dir, |_| {
            let map = TypedMap::<u32, Device>::new(dir.pins().open("DEVICES")?)?;
            let device = || map.get(&0)?.context("no device");
            let mut epoch = 0;
            let mut changes = |what: &str| -> Result<()> {
                wait_for(what, || Ok(device()?.epoch != epoch))?;
                // A change may come in more than one message.
                while epoch != device()?.epoch {
                    epoch = device()?.epoch;
                    thread::sleep(Duration::from_millis(50));
                }
                Ok(())
            };
            changes("the first epoch")?;
            for change in [
                "route add 198.51.100.0/24 via 192.0.2.9",
                "route delete 198.51.100.0/24",
                "rule add from 192.0.2.1 table 7",
                "neigh add 192.0.2.9 lladdr 02:00:00:00:00:01 dev up0",
                "neigh replace 192.0.2.9 lladdr 02:00:00:00:00:02 dev up0",
                "neigh delete 192.0.2.9 dev up0",
                "link set up0 mtu 1300",
            ] {
                ip(change)?;
                changes(change)?;
            }
            ensure!(device()?.mtu == 1300, "{:?}", device()?);
            Ok(())
        })
    })
}

#[test]
fn a_veth_whose_peer_moves_away_later_becomes_a_pod_s() -> Result<()> {
    let dir = BpfDir::new();
    let (netns, pod) = (namespace("mover")?, namespace("moved")?);
    netns.run(|| {
        with_interfaces(&dir, |_| {
            ip("link add host0 type veth peer name cont0")?;
            ip("link set host0 up")?;
            ip(&format!("link set cont0 netns {}", pod.name()))?;
            wait_for("the host side", || Ok(tcx_programs("host0")? == ["from_pod", "to_pod"]))?;
            Ok(())
        })
    })
}

#[test]
fn a_restart_adopts_links_and_drops_those_of_interfaces_that_are_not_selected() -> Result<()> {
    let dir = BpfDir::new();
    let (netns, pod) = (namespace("again")?, namespace("peer")?);
    netns.run(|| {
        ip(&format!("link add veth0 type veth peer name eth0 netns {}", pod.name()))?;
        ip("link add veth1 type veth peer name veth2")?;
        with_interfaces(&dir, |_| Ok(()))?;
        let pin = dir.pins().links().join(format!("{}-veth0-ingress", index_of("veth0")?));
        let first = link(&pin)?;
        let stranger = Interface { index: index_of("veth1")?, name: "veth1".into() };
        TcAttacher::new(&dir.pins(), TcAttach::Tcx, Names::default())?.attach(
            &dir.load()?,
            "from_pod",
            &stranger,
            Direction::Ingress,
        )?;
        with_interfaces(&dir, |_| Ok(()))?;
        let second = link(&pin)?;
        ensure!(first.0 == second.0 && first.1 != second.1, "{first:?} {second:?}");
        ensure!(tcx_programs("veth1")?.is_empty());
        Ok(())
    })
}

#[test]
fn a_restart_keeps_a_device_that_only_the_node_object_knows_until_it_is_known() -> Result<()> {
    let dir = BpfDir::new();
    let (netns, pod) = (namespace("known")?, namespace("behind")?);
    let address: IpAddr = "192.0.2.1".parse()?;
    netns.run(|| {
        ip(&format!("link add up0 type veth peer name eth0 netns {}", pod.name()))?;
        ip("address add 192.0.2.1/24 dev up0")?;
        ip("link add up1 type veth peer name up2")?;
        ip("address add 192.0.2.65/32 dev up1")?;
        let both = vec![address, "192.0.2.65".parse()?];
        with_interfaces_of(&dir, Some(both), |_, _| Ok(()))?;
        let pins: Vec<PathBuf> = ["up0", "up1"]
            .iter()
            .map(|name| Ok(dir.pins().links().join(format!("{}-{name}-ingress", index_of(name)?))))
            .collect::<Result<_>>()?;
        let before: Vec<_> = pins.iter().map(|pin| link(pin)).collect::<Result<_>>()?;
        with_interfaces_of(&dir, None, |node, tell| {
            for (pin, before) in pins.iter().zip(&before) {
                let after = link(pin)?;
                ensure!(after.0 == before.0 && after.1 != before.1, "{before:?} {after:?}");
            }
            ensure!(tcx_programs("up0")? == ["from_device", "to_device"]);
            ensure!(tcx_programs("up1")? == ["from_device", "to_device"]);
            ensure!(node.borrow().devices.len() == 2 && !node.borrow().knows_node_object);
            tell.send(Some(vec![address]))?;
            wait_for("the stranger to be left", || Ok(tcx_programs("up1")?.is_empty()))?;
            ensure!(tcx_programs("up0")? == ["from_device", "to_device"]);
            wait_for("the network to be told", || Ok(node.borrow().knows_node_object))?;
            ensure!(node.borrow().devices.len() == 1);
            Ok(())
        })
    })
}

#[test]
fn connect_hooks_are_adopted_and_follow_the_mode_and_the_cgroup() -> Result<()> {
    let dir = BpfDir::new();
    let (one, other) = (OwnCgroup::create("one")?, OwnCgroup::create("other")?);
    let pins = dir.pins();
    let attach = |group: &OwnCgroup, mode| -> Result<usize> {
        Hooks::attach(&pins, &dir.load()?, group.0.path(), mode).1?;
        Ok(fs::read_dir(pins.links())?.count())
    };
    let connect4 = || link(&pins.links().join("cgroup-connect4"));
    ensure!(attach(&one, SocketLb::All)? == 9);
    let first = connect4()?;
    ensure!(attach(&one, SocketLb::Tcp)? == 5);
    let second = connect4()?;
    ensure!(first.0 == second.0 && first.1 != second.1, "{first:?} {second:?}");
    ensure!(attach(&other, SocketLb::Tcp)? == 5);
    ensure!(connect4()?.0 != second.0, "still on the former cgroup");
    ensure!(attach(&other, SocketLb::Off)? == 0);
    Ok(())
}

#[test]
fn a_pin_of_another_process_in_the_place_of_a_link_stays() -> Result<()> {
    let dir = BpfDir::new();
    let netns = namespace("foreign")?;
    netns.run(|| {
        let (pins, programs) = (dir.pins(), dir.load()?);
        let interface = Interface { index: 1, name: "lo".into() };
        let mut attacher = TcAttacher::new(&pins, TcAttach::Tcx, Names::default())?;
        attacher.attach(&programs, "loopback", &interface, Direction::Egress)?;
        let pin = pins.links().join("1-lo-egress");
        fs::remove_file(&pin)?;
        ensure!(tcx_programs("lo")? == ["loopback"], "the pin held the program");
        let lost = [pin.clone()];
        ensure!(pins.kept().lost() == lost, "{:?}", pins.kept().lost());
        lb_sys::obj_pin(programs.get("clock")?, &pin)?;
        ensure!(pins.kept().lost() == lost, "another object is taken for the link");
        attacher.detach(1, Direction::Egress)?;
        ensure!(tcx_programs("lo")?.is_empty(), "the link was found by its path");
        ensure!(pin.exists(), "a pin of another process was removed");
        Ok(())
    })
}

#[test]
fn cleanup_removes_what_lb_has_pinned_and_leaves_the_rest() -> Result<()> {
    let dir = BpfDir::new();
    let group = OwnCgroup::create("cleanup")?;
    let netns = namespace("cleanup")?;
    netns.run(|| {
        with_interfaces(&dir, |_| Ok(()))?;
        let programs = dir.load()?;
        Hooks::attach(&dir.pins(), &programs, group.0.path(), SocketLb::Tcp).1?;
        let theirs = dir.0.join("theirs");
        fs::create_dir(&theirs)?;
        cleanup::cleanup(&dir.0, false)?;
        ensure!(tcx_programs("lo")?.is_empty());
        let left: Vec<_> =
            fs::read_dir(&dir.0)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
        ensure!(left == [theirs], "{left:?}");
        cleanup::cleanup(&dir.0, false)?;
        Ok(())
    })
}
