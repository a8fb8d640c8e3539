//! How long an endpoint's change takes from the API server to the maps, among many Services, and
//! what the agent asks and receives for it.

use std::io::BufRead;
use std::os::fd::AsRawFd;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lb_agent::maps::pins::Pins;
use lb_common::abi::service::Service;
use lb_tests::harness::controlplane::Options;
use lb_tests::harness::controlplane::live::LiveCluster;
use lb_tests::harness::netns::topology::cluster::Cluster;
use lb_tests::tools::bench::scale::wire::Wire;
use serde_json::{Value, json};

/// How many Services there are beside the one that changes.
const SERVICES: usize = 1000;
/// Requests at once that create them.
const WRITERS: usize = 8;
/// How many changes are measured.
const CHANGES: usize = 100;
/// How many slots the harness gives its agents.
const SLOTS: usize = 16_384;
/// No change takes longer than this; the figure itself is printed.
const WORST: Duration = Duration::from_millis(500);
/// What the node may receive beside events: bookmarks, and what the link layer says.
const BESIDE: u64 = 32 << 10;

const SLICES: &str = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices";

fn slice(service: &str, address: &str, port: u16) -> Value {
    json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": format!("{service}-x"), "namespace": "default",
            "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4",
        "endpoints": [{"addresses": [address], "conditions": {"ready": true}}],
        "ports": [{"name": "tcp", "protocol": "TCP", "port": port}],
    })
}

fn service_object(name: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"ports": [{"name": "tcp", "protocol": "TCP", "port": 80, "targetPort": 8080}]},
    })
}

/// A pinned array, mapped to be read.
struct Mapped<T> {
    address: *const T,
    length: usize,
}

// SAFETY: the mapping is shared memory that is only read, by volatile loads.
unsafe impl<T> Sync for Mapped<T> {}

impl<T: Copy> Mapped<T> {
    fn open(pins: &Pins, name: &'static str, entries: usize) -> Result<Self> {
        let map = pins.open(name)?;
        let length = entries * size_of::<T>();
        // SAFETY: a new mapping of a file descriptor that is valid for the call.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ,
                libc::MAP_SHARED,
                map.as_raw_fd(),
                0,
            )
        };
        ensure!(address != libc::MAP_FAILED, "mmap: {}", std::io::Error::last_os_error());
        Ok(Self { address: address.cast(), length })
    }

    fn get(&self, index: usize) -> T {
        assert!(index < self.length / size_of::<T>(), "entry {index}");
        // SAFETY: the mapping holds more than `index` entries.
        unsafe { self.address.add(index).read_volatile() }
    }
}

impl<T> Drop for Mapped<T> {
    fn drop(&mut self) {
        // SAFETY: it was mapped with this address and length.
        unsafe { libc::munmap(self.address.cast_mut().cast(), self.length) };
    }
}

/// A service port with one endpoint, as the programs see it.
struct Watched {
    services: Mapped<Service>,
    /// An entry of an array takes 8 bytes at least; the upper four are padding.
    slots: Mapped<u64>,
    index: usize,
}

impl Watched {
    fn new(live: &mut LiveCluster, service: &str) -> Result<Self> {
        let rows = live.agent(1)?.get("services")?;
        let rows = rows.as_array().context("rows")?;
        let row = rows.iter().find(|row| row["name"] == service).context("no such service")?;
        let index = usize::try_from(row["index"].as_u64().context("no index")?)?;
        let pins = Pins::new(live.cluster.node(1).bpf_dir());
        Ok(Self {
            services: Mapped::open(&pins, "SERVICES", index + 1)?,
            slots: Mapped::open(&pins, "SLOTS", SLOTS)?,
            index,
        })
    }

    /// The endpoint that new connections get.
    fn backend(&self) -> u64 {
        self.slots.get(self.services.get(self.index).cluster.start() as usize)
    }
}

fn create(live: &LiveCluster, path: &str, object: &Value) -> Result<()> {
    let (status, said) = live.request("POST", path, object)?;
    ensure!(status == 201, "POST {path}: {status} {said}");
    Ok(())
}

