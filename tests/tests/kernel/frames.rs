//! Frames of every kind, sane and damaged, through the loaded programs: each verdict must
//! be the one that the core gives on the host.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lb_common::abi::address::{Ipv4, Ipv6};
use lb_common::abi::counter::{Hook, Reason};
use lb_common::abi::frontend::{TCP, UDP};
use lb_common::abi::settings::{Settings, Timeouts};
use lb_common::balance::{Verdict, track};
use lb_common::packet::answer::quote_length;
use lb_common::packet::{ACK, FIN, RST, SYN};
use lb_testing::family::TestFamily;
use lb_testing::frame::{Body, Frame};
use lb_testing::host::Host;
use lb_testing::interpreter::{Fate, Interpreter, Outcome};
use lb_testing::random::Random;
use lb_testing::scene::Scene;
use lb_testing::site::TestSite;
use lb_testing::world::{Location, World, at, timeouts};
use lb_tests::harness::kernel::{Kernel, KernelFamily};
use lb_tests::harness::programs::in_private_namespace;

/// A Service of each protocol with one backend, so that there is nothing to choose, and
/// one without.
fn world<F: TestFamily>() -> World<F> {
    let mut world = World::default();
    for (number, protocol, location) in
        [(1, TCP, Location::OtherNode), (1, UDP, Location::LocalPod), (2, TCP, Location::ThisHost)]
    {
        let index = world.add_service(at(F::vip(number), 80), protocol);
        let address = match location {
            Location::LocalPod => F::pod(1),
            Location::ThisHost => F::node(),
            Location::OtherNode => F::remote_pod(1),
        };
        world.add_backend(index, at(address, 8080), location);
    }
    world.add_service(at(F::vip(3), 80), TCP);
    world
}

fn valid<F: TestFamily>(random: &mut Random) -> Frame<F> {
    let addresses = [
        F::pod(1),
        F::pod(2),
        F::node(),
        F::remote_pod(1),
        F::outside(),
        F::vip(1),
        F::vip(2),
        F::vip(3),
        F::vip(9),
        F::vip_outside_cidrs(1),
    ];
    let mut end = || at(random.of(&addresses), random.of(&[80, 8080, 1000, 1001]));
    let ends = [end(), end()];
    let flags = random.of(&[SYN, SYN | ACK, ACK, FIN | ACK, RST, 0]);
    let body = random.of(&[
        Body::Tcp(flags),
        Body::Tcp(flags),
        Body::Udp,
        Body::UdpWithoutChecksum,
        Body::Icmp(F::ECHO_REQUEST, 0),
        Body::Icmp(F::SOME_ICMP_ERROR, 1),
        Body::Other(132),
    ]);
    let payload: Vec<u8> = (0..random.below(40)).map(|byte| byte as u8).collect();
    let mut frame = Frame::new(ends[0], ends[1], body).payload(&payload);
    if random.below(4) == 0 {
        let filler = [0, 1, 4, 0, 0, 0, 0].to_vec();
        let options = if F::NUMBER == 4 { (0, vec![1; 8]) } else { (60, filler) };
        frame = frame.options(&[options]);
    }
    if random.below(8) == 0 {
        frame = frame.fragment(random.of(&[0, 8, 1480]), random.below(2) == 0);
    }
    frame
}

fn damaged<F: TestFamily>(mut bytes: Vec<u8>, random: &mut Random) -> Vec<u8> {
    const ETHERNET: usize = 14;
    // The kernel runs no program on less than an IP header.
    let least = F::ADDRESSES + 2 * F::ADDRESS_LENGTH;
    for _ in 0..random.below(4) {
        let index = ETHERNET + random.below(bytes.len() - ETHERNET);
        let choices = [random.byte(), 0, 0xff, bytes[index] ^ 1];
        bytes[index] = random.of(&choices);
    }
    if random.below(4) == 0 {
        bytes.truncate(least + random.below(bytes.len() - least + 1));
    }
    bytes
}

/// What the core decides is carried out on a whole packet only: an error cannot quote what
/// is not there.
fn cannot_be_carried_out<F: TestFamily>(host: &mut Host<F>, site: TestSite, frame: &[u8]) -> bool {
    let (verdict, _, packet) = host.decide(site, frame);
    matches!(verdict, Verdict::Answer(..))
        && (quote_length(&packet).is_none() || frame.len() < usize::from(packet.transport) + 8)
}

fn compare<F: KernelFamily>(seed: u64, frames: usize) -> Result<()> {
    let mut world = world::<F>();
    // Each draws a source port of its own; from one there is no choice.
    world.settings.source_ports.count = 1;
    let (mut host, mut kernel) = (Host::<F>::new(0), Kernel::<F>::load()?);
    host.load(&world);
    kernel.load(&world);
    let mut random = Random::new(seed);
    let mut reasons = std::collections::BTreeMap::new();
    for number in 0..frames {
        let mut bytes = valid::<F>(&mut random).bytes();
        if number % 3 != 0 {
            bytes = damaged::<F>(bytes, &mut random);
        }
        let site = random.of(&TestSite::ALL);
        let what = || format!("frame {number} at {site:?}: {bytes:02x?}");
        let expected = host.send(site, &bytes);
        let (found, after) = Kernel::<F>::run(&kernel, site, &bytes).with_context(what)?;
        *reasons.entry(found.reason.name()).or_insert(0) += 1;
        let failed = Outcome { reason: Reason::RewriteFailed, fate: Fate::Dropped };
        if found == failed && cannot_be_carried_out(&mut host, site, &bytes) {
            continue;
        }
        ensure!(found == expected, "{}\nhost {expected:?}\nprogram {found:?}", what());
        ensure!(found.fate != Fate::Untouched || after == bytes, "changed: {}", what());
    }
    println!("{reasons:?}");
    ensure!(reasons.len() >= 14, "only {reasons:?}: the frames do not reach enough");
    Ok(())
}

