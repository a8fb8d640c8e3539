//! A real control plane for tests: etcd, kube-apiserver and those controllers
//! of kube-controller-manager that tests need, inside a network namespace that
//! the test names. There is no kubelet and no scheduler: a test creates nodes
//! and pods and writes the status of the pods itself ([`objects`]), and the
//! real endpointslice controller makes slices of them.
//!
//! Not here: the namespaces, and anything that forwards packets.
//!
//! Everything a control plane starts and writes is gone when it is dropped.

pub mod kube_proxy;
pub mod live;
pub mod objects;
pub mod peer;
mod process;
pub mod programs;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use tempfile::TempDir;

use process::{Process, confine};
use programs::Programs;

/// The port of the API server, on the address that the test gives.
const API_SERVER_PORT: u16 = 6443;

/// etcd listens on the loopback interface of the namespace alone.
const ETCD_CLIENTS: &str = "http://127.0.0.1:2379";
const ETCD_PEERS: &str = "http://127.0.0.1:2380";

/// How long the control plane may take to become ready.
const START_DEADLINE: Duration = Duration::from_secs(60);

/// How often a condition is looked at again.
const POLL: Duration = Duration::from_millis(100);

/// The controllers that tests need: the writer of EndpointSlices, the one that
/// copies Endpoints of Services without selector into slices, and what makes
/// namespaces and their contents come and go.
const CONTROLLERS: &str = "endpoints-controller,endpointslice-controller,\
    endpointslice-mirroring-controller,serviceaccount-controller,\
    garbage-collector-controller,namespace-controller";

const RBAC: &str = include_str!("../../../manifests/base/rbac.yaml");

/// What a test may want otherwise.
#[derive(Debug, Clone)]
pub struct Options {
    /// Service address ranges, at most one of each family. The family of the
    /// listen address is put first, as the API server demands.
    pub service_cidrs: Vec<String>,
    /// More arguments of kube-apiserver.
    pub api_server_arguments: Vec<String>,
    /// Another etcd than the one that [`Programs::find`] finds.
    pub etcd: Option<PathBuf>,
    /// Where data, logs and credentials are: `control` in this directory instead of a temporary
    /// one.
    pub directory: Option<PathBuf>,
    /// Nodes with kubelets, by name. With any, every controller and a scheduler run, pods get
    /// tokens of their ServiceAccounts, and each kubelet a kubeconfig of its own.
    pub kubelets: Vec<String>,
}

impl Default for Options {
    /// Dual stack: `10.96.0.0/16` and `fd00:10:96::/112`.
    fn default() -> Self {
        Self {
            service_cidrs: vec!["10.96.0.0/16".to_owned(), "fd00:10:96::/112".to_owned()],
            api_server_arguments: Vec::new(),
            etcd: None,
            directory: None,
            kubelets: Vec::new(),
        }
    }
}

/// The name of [`Options::directory`]'s only entry.
pub const DIRECTORY: &str = "control";

/// A running control plane.
#[derive(Debug)]
pub struct ControlPlane {
    // In the order in which they are to end.
    scheduler: Option<Process>,
    controller_manager: Option<Process>,
    api_server: Option<Process>,
    etcd: Process,
    programs: Programs,
    namespace: File,
    listen_address: IpAddr,
    options: Options,
    directory: TempDir,
}

impl ControlPlane {
    /// Starts a control plane in the network namespace `namespace` (a path as
    /// `/run/netns/x`) and returns when it is ready. The namespace must have
    /// its loopback interface up and hold `listen_address`, which must not be
    /// a loopback address: the Service `kubernetes` gets it as its endpoint.
    ///
    /// # Errors
    /// A program is missing, ends early, or is not ready in 60 s; the end of
    /// its log is part of the error.
    pub fn start(namespace: &Path, listen_address: IpAddr, options: Options) -> Result<Self> {
        ensure!(
            !listen_address.is_loopback(),
            "listen address {listen_address} is a loopback address"
        );
        let mut programs = Programs::find()?;
        if let Some(etcd) = &options.etcd {
            programs.etcd.clone_from(etcd);
        }
        let namespace = File::open(namespace)
            .with_context(|| format!("open network namespace {}", namespace.display()))?;
        let directory = match &options.directory {
            Some(parent) => {
                tempfile::Builder::new().prefix(DIRECTORY).rand_bytes(0).tempdir_in(parent)?
            }
            None => tempfile::Builder::new().prefix("lb-controlplane-").tempdir()?,
        };
        let etcd = start_etcd(&programs, &namespace, directory.path())?;
        let mut plane = Self {
            scheduler: None,
            controller_manager: None,
            api_server: None,
            etcd,
            programs,
            namespace,
            listen_address,
            options,
            directory,
        };
        plane.write_credentials()?;
        plane.start_api_server()?;
        plane.start_controller_manager()?;
        plane.start_scheduler()?;
        plane.write_agent_kubeconfig()?;
        Ok(plane)
    }

