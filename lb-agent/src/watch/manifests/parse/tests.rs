use super::*;

const SERVICE: &str = "\
apiVersion: v1
kind: Service
metadata:
  name: web
spec:
  ports:
    - port: 80
";

fn check_error(text: &str, format: Format, expected: &str) {
    let error = parse(text, format).expect_err("the text is bad");
    let shown = if error.field.is_empty() {
        format!("{}: {}", error.line, error.message)
    } else {
        format!("{}: {}: {}", error.line, error.field, error.message)
    };
    assert_eq!(shown, expected, "for:\n{text}");
}

fn names(text: &str, format: Format) -> Vec<(ObjectKind, String, u64)> {
    let found = parse(text, format).expect("the text is good");
    found
        .into_iter()
        .map(|found| (found.object.kind(), found.object.name().to_string(), found.line))
        .collect()
}

#[test]
fn an_error_names_line_and_field() {
    let second = format!("# first\n---\n{SERVICE}---\n{}", SERVICE.replace("80", "[]"));
    let old = SERVICE
        .replace("kind: Service", "kind: EndpointSlice")
        .replace("v1", "discovery.k8s.io/v1beta1");
    let rows = [
        (SERVICE.replace("80", "http"), "7: spec.ports[0].port: invalid i32: found http"),
        (second, "17: spec.ports[0].port: expected string scalar: found []"),
        (SERVICE.replace("kind: Service\n", ""), "1: kind: missing"),
        (SERVICE.replace("apiVersion: v1\n", ""), "1: apiVersion: missing"),
        (SERVICE.replace("name: web", "labels: {}"), "1: metadata.name: missing"),
        (SERVICE.replace("metadata:", "metadata: ]"), "3: misplaced bracket"),
        (SERVICE.replace("  ports:", "ports\n  ports:"), "6: simple key expected ':'"),
        (old, r#"1: apiVersion: "discovery.k8s.io/v1beta1" is not "discovery.k8s.io/v1""#),
    ];
    for (text, expected) in rows {
        check_error(&text, Format::Yaml, expected);
    }
    let list = r#"{"apiVersion": "v1", "kind": "List", "items": [
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
         "spec": {"ports": [{"port": "http"}]}}]}"#;
    let expected = r#"3: items[0].spec.ports[0].port: invalid type: string "http", expected i32"#;
    check_error(list, Format::Json, expected);
    let nameless = r#"{"apiVersion": "v1", "kind": "NodeList", "items": [{}]}"#;
    check_error(nameless, Format::Json, "1: items[0].metadata.name: missing");
    check_error("{", Format::Json, "1: EOF while parsing an object");
}

#[test]
fn documents_lists_and_json_are_read() {
    let service = (ObjectKind::Service, "default/web".to_owned());
    let at = |line| (service.0, service.1.clone(), line);
    assert_eq!(names(SERVICE, Format::Yaml), [at(1)]);
    assert_eq!(
        names(&format!("# head\n---\n{SERVICE}--- # next\n{SERVICE}...\n---\n"), Format::Yaml),
        [at(3), at(11)]
    );
    assert_eq!(names("", Format::Yaml), []);
    assert_eq!(names("# nothing\n---\n", Format::Yaml), []);
    let json = r#"{
	"apiVersion": "v1", "kind": "List", "items": [
	  {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}},
	  {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"}},
	  {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "one", "namespace": "no"}}
	]}"#;
    let both = [at(1), (ObjectKind::Node, "one".to_owned(), 1)];
    assert_eq!(names(json, Format::Json), both);
    assert_eq!(names(&json.replace('\t', " "), Format::Yaml), both);
    let list = "apiVersion: v1\nkind: ServiceList\nitems:\n- metadata: {name: web}\n";
    assert_eq!(names(list, Format::Yaml), [at(1)]);
}

#[test]
fn kinds_of_other_groups_are_skipped() {
    let knative = SERVICE.replace("apiVersion: v1", "apiVersion: serving.knative.dev/v1");
    assert_eq!(names(&knative, Format::Yaml), []);
    let deployment = "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: web}\n";
    assert_eq!(names(deployment, Format::Yaml), []);
}

#[test]
fn a_text_of_any_depth_is_no_stack_overflow() {
    const DEPTH: usize = 20_000;
    let other = "apiVersion: v1\nkind: Secret\ndata: ";
    let flow = format!("{other}{}", "[".repeat(DEPTH));
    let block = format!("{other}\n  {}0", "- ".repeat(DEPTH));
    let list = format!("{{apiVersion: v1, kind: List, items: {}", "[".repeat(DEPTH));
    let json = format!(r#"{{"kind": "List", "items": {}"#, "[".repeat(DEPTH));
    let rows =
        [(flow, Format::Yaml), (block, Format::Yaml), (list, Format::Yaml), (json, Format::Json)];
    for (text, format) in rows {
        // An error, or a document of a kind that is not watched.
        assert!(parse(&text, format).map_or(true, |found| found.is_empty()), "{}", &text[..60]);
    }
}
