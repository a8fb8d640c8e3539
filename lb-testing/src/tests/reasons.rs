//! The table of reasons: what follows from it, and the page that shows it. `LB_BLESS=1` writes the
//! page.

use std::{
    fs,
    path::{Path, PathBuf},
};

use lb_common::abi::counter::{Class, Reason};

fn path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("a workspace").join("docs/get.md")
}

const BEGIN: &str = "<!-- reasons: begin -->\n";
const END: &str = "<!-- reasons: end -->\n";

/// The part of `docs/get.md`: the classes, and a row for each reason.
fn tables() -> String {
    let mut text = "| class | packet or call |\n|---|---|\n".to_owned();
    for class in Class::ALL {
        text += &format!("| {} | {} |\n", class.name(), class.meaning());
    }
    text += "\n| reason | class | packet or call |\n|---|---|---|\n";
    for reason in Reason::ALL {
        let (name, class, meaning) = (reason.name(), reason.class().name(), reason.meaning());
        text += &format!("| `{name}` | {class} | {meaning} |\n");
    }
    text
}

#[test]
fn docs_get_shows_the_table_of_reasons() {
    let page = fs::read_to_string(path()).expect("docs/get.md can be read");
    let (before, rest) =
        page.split_once(BEGIN).expect("the page has a line that begins the tables");
    let (shown, after) = rest.split_once(END).expect("the page has a line that ends the tables");
    let tables = tables();
    if std::env::var_os("LB_BLESS").is_some() {
        let page = format!("{before}{BEGIN}{tables}{END}{after}");
        fs::write(path(), page).expect("docs/get.md can be written");
    } else {
        assert!(
            shown == tables,
            "the reasons in docs/get.md differ from lb-common/src/abi/counter.rs: \
             `LB_BLESS=1 cargo test -p lb-testing reasons` writes them"
        );
    }
}

#[test]
fn traffic_and_drops_count_what_their_classes_say() {
    let set = |bits: u64| -> Vec<&str> {
        let is_in = |reason: &&Reason| bits >> **reason as u32 & 1 != 0;
        Reason::ALL.iter().filter(is_in).map(|reason| reason.name()).collect()
    };
    assert_eq!(
        set(Reason::TRANSLATED),
        ["flow_created", "request", "reply", "icmp_translated"],
        "what TRAFFIC counts"
    );
    assert_eq!(
        set(Reason::REJECTED),
        [
            "no_endpoint",
            "no_local_endpoint",
            "source_not_allowed",
            "no_source_port",
            "flow_table_full",
            "no_node_address",
            "no_route",
            "too_big",
            "rewrite_failed",
            "table_inconsistent",
            "unasked_tunnel",
        ],
        "what DROPS counts"
    );
}

#[test]
fn a_meaning_is_one_cell_of_a_table_and_every_class_has_a_reason() {
    for reason in Reason::ALL {
        let meaning = reason.meaning();
        let is_plain = !meaning.contains(['|', '\n', '\\']) && !meaning.ends_with('.');
        assert!(is_plain && !meaning.is_empty(), "{}: {meaning}", reason.name());
    }
    for class in Class::ALL {
        assert!(Reason::ALL.iter().any(|reason| reason.class() == *class), "{}", class.name());
    }
}