    /// Kills all programs and says so if one had ended before. What is
    /// left of the control plane is removed.
    ///
    /// # Errors
    /// A program had ended early; the end of its log is part of the error.
    pub fn stop(mut self) -> Result<()> {
        let processes = [&mut self.scheduler, &mut self.controller_manager, &mut self.api_server];
        for process in processes.into_iter().flatten() {
            process.kill()?;
        }
        self.etcd.kill()
    }

    /// Kills the API server as a crash would: connections are reset, and the
    /// port refuses until [`Self::start_api_server`]. Its data stay.
    ///
    /// # Errors
    /// It is not running, or ended by itself before.
    pub fn stop_api_server(&mut self) -> Result<()> {
        let mut process = self.api_server.take().context("the API server is stopped")?;
        process.kill()
    }

    /// Starts the API server, with the data, address, certificate and tokens
    /// that it had before, and returns when it is ready.
    ///
    /// # Errors
    /// It is running, ends early, or is not ready in 60 s.
    pub fn start_api_server(&mut self) -> Result<()> {
        ensure!(self.api_server.is_none(), "the API server is running");
        let mut command = Command::new(&self.programs.api_server);
        command
            .args(self.api_server_arguments(self.listen_address, self.directory()))
            .args(&self.options.api_server_arguments);
        self.api_server = Some(self.start_process("kube-apiserver", command)?);
        let deadline = Instant::now() + START_DEADLINE;
        loop {
            let answer = self.kubectl(["get", "--raw", "/readyz"])?;
            if answer.status.success() {
                return Ok(());
            }
            self.check_running()?;
            if Instant::now() >= deadline {
                let log = self.api_server.as_ref().map(Process::log_tail);
                bail!(
                    "the API server is not ready after {START_DEADLINE:?}: {}\n{}",
                    String::from_utf8_lossy(&answer.stderr),
                    log.unwrap_or_default()
                );
            }
            thread::sleep(POLL);
        }
    }

    /// Where the API server listens.
    pub fn api_server_address(&self) -> SocketAddr {
        SocketAddr::new(self.listen_address, API_SERVER_PORT)
    }

    /// A kubeconfig file with every right.
    pub fn admin_kubeconfig(&self) -> PathBuf {
        self.kubeconfig("admin")
    }

    /// A kubeconfig file with a token of the ServiceAccount `lb-agent` and thus
    /// the rights that `manifests/base/rbac.yaml` gives it.
    pub fn agent_kubeconfig(&self) -> PathBuf {
        self.kubeconfig("lb-agent")
    }

    /// A kubeconfig file with the rights of kube-proxy, which the API server gives to the
    /// user `system:kube-proxy`.
    pub fn kube_proxy_kubeconfig(&self) -> PathBuf {
        self.kubeconfig("kube-proxy")
    }

    /// Ids of the running programs.
    pub fn process_ids(&self) -> Vec<u32> {
        [&self.scheduler, &self.controller_manager, &self.api_server]
            .into_iter()
            .flatten()
            .chain([&self.etcd])
            .map(Process::id)
            .collect()
    }

    /// The directory that holds data, logs and credentials.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Fails if a program that should run has ended.
    ///
    /// # Errors
    /// It has; the end of its log is part of the error.
    pub fn check_running(&mut self) -> Result<()> {
        self.etcd.check_running()?;
        let processes = [&mut self.api_server, &mut self.controller_manager, &mut self.scheduler];
        for process in processes.into_iter().flatten() {
            process.check_running()?;
        }
        Ok(())
    }