/// Creates Services with a slice each, and the one that is to change.
fn fill(live: &LiveCluster) -> Result<()> {
    let pair = |name: &str, address: &str| {
        create(live, SLICES, &slice(name, address, 8080))?;
        create(live, "/api/v1/namespaces/default/services", &service_object(name))
    };
    pair("probe", "10.244.2.2")?;
    thread::scope(|scope| {
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| {
                scope.spawn(move || {
                    (writer..SERVICES)
                        .step_by(WRITERS)
                        .try_for_each(|number| pair(&format!("filler-{number}"), "10.244.2.3"))
                })
            })
            .collect();
        writers.into_iter().try_for_each(|writer| writer.join().expect("no panic"))
    })
}

/// How often the agent has listed each kind.
fn lists(live: &mut LiveCluster) -> Result<Vec<String>> {
    let (_, text) = live.agent(1)?.http(10249, "/metrics")?;
    let lists = text.lines().filter(|line| line.starts_with("lb_watch_lists"));
    let lists: Vec<_> = lists.map(str::to_owned).collect();
    ensure!(!lists.is_empty(), "no metric lb_watch_lists");
    Ok(lists)
}

fn percentiles(mut times: Vec<Duration>) -> (Duration, Duration) {
    times.sort();
    (times[times.len() / 2], times[times.len() * 99 / 100])
}

#[test]
fn an_endpoint_change_is_soon_in_the_maps() -> Result<()> {
    let mut live = LiveCluster::start(Cluster::builder().nodes(1), Options::default())?;
    live.start_agent(1, &[])?;
    let start = Instant::now();
    fill(&live)?;
    println!("{SERVICES} Services created in {:?}", start.elapsed());
    let metric = format!("lb_services {}", 2 * SERVICES + 4);
    live.wait(|agent| Ok(agent.http(10249, "/metrics")?.1.contains(&metric)))?;
    let watched = Watched::new(&mut live, "default/probe:tcp")?;
    let mut events = live
        .watch(&format!("{SLICES}?watch=1&labelSelector=kubernetes.io%2Fservice-name%3Dprobe"))?;
    let mut line = String::new();
    events.read_line(&mut line)?;
    ensure!(line.contains("ADDED"), "{line}");
    let (mut from_request, mut from_event) = (Vec::new(), Vec::new());
    let node = live.cluster.node(1);
    // Asking the agent is a connection too.
    let (lists, before, mut sent) = (lists(&mut live)?, Wire::of(node.netns())?, 0);
    let path = format!("{SLICES}/probe-x");
    for change in 0..CHANGES {
        let address = format!("10.244.2.{}", 10 + change % 2);
        let body = json!({"endpoints": [{"addresses": [address], "conditions": {"ready": true}}]});
        let before = watched.backend();
        let start = Instant::now();
        let (visible, readable) = thread::scope(|scope| {
            let visible = scope.spawn(|| {
                while watched.backend() == before && start.elapsed() < 4 * WORST {
                    thread::sleep(Duration::from_micros(20));
                }
                Instant::now()
            });
            let readable = scope.spawn(|| {
                line.clear();
                events.read_line(&mut line).map(|_| Instant::now())
            });
            let (status, said) = live.request("PATCH", &path, &body)?;
            ensure!(status == 200, "{status} {said}");
            let visible = visible.join().expect("no panic");
            Ok((visible, readable.join().expect("no panic")?))
        })?;
        ensure!(
            watched.backend() != before,
            "change {change} is not in the map:\n{}",
            live.agent(1)?.get("backends")?
        );
        sent += line.len() as u64;
        from_request.push(visible - start);
        from_event.push(visible.saturating_duration_since(readable));
    }
    let used = Wire::of(node.netns())?.since(before);
    println!("received {} bytes for {CHANGES} events of {sent} bytes together", used.received);
    ensure!(used.received <= 2 * sent + BESIDE, "{used:?} for {sent} bytes of events");
    // An Event of the agent's start may still be under way, by a connection of its own.
    ensure!(used.opened <= 1, "connections were opened: {used:?}");
    ensure!(self::lists(&mut live)? == lists, "an agent listed again because of a change");
    for (what, times) in
        [("the request", from_request), ("the event at another watcher", from_event)]
    {
        let worst = times.iter().max().copied().unwrap_or_default();
        let (p50, p99) = percentiles(times);
        println!("from {what} to the map: p50 {p50:?}, p99 {p99:?}, worst {worst:?}");
        ensure!(worst <= WORST, "from {what} to the map: {worst:?}");
    }
    Ok(())
}
