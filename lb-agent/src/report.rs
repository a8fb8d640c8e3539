//! What a running agent tells the commands on its node: `lb-agent status` and `sysdump`.
//!
//! They ask by a unix socket with an abstract name, which belongs to the network namespace of the
//! agent and is gone with the process: nothing has to be mounted, cleaned up or opened to the
//! network, and only root is answered. A report has no secret: it names the files of credentials,
//! never their content.

mod ports;

use std::{
    borrow::Cow,
    collections::BTreeMap,
    fs,
    io::{self, Read, Write},
    net::Shutdown,
    os::{
        linux::net::SocketAddrExt,
        unix::{
            fs::MetadataExt,
            net::{SocketAddr, UnixListener, UnixStream},
        },
    },
    path::Path,
    time::Duration,
};

use jiff::Timestamp;
use nix::{
    sys::socket::{getsockopt, sockopt::PeerCredentials},
    unistd::geteuid,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use ports::PortUse;

/// How long an agent may take to answer.
const ANSWER: Duration = Duration::from_secs(10);

/// The state of a running agent. A field that an older agent does not send has its default.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Report {
    /// Its version.
    pub version: String,
    /// Its process, in its own PID namespace.
    pub process: u32,
    /// The name of its Node.
    pub node: String,
    /// Its `--bpf-dir`.
    pub bpf_dir: String,
    /// When it started.
    pub started: Timestamp,
    /// Where its objects come from: a URL or a directory.
    pub source: String,
    /// Whether the first complete state is in the maps.
    pub programmed: bool,
    /// Whether `/healthz` would answer 200.
    pub healthy: bool,
    /// When the maps last contained all known changes.
    pub last_updated: Option<Timestamp>,
    /// Since when a change has been waiting to be programmed.
    pub waiting_since: Option<Timestamp>,
    /// What is wrong, by its part.
    pub faults: BTreeMap<String, String>,
    /// How many pins are missing below its `--bpf-dir`.
    pub missing_pins: usize,
    /// Watches of the API server that are broken.
    pub broken_watches: Vec<BrokenWatch>,
    /// Objects, or parts of them, that are refused or do not fit.
    pub refused: Vec<Refused>,
    /// The backends to which most source ports of the node are in use, if they are many.
    pub source_ports: Vec<PortUse>,
    /// Manifests that are not valid.
    pub invalid_manifests: Vec<String>,
    /// The configuration, without secrets.
    pub configuration: Value,
}

/// A watch of the API server that is broken.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct BrokenWatch {
    /// The kind of its objects.
    pub kind: String,
    /// For how many seconds.
    pub seconds: u64,
    /// The first error.
    pub error: String,
}

/// An object, or a part of it, that is refused or does not fit.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(default)]
pub struct Refused {
    /// The kind of the object.
    pub kind: String,
    /// Its namespace and name.
    pub name: String,
    /// The reason of the Event.
    pub reason: String,
    /// The note of the Event.
    pub note: String,
}

/// What an agent can be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Question {
    /// Its [`Report`], as JSON.
    Report,
    /// The last lines of its log.
    Log,
    /// Its metrics, as text.
    Metrics,
}

impl Question {
    /// The line that asks it.
    fn word(self) -> &'static str {
        match self {
            Self::Report => "report",
            Self::Log => "log",
            Self::Metrics => "metrics",
        }
    }

    /// The question of a line.
    pub(crate) fn of_line(line: &str) -> Option<Self> {
        let all = [Self::Report, Self::Log, Self::Metrics];
        all.into_iter().find(|question| question.word() == line.trim())
    }
}

