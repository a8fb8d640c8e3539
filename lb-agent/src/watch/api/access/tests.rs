use super::*;

async fn failure(options: Options) -> String {
    let Err(error) = Access::read(&options).await else { panic!("{options:?} is refused") };
    match error.source() {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

fn masters(all: &[&str]) -> Options {
    let masters = all.iter().map(|&master| master.to_owned()).collect();
    Options { masters, ..Options::default() }
}

async fn order(given: &[&str], learned: &[&str], last: Option<&str>, failed: &str) -> Vec<String> {
    let access = Access::read(&masters(given)).await.unwrap();
    let learned: Vec<_> = learned.iter().map(|address| address.parse().unwrap()).collect();
    let failed = (!failed.is_empty()).then(|| failed.parse().unwrap());
    let candidates = access.candidates(&learned, last, failed.as_ref());
    candidates.iter().map(|candidate| candidate.url.to_string()).collect()
}

#[tokio::test]
async fn a_missing_or_wrong_kubeconfig_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config");
    let options = Options { kubeconfig: Some(path.clone()), ..Options::default() };
    let text = failure(options.clone()).await;
    assert!(text.contains(path.to_str().unwrap()) && text.contains("--kubeconfig"), "{text}");
    for malformed in ["clusters: 7", "clusters: ["] {
        fs::write(&path, malformed).unwrap();
        let text = failure(options.clone()).await;
        assert!(text.contains("failed to parse kubeconfig"), "{text}");
        assert_eq!(text.lines().count(), 1, "{text}");
    }
}

#[tokio::test]
async fn outside_a_cluster_the_error_says_what_to_give() {
    let text = failure(Options::default()).await;
    assert!(text.contains("--kubeconfig") && text.contains("--master"), "{text}");
}

#[tokio::test]
async fn master_overrides_the_url_and_every_one_must_be_one() {
    let access = Access::read(&masters(&["http://127.0.0.1:8080", "http://b"])).await.unwrap();
    assert_eq!(access.given.len(), 2);
    for wrong in ["127.0.0.1:8080", "ftp://host", "http://", ""] {
        let text = failure(masters(&["https://a", wrong])).await;
        assert!(text.contains("--master"), "{wrong}: {text}");
    }
}

#[tokio::test]
async fn the_last_good_server_is_tried_first_then_the_given_then_the_learned() {
    let given = ["https://a:6443", "https://192.0.2.2:6443"];
    let learned = ["192.0.2.2:6443", "[fd00::3]:6443"];
    let all = ["https://a:6443/", "https://192.0.2.2:6443/", "https://[fd00::3]:6443/"];
    assert_eq!(order(&given, &learned, None, "").await, all);
    let last = order(&given, &learned, Some(all[2]), "").await;
    assert_eq!(last, [all[2], all[0], all[1]]);
    assert_eq!(order(&given, &learned, Some("https://other/"), "").await, all);
    let failed = order(&given, &learned, Some(all[0]), all[0]).await;
    assert_eq!(failed, [all[1], all[2], all[0]], "the one that failed comes last");
    let plain = order(&["http://a"], &learned, None, "").await;
    assert_eq!(plain, ["http://a/"], "no learned server without TLS");
}

#[tokio::test]
async fn a_learned_server_proves_the_configured_name() {
    for (given, name) in [
        ("https://api.example.com:6443", "api.example.com"),
        ("https://192.0.2.1:6443", SERVER_NAME),
        ("https://[fd00::1]:6443", SERVER_NAME),
        ("https://localhost:6444", SERVER_NAME),
    ] {
        let access = Access::read(&masters(&[given])).await.unwrap();
        let candidates = access.candidates(&["192.0.2.9:6443".parse().unwrap()], None, None);
        let names: Vec<_> =
            candidates.iter().map(|candidate| access.config(candidate).tls_server_name).collect();
        assert_eq!(names, [None, Some(name.to_owned())], "{given}");
        assert!(!access.config(&candidates[0]).default_retry);
    }
}

#[tokio::test]
async fn a_file_that_rotates_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let (path, token) = (dir.path().join("config"), dir.path().join("token"));
    let text = "
        apiVersion: v1
        kind: Config
        current-context: a
        contexts: [{name: a, context: {cluster: a, user: a}}]
        clusters: [{name: a, cluster: {server: 'https://a', proxy-url: 'http://p:1'}}]
        users: [{name: a, user: {tokenFile: token}}]";
    fs::write(&path, text.replace("\n        ", "\n")).unwrap();
    fs::write(&token, "one").unwrap();
    let options = Options { kubeconfig: Some(path.clone()), ..Options::default() };
    let access = Access::read(&options).await.unwrap();
    assert_eq!(access.proxy.as_deref(), Some("http://p:1"));
    assert_eq!(access.changed(), None);
    fs::write(&token, "two").unwrap();
    let changed = access.changed();
    assert!(changed.is_some() && changed == access.changed());
    assert_eq!(Access::read(&options).await.unwrap().changed(), None);
}
