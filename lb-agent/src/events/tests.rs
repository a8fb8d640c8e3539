use std::time::Duration;

use axum::{Json, Router, extract::State, routing::post};
use kube::Config;
use serde_json::Value;
use tokio::{net::TcpListener, time::timeout};

use super::*;

const DEADLINE: Duration = Duration::from_secs(10);

fn subject(name: &str) -> Subject {
    Subject {
        kind: Kind::Service,
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
        refusals.refuse(subject(name), Refusal::ProtocolNotSupported, note.to_owned());
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
fn what_was_told_is_told_again_once_the_object_was_good() {
    let refusals = Refusals::logged();
    let told = || refusals.told.lock().unwrap().len();
    refusals.refuse(subject("web"), Refusal::MapFull, "raise --max-slots".to_owned());
    refusals.refuse(subject("web"), Refusal::InvalidObject, "no port".to_owned());
    assert_eq!(told(), 2);
    refusals.withdraw(subject("web"), Refusal::MapFull);
    assert_eq!(told(), 1);
    refusals.forget(Kind::Service, &subject("web").name);
    assert_eq!(told(), 0);
}

#[test]
fn a_long_note_is_cut_at_a_character() {
    assert_eq!(shortened("é".repeat(600)).len(), 1024);
    assert_eq!(shortened(format!("a{}", "é".repeat(600))).len(), 1023);
}
