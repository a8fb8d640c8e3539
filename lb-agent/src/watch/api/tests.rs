use std::{
    collections::{HashMap, VecDeque},
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::{Query, State},
    http::{StatusCode, Uri},
    response::{IntoResponse, Response},
};
use kube::{Client, Config};
use serde_json::{Value, json};
use tokio::{
    net::TcpListener,
    sync::{Notify, mpsc},
    task::JoinHandle,
    time::timeout,
};

use super::*;

const DEADLINE: Duration = Duration::from_secs(20);

/// What the server does with the requests for one kind, in order; the last one repeats.
#[derive(Clone, Debug)]
enum Answer {
    /// Refuse with this status.
    Status(u16),
    /// A complete list.
    List(Vec<Value>),
    /// These watch events, then leave the connection open.
    Watch(Vec<Value>),
    /// These watch events, then break the connection when the test says so.
    WatchAndBreak(Vec<Value>),
}

/// An API server made of prepared answers.
#[derive(Clone, Default)]
struct Script {
    answers: Arc<Mutex<HashMap<String, VecDeque<Answer>>>>,
    /// The queries, as `<kind> <query>`.
    asked: Arc<Mutex<Vec<String>>>,
    breaks: Arc<Notify>,
}

struct Fake {
    script: Script,
    address: SocketAddr,
    server: JoinHandle<()>,
    watch: JoinHandle<()>,
    events: mpsc::Receiver<ObjectEvent>,
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.server.abort();
        self.watch.abort();
    }
}

impl Fake {
    /// Watches a server that answers for Services as given, and has no other object.
    async fn new(services: Vec<Answer>) -> Self {
        Self::with(services, Answer::Watch(vec![list_end("1")])).await
    }

    async fn with(services: Vec<Answer>, ranges: Answer) -> Self {
        let script = Script::default();
        {
            let mut answers = script.answers.lock().unwrap();
            answers.insert("services".to_owned(), services.into());
            for kind in ["endpointslices", "nodes"] {
                let empty = Answer::Watch(vec![list_end("1")]);
                answers.insert(kind.to_owned(), VecDeque::from([empty]));
            }
            answers.insert("servicecidrs".to_owned(), VecDeque::from([ranges]));
        }
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = Router::new().fallback(answer).with_state(script.clone());
        let server = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        let (events, watch) = start(address);
        Self { script, address, server, watch, events }
    }

    /// The next event about Services.
    async fn next(&mut self) -> String {
        loop {
            let event = timeout(DEADLINE, self.events.recv()).await;
            match event.expect("an event in time").expect("the watch goes on") {
                ObjectEvent::Replaced(ObjectKind::Service, objects) => {
                    let names: Vec<_> =
                        objects.iter().map(|object| object.name().to_string()).collect();
                    return format!("= {}", names.join(" "));
                }
                ObjectEvent::Applied(object) => return format!("+ {}", object.name()),
                ObjectEvent::Deleted(_, name) => return format!("- {name}"),
                ObjectEvent::Replaced(_, objects) => assert!(objects.is_empty()),
            }
        }
    }

    fn asked(&self, kind: &str) -> Vec<String> {
        let asked = self.script.asked.lock().unwrap();
        asked.iter().filter(|query| query.starts_with(kind)).cloned().collect()
    }
}

fn start(address: SocketAddr) -> (mpsc::Receiver<ObjectEvent>, JoinHandle<()>) {
    let url = format!("http://{address}");
    let config = Config::new(url.parse().unwrap());
    let connection = Connection::new(Client::try_from(config).unwrap());
    let (sender, events) = mpsc::channel(64);
    (events, tokio::spawn(watch_with(connection, sender, Duration::from_millis(50))))
}

