//! The table of flows while programs on all CPUs change it, and the agent as well.
//!
//! The backends of a Service are other Services: a program that runs again and again on what it made
//! of a packet opens flow after flow, without a system call in between.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;

use anyhow::{Context, Result, anyhow, ensure};
use lb_agent::maps::flow_table::{FlowTable, Flows};
use lb_common::abi::address::{Be16, Ipv4, Ipv6};
use lb_common::abi::flow::Tuple;
use lb_common::abi::frontend::TCP;
use lb_common::balance::Endpoint;
use lb_common::flow_table::{Found, remove};
use lb_common::packet::{ACK, RST, SYN};
use lb_testing::family::TestFamily;
use lb_testing::flow::tuple;
use lb_testing::flow_table::invariants::Contents;
use lb_testing::frame::Frame;
use lb_testing::interpreter::Interpreter;
use lb_testing::random::Random;
use lb_testing::site::TestSite;
use lb_testing::world::{Location, SOURCE_PORTS, World, at};
use lb_tests::harness::flows::check;
use lb_tests::harness::kernel::{Kernel, KernelFamily};
use lb_tests::harness::programs::{Programs, in_private_namespace};

/// Two buckets: each flow is always in another's way.
const PLACES: u32 = 16;
const CLIENTS: u8 = 2;
const SERVICES: u8 = 6;
/// Beside the ports that the programs draw.
const CLIENT_PORT: u16 = 40_000;

/// Threads that check what becomes of each packet, and how many each of them sends.
const SENDERS: u64 = 2;
const PACKETS: u32 = 100_000;
/// Threads that only open flows, and how often a program runs in one call.
const WALKERS: u64 = 2;
const STEPS: u32 = 32;

/// The first packet of a client.
fn random_request<F: TestFamily>(random: &mut Random) -> Tuple<F::Address> {
    let client = at(F::pod(10 + random.below(CLIENTS.into()) as u8), CLIENT_PORT);
    tuple(client, frontend::<F>(random.below(SERVICES.into()) as u8))
}

fn frontend<F: TestFamily>(service: u8) -> Endpoint<F::Address> {
    at(F::vip(1 + service), 80)
}

/// The Services that are backends of a Service. Each is a backend of two, so that flows to both may
/// have the same replies.
fn backends(service: u8) -> [u8; 2] {
    [1, 2].map(|distance| (service + distance) % SERVICES)
}

fn world<F: TestFamily>() -> World<F> {
    let mut world = World::default();
    for service in 0..SERVICES {
        let index = world.add_service(frontend::<F>(service), TCP);
        for backend in backends(service) {
            world.add_backend(index, frontend::<F>(backend), Location::OtherNode);
        }
    }
    world
}

/// Checks that requests may be translated so: from a Service to its backend, by the same client,
/// which keeps its port or gets one of the node's.
fn check_translation<F: TestFamily>(
    request: &Tuple<F::Address>,
    sent: &Tuple<F::Address>,
) -> Result<()> {
    let service = |tuple: &Tuple<F::Address>| {
        let to = Endpoint { address: tuple.destination, port: tuple.destination_port };
        (0..SERVICES).find(|service| frontend::<F>(*service) == to)
    };
    let is_backend = service(request)
        .zip(service(sent))
        .is_some_and(|(service, backend)| backends(service).contains(&backend));
    let has_port = |tuple: &Tuple<F::Address>| {
        let port = tuple.source_port.get();
        port == CLIENT_PORT || SOURCE_PORTS.contains(port)
    };
    ensure!(
        is_backend
            && request.source == sent.source
            && has_port(request)
            && (sent.source_port == request.source_port
                || SOURCE_PORTS.contains(sent.source_port.get())),
        "{request:?} became {sent:?}"
    );
    Ok(())
}

/// Addresses and ports of a frame without options.
fn tuple_of<F: TestFamily>(frame: &[u8]) -> Tuple<F::Address> {
    let (addresses, ports) = frame[F::ADDRESSES..].split_at(2 * F::ADDRESS_LENGTH);
    let port = |at: usize| Be16::new(u16::from_be_bytes([ports[at], ports[at + 1]]));
    Tuple {
        source: F::address(addresses),
        destination: F::address(&addresses[F::ADDRESS_LENGTH..]),
        source_port: port(0),
        destination_port: port(2),
    }
}

fn frame_of<F: TestFamily>(tuple: &Tuple<F::Address>, flags: u8) -> Vec<u8> {
    let from = Endpoint { address: tuple.source, port: tuple.source_port };
    let to = Endpoint { address: tuple.destination, port: tuple.destination_port };
    Frame::<F>::of(TCP, from, to, flags).bytes()
}

/// The programs, and frames that are made once: most of the time should pass in the programs.
struct Sender<'a, F: TestFamily> {
    programs: &'a Programs,
    frames: HashMap<(Tuple<F::Address>, u8), Vec<u8>>,
}

impl<F: TestFamily> Sender<'_, F> {
    /// Where the packet goes, if the program translates it and leaves it to the stack.
    fn send(
        &mut self,
        site: TestSite,
        tuple: Tuple<F::Address>,
        flags: u8,
    ) -> Result<Option<Tuple<F::Address>>> {
        const NEXT: i32 = -1;
        let make = || frame_of::<F>(&tuple, flags);
        let frame = self.frames.entry((tuple, flags)).or_insert_with(make);
        let ran = self.programs.run(site.hook().name(), frame, site.ifindex(), 0)?;
        Ok((ran.returned == NEXT && ran.frame != *frame).then(|| tuple_of::<F>(&ran.frame)))
    }
}

