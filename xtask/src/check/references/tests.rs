use std::fs;

use super::*;

/// What is found in a repository of these files.
fn found(files: &[(&str, &str)]) -> Vec<String> {
    let root = tempfile::tempdir().expect("a directory");
    for (name, text) in files {
        let file = root.path().join(name);
        fs::create_dir_all(file.parent().expect("it has one")).expect("a directory");
        fs::write(file, text).expect("a file");
    }
    Repository::read(root.path()).expect("it can be read").findings()
}

const PAGE: (&str, &str) = (
    "docs/contract.md",
    "# The contract\n\n## 3. Clients\n| row | what |\n|---|---|\n| 3.4b | x |\n",
);

#[test]
fn what_is_cited_as_it_should_be_is_fine() {
    let files = [
        PAGE,
        (
            "README.md",
            "See [3](docs/contract.md#3-clients), row 3.4b, `src/a.rs`, [that](#see), \
             https://x.org/b.md.\n\n# See\n",
        ),
        ("docs/other.md", "Rows 3 and 3.4b of [it](contract.md).\n\n## 1. Own\nSee section 1.\n"),
        (
            "lb/src/a.rs",
            "//! docs/contract.md, row 3.4b (RFC 793 section 3.1).\n\
             const PAGE: &str = include_str!(\"../../docs/contract.md\");\n\
             // The next 3 rows: table.\n",
        ),
    ];
    assert_eq!(found(&files), [""; 0]);
}

#[test]
fn links_that_lead_nowhere_are_named() {
    let files = [PAGE, ("README.md", "[a](docs/gone.md)\n[b](docs/contract.md#gone) [c](#no)\n")];
    let found = found(&files);
    assert_eq!(
        found,
        [
            "README.md:1: the target of the link `docs/gone.md` does not exist",
            "README.md:2: docs/contract.md has no heading `#gone`: correct the anchor",
            "README.md:2: README.md has no heading `#no`: correct the anchor",
        ]
    );
}

#[test]
fn pages_and_sources_that_are_not_there_are_named() {
    let files = [
        PAGE,
        ("docs/a.md", "`b/gone.rs` and\n`docs/b.md`\n"),
        ("lb/src/a.rs", "fn f() {}\n/// See contract.md.\nconst P: &str = \"docs/c.md\";\n"),
        ("ci.yaml", "a: b # docs/d.md\n"),
    ];
    assert_eq!(
        found(&files),
        [
            "docs/a.md:2: docs/b.md does not exist: give the path from the repository's root",
            "docs/a.md:1: no source file has a path that ends in b/gone.rs",
            "ci.yaml:1: docs/d.md does not exist: give the path from the repository's root",
            "lb/src/a.rs:2: contract.md does not exist: give the path from the repository's root",
            "lb/src/a.rs:3: docs/c.md does not exist: give the path from the repository's root",
        ]
    );
}

#[test]
fn numbers_need_a_document_that_has_them() {
    let files = [
        PAGE,
        (
            "lb/src/a.rs",
            "//! Rows (semantics: section 7).\n\n\
             //! docs/contract.md, row 3.5.\n\n\
             fn f() {} // table 4 of the Service contract\n",
        ),
    ];
    assert_eq!(
        found(&files),
        [
            "lb/src/a.rs:1: \"section 7\" does not say of which page: name it in the same \
             paragraph",
            "lb/src/a.rs:3: \"row 3.5\": that page has no heading or row 3.5",
            "lb/src/a.rs:5: \"table 4\" does not say of which page: name it in the same \
             paragraph",
        ]
    );
}

#[test]
fn words_for_documents_that_are_nowhere_are_named() {
    let files = [
        ("tests/a.rs", "// Limits are those of the\n// plan.\n"),
        ("lb-agent/src/a.rs", "// The last write of the plan.\n"),
    ];
    assert_eq!(
        found(&files),
        ["tests/a.rs:1: \"of the plan\" is not a document of this repository: a target is in \
          docs/performance.md"]
    );
}

#[test]
fn directories_of_builds_are_not_read() {
    assert!(found(&[("target/a.md", "[a](b.md)"), (".git/c.md", "[a](b.md)")]).is_empty());
}
