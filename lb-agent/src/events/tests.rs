use std::{collections::HashSet, time::Duration};

use axum::{Json, Router, extract::State, routing::post};
use k8s_openapi::api::{core::v1, discovery::v1::EndpointSlice, networking::v1::ServiceCIDR};
use kube::Config;
use lb_control::{
    desired::{Conflict, FrontendAddress},
    model::{
        Refusal, SharedNames,
        keys::{EXTERNAL_MODE_ANNOTATION, SERVICE_LABEL},
        node, service, slice,
    },
    options::Limits,
};
use serde_json::{Value, json};
use tokio::{net::TcpListener, time::timeout};

use super::*;

const DEADLINE: Duration = Duration::from_secs(10);

fn subject(name: &str) -> Subject {
    Subject {
        kind: ObjectKind::Service,
        name: ObjectName { namespace: "shop".to_owned(), name: name.to_owned() },
        uid: Some("u-1".to_owned()),
    }
}

#[tokio::test]
async fn a_refusal_becomes_one_event_on_the_object() {
    let (sent, mut received) = mpsc::channel::<Value>(8);
    let accept = async |State(sent): State<mpsc::Sender<Value>>, Json(event): Json<Value>| {
        sent.send(event.clone()).await.unwrap();
        Json(event)
    };
    let router = Router::new()
        .route("/apis/events.k8s.io/v1/namespaces/shop/events", post(accept))
        .with_state(sent);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let server = tokio::spawn(async move { axum::serve(listener, router).await });
    let client = Client::try_from(Config::new(url.parse().unwrap())).unwrap();

    let refusals = Refusals::published(client, "node-a");
    let refuse = |name: &str, note: &str| {
        refusals.refuse(subject(name), EventReason::ProtocolNotSupported, note.to_owned());
    };
    refuse("web", "port 80: SCTP");
    refuse("web", "port 80: SCTP");
    refuse("dns", "port 53: SCTP");
    let mut notes = Vec::new();
    for _ in 0..2 {
        let event = timeout(DEADLINE, received.recv()).await.unwrap().unwrap();
        assert_eq!(event["type"], "Warning");
        assert_eq!(event["reason"], "ProtocolNotSupported");
        assert_eq!(event["regarding"]["uid"], "u-1");
        assert_eq!(event["reportingInstance"], "node-a");
        notes.push(event["note"].as_str().unwrap().to_owned());
    }
    assert_eq!(notes, ["port 80: SCTP", "port 53: SCTP"]);
    server.abort();
}

#[test]
fn a_refusal_is_published_again_after_the_object_was_good() {
    let refusals = Refusals::logged();
    let published = || refusals.published_now().len();
    refusals.refuse(subject("web"), EventReason::MapFull, "raise --max-slots".to_owned());
    refusals.refuse(subject("web"), EventReason::InvalidObject, "no port".to_owned());
    assert_eq!(published(), 2);
    refusals.withdraw(subject("web"), EventReason::MapFull);
    assert_eq!(published(), 1);
    refusals.forget(ObjectKind::Service, &subject("web").name);
    assert_eq!(published(), 0);
}

#[test]
fn what_is_refused_is_counted_by_its_reason_until_it_is_resolved() {
    use EventReason::{AddressInUse, MapFull, TooLarge};
    let refusals = Refusals::logged();
    let counts = || -> Vec<_> {
        let counts = refusals.counts().into_iter();
        counts.filter(|(_, count)| *count > 0).collect()
    };
    for (name, reason) in
        [("web", AddressInUse), ("web", TooLarge), ("dns", AddressInUse), ("web", MapFull)]
    {
        refusals.refuse(subject(name), reason, "a note".to_owned());
        refusals.refuse(subject(name), reason, "another note".to_owned());
    }
    assert_eq!(counts(), [(AddressInUse, 2), (TooLarge, 1), (MapFull, 1)]);
    // That it does not fit is not what the object says.
    refusals.keep(ObjectKind::Service, &subject("web").name, &[TooLarge].into());
    assert_eq!(counts(), [(AddressInUse, 1), (TooLarge, 1), (MapFull, 1)]);
    refusals.keep(ObjectKind::Service, &subject("web").name, &BTreeSet::new());
    refusals.withdraw(subject("web"), MapFull);
    assert_eq!(counts(), [(AddressInUse, 1)]);
    refusals.forget(ObjectKind::Service, &subject("dns").name);
    assert_eq!(counts(), []);
    let metrics = crate::metrics::Metrics::new();
    metrics.set_refusals(&refusals);
    refusals.refuse(subject("web"), TooLarge, "a note".to_owned());
    let text = metrics.encode(crate::metrics::format::Format::Plain).unwrap();
    assert!(text.contains("lb_refusals{reason=\"TooLarge\"} 1\n"), "{text}");
    assert!(text.contains("lb_refusals{reason=\"MapFull\"} 0\n"), "{text}");
}

