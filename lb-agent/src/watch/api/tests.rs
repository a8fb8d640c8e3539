//! The watch against an API server made of prepared answers, on a paused clock: minutes of pauses
//! take no time, and nothing depends on the machine.

use std::{
    collections::{HashMap, VecDeque},
    convert::Infallible,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    body::{Body, Bytes},
    http::{Request, Response, StatusCode, Uri, header::RETRY_AFTER},
};
use futures::{Stream, StreamExt};
use kube::Client;
use lb_control::model::event::ObjectName;
use serde_json::{Value, json};
use tokio::{
    sync::{Notify, mpsc, watch as channel},
    task::JoinHandle,
    time::{Instant, timeout},
};
use tower::service_fn;

use super::*;

/// Longer than any pause between two attempts.
const DEADLINE: Duration = Duration::from_secs(60);

/// What the server does with the requests for one kind, in order; the last one repeats.
#[derive(Clone, Debug)]
enum Answer {
    /// Refuse with this status.
    Status(u16),
    /// Refuse with this status, and ask to be left alone for so many seconds.
    Busy(u16, u64),
    /// A complete list of this version.
    List(&'static str, Vec<Value>),
    /// These watch events, then leave the connection open.
    Watch(Vec<Value>),
    /// These watch events, then end the answer at once.
    WatchAndEnd(Vec<Value>),
    /// These watch events, then break the connection when the test says so.
    WatchAndBreak(Vec<Value>),
    /// Nothing at all.
    Silence,
    /// The Nodes one and two, as far as the field selector says.
    Nodes,
}

/// An API server made of prepared answers.
#[derive(Clone)]
struct Script {
    answers: Arc<Mutex<HashMap<String, VecDeque<Answer>>>>,
    /// When each request came, and its kind and query.
    asked: Arc<Mutex<Vec<(Duration, String)>>>,
    breaks: Arc<Notify>,
    start: Instant,
}

struct Fake {
    script: Script,
    connection: Connection,
    nodes: channel::Sender<Option<Nodes>>,
    watch: JoinHandle<()>,
    events: mpsc::Receiver<ObjectEvent>,
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.watch.abort();
    }
}

impl Fake {
    /// Watches a server that answers for Services as given, and has no other object.
    fn new(services: Vec<Answer>) -> Self {
        Self::with([("services", services)])
    }

    fn with<const N: usize>(given: [(&str, Vec<Answer>); N]) -> Self {
        let mut answers = HashMap::new();
        for kind in ["services", "endpointslices", "nodes", "servicecidrs"] {
            answers.insert(kind.to_owned(), vec![Answer::Watch(vec![list_end("1")])].into());
        }
        answers.extend(given.map(|(kind, answers)| (kind.to_owned(), answers.into())));
        let script = Script {
            answers: Arc::new(Mutex::new(answers)),
            asked: Arc::default(),
            breaks: Arc::default(),
            start: Instant::now(),
        };
        let server = script.clone();
        let service = service_fn(move |request: Request<kube::client::Body>| {
            let server = server.clone();
            async move { Ok::<_, Infallible>(server.answer(request.uri())) }
        });
        let connection = Connection::new(Client::new(service, "default"));
        let (sender, events) = mpsc::channel(64);
        let (nodes, needed) = channel::channel(Some(Nodes::Own));
        let scope = NodeScope::new("one", needed);
        let watch = tokio::spawn(watch(connection.clone(), scope, sender));
        Self { script, connection, nodes, watch, events }
    }

    /// The next event about Services.
    async fn next(&mut self) -> String {
        self.next_of(ObjectKind::Service).await
    }

    /// The next event about a kind.
    async fn next_of(&mut self, kind: ObjectKind) -> String {
        loop {
            let event = timeout(DEADLINE, self.events.recv()).await;
            let event = event.expect("an event in time").expect("the watch goes on");
            if event.kind() == kind {
                return shown(&event);
            }
        }
    }

    /// Nothing is sent about Services for so long.
    async fn expect_nothing(&mut self, time: Duration) {
        let end = Instant::now() + time;
        while let Ok(event) = tokio::time::timeout_at(end, self.events.recv()).await {
            let event = event.expect("the watch goes on");
            assert_ne!(event.kind(), ObjectKind::Service, "{}", shown(&event));
        }
    }

