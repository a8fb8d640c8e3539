//! The benchmark of lb: prints a report as a table and writes it as JSON. It fails if a figure
//! is above its must or void.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::{Parser, Subcommand};
use jiff::Timestamp;
use lb_tests::tools::bench::report::{self, Figure};
use lb_tests::tools::bench::traffic::exchange::{self, Load};
use lb_tests::tools::bench::traffic::machine::{self, Machine};
use lb_tests::tools::bench::traffic::scaling::work::{self, Work};
use lb_tests::tools::bench::{
    connects, datapath, faults, listing, lookups, namespace, programs, scale, traffic,
};

/// Measures lb.
#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Measure what a packet costs in the programs.
    Datapath(Datapath),
    /// Flood, forge, lose and fill, and see who is harmed, through lb and through kube-proxy.
    Faults(Faults),
    /// Compare connections through lb, through kube-proxy, and without a proxy.
    Traffic(Traffic),
    /// The server of `traffic`, in a pod.
    #[command(hide = true)]
    TrafficServer {
        #[arg(long)]
        processor: usize,
        #[arg(long)]
        port: u16,
    },
    /// The client of `traffic`: one turn.
    #[command(hide = true)]
    TrafficClient {
        #[arg(long)]
        processor: usize,
        #[arg(long)]
        load: Load,
        #[arg(long)]
        to: SocketAddr,
        #[arg(long)]
        operations: u64,
    },
    /// The server of the scaling cases of `traffic`, in a pod.
    #[command(hide = true)]
    ScalingServer {
        #[arg(long)]
        processor: usize,
        #[arg(long)]
        port: u16,
        #[arg(long)]
        datagrams: Ipv4Addr,
    },
    /// The client of the scaling cases of `traffic`.
    #[command(hide = true)]
    ScalingClient {
        #[arg(long)]
        processor: usize,
        #[arg(long)]
        work: Work,
        #[arg(long)]
        to: SocketAddr,
        #[arg(long)]
        count: u64,
        #[arg(long)]
        flows: u32,
    },
    /// List a million flows by `lb-agent get flows`.
    Listing(Listing),
    /// Start an agent in a large cluster, and see how soon it serves and what it uses.
    Scale(Scale),
}

#[derive(clap::Args)]
struct Traffic {
    /// 9 rounds instead of 31, IPv4 alone, and smaller clusters
    #[arg(long)]
    quick: bool,
    /// So many rounds
    #[arg(long, value_name = "N")]
    rounds: Option<usize>,
    /// Services beside those that are used
    #[arg(long, value_name = "N", default_value_t = 0)]
    services: usize,
    /// The MTU of all devices, at least 1280 for IPv6
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u16).range(1280..=9000))]
    mtu: Option<u16>,
    /// Run servers on another processor than clients
    #[arg(long)]
    two_processors: bool,
    /// Measure only what has TEXT in its name, such as "node port" or "TCP bulk"
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    only: String,
    /// Also write the report below DIR of the repository, under today's date, and have README.md
    /// show its plots
    #[arg(long, value_name = "DIR")]
    publish: Option<String>,
}

#[derive(clap::Args)]
struct Scale {
    /// Fewer changes: done within two minutes
    #[arg(long)]
    quick: bool,
    /// How many Services there are
    #[arg(long, value_name = "N", default_value_t = 10_000,
          value_parser = clap::value_parser!(u32).range(100..=60_000))]
    services: u32,
    /// How many endpoints each of them has
    #[arg(long, value_name = "N", default_value_t = 10,
          value_parser = clap::value_parser!(u32).range(1..=100))]
    endpoints: u32,
    #[command(flatten)]
    part: ScalePart,
    /// How many processes of kube-proxy run beside the agents of --fleet
    #[arg(long, value_name = "N", default_value_t = 3, requires = "fleet",
          value_parser = clap::value_parser!(u8).range(0..=20))]
    proxies: u8,
    /// How long the clients of --fleet are observed at rest, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 60, requires = "fleet",
          value_parser = clap::value_parser!(u64).range(1..=3600))]
    rest: u64,
}