/// The Events that refusals would send.
fn queued() -> (Refusals, mpsc::Receiver<(Subject, Event)>) {
    let (queue, inbox) = mpsc::channel(QUEUE);
    (Refusals { state: Arc::default(), queue: Some(queue) }, inbox)
}

#[test]
fn only_the_reporter_of_an_object_publishes() {
    let (refusals, mut inbox) = queued();
    for (reporter, is_sent) in [(Reporter::OtherNode, false), (Reporter::ThisNode, true)] {
        let note = format!("{reporter:?}");
        refusals.refuse_by(|| reporter, subject("web"), EventReason::InvalidObject, note.clone());
        assert_eq!(inbox.try_recv().is_ok(), is_sent);
        // Each node has it in its report.
        assert_eq!(refusals.published_now()[0].note, note);
    }
}

#[tokio::test(start_paused = true)]
async fn an_object_that_changes_all_the_time_is_reported_now_and_then() {
    let (refusals, mut inbox) = queued();
    let mut sent = |name: &str, count: usize| {
        for number in 0..count {
            let note = format!("{number} {:?}", Instant::now());
            refusals.refuse(subject(name), EventReason::InvalidObject, note);
        }
        std::iter::from_fn(|| inbox.try_recv().ok()).count()
    };
    assert_eq!(sent("web", 1_000), 25);
    assert_eq!(sent("dns", 1), 1, "others are reported");
    tokio::time::advance(Duration::from_secs(301)).await;
    assert_eq!(sent("web", 1_000), 1);
    // What is refused now is known all the same.
    assert!(refusals.published_now().iter().any(|refused| refused.note.starts_with("999 ")));
}

#[test]
fn no_text_of_a_tenant_reaches_a_terminal_as_it_is() {
    let (refusals, mut inbox) = queued();
    let evil = "\u{1b}]0;owned\u{7}\r\nwell: lb-agent\u{202e}";
    let mut subject = subject("web");
    subject.name.name = evil.to_owned();
    refusals.refuse(subject, EventReason::InvalidObject, format!("name: {evil}"));
    let (_, event) = inbox.try_recv().unwrap();
    let told = &refusals.published_now()[0];
    for text in [event.note.as_deref().unwrap(), &told.note, &told.name] {
        assert!(text.contains(r"\u{1b}]0;owned\u{7}\r\nwell: lb-agent\u{202e}"), "{text}");
        assert!(!text.contains(|character: char| character.is_control()), "{text:?}");
    }
}

#[test]
fn a_long_note_is_cut_at_a_character() {
    assert_eq!(shortened("é".repeat(600)).len(), 1024);
    assert_eq!(shortened(format!("a{}", "é".repeat(600))).len(), 1023);
}

/// What the model refuses of an object.
fn refusals_of(object: &Object) -> Vec<Refusal> {
    match object {
        Object::Service(object) => service::parse(object, &Limits::default()).refusals,
        Object::EndpointSlice(object) => {
            slice::parse(object, "one", &mut SharedNames::default()).refusals
        }
        Object::Node(object) => node::parse(object).refusals,
        Object::ServiceCidr(object) => node::parse_service_cidr(object).refusals,
    }
}

/// A good object of a kind, but for the field at this path.
fn object(kind: ObjectKind, path: &str, field: &Value) -> Object {
    let mut value = match kind {
        ObjectKind::Service => json!({
            "metadata": { "name": "web", "namespace": "shop" },
            "spec": {
                "type": "LoadBalancer", "clusterIP": "10.0.0.1", "ports": [{ "port": 80 }],
                "externalTrafficPolicy": "Local", "sessionAffinity": "ClientIP",
            },
        }),
        ObjectKind::EndpointSlice => json!({
            "metadata": { "name": "web-1", "labels": { SERVICE_LABEL: "web" } },
            "addressType": "IPv4",
            "endpoints": [{ "addresses": ["10.1.0.1"] }],
            "ports": [{ "name": "", "port": 80 }],
        }),
        ObjectKind::Node | ObjectKind::ServiceCidr => json!({ "metadata": { "name": "one" } }),
    };
    *path.split('/').fold(&mut value, |place, key| &mut place[key]) = field.clone();
    let object = match kind {
        ObjectKind::Service => serde_json::from_value::<v1::Service>(value).map(Into::into),
        ObjectKind::EndpointSlice => serde_json::from_value::<EndpointSlice>(value).map(Into::into),
        ObjectKind::Node => serde_json::from_value::<v1::Node>(value).map(Into::into),
        ObjectKind::ServiceCidr => serde_json::from_value::<ServiceCIDR>(value).map(Into::into),
    };
    object.unwrap()
}