    /// The queries for a kind.
    fn asked(&self, kind: &str) -> Vec<String> {
        let asked = self.script.asked.lock().unwrap();
        let asked = asked.iter().map(|(_, query)| query);
        asked.filter(|query| query.starts_with(kind)).cloned().collect()
    }

    /// When the requests for Services came, in milliseconds.
    fn times(&self) -> Vec<u128> {
        let asked = self.script.asked.lock().unwrap();
        let asked = asked.iter().filter(|(_, query)| query.starts_with("services"));
        asked.map(|(at, _)| at.as_millis()).collect()
    }

    fn figures(&self, kind: ObjectKind) -> Figures {
        let figures = self.connection.liveness().figures(Instant::now().into_std());
        figures.into_iter().find(|figures| figures.kind == kind).expect("figures")
    }
}

fn shown(event: &ObjectEvent) -> String {
    let names = |objects: &[Object]| {
        objects.iter().map(|object| object.name().to_string()).collect::<Vec<_>>().join(" ")
    };
    match event {
        ObjectEvent::Replaced(_, objects) => format!("= {}", names(objects)),
        ObjectEvent::ReplacedExcept(_, objects, unreadable) => {
            let unreadable: Vec<_> = unreadable
                .iter()
                .map(|object| format!("{} {}", object.name, object.field))
                .collect();
            format!("= {} but {}", names(objects), unreadable.join(" "))
        }
        ObjectEvent::Applied(object) => format!("+ {}", object.name()),
        ObjectEvent::Unreadable(_, object) => format!("? {} {}", object.name, object.field),
        ObjectEvent::Deleted(_, name) => format!("- {name}"),
    }
}

impl Script {
    fn answer(&self, uri: &Uri) -> Response<Body> {
        let kind = uri.path().rsplit('/').next().unwrap_or_default().to_owned();
        let query = uri.query().unwrap_or_default();
        self.asked.lock().unwrap().push((self.start.elapsed(), format!("{kind} {query}")));
        let answer = {
            let mut answers = self.answers.lock().unwrap();
            let queue = answers.get_mut(&kind).expect("a kind that is watched");
            match queue.len() {
                1 => queue[0].clone(),
                _ => queue.pop_front().expect("an answer"),
            }
        };
        let is_watch = query.contains("watch=true");
        let stream = |events: Vec<Value>, end| {
            assert!(is_watch, "a watch was expected, not {uri}");
            Response::new(Body::from_stream(lines(events).chain(end)))
        };
        match answer {
            Answer::Status(code) => refusal(code),
            Answer::Busy(code, seconds) => {
                let mut response = refusal(code);
                response.headers_mut().insert(RETRY_AFTER, seconds.into());
                response
            }
            Answer::List(version, items) => {
                assert!(!is_watch, "a list was expected, not {uri}");
                let body = json!({"kind": "ServiceList", "apiVersion": "v1",
                    "metadata": {"resourceVersion": version}, "items": items});
                Response::new(Body::from(body.to_string()))
            }
            Answer::Watch(events) => stream(events, futures::stream::pending().boxed()),
            Answer::WatchAndEnd(events) => stream(events, futures::stream::empty().boxed()),
            Answer::WatchAndBreak(events) => {
                let breaks = Arc::clone(&self.breaks);
                let broken = futures::stream::once(async move {
                    breaks.notified().await;
                    Err(std::io::Error::other("prepared"))
                });
                stream(events, broken.boxed())
            }
            Answer::Nodes => {
                let is_own = |name: &&str| *name == "one" || !query.contains("fieldSelector");
                let nodes = ["one", "two"].into_iter().filter(is_own);
                let listed = nodes.map(|name| event("ADDED", node(name, "1")));
                let events = listed.chain([list_end("2")]).collect();
                let is_list = query.contains("sendInitialEvents");
                let events = if is_list { events } else { Vec::new() };
                stream(events, futures::stream::pending().boxed())
            }
            Answer::Silence => Response::new(Body::from_stream(futures::stream::pending::<
                Result<Bytes, std::io::Error>,
            >())),
        }
    }
}

fn refusal(code: u16) -> Response<Body> {
    let body = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure",
        "message": "prepared", "reason": "Prepared", "code": code});
    let mut response = Response::new(Body::from(body.to_string()));
    *response.status_mut() = StatusCode::from_u16(code).unwrap();
    response
}

fn lines(events: Vec<Value>) -> impl Stream<Item = Result<Bytes, std::io::Error>> + Send {
    futures::stream::iter(events.into_iter().map(|event| Ok(Bytes::from(format!("{event}\n")))))
}

