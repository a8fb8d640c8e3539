use std::{net::SocketAddr, time::Duration};

use jiff::{SignedDuration, Timestamp};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use super::{
    Health, Severity, is_eligible,
    server::{Server, bind, bind_retrying, serve_health, serve_metrics},
};
use crate::metrics::{Faults, Metrics, format::Format};

/// How long an update may wait: twice kube-proxy's default sync period.
pub(super) const UPDATE_TIMEOUT: Duration = Duration::from_secs(60);
const DEADLINE: Duration = Duration::from_secs(10);

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_700_000_000 + second).unwrap()
}

async fn get(address: SocketAddr, path: &str) -> (u16, String, String) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut text = String::new();
    timeout(DEADLINE, stream.read_to_string(&mut text)).await.unwrap().unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, head.to_lowercase(), body.to_owned())
}

#[tokio::test(start_paused = true)]
async fn a_proxy_is_healthy_while_no_update_waits_too_long() {
    let health = Health::new(UPDATE_TIMEOUT);
    assert!(!health.report(at(0)).healthy, "nothing is in the maps");
    health.queued_update(at(0));
    assert!(!health.report(at(1)).healthy, "the first state is not in the maps");
    health.updated(at(2));
    assert!(health.report(at(10_000)).healthy, "nothing waits");
    health.queued_update(at(10_000));
    tokio::time::advance(Duration::from_secs(50)).await;
    health.queued_update(at(10_050));
    tokio::time::advance(Duration::from_secs(9)).await;
    assert!(health.report(at(10_059)).healthy);
    assert!(health.report(at(20_000)).healthy, "a step of the node's time is no fault");
    tokio::time::advance(Duration::from_secs(1)).await;
    assert!(!health.report(at(10_060)).healthy, "the oldest update counts");
    assert!(!health.report(at(-10_000)).healthy);
    health.updated(at(10_061));
    assert!(health.report(at(10_061)).healthy);
    assert_eq!(health.report(at(10_062)).last_updated, at(10_061));
}

#[test]
fn a_fault_makes_the_proxy_unhealthy_until_it_is_over() {
    let health = Health::new(UPDATE_TIMEOUT);
    health.updated(at(0));
    health.set_fault("map FLOW_TABLE4", Some("full".to_owned()));
    assert!(!health.report(at(0)).healthy);
    health.set_fault("map FLOW_TABLE4", None);
    assert!(health.report(at(0)).healthy);
}

#[test]
fn what_a_restart_does_not_cure_takes_no_node_out_of_its_load_balancers() {
    for (severity, healthy, is_ready) in [
        (Severity::Degraded, true, true),
        (Severity::Misconfigured, true, true),
        (Severity::NotReady, true, false),
        (Severity::Unhealthy, false, false),
    ] {
        let gauge = Faults::default();
        let health = Health::new(UPDATE_TIMEOUT).with_gauge(gauge.clone());
        let is_shown = || gauge.get_or_create(&[("part", "it")]).get() == 1;
        health.updated(at(0));
        health.set("it", severity, Some("broken".to_owned()));
        let report = health.report(at(0));
        assert_eq!((report.healthy, report.is_ready), (healthy, is_ready), "{severity:?}");
        assert_eq!(health.details(at(0)).faults["it"], "broken");
        assert!(is_shown(), "{severity:?}");
        health.set("it", severity, None);
        let report = health.report(at(0));
        assert!(report.healthy && report.is_ready && !is_shown(), "{severity:?}");
    }
}

#[test]
fn the_report_has_the_form_of_kube_proxy() {
    let health = Health::new(UPDATE_TIMEOUT);
    let text = |report| serde_json::to_string(&report).unwrap();
    let never = "0001-01-01T00:00:00Z";
    assert!(text(health.report(at(0))).starts_with(&format!("{{\"lastUpdated\":\"{never}\"")));
    health.updated(at(0));
    let now = at(1) + SignedDuration::from_millis(500);
    let family = r#"{"lastUpdated":"2023-11-14T22:13:20Z","healthy":true}"#;
    assert_eq!(
        text(health.report(now)),
        format!(
            "{{\"lastUpdated\":\"2023-11-14T22:13:20Z\",\"currentTime\":\"2023-11-14T22:13:21.5Z\",\
             \"nodeEligible\":true,\"healthy\":true,\"status\":{{\"IPv4\":{family},\"IPv6\":{family}}}}}"
        )
    );
}

#[test]
fn a_node_that_is_unknown_or_about_to_go_is_not_eligible() {
    let rows = [
        (json!({"metadata": {"name": "a"}}), true),
        (json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}}), false),
        (
            json!({"metadata": {}, "spec": {"taints": [{"key": "other", "effect": "NoSchedule"}]}}),
            true,
        ),
        (
            json!({"metadata": {}, "spec": {"taints": [
                {"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}
            ]}}),
            false,
        ),
    ];
    for (node, expected) in rows {
        let parsed = serde_json::from_value(node.clone()).unwrap();
        assert_eq!(is_eligible(Some(&parsed)), expected, "{node}");
    }
    assert!(!is_eligible(None));
}

