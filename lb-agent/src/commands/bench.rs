//! `lb-agent bench`: what a Service costs in this cluster, whatever proxy it has: the same server by
//! the address of its Service and by that of its pod.
//!
//! The rounds alternate between both, so that a slow second of the network slows down both. The pod's
//! address has a second turn in each round: what it differs from itself is noise. It needs no
//! privileges and changes nothing.

pub mod bulk;
mod load;
mod serve;

use std::{
    io,
    net::{SocketAddr, ToSocketAddrs as _},
    thread,
    time::{Duration, Instant},
};

use comfy_table::{CellAlignment, Table, presets::NOTHING};

use self::load::Load;
use crate::cli::BenchArgs;

/// How long names and servers may take to appear.
const PATIENCE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(500);
/// A control that is off by more says that the network is too busy.
const NOISE: f64 = 0.03;

/// The times of an operation by address, one for each round: pod, pod again, Service; us.
type Rounds = [Vec<f64>; 3];

/// Serves, or measures and returns the table.
///
/// # Errors
/// The port is taken, a name has no address, or a server does not answer.
pub fn bench(arguments: &BenchArgs) -> Result<String, BenchError> {
    if let Some(port) = arguments.serve {
        return match serve::serve(port) {
            Ok(never) => match never {},
            Err(source) => Err(BenchError::Listen { port, source }),
        };
    }
    let deadline = Instant::now() + PATIENCE;
    let [pod, service] =
        [&arguments.pod, &arguments.service].map(|host| host.as_deref().unwrap_or_default());
    let addresses =
        [reachable(pod, arguments.port, deadline)?, reachable(service, arguments.port, deadline)?];
    measure(addresses, arguments.rounds, arguments.time)
}

/// The address of a host, once its server answers.
fn reachable(host: &str, port: u16, deadline: Instant) -> Result<SocketAddr, BenchError> {
    loop {
        let to = (host, port).to_socket_addrs().and_then(|mut all| {
            let address = all.next().ok_or_else(|| io::Error::other("it has no address"))?;
            Load::Connect.turn(address, Duration::ZERO).map(|_| address)
        });
        match to {
            Ok(address) => return Ok(address),
            Err(_) if Instant::now() < deadline => thread::sleep(POLL),
            Err(source) => {
                return Err(BenchError::Unreachable { host: host.to_owned(), port, source });
            }
        }
    }
}

fn measure(
    [pod, service]: [SocketAddr; 2],
    rounds: u32,
    time: Duration,
) -> Result<String, BenchError> {
    let deadline = Instant::now() + time;
    let mut all: [Rounds; 3] = Default::default();
    for round in 0..rounds as usize {
        if Instant::now() >= deadline {
            break;
        }
        for (load, of_load) in Load::ALL.into_iter().zip(&mut all) {
            for place in 0..3 {
                // Each address is first, second and last in turn.
                let place = (place + round) % 3;
                let to = [pod, pod, service][place];
                let took = load.turn(to, load::TURN).map_err(|source| BenchError::Load {
                    load: load.title(),
                    to,
                    source,
                })?;
                of_load[place].push(took);
            }
        }
    }
    Ok(table(&all, [pod, service]))
}

/// One line for each load: medians, and the ratio to the pod in the same round.
fn table(all: &[Rounds; 3], [pod, service]: [SocketAddr; 2]) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING);
    table.set_header(["", "pod", "Service", "Service / pod", "95 %", "pod / pod"]);
    let mut noise: f64 = 0.0;
    for (load, [once, again, of_service]) in Load::ALL.into_iter().zip(all) {
        let ratios = |other: &[f64]| {
            let pairs = other.iter().zip(once);
            interval(pairs.map(|(other, once)| load.ratio(*other, *once)).collect())
        };
        let (control, [low, ratio, high]) = (ratios(again)[1], ratios(of_service));
        noise = noise.max((control - 1.0).abs());
        let [pod, service] = [once, of_service].map(|times| load.shown(interval(times.clone())[1]));
        table.add_row([
            load.title().to_owned(),
            pod,
            service,
            format!("{ratio:.3}"),
            format!("{low:.3} to {high:.3}"),
            format!("{control:.3}"),
        ]);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    let lines: String = table.lines().map(|line| line.trim_end().to_owned() + "\n").collect();
    let rounds = all[0][0].len();
    let mut text = format!("{lines}\n{rounds} rounds; pod {pod}, Service {service}.");
    if noise > NOISE {
        text += &format!(
            "\nThe pod differs from itself by up to {:.0} %: other traffic disturbs this run, and a \
             difference of that size means nothing. Repeat it on quieter nodes.",
            noise * 100.0
        );
    }
    text
}