/// Fields of a Service, and why they are refused.
fn bad_services() -> Vec<(&'static str, Value, RefusalReason)> {
    use RefusalReason::*;
    let same_number = json!([{ "name": "a", "port": 80 }, { "name": "b", "port": 80 }]);
    let same_node_port = json!([
        { "name": "a", "port": 80, "nodePort": 30080 },
        { "name": "b", "port": 81, "nodePort": 30080 },
    ]);
    let timeout = json!({ "clientIP": { "timeoutSeconds": 0 } });
    vec![
        ("spec/ports", json!([{ "port": 80, "protocol": "SCTP" }]), UnsupportedProtocol),
        ("metadata/name", json!("a/b"), InvalidName),
        // The text of a value decides nothing.
        ("metadata/name", json!("belongs to the older Service"), InvalidName),
        ("spec/ports", json!([{ "port": 80, "name": "a/b" }]), InvalidName),
        ("spec/ports", json!([{ "port": 0 }]), InvalidPort),
        ("spec/ports", json!([{ "port": 80, "nodePort": 70_000 }]), InvalidPort),
        ("spec/ports", json!([{ "port": 80 }, { "port": 81 }]), Duplicate),
        ("spec/ports", same_number, Duplicate),
        ("spec/ports", same_node_port, Duplicate),
        ("spec/clusterIP", json!("127.0.0.1"), InvalidAddress),
        ("spec/clusterIPs", json!(["10.0.0.1", "10.0.0.2"]), Duplicate),
        ("spec/externalIPs", json!(["ff02::1"]), InvalidAddress),
        ("status/loadBalancer/ingress", json!([{ "ip": "nowhere" }]), InvalidAddress),
        ("spec/loadBalancerSourceRanges", json!(["all"]), InvalidPrefix),
        ("spec/sessionAffinity", json!("Cookie"), UnknownValue),
        ("spec/sessionAffinityConfig", timeout, OutOfRange),
        ("spec/internalTrafficPolicy", json!("Near"), UnknownValue),
        ("spec/healthCheckNodePort", json!(-1), InvalidPort),
        ("spec/externalIPs", json!(vec!["192.0.2.1"; 257]), TooLarge),
        ("metadata/annotations", json!({ EXTERNAL_MODE_ANNOTATION: "nat" }), UnknownValue),
    ]
}

/// Fields of other objects, and why they are refused.
fn bad_others() -> Vec<(ObjectKind, &'static str, Value, RefusalReason)> {
    use RefusalReason::*;
    let slice = ObjectKind::EndpointSlice;
    let node_address = json!([{ "type": "InternalIP", "address": "::" }]);
    vec![
        (slice, "addressType", json!("IPv5"), UnknownValue),
        (slice, "endpoints", json!([{ "addresses": [] }]), InvalidAddress),
        (slice, "endpoints", json!([{ "addresses": ["fd00::1"] }]), InvalidAddress),
        (slice, "endpoints", json!([{ "addresses": ["0.0.0.0"] }]), InvalidAddress),
        (slice, "ports", json!([{ "name": "a/b", "port": 80 }]), InvalidName),
        (slice, "ports", json!([{ "name": "", "port": 70_000 }]), InvalidPort),
        (ObjectKind::Node, "status/addresses", node_address, InvalidAddress),
        (ObjectKind::Node, "spec/podCIDR", json!("10.1.0.0"), InvalidPrefix),
        (ObjectKind::ServiceCidr, "spec/cidrs", json!(["10.0.0.0"]), InvalidPrefix),
    ]
}

#[test]
fn every_refusal_of_the_model_has_its_event_reason() {
    let services = bad_services().into_iter();
    let services = services.map(|(path, field, reason)| (ObjectKind::Service, path, field, reason));
    // The watch, not the model, finds what cannot be read; the other two depend on other objects,
    // so the controller makes them.
    let mut seen = HashSet::from([
        RefusalReason::Unreadable,
        RefusalReason::AddressInUse,
        RefusalReason::ForbiddenAddress,
    ]);
    assert_eq!(EventReason::from(RefusalReason::Unreadable).word(), "InvalidObject");
    for (kind, path, field, reason) in services.chain(bad_others()) {
        let refusals = refusals_of(&object(kind, path, &field));
        let [refusal] = &refusals[..] else { panic!("{path} {field}: {refusals:?}") };
        assert_eq!(refusal.reason, reason, "{path} {field}");
        let word = match reason {
            RefusalReason::UnsupportedProtocol => "ProtocolNotSupported",
            RefusalReason::TooLarge => "TooLarge",
            _ => "InvalidObject",
        };
        assert_eq!(EventReason::from(reason).word(), word, "{path} {field}");
        seen.insert(reason);
    }
    assert_eq!(seen, HashSet::from(RefusalReason::ALL), "reasons without a case");
}

#[test]
fn a_service_that_loses_an_address_gets_address_in_use() {
    let frontend = FrontendAddress { ip: [10, 0, 0, 1].into(), port: 80, protocol: 6 };
    let conflict =
        Conflict { service: "shop/new".into(), owner: "shop/old".into(), frontend, stronger: None };
    let refusal = conflict.refusal();
    assert_eq!(refusal.message, "10.0.0.1 port 80 belongs to the older Service shop/old");
    assert_eq!(EventReason::from(refusal.reason).word(), "AddressInUse");
}
