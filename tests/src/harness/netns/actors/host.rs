//! What nodes, pods and the outside client have in common: a namespace, a cgroup, addresses,
//! processes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::client::{self, Connection, Repl};
use super::process::{Place, Process};
use crate::harness::echo::bulk::Direction;
use crate::harness::echo::{Answer, Probe, Transport};
use crate::harness::netns::topology::cgroup::Cgroup;
use crate::harness::netns::topology::namespace::Netns;
use crate::harness::netns::topology::plan::{Addresses, Family};
use crate::harness::wait::{PATIENCE, eventually, patiently};

/// A place where processes run.
#[derive(Debug)]
pub struct Host {
    pub(in crate::harness::netns) name: String,
    pub(in crate::harness::netns) netns: Netns,
    pub(in crate::harness::netns) cgroup: Cgroup,
    pub(in crate::harness::netns) addresses: Addresses,
    pub(in crate::harness::netns) logs: PathBuf,
    pub(in crate::harness::netns) client: Mutex<Option<Arc<Mutex<Repl>>>>,
}

/// Which servers [`Host::serve`] starts.
#[derive(Clone, Debug, Default)]
pub struct Serve {
    tcp: Vec<u16>,
    udp: Vec<u16>,
    http: Vec<u16>,
    crowd: Vec<u16>,
    bulk: Vec<u16>,
}

impl Serve {
    /// An echo server for TCP and one for UDP on this port.
    pub fn on(port: u16) -> Self {
        Self { tcp: vec![port], udp: vec![port], ..Self::default() }
    }

    /// Another TCP echo server.
    #[must_use]
    pub fn tcp(mut self, port: u16) -> Self {
        self.tcp.push(port);
        self
    }

    /// Another UDP echo server.
    #[must_use]
    pub fn udp(mut self, port: u16) -> Self {
        self.udp.push(port);
        self
    }

    /// Another TCP echo server, for tens of thousands of clients at once.
    #[must_use]
    pub fn crowd(mut self, port: u16) -> Self {
        self.crowd.push(port);
        self
    }

    /// A server of downloads and uploads.
    #[must_use]
    pub fn bulk(mut self, port: u16) -> Self {
        self.bulk.push(port);
        self
    }

    /// Another HTTP server, for curl.
    #[must_use]
    pub fn http(mut self, port: u16) -> Self {
        self.http.push(port);
        self
    }
}

impl Host {
    /// A place that somebody else made and removes, with logs in this directory.
    pub(in crate::harness) fn adopt(
        name: &str,
        netns: Netns,
        cgroup: Cgroup,
        addresses: Addresses,
        logs: PathBuf,
    ) -> Self {
        Self { name: name.to_owned(), netns, cgroup, addresses, logs, client: Mutex::default() }
    }

    /// The name within the cluster: `node1`, or what the pod was called.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The network namespace.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// The cgroup of its processes.
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// Its address in each family.
    pub fn addresses(&self) -> Addresses {
        self.addresses
    }

    /// Its address in one family.
    pub fn ip(&self, family: Family) -> IpAddr {
        self.addresses.get(family)
    }

    /// Its address in one family, with a port.
    pub fn at(&self, family: Family, port: u16) -> SocketAddr {
        SocketAddr::new(self.ip(family), port)
    }

