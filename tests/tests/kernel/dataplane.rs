//! The shell around the maps and programs, against the kernel: pins are taken over, stores are
//! seen, links are replaced in place, nothing is left behind.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::AsFd,
    panic,
    path::{Path, PathBuf},
    process::{self, Command},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use lb_agent::{
    cli::{GetArgs, Output, PinArgs, What},
    commands::{cleanup, get},
    maps::{kernel::KernelDataplane, pins::Pins, sweep::Sweeper},
    network::follow::{InterfaceOptions, Interfaces},
    options::{
        modes::{SocketLb, TcAttach, XdpMode},
        sizes::Sizes,
        values::Patterns,
    },
    programs::{
        cgroup::Hooks,
        hook::Direction,
        load::{Constants, Programs, load},
        tc::TcAttacher,
    },
};
use lb_common::abi::{
    address::{Address4, Address6, Be16},
    backend::{Backend, IN_CLUSTER_SET},
    flow::{ANSWERED, Action, CLIENT_FIN, Flow, FlowKey, ONE_WAY, Tuple},
    frontend::{Frontend, FrontendKey, FrontendKind, TCP},
    range::RangeKey,
    service::{Name, Service, SlotRange},
    settings::{Device, Settings, SettingsPair, Timeouts},
};
use lb_control::{
    dataplane::{Dataplane, DataplaneError},
    model::network::{Interface, NodeNetwork},
};
use lb_sys::TypedMap;
use lb_tests::harness::netns::topology::{cgroup::Cgroup, namespace::Netns};
use tokio::sync::{oneshot, watch};

const SIZES: Sizes = Sizes { services: 64, backends: 128, slots: 70_000, flows: 1_024 };
const DEADLINE: Duration = Duration::from_secs(20);
/// `TCX_INGRESS` and `TCX_EGRESS` of `enum bpf_attach_type`.
const TCX: [(Direction, u32); 2] = [(Direction::Ingress, 46), (Direction::Egress, 47)];

/// A directory for pins that is taken away with everything in it.
struct BpfDir(PathBuf);

impl BpfDir {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        Self(PathBuf::from(format!("/sys/fs/bpf/lb-test-{}-{number}", process::id())))
    }

    fn pins(&self) -> Pins {
        Pins::new(&self.0)
    }

    fn load(&self) -> Result<Programs> {
        Ok(load(&self.pins(), &SIZES, Constants::default())?)
    }
}

impl Drop for BpfDir {
    fn drop(&mut self) {
        if let Err(error) = remove_tree(&self.0) {
            eprintln!("cannot remove {}: {error}", self.0.display());
        }
    }
}

/// Unpinning the last reference to a link detaches it.
fn remove_tree(path: &Path) -> std::io::Result<()> {
    if !path.exists() {
        return Ok(());
    }
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    fs::remove_dir(path)
}

fn namespace(suffix: &str) -> Result<Netns> {
    let netns = Netns::create(&format!("lb-dp-{}-{suffix}", process::id()))?;
    netns.run(|| ip("link set lo up"))?;
    Ok(netns)
}

fn ip(arguments: &str) -> Result<()> {
    let output = Command::new("ip").args(arguments.split(' ')).output()?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "ip {arguments}: {error}");
    Ok(())
}

fn index_of(name: &str) -> Result<u32> {
    Ok(nix::net::if_::if_nametoindex(name)?)
}

/// The names of the programs on both directions of an interface of the caller's namespace.
fn tcx_programs(interface: &str) -> Result<Vec<String>> {
    let index = index_of(interface)?;
    let mut names = Vec::new();
    for (_, attach_type) in TCX {
        for id in lb_sys::tcx_query(index, attach_type)? {
            names.push(lb_sys::program_info(lb_sys::program_by_id(id)?.as_fd())?.name());
        }
    }
    Ok(names)
}

fn wait_for(what: &str, mut is_so: impl FnMut() -> Result<bool>) -> Result<Duration> {
    let started = Instant::now();
    while !is_so()? {
        ensure!(started.elapsed() < DEADLINE, "waited too long for {what}");
        thread::sleep(Duration::from_micros(200));
    }
    Ok(started.elapsed())
}

fn backend4(last: u8) -> Backend<Address4> {
    Backend {
        address: Ipv4Addr::new(10, 0, 0, last).into(),
        port: Be16::new(8080),
        generation: 7,
        sets: IN_CLUSTER_SET,
        service: 3,
        ..Backend::default()
    }
}

fn backend6(last: u16) -> Backend<Address6> {
    let Backend { port, generation, sets, flags, zero, service, .. } = backend4(0);
    let address = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, last).into();
    Backend { address, port, generation, sets, flags, zero, service, node: address }
}