#[test]
fn damaged_frames_end_as_on_the_host_ipv4() -> Result<()> {
    in_private_namespace(|| compare::<Ipv4>(0x9e37_79b9_7f4a_7c15, 6_000))
}

#[test]
fn damaged_frames_end_as_on_the_host_ipv6() -> Result<()> {
    in_private_namespace(|| compare::<Ipv6>(0xd1b5_4a32_d192_ed03, 6_000))
}

#[test]
fn frames_that_are_not_ip_are_untouched_and_counted() -> Result<()> {
    in_private_namespace(|| {
        let kernel = Kernel::<Ipv4>::load()?;
        for ethertype in [0x0806u16, 0x8100, 0x88cc, 0x0000, 0xffff] {
            for site in TestSite::ALL {
                let mut frame =
                    Frame::<Ipv4>::of(TCP, at(Ipv4::pod(1), 1), at(Ipv4::vip(1), 80), SYN);
                frame.payload = vec![3; 30];
                let mut bytes = frame.bytes();
                bytes[12..14].copy_from_slice(&ethertype.to_be_bytes());
                let (outcome, _) = Kernel::<Ipv4>::run(&kernel, site, &bytes)?;
                assert_eq!(outcome, Outcome { reason: Reason::NotIp, fate: Fate::Untouched });
            }
        }
        Ok(())
    })
}

/// A tag that is still in the frame hides what follows it, be it for a Service.
fn tagged<F: KernelFamily>() -> Result<()> {
    const MACS: usize = 12;
    const TAGS: [&[u16]; 4] =
        [&[0x8100, 5], &[0x88a8, 5], &[0x88a8, 5, 0x8100, 6], &[0x8100, 0xe000]];
    for mut kernel in [Kernel::<F>::load()?, Kernel::<F>::load()?.with_xdp()] {
        kernel.load(&world::<F>());
        for (site, protocol) in
            TestSite::ALL.into_iter().flat_map(|site| [(site, TCP), (site, UDP)])
        {
            let frame = Frame::<F>::of(protocol, at(F::pod(1), 1000), at(F::vip(1), 80), SYN);
            let whole = frame.bytes();
            let (plain, _) = Kernel::<F>::run(&kernel, site, &whole)?;
            ensure!(plain.reason != Reason::NotIp, "{plain:?} at {site:?}");
            for tags in TAGS {
                let tags: Vec<u8> = tags.iter().flat_map(|half| half.to_be_bytes()).collect();
                let frame = [&whole[..MACS], &tags, &whole[MACS..]].concat();
                let (outcome, after) = Kernel::<F>::run(&kernel, site, &frame)?;
                let untouched = Outcome { reason: Reason::NotIp, fate: Fate::Untouched };
                ensure!(outcome == untouched && after == frame, "{outcome:?} at {site:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_frame_with_its_vlan_tag_is_untouched_and_counted() -> Result<()> {
    in_private_namespace(|| {
        tagged::<Ipv4>()?;
        tagged::<Ipv6>()
    })
}

/// The one case that goes by the kernel's clock: a second is a tenth of one here.
fn only_sends<F: KernelFamily>() -> Result<()> {
    const TICKS: u32 = 25;
    const TICK: Duration = Duration::from_millis(4);
    let mut kernel = Kernel::<F>::load()?;
    let mut world = world::<F>();
    world.settings.ticks_per_second = TICKS;
    world.settings.time_shift = Settings::time_shift_of(TICKS);
    let timeouts = Timeouts { udp: world.settings.times(10), ..timeouts() };
    world.settings.flow_lifetimes = track::lifetimes(&timeouts);
    let mut scene = Scene { interpreter: &mut kernel, world, protocol: UDP };
    scene.update();
    let flow = scene.open(TestSite::FromPod, at(F::pod(2), 1000), at(F::vip(1), 80));
    let started = Instant::now();
    while started.elapsed() < 30 * TICKS * TICK {
        std::thread::sleep((TICKS + 2) * TICK);
        scene.request(&flow, 0);
    }
    scene.reply(&flow, 0);
    Ok(())
}

#[test]
fn a_client_that_only_sends_still_gets_the_answer() -> Result<()> {
    in_private_namespace(|| {
        only_sends::<Ipv4>()?;
        only_sends::<Ipv6>()
    })
}

#[test]
fn every_program_of_tc_has_a_site_in_the_cases() {
    let hooks = [Hook::FromPod, Hook::ToPod, Hook::FromDevice, Hook::ToDevice, Hook::Loopback];
    for hook in hooks {
        assert!(TestSite::ALL.iter().any(|site| site.hook() == hook), "{hook:?}");
    }
}