/// What is measured instead of one agent with an API server of prepared answers.
#[derive(Clone, Copy, clap::Args)]
#[group(multiple = false)]
struct ScalePart {
    /// Measure an agent and kube-proxy with a real API server
    #[arg(long)]
    real: bool,
    /// Measure the start with 10,000 Services of 25 endpoints, and with 100,000 Services
    #[arg(long)]
    beyond: bool,
    /// Measure the watches of N agents with a real API server; 1,000 Services are enough
    #[arg(long, value_name = "AGENTS", value_parser = clap::value_parser!(u32).range(1..=1000))]
    fleet: Option<u32>,
    /// Change endpoints 100 times a second, and see whether the agent grows
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(10..=86_400))]
    churn: Option<u64>,
}

#[derive(clap::Args)]
struct Listing {
    /// How many flows there are
    #[arg(long, value_name = "N", default_value_t = 1_000_000,
          value_parser = clap::value_parser!(u32).range(100..=4_000_000))]
    flows: u32,
}

#[derive(clap::Args)]
struct Faults {
    /// How long a flood takes, in seconds
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: u64,
    /// `--max-flows` of lb, unless as many as the kernel's connection tracking has room for
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(16_384..=4_194_304))]
    max_flows: Option<u32>,
    /// Only proxies with TEXT in their name, such as "lb" or "nftables"
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    only: String,
}

#[derive(clap::Args)]
struct Datapath {
    /// Half as many rounds, and no large IPv6 table
    #[arg(long)]
    quick: bool,
    /// Judge by the targets themselves, not scaled to the floors of this machine
    #[arg(long)]
    absolute: bool,
    /// Measure only figures whose name contains TEXT
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    only: String,
    /// The programs to measure
    #[arg(long, value_name = "FILE", default_value_os_t = built("lb-ebpf.o"))]
    object: PathBuf,
    /// The wrapper programs to measure with
    #[arg(long, value_name = "FILE", default_value_os_t = built("lb-bench-ebpf.o"))]
    wrappers: PathBuf,
}

