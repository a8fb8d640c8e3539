//! What the table of flows does at a given load, counted: where flows are, whether a new one finds a place,
//! and who makes room. Seeds and clients are always the same, so the counts are too, on any machine.
//! docs/flow-table.md has these figures.
#![cfg(not(loom))]

use lb_common::{
    abi::{
        address::{Address4, Be16, Ipv4},
        flow::{ANSWERED, Action, CONFIRMED, Flow, FlowKey, Tuple},
        flow_table::{FlowEntry, TIMES, WAYS},
        frontend::TCP,
        settings::Lifetimes,
    },
    balance::track,
    flow_table::{Class, Hash, InsertError, Memory, NewFlow, find_request, insert, remove},
};
use lb_testing::{
    family::TestFamily,
    flow_table::{HostTable, numbered_seed},
    world::timeouts,
};

const BUCKETS: u32 = 1 << 12;
const PLACES: u32 = BUCKETS * WAYS as u32;
const ESTABLISHED: u8 = ANSWERED | CONFIRMED;
/// How many new flows are tried.
const NEW: u32 = 100_000;

/// The request of a client: no two numbers have the same one.
fn request(number: u32) -> FlowKey<Address4> {
    // The finalizer of MurmurHash3, a bijection: clients that follow one another would fill the buckets
    // more evenly than clients do.
    let mixed = (number ^ number >> 16).wrapping_mul(0x85eb_ca6b);
    let mixed = (mixed ^ mixed >> 13).wrapping_mul(0xc2b2_ae35);
    let mixed = mixed ^ mixed >> 16;
    let [a, b, c, d] = mixed.to_be_bytes();
    let source = std::net::Ipv4Addr::new(10, a, b, c).into();
    let source_port = Be16::new(1024 + u16::from(d));
    let (destination, destination_port) = (Ipv4::vip(1), Be16::new(80));
    let tuple = Tuple { source, destination, source_port, destination_port };
    FlowKey { tuple, protocol: TCP.into() }
}

/// Inserts the flow of a client. No established flow is evicted for it. Returns the classes of the flows
/// that are evicted, one bit for each.
fn open(
    table: &HostTable,
    number: u32,
    state: u8,
    lifetimes: &Lifetimes,
) -> Result<u32, InsertError> {
    let key = request(number);
    let rewrite = Tuple { destination: Ipv4::remote_pod(1), ..key.tuple };
    let flow = Flow { rewrite, action: Action::REQUEST, state, ..Flow::default() };
    let mut new = NewFlow::default();
    (new.flow, new.reply_action, new.protected) = (flow, Action::REPLY, TIMES - 1);
    new.reply_key.set_reverse(&rewrite, key.protocol);
    insert(table, &key, &mut new, lifetimes, |place, new| {
        let mut entry = FlowEntry::default();
        entry.write(&key.tuple, &new.flow, new.reply_action);
        table.store(place, entry);
    })?;
    Ok(new.evicted)
}

/// A table with established flows in so many percent of its places.
fn loaded(percent: u32) -> HostTable {
    let (table, lifetimes) = (HostTable::new(BUCKETS), track::lifetimes(&timeouts()));
    let wanted = PLACES * percent / 100;
    // Of a few clients both buckets are full.
    let opened =
        (0..PLACES).filter(|number| open(&table, *number, ESTABLISHED, &lifetimes).is_ok());
    assert_eq!(opened.take(wanted as usize).count(), wanted as usize);
    table
}

/// Of a million: flows that are not at home, buckets that are full, and new flows that find no place.
fn shares(percent: u32) -> [u64; 3] {
    let table = loaded(percent);
    let flows = table.live::<Address4>();
    let mut filled = vec![0; BUCKETS as usize];
    let mut away = 0;
    for (place, _, entry) in &flows {
        let key = FlowKey { tuple: entry.request, protocol: TCP.into() };
        let seed = Memory::<Address4>::seed(&table).expect("a seed");
        let home = Hash::of_request(&key, seed).bucket::<Address4>(0, seed);
        away += u64::from(home != place / WAYS as u32);
        filled[(place / WAYS as u32) as usize] += 1;
    }
    let full = filled.iter().filter(|count| **count == WAYS).count() as u64;
    let (mut refused, lifetimes) = (0, track::lifetimes(&timeouts()));
    for number in 0..NEW {
        let number = PLACES + number;
        if open(&table, number, ESTABLISHED, &lifetimes).is_err() {
            refused += 1;
            continue;
        }
        let found = find_request(&table, &request(number)).expect("it was inserted");
        assert!(remove::<Address4, _>(&table, &found));
    }
    let million = |part: u64, all: u64| part * 1_000_000 / all;
    [million(away, flows.len() as u64), million(full, BUCKETS.into()), million(refused, NEW.into())]
}