    /// A kubectl command with every right, inside the namespace. It dies with
    /// the thread that spawns it.
    ///
    /// # Errors
    /// The namespace cannot be entered.
    pub fn kubectl_command<I, S>(&self, arguments: I) -> Result<Command>
    where
        I: IntoIterator<Item = S>,
        S: AsRef<OsStr>,
    {
        let mut command = Command::new(&self.programs.kubectl);
        command
            .arg("--kubeconfig")
            .arg(self.admin_kubeconfig())
            .arg("--cache-dir")
            .arg(self.directory().join("kubectl-cache"))
            .args(arguments);
        confine(&mut command, &self.namespace)?;
        Ok(command)
    }

    /// Runs kubectl to its end, each of its requests bounded by 30 s.
    ///
    /// # Errors
    /// It cannot be started. That it failed is in the output's status.
    pub fn kubectl<I, S>(&self, arguments: I) -> Result<Output>
    where
        I: IntoIterator<Item = S>,
        S: AsRef<OsStr>,
    {
        let mut command = self.kubectl_command(arguments)?;
        command.arg("--request-timeout=30s").stdin(Stdio::null());
        command.output().context("run kubectl")
    }

    /// Applies the objects of a YAML or JSON document (server-side apply).
    ///
    /// # Errors
    /// The API server refuses one.
    pub fn apply(&self, objects: &str) -> Result<()> {
        self.apply_with(objects, &[])
    }

    /// Lets the API server check the objects of a document as it would to store them; unknown fields
    /// are errors. Stores nothing.
    ///
    /// # Errors
    /// The API server refuses one, or warns of one.
    pub fn try_apply(&self, objects: &str) -> Result<()> {
        self.apply_with(objects, &["--dry-run=server", "--validate=strict", "--warnings-as-errors"])
    }