async fn answer(
    State(script): State<Script>,
    uri: Uri,
    Query(query): Query<HashMap<String, String>>,
) -> Response {
    let kind = uri.path().rsplit('/').next().unwrap_or_default().to_owned();
    script.asked.lock().unwrap().push(format!("{kind} {}", uri.query().unwrap_or_default()));
    let answer = {
        let mut answers = script.answers.lock().unwrap();
        let queue = answers.get_mut(&kind).expect("a kind that is watched");
        match queue.len() {
            1 => queue[0].clone(),
            _ => queue.pop_front().expect("an answer"),
        }
    };
    let watching = query.get("watch").is_some_and(|value| value == "true");
    match answer {
        Answer::Status(code) => {
            let status = StatusCode::from_u16(code).unwrap();
            let body = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure",
                "message": "prepared", "reason": "Prepared", "code": code});
            (status, body.to_string()).into_response()
        }
        Answer::List(items) => {
            assert!(!watching, "a list was expected, not {uri}");
            let body = json!({"kind": "ServiceList", "apiVersion": "v1",
                "metadata": {"resourceVersion": "10"}, "items": items});
            body.to_string().into_response()
        }
        Answer::Watch(events) => {
            assert!(watching, "a watch was expected, not {uri}");
            let open = futures::stream::pending::<Result<Bytes, std::io::Error>>();
            Body::from_stream(lines(events).chain(open)).into_response()
        }
        Answer::WatchAndBreak(events) => {
            assert!(watching, "a watch was expected, not {uri}");
            let broken = futures::stream::once(async move {
                script.breaks.notified().await;
                Err(std::io::Error::other("prepared"))
            });
            Body::from_stream(lines(events).chain(broken)).into_response()
        }
    }
}

fn lines(events: Vec<Value>) -> impl Stream<Item = Result<Bytes, std::io::Error>> {
    futures::stream::iter(events.into_iter().map(|event| Ok(Bytes::from(format!("{event}\n")))))
}

fn service(name: &str, version: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Service",
        "metadata": {"name": name, "namespace": "default", "resourceVersion": version,
            "managedFields": [{"manager": "test"}]}})
}

fn event(change: &str, object: Value) -> Value {
    json!({"type": change, "object": object})
}

fn list_end(version: &str) -> Value {
    event(
        "BOOKMARK",
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {
            "resourceVersion": version, "annotations": {"k8s.io/initial-events-end": "true"}}}),
    )
}

fn gone() -> Value {
    failure(410, "too old")
}

fn failure(code: u16, message: &str) -> Value {
    event(
        "ERROR",
        json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code,
            "message": message, "reason": "Prepared"}),
    )
}

#[tokio::test]
async fn a_streaming_list_is_one_event_and_changes_follow() {
    let mut fake = Fake::new(vec![Answer::Watch(vec![
        event("ADDED", service("a", "1")),
        event("ADDED", service("b", "2")),
        list_end("3"),
        event("MODIFIED", service("a", "4")),
        event("DELETED", service("b", "5")),
    ])])
    .await;
    assert_eq!(fake.next().await, "= default/a default/b");
    assert_eq!(fake.next().await, "+ default/a");
    assert_eq!(fake.next().await, "- default/b");
    let asked = fake.asked("services");
    assert!(asked[0].contains("sendInitialEvents=true"), "{asked:?}");
    assert!(
        asked[0].contains("labelSelector=%21service.kubernetes.io%2Fservice-proxy-name"),
        "{asked:?}"
    );
    let slices = fake.asked("endpointslices");
    assert!(
        slices[0].contains("headless%2C%21service.kubernetes.io%2Fservice-proxy-name"),
        "{slices:?}"
    );
    assert!(!fake.asked("nodes")[0].contains("labelSelector"));
}

#[tokio::test]
async fn a_server_without_streaming_lists_is_asked_for_pages() {
    for refusal in [400, 422] {
        let mut fake = Fake::new(vec![
            Answer::Status(refusal),
            Answer::List(vec![service("a", "1")]),
            Answer::Watch(vec![event("ADDED", service("b", "11"))]),
        ])
        .await;
        assert_eq!(fake.next().await, "= default/a");
        assert_eq!(fake.next().await, "+ default/b");
        let asked = fake.asked("services");
        assert!(asked[2].contains("resourceVersion=10"), "{asked:?}");
    }
}

