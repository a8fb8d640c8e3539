use std::fs;
use std::path::Path;

use super::*;

/// A crate `it` of these files, in a directory that lives as long as the first.
fn crate_of(files: &[(&str, &str)]) -> (tempfile::TempDir, Crate) {
    let root = tempfile::tempdir().expect("a directory");
    for (name, text) in files {
        let file = root.path().join("it/src").join(name);
        fs::create_dir_all(file.parent().expect("it has one")).expect("a directory");
        fs::write(file, text).expect("a file");
    }
    let parsed = Crate::read(root.path(), Path::new("it"), "it-self").expect("it parses");
    (root, parsed)
}

/// Modules of the crate that this one uses, with the lines.
fn uses(parsed: &Crate, path: &[&str]) -> Vec<(String, usize)> {
    let module = parsed.modules.iter().find(|module| module.path == path).expect("it is there");
    let target = |written: &Written| match parsed.target(module, &written.segments) {
        Target::Module(path) if path != module.path => Some((path.join("::"), written.line)),
        _ => None,
    };
    let mut uses: Vec<_> = module.written.iter().filter_map(target).collect();
    uses.sort();
    uses
}

fn elsewhere(parsed: &Crate, path: &[&str]) -> Vec<String> {
    let module = parsed.modules.iter().find(|module| module.path == path).expect("it is there");
    let target = |written: &Written| match parsed.target(module, &written.segments) {
        Target::Elsewhere(path) => Some(path.join("::")),
        Target::Module(_) => None,
    };
    module.written.iter().filter_map(target).collect()
}

#[test]
fn every_kind_of_path_is_followed() {
    let (_root, parsed) = crate_of(&[
        ("lib.rs", "mod a;\nmod b;\n#[cfg(test)]\nmod tests;\n"),
        (
            "a.rs",
            "use crate::{b::{self, c::{One, Two}}, b::d::*};\n\
             mod inner { use super::super::b::d; }\n\
             mod child;\n\
             fn f(x: super::b::Type) -> child::Type { crate::b::c::g::<b::d::T>() }\n\
             fn g() { println!(\"{}\", [crate::b::d::X]); }\n\
             #[arg(value_parser = crate::b::parse)]\nstruct S;\n",
        ),
        ("a/child.rs", "use super::S;\n"),
        ("b.rs", "pub mod c;\npub mod d;\npub use self::c::One;\n"),
        ("b/c.rs", ""),
        ("b/d/mod.rs", ""),
    ]);
    assert_eq!(
        uses(&parsed, &["a"]),
        [
            ("a::child", 4),
            ("b", 1),
            ("b", 4),
            ("b", 6),
            ("b::c", 1),
            ("b::c", 1),
            ("b::c", 4),
            ("b::d", 1),
            ("b::d", 4),
            ("b::d", 5),
        ]
        .map(|(path, line)| (path.to_owned(), line))
    );
    assert_eq!(uses(&parsed, &["a", "inner"]), [("b::d".to_owned(), 2)]);
    assert_eq!(uses(&parsed, &["a", "child"]), [("a".to_owned(), 1)]);
}

#[test]
fn what_a_module_exports_of_others_belongs_to_them() {
    let (_root, parsed) = crate_of(&[
        ("lib.rs", "mod a;\nmod b;\n"),
        ("a.rs", "use crate::b::Two as Other;\nfn f() -> Other { Other::new() }\n"),
        ("b.rs", "mod c;\npub use c::One as Two;\n"),
        ("b/c.rs", ""),
    ]);
    assert_eq!(uses(&parsed, &["a"]), [("b::c".to_owned(), 1), ("b::c".to_owned(), 2)]);
}

#[test]
fn test_code_is_left_out() {
    let (_root, parsed) = crate_of(&[
        ("lib.rs", "mod a;\nmod b;\n"),
        (
            "a.rs",
            "#[cfg(test)]\nmod tests { use crate::b::X; }\n\
             #[cfg(all(test, unix))]\nuse crate::b;\n\
             #[cfg(not(test))]\nuse crate::b::Y;\n\
             impl S { #[cfg(test)] fn f() { crate::b::f() } }\n",
        ),
        ("b.rs", ""),
    ]);
    assert_eq!(uses(&parsed, &["a"]), [("b".to_owned(), 6)]);
}

#[test]
fn names_of_other_crates_are_expanded() {
    let (_root, parsed) = crate_of(&[(
        "lib.rs",
        "use std::{fs, time::Instant as Now};\nfn f() { fs::read(\"\"); Now::now(); }\n",
    )]);
    assert_eq!(
        elsewhere(&parsed, &[]),
        ["std::fs", "std::time::Instant", "std::fs::read", "std::time::Instant::now"]
    );
}

#[test]
fn a_program_beside_a_library_is_a_module_that_uses_it() {
    let (_root, parsed) = crate_of(&[
        ("lib.rs", "pub mod a;\n"),
        ("a.rs", ""),
        ("main.rs", "use it_self::a::f;\nfn main() { it_self::a::g(); crate::h(); }\n"),
    ]);
    assert_eq!(uses(&parsed, &["main"]), [("a".to_owned(), 1), ("a".to_owned(), 2)]);
}

#[test]
fn a_module_without_a_file_is_named() {
    let root = tempfile::tempdir().expect("a directory");
    fs::create_dir(root.path().join("src")).expect("a directory");
    fs::write(root.path().join("src/lib.rs"), "\nmod gone;\n").expect("a file");
    let error = Crate::read(root.path(), Path::new(""), "it").err().expect("it fails");
    assert_eq!(error.to_string(), "src/lib.rs:2: module gone has no file");
}