#[tokio::test]
async fn the_health_server_answers_as_kube_proxy_does() {
    let health = Health::new(UPDATE_TIMEOUT);
    let metrics = Metrics::new();
    let cancel = CancellationToken::new();
    let listener = bind(Server::Health, "127.0.0.1:0".parse().unwrap()).await.unwrap();
    let address = listener.local_addr().unwrap();
    let serving =
        tokio::spawn(serve_health(listener, health.clone(), metrics.clone(), cancel.clone()));

    assert_eq!(get(address, "/healthz").await.0, 503);
    assert_eq!(get(address, "/livez").await.0, 503);
    health.updated(Timestamp::now());
    let (status, head, body) = get(address, "/healthz").await;
    assert_eq!(status, 200);
    assert!(head.contains("content-type: application/json"), "{head}");
    assert!(head.contains("x-content-type-options: nosniff"), "{head}");
    assert!(body.contains("\"nodeEligible\":true"), "{body}");
    let answer: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!(answer["lastUpdated"], answer["currentTime"], "a good answer is always news");
    health.set("watch", Severity::NotReady, Some("broken".to_owned()));
    let (status, _, body) = get(address, "/healthz").await;
    assert!(status == 503 && body.contains("\"healthy\":false"), "{body}");
    let (status, _, body) = get(address, "/livez").await;
    assert!(status == 200 && body.contains("\"healthy\":true"), "{body}");
    health.set("watch", Severity::NotReady, None);
    health.set_node_eligible(false);
    let (status, _, body) = get(address, "/healthz").await;
    let answer: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert!(
        status == 503 && answer["lastUpdated"] == answer["status"]["IPv4"]["lastUpdated"],
        "{body}"
    );
    let (status, _, body) = get(address, "/livez").await;
    assert_eq!(status, 200);
    assert!(!body.contains("nodeEligible"), "{body}");
    let (status, head, body) = get(address, "/other").await;
    assert!(status == 404 && body == "404 page not found\n" && head.contains("nosniff"), "{body}");
    let counted = metrics.encode(Format::Plain).unwrap();
    assert!(counted.contains("kubeproxy_proxy_healthz_total{code=\"503\"} 3"), "{counted}");
    assert!(counted.contains("kubeproxy_proxy_livez_total{code=\"200\"} 2"), "{counted}");

    // A client that never finishes its request does not hold the end up.
    let _idle = TcpStream::connect(address).await.unwrap();
    cancel.cancel();
    timeout(DEADLINE, serving).await.unwrap().unwrap();
}

#[tokio::test]
async fn the_metrics_server_says_mode_and_metrics() {
    let cancel = CancellationToken::new();
    let listener = bind(Server::Metrics, "127.0.0.1:0".parse().unwrap()).await.unwrap();
    let address = listener.local_addr().unwrap();
    let configz = r#"{"a":1}"#.to_owned();
    let serving = tokio::spawn(serve_metrics(listener, Metrics::new(), configz, cancel.clone()));
    let (status, headers, body) = get(address, "/configz").await;
    assert!(status == 200 && headers.contains("application/json"), "{headers}");
    assert_eq!(body, r#"{"a":1}"#);
    assert_eq!(get(address, "/healthz").await.2, "ok");
    assert_eq!(get(address, "/proxyMode").await.2, "ebpf");
    let (status, _, body) = get(address, "/metrics").await;
    assert!(status == 200 && body.contains("lb_build_info"), "{body}");
    cancel.cancel();
    timeout(DEADLINE, serving).await.unwrap().unwrap();
}

#[tokio::test]
async fn an_address_that_is_taken_is_bound_once_it_is_free() {
    let cancel = CancellationToken::new();
    let taken = bind(Server::Health, "127.0.0.1:0".parse().unwrap()).await.unwrap();
    let address = taken.local_addr().unwrap();
    let error = bind(Server::Health, address).await.unwrap_err();
    assert!(error.to_string().contains("--healthz-bind-address"), "{error}");
    let waiting = {
        let cancel = cancel.clone();
        tokio::spawn(async move { bind_retrying(Server::Health, address, &cancel).await.is_some() })
    };
    drop(taken);
    assert!(timeout(DEADLINE, waiting).await.unwrap().unwrap());

    let taken = bind(Server::Health, "127.0.0.1:0".parse().unwrap()).await.unwrap();
    let address = taken.local_addr().unwrap();
    cancel.cancel();
    assert!(
        timeout(DEADLINE, bind_retrying(Server::Health, address, &cancel)).await.unwrap().is_none()
    );
}