#[test]
fn most_flows_are_at_home_and_a_new_one_finds_a_place() {
    // Percent of the places that established flows have, and the most of a million that may be: flows
    // that are not at home, buckets that are full, new flows without a place.
    let gates =
        [(25, [10, 250, 10]), (50, [8_800, 52_800, 2_600]), (75, [52_000, 315_000, 99_000])];
    let found = gates.map(|(percent, _)| (percent, shares(percent)));
    println!("{found:?}");
    for ((percent, found), (_, most)) in found.into_iter().zip(gates) {
        let is_kept = found.iter().zip(most).all(|(found, most)| *found <= most);
        assert!(is_kept, "{percent} % full: {found:?} of a million, at most {most:?}");
    }
}

#[test]
fn a_flood_pushes_out_itself_and_no_established_flow() {
    // Percent of the places that established flows have, and the most of a million packets of a flood that
    // may find no place, because both of their buckets are full of established flows.
    for (percent, most) in [(30, 0), (60, 16_000)] {
        let table = loaded(percent);
        let mut evicted = [0_u32; Class::ALL.len()];
        let (mut refused, lifetimes) = (0, track::lifetimes(&timeouts()));
        for number in 0..10 * PLACES {
            match open(&table, PLACES + number, 0, &lifetimes) {
                Ok(classes) => {
                    for (class, count) in evicted.iter_mut().enumerate() {
                        *count += classes >> class & 1;
                    }
                }
                Err(_) => refused += 1,
            }
        }
        println!("{percent} %: evicted {evicted:?}, refused {refused}");
        let [others @ .., unanswered] = evicted;
        assert_eq!(others, [0; 4], "{percent} %");
        let live = table.live::<Address4>();
        let is_established = |state: u8| state & CONFIRMED != 0;
        let kept = live.iter().filter(|(_, word, _)| is_established(word.state())).count() as u64;
        assert_eq!(kept, u64::from(PLACES * percent / 100));
        // What did not evict another one found a free place, or none.
        let half_open = live.len() as u64 - kept;
        assert_eq!(u64::from(10 * PLACES), u64::from(unanswered + refused) + half_open);
        let part = u64::from(refused) * 1_000_000 / u64::from(10 * PLACES);
        assert!(
            part <= most,
            "{percent} % full: {part} of a million found no place, at most {most}"
        );
    }
}

/// Clients that share an address (NAT) and nodes that draw source ports differ in their ports alone, which
/// follow one another. A hash whose values then are at one distance puts them into a few buckets, for one
/// seed in a hundred.
#[test]
fn ports_that_follow_one_another_are_spread_with_every_seed() {
    const SEEDS: u64 = 500;
    const PORTS: u16 = 5_000;
    // Far more than any bucket gets of so many that are spread at random.
    const MOST: usize = 10;
    let ends = [(Ipv4::vip(1), 30_000), (Ipv4::remote_pod(1), 8080)];
    for number in 0..SEEDS {
        let seed = numbered_seed(number, [1 << 13; 2]);
        let mut filled = [vec![0; 1 << 13], vec![0; 1 << 14]];
        for port in 10_000..10_000 + PORTS {
            let [(service, service_port), (backend, backend_port)] = ends;
            let key = |source, source_port, destination, destination_port| FlowKey {
                tuple: Tuple {
                    source,
                    destination,
                    source_port: Be16::new(source_port),
                    destination_port: Be16::new(destination_port),
                },
                protocol: TCP.into(),
            };
            let request = key(Ipv4::vip(2), port, service, service_port);
            let reply = key(backend, backend_port, Ipv4::vip(3), port);
            let home = Hash::of_request(&request, &seed).bucket::<Address4>(0, &seed);
            let away = Hash::of_reply(&reply, &seed).reply_bucket::<Address4>(&seed);
            filled[0][home as usize] += 1;
            filled[1][away as usize] += 1;
        }
        let most = filled.map(|filled| filled.into_iter().max().unwrap_or_default());
        assert!(most.iter().all(|most| *most <= MOST), "seed {number}: {most:?} in one bucket");
    }
}
