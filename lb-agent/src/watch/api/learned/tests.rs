use std::fs;

use serde_json::{Value, json};

use super::*;

fn event(kind: &str, value: Value) -> ObjectEvent {
    ObjectEvent::Applied(match kind {
        "service" => serde_json::from_value::<Service>(value).unwrap().into(),
        _ => serde_json::from_value::<EndpointSlice>(value).unwrap().into(),
    })
}

fn kubernetes() -> ObjectEvent {
    event(
        "service",
        json!({
            "metadata": {"namespace": "default", "name": "kubernetes"},
            "spec": {"clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1"],
                     "ports": [{"name": "https", "port": 443, "targetPort": 6443}]},
        }),
    )
}

fn endpoints(namespace: &str, service: &str, addresses: &[&str]) -> ObjectEvent {
    let endpoints: Vec<_> = addresses.iter().map(|ip| json!({"addresses": [ip]})).collect();
    event(
        "slice",
        json!({
            "metadata": {"namespace": namespace, "name": "kubernetes",
                         "labels": {"kubernetes.io/service-name": service}},
            "addressType": "IPv4", "endpoints": endpoints,
            "ports": [{"name": "https", "port": 6443}],
        }),
    )
}

#[test]
fn what_is_learned_is_there_after_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let state = directory.path().join("state");
    let learned = Learned::open(Some(&state));
    assert!(learned.endpoints().is_empty() && learned.objects().is_none());
    learned.observe(&kubernetes());
    learned.observe(&endpoints("default", "kubernetes", &["192.0.2.2", "192.0.2.1", "127.0.0.1"]));
    learned.observe(&endpoints("default", "web", &["192.0.2.7"]));
    learned.observe(&endpoints("other", "kubernetes", &["192.0.2.8"]));
    learned.answered(&"https://192.0.2.2:6443".parse().unwrap());
    // An API server that ends takes itself out of the list, the last one too.
    learned.observe(&endpoints("default", "kubernetes", &[]));

    let again = Learned::open(Some(&state));
    let expected = ["192.0.2.1:6443", "192.0.2.2:6443"].map(|text| text.parse().unwrap());
    assert_eq!(again.endpoints(), expected);
    assert_eq!(again.last().as_deref(), Some("https://192.0.2.2:6443/"));
    let (service, slices) = again.objects().expect("objects");
    let spec = service.spec.unwrap();
    assert_eq!(spec.cluster_ips, Some(vec!["10.96.0.1".to_owned()]));
    let learned = Learned::default();
    for slice in slices {
        learned.0.lock().unwrap().slices.extend(self::slice(&slice.into()));
    }
    learned.0.lock().unwrap().merge_slices();
    assert_eq!(learned.endpoints(), expected, "the objects say what was learned");
}

#[test]
fn a_directory_that_somebody_empties_is_filled_with_the_next_list() {
    let directory = tempfile::tempdir().unwrap();
    let state = directory.path().join("state");
    let learned = Learned::open(Some(&state));
    let list = || endpoints("default", "kubernetes", &["192.0.2.1"]);
    learned.observe(&list());
    fs::remove_dir_all(&state).unwrap();
    learned.observe(&list());
    assert_eq!(Learned::open(Some(&state)).endpoints(), ["192.0.2.1:6443".parse().unwrap()]);
}

#[test]
fn a_removed_slice_takes_its_endpoints_along() {
    let learned = Learned::default();
    learned.observe(&endpoints("default", "kubernetes", &["192.0.2.1"]));
    let name = |name: &str| ObjectName { namespace: NAMESPACE.to_owned(), name: name.to_owned() };
    learned.observe(&ObjectEvent::Replaced(ObjectKind::Service, Vec::new()));
    let mut other = endpoints("default", "kubernetes", &["192.0.2.2"]);
    if let ObjectEvent::Applied(object) = &mut other {
        object.metadata_mut().name = Some("kubernetes-2".to_owned());
    }
    learned.observe(&other);
    assert_eq!(learned.endpoints().len(), 2);
    learned.observe(&ObjectEvent::Deleted(ObjectKind::EndpointSlice, name("kubernetes")));
    assert_eq!(learned.endpoints(), ["192.0.2.2:6443".parse().unwrap()]);
}

#[test]
fn a_damaged_file_is_ignored_and_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(FILE);
    let good = json!({"format": 1, "clusterIPs": ["10.96.0.1"], "port": 443,
                      "endpoints": ["192.0.2.1:6443"]});
    fs::write(&path, good.to_string()).unwrap();
    assert!(file::read(directory.path()).is_ok_and(|known| known.endpoints.len() == 1));
    let with = |key: &str, value: Value| {
        let mut text = good.clone();
        text[key] = value;
        text.to_string()
    };
    let many: Vec<_> = (1..=300).map(|port| format!("192.0.2.1:{port}")).collect();
    for (text, said) in [
        (good.to_string()[..40].to_owned(), "damaged"),
        (String::new(), "damaged"),
        (" ".repeat(70_000), "larger"),
        (with("format", json!(2)), "format is 2"),
        (with("endpoints", json!(["127.0.0.1:6443"])), "127.0.0.1"),
        (with("endpoints", json!(["192.0.2.1:0"])), "192.0.2.1:0"),
        (with("endpoints", json!(["api.example.com:6443"])), "damaged"),
        (with("endpoints", json!(many)), "300 endpoints"),
        (with("clusterIPs", json!(["0.0.0.0"])), "0.0.0.0"),
        (with("port", json!(0)), "10.96.0.1 port 0"),
    ] {
        fs::write(&path, &text).unwrap();
        let error = file::read(directory.path()).expect_err(said).to_string();
        assert!(error.contains(said), "{error}");
        let learned = Learned::open(Some(directory.path()));
        assert!(learned.endpoints().is_empty(), "{said}");
        learned.observe(&endpoints("default", "kubernetes", &["192.0.2.3"]));
        assert!(file::read(directory.path()).is_ok_and(|known| known.endpoints.len() == 1));
    }
}

#[test]
fn a_directory_that_cannot_be_written_stops_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    fs::write(&file, "").unwrap();
    let learned = Learned::open(Some(&file.join("below")));
    learned.observe(&endpoints("default", "kubernetes", &["192.0.2.1"]));
    assert_eq!(learned.endpoints().len(), 1);
}
