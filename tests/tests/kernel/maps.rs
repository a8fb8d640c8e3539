//! The agent's view of its maps, against the kernel: what is stored is read back, by the same
//! agent and the next, and what has expired is swept.

use std::{
    fs,
    net::{Ipv4Addr, Ipv6Addr},
    os::fd::{AsFd, AsRawFd, OwnedFd},
};

use anyhow::{Context, Result, anyhow, ensure};
use lb_agent::{
    cli::{GetArgs, Output, PinArgs, What},
    commands::get::{self, GetError},
    maps::{
        flow_table::{FlowTable, Flows},
        kernel::KernelDataplane,
        memory::Memory,
        pins::pinned_maps,
        sweep::{Sweeper, Swept},
    },
    options::sizes::Sizes,
    programs::{
        load::Constants,
        prepare::{load, prepare},
    },
};
use lb_common::{
    abi::{
        address::{Address4, Address6, Be16},
        backend::{Backend, IN_CLUSTER_SET},
        flow::{ANSWERED, Action, CLIENT_FIN, CONFIRMED, Flow, FlowKey, ONE_WAY, Tuple},
        frontend::{Frontend, FrontendKey, FrontendKind, TCP},
        range::RangeKey,
        service::{Name, Service, SlotRange},
        settings::{PortRange, Settings, SettingsPair, Timeouts},
    },
    balance::track,
    flow_table::{Class, NewFlow},
};
use lb_control::dataplane::{Dataplane, DataplaneError};
use lb_sys::TypedMap;

use crate::sandbox::{BpfDir, SIZES};

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

/// Takes the maps over as an agent with these sizes does.
fn take_over(dir: &BpfDir, sizes: &Sizes) -> Result<KernelDataplane> {
    let prepared = prepare(&dir.pins(), sizes, Constants::default())?;
    ensure!(prepared.is_current(&dir.pins()), "the maps are said to have changed");
    prepared.take_maps(&dir.pins())?;
    Ok(KernelDataplane::open(&dir.pins())?)
}

