use std::{net::IpAddr, time::Duration};

use jiff::Timestamp;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{sleep, timeout},
};

use super::*;
use crate::health::tests::UPDATE_TIMEOUT;
use lb_control::desired::health_checks::Check;

const DEADLINE: Duration = Duration::from_secs(10);

/// Running servers on 127.0.0.1 and ::1.
struct Setup {
    wanted: watch::Sender<Wanted>,
    health: Health,
    refusals: Refusals,
    cancel: CancellationToken,
    running: JoinHandle<()>,
}

impl Setup {
    fn start() -> Self {
        let addresses = ["127.0.0.1", "::1"].map(|text| text.parse().unwrap());
        let (wanted, seen) =
            watch::channel(Wanted { addresses: addresses.into(), ..Wanted::default() });
        let (health, refusals) = (Health::new(UPDATE_TIMEOUT), Refusals::logged());
        health.updated(Timestamp::now());
        let listeners = Listeners::new("node-a", seen, health.clone(), refusals.clone());
        let cancel = CancellationToken::new();
        let running = tokio::spawn(listeners.run(cancel.clone()));
        Self { wanted, health, refusals, cancel, running }
    }

    /// A health check, with so many local endpoints in each family.
    fn set(&self, service: &str, port: u16, local_endpoints: [usize; 2]) {
        let local_endpoints = [IpFamily::V4, IpFamily::V6].into_iter().zip(local_endpoints);
        let check = Check {
            uid: "".into(),
            created: None,
            port,
            local_endpoints: local_endpoints.collect(),
        };
        self.wanted.send_modify(|wanted| {
            wanted.checks.insert(service.into(), check);
        });
    }

    fn remove(&self, service: &str) {
        self.wanted.send_modify(|wanted| {
            wanted.checks.remove(service);
        });
    }

    async fn end(self) {
        self.cancel.cancel();
        timeout(DEADLINE, self.running).await.unwrap().unwrap();
    }
}

/// The ports are those that the kernel hands out; nobody else asks for them so soon.
async fn free_ports<const N: usize>() -> [u16; N] {
    let mut held = Vec::new();
    for _ in 0..N {
        held.push(TcpListener::bind("127.0.0.1:0").await.unwrap());
    }
    let ports: Vec<_> = held.iter().map(|held| held.local_addr().unwrap().port()).collect();
    ports.try_into().unwrap()
}

async fn request(address: SocketAddr, request: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(request.as_bytes()).await?;
    let mut text = String::new();
    timeout(DEADLINE, stream.read_to_string(&mut text)).await??;
    Ok(text)
}