/// An agent could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// Nobody listens.
    #[error(
        "no lb-agent runs with --bpf-dir {0} in this network namespace: start it, or run this \
         command where it runs (kubectl exec)"
    )]
    NoAgent(String),
    /// Somebody else listens.
    #[error("user {0} listens in place of lb-agent: its answer would not be trusted")]
    NotRoot(u32),
    /// The connection failed.
    #[error("lb-agent does not answer")]
    Io(#[from] io::Error),
    /// The answer is no report.
    #[error("lb-agent sent a report that this version cannot read")]
    Report(#[from] serde_json::Error),
}

/// Listens for questions to the agent of a `--bpf-dir`.
///
/// # Errors
/// If the directory is gone, or another agent listens.
pub(crate) fn listen(bpf_dir: &Path) -> io::Result<UnixListener> {
    let listener = UnixListener::bind_addr(&address(bpf_dir)?)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Listens as the agent of this network namespace: only one can.
///
/// # Errors
/// [`io::ErrorKind::AddrInUse`] if another agent, or anybody else, does.
pub(crate) fn listen_for_namespace() -> io::Result<UnixListener> {
    let listener = UnixListener::bind_addr(&address_of_namespace()?)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Whether the peer of a connection is root or the user of this process.
pub(crate) fn is_trusted(user: u32) -> bool {
    user == 0 || user == geteuid().as_raw()
}

/// The report of the agent of a `--bpf-dir`.
///
/// # Errors
/// [`AskError::NoAgent`] if none runs.
pub fn report(bpf_dir: &Path) -> Result<Report, AskError> {
    Ok(serde_json::from_str(&ask(bpf_dir, Question::Report)?)?)
}

/// Asks the agent of a `--bpf-dir`.
///
/// # Errors
/// [`AskError::NoAgent`] if none runs.
pub fn ask(bpf_dir: &Path, question: Question) -> Result<String, AskError> {
    let nobody = || AskError::NoAgent(bpf_dir.display().to_string());
    let address = address(bpf_dir).map_err(|_| nobody())?;
    let (answer, _) = ask_at(&address, question, nobody)?;
    Ok(answer)
}

/// The report of the agent of this network namespace, whatever its `--bpf-dir`, and its process;
/// 0 if that is in another PID namespace.
///
/// # Errors
/// [`AskError::NoAgent`] if none runs.
pub(crate) fn report_of_namespace() -> Result<(Report, i32), AskError> {
    let nobody = || AskError::NoAgent("of any path".to_owned());
    let (answer, process) = ask_at(&address_of_namespace()?, Question::Report, nobody)?;
    Ok((serde_json::from_str(&answer)?, process))
}

/// The answer, and the process that listens.
fn ask_at(
    address: &SocketAddr,
    question: Question,
    nobody: impl Fn() -> AskError,
) -> Result<(String, i32), AskError> {
    let mut stream = UnixStream::connect_addr(address).map_err(|error| match error.kind() {
        io::ErrorKind::ConnectionRefused => nobody(),
        _ => error.into(),
    })?;
    let peer = getsockopt(&stream, PeerCredentials).map_err(io::Error::from)?;
    if !is_trusted(peer.uid()) {
        return Err(AskError::NotRoot(peer.uid()));
    }
    stream.set_read_timeout(Some(ANSWER))?;
    writeln!(stream, "{}", question.word())?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok((answer, peer.pid()))
}

/// The address: by the identity of the directory, as mount namespaces give it other paths.
fn address(bpf_dir: &Path) -> io::Result<SocketAddr> {
    let directory = fs::metadata(bpf_dir)?;
    SocketAddr::from_abstract_name(format!("lb-agent/{}/{}", directory.dev(), directory.ino()))
}

fn address_of_namespace() -> io::Result<SocketAddr> {
    SocketAddr::from_abstract_name("lb-agent/namespace")
}

/// The text without what looks like a secret: the user and password of a URL, a bearer token, and
/// JSON web tokens.
pub fn redacted(text: &str) -> String {
    let mut clean = String::with_capacity(text.len());
    let mut follows_bearer = false;
    for piece in text.split_inclusive(|c: char| c.is_whitespace() || matches!(c, '"' | '\'' | ','))
    {
        let word =
            piece.trim_end_matches(|c: char| c.is_whitespace() || matches!(c, '"' | '\'' | ','));
        let end = &piece[word.len()..];
        // The header of a JSON web token begins with `{"`.
        let is_token = word.starts_with("eyJ") && word.matches('.').count() == 2;
        if !word.is_empty() && (follows_bearer || is_token) {
            clean.push_str(REDACTED);
        } else {
            clean.push_str(&without_user(word));
        }
        clean.push_str(end);
        if !word.is_empty() {
            follows_bearer = word.eq_ignore_ascii_case("bearer");
        }
    }
    clean
}

/// A word without the user and password that are before the host in it, with a scheme or without:
/// clients log the parts of a URL by themselves too.
fn without_user(word: &str) -> Cow<'_, str> {
    let authority = word.find("://").map(|at| at + 3);
    let path = authority.and_then(|start| Some(start + word[start..].find('/')?));
    let (before_path, path) = word.split_at(path.unwrap_or(word.len()));
    let Some((user, host)) = before_path.rsplit_once('@') else { return word.into() };
    if authority.is_none() && !user.contains(':') {
        return word.into();
    }
    let start = authority.or_else(|| Some(user.find(['(', '=', '[', '{'])? + 1)).unwrap_or(0);
    format!("{}{REDACTED}@{host}{path}", &user[..start.min(user.len())]).into()
}

/// What stands for a secret.
const REDACTED: &str = "REDACTED";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_replaced_and_the_rest_stays() {
        for (text, clean) in [
            ("master https://u:p@192.0.2.1:6443/x y", "master https://REDACTED@192.0.2.1:6443/x y"),
            ("\"https://192.0.2.1/a@b\",\n", "\"https://192.0.2.1/a@b\",\n"),
            ("Authorization: Bearer abc.def-1 rest", "Authorization: Bearer REDACTED rest"),
            ("\"token\": \"eyJhbGciOiJS.eyJpc3Mi.c2ln\"", "\"token\": \"REDACTED\""),
            ("Some(u:p@192.0.2.1:6443)", "Some(REDACTED@192.0.2.1:6443)"),
            ("uri=http://u:p@h:1/x", "uri=http://REDACTED@h:1/x"),
            ("host: u:p@h", "host: REDACTED@h"),
            ("mail a@b", "mail a@b"),
            ("eyJ is no token", "eyJ is no token"),
            ("  two\n lines ", "  two\n lines "),
        ] {
            assert_eq!(redacted(text), clean);
        }
    }

    #[test]
    fn a_question_reaches_the_agent_of_its_directory_alone() {
        let [own, other] = [(); 2].map(|()| tempfile::tempdir().expect("a directory"));
        let listener = listen(own.path()).expect("a socket");
        listener.set_nonblocking(false).expect("a blocking socket");
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a connection");
            let mut line = String::new();
            stream.read_to_string(&mut line).expect("a question");
            assert_eq!(Question::of_line(&line), Some(Question::Report));
            stream.write_all(br#"{"node":"n","unknown":1}"#).expect("an answer");
        });
        let of_other = report(other.path()).expect_err("nobody listens");
        assert!(matches!(of_other, AskError::NoAgent(_)), "{of_other}");
        assert!(listen(own.path()).is_err(), "a second agent");
        let told = report(own.path()).expect("a report");
        server.join().expect("a server");
        assert_eq!(told, Report { node: "n".to_owned(), ..Report::default() });
    }
}