/// Sends packets of few flows, and replies to what it has seen of them. Returns how many requests
/// and how many replies were translated.
fn send<F: TestFamily>(programs: &Programs, thread: u64) -> Result<[u32; 2]> {
    const REMEMBERED: usize = 16;
    let mut sender: Sender<'_, F> = Sender { programs, frames: HashMap::new() };
    let mut random = Random::new(thread + 1);
    let (mut translated, mut last_sent) = ([0; 2], Vec::new());
    for packet in 0..PACKETS as usize {
        let kind = random.below(8);
        if kind < 2 && !last_sent.is_empty() {
            let sent: Tuple<_> = random.of(&last_sent);
            let back = sender.send(TestSite::ToPod, sent.reversed(), [SYN | ACK, ACK][kind])?;
            if let Some(back) = back {
                check_translation::<F>(&back.reversed(), &sent).context("of a reply")?;
                translated[1] += 1;
            }
            continue;
        }
        let request = random_request::<F>(&mut random);
        // A reset connection makes room for the next one.
        let flags = [SYN, SYN, SYN, SYN, SYN, ACK, RST, RST][kind];
        if let Some(sent) = sender.send(TestSite::FromPod, request, flags)? {
            check_translation::<F>(&request, &sent).context("of a request")?;
            translated[0] += 1;
            match last_sent.get_mut(packet % REMEMBERED) {
                Some(place) => *place = sent,
                None => last_sent.push(sent),
            }
        }
    }
    Ok(translated)
}

/// Opens flow after flow until the others have ended.
fn walk<F: TestFamily>(programs: &Programs, thread: u64, is_over: &AtomicBool) -> Result<()> {
    let mut random = Random::new(thread + 1);
    let site = TestSite::FromPod;
    while !is_over.load(SeqCst) {
        let frame = frame_of::<F>(&random_request::<F>(&mut random), SYN);
        let times = 1 + random.below(STEPS as usize) as u32;
        programs.run_on_and_on(site.hook().name(), &frame, site.ifindex(), times)?;
    }
    Ok(())
}

/// Removes flows, as the sweep does and regardless of their last packet, and checks the table until
/// the others have ended. Returns how many were removed and how often the table was checked.
fn sweep<F: KernelFamily>(table: &FlowTable<F::Address>, is_over: &AtomicBool) -> Result<[u32; 2]> {
    let (mut random, mut removed, mut checks) = (Random::new(99), 0, 0);
    while !is_over.load(SeqCst) {
        for _ in 0..4 {
            let Some(flow) = table.flow(random.below(PLACES as usize) as u32) else { continue };
            check_translation::<F>(&flow.entry.request, &flow.entry.translated)?;
            let found = Found { entry: flow.place, place: flow.place, word: flow.word };
            removed += u32::from(match random.below(2) {
                0 => table.remove_unchanged(&flow),
                _ => remove(table, &found),
            });
        }
        check(table).with_context(|| format!("after {checks} checks"))?;
        checks += 1;
    }
    Ok([removed, checks])
}

fn joined<T>(thread: thread::ScopedJoinHandle<'_, Result<T>>) -> Result<T> {
    thread.join().map_err(|_| anyhow!("a thread panicked"))?
}

fn stress<F: KernelFamily>() -> Result<()> {
    let mut kernel = Kernel::<F>::with_places(PLACES)?;
    kernel.load(&world());
    let (programs, table) = kernel.into_parts();
    let (programs, table, is_over) = (&programs, &table, &AtomicBool::new(false));
    thread::scope(|scope| {
        let sender = |thread| scope.spawn(move || send::<F>(programs, thread));
        let walker = |thread| scope.spawn(move || walk::<F>(programs, thread, is_over));
        let senders: Vec<_> = (0..SENDERS).map(sender).collect();
        let walkers: Vec<_> = (SENDERS..SENDERS + WALKERS).map(walker).collect();
        let sweeper = scope.spawn(|| sweep::<F>(table, is_over));
        let sent: Vec<_> = senders.into_iter().map(joined).collect();
        is_over.store(true, SeqCst);
        let walked: Vec<_> = walkers.into_iter().map(joined).collect();
        let swept = joined(sweeper)?;
        ensure!(swept.iter().all(|count| *count > 1_000), "removed and checked {swept:?}");
        for sent in sent {
            let sent = sent?;
            ensure!(sent.iter().all(|count| *count > 1_000), "translated {sent:?}");
        }
        walked.into_iter().collect::<Result<()>>()
    })?;
    let contents = check(table).context("at the end")?;
    let Contents { unfinished, void, .. } = contents;
    ensure!((unfinished, void) == (0, 0), "words that belong to no flow: {contents:?}");
    Ok(())
}

#[test]
fn flows_that_take_each_others_places_on_all_cpus_leave_the_table_in_order() -> Result<()> {
    in_private_namespace(|| {
        stress::<Ipv4>()?;
        stress::<Ipv6>()
    })
}