    /// Starts a process in the namespace and the cgroup; its output goes to files.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn spawn(&self, label: &str, command: Command) -> Result<Process> {
        self.place().spawn(&format!("{}-{label}", self.name), command)
    }

    /// Runs a program to its end and returns its stdout.
    ///
    /// # Errors
    /// It cannot be started, takes longer than `timeout` or fails; with the end of its output.
    pub fn output(&self, command: Command, timeout: Duration) -> Result<String> {
        let shown = format!("{command:?}");
        let mut process = self.spawn("command", command)?;
        let status = process.wait(timeout)?;
        if !status.success() {
            bail!("{shown} on {}: {status}\n{}", self.name, process.tail());
        }
        Ok(process.stdout())
    }

    /// Starts servers that name themselves after the host, and waits until they listen.
    ///
    /// # Errors
    /// A port is taken, or `lb-echo` is not there.
    pub fn serve(&self, serve: &Serve) -> Result<Process> {
        self.serve_as(&self.name, serve)
    }

    /// [`Host::serve`] under another name.
    ///
    /// # Errors
    /// As [`Host::serve`].
    pub fn serve_as(&self, name: &str, serve: &Serve) -> Result<Process> {
        let mut command = client::lb_echo()?;
        command.args(["serve", "--name", name]);
        for (flag, ports) in [
            ("--tcp", &serve.tcp),
            ("--udp", &serve.udp),
            ("--http", &serve.http),
            ("--crowd", &serve.crowd),
            ("--bulk", &serve.bulk),
        ] {
            for port in ports {
                command.arg(flag).arg(port.to_string());
            }
        }
        let mut process = self.spawn(&format!("serve-{name}"), command)?;
        process.wait_for_output("ready", patiently(PATIENCE))?;
        Ok(process)
    }

    /// Asks once from here; see [`Probe`].
    ///
    /// # Errors
    /// The client process does not work. A missing answer is no error but an [`Answer`].
    pub fn ask(&self, probe: Probe) -> Result<Answer> {
        let client = self.client()?;
        client::ask(&client, probe)
    }

    /// A datagram socket of the calling process on this host; waits so long for a datagram.
    ///
    /// # Errors
    /// The kernel gives none.
    pub fn datagrams(&self, family: Family, port: u16, patience: Duration) -> Result<UdpSocket> {
        let any: IpAddr = match family {
            Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
            Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
        };
        // A process that another test just starts may still hold a socket that was closed here.
        let socket = eventually(|| self.netns().run(|| Ok(UdpSocket::bind((any, port))?)))?;
        socket.set_read_timeout(Some(patience))?;
        Ok(socket)
    }

    /// Asks once over TCP from here.
    ///
    /// # Errors
    /// As [`Host::ask`].
    pub fn tcp(&self, to: SocketAddr) -> Result<Answer> {
        self.ask(Probe::new(Transport::Tcp, to))
    }

    /// Asks once over UDP from here.
    ///
    /// # Errors
    /// As [`Host::ask`].
    pub fn udp(&self, to: SocketAddr) -> Result<Answer> {
        self.ask(Probe::new(Transport::Udp, to))
    }

    /// Asks from here and keeps the socket.
    ///
    /// # Errors
    /// As [`Host::ask`], and where a TCP probe had no answer.
    pub fn open(&self, probe: Probe) -> Result<Connection> {
        Connection::open(self.client()?, probe)
    }

    /// Starts a bounded load from here.
    ///
    /// # Errors
    /// `lb-echo` is not there or does not start.
    pub fn load(&self, probe: &Probe, rate: u64, time: Duration) -> Result<client::Load> {
        client::Load::start(self, probe, rate, time, false)
    }

    /// [`Host::load`] on TCP connections that stay open.
    ///
    /// # Errors
    /// As [`Host::load`].
    pub fn load_keepalive(&self, probe: &Probe, rate: u64, time: Duration) -> Result<client::Load> {
        client::Load::start(self, probe, rate, time, true)
    }

    /// The loads of each kind: TCP connections, datagrams, requests on one connection.
    ///
    /// # Errors
    /// As [`Host::load`].
    pub fn loads(&self, to: SocketAddr, rate: u64, time: Duration) -> Result<[client::Load; 3]> {
        Ok([
            self.load(&Probe::tcp(to), rate, time)?,
            self.load(&Probe::udp(to), rate, time)?,
            self.load_keepalive(&Probe::tcp(to), rate, time)?,
        ])
    }

    /// Gathers many clients, each with a port of its own, which ask when the test says so.
    ///
    /// # Errors
    /// As [`Host::ask`], and where there are more than ports.
    pub fn crowd(&self, probe: &Probe, count: usize) -> Result<client::Crowd> {
        client::Crowd::gather(self, probe, count)
    }

    /// Starts so many downloads of so many bytes at once.
    ///
    /// # Errors
    /// `lb-echo` is not there or does not start.
    pub fn download(&self, to: SocketAddr, count: u64, length: u64) -> Result<client::Transfers> {
        client::Transfers::start(self, to, Direction::Down, count, length)
    }

    /// Starts so many uploads of so many bytes at once.
    ///
    /// # Errors
    /// As [`Host::download`].
    pub fn upload(&self, to: SocketAddr, count: u64, length: u64) -> Result<client::Transfers> {
        client::Transfers::start(self, to, Direction::Up, count, length)
    }

    pub(in crate::harness::netns) fn place(&self) -> Place<'_> {
        Place { netns: &self.netns, cgroup: &self.cgroup, logs: self.logs.clone() }
    }

    /// The client process, started when it is first needed.
    fn client(&self) -> Result<Arc<Mutex<Repl>>> {
        let mut client = self.client.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = &*client {
            return Ok(client.clone());
        }
        let repl = Repl::start(self)
            .with_context(|| format!("cannot start the client of {}", self.name))?;
        Ok(client.insert(Arc::new(Mutex::new(repl))).clone())
    }

    /// Ends the client process.
    pub(in crate::harness::netns) fn stop(&self) {
        self.client.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}
