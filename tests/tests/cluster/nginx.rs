//! nginx as the ingress of a cluster: TLS, virtual hosts, a route to another Service behind it;
//! clients outside come by a load balancer's address with the policy Local, and are in its log.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lb_tests::harness::controlplane::live::exposed::{Policy, exposed};
use lb_tests::harness::controlplane::live::{HTTP, LiveCluster};
use lb_tests::harness::controlplane::{Options, programs};
use lb_tests::harness::netns::actors::host::Host;
use lb_tests::harness::netns::actors::process::Process;
use lb_tests::harness::netns::topology::cluster::Cluster;
use lb_tests::harness::netns::topology::plan::{Family, balancer_ip, cluster_ip};
use lb_tests::harness::netns::words::expectations::Expectations;
use lb_tests::harness::wait::PATIENCE;
use nix::sys::signal::Signal;
use serde_json::json;
use tempfile::TempDir;

/// The pod that nginx is in, on node 1, and the one behind it, on node 2.
const EDGE: &str = "edge";
const APP: &str = "app";
/// The name of the virtual host, and one that nginx does not know.
const SHOP: &str = "shop.example";
const STRANGE: &str = "strange.example";
/// Numbers of the Services.
const EDGE_NUMBER: u8 = 20;
const APP_NUMBER: u8 = 21;
/// Where nginx listens.
const TARGET: u16 = 8443;
/// What curl ends with for a handshake that is refused, and in silence.
const NO_HANDSHAKE: i32 = 35;
const TIMED_OUT: i32 = 28;
/// The size of a download, and its rate in bytes a second: it takes some seconds.
const DOWNLOAD: usize = 16 << 20;
const RATE: &str = "4M";

/// nginx in a pod, with all its files in one directory.
struct Nginx {
    process: Process,
    directory: TempDir,
}

impl Nginx {
    fn start(pod: &Host) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("lb-nginx-").tempdir()?;
        let path = directory.path();
        write_certificate(pod, path)?;
        let bytes: Vec<u8> = (0..DOWNLOAD).map(|index| ((index * 31) >> 5) as u8).collect();
        fs::write(path.join("download"), bytes)?;
        fs::write(path.join("nginx.conf"), configuration(path))?;
        let mut command = Command::new(programs::nginx()?);
        command.arg("-e").arg(path.join("error.log")).arg("-c").arg(path.join("nginx.conf"));
        let mut nginx = Self { process: pod.spawn("nginx", command)?, directory };
        // It is written when the sockets listen.
        let start = Instant::now();
        while !nginx.path("nginx.pid").exists() {
            let ended = nginx.process.ended()?;
            let in_time = ended.is_none() && start.elapsed() < PATIENCE;
            ensure!(in_time, "nginx: {ended:?}\n{}{}", nginx.process.tail(), nginx.log("error"));
            thread::sleep(Duration::from_millis(5));
        }
        Ok(nginx)
    }

    fn path(&self, file: &str) -> PathBuf {
        self.directory.path().join(file)
    }

    fn log(&self, name: &str) -> String {
        fs::read_to_string(self.path(&format!("{name}.log"))).unwrap_or_default()
    }

    /// How often the access log holds a line.
    fn count(&self, line: &str) -> usize {
        self.log("access").lines().filter(|found| *found == line).count()
    }

    /// Waits until the access log holds a line more than `before` times: it is written after
    /// the answer is sent.
    fn wait_line(&self, line: &str, before: usize) -> Result<()> {
        let start = Instant::now();
        while self.count(line) <= before {
            ensure!(start.elapsed() < PATIENCE, "no new line {line:?} in\n{}", self.log("access"));
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Ends it as soon as all answers are sent.
    fn stop(mut self) -> Result<String> {
        self.process.signal(Signal::SIGQUIT)?;
        let status = self.process.wait(PATIENCE)?;
        ensure!(status.success(), "{status}\n{}", self.log("error"));
        Ok(self.log("access"))
    }
}

/// A key and a certificate that signs itself.
fn write_certificate(pod: &Host, directory: &Path) -> Result<()> {
    let mut command = Command::new("openssl");
    command.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]);
    command.args(["-nodes", "-days", "2", "-subj", &format!("/CN={SHOP}")]);
    command.args(["-addext", &format!("subjectAltName=DNS:{SHOP}")]);
    command.arg("-keyout").arg(directory.join("key.pem"));
    command.arg("-out").arg(directory.join("certificate.pem"));
    pod.output(command, PATIENCE).map(drop)
}