#[test]
fn the_next_agent_reads_what_is_stored_whatever_size_it_asks_for() -> Result<()> {
    let dir = BpfDir::new();
    dir.load()?;
    fill(&mut KernelDataplane::open(&dir.pins())?)?;
    let larger = Sizes { services: 128, backends: 256, ..SIZES };
    let adopted = take_over(&dir, &larger)?;
    ensure!(adopted.capacity().services == 128 && adopted.capacity().backends4 == 256);
    let state = adopted.read_state()?;
    ensure!(state.backends4[127] == backend4(7) && state.backends4.len() == 256);
    ensure!(state.names == [(63, name("default/web:http"))] && state.services[63] == SERVICE);
    let mut adopted = take_over(&dir, &SIZES)?;
    ensure!(adopted.capacity().services == 64 && adopted.capacity().backends4 == 128);
    check_filled(&adopted)?;
    let smaller = take_over(&dir, &Sizes { services: 63, ..SIZES });
    let error = smaller.err().context("entry 63 has room in 63 entries")?.to_string();
    ensure!(error.contains("--max-services 63 is too small"), "{error}");
    ensure!(error.contains("give at least 64"), "{error}");
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
    // What is unmapped keeps its content, and is mapped again by the next store.
    dataplane.unmap()?;
    ensure!(services.get(&63)?.context("no service")?.cluster == range);
    dataplane.publish_cluster(63, SlotRange::new(1, 3))?;
    ensure!(services.get(&63)?.context("no service")?.cluster == SlotRange::new(1, 3));
    ensure!(services.get(&63)?.context("no service")?.flags == SERVICE.flags);
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

const TIMEOUTS: Timeouts = Timeouts {
    tcp_syn: 100,
    tcp_established: 100_000,
    tcp_half_closed: 100,
    tcp_fin_one_way: 120,
    tcp_closing: 100,
    udp: 100,
    tcp_reset: 100,
    udp_stream: 100,
};

#[test]
fn the_sweep_removes_flows_past_twice_their_timeout_and_counts_the_others() -> Result<()> {
    const TICKS_PER_SECOND: u32 = 250;
    let dir = BpfDir::new();
    let programs = dir.load()?;
    let pins = dir.pins();
    let time_shift = Settings::time_shift_of(TICKS_PER_SECOND);
    let now = lb_sys::ticks_now(programs.get("clock")?)? >> time_shift;
    let table = FlowTable::<Address4>::writable(&pins)?;
    let insert = |port: u16, age: u32, state: u8, [action, reply_action]: [Action; 2]| {
        let request = Tuple {
            source: Ipv4Addr::new(10, 0, 0, 1).into(),
            destination: Ipv4Addr::new(10, 96, 0, 1).into(),
            source_port: Be16::new(port),
            destination_port: Be16::new(80),
        };
        let rewrite = Tuple { destination: Ipv4Addr::new(10, 0, 0, 2).into(), ..request };
        let last_seen = now.wrapping_sub(age);
        let protocol = u32::from(TCP);
        let mut new = NewFlow::default();
        new.flow = Flow { rewrite, action, state, last_seen, ..Flow::default() };
        new.reply_key = FlowKey { tuple: rewrite.reversed(), protocol };
        new.reply_action = reply_action;
        let inserted = table.insert(
            &FlowKey { tuple: request, protocol },
            &mut new,
            &track::lifetimes(&TIMEOUTS),
        );
        inserted.map_err(|error| anyhow!("the flow of port {port}: {error:?}"))
    };
    const BOTH: [Action; 2] = [Action::REQUEST, Action::REPLY];
    insert(1, 150, 0, BOTH)?;
    insert(2, 1_000, 0, BOTH)?;
    insert(3, 1_000, ANSWERED | CONFIRMED, BOTH)?;
    // Tunnelled requests have no replies. With a FIN they are kept for a shorter time than others.
    const ALONE: [Action; 2] = [Action::REQUEST_TUNNEL, Action { action: 0 }];
    insert(4, 1_000, ONE_WAY | CONFIRMED, ALONE)?;
    insert(5, 230, ONE_WAY | CONFIRMED | CLIENT_FIN, ALONE)?;
    insert(6, 250, ONE_WAY | CONFIRMED | CLIENT_FIN, ALONE)?;
    let mut sweeper = Sweeper::open(&pins)?;
    let Swept { fills, flows, .. } =
        sweeper.sweep(&TIMEOUTS, TICKS_PER_SECOND, PortRange::default())?;
    let fill = fills.iter().find(|fill| fill.map == "FLOW_TABLE4").context("no flows")?;
    ensure!((fill.removed, fill.entries, fill.max_entries) == (2, 4, 1_024), "{fill:?}");
    ensure!(flows[0][Class::Established as usize] == 3, "{flows:?}");
    ensure!(flows[0][Class::Unanswered as usize] == 1, "{flows:?}");
    let swept = sweeper.sweep(&TIMEOUTS, TICKS_PER_SECOND, PortRange::default())?;
    ensure!(swept.fills.iter().all(|fill| fill.removed == 0), "{swept:?}");
    ensure!(swept.flows == flows, "{swept:?}");
    Ok(())
}

#[test]
fn get_shows_pinned_maps_and_says_when_there_are_none() -> Result<()> {
    let dir = BpfDir::new();
    let arguments = |what, output| {
        let pins = PinArgs { bpf_dir: dir.0.clone() };
        GetArgs { what, output, service: None, address: None, pins }
    };
    let shown = |what, output| -> Result<String, GetError> {
        let mut text = Vec::new();
        get::get(&arguments(what, output), &mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    };
    let error = shown(What::Services, Output::Table).err().context("shown")?;
    ensure!(error.to_string().starts_with("nothing is pinned at "), "{error}");
    dir.load()?;
    fill(&mut KernelDataplane::open(&dir.pins())?)?;
    let services = shown(What::Services, Output::Json)?;
    let services: serde_json::Value = serde_json::from_str(&services)?;
    ensure!(services[0]["name"] == "default/web:http", "{services}");
    ensure!(services[0]["frontends"][0] == "10.96.0.1:80", "{services}");
    ensure!(services[0]["cluster_backends"] == 10, "{services}");
    let all = [What::Frontends, What::Backends, What::Flows, What::Affinity, What::Counters];
    for what in all {
        let text = shown(what, Output::Json)?;
        ensure!(serde_json::from_str::<serde_json::Value>(&text)?.is_array(), "{what:?}: {text}");
        shown(what, Output::Table)?;
    }
    Ok(())
}

/// What the kernel says that the map of a descriptor takes.
fn taken(descriptor: &OwnedFd) -> Result<u64> {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", descriptor.as_raw_fd()))?;
    let bytes = info.lines().find_map(|line| line.strip_prefix("memlock:"));
    Ok(bytes.context("the kernel tells no memory of maps")?.trim().parse()?)
}

#[test]
fn the_memory_of_the_maps_is_told_before_they_are_made() -> Result<()> {
    let dir = BpfDir::new();
    let sizes = Sizes { services: 8_192, backends: 16_384, slots: 65_536, flows: 32_768 };
    load(&dir.pins(), &sizes, Constants::default())?;
    let pins = dir.pins();
    let (mut told, mut sum) = (0, 0);
    for map in &pinned_maps(&sizes) {
        let said = Memory::of_one(map).fixed;
        let kernel = taken(&pins.open(map.name)?)?;
        let name = map.name;
        // Small maps are rounded up to pages.
        ensure!(said.abs_diff(kernel) <= kernel / 10 + 16_384, "{name}: {said}, not {kernel}");
        (told, sum) = (told + said, sum + kernel);
    }
    ensure!(told.abs_diff(sum) <= sum / 50, "all: {told}, not {sum}");
    Ok(())
}