    fn apply_with(&self, objects: &str, arguments: &[&str]) -> Result<()> {
        let mut command = self.kubectl_command(["apply", "--server-side", "--force-conflicts"])?;
        command
            .args(arguments)
            .args(["--request-timeout=30s", "-f", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().context("run kubectl apply")?;
        if let Some(mut input) = child.stdin.take() {
            input.write_all(objects.as_bytes())?;
        }
        successful("kubectl apply", child.wait_with_output()?)?;
        Ok(())
    }

    /// The arguments of an API server at an address that keeps its certificate in a directory.
    fn api_server_arguments(&self, address: IpAddr, certificates: &Path) -> Vec<String> {
        let mut cidrs = self.options.service_cidrs.clone();
        cidrs.sort_by_key(|cidr| cidr.contains(':') != address.is_ipv6());
        let directory = self.directory().display();
        let mut arguments = vec![
            format!("--etcd-servers={ETCD_CLIENTS}"),
            format!("--bind-address={address}"),
            format!("--advertise-address={address}"),
            format!("--secure-port={API_SERVER_PORT}"),
            format!("--cert-dir={}", certificates.display()),
            format!("--token-auth-file={directory}/tokens"),
            format!("--service-cluster-ip-range={}", cidrs.join(",")),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            // The serving key that the server makes in --cert-dir is good enough
            // for tokens that nobody but the server itself verifies.
            format!("--service-account-key-file={directory}/apiserver.key"),
            format!("--service-account-signing-key-file={directory}/apiserver.key"),
        ];
        let more: &[&str] = if self.has_kubelets() {
            &[
                "--authorization-mode=Node,RBAC",
                "--enable-admission-plugins=NodeRestriction",
                "--allow-privileged",
                // Nobody resolves the nodes' names.
                "--kubelet-preferred-address-types=InternalIP",
            ]
        } else {
            // Pods need no token of a ServiceAccount: nothing runs in them.
            &["--authorization-mode=RBAC", "--disable-admission-plugins=ServiceAccount"]
        };
        arguments.extend(more.iter().map(|argument| (*argument).to_owned()));
        arguments
    }

    /// Whether pods really run.
    fn has_kubelets(&self) -> bool {
        !self.options.kubelets.is_empty()
    }

    fn start_controller_manager(&mut self) -> Result<()> {
        let mut command = Command::new(&self.programs.controller_manager);
        command
            .arg("--kubeconfig")
            .arg(self.kubeconfig("controller-manager"))
            .args(["--leader-elect=false", "--secure-port=0"])
            .args(["--kube-api-qps=200", "--kube-api-burst=400"]);
        if self.has_kubelets() {
            let directory = self.directory().display();
            command
                .arg("--controllers=*")
                .arg(format!("--root-ca-file={directory}/apiserver.crt"))
                .arg(format!("--service-account-private-key-file={directory}/apiserver.key"));
        } else {
            command.arg(format!("--controllers={CONTROLLERS}"));
        }
        self.controller_manager = Some(self.start_process("kube-controller-manager", command)?);
        Ok(())
    }

    fn start_scheduler(&mut self) -> Result<()> {
        if self.has_kubelets() {
            let mut command = Command::new(programs::program("kube-scheduler")?);
            command
                .arg("--kubeconfig")
                .arg(self.kubeconfig("scheduler"))
                .args(["--leader-elect=false", "--secure-port=0"]);
            self.scheduler = Some(self.start_process("kube-scheduler", command)?);
        }
        Ok(())
    }

    fn start_process(&self, name: &'static str, mut command: Command) -> Result<Process> {
        confine(&mut command, &self.namespace)?;
        Process::start(name, command, self.directory())
    }

    /// Tokens of the users with every right, of kube-proxy and of kubelets, and their kubeconfig
    /// files.
    fn write_credentials(&self) -> Result<()> {
        let mut tokens = String::new();
        for (name, user, group) in [
            ("admin", "admin", "system:masters"),
            ("controller-manager", "controller-manager", "system:masters"),
            ("scheduler", "scheduler", "system:masters"),
            ("kube-proxy", "system:kube-proxy", "kube-proxies"),
        ] {
            let token = format!("token-of-{name}");
            tokens += &format!("{token},{user},{user},{group}\n");
            self.write_kubeconfig(name, &token)?;
        }
        for node in &self.options.kubelets {
            let token = format!("token-of-{node}");
            tokens += &format!("{token},system:node:{node},{node},system:nodes\n");
            self.write_kubeconfig(node, &token)?;
        }
        fs::write(self.directory().join("tokens"), tokens)?;
        Ok(())
    }

    /// Installs what a cluster would, and asks for a token as a kubelet would.
    fn write_agent_kubeconfig(&self) -> Result<()> {
        let deadline = Instant::now() + START_DEADLINE;
        // The API server is ready before it has made the namespace kube-system.
        while let Err(error) = self.apply(RBAC) {
            ensure!(Instant::now() < deadline, "install manifests/base/rbac.yaml: {error:#}");
            thread::sleep(POLL);
        }
        self.write_kubeconfig("lb-agent", &self.agent_token(&[])?)
    }

    fn write_kubeconfig(&self, user: &str, token: &str) -> Result<()> {
        let authority = self.directory().join("apiserver.crt");
        self.write_kubeconfig_of(user, &serde_json::json!({"token": token}), &authority)?;
        Ok(())
    }

    /// Writes a kubeconfig for a user, with these credentials and trust in these certificates.
    fn write_kubeconfig_of(
        &self,
        user: &str,
        credentials: &serde_json::Value,
        authority: &Path,
    ) -> Result<PathBuf> {
        let config = serde_json::json!({
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": user}}],
            "clusters": [{"name": "test", "cluster": {
                "server": format!("https://{}", self.api_server_address()),
                "certificate-authority": authority,
            }}],
            "users": [{"name": user, "user": credentials}],
        });
        let path = self.kubeconfig(user);
        fs::write(&path, config.to_string())?;
        Ok(path)
    }

    fn kubeconfig(&self, user: &str) -> PathBuf {
        self.directory().join(format!("{user}.kubeconfig"))
    }
}

fn start_etcd(programs: &Programs, namespace: &File, directory: &Path) -> Result<Process> {
    let mut command = Command::new(&programs.etcd);
    command
        .arg("--data-dir")
        .arg(directory.join("etcd"))
        .args(["--listen-client-urls", ETCD_CLIENTS])
        .args(["--advertise-client-urls", ETCD_CLIENTS])
        .args(["--listen-peer-urls", ETCD_PEERS])
        .args(["--initial-advertise-peer-urls", ETCD_PEERS])
        .arg(format!("--initial-cluster=default={ETCD_PEERS}"));
    confine(&mut command, namespace)?;
    Process::start("etcd", command, directory)
}

/// The standard output of a program that has succeeded.
pub(crate) fn successful(what: &str, output: Output) -> Result<String> {
    ensure!(
        output.status.success(),
        "{what}: {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8(output.stdout)?)
}