fn name(text: &str) -> Name {
    let mut name = Name { text: [0; Name::CAPACITY], length: 0, family: 4, protocol: TCP, zero: 0 };
    name.length = text.len() as u8;
    name.text[..text.len()].copy_from_slice(text.as_bytes());
    name
}

const SERVICE: Service = Service {
    cluster: SlotRange::new(65_530, 10),
    local: SlotRange::new(5, 1),
    affinity_seconds: 9,
    flags: Service::INTERNAL_LOCAL,
};

fn frontend_key() -> FrontendKey<Address4> {
    FrontendKey::new(Ipv4Addr::new(10, 96, 0, 1).into(), Be16::new(80), TCP)
}

fn fill(dataplane: &mut impl Dataplane) -> Result<(), DataplaneError> {
    dataplane.store_backend4(127, backend4(7))?;
    dataplane.store_backend6(127, backend6(7))?;
    dataplane.store_slots(65_530, &[127, 1, 2, 3, 4, 5, 6, 7, 8, 9])?;
    dataplane.store_name(63, name("default/web:http"))?;
    dataplane.store_service(63, SERVICE)?;
    let value = Frontend { service: 63, kind: FrontendKind::CLUSTER_IP, ..Frontend::default() };
    dataplane.upsert_frontend4(frontend_key(), value)?;
    dataplane.store_settings(&Settings { ticks_per_second: 250, ..Settings::default() })
}

fn check_filled(dataplane: &impl Dataplane) -> Result<()> {
    let state = dataplane.read_state()?;
    ensure!(state.backends4[127] == backend4(7) && state.backends6[127] == backend6(7));
    ensure!(state.backends4.len() == 128 && state.slots.len() == 70_000);
    ensure!(state.slots[65_530..65_540] == [127, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
    ensure!(state.names == [(63, name("default/web:http"))]);
    ensure!(state.services[63] == SERVICE);
    ensure!(state.frontends4.len() == 1 && state.frontends4[0].0 == frontend_key());
    ensure!(state.settings.ticks_per_second == 250);
    Ok(())
}

#[test]
fn what_is_stored_is_what_the_next_agent_reads_whatever_size_it_asks_for() -> Result<()> {
    let dir = BpfDir::new();
    dir.load()?;
    fill(&mut KernelDataplane::open(&dir.pins())?)?;
    let larger = Sizes { services: 128, backends: 256, ..SIZES };
    load(&dir.pins(), &larger, Constants::default())?;
    let mut adopted = KernelDataplane::open(&dir.pins())?;
    ensure!(adopted.capacity().services == 64 && adopted.capacity().backends4 == 128);
    check_filled(&adopted)?;
    adopted.delete_frontend4(frontend_key())?;
    adopted.delete_frontend4(frontend_key())?;
    ensure!(adopted.read_state()?.frontends4.is_empty());
    Ok(())
}

fn range4(service: u32, net: [u8; 4], length: u32) -> RangeKey<Address4> {
    RangeKey::new(service, Ipv4Addr::from(net).into(), length)
}

#[test]
fn ranges_are_found_by_the_longest_prefix_and_read_back_until_they_are_deleted() -> Result<()> {
    let directory = BpfDir::new();
    directory.load()?;
    let mut dataplane = KernelDataplane::open(&directory.pins())?;
    let keys = [
        range4(1, [10, 0, 0, 0], 8),
        range4(1, [10, 1, 0, 0], 16),
        range4(2, [0; 4], 0),
        range4(2, [192, 0, 2, 1], 32),
    ];
    for key in keys.into_iter().chain(keys) {
        dataplane.insert_range4(key)?;
    }
    let net = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0);
    let key6 = RangeKey::new(3, net.into(), 8);
    dataplane.insert_range6(key6)?;
    let state = dataplane.read_state()?;
    let mut found = state.ranges4.clone();
    found.sort();
    let mut expected = keys.to_vec();
    expected.sort();
    ensure!((&found, &state.ranges6) == (&expected, &vec![key6]), "{state:?}");
    let ranges: TypedMap<RangeKey<Address4>, u32> =
        TypedMap::new(directory.pins().open("RANGES4")?)?;
    let lets_in = |service, client| ranges.get(&range4(service, client, 32));
    ensure!(lets_in(1, [10, 9, 9, 9])? == Some(1));
    ensure!(lets_in(1, [11, 0, 0, 1])?.is_none());
    ensure!(lets_in(2, [11, 0, 0, 1])? == Some(1));
    ensure!(lets_in(3, [10, 9, 9, 9])?.is_none());
    for key in [keys[0], keys[0]] {
        dataplane.delete_range4(key)?;
    }
    ensure!(lets_in(1, [10, 9, 9, 9])?.is_none() && lets_in(1, [10, 1, 9, 9])? == Some(1));
    dataplane.delete_range6(key6)?;
    ensure!(dataplane.read_state()?.ranges6.is_empty());
    let limit = dataplane.capacity().ranges4;
    ensure!(limit == SIZES.services);
    let error = (0..=limit)
        .find_map(|service| dataplane.insert_range4(range4(service, [1, 2, 3, 4], 32)).err());
    let error = error.context("the map takes more than it should")?.to_string();
    ensure!(error.contains("RANGES4") && error.contains("--max-services"), "{error}");
    Ok(())
}

#[test]
fn addresses_of_nodes_are_read_back_until_they_are_deleted() -> Result<()> {
    let directory = BpfDir::new();
    directory.load()?;
    let mut dataplane = KernelDataplane::open(&directory.pins())?;
    let v4 = [1, 2].map(|last| Address4::from(Ipv4Addr::new(192, 0, 2, last)));
    let v6 = Address6::from(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1));
    for address in v4.into_iter().chain(v4) {
        dataplane.insert_node4(address)?;
    }
    dataplane.insert_node6(v6)?;
    let mut state = KernelDataplane::open(&directory.pins())?.read_state()?;
    state.nodes4.sort();
    ensure!((&state.nodes4, &state.nodes6) == (&v4.to_vec(), &vec![v6]), "{state:?}");
    for address in [v4[0], v4[0]] {
        dataplane.delete_node4(address)?;
    }
    dataplane.delete_node6(v6)?;
    let state = dataplane.read_state()?;
    ensure!((state.nodes4.len(), state.nodes6.len()) == (1, 0), "{state:?}");
    let limit = dataplane.capacity().nodes4;
    ensure!(limit == dataplane.capacity().nodes6 && limit == 16_384);
    let address = |last: u32| Address4::from(Ipv4Addr::from_bits(last));
    let error = (1..=limit).find_map(|last| dataplane.insert_node4(address(last)).err());
    let error = error.context("the map takes more than it should")?.to_string();
    ensure!(error.contains("NODES4") && !error.contains("--max"), "{error}");
    Ok(())
}

