//! What probers, load balancers and scrapers ask of kube-proxy, lb answers in the same way:
//! both run on the same objects, each on a node of its own, and are asked the same.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use lb_tests::harness::controlplane::Options;
use lb_tests::harness::controlplane::kube_proxy::{self, KubeProxy, Mode};
use lb_tests::harness::controlplane::live::LiveCluster;
use lb_tests::harness::controlplane::live::exposed::exposed;
use lb_tests::harness::netns::actors::host::Serve;
use lb_tests::harness::netns::topology::cluster::Cluster;
use lb_tests::harness::netns::topology::plan::{Family, balancer_ip};
use lb_tests::harness::netns::traffic::http::{self, Answer};
use lb_tests::harness::wait::PATIENCE;
use serde_json::{Value, json};

const HEALTH: u16 = 10256;
const METRICS: u16 = 10249;
const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// What lb answers otherwise on purpose: the path, and why.
///
/// - `//healthz` (10256): Go sends whoever asks for it to `/healthz`; here it is not found,
///   as any other path.
/// - `/proxyMode`: each says its own, and so the length differs.
/// - `/metrics`: each has its own beside those that both have, which a test of their own
///   compares. Go sends them in chunks, lb with their length. To whoever asks for OpenMetrics
///   kube-proxy has none.
/// - `/configz`: each its own configuration.
/// - `/metrics/slis`, `/debug`, `/flagz`, `/statusz`: what they tell is of
///   kube-proxy's insides.
const OTHERWISE: [&str; 1] = ["/proxyMode"];

/// A cluster with lb on node 1 and kube-proxy on node 2.
struct Pair {
    _proxy: KubeProxy,
    live: LiveCluster,
}

impl Pair {
    fn start() -> Result<Self> {
        let builder = Cluster::builder().pod(1, "a").pod(2, "b");
        let mut live = LiveCluster::start(builder, Options::default())?;
        live.start_agent(1, &["--nodeport-addresses", "primary"])?;
        let options = kube_proxy::Options::new(Mode::Nftables);
        let proxy = KubeProxy::start(&live.plane, &live.cluster.node(2), options)?;
        Ok(Self { _proxy: proxy, live })
    }

    /// Asks both from their own nodes, at the loopback address or at the node's.
    fn ask(&self, request: &Request<'_>) -> Result<[Answer; 2]> {
        let ask = |number| {
            let node = self.live.cluster.node(number);
            let ip = request.at.map_or(LOOPBACK, |family| node.ip(family));
            let to = SocketAddr::new(ip, request.port);
            node.netns().run(|| http::request(request.method, to, request.path, request.headers))
        };
        Ok([ask(1)?, ask(2)?])
    }