/// The start of an answer and its last line but two, once it is `expected`; `None` is a
/// connection that is refused.
async fn until(ip: &str, port: u16, expected: Option<(u16, &str, usize)>) {
    let address = SocketAddr::new(ip.parse::<IpAddr>().unwrap(), port);
    let text = "GET / HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n";
    let wait = async {
        loop {
            let is_met = match (request(address, text).await, expected) {
                (Err(error), None) => error.kind() == io::ErrorKind::ConnectionRefused,
                (Ok(answer), Some((status, name, count))) => {
                    answer.starts_with(&format!("HTTP/1.1 {status} "))
                        && answer.contains(&format!("\t\t\"name\": \"{name}\"\n"))
                        && answer.contains(&format!("\t\"localEndpoints\": {count},\n"))
                }
                _ => false,
            };
            if is_met {
                return;
            }
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(DEADLINE, wait).await.unwrap_or_else(|_| panic!("{address} is never {expected:?}"));
}

#[tokio::test]
async fn an_answer_is_that_of_kube_proxy_byte_for_byte() {
    let setup = Setup::start();
    let [port] = free_ports().await;
    setup.set("shop/cart", port, [1, 0]);
    until("127.0.0.1", port, Some((200, "cart", 1))).await;
    let address = SocketAddr::new([127, 0, 0, 1].into(), port);
    let body = "{\n\t\"service\": {\n\t\t\"namespace\": \"shop\",\n\t\t\"name\": \"cart\"\n\t},\n\
                \t\"localEndpoints\": 1,\n\t\"serviceProxyHealthy\": true\n}";
    for (method, path, body) in
        [("GET", "/", body), ("GET", "/any/path?q=1", body), ("POST", "/", body), ("HEAD", "/", "")]
    {
        let asked = format!("{method} {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n");
        let answer = request(address, &asked).await.unwrap();
        let (head, sent) = answer.split_once("\r\n\r\n").unwrap();
        let mut head: Vec<_> = head.lines().filter(|line| !line.starts_with("Date: ")).collect();
        head[1..].sort_unstable();
        let expected = [
            "HTTP/1.1 200 OK",
            "Connection: close",
            "Content-Length: 112",
            "Content-Type: application/json",
            "X-Content-Type-Options: nosniff",
            "X-Load-Balancing-Endpoint-Weight: 1",
        ];
        assert_eq!((&head[..], sent), (&expected[..], body), "{method} {path}");
    }
    setup.health.set_fault("maps", Some("full".to_owned()));
    let asked = "GET / HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n";
    let answer = request(address, asked).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 503 Service Unavailable\r\n"), "{answer}");
    assert!(answer.contains("\r\nX-Load-Balancing-Endpoint-Weight: 1\r\n"), "{answer}");
    assert!(answer.ends_with("\t\"serviceProxyHealthy\": false\n}"), "{answer}");
    setup.end().await;
}

#[tokio::test]
async fn servers_follow_services_and_endpoints() {
    let setup = Setup::start();
    let [one, two] = free_ports().await;
    setup.set("shop/cart", one, [2, 0]);
    until("127.0.0.1", one, Some((200, "cart", 2))).await;
    until("::1", one, Some((503, "cart", 0))).await;
    setup.set("shop/cart", one, [0, 1]);
    until("127.0.0.1", one, Some((503, "cart", 0))).await;
    until("::1", one, Some((200, "cart", 1))).await;
    setup.set("shop/cart", two, [1, 1]);
    until("127.0.0.1", two, Some((200, "cart", 1))).await;
    until("127.0.0.1", one, None).await;
    setup.set("shop/menu", one, [3, 3]);
    until("127.0.0.1", one, Some((200, "menu", 3))).await;
    setup.wanted.send_modify(|wanted| {
        wanted.addresses.remove(&IpAddr::from([127, 0, 0, 1]));
    });
    until("127.0.0.1", one, None).await;
    until("::1", one, Some((200, "menu", 3))).await;
    setup.remove("shop/menu");
    until("::1", one, None).await;
    until("::1", two, Some((200, "cart", 1))).await;
    setup.end().await;
}

#[tokio::test]
async fn a_port_in_use_is_reported_once_and_bound_when_it_is_free() {
    let setup = Setup::start();
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let taken_port = taken.local_addr().unwrap().port();
    let [port] = free_ports().await;
    setup.set("shop/cart", taken_port, [1, 1]);
    setup.set("shop/menu", port, [2, 2]);
    until("::1", taken_port, Some((200, "cart", 1))).await;
    until("127.0.0.1", port, Some((200, "menu", 2))).await;
    let note = format!(
        "node node-a failed to start healthcheck \"shop/cart\" on port {taken_port}: \
         listen tcp4 127.0.0.1:{taken_port}: bind: address already in use"
    );
    let reason = EventReason::FailedToStartServiceHealthcheck;
    assert_eq!(setup.refusals.published_note("shop/cart", reason), Some(note));
    assert_eq!(setup.refusals.published_note("shop/menu", reason), None);
    drop(taken);
    until("127.0.0.1", taken_port, Some((200, "cart", 1))).await;
    timeout(DEADLINE, async {
        while setup.refusals.published_note("shop/cart", reason).is_some() {
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
    setup.end().await;
}

#[tokio::test]
async fn the_second_service_of_a_port_waits_until_the_first_gives_it_up() {
    let setup = Setup::start();
    let [port, other] = free_ports().await;
    setup.set("shop/cart", port, [1, 1]);
    setup.set("shop/menu", port, [2, 2]);
    until("127.0.0.1", port, Some((200, "cart", 1))).await;
    let note = format!(
        "node node-a failed to start healthcheck \"shop/menu\" on port {port}: \
         the port belongs to the Service shop/cart"
    );
    let reason = EventReason::FailedToStartServiceHealthcheck;
    assert_eq!(setup.refusals.published_note("shop/menu", reason), Some(note));
    setup.set("shop/cart", other, [1, 1]);
    until("127.0.0.1", port, Some((200, "menu", 2))).await;
    until("127.0.0.1", other, Some((200, "cart", 1))).await;
    setup.end().await;
}

#[tokio::test]
async fn a_connection_that_is_kept_ends_with_its_server() {
    let setup = Setup::start();
    let [port] = free_ports().await;
    setup.set("shop/cart", port, [1, 1]);
    until("127.0.0.1", port, Some((200, "cart", 1))).await;
    let mut kept = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    kept.write_all(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n").await.unwrap();
    let mut text = [0; 15];
    kept.read_exact(&mut text).await.unwrap();
    assert_eq!(&text, b"HTTP/1.1 200 OK");
    // A request that is never finished does not hold the end up.
    let mut unfinished = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    unfinished.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
    setup.remove("shop/cart");
    for stream in [&mut kept, &mut unfinished] {
        let mut rest = Vec::new();
        timeout(DEADLINE, stream.read_to_end(&mut rest)).await.unwrap().unwrap();
    }
    setup.end().await;
}
