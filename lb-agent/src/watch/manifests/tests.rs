use std::{fs, path::Path, time::Duration};

use tempfile::TempDir;
use tokio::{sync::mpsc, task::JoinHandle, time::timeout};

use super::*;

const DEADLINE: Duration = Duration::from_secs(10);

/// A watched directory; what happens in it is told in short words.
struct Watched {
    dir: PathBuf,
    _temporary: TempDir,
    events: mpsc::Receiver<ObjectEvent>,
    problems: Problems,
    task: JoinHandle<Result<(), Error>>,
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Watched {
    /// Watches a directory that holds `files` and takes the first lists off.
    async fn new(files: &[(&str, &str)]) -> (Self, Vec<String>) {
        let temporary = tempfile::tempdir().unwrap();
        let dir = temporary.path().join("manifests");
        fs::create_dir(&dir).unwrap();
        for (file, text) in files {
            write(&dir, file, text);
        }
        let (sender, events) = mpsc::channel(64);
        let problems = Problems::default();
        let task = tokio::spawn(watch(dir.clone(), sender, problems.clone()));
        let mut watched = Self { dir, _temporary: temporary, events, problems, task };
        let mut first = Vec::new();
        for _ in ObjectKind::ALL {
            first.push(watched.next().await);
        }
        (watched, first)
    }

    fn write(&self, file: &str, text: &str) {
        write(&self.dir, file, text);
    }

    async fn next(&mut self) -> String {
        match timeout(DEADLINE, self.events.recv()).await {
            Ok(Some(event)) => shown(&event),
            Ok(None) => panic!("the watch ended"),
            Err(_) => panic!("no event in time, problems: {:?}", self.problems.list()),
        }
    }

    async fn expect(&mut self, expected: &[&str]) {
        for expected in expected {
            assert_eq!(self.next().await, *expected);
        }
    }

    /// Waits for the list of problems, as text, to be as expected.
    async fn expect_problems(&self, expected: &[&str]) {
        let found =
            || -> Vec<String> { self.problems.list().iter().map(ToString::to_string).collect() };
        let settled = async {
            while found() != expected {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        if timeout(DEADLINE, settled).await.is_err() {
            assert_eq!(found(), expected);
        }
    }
}

fn write(dir: &Path, file: &str, text: &str) {
    let path = dir.join(file);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

fn service(name: &str, port: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\nspec:\n  ports:\n  - port: {port}\n"
    )
}

fn shown(event: &ObjectEvent) -> String {
    let one = |object: &Object| {
        let port = match object {
            Object::Service(service) => service
                .spec
                .iter()
                .flat_map(|spec| spec.ports.iter().flatten())
                .map(|port| format!(":{}", port.port))
                .collect(),
            _ => String::new(),
        };
        format!("{}{port}", object.name())
    };
    match event {
        ObjectEvent::Replaced(kind, objects) => {
            format!("{kind} = {}", objects.iter().map(one).collect::<Vec<_>>().join(" "))
        }
        ObjectEvent::Applied(object) => format!("{} + {}", object.kind(), one(object)),
        ObjectEvent::Deleted(kind, name) => format!("{kind} - {name}"),
        ObjectEvent::ReplacedExcept(..) | ObjectEvent::Unreadable(..) => {
            panic!("a manifest that cannot be read is no event: {event:?}")
        }
    }
}

#[tokio::test]
async fn complete_lists_of_all_kinds_come_first() {
    let (_watched, first) = Watched::new(&[
        ("a.yaml", &service("web", "80")),
        ("deep/er/b.yml", &service("dns", "53")),
        ("c.json", r#"{"apiVersion": "v1", "kind": "Node", "metadata": {"name": "one"}}"#),
        (".hidden.yaml", &service("hidden", "1")),
        (".git/d.yaml", &service("hidden", "1")),
        ("#a.yaml#", &service("hidden", "1")),
        ("a.yaml~", &service("hidden", "1")),
        ("notes.txt", "kind: Service"),
    ])
    .await;
    let expected = [
        "Service = default/web:80 default/dns:53",
        "EndpointSlice = ",
        "Node = one",
        "ServiceCIDR = ",
    ];
    assert_eq!(first, expected);
}

#[tokio::test]
async fn edits_renames_and_deletes_tell_only_what_changed() {
    let both = format!("{}---\n{}", service("a", "1"), service("b", "1"));
    let (mut watched, _) = Watched::new(&[("x.yaml", &both)]).await;
    watched.write("x.yaml", &format!("# edited\n{}---\n{}", service("a", "1"), service("b", "2")));
    watched.expect(&["Service + default/b:2"]).await;
    // An editor writes beside and renames.
    watched.write(".x.yaml.new", &service("a", "3"));
    fs::rename(watched.dir.join(".x.yaml.new"), watched.dir.join("x.yaml")).unwrap();
    watched.expect(&["Service - default/b", "Service + default/a:3"]).await;
    // The file takes another name: the object stays.
    fs::rename(watched.dir.join("x.yaml"), watched.dir.join("y.yaml")).unwrap();
    watched.write("z.yaml", &service("z", "1"));
    watched.expect(&["Service + default/z:1"]).await;
    fs::remove_file(watched.dir.join("y.yaml")).unwrap();
    watched.expect(&["Service - default/a"]).await;
}

#[tokio::test]
async fn directories_may_come_and_go() {
    let (mut watched, _) = Watched::new(&[("in/a.yaml", &service("a", "1"))]).await;
    watched.write("new/deep/b.yaml", &service("b", "1"));
    watched.expect(&["Service + default/b:1"]).await;
    watched.write("new/deep/b.yaml", &service("b", "2"));
    watched.expect(&["Service + default/b:2"]).await;
    fs::rename(watched.dir.join("in"), watched.dir.with_file_name("outside")).unwrap();
    watched.expect(&["Service - default/a"]).await;
    fs::rename(watched.dir.with_file_name("outside"), watched.dir.join("back")).unwrap();
    watched.expect(&["Service + default/a:1"]).await;
    watched.write("back/a.yaml", &service("a", "2"));
    watched.expect(&["Service + default/a:2"]).await;
    fs::remove_dir_all(watched.dir.join("new")).unwrap();
    watched.expect(&["Service - default/b"]).await;
}

#[tokio::test]
async fn the_directory_itself_may_be_swapped() {
    let (mut watched, _) = Watched::new(&[("a.yaml", &service("a", "1"))]).await;
    let next = watched.dir.with_file_name("next");
    write(&next, "a.yaml", &service("a", "2"));
    write(&next, "b.yaml", &service("b", "1"));
    fs::rename(&watched.dir, watched.dir.with_file_name("old")).unwrap();
    let missing = format!("{}: No such file or directory (os error 2)", watched.dir.display());
    watched.expect_problems(&[&missing]).await;
    fs::rename(&next, &watched.dir).unwrap();
    watched.expect(&["Service + default/a:2", "Service + default/b:1"]).await;
    watched.expect_problems(&[]).await;
    watched.write("b.yaml", &service("b", "2"));
    watched.expect(&["Service + default/b:2"]).await;
}

#[tokio::test]
async fn a_directory_above_may_be_swapped_too() {
    let (mut watched, _) = Watched::new(&[("a.yaml", &service("a", "1"))]).await;
    let above = watched.dir.parent().unwrap().to_owned();
    let others = tempfile::tempdir().unwrap();
    let next = others.path().join("next");
    write(&next.join("manifests"), "a.yaml", &service("a", "2"));
    // Neither the directory nor its parent tells of this.
    fs::rename(&above, others.path().join("old")).unwrap();
    fs::rename(&next, &above).unwrap();
    watched.expect(&["Service + default/a:2"]).await;
    watched.write("a.yaml", &service("a", "3"));
    watched.expect(&["Service + default/a:3"]).await;
}

#[tokio::test]
async fn a_mounted_config_map_is_followed() {
    let (mut watched, _) = Watched::new(&[("..one/a.yaml", &service("a", "1"))]).await;
    let link = |target: &str, name: &str| {
        std::os::unix::fs::symlink(target, watched.dir.join(name)).unwrap();
    };
    link("..one", "..data");
    link("..data/a.yaml", "a.yaml");
    watched.write("..two/a.yaml", &service("a", "2"));
    std::os::unix::fs::symlink("..two", watched.dir.join("..data_tmp")).unwrap();
    let swap = watched.dir.clone();
    watched.expect(&["Service + default/a:1"]).await;
    fs::rename(swap.join("..data_tmp"), swap.join("..data")).unwrap();
    watched.expect(&["Service + default/a:2"]).await;
}

#[tokio::test]
async fn a_bad_file_is_named_and_what_it_held_stays() {
    let (mut watched, first) = Watched::new(&[
        ("good.yaml", &service("good", "1")),
        ("services/web.yaml", &service("web", "1")),
        ("new.yaml", "kind: [Service"),
    ])
    .await;
    assert_eq!(first[0], "Service = default/good:1 default/web:1");
    fs::remove_file(watched.dir.join("new.yaml")).unwrap();
    watched.expect_problems(&[]).await;
    watched.write("services/web.yaml", &service("web", "http"));
    let bad = "services/web.yaml:7: spec.ports[0].port: invalid i32: found http";
    watched.expect_problems(&[bad]).await;
    watched.write("good.yaml", &service("good", "2"));
    watched.expect(&["Service + default/good:2"]).await;
    watched.write("services/web.yaml", &service("web", "2"));
    watched.expect(&["Service + default/web:2"]).await;
    watched.expect_problems(&[]).await;
    watched.write("services/web.yaml", &service("web", "http"));
    watched.expect_problems(&[bad]).await;
    fs::remove_file(watched.dir.join("services/web.yaml")).unwrap();
    watched.expect(&["Service - default/web"]).await;
    watched.expect_problems(&[]).await;
}

#[tokio::test]
async fn of_two_files_with_one_object_the_first_by_path_wins() {
    let (mut watched, first) =
        Watched::new(&[("a.yaml", &service("web", "1")), ("b.yaml", &service("web", "2"))]).await;
    assert_eq!(first[0], "Service = default/web:1");
    let error = "b.yaml:1: metadata.name: Service default/web is taken from a.yaml:1";
    watched.expect_problems(&[error]).await;
    fs::remove_file(watched.dir.join("a.yaml")).unwrap();
    watched.expect(&["Service + default/web:2"]).await;
    watched.expect_problems(&[]).await;
    watched.write("a.yaml", &service("web", "3"));
    watched.expect(&["Service + default/web:3"]).await;
    watched.expect_problems(&[error]).await;
    let twice = format!("{}---\n{}", service("two", "1"), service("two", "2"));
    watched.write("c.yaml", &twice);
    watched.expect(&["Service + default/two:1"]).await;
    let in_file = "c.yaml:9: metadata.name: Service default/two is taken from c.yaml:1";
    watched.expect_problems(&[error, in_file]).await;
}

#[tokio::test]
async fn a_file_that_is_written_to_and_not_closed_is_read_after_a_rest() {
    use std::io::Write as _;
    let (mut watched, _) = Watched::new(&[]).await;
    let mut file = fs::File::create(watched.dir.join("a.yaml")).unwrap();
    file.write_all(service("a", "1").as_bytes()).unwrap();
    watched.expect(&["Service + default/a:1"]).await;
    drop(file);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_saved_file_is_sent_without_delay() {
    let (mut watched, _) = Watched::new(&[]).await;
    let mut taken = Vec::new();
    for port in 1..=50 {
        let text = service("a", &port.to_string());
        let saved = Instant::now();
        watched.write("a.yaml", &text);
        let expected = format!("Service + default/a:{port}");
        watched.expect(&[&expected]).await;
        taken.push(saved.elapsed());
    }
    taken.sort();
    println!("median {:?}, longest {:?}", taken[25], taken[49]);
    // It is a fraction of a millisecond; the rest is for a busy machine.
    assert!(taken[25] < Duration::from_millis(20), "{taken:?}");
}

#[tokio::test]
async fn a_directory_that_is_missing_at_the_start_is_an_error() {
    let (sender, _events) = mpsc::channel(1);
    let result = watch("/nonexistent/manifests".into(), sender, Problems::default()).await;
    let text = result.expect_err("there is no such directory").to_string();
    assert!(text.contains("/nonexistent/manifests") && text.contains("--manifests"), "{text}");
}

#[tokio::test]
async fn the_watch_ends_with_its_receiver() {
    let (mut watched, _) = Watched::new(&[]).await;
    watched.events.close();
    let task = std::mem::replace(&mut watched.task, tokio::spawn(async { Ok(()) }));
    timeout(DEADLINE, task).await.unwrap().unwrap().unwrap();
}

#[test]
fn a_file_sends_endpoints_before_their_service_and_a_deleted_service_before_its_endpoints() {
    let slice = r#"{"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {"name": "s"}, "addressType": "IPv4", "endpoints": []}"#;
    let text = format!("{}---\n{slice}\n", service("a", "1"));
    let located = parse::parse(&text, Format::Yaml).unwrap();
    let mut store = Store::default();
    let mut put = |content| -> Vec<String> {
        let events = store.put(Path::new("x"), content, &|_| Vec::new());
        events.iter().map(shown).collect()
    };
    let applied = ["EndpointSlice + default/s", "Service + default/a:1"];
    assert_eq!(put(Content::Good(located)), applied);
    assert_eq!(put(Content::Gone), ["Service - default/a", "EndpointSlice - default/s"]);
}
