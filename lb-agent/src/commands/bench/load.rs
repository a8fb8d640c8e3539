//! What the client of `bench` does.

use std::{
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use super::{
    bulk,
    serve::{ECHO, SINK},
};

/// How long a turn of a load takes, about.
pub(super) const TURN: Duration = Duration::from_millis(100);
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// Connections in a turn at most: each occupies a port for a minute.
const CONNECTIONS: usize = 100;
/// The bytes of a bulk transfer.
const TRANSFER: usize = 16 << 20;

/// A load.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Load {
    /// One byte and its answer, again and again on one connection.
    Request,
    /// Connect, one byte, its answer, close.
    Connect,
    /// Many bytes one way, on a connection of their own.
    Bulk,
}

impl Load {
    /// All, in the order of the table.
    pub(super) const ALL: [Self; 3] = [Self::Request, Self::Connect, Self::Bulk];

    /// For people.
    pub(super) fn title(self) -> &'static str {
        match self {
            Self::Request => "request/response, time",
            Self::Connect => "connect-request-close, time",
            Self::Bulk => "bulk, rate",
        }
    }

    /// A time as the table has it.
    pub(super) fn shown(self, took: f64) -> String {
        match self {
            Self::Request | Self::Connect => format!("{took:.1} us"),
            Self::Bulk => format!("{:.2} Gbit/s", TRANSFER as f64 * 8.0 / took / 1e3),
        }
    }

    /// Of times, or of the rates that they mean.
    pub(super) fn ratio(self, took: f64, of_pod: f64) -> f64 {
        match self {
            Self::Request | Self::Connect => took / of_pod,
            Self::Bulk => of_pod / took,
        }
    }

    /// Works for this long, and at least once. Returns the median time of an operation, us.
    ///
    /// # Errors
    /// The server does not answer.
    pub(super) fn turn(self, to: SocketAddr, time: Duration) -> io::Result<f64> {
        match self {
            Self::Request => {
                let mut stream = connect(to, ECHO)?;
                repeat(time, usize::MAX, || ask(&mut stream))
            }
            Self::Connect => repeat(time, CONNECTIONS, || ask(&mut connect(to, ECHO)?)),
            Self::Bulk => {
                let chunk = vec![0; bulk::CHUNK];
                repeat(time, usize::MAX, || bulk::send(connect(to, SINK)?, &chunk, TRANSFER))
            }
        }
    }
}

fn repeat(
    time: Duration,
    most: usize,
    mut operation: impl FnMut() -> io::Result<()>,
) -> io::Result<f64> {
    let start = Instant::now();
    let mut times = Vec::new();
    while times.is_empty() || (start.elapsed() < time && times.len() < most) {
        let begin = Instant::now();
        operation()?;
        times.push(begin.elapsed().as_secs_f64() * 1e6);
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

fn connect(to: SocketAddr, kind: u8) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(&[kind])?;
    Ok(stream)
}

fn ask(stream: &mut TcpStream) -> io::Result<()> {
    let mut byte = [1];
    stream.write_all(&byte)?;
    stream.read_exact(&mut byte)
}