#[test]
fn a_store_into_memory_is_seen_by_a_lookup_and_the_settings_flip_between_two_copies() -> Result<()>
{
    let dir = BpfDir::new();
    dir.load()?;
    let pins = dir.pins();
    let mut dataplane = KernelDataplane::open(&pins)?;
    fill(&mut dataplane)?;
    let services = TypedMap::<u32, Service>::new(pins.open("SERVICES")?)?;
    ensure!(services.get(&63)? == Some(SERVICE));
    let range = SlotRange::new(1, 2);
    dataplane.publish_cluster(63, range)?;
    ensure!(services.get(&63)?.context("no service")?.cluster == range);
    let settings = TypedMap::<u32, SettingsPair>::new(pins.open("SETTINGS")?)?;
    let before = settings.get(&0)?.context("no settings")?;
    dataplane.store_settings(&Settings { ticks_per_second: 100, ..Settings::default() })?;
    let after = settings.get(&0)?.context("no settings")?;
    ensure!(before.active != after.active);
    ensure!(after.copies[after.active as usize].ticks_per_second == 100);
    ensure!(after.copies[before.active as usize].ticks_per_second == 250);
    Ok(())
}

#[test]
fn an_index_outside_of_a_map_is_an_error_that_names_the_map() -> Result<()> {
    let dir = BpfDir::new();
    dir.load()?;
    let mut dataplane = KernelDataplane::open(&dir.pins())?;
    let error = dataplane.store_backend6(128, backend6(1)).err().context("stored")?;
    ensure!(error.map == "BACKENDS6", "{error}");
    let error = dataplane.store_slots(69_999, &[1, 2]).err().context("stored")?;
    ensure!(error.map == "SLOTS", "{error}");
    Ok(())
}

#[test]
fn a_pin_of_another_layout_is_refused_with_a_sentence() -> Result<()> {
    let dir = BpfDir::new();
    dir.load()?;
    let pins = dir.pins();
    fs::remove_file(pins.map("SLOTS"))?;
    lb_sys::obj_pin(pins.open("BACKENDS6")?.as_fd(), &pins.map("SLOTS"))?;
    let error = dir.load().err().context("loaded over another map")?.to_string();
    let expected = format!("{} has another layout", pins.map("SLOTS").display());
    ensure!(error.contains(&expected) && error.contains("cleanup"), "{error}");
    Ok(())
}