fn configuration(directory: &Path) -> String {
    let path = directory.display();
    let app = cluster_ip(APP_NUMBER);
    format!(
        "daemon off;
         user root;
         worker_processes 2;
         pid {path}/nginx.pid;
         events {{}}
         http {{
           log_format seen '$remote_addr $host $uri $status';
           access_log {path}/access.log seen;
           client_body_temp_path {path}/body;
           proxy_temp_path {path}/proxy;
           fastcgi_temp_path {path}/fastcgi;
           uwsgi_temp_path {path}/uwsgi;
           scgi_temp_path {path}/scgi;
           server {{
             listen {TARGET} ssl default_server;
             listen [::]:{TARGET} ssl default_server;
             ssl_reject_handshake on;
           }}
           server {{
             listen {TARGET} ssl;
             listen [::]:{TARGET} ssl;
             server_name {SHOP};
             ssl_certificate {path}/certificate.pem;
             ssl_certificate_key {path}/key.pem;
             location / {{ return 200 'the shop'; }}
             location = /download {{ root {path}; }}
             location /app4/ {{ proxy_pass http://{}:{HTTP}/; }}
             location /app6/ {{ proxy_pass http://[{}]:{HTTP}/; }}
           }}
         }}",
        app.v4, app.v6
    )
}

/// A client outside, which comes by the load balancer's address of one family.
struct Client<'a> {
    live: &'a LiveCluster,
    certificate: PathBuf,
    family: Family,
}

impl Client<'_> {
    fn ip(&self) -> IpAddr {
        self.live.cluster.outside().ip(self.family)
    }

    fn curl(&self, host: &str, path: &str, arguments: &[&str]) -> Result<Process> {
        let mut command = Command::new("curl");
        let address = match balancer_ip(EDGE_NUMBER).get(self.family) {
            IpAddr::V4(ip) => ip.to_string(),
            IpAddr::V6(ip) => format!("[{ip}]"),
        };
        command.args(["--silent", "--show-error", "--fail", "--cacert"]).arg(&self.certificate);
        command.args(["--resolve", &format!("{host}:443:{address}")]).args(arguments);
        command.arg(format!("https://{host}{path}"));
        self.live.cluster.outside().spawn("curl", command)
    }

    fn fetch(&self, path: &str) -> Result<String> {
        let mut curl = self.curl(SHOP, path, &["--max-time", "5"])?;
        let status = curl.wait(PATIENCE)?;
        ensure!(status.success(), "{path}: {status}\n{}", curl.tail());
        Ok(curl.stdout())
    }

    /// The answer, and the client's own address in the log.
    fn check(&self, nginx: &Nginx, path: &str, answer: &str) -> Result<()> {
        let line = format!("{} {SHOP} {path} 200", self.ip());
        let before = nginx.count(&line);
        let said = self.fetch(path)?;
        ensure!(said.starts_with(answer), "{path}: {said:?} instead of {answer:?}");
        nginx.wait_line(&line, before)
    }

    fn check_ends(&self, host: &str, code: i32) -> Result<()> {
        let mut curl = self.curl(host, "/", &["--max-time", "1"])?;
        let status = curl.wait(PATIENCE)?;
        ensure!(status.code() == Some(code), "{status} instead of {code}\n{}", curl.tail());
        Ok(())
    }
}

fn start() -> Result<LiveCluster> {
    let builder = Cluster::builder().pod(1, EDGE).pod(2, APP);
    let mut live = LiveCluster::start(builder, Options::default())?;
    live.serve(&[APP])?;
    live.start_agents(&[])?;
    live.create_pods(EDGE, &[EDGE])?;
    live.create_pods(APP, &[APP])?;
    live.create_service(APP, APP_NUMBER)?;
    let mut service = exposed(EDGE, EDGE_NUMBER, "LoadBalancer", EDGE);
    service["spec"]["ports"] = json!([{ "name": "https", "port": 443, "targetPort": TARGET }]);
    live.plane.apply(&service.to_string())?;
    live.set_ingress(EDGE, balancer_ip(EDGE_NUMBER))?;
    live.set_external_policy(EDGE, Policy::Local)?;
    live.wait_members(EDGE, &[EDGE])?;
    live.wait_members(APP, &[APP])?;
    Ok(live)
}

/// Every page, with the client's address in the log.
fn check_pages(live: &LiveCluster, nginx: &Nginx, expectations: &mut Expectations, when: &str) {
    let edge = live.cluster.pod(EDGE);
    for family in Family::ALL {
        let client = Client { live, certificate: nginx.path("certificate.pem"), family };
        let app = |family| format!("name={APP}\nclient_address={}\n", edge.ip(family));
        for (path, answer) in
            [("/", "the shop".to_owned()), ("/app4/", app(Family::V4)), ("/app6/", app(Family::V6))]
        {
            expectations
                .check(format!("{when}: {family:?} {path}"), client.check(nginx, path, &answer));
        }
    }
}

/// A download that goes on while node 1's agent is killed and another one starts.
fn check_restart(
    live: &mut LiveCluster,
    nginx: &Nginx,
    expectations: &mut Expectations,
) -> Result<()> {
    let to = |family| nginx.path(&format!("{family:?}"));
    let mut downloads = Vec::new();
    for family in Family::ALL {
        let client = Client { live, certificate: nginx.path("certificate.pem"), family };
        let file = to(family);
        let file = file.to_str().context("a path that is no text")?;
        let arguments = ["--limit-rate", RATE, "--output", file, "--max-time", "30"];
        downloads.push(client.curl(SHOP, "/download", &arguments)?);
    }
    let size = |family| fs::metadata(to(family)).map_or(0, |file| file.len());
    let start = Instant::now();
    while Family::ALL.into_iter().any(|family| size(family) == 0) {
        ensure!(start.elapsed() < PATIENCE, "no download begins\n{}", downloads[0].tail());
        thread::sleep(Duration::from_millis(5));
    }
    live.take_agent(1)?.kill9()?;
    check_pages(live, nginx, expectations, "without an agent");
    live.start_agent(1, &[])?;
    check_pages(live, nginx, expectations, "with the next agent");
    for download in &mut downloads {
        expectations.is_true("a download was over too early", download.ended()?.is_none());
    }
    for (family, mut download) in Family::ALL.into_iter().zip(downloads) {
        let status = download.wait(4 * PATIENCE)?;
        ensure!(status.success(), "{family:?}: {status}\n{}", download.tail());
        let is_whole = fs::read(to(family))? == fs::read(nginx.path("download"))?;
        expectations.is_true(format!("the download by {family:?} differs"), is_whole);
    }
    Ok(())
}

#[test]
fn nginx_sees_who_comes_by_the_address_of_a_load_balancer() -> Result<()> {
    let mut live = start()?;
    let nginx = Nginx::start(&live.cluster.pod(EDGE))?;
    let mut expectations = Expectations::default();
    live.cluster.fabric().route_external_to(1)?;
    check_pages(&live, &nginx, &mut expectations, "by the node of nginx");
    check_restart(&mut live, &nginx, &mut expectations)?;
    for (what, node, host, code) in [
        ("another virtual host", 1, STRANGE, NO_HANDSHAKE),
        ("by the other node", 2, SHOP, TIMED_OUT),
    ] {
        live.cluster.fabric().route_external_to(node)?;
        for family in Family::ALL {
            let certificate = nginx.path("certificate.pem");
            let client = Client { live: &live, certificate, family };
            expectations.check(format!("{what}: {family:?}"), client.check_ends(host, code));
        }
    }
    let log = nginx.stop()?;
    let clients = Family::ALL.map(|family| live.cluster.outside().ip(family).to_string());
    let is_known = |line: &str| clients.iter().any(|ip| line.split(' ').next() == Some(ip));
    expectations.is_true(format!("others in the log:\n{log}"), log.lines().all(is_known));
    expectations.finish()
}
