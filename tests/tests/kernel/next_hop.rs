//! What flows remember of where the packets go that the program forwards: on the loaded
//! programs, with routes and neighbours of the kernel.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use lb_common::abi::address::{Family, Ipv4, Ipv6};
use lb_common::abi::flow::Tuple;
use lb_common::abi::frontend::{FrontendKind, UDP};
use lb_common::abi::service::Service;
use lb_common::abi::settings::Timeouts;
use lb_common::balance::{Endpoint, track};
use lb_testing::family::TestFamily;
use lb_testing::frame::{Body, Frame};
use lb_testing::interpreter::{Fate, Interpreter};
use lb_testing::site::TestSite;
use lb_testing::world::{EXTERNAL, Location, NODE_PORTS, World, at, mac, timeouts};
use lb_tests::harness::kernel::{Kernel, KernelFamily};
use lb_tests::harness::programs::{GATEWAY_MAC, MOVED_GATEWAY_MAC, in_private_namespace};

/// Ticks in a second of these tests.
const SECOND: u32 = 1_000_000;

/// A node port over UDP with its backend on another node.
struct Scene<F: KernelFamily> {
    kernel: Kernel<F>,
    world: World<F>,
    frontend: Endpoint<F::Address>,
}

impl<F: KernelFamily> Scene<F> {
    fn new(flags: u32) -> Result<Self> {
        let (mut kernel, mut world) = (Kernel::<F>::load()?, World::default());
        let frontend = at(F::node(), NODE_PORTS.first);
        let index = world.add_service(at(F::vip(1), 80), UDP);
        world.add_frontend_of_kind(FrontendKind::NODE_PORT, index, frontend, UDP);
        world.add_backend(index, at(F::remote_pod(3), 8080), Location::OtherNode);
        world.services[index as usize].flags |= flags;
        // A second that no delay of the test is as long as, and flows that outlive it.
        world.settings.ticks_per_second = SECOND;
        let timeout = world.settings.times(100);
        let timeouts = Timeouts { udp: timeout, udp_stream: timeout, ..timeouts() };
        world.settings.flow_lifetimes = track::lifetimes(&timeouts);
        kernel.load(&world);
        Ok(Self { kernel, world, frontend })
    }

    fn request(&self, payload: usize) -> Frame<F> {
        let client = at(F::outside(), 45_000);
        Frame::new(client, self.frontend, Body::Udp).payload(&vec![0; payload])
    }

    /// The MAC that a frame goes to by itself; the kernel finds it for those that keep theirs.
    fn next_hop(&self, frame: &Frame<F>) -> Result<Option<[u8; 6]>> {
        let bytes = frame.bytes();
        let (outcome, after) = self.kernel.run(TestSite::FromDevice, &bytes)?;
        let is_sent = matches!(outcome.fate, Fate::Forwarded(_) | Fate::Encapsulated(_));
        ensure!(is_sent, "{outcome:?}");
        if after[..12] == bytes[..12] {
            return Ok(None);
        }
        ensure!(after[6..12] == mac(EXTERNAL), "sent with another source: {:02x?}", &after[..12]);
        Ok(Some(after[..6].try_into()?))
    }

    /// Addresses and ports that the backend sees.
    fn sent(&mut self) -> Result<Tuple<F::Address>> {
        let bytes = self.request(8).bytes();
        let (outcome, _) = self.kernel.run(TestSite::FromDevice, &bytes)?;
        outcome.fate.tuple().context("not sent")
    }
}

/// Gives the gateway another MAC.
fn move_gateway<F: Family + TestFamily>(to: [u8; 6]) -> Result<()> {
    let listed = Command::new("ip").args([&format!("-{}", F::NUMBER), "neigh"]).output()?.stdout;
    let listed = String::from_utf8(listed)?;
    let mut moved = 0;
    for line in listed.lines() {
        let words: Vec<_> = line.split(' ').collect();
        let to = to.map(|byte| format!("{byte:02x}")).join(":");
        let neighbour = ["neigh", "replace", words[0], "dev", words[2], "lladdr", &to];
        let status = Command::new("ip").args(neighbour).args(["nud", "permanent"]).status()?;
        ensure!(status.success(), "ip {neighbour:?}");
        moved += 1;
    }
    ensure!(moved > 0, "no neighbours: {listed}");
    Ok(())
}

fn requests_go_where_they_went<F: KernelFamily>(flags: u32) -> Result<()> {
    let mut scene = Scene::<F>::new(flags)?;
    let small = scene.request(8);
    ensure!(scene.next_hop(&small)?.is_none(), "the first one is sent by the kernel");
    ensure!(scene.next_hop(&small)? == Some(GATEWAY_MAC), "the second one by the program");
    move_gateway::<F>(MOVED_GATEWAY_MAC)?;
    ensure!(scene.next_hop(&small)? == Some(GATEWAY_MAC), "nobody has told of the change");
    for device in &mut scene.world.devices {
        device.epoch += 1;
    }
    let world = scene.world.clone();
    scene.kernel.load(&world);
    ensure!(scene.next_hop(&small)?.is_none(), "the kernel is asked in a new epoch");
    ensure!(scene.next_hop(&small)? == Some(MOVED_GATEWAY_MAC), "and what it says is remembered");
    move_gateway::<F>(GATEWAY_MAC)?;
    scene.kernel.advance(SECOND);
    ensure!(scene.next_hop(&small)?.is_none(), "the kernel is asked after a second");
    ensure!(scene.next_hop(&small)? == Some(GATEWAY_MAC), "that too is remembered");
    // What does not fit is told, known way or not.
    let large = scene.kernel.run(TestSite::FromDevice, &scene.request(1500).bytes());
    let told = large.err().context("a packet that does not fit was sent")?.to_string();
    ensure!(told.starts_with("TooBig"), "{told}");
    ensure!(scene.next_hop(&small)? == Some(GATEWAY_MAC), "which changes nothing");
    // What is in its map no more is asked for each time.
    scene.world.devices[0].mtu += 1;
    for device in &mut scene.world.devices {
        device.epoch += 1;
    }
    let world = scene.world.clone();
    scene.kernel.load(&world);
    for _ in 0..2 {
        ensure!(scene.next_hop(&small)?.is_none(), "the route lets through less than the device");
    }
    Ok(())
}

#[test]
fn requests_to_other_nodes_keep_their_next_hop_until_the_epoch_changes() -> Result<()> {
    for flags in [0, Service::DSR] {
        in_private_namespace(|| requests_go_where_they_went::<Ipv4>(flags))?;
        in_private_namespace(|| requests_go_where_they_went::<Ipv6>(flags))?;
    }
    Ok(())
}

fn replies_have_their_own<F: KernelFamily>() -> Result<()> {
    let mut scene = Scene::<F>::new(0)?;
    let sent = scene.sent()?;
    ensure!(scene.next_hop(&scene.request(8))? == Some(GATEWAY_MAC), "the request's is known");
    let backend = Endpoint { address: sent.destination, port: sent.destination_port };
    let node = Endpoint { address: sent.source, port: sent.source_port };
    let reply = Frame::new(backend, node, Body::Udp);
    ensure!(scene.next_hop(&reply)?.is_none(), "the reply's is not");
    ensure!(scene.next_hop(&reply)? == Some(GATEWAY_MAC), "before it was asked for");
    Ok(())
}

#[test]
fn replies_have_a_next_hop_of_their_own() -> Result<()> {
    in_private_namespace(replies_have_their_own::<Ipv4>)?;
    in_private_namespace(replies_have_their_own::<Ipv6>)
}