fn main() -> Result<ExitCode> {
    match Cli::parse().command {
        Command::Datapath(arguments) => datapath(&arguments),
        Command::Faults(arguments) => faults(&arguments),
        Command::Listing(arguments) => listing(&arguments),
        Command::Scale(arguments) => scale(&arguments),
        Command::Traffic(arguments) => traffic(&arguments),
        Command::TrafficServer { processor, port } => {
            namespace::keep_to(processor)?;
            exchange::serve(port)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::TrafficClient { processor, load, to, operations } => {
            namespace::keep_to(processor)?;
            println!("{}", serde_json::to_string(&exchange::run(load, to, operations)?)?);
            Ok(ExitCode::SUCCESS)
        }
        Command::ScalingServer { processor, port, datagrams } => {
            namespace::keep_to(processor)?;
            work::serve(port, datagrams)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::ScalingClient { processor, work, to, count, flows } => {
            namespace::keep_to(processor)?;
            println!("{}", work::run(work, to, count, flows)?);
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn datapath(arguments: &Datapath) -> Result<ExitCode> {
    let started = Instant::now();
    let mut figures = measure(arguments)?;
    if arguments.absolute {
        figures.iter_mut().for_each(|figure| figure.scale = 1.0);
    }
    print!("{}", report::table(&figures));
    let path = target().join("bench/datapath.json");
    report::write(&figures[..], &path)?;
    let failed = figures.iter().filter(|figure| figure.fails()).count();
    println!(
        "\n{} figures, {failed} failed, {:.0} s; also in {}",
        figures.len(),
        started.elapsed().as_secs_f64(),
        path.display()
    );
    if report::is_void(&figures) {
        println!(
            "\nINVALID RUN: a control differs from itself by more than 5 %: other work disturbed this \
             run, and its figures cannot be trusted; measure again on a quiet machine"
        );
    }
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn faults(arguments: &Faults) -> Result<ExitCode> {
    let Faults { seconds, max_flows, ref only } = *arguments;
    let time = Duration::from_secs(seconds);
    let report = faults::measure(&faults::Plan { time, max_flows, only: only.clone() })?;
    print!("{}", report.table());
    let path = target().join("bench/faults.json");
    report::write(&report, &path)?;
    println!("\nalso in {}", path.display());
    Ok(if report.is_kept() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn listing(arguments: &Listing) -> Result<ExitCode> {
    let listings = listing::measure(arguments.flows)?;
    print!("{}", listing::table(&listings));
    let path = target().join("bench/listing.json");
    report::write(&listings[..], &path)?;
    println!("\nalso in {}", path.display());
    let is_complete = listings.iter().all(listing::Listing::is_complete);
    Ok(if is_complete { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn traffic(arguments: &Traffic) -> Result<ExitCode> {
    let started = Instant::now();
    let rounds = arguments.rounds.unwrap_or(if arguments.quick { 9 } else { 31 });
    let plan = traffic::Plan {
        rounds,
        is_quick: arguments.quick,
        only: arguments.only.clone(),
        v6: !arguments.quick,
        services: arguments.services,
        mtu: arguments.mtu,
        two_processors: arguments.two_processors,
    };
    let before = machine::load_average()?;
    let measured = traffic::measure(&plan)?;
    let report = traffic::judge::Report::of(measured, &plan, Machine::read(before)?);
    let plots = traffic::plots::all(&report)?;
    print!("{}", report.markdown(&plots));
    let directory = target().join("bench");
    traffic::publish::write(&report, &plots, &directory)?;
    let seconds = started.elapsed().as_secs_f64();
    println!("\n{seconds:.0} s; also below {}, with plots", directory.display());
    if let Some(place) = &arguments.publish {
        let (root, day) = (target().join(".."), Timestamp::now().strftime("%Y-%m-%d").to_string());
        traffic::publish::publish(&report, &plots, &root, place, &day)?;
        println!("published in {place}/{day}");
    }
    Ok(if report.fails() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn scale(arguments: &Scale) -> Result<ExitCode> {
    let Scale { quick, services, endpoints, part, proxies, rest } = *arguments;
    let size = scale::objects::Size { services, endpoints };
    if !part.beyond {
        println!("{services} Services with {endpoints} endpoints each\n");
    }
    let (name, figures) = match part {
        ScalePart { real: true, .. } => ("scale-real", scale::real::measure(size)?),
        ScalePart { beyond: true, .. } => ("scale-beyond", scale::beyond::measure()?),
        ScalePart { fleet: Some(agents), .. } => {
            let rest = Duration::from_secs(rest);
            let plan = scale::fleet::Plan { size, agents, proxies, rest };
            ("scale-fleet", scale::fleet::measure(plan)?)
        }
        ScalePart { churn: Some(seconds), .. } => {
            ("scale-churn", scale::churn::measure(size, Duration::from_secs(seconds))?)
        }
        _ => {
            let (changes, seconds) = if quick { (200, 5) } else { (2_000, 30) };
            let plan = scale::Plan { size, changes, time: Duration::from_secs(seconds) };
            ("scale", scale::measure(plan)?)
        }
    };
    print!("{}", scale::report::table(&figures));
    let path = target().join(format!("bench/{name}.json"));
    report::write(&figures, &path)?;
    println!("\nalso in {}", path.display());
    let fails = figures.iter().any(scale::report::Figure::fails);
    Ok(if fails { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn measure(arguments: &Datapath) -> Result<Vec<Figure>> {
    let device = namespace::enter()?;
    let mut others = lookups::count()?;
    others.extend(programs::measure(&arguments.object, device.ifindex)?);
    namespace::keep_to_one_processor()?;
    let bench = datapath::Bench {
        object: &arguments.object,
        wrappers: &arguments.wrappers,
        device,
        rounds: if arguments.quick { 61 } else { 121 },
        only: &arguments.only,
    };
    let mut figures = bench.measure(!arguments.quick)?;
    figures.extend(connects::measure(&bench)?);
    figures.extend(others);
    figures.sort_by_key(|figure| (figure.row == 0, figure.row));
    Ok(figures)
}

/// What `cargo xtask` builds for the kernel.
fn built(name: &str) -> PathBuf {
    target().join("ebpf").join(name)
}

fn target() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target")
}