#[tokio::test]
async fn a_broken_watch_goes_on_where_it_was() {
    let mut fake = Fake::new(vec![
        Answer::WatchAndBreak(vec![
            event("ADDED", service("a", "1")),
            list_end("3"),
            event("MODIFIED", service("a", "7")),
        ]),
        Answer::Status(503),
        Answer::Watch(vec![event("ADDED", service("b", "8"))]),
    ])
    .await;
    assert_eq!(fake.next().await, "= default/a");
    assert_eq!(fake.next().await, "+ default/a");
    fake.script.breaks.notify_one();
    assert_eq!(fake.next().await, "+ default/b");
    let asked = fake.asked("services");
    let last = asked.last().unwrap();
    assert!(last.contains("resourceVersion=7") && !last.contains("sendInitialEvents"), "{asked:?}");
}

#[tokio::test]
async fn a_version_that_is_too_old_leads_to_one_new_list() {
    let begin = vec![event("ADDED", service("a", "1")), list_end("3")];
    let mut in_stream = begin.clone();
    in_stream.push(gone());
    let again = Answer::Watch(vec![event("ADDED", service("b", "20")), list_end("21")]);
    let ways = [
        vec![Answer::Watch(in_stream), again.clone()],
        // A server may say so in answer to the request itself.
        vec![Answer::WatchAndBreak(begin), Answer::Status(410), again],
    ];
    for answers in ways {
        let mut fake = Fake::new(answers).await;
        assert_eq!(fake.next().await, "= default/a");
        fake.script.breaks.notify_one();
        assert_eq!(fake.next().await, "= default/b");
        // The new list is no older than what was seen.
        let asked = fake.asked("services");
        let first = asked.first().map(String::as_str).unwrap_or_default();
        assert!(first.contains("resourceVersion=0&") || first.ends_with("resourceVersion=0"));
        let again = asked.last().map(String::as_str).unwrap_or_default();
        assert!(again.contains("resourceVersion=1"), "{asked:?}");
        assert!(again.contains("sendInitialEvents=true"), "{asked:?}");
    }
}

#[tokio::test]
async fn a_list_that_breaks_off_sends_no_event() {
    let mut fake = Fake::new(vec![
        Answer::WatchAndBreak(vec![event("ADDED", service("a", "1"))]),
        Answer::Watch(vec![
            event("ADDED", service("a", "1")),
            event("ADDED", service("b", "2")),
            list_end("3"),
        ]),
    ])
    .await;
    fake.script.breaks.notify_one();
    assert_eq!(fake.next().await, "= default/a default/b");
}

#[tokio::test]
async fn a_server_that_refuses_in_the_stream_is_asked_for_pages() {
    let mut fake = Fake::new(vec![
        Answer::WatchAndBreak(vec![failure(500, "RequestWatchProgress is disabled")]),
        Answer::List(vec![service("a", "1")]),
        Answer::Watch(vec![event("ADDED", service("b", "11"))]),
    ])
    .await;
    assert_eq!(fake.next().await, "= default/a");
    assert_eq!(fake.next().await, "+ default/b");
}

/// The lists of ServiceCIDRs that are told while the server is asked `times` times.
async fn service_cidrs_sent(fake: &mut Fake, times: usize) -> Vec<usize> {
    let mut told = Vec::new();
    let deadline = Instant::now() + DEADLINE;
    while fake.asked("servicecidrs").len() < times {
        assert!(Instant::now() < deadline, "asked {:?}", fake.asked("servicecidrs"));
        let event = timeout(Duration::from_millis(20), fake.events.recv()).await;
        if let Ok(Some(ObjectEvent::Replaced(ObjectKind::ServiceCidr, objects))) = event {
            told.push(objects.len());
        }
    }
    told
}

