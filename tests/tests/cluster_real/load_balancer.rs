//! A Service's address that MetalLB gives and announces, and an ingress controller behind it.

use std::fs;
use std::net::IpAddr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lb_tests::harness::controlplane::live::exposed::{Fetched, fetch};
use lb_tests::harness::netns::topology::plan::{Addresses, Family};
use lb_tests::harness::real::objects::{App, HTTP, service};
use lb_tests::harness::real::plan::node_name;
use lb_tests::harness::wait::{PATIENCE, eventually};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::world::World;
use crate::{Test, metallb, traefik};

pub(crate) const TESTS: &[Test] = &[
    ("load_balancer::the_announcement_follows_the_pod", follows_the_pod),
    ("load_balancer::an_ingress_controller_sees_the_clients_address", ingress),
];

/// Connections after each move of the pod.
const CONNECTIONS: usize = 20;

fn follows_the_pod(world: &World) -> Result<()> {
    const SERVER: &str = "moving";
    metallb::with(world, || {
        let mut exposed = service(SERVER, SERVER, "LoadBalancer");
        exposed["spec"]["externalTrafficPolicy"] = json!("Local");
        world.apply(&[App::new(SERVER, 1).on(1).deployment(), exposed])?;
        let addresses = metallb::addresses(world, SERVER)?;
        for node in [1, 3] {
            world.apply(&[App::new(SERVER, 1).on(node).deployment()])?;
            let pod = eventually(|| world.only_pod(SERVER))?;
            for family in Family::ALL {
                check_served_by(world, addresses.get(family), &pod, node)
                    .with_context(|| format!("{family:?}, pod on node{node}"))?;
            }
        }
        Ok(())
    })
}

/// The client outside gets to this pod soon, by the node that announces the address, and from
/// then on with every connection.
fn check_served_by(world: &World, address: IpAddr, pod: &str, node: u8) -> Result<()> {
    let client = world.outside()?;
    let hardware = hardware_of(world, node)?;
    let expected = Fetched::Answer { name: pod.to_owned(), client: client.ip(of(address)) };
    let check = |patience| {
        let answer = fetch(&client, (address, HTTP).into(), patience)?;
        ensure!(answer == expected, "{answer:?} instead of {expected:?}");
        Ok(())
    };
    eventually(|| {
        check(Duration::from_secs(2))?;
        let announced = metallb::announced_by(world, address)?;
        ensure!(announced == hardware, "announced by {announced}, not by node{node}, {hardware}");
        Ok(())
    })?;
    for number in 1..=CONNECTIONS {
        check(PATIENCE).with_context(|| format!("connection {number}"))?;
    }
    Ok(())
}

fn of(address: IpAddr) -> Family {
    if address.is_ipv4() { Family::V4 } else { Family::V6 }
}

fn hardware_of(world: &World, node: u8) -> Result<String> {
    let link = world.real.node(node).output("ip", &["-json", "link", "show", "eth0"])?;
    let link: Value = serde_json::from_str(&link)?;
    Ok(link[0]["address"].as_str().context("eth0 has no address")?.to_owned())
}

/// Hosts of the ingress, each with a certificate of its own.
const HOSTS: [&str; 2] = ["web.example", "shop.example"];
/// The node that the ingress controller runs on.
const HOME: u8 = 2;

fn ingress(world: &World) -> Result<()> {
    let certificates = tempfile::tempdir()?;
    for host in HOSTS {
        create_certificate(world, certificates.path(), host)?;
    }
    let apps = ["web", "shop", "cart"];
    metallb::with(world, || {
        traefik::with(world, &node_name(HOME), || {
            let servers = apps.iter().map(|app| App::new(app, 2).deployment());
            let services = apps.iter().map(|app| service(app, app, "ClusterIP"));
            let objects: Vec<Value> = servers.chain(services).chain([rules()]).collect();
            world.apply(&objects)?;
            let addresses = metallb::addresses(world, traefik::NAME)?;
            for family in Family::ALL {
                check_rules(world, addresses, family, &certificates)?;
            }
            Ok(())
        })
    })
}