fn service(name: &str, version: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Service",
        "metadata": {"name": name, "namespace": "default", "resourceVersion": version,
            "managedFields": [{"manager": "test"}]}})
}

/// A Service with a port that is no number.
fn broken(name: &str, version: &str) -> Value {
    let mut service = service(name, version);
    service["spec"] = json!({"ports": [{"port": "eighty"}]});
    service
}

fn node(name: &str, version: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Node",
        "metadata": {"name": name, "resourceVersion": version}})
}

fn event(change: &str, object: Value) -> Value {
    json!({"type": change, "object": object})
}

fn added(name: &str, version: &str) -> Value {
    event("ADDED", service(name, version))
}

fn bookmark(version: &str) -> Value {
    event(
        "BOOKMARK",
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"resourceVersion": version}}),
    )
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

/// The value of a parameter of a query.
fn parameter<'a>(query: &'a str, name: &str) -> Option<&'a str> {
    let query = query.split_once(' ').map_or(query, |(_, query)| query);
    query.split('&').find_map(|part| part.strip_prefix(name)?.strip_prefix('='))
}

#[tokio::test(start_paused = true)]
async fn a_streaming_list_is_one_event_and_changes_follow() {
    let mut fake = Fake::new(vec![Answer::Watch(vec![
        added("a", "1"),
        added("b", "2"),
        list_end("3"),
        event("MODIFIED", service("a", "4")),
        event("DELETED", service("b", "5")),
    ])]);
    assert_eq!(fake.next().await, "= default/a default/b");
    assert_eq!(fake.next().await, "+ default/a");
    assert_eq!(fake.next().await, "- default/b");
    let asked = fake.asked("services");
    assert_eq!(asked.len(), 1);
    let query = |name| parameter(&asked[0], name);
    assert_eq!(query("sendInitialEvents"), Some("true"));
    assert_eq!(query("allowWatchBookmarks"), Some("true"));
    assert_eq!(query("resourceVersionMatch"), Some("NotOlderThan"));
    assert_eq!(query("resourceVersion"), Some("0"));
    assert_eq!(query("labelSelector"), Some("%21service.kubernetes.io%2Fservice-proxy-name"));
    let seconds: u32 = query("timeoutSeconds").unwrap().parse().unwrap();
    assert!((200..=700).contains(&seconds), "{seconds}");
    let slices = fake.asked("endpointslices");
    assert!(
        slices[0].contains("headless%2C%21service.kubernetes.io%2Fservice-proxy-name"),
        "{slices:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn changes_cost_no_request() {
    let change = |version: u32| event("MODIFIED", service("a", &version.to_string()));
    let first = [added("a", "1"), list_end("1")].into_iter();
    let mut fake = Fake::new(vec![Answer::Watch(first.chain((2..102).map(change)).collect())]);
    assert_eq!(fake.next().await, "= default/a");
    for _ in 0..100 {
        assert_eq!(fake.next().await, "+ default/a");
    }
    for kind in ["services", "endpointslices", "nodes", "servicecidrs"] {
        assert_eq!(fake.asked(kind).len(), 1, "{kind}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_object_that_changes_within_a_streaming_list_is_listed_as_it_is_at_its_end() {
    let mut fake = Fake::new(vec![Answer::Watch(vec![
        added("a", "1"),
        added("b", "2"),
        added("a", "1"),
        event("MODIFIED", service("a", "4")),
        event("DELETED", service("b", "5")),
        bookmark("6"),
        list_end("7"),
        added("a", "8"),
        added("a", "8"),
    ])]);
    assert_eq!(fake.next().await, "= default/a");
    assert_eq!(fake.next().await, "+ default/a");
    assert_eq!(fake.next().await, "+ default/a");
    assert_eq!(fake.asked("services").len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_server_without_streaming_lists_is_asked_for_its_cache() {
    for refusal in [400, 422] {
        let mut fake = Fake::new(vec![
            Answer::Status(refusal),
            Answer::List("10", vec![service("a", "1")]),
            Answer::Watch(vec![added("b", "11"), gone()]),
            Answer::List("12", vec![service("c", "12")]),
            Answer::Watch(vec![]),
        ]);
        assert_eq!(fake.next().await, "= default/a");
        assert_eq!(fake.next().await, "+ default/b");
        assert_eq!(fake.next().await, "= default/c");
        let asked = fake.asked("services");
        assert_eq!(asked.len(), 5, "{asked:?}");
        let versions: Vec<_> =
            asked.iter().map(|query| parameter(query, "resourceVersion")).collect();
        assert_eq!(versions, ["0", "0", "10", "11", "12"].map(Some));
        for list in [&asked[1], &asked[3]] {
            assert_eq!(parameter(list, "limit"), None, "pages are read from the store");
            assert_eq!(parameter(list, "resourceVersionMatch"), Some("NotOlderThan"));
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_that_refuses_in_the_stream_is_asked_for_its_cache() {
    let mut fake = Fake::new(vec![
        Answer::Watch(vec![failure(500, "RequestWatchProgress is disabled")]),
        Answer::List("10", vec![service("a", "1")]),
        Answer::Watch(vec![added("b", "11")]),
    ]);
    assert_eq!(fake.next().await, "= default/a");
    assert_eq!(fake.next().await, "+ default/b");
}

#[tokio::test(start_paused = true)]
async fn a_broken_watch_goes_on_where_it_was() {
    let mut fake = Fake::new(vec![
        Answer::WatchAndBreak(vec![
            added("a", "1"),
            list_end("3"),
            event("MODIFIED", service("a", "7")),
        ]),
        Answer::Status(503),
        Answer::Watch(vec![added("b", "8")]),
    ]);
    assert_eq!(fake.next().await, "= default/a");
    assert_eq!(fake.next().await, "+ default/a");
    fake.script.breaks.notify_one();
    assert_eq!(fake.next().await, "+ default/b");
    let asked = fake.asked("services");
    assert_eq!(asked.len(), 3);
    let last = asked.last().unwrap();
    assert_eq!(parameter(last, "resourceVersion"), Some("7"));
    assert_eq!(parameter(last, "sendInitialEvents"), None);
    assert_eq!(fake.figures(ObjectKind::Service).lists, 1);
}

#[tokio::test(start_paused = true)]
async fn a_bookmark_moves_the_version_on() {
    let mut fake = Fake::new(vec![
        Answer::WatchAndEnd(vec![list_end("3"), bookmark("40")]),
        Answer::Watch(vec![added("a", "41")]),
    ]);
    assert_eq!(fake.next().await, "= ");
    assert_eq!(fake.next().await, "+ default/a");
    assert_eq!(parameter(&fake.asked("services")[1], "resourceVersion"), Some("40"));
}

#[tokio::test(start_paused = true)]
async fn a_version_that_is_too_old_leads_to_one_new_list() {
    let begin = vec![added("a", "1"), list_end("3"), bookmark("9")];
    let mut in_stream = begin.clone();
    in_stream.push(gone());
    let again = Answer::Watch(vec![added("b", "20"), list_end("21")]);
    let ways = [
        vec![Answer::Watch(in_stream), again.clone()],
        // A server may say so in answer to the request itself.
        vec![Answer::WatchAndEnd(begin), Answer::Status(410), again],
    ];
    for answers in ways {
        let expected = answers.len();
        let mut fake = Fake::new(answers);
        assert_eq!(fake.next().await, "= default/a");
        assert_eq!(fake.next().await, "= default/b");
        let asked = fake.asked("services");
        assert_eq!(asked.len(), expected, "{asked:?}");
        let again = asked.last().unwrap();
        assert_eq!(parameter(again, "resourceVersion"), Some("9"), "no older than what was seen");
        assert_eq!(parameter(again, "sendInitialEvents"), Some("true"));
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_that_does_not_know_the_version_is_asked_for_the_newest_state() {
    let too_large = "Timeout: Too large resource version: 3, current: 1";
    let mut fake = Fake::new(vec![
        Answer::Watch(vec![list_end("3"), failure(504, too_large)]),
        Answer::Watch(vec![added("a", "1"), list_end("2")]),
    ]);
    assert_eq!(fake.next().await, "= ");
    assert_eq!(fake.next().await, "= default/a", "the store was restored");
    assert_eq!(parameter(&fake.asked("services")[1], "resourceVersion"), Some(""));
}

#[tokio::test(start_paused = true)]
async fn a_list_that_goes_back_in_time_is_not_taken() {
    let old = Answer::Watch(vec![added("gone", "5"), list_end("19")]);
    let mut fake = Fake::new(vec![
        Answer::Watch(vec![list_end("20"), gone()]),
        old.clone(),
        old,
        Answer::Watch(vec![added("a", "21"), list_end("21")]),
    ]);
    assert_eq!(fake.next().await, "= ");
    assert_eq!(fake.next().await, "= default/a");
    let asked = fake.asked("services");
    assert_eq!(asked.len(), 4);
    for list in &asked[1..] {
        assert_eq!(parameter(list, "resourceVersion"), Some("20"));
    }
    let Figures { lists, failures, .. } = fake.figures(ObjectKind::Service);
    assert_eq!((lists, failures), (2, 3));
}

#[tokio::test(start_paused = true)]
async fn a_list_that_is_cut_short_again_and_again_is_repeated_with_pauses() {
    let mut fake = Fake::new(vec![Answer::WatchAndEnd(vec![added("a", "1")])]);
    fake.expect_nothing(Duration::from_secs(60)).await;
    let times = fake.times();
    assert!((8..=16).contains(&times.len()), "{times:?}");
    let first = times[1] - times[0];
    assert!((50..=150).contains(&first), "{times:?}");
    let broken = fake.connection.liveness().broken(Instant::now().into_std());
    let [(ObjectKind::Service, since, error)] = &broken[..] else { panic!("{broken:?}") };
    assert!(since.as_secs() >= 59, "a new try is no recovery: {since:?}");
    assert_eq!(error, "the API server ended the list before it was complete");
}

#[tokio::test(start_paused = true)]
async fn a_list_that_was_cut_short_sends_no_event() {
    let mut fake = Fake::new(vec![
        Answer::WatchAndBreak(vec![added("a", "1")]),
        Answer::Watch(vec![added("a", "1"), added("b", "2"), list_end("3")]),
    ]);
    fake.script.breaks.notify_one();
    assert_eq!(fake.next().await, "= default/a default/b");
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_is_closed_at_once_again_and_again_is_repeated_with_pauses() {
    let mut fake =
        Fake::new(vec![Answer::WatchAndEnd(vec![list_end("1")]), Answer::WatchAndEnd(vec![])]);
    assert_eq!(fake.next().await, "= ");
    fake.expect_nothing(Duration::from_secs(60)).await;
    let times = fake.times();
    assert!((8..=16).contains(&times.len()), "{times:?}");
}

#[tokio::test(start_paused = true)]
async fn a_server_that_is_silent_within_a_list_is_asked_again() {
    let mut fake =
        Fake::new(vec![Answer::Silence, Answer::Watch(vec![added("a", "1"), list_end("1")])]);
    fake.expect_nothing(Duration::from_secs(59)).await;
    assert_eq!(fake.next().await, "= default/a");
}

#[tokio::test(start_paused = true)]
async fn a_watch_may_be_silent_until_its_time_is_over() {
    let mut fake = Fake::new(vec![Answer::Watch(vec![list_end("1")]), Answer::Watch(vec![])]);
    assert_eq!(fake.next().await, "= ");
    fake.expect_nothing(Duration::from_secs(220)).await;
    assert_eq!(fake.asked("services").len(), 1);
    assert_eq!(fake.figures(ObjectKind::Service).age, Some(Duration::from_secs(220)));
    fake.expect_nothing(Duration::from_secs(600)).await;
    assert!((2..=4).contains(&fake.asked("services").len()), "{:?}", fake.times());
}

#[tokio::test(start_paused = true)]
async fn a_server_that_says_when_to_come_back_is_left_alone_until_then() {
    for status in [429, 503] {
        let mut fake = Fake::new(vec![
            Answer::Busy(status, 20),
            Answer::Busy(status, 20),
            Answer::Watch(vec![added("a", "1"), list_end("1")]),
        ]);
        assert_eq!(fake.next().await, "= default/a");
        let times = fake.times();
        assert_eq!(times.len(), 3);
        for pair in times.windows(2) {
            assert!((20_050..=20_400).contains(&(pair[1] - pair[0])), "{status}: {times:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_that_cannot_serve_for_a_minute_is_asked_a_few_times() {
    let mut fake = Fake::new(vec![Answer::Status(503)]);
    fake.expect_nothing(Duration::from_secs(60)).await;
    let refused = fake.times().len();
    assert!((8..=16).contains(&refused), "{:?}", fake.times());
    assert_eq!(fake.figures(ObjectKind::Service).failures, refused as u64);
    let works = Answer::Watch(vec![added("a", "1"), list_end("1")]);
    fake.script.answers.lock().unwrap().insert("services".to_owned(), vec![works].into());
    let back = Instant::now();
    assert_eq!(fake.next().await, "= default/a");
    assert!(back.elapsed() <= Duration::from_secs(23), "{:?}", back.elapsed());
}

#[tokio::test(start_paused = true)]
async fn an_object_that_cannot_be_read_in_a_list_costs_no_other() {
    let lists = [
        vec![Answer::Watch(vec![
            added("a", "1"),
            event("ADDED", broken("bad", "2")),
            added("b", "3"),
            list_end("4"),
        ])],
        vec![
            Answer::Status(400),
            Answer::List("4", vec![service("a", "1"), broken("bad", "2"), service("b", "3")]),
            Answer::Watch(vec![]),
        ],
    ];
    for answers in lists {
        let mut fake = Fake::new(answers);
        assert_eq!(fake.next().await, "= default/a default/b but default/bad spec.ports[0].port");
        fake.expect_nothing(Duration::from_secs(60)).await;
        let Figures { unreadable, failures, .. } = fake.figures(ObjectKind::Service);
        assert_eq!((unreadable, failures), (1, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn an_object_that_cannot_be_read_in_a_watch_costs_no_other() {
    let mut fake = Fake::new(vec![
        Answer::WatchAndEnd(vec![
            list_end("1"),
            event("MODIFIED", broken("bad", "2")),
            added("a", "3"),
            event("DELETED", broken("bad", "4")),
        ]),
        Answer::Watch(vec![]),
    ]);
    assert_eq!(fake.next().await, "= ");
    assert_eq!(fake.next().await, "? default/bad spec.ports[0].port");
    assert_eq!(fake.next().await, "+ default/a");
    assert_eq!(fake.next().await, "- default/bad");
    fake.expect_nothing(Duration::from_secs(1)).await;
    let asked = fake.asked("services");
    assert_eq!(asked.len(), 2, "{asked:?}");
    assert_eq!(parameter(&asked[1], "resourceVersion"), Some("4"));
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_is_no_json_leads_to_a_new_list() {
    let mut fake = Fake::new(vec![
        Answer::Watch(vec![list_end("1"), json!("no event")]),
        Answer::Watch(vec![added("a", "2"), list_end("2")]),
    ]);
    assert_eq!(fake.next().await, "= ");
    assert_eq!(fake.next().await, "= default/a");
}

#[tokio::test(start_paused = true)]
async fn only_the_own_node_is_watched_until_all_are_needed() {
    let mut fake = Fake::with([("nodes", vec![Answer::Nodes])]);
    let selectors = |fake: &Fake| -> Vec<_> {
        let asked = fake.asked("nodes");
        asked.iter().map(|query| parameter(query, "fieldSelector").map(str::to_owned)).collect()
    };
    let of_own = Some("metadata.name%3Done".to_owned());
    assert_eq!(fake.next_of(ObjectKind::Node).await, "= one");
    assert_eq!(selectors(&fake), std::slice::from_ref(&of_own));
    fake.nodes.send(Some(Nodes::All)).unwrap();
    assert_eq!(fake.next_of(ObjectKind::Node).await, "= one two");
    assert_eq!(selectors(&fake), [of_own.clone(), None]);
    assert_eq!(parameter(&fake.asked("nodes")[1], "resourceVersion"), Some("2"));

    // A Service that comes and goes does not make the agent list all Nodes again.
    for _ in 0..10 {
        fake.nodes.send(Some(Nodes::Own)).unwrap();
        tokio::time::sleep(Duration::from_secs(1)).await;
        fake.nodes.send(Some(Nodes::All)).unwrap();
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    fake.nodes.send(Some(Nodes::Own)).unwrap();
    fake.expect_nothing(Duration::from_secs(170)).await;
    assert_eq!(selectors(&fake).last(), Some(&None));
    assert_eq!(fake.figures(ObjectKind::Node).lists, 2);
    fake.expect_nothing(Duration::from_secs(140)).await;
    assert_eq!(selectors(&fake).last(), Some(&of_own));
    assert_eq!(fake.figures(ObjectKind::Node).lists, 3);
}

#[tokio::test(start_paused = true)]
async fn no_node_is_watched_before_it_is_known_which() {
    let mut fake = Fake::new(vec![Answer::Watch(vec![list_end("1")])]);
    assert_eq!(fake.next_of(ObjectKind::Node).await, "= ");
    drop(fake);
    let (nodes, needed) = channel::channel(None);
    let mut scope = NodeScope::new("one", needed);
    assert!(timeout(Duration::from_secs(900), scope.changed()).await.is_err());
    nodes.send(Some(Nodes::All)).unwrap();
    assert_eq!(scope.changed().await, None);
}

/// The lists of ServiceCIDRs that are sent while the server is asked `times` times.
async fn service_cidrs_sent(fake: &mut Fake, times: usize) -> Vec<usize> {
    let mut sent = Vec::new();
    let deadline = Instant::now() + Duration::from_secs(3600);
    while fake.asked("servicecidrs").len() < times {
        assert!(Instant::now() < deadline, "asked {:?}", fake.asked("servicecidrs"));
        let event = timeout(Duration::from_millis(20), fake.events.recv()).await;
        if let Ok(Some(ObjectEvent::Replaced(ObjectKind::ServiceCidr, objects))) = event {
            sent.push(objects.len());
        }
    }
    sent
}

#[tokio::test(start_paused = true)]
async fn without_service_cidrs_there_are_none_and_the_server_is_asked_again() {
    for refusal in [404, 403] {
        let mut fake = Fake::with([("servicecidrs", vec![Answer::Status(refusal)])]);
        assert_eq!(service_cidrs_sent(&mut fake, 3).await, [0], "{refusal}");
        assert_eq!(fake.figures(ObjectKind::ServiceCidr).age, None);
    }
}

#[tokio::test(start_paused = true)]
async fn service_cidrs_that_may_not_be_read_any_more_stay() {
    let range = json!({"apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR",
        "metadata": {"name": "kubernetes", "resourceVersion": "1"},
        "spec": {"cidrs": ["10.96.0.0/16"]}});
    let listed = vec![event("ADDED", range), list_end("2"), gone()];
    for refusal in [404, 403] {
        let answers = vec![Answer::Watch(listed.clone()), Answer::Status(refusal)];
        let mut fake = Fake::with([("servicecidrs", answers)]);
        assert_eq!(service_cidrs_sent(&mut fake, 4).await, [1], "{refusal}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_watch_ends_with_its_receiver() {
    let mut fake = Fake::new(vec![Answer::Status(503)]);
    fake.expect_nothing(Duration::from_secs(1)).await;
    fake.events.close();
    timeout(DEADLINE, &mut fake.watch).await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_node_is_found_by_one_list_of_the_cache() {
    let nodes = vec![node("one", "1"), node("two", "1")];
    let fake = Fake::with([("nodes", vec![Answer::List("5", nodes)])]);
    fake.watch.abort();
    let named = |name: &'static str| {
        let connection = &fake.connection;
        async move {
            let is_meant = |node: &Node| node.metadata.name.as_deref() == Some(name);
            find_node(connection, is_meant).await.map(|node| node.is_some())
        }
    };
    assert_eq!(named("two").await, Ok(true));
    assert_eq!(named("three").await, Ok(false));
    let asked = fake.asked("nodes");
    assert_eq!(asked.len(), 2);
    assert_eq!(parameter(&asked[0], "resourceVersion"), Some("0"));
    assert_eq!(parameter(&asked[0], "limit"), None);
}

#[test]
fn objects_lose_the_fields_that_are_never_read() {
    let text = service("a", "1").to_string();
    let item = decode::item(ObjectKind::Service, text.as_bytes());
    assert_eq!(item.version.as_deref(), Some("1"));
    let object = crate::watch::admit::admit(item.outcome.unwrap()).expect("a Service is passed on");
    assert_eq!(object.metadata().managed_fields, None);
    assert_eq!(object.metadata().resource_version, None);
}

#[test]
fn an_object_that_cannot_be_read_is_known_by_its_name() {
    let item = decode::item(ObjectKind::Service, broken("bad", "2").to_string().as_bytes());
    let unreadable = item.outcome.unwrap_err();
    let name = ObjectName { namespace: "default".to_owned(), name: "bad".to_owned() };
    assert_eq!((&unreadable.name, &*unreadable.field), (&name, "spec.ports[0].port"));
    assert!(unreadable.error.contains("eighty"), "{}", unreadable.error);
    assert_eq!(item.version.as_deref(), Some("2"));
}

#[test]
fn pauses_double_up_to_a_limit_and_vary() {
    use super::pause::{Pause, jittered};
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
