//! A second API server behind the store of a [`ControlPlane`], with an address and a certificate
//! of its own.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::process::Process;
use super::{API_SERVER_PORT, ControlPlane, POLL, START_DEADLINE, confine};

/// A running API server. It ends when this is dropped.
#[derive(Debug)]
pub struct Peer {
    process: Process,
    address: SocketAddr,
    certificate: PathBuf,
}

impl Peer {
    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its URL.
    pub fn url(&self) -> String {
        format!("https://{}", self.address)
    }

    /// What kubectl needs to ask this server instead of the first one.
    pub fn kubectl_arguments(&self) -> [String; 2] {
        [
            format!("--server={}", self.url()),
            format!("--certificate-authority={}", self.certificate.display()),
        ]
    }

    /// Kills it, as a crash would.
    ///
    /// # Errors
    /// It had ended by itself.
    pub fn kill(mut self) -> Result<()> {
        self.process.kill()
    }
}

impl ControlPlane {
    /// Starts another API server at an address of the namespace, with other arguments than the
    /// first where they are given, and returns when it is ready.
    ///
    /// # Errors
    /// It ends early, or is not ready in 60 s.
    pub fn start_peer(&self, address: IpAddr, arguments: &[&str]) -> Result<Peer> {
        let directory = self.directory().join(format!("peer-{address}"));
        fs::create_dir_all(&directory)?;
        let mut command = Command::new(&self.programs.api_server);
        // A flag that is given twice would have both values.
        let flag = |argument: &str| argument.split('=').next().unwrap_or_default().to_owned();
        let mut usual = self.api_server_arguments(address, &directory);
        usual.retain(|own| arguments.iter().all(|given| flag(given) != flag(own)));
        command.args(usual).args(arguments);
        confine(&mut command, &self.namespace)?;
        let process = Process::start("kube-apiserver", command, &directory)?;
        let certificate = directory.join("apiserver.crt");
        let address = SocketAddr::new(address, API_SERVER_PORT);
        let mut peer = Peer { process, address, certificate };
        let deadline = Instant::now() + START_DEADLINE;
        loop {
            let [server, authority] = peer.kubectl_arguments();
            let answer = self.kubectl(["get", "--raw", "/readyz", &server, &authority])?;
            if answer.status.success() {
                return Ok(peer);
            }
            peer.process.check_running()?;
            ensure!(Instant::now() < deadline, "no answer:\n{}", peer.process.log_tail());
            thread::sleep(POLL);
        }
    }

    /// A kubeconfig with the agent's rights that trusts the certificates of these servers as
    /// well as the first one's.
    ///
    /// # Errors
    /// A file cannot be read or written.
    pub fn agent_kubeconfig_for(&self, peers: &[&Peer]) -> Result<PathBuf> {
        let mut bundle = fs::read_to_string(self.directory().join("apiserver.crt"))?;
        for peer in peers {
            bundle += &fs::read_to_string(&peer.certificate)?;
        }
        let authority = self.directory().join("bundle.crt");
        fs::write(&authority, bundle)?;
        let token = self.agent_token(&[])?;
        self.write_kubeconfig_of("lb-agent-of-all", &json!({"token": token}), &authority)
    }

    /// A kubeconfig with the agent's rights whose token is in a file of its own; both paths.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn agent_kubeconfig_with_token_file(&self, token: &str) -> Result<(PathBuf, PathBuf)> {
        let file = self.directory().join("token-of-lb-agent");
        fs::write(&file, token)?;
        let authority = self.directory().join("apiserver.crt");
        let credentials = json!({"tokenFile": file});
        Ok((self.write_kubeconfig_of("lb-agent-of-file", &credentials, &authority)?, file))
    }

    /// A kubeconfig that names files of a client certificate and its key.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn agent_kubeconfig_with_certificate(
        &self,
        certificate: &Path,
        key: &Path,
    ) -> Result<PathBuf> {
        let authority = self.directory().join("apiserver.crt");
        let credentials = json!({"client-certificate": certificate, "client-key": key});
        self.write_kubeconfig_of("lb-agent-of-certificate", &credentials, &authority)
    }

    /// A new token of the agent's ServiceAccount.
    ///
    /// # Errors
    /// The API server makes none.
    pub fn agent_token(&self, arguments: &[&str]) -> Result<String> {
        let create = ["create", "token", "lb-agent", "-n", "kube-system", "--duration=24h"];
        let made = self.kubectl(create.iter().chain(arguments))?;
        let token = super::successful("kubectl create token", made)?;
        Ok(token.trim().to_owned())
    }
}

/// Adds addresses to the loopback interface of a control plane's namespace.
///
/// # Errors
/// The namespace does not take one.
pub fn add_addresses(
    namespace: &crate::harness::netns::topology::namespace::Netns,
    addresses: &[&str],
) -> Result<()> {
    for address in addresses {
        namespace.ip(&format!("address add {address}/32 dev lo")).context("add an address")?;
    }
    Ok(())
}