fn create_certificate(world: &World, directory: &Path, host: &str) -> Result<()> {
    let [key, certificate] = ["key", "crt"].map(|kind| directory.join(format!("{host}.{kind}")));
    let mut command = Command::new("openssl");
    command.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]);
    command.args(["-nodes", "-days", "2", "-subj", &format!("/CN={host}")]);
    command.args(["-addext", &format!("subjectAltName=DNS:{host}"), "-keyout"]);
    let output = command.arg(&key).arg("-out").arg(&certificate).output()?;
    ensure!(output.status.success(), "openssl: {}", String::from_utf8_lossy(&output.stderr));
    let secret = json!({
        "apiVersion": "v1",
        "kind": "Secret",
        "type": "kubernetes.io/tls",
        "metadata": {"name": host},
        "stringData": {
            "tls.crt": fs::read_to_string(certificate)?,
            "tls.key": fs::read_to_string(key)?,
        },
    });
    world.apply(&[secret])
}

fn rules() -> Value {
    let path = |path: &str, app: &str| {
        json!({
            "path": path,
            "pathType": "Prefix",
            "backend": {"service": {"name": app, "port": {"number": HTTP}}},
        })
    };
    json!({
        "apiVersion": "networking.k8s.io/v1",
        "kind": "Ingress",
        "metadata": {"name": "rules"},
        "spec": {
            "rules": [
                {"host": HOSTS[0], "http": {"paths": [path("/", "web")]}},
                {"host": HOSTS[1], "http": {"paths": [path("/", "shop"), path("/cart", "cart")]}},
            ],
            "tls": HOSTS.map(|host| json!({"hosts": [host], "secretName": host})),
        },
    })
}

/// What the client outside sees by host, by path and by certificate, and the controller's log.
fn check_rules(
    world: &World,
    addresses: Addresses,
    family: Family,
    certificates: &TempDir,
) -> Result<()> {
    let [web, shop] = HOSTS;
    let address = addresses.get(family);
    let get = |url: &str, trusted: &str| {
        let trusted = certificates.path().join(format!("{trusted}.crt"));
        curl(world, url, address, &trusted)
    };
    let path = format!("/by-{family:?}");
    let rows = [
        (web, String::new(), "web-"),
        (web, "/cart".to_owned(), "web-"),
        (web, path.clone(), "web-"),
        (shop, "/cart/1".to_owned(), "cart-"),
        (shop, "/cartoon".to_owned(), "shop-"),
        (shop, path.clone(), "shop-"),
    ];
    for (host, path, app) in &rows {
        for scheme in ["http", "https"] {
            let url = format!("{scheme}://{host}{path}");
            let said = eventually(|| get(&url, host))?;
            let wanted = format!("name={app}");
            ensure!(said.starts_with(&wanted), "{url} at {address}: {said:?}, not {wanted}");
        }
    }
    let (other, own) = (get(&format!("https://{web}/"), shop), get("http://other.example/", web));
    let told = other.err().context("one host's certificate passes for the other's")?;
    ensure!(told.to_string().contains("certificate"), "{told:#}");
    let told = own.err().context("a host without a rule is answered")?;
    ensure!(told.to_string().contains("404"), "{told:#}");
    check_log(world, family, &path)
}

fn check_log(world: &World, family: Family, path: &str) -> Result<()> {
    let client = world.outside()?.ip(family);
    let clients = eventually(|| {
        let clients = traefik::logged_clients(world, path)?;
        ensure!(clients.len() >= 4, "the log has {} requests for {path}", clients.len());
        Ok(clients)
    })?;
    ensure!(clients.iter().all(|seen| *seen == client), "logged {clients:?}, not {client}");
    Ok(())
}

fn curl(world: &World, url: &str, address: IpAddr, trusted: &Path) -> Result<String> {
    let host = url.split('/').nth(2).context("no host in the URL")?;
    let bracketed = if address.is_ipv6() { format!("[{address}]") } else { address.to_string() };
    let resolve = [traefik::HTTP, traefik::HTTPS].map(|port| format!("{host}:{port}:{bracketed}"));
    let trusted = trusted.display().to_string();
    let options = ["--silent", "--show-error", "--fail", "--max-time", "5", "--cacert", &trusted];
    let resolve = ["--resolve", &resolve[0], "--resolve", &resolve[1], url];
    world.run_outside("curl", &[&options[..], &resolve[..]].concat())
}
