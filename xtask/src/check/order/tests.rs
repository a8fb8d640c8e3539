use std::fs;
use std::path::Path;

use super::*;

const PAGE_TEXT: &str = "```order it\nrun\nplan watch\nmodel\n```\n";

/// What is found in a crate `it` of these files, which the page orders.
fn found(page: &str, files: &[(&str, &str)]) -> Vec<String> {
    let root = tempfile::tempdir().expect("a directory");
    for (name, text) in files {
        let file = root.path().join("it/src").join(name);
        fs::create_dir_all(file.parent().expect("it has one")).expect("a directory");
        fs::write(file, text).expect("a file");
    }
    let parsed = Crate::read(root.path(), Path::new("it"), "it").expect("it parses");
    let orders = page::orders(page).expect("a good page");
    let arrows = arrows(&parsed);
    let mut findings = rooms(&parsed, &arrows, orders.get("it"));
    findings.extend(super::files(&parsed, &arrows));
    findings
}

const ROOT: (&str, &str) = ("lib.rs", "mod run;\nmod plan;\nmod watch;\nmod model;\n");

#[test]
fn downward_is_fine() {
    let files = [
        ROOT,
        ("run.rs", "use crate::{model::M, plan, watch};\n"),
        ("plan.rs", "use super::model::M;\n"),
        ("watch.rs", ""),
        ("model.rs", ""),
    ];
    assert!(found(PAGE_TEXT, &files).is_empty());
}

#[test]
fn an_arrow_upward_or_sideways_is_named_with_its_line() {
    let files = [
        ROOT,
        ("run.rs", ""),
        ("plan.rs", "\nuse crate::watch::Event;\n"),
        ("watch.rs", ""),
        ("model.rs", "fn f() { crate::run::start() }\n"),
    ];
    assert_eq!(
        found(PAGE_TEXT, &files),
        [
            "it/src/plan.rs:2: `plan` uses `watch` (crate::watch::Event), which is not lower \
             in ARCHITECTURE.md:1: move the used item to a module below both",
            "it/src/model.rs:1: `model` uses `run` (crate::run::start), which is not lower \
             in ARCHITECTURE.md:1: move the used item to a module below both",
        ]
    );
}

#[test]
fn what_the_root_defines_is_below_nobody() {
    let files = [
        ("lib.rs", "mod run;\nmod plan;\nmod watch;\nmod model;\npub struct Own;\n"),
        ("run.rs", ""),
        ("plan.rs", ""),
        ("watch.rs", ""),
        ("model.rs", "use crate::Own;\n"),
    ];
    let found = found(PAGE_TEXT, &files);
    assert_eq!(found.len(), 1);
    assert!(
        found[0].starts_with("it/src/model.rs:1: `model` uses `lib` (crate::Own)"),
        "{found:?}"
    );
}

#[test]
fn every_module_has_a_place_and_every_place_a_module() {
    let files = [
        ("lib.rs", "mod run;\nmod plan;\nmod model;\nmod ids;\n"),
        ("run.rs", ""),
        ("plan.rs", ""),
        ("model.rs", ""),
        ("ids.rs", ""),
    ];
    assert_eq!(
        found(PAGE_TEXT, &files),
        [
            "ARCHITECTURE.md:1: `order it` does not list `ids`: add it to its layer",
            "ARCHITECTURE.md:1: `order it` lists `watch`, which does not exist: remove it",
        ]
    );
}

#[test]
fn a_package_without_an_order_is_named_with_one_that_would_do() {
    let files = [
        ("lib.rs", "mod run;\nmod model;\n"),
        ("run.rs", "use crate::model::M;"),
        ("model.rs", ""),
    ];
    let root = tempfile::tempdir().expect("a directory");
    fs::create_dir_all(root.path().join("src")).expect("a directory");
    for (name, text) in files {
        fs::write(root.path().join("src").join(name), text).expect("a file");
    }
    let parsed = Crate::read(root.path(), Path::new(""), "lb-agent").expect("it parses");
    let found = rooms(&parsed, &arrows(&parsed), None);
    assert_eq!(
        found,
        ["ARCHITECTURE.md has no block ```order lb-agent: add it, for example as\nrun\nmodel"]
    );
}

#[test]
fn files_of_a_room_do_not_use_each_other_in_a_circle() {
    let files = [
        ("lib.rs", "mod a;\n"),
        ("a.rs", "mod b;\nmod c;\npub struct Own;\nuse b::f;\n"),
        ("a/b.rs", "use super::{Own, c};\n"),
        ("a/c.rs", "\n\nuse super::b::g;\n"),
    ];
    assert_eq!(
        found("```order it\na\n```\n", &files),
        ["it: these modules form a cycle: move the used item to a module below both\n    \
          it/src/a/b.rs:1: super::c\n    it/src/a/c.rs:3: super::b::g"]
    );
}

#[test]
fn packages_depend_downward() {
    let metadata: Metadata = serde_json::from_str(
        r#"{ "packages": [
            { "name": "agent", "manifest_path": "/agent/Cargo.toml", "dependencies": [
                { "name": "common", "kind": null }, { "name": "serde", "kind": null } ] },
            { "name": "common", "manifest_path": "/common/Cargo.toml", "dependencies": [
                { "name": "agent", "kind": null }, { "name": "testing", "kind": "dev" } ] },
            { "name": "testing", "manifest_path": "/testing/Cargo.toml", "dependencies": [] }
        ] }"#,
    )
    .expect("it parses");
    let orders =
        page::orders("```order crates\nagent testing\ncommon\n```\n").expect("a good page");
    assert_eq!(
        packages(&metadata, orders.get(CRATES)),
        ["the Cargo.toml of `common` depends on `agent`, which is not in a lower layer of \
             ARCHITECTURE.md:1: remove the dependency or change the order"]
    );
    assert_eq!(packages(&metadata, None).len(), 1);
}

#[test]
fn a_pure_package_has_no_files_sockets_and_clocks() {
    let root = tempfile::tempdir().expect("a directory");
    fs::create_dir_all(root.path().join("src")).expect("a directory");
    let text = "use std::{fs as disk, net::{IpAddr, TcpStream}, time::{Duration, Instant}};\n\
                fn f(at: Instant) { Instant::now(); disk::read(\"\"); }\n\
                #[cfg(test)]\nmod tests { fn g() { std::time::Instant::now(); } }\n";
    fs::write(root.path().join("src/lib.rs"), text).expect("a file");
    let parsed = Crate::read(root.path(), Path::new(""), "lb-control").expect("it parses");
    let package: Package = serde_json::from_str(
        r#"{ "name": "lb-control", "manifest_path": "/Cargo.toml", "dependencies": [
            { "name": "kube-runtime", "kind": null }, { "name": "ipnet", "kind": null } ] }"#,
    )
    .expect("it parses");
    let found = pure::check(&package, Path::new(""), &parsed);
    let expected = [
        "Cargo.toml: `lb-control` is pure and cannot depend on `kube-runtime`",
        "src/lib.rs:1: `lb-control` is pure and cannot use std::fs:",
        "src/lib.rs:1: `lb-control` is pure and cannot use std::net::TcpStream:",
        "src/lib.rs:2: `lb-control` is pure and cannot use std::time::Instant::now:",
        "src/lib.rs:2: `lb-control` is pure and cannot use std::fs::read:",
    ];
    assert_eq!(found.len(), expected.len(), "{found:?}");
    for (found, expected) in found.iter().zip(expected) {
        assert!(found.starts_with(expected), "{found}");
    }
}