/// Link and program at `pin`.
fn link(pin: &Path) -> Result<(u32, u32)> {
    let link = lb_sys::obj_get(pin).with_context(|| format!("no link at {}", pin.display()))?;
    let info = lb_sys::link_info(link.as_fd())?;
    Ok((info.id, info.program))
}

#[test]
fn the_next_agent_replaces_programs_on_the_links_of_the_last_one() -> Result<()> {
    let dir = BpfDir::new();
    let netns = namespace("adopt")?;
    netns.run(|| {
        let pins = dir.pins();
        let interface = Interface { index: 1, name: "lo".into() };
        let start = || -> Result<(u32, u32)> {
            let programs = dir.load()?;
            TcAttacher::new(&pins, TcAttach::Tcx)?.attach(
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
            let mut attacher = TcAttacher::new(&dir.pins(), mode)?;
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
        let cleaned = cleanup::cleanup(&dir.0)?;
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

            ip("route delete default")?;
            wait_for("the role to change", || Ok(tcx_programs("up0")? == ["from_pod", "to_pod"]))?;
            ip("route add default via 192.0.2.2")?;
            wait_for("the role to change back", || {
                Ok(tcx_programs("up0")? == ["from_device", "to_device"])
            })?;
            Ok(())
        })
    })
}

#[test]
fn flows_are_told_of_changes_of_routes_rules_and_neighbours() -> Result<()> {
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
fn a_restart_takes_links_over_and_drops_those_of_interfaces_that_are_none_of_ours() -> Result<()> {
    let dir = BpfDir::new();
    let (netns, pod) = (namespace("again")?, namespace("peer")?);
    netns.run(|| {
        ip(&format!("link add veth0 type veth peer name eth0 netns {}", pod.name()))?;
        ip("link add veth1 type veth peer name veth2")?;
        with_interfaces(&dir, |_| Ok(()))?;
        let pin = dir.pins().links().join(format!("{}-veth0-ingress", index_of("veth0")?));
        let first = link(&pin)?;
        let stranger = Interface { index: index_of("veth1")?, name: "veth1".into() };
        TcAttacher::new(&dir.pins(), TcAttach::Tcx)?.attach(
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

/// A cgroup that is taken away.
struct OwnCgroup(Cgroup);

impl OwnCgroup {
    fn create(suffix: &str) -> Result<Self> {
        Ok(Self(Cgroup::create(&format!("lb-dp-{}-{suffix}", process::id()))?))
    }
}

impl Drop for OwnCgroup {
    fn drop(&mut self) {
        self.0.remove();
    }
}

#[test]
fn connect_hooks_are_taken_over_follow_the_mode_and_the_cgroup() -> Result<()> {
    let dir = BpfDir::new();
    let (one, other) = (OwnCgroup::create("one")?, OwnCgroup::create("other")?);
    let pins = dir.pins();
    let attach = |group: &OwnCgroup, mode| -> Result<usize> {
        Hooks::attach(&pins, &dir.load()?, group.0.path(), mode)?;
        Ok(fs::read_dir(pins.links())?.count())
    };
    let connect4 = || link(&pins.links().join("cgroup-connect4"));
    ensure!(attach(&one, SocketLb::All)? == 8);
    let first = connect4()?;
    ensure!(attach(&one, SocketLb::Tcp)? == 4);
    let second = connect4()?;
    ensure!(first.0 == second.0 && first.1 != second.1, "{first:?} {second:?}");
    ensure!(attach(&other, SocketLb::Tcp)? == 4);
    ensure!(connect4()?.0 != second.0, "still on the former cgroup");
    ensure!(attach(&other, SocketLb::Off)? == 0);
    Ok(())
}

#[test]
fn cleanup_takes_away_what_is_ours_and_leaves_the_rest() -> Result<()> {
    let dir = BpfDir::new();
    let group = OwnCgroup::create("cleanup")?;
    let netns = namespace("cleanup")?;
    netns.run(|| {
        with_interfaces(&dir, |_| Ok(()))?;
        let programs = dir.load()?;
        Hooks::attach(&dir.pins(), &programs, group.0.path(), SocketLb::Tcp)?;
        let theirs = dir.0.join("theirs");
        fs::create_dir(&theirs)?;
        cleanup::cleanup(&dir.0)?;
        ensure!(tcx_programs("lo")?.is_empty());
        let left: Vec<_> =
            fs::read_dir(&dir.0)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
        ensure!(left == [theirs], "{left:?}");
        cleanup::cleanup(&dir.0)?;
        Ok(())
    })
}

const TIMEOUTS: Timeouts = Timeouts {
    tcp_syn: 100,
    tcp_established: 100_000,
    tcp_half_closed: 100,
    tcp_fin_one_way: 120,
    tcp_closing: 100,
    udp: 100,
    udp_answered: 100,
};

#[test]
fn the_sweep_removes_what_is_past_twice_its_timeout_unless_its_pair_is_not() -> Result<()> {
    let dir = BpfDir::new();
    let programs = dir.load()?;
    let pins = dir.pins();
    let now = lb_sys::ticks_now(programs.get("clock")?)?;
    let flows = TypedMap::<FlowKey<Address4>, Flow<Address4>>::new(pins.open("FLOWS4")?)?;
    let pair = |port: u16, request_age: u32, reply_age: u32, state: u8| -> Result<()> {
        let tuple = Tuple {
            source: Ipv4Addr::new(10, 0, 0, 1).into(),
            destination: Ipv4Addr::new(10, 96, 0, 1).into(),
            source_port: Be16::new(port),
            destination_port: Be16::new(80),
        };
        let rewrite = Tuple { destination: Ipv4Addr::new(10, 0, 0, 2).into(), ..tuple };
        let protocol = u32::from(TCP);
        let flow = |rewrite, age: u32| Flow {
            rewrite,
            state,
            last_seen: now.wrapping_sub(age),
            ..Flow::default()
        };
        flows.set(&FlowKey { tuple, protocol }, &flow(rewrite, request_age))?;
        let back = FlowKey { tuple: rewrite.reversed(), protocol };
        Ok(flows.set(&back, &flow(tuple.reversed(), reply_age))?)
    };
    pair(1, 150, 150, 0)?;
    pair(2, 1_000, 1_000, 0)?;
    pair(3, 1_000, 150, 0)?;
    pair(4, 1_000, 1_000, ANSWERED)?;
    // Tunnelled requests have no pair. With a FIN they are kept for a shorter time than others.
    let alone = |port: u16, age: u32, state: u8| -> Result<()> {
        let tuple = Tuple { source_port: Be16::new(port), ..Tuple::default() };
        let last_seen = now.wrapping_sub(age);
        let flow = Flow { action: Action::REQUEST_TUNNEL, state, last_seen, ..Flow::default() };
        Ok(flows.set(&FlowKey { tuple, protocol: u32::from(TCP) }, &flow)?)
    };
    alone(5, 1_000, ONE_WAY | ANSWERED)?;
    alone(6, 230, ONE_WAY | ANSWERED | CLIENT_FIN)?;
    alone(7, 250, ONE_WAY | ANSWERED | CLIENT_FIN)?;
    let mut sweeper = Sweeper::open(&pins)?;
    let fills = sweeper.sweep(&TIMEOUTS, 250)?;
    let fill = fills.iter().find(|fill| fill.map == "FLOWS4").context("no FLOWS4")?;
    ensure!((fill.removed, fill.entries, fill.max_entries) == (3, 8, 1_024), "{fill:?}");
    let fills = sweeper.sweep(&TIMEOUTS, 250)?;
    ensure!(fills.iter().all(|fill| fill.removed == 0), "{fills:?}");
    Ok(())
}

#[test]
fn get_shows_what_is_pinned_and_says_when_nothing_is() -> Result<()> {
    let dir = BpfDir::new();
    let arguments =
        |what, output| GetArgs { what, output, pins: PinArgs { bpf_dir: dir.0.clone() } };
    let error = get::get(&arguments(What::Services, Output::Table)).err().context("shown")?;
    ensure!(error.to_string().starts_with("nothing is pinned at "), "{error}");
    dir.load()?;
    fill(&mut KernelDataplane::open(&dir.pins())?)?;
    let services = get::get(&arguments(What::Services, Output::Json))?;
    let services: serde_json::Value = serde_json::from_str(&services)?;
    ensure!(services[0]["name"] == "default/web:http", "{services}");
    ensure!(services[0]["frontends"][0] == "10.96.0.1:80", "{services}");
    ensure!(services[0]["cluster_backends"] == 10, "{services}");
    let all = [What::Frontends, What::Backends, What::Flows, What::Affinity, What::Counters];
    for what in all {
        let text = get::get(&arguments(what, Output::Json))?;
        ensure!(serde_json::from_str::<serde_json::Value>(&text)?.is_array(), "{what:?}: {text}");
        get::get(&arguments(what, Output::Table))?;
    }
    Ok(())
}