    /// Asks both until they have this status.
    fn wait_status(&self, request: &Request<'_>, status: u16) -> Result<()> {
        let start = Instant::now();
        loop {
            let answers = self.ask(request);
            let is_met = |answers: &[Answer; 2]| answers.iter().all(|it| it.status() == status);
            if answers.as_ref().is_ok_and(is_met) {
                return Ok(());
            }
            ensure!(start.elapsed() < PATIENCE, "{request:?}: not {status} but {answers:#?}");
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Asks both, whose answers are to be the same but for what time makes of them.
    fn check(&self, request: &Request<'_>) -> Result<Answer> {
        let [lb, kube_proxy] = self.ask(request)?.map(masked);
        ensure!(lb == kube_proxy, "{request:?}\nlb: {lb:#?}\nkube-proxy: {kube_proxy:#?}");
        Ok(lb)
    }

    /// [`Pair::check`] of all that is asked of a proxy, where `/healthz` and `/livez` have
    /// these statuses.
    fn check_health(&self, healthz: u16, livez: u16) -> Result<()> {
        for method in ["GET", "HEAD", "POST"] {
            for (path, status) in
                [("/healthz", healthz), ("/livez", livez), ("/healthz?a=b", healthz)]
            {
                let answer = self.check(&Request::new(method, HEALTH, path))?;
                ensure!(answer.status() == status, "{method} {path}: {answer:#?}");
            }
        }
        Ok(())
    }

    fn patch_nodes(&self, patch: &Value) -> Result<()> {
        let patch = patch.to_string();
        for node in ["node1", "node2"] {
            self.live.kubectl(&["patch", "node", node, "--type=merge", "-p", &patch])?;
        }
        Ok(())
    }
}

#[derive(Clone, Copy, Debug)]
struct Request<'a> {
    method: &'a str,
    /// Which address of the node; its loopback address if none.
    at: Option<Family>,
    port: u16,
    path: &'a str,
    headers: &'a [(&'a str, &'a str)],
}

impl<'a> Request<'a> {
    fn new(method: &'a str, port: u16, path: &'a str) -> Self {
        Self { method, at: None, port, path, headers: &[] }
    }
}

/// An answer with its times taken out, after a look at their form, and with its headers by
/// name: their order means nothing.
fn masked(answer: Answer) -> Answer {
    let times = times(&answer.body);
    let mut body = answer.body.clone();
    for time in &times {
        body = body.replace(*time, "TIME");
    }
    // Go leaves zeros at the end of a fraction away, so the length is a matter of chance.
    let is_of_chance =
        |name: &str| name == "Date" || (name == "Content-Length" && has_time(&answer));
    let mut headers = answer.headers.clone();
    for (name, value) in &mut headers {
        if is_of_chance(name) {
            *value = "CHANCE".to_owned();
        }
    }
    headers.sort();
    Answer { status_line: answer.status_line, headers, body }
}

/// Whether the body holds times, or would if it were not left away.
fn has_time(answer: &Answer) -> bool {
    !times(&answer.body).is_empty() || answer.body.is_empty()
}

/// The times in a body: those between quotes that are written as Go writes them.
fn times(body: &str) -> Vec<&str> {
    let is_time = |text: &&str| {
        let Some(text) = text.strip_suffix('Z') else { return false };
        let (seconds, fraction) = text.split_once('.').unwrap_or((text, "1"));
        let form: String =
            seconds.chars().map(|it| if it.is_ascii_digit() { '0' } else { it }).collect();
        form == "0000-00-00T00:00:00"
            && (1..=9).contains(&fraction.len())
            && fraction.bytes().all(|it| it.is_ascii_digit())
            && !fraction.ends_with('0')
    };
    body.split('"').filter(is_time).collect()
}

#[test]
fn health_and_liveness_are_reported_as_kube_proxy_reports_them() -> Result<()> {
    let pair = Pair::start()?;
    let healthz = Request::new("GET", HEALTH, "/healthz");
    pair.check_health(200, 200)?;
    for path in ["/", "/other", "/healthz/", "/livez/x", "/metrics"] {
        for method in ["GET", "HEAD", "DELETE"] {
            let answer = pair.check(&Request::new(method, HEALTH, path))?;
            ensure!(answer.status() == 404, "{method} {path}: {answer:#?}");
        }
    }
    let taint = json!([{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}]);
    pair.patch_nodes(&json!({"spec": {"taints": taint}}))?;
    pair.wait_status(&healthz, 503)?;
    pair.check_health(503, 200)?;
    let other = json!([{"key": "other", "effect": "NoSchedule"}]);
    pair.patch_nodes(&json!({"spec": {"taints": other}}))?;
    pair.wait_status(&healthz, 200)?;
    pair.check_health(200, 200)?;
    // A Node that somebody holds on to is being deleted for as long.
    pair.patch_nodes(&json!({"metadata": {"finalizers": ["lb.test/held"]}}))?;
    pair.live.kubectl(&["delete", "node", "node1", "node2", "--wait=false"])?;
    pair.wait_status(&healthz, 503)?;
    pair.check_health(503, 200)?;
    pair.patch_nodes(&json!({"metadata": {"finalizers": null}}))?;
    pair.live.kubectl(&["wait", "--for=delete", "node/node1", "node/node2", "--timeout=30s"])?;
    pair.check_health(503, 200)?;
    for node in pair.live.cluster.nodes() {
        let addresses = node.addresses();
        let addresses = [addresses.v4.into(), addresses.v6.into()];
        pair.live.plane.create_node(node.name(), &addresses)?;
    }
    pair.wait_status(&healthz, 200)?;
    pair.check_health(200, 200)
}

#[test]
fn the_server_of_metrics_answers_as_kube_proxy_s() -> Result<()> {
    let pair = Pair::start()?;
    for method in ["GET", "HEAD", "PUT"] {
        for path in ["/healthz", "/healthz?verbose", "/healthz?verbose=1&x", "/healthz/ping"] {
            let answer = pair.check(&Request::new(method, METRICS, path))?;
            ensure!(answer.status() == 200, "{method} {path}: {answer:#?}");
        }
        for path in ["/", "/livez", "/healthz/", "/healthz/other", "/proxymode"] {
            let answer = pair.check(&Request::new(method, METRICS, path))?;
            ensure!(answer.status() == 404, "{method} {path}: {answer:#?}");
        }
    }
    for path in OTHERWISE {
        let [lb, kube_proxy] = pair.ask(&Request::new("GET", METRICS, path))?.map(masked);
        ensure!((&*lb.body, &*kube_proxy.body) == ("ebpf", "nftables"), "{lb:?} {kube_proxy:?}");
        let headers = |answer: &Answer| {
            let others = answer.headers.iter().filter(|(name, _)| name != "Content-Length");
            others.cloned().collect::<Vec<_>>()
        };
        ensure!(headers(&lb) == headers(&kube_proxy), "{lb:#?}\n{kube_proxy:#?}");
    }
    for accept in ["*/*", "text/plain", "text/plain;version=0.0.4;q=0.5", "application/json"] {
        let [lb, kube_proxy] = kinds(&pair, &[("Accept", accept)])?;
        ensure!(lb == kube_proxy, "{accept}: {lb} {kube_proxy}");
    }
    let [lb, kube_proxy] = kinds(&pair, &[])?;
    ensure!(lb == kube_proxy, "{lb} {kube_proxy}");
    let [lb, _] = kinds(&pair, &[("Accept", "application/openmetrics-text; version=1.0.0")])?;
    ensure!(lb.starts_with("application/openmetrics-text; version=1.0.0;"), "{lb}");
    Ok(())
}

/// The content types that `/metrics` has for whoever asks with these headers.
fn kinds(pair: &Pair, headers: &[(&str, &str)]) -> Result<[String; 2]> {
    let asked = pair.ask(&Request { headers, ..Request::new("GET", METRICS, "/metrics") })?;
    for answer in &asked {
        let since = answer.header("process-start-time-unix").unwrap_or_default();
        ensure!(since.parse::<u64>().is_ok_and(|since| since > 0), "{since:?}");
    }
    Ok(asked.map(|answer| answer.header("content-type").unwrap_or_default().to_owned()))
}

#[test]
fn a_health_check_node_port_answers_as_kube_proxy_s() -> Result<()> {
    let pair = Pair::start()?;
    pair.live.create_pods("web", &["a", "b"])?;
    let mut service = exposed("web", 20, "LoadBalancer", "web");
    service["spec"]["externalTrafficPolicy"] = json!("Local");
    pair.live.plane.apply(&service.to_string())?;
    pair.live.set_ingress("web", balancer_ip(20))?;
    let port = pair.live.health_check_port("web")?;
    let at =
        |family, method, path| Request { at: Some(family), ..Request::new(method, port, path) };
    let check = |status, endpoints: usize| {
        for family in Family::ALL {
            pair.wait_status(&at(family, "GET", "/"), status)?;
            for (method, path) in
                [("GET", "/"), ("GET", "/healthz?x"), ("POST", "/a/b"), ("HEAD", "/")]
            {
                let answer = pair.check(&at(family, method, path))?;
                let weight = answer.header("x-load-balancing-endpoint-weight");
                let is_good = answer.status() == status
                    && weight == Some(endpoints.to_string().as_str())
                    && (method == "HEAD") == answer.body.is_empty();
                ensure!(is_good, "{family:?} {method} {path}: {answer:#?}");
            }
        }
        Ok(())
    };
    check(200, 1)?;
    for pod in ["a", "b"] {
        pair.live.plane.set_ready("default", pod, false)?;
    }
    check(503, 0)?;
    for pod in ["a", "b"] {
        pair.live.plane.set_ready("default", pod, true)?;
    }
    check(200, 1)?;
    // Those that terminate serve on, but a load balancer is told to look elsewhere.
    for pod in ["a", "b"] {
        pair.live.plane.delete_pod("default", pod, Duration::from_secs(60))?;
    }
    check(503, 0)
}

/// The Events of a reason by the instance that reports them, without that and their times; what
/// names a node or an address in their notes is taken out.
fn events(pair: &Pair, reason: &str) -> Result<BTreeMap<String, Vec<Value>>> {
    let selector = format!("--field-selector=reason={reason}");
    let said = pair.live.kubectl(&["get", "events", "-A", "-o", "json", &selector])?;
    let said: Value = serde_json::from_str(&said)?;
    let mut found: BTreeMap<String, Vec<Value>> = BTreeMap::new();
    for event in said["items"].as_array().context("a list of Events")? {
        let text = |field: &str| event[field].as_str().unwrap_or_default();
        let mut note = text("message").to_owned();
        for node in pair.live.cluster.nodes() {
            note = note.replace(node.name(), "NODE");
            for family in Family::ALL {
                note = note.replace(&node.ip(family).to_string(), "ADDRESS");
            }
        }
        // Of what kube-proxy tells of either family only the first to fail becomes an Event.
        let note = note.replace("tcp6 [ADDRESS]", "tcp4 ADDRESS");
        let mut object = event["involvedObject"].clone();
        if object["kind"] == "Node" {
            let name = object["name"].as_str().unwrap_or_default().to_owned();
            ensure!(pair.live.cluster.nodes().iter().any(|node| node.name() == name), "{name}");
            object["name"] = json!("NODE");
        } else if let Some(object) = object.as_object_mut() {
            // kube-proxy does not know it; with it `kubectl describe` finds the Event.
            object.remove("uid");
        }
        let told = json!({
            "object": object,
            "type": text("type"),
            "reason": text("reason"),
            "action": text("action"),
            "note": note,
            "namespace": event["metadata"]["namespace"],
        });
        found.entry(text("reportingComponent").to_owned()).or_default().push(told);
    }
    Ok(found)
}

/// Waits for Events of a reason from both, of which each of lb's is to be one of kube-proxy's.
fn check_events(pair: &Pair, reason: &str) -> Result<()> {
    let start = Instant::now();
    loop {
        let told = events(pair, reason)?;
        if let (Some(lb), Some(kube_proxy)) = (told.get("lb-agent"), told.get("kube-proxy"))
            && lb.iter().all(|event| kube_proxy.contains(event))
        {
            return Ok(());
        }
        ensure!(start.elapsed() < PATIENCE, "not the same from both: {told:#?}");
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn events_are_those_of_kube_proxy_but_for_who_reports_them() -> Result<()> {
    const TAKEN: u16 = 31_234;
    let mut pair = Pair::start()?;
    check_events(&pair, "Starting")?;
    let nodes = [1, 2].map(|number| pair.live.cluster.node(number));
    let _taken = nodes.each_ref().map(|node| node.serve(&Serve::default().http(TAKEN)));
    let mut service = exposed("web", 20, "LoadBalancer", "web");
    service["spec"]["externalTrafficPolicy"] = json!("Local");
    service["spec"]["healthCheckNodePort"] = json!(TAKEN);
    pair.live.plane.apply(&service.to_string())?;
    check_events(&pair, "FailedToStartServiceHealthcheck")?;
    // With --bind-address-hard-fail an address that is taken ends them, and is told.
    for (server, reason) in
        [("healthz", "FailedToStartProxierHealthcheck"), ("metrics", "FailedToStartMetricServer")]
    {
        let address = format!("--{server}-bind-address=0.0.0.0:{TAKEN}");
        pair.live.take_agent(1)?.terminate()?;
        let arguments = ["--bind-address-hard-fail", &address];
        let ended = pair.live.spawn_agent(1, &arguments)?.process().wait(PATIENCE)?;
        ensure!(ended.code() == Some(1), "{ended}");
        let told = events(&pair, reason)?;
        let told = told.get("lb-agent").context("nothing was told")?;
        let expected = json!({"kind": "Node", "apiVersion": "v1", "name": "NODE"});
        let note = told[0]["note"].as_str().unwrap_or_default();
        let is_good = told.len() == 1
            && told[0]["object"] == expected
            && told[0]["type"] == "Warning"
            && told[0]["action"] == "StartKubeProxy"
            && note.contains(&format!("0.0.0.0:{TAKEN}"))
            && note.contains(&format!("--{server}-bind-address"))
            && note.contains("in use");
        ensure!(is_good, "{told:#?}");
        pair.live.start_agent(1, &[])?;
    }
    Ok(())
}

/// A family of metrics: its type, its help, the names of its labels, the bounds of its
/// buckets.
#[derive(Debug, Default, PartialEq)]
struct Metric {
    kind: String,
    help: String,
    labels: BTreeSet<String>,
    bounds: Vec<f64>,
}

/// The families whose name begins with `prefix`.
fn metrics(text: &str, prefix: &str) -> Result<BTreeMap<String, Metric>> {
    let mut found: BTreeMap<String, Metric> = BTreeMap::new();
    let mut name = String::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (of, help) = rest.split_once(' ').context("help of what")?;
            name = of.to_owned();
            found.entry(name.clone()).or_default().help = help.to_owned();
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (of, kind) = rest.split_once(' ').context("type of what")?;
            name = of.to_owned();
            found.entry(name.clone()).or_default().kind = kind.to_owned();
        } else {
            ensure!(line.starts_with(&name), "{line:?} is among the samples of {name}");
            let metric = found.entry(name.clone()).or_default();
            let Some((_, rest)) = line.split_once('{') else { continue };
            let (labels, _) = rest.rsplit_once('}').context("labels without end")?;
            for label in labels.split(',').filter(|label| !label.is_empty()) {
                let (label, value) = label.split_once('=').context("a label without value")?;
                if label == "le" {
                    let bound = value.trim_matches('"').replace("+Inf", "inf").parse()?;
                    if !metric.bounds.contains(&bound) {
                        metric.bounds.push(bound);
                    }
                }
                metric.labels.insert(label.to_owned());
            }
        }
    }
    found.retain(|name, _| name.starts_with(prefix));
    Ok(found)
}

/// What dashboards read of kube-proxy.
const READ: [&str; 11] = [
    "kubeproxy_network_programming_duration_seconds",
    "kubeproxy_proxy_healthz_total",
    "kubeproxy_proxy_livez_total",
    "kubeproxy_sync_proxy_rules_duration_seconds",
    "kubeproxy_sync_proxy_rules_endpoint_changes_pending",
    "kubeproxy_sync_proxy_rules_endpoint_changes_total",
    "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds",
    "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
    "kubeproxy_sync_proxy_rules_no_local_endpoints_total",
    "kubeproxy_sync_proxy_rules_service_changes_pending",
    "kubeproxy_sync_proxy_rules_service_changes_total",
];

#[test]
fn metrics_that_kube_proxy_has_too_have_its_form() -> Result<()> {
    let pair = Pair::start()?;
    let scrape = Request::new("GET", METRICS, "/metrics");
    let samples = |of: &str| {
        let told = pair.ask(&scrape)?.map(|answer| {
            let lines = answer.body.lines().filter(|line| line.starts_with(of));
            lines.map(str::to_owned).collect::<Vec<_>>()
        });
        anyhow::Ok(told)
    };
    const LATENCY: &str = "kubeproxy_network_programming_duration_seconds_count";
    ensure!(samples(LATENCY)?[0].is_empty(), "what was there before is counted as slow");
    pair.check_health(200, 200)?;
    // A Service's creation time has whole seconds. kube-proxy measures only changes that were
    // triggered after its start (`EndpointsChangeTracker.checkoutTriggerTimes`).
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
    thread::sleep(
        Duration::from_secs(1).saturating_sub(Duration::from_nanos(now.subsec_nanos().into())),
    );
    pair.live.create_pods("web", &["b"])?;
    let mut service = exposed("web", 20, "NodePort", "web");
    service["spec"]["internalTrafficPolicy"] = json!("Local");
    pair.live.plane.apply(&service.to_string())?;
    let start = Instant::now();
    let is_counted =
        |lines: &[String]| lines.len() == 2 && lines.iter().all(|line| !line.ends_with(" 0"));
    loop {
        let told = samples(LATENCY)?;
        if told.iter().all(|lines| is_counted(lines)) {
            break;
        }
        ensure!(start.elapsed() < PATIENCE, "no change of endpoints is counted: {told:#?}");
        thread::sleep(Duration::from_millis(50));
    }
    let [lb, kube_proxy] = pair.ask(&scrape)?;
    let (lb, mut kube_proxy) =
        (metrics(&lb.body, "kubeproxy_")?, metrics(&kube_proxy.body, "kubeproxy_")?);
    kube_proxy.retain(|name, _| READ.contains(&name.as_str()));
    ensure!(kube_proxy.len() == READ.len(), "kube-proxy has only {:?}", kube_proxy.keys());
    for (name, metric) in &kube_proxy {
        let own = lb.get(name);
        ensure!(own == Some(metric), "{name}\nlb: {own:?}\nkube-proxy: {metric:?}");
    }
    ensure!(lb.len() == kube_proxy.len(), "lb has others: {:?}", lb.keys());
    // Node 1 has no endpoint, which three ports in each family want; node 2 has.
    let [lb, kube_proxy] = samples("kubeproxy_sync_proxy_rules_no_local_endpoints_total")?;
    let line = |family: &str, policy: &str, count: &str| {
        format!(
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total\
             {{ip_family=\"{family}\",traffic_policy=\"{policy}\"}} {count}"
        )
    };
    for family in ["IPv4", "IPv6"] {
        ensure!(lb.contains(&line(family, "internal", "3")), "{lb:#?}");
        ensure!(lb.contains(&line(family, "external", "0")), "{lb:#?}");
        ensure!(kube_proxy.contains(&line(family, "internal", "0")), "{kube_proxy:#?}");
    }
    Ok(())
}