/// The median, between the ends of the interval that holds the true one with 95 % confidence, by
/// the ranks of the sign test; all zero without samples.
fn interval(mut samples: Vec<f64>) -> [f64; 3] {
    samples.sort_by(f64::total_cmp);
    let Some(last) = samples.len().checked_sub(1) else { return [0.0; 3] };
    let count = samples.len() as f64;
    let rank = ((count - 1.96 * count.sqrt()) / 2.0).floor().max(1.0) as usize - 1;
    let rank = rank.min(last);
    let median = (samples[last / 2] + samples[samples.len() / 2]) / 2.0;
    [samples[rank], median, samples[last - rank]]
}

/// Nothing can be measured.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The server cannot listen.
    #[error("cannot listen on port {port}: choose another one with --serve")]
    Listen {
        /// The port.
        port: u16,
        /// The error of the kernel.
        #[source]
        source: io::Error,
    },
    /// A server does not answer.
    #[error(
        "{host} port {port} did not answer within {PATIENCE:?}: start `lb-agent bench --serve {port}` \
         in the pod, and check the selector and the port of its Service"
    )]
    Unreachable {
        /// The host.
        host: String,
        /// The port.
        port: u16,
        /// The last error.
        #[source]
        source: io::Error,
    },
    /// A measurement broke off.
    #[error("{load} to {to} broke off")]
    Load {
        /// The load.
        load: &'static str,
        /// The address.
        to: SocketAddr,
        /// The error of the kernel.
        #[source]
        source: io::Error,
    },
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    /// A server in this process.
    fn server() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        thread::spawn(move || serve::accept(&listener));
        address
    }

    #[test]
    fn every_load_is_measured_by_both_addresses() {
        let [pod, service] = [server(), server()];
        let text = measure([pod, service], 3, Duration::from_secs(60)).expect("a table");
        for word in ["request/response", "connect-request-close", "bulk", "Gbit/s", "3 rounds"] {
            assert!(text.contains(word), "{word} is not in {text}");
        }
        assert!(text.contains(&format!("pod {pod}, Service {service}.")), "{text}");
    }

    #[test]
    fn a_ratio_compares_a_round_with_itself() {
        // The network was ten times slower in the second round.
        let rounds = || [vec![10.0, 100.0], vec![10.0, 100.0], vec![10.5, 105.0]];
        let address = SocketAddr::from(([10, 0, 0, 1], 80));
        let text = table(&[rounds(), rounds(), rounds()], [address; 2]);
        assert_eq!(text.matches("1.050  1.050 to 1.050").count(), 2, "{text}");
        // A rate: what takes longer is slower.
        assert_eq!(text.matches("0.952  0.952 to 0.952").count(), 1, "{text}");
        assert!(!text.contains("differs"), "{text}");
        let noisy = [vec![10.0], vec![10.5], vec![10.0]];
        let text = table(&[rounds(), noisy, rounds()], [address; 2]);
        assert!(text.contains("differs from itself by up to 5 %"), "{text}");
    }

    #[test]
    fn the_time_ends_the_rounds() {
        let address = server();
        let text = measure([address; 2], 1_000, Duration::from_millis(1)).expect("a table");
        assert!(text.contains("\n1 rounds;"), "{text}");
    }

    #[test]
    fn an_error_names_the_host_and_what_to_do() {
        let nobody = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = nobody.local_addr().expect("an address").port();
        drop(nobody);
        let error = reachable("127.0.0.1", port, Instant::now()).expect_err("nobody listens");
        let text = error.to_string();
        assert!(text.contains(&format!("127.0.0.1 port {port}")), "{text}");
        assert!(text.contains("lb-agent bench --serve"), "{text}");
    }
}