#[tokio::test]
async fn without_service_cidrs_there_are_none_and_the_server_is_asked_again() {
    for refusal in [404, 403] {
        let none = Answer::Watch(vec![list_end("1")]);
        let mut fake = Fake::with(vec![none], Answer::Status(refusal)).await;
        assert_eq!(service_cidrs_sent(&mut fake, 3).await, [0], "{refusal}");
    }
}

#[tokio::test]
async fn service_cidrs_that_may_not_be_read_any_more_stay() {
    let range = json!({"apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR",
        "metadata": {"name": "kubernetes", "resourceVersion": "1"},
        "spec": {"cidrs": ["10.96.0.0/16"]}});
    let listed = vec![event("ADDED", range), list_end("2"), gone()];
    for refusal in [404, 403] {
        let none = vec![Answer::Watch(vec![list_end("1")])];
        let mut fake = Fake::with(none, Answer::WatchAndBreak(listed.clone())).await;
        {
            let mut answers = fake.script.answers.lock().unwrap();
            answers.get_mut("servicecidrs").unwrap().push_back(Answer::Status(refusal));
        }
        assert_eq!(service_cidrs_sent(&mut fake, 4).await, [1], "{refusal}");
    }
}

#[tokio::test]
async fn a_server_that_is_down_is_tried_until_it_is_there() {
    // The address of a server that has just gone.
    let address = {
        let fake = Fake::new(vec![Answer::Watch(vec![list_end("1")])]).await;
        fake.address
    };
    let (mut events, watch) = start(address);
    assert!(timeout(Duration::from_millis(300), events.recv()).await.is_err());
    let script = Script::default();
    for kind in ["services", "endpointslices", "nodes", "servicecidrs"] {
        let answer = VecDeque::from([Answer::Watch(vec![list_end("1")])]);
        script.answers.lock().unwrap().insert(kind.to_owned(), answer);
    }
    let deadline = Instant::now() + DEADLINE;
    let listener = loop {
        match TcpListener::bind(address).await {
            Ok(listener) => break listener,
            Err(error) if Instant::now() > deadline => panic!("{error}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    };
    let router = Router::new().fallback(answer).with_state(script);
    let server = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    for _ in ObjectKind::ALL {
        let event = timeout(DEADLINE, events.recv()).await.unwrap().unwrap();
        assert!(matches!(event, ObjectEvent::Replaced(_, objects) if objects.is_empty()));
    }
    drop(events);
    timeout(DEADLINE, watch).await.unwrap().unwrap();
    server.abort();
}

#[test]
fn objects_lose_the_fields_that_are_never_read() {
    let parsed: Service = serde_json::from_value(service("a", "1")).unwrap();
    let ObjectEvent::Applied(object) = changed(ObjectKind::Service, parsed.into()) else {
        panic!("a Service is passed on")
    };
    assert_eq!(object.metadata().managed_fields, None);
    assert_eq!(object.metadata().resource_version, None);
}

#[test]
fn pauses_double_up_to_a_limit_and_vary() {
    let mut pause = Pause::default();
    let first = pause.next(Pause::LONGEST);
    assert!((Pause::FIRST / 2..=Pause::FIRST * 3 / 2).contains(&first), "{first:?}");
    let last = (0..20).map(|_| pause.next(Pause::LONGEST)).last().unwrap();
    assert!((Pause::LONGEST / 2..=Pause::LONGEST * 3 / 2).contains(&last), "{last:?}");
    let several: std::collections::HashSet<_> = (0..8).map(|_| jittered(Pause::LONGEST)).collect();
    assert!(several.len() > 1);
    assert!(pause.next(Pause::OUTDATED) <= Pause::OUTDATED * 3 / 2);
    // What was short has not grown to what is long.
    assert!(pause.next(Pause::LONGEST) <= Pause::OUTDATED * 3);
    pause.reset();
    assert!(pause.next(Pause::LONGEST) <= Pause::FIRST * 3 / 2);
}
