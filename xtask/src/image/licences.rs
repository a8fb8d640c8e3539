//! The licences of what is linked: one file with the texts that the crates carry, each text once.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::contents::{Component, Origin};
use super::sbom::licence;

/// How files of licences begin.
const NAMES: [&str; 6] = ["LICENSE", "LICENCE", "COPYING", "COPYRIGHT", "NOTICE", "UNLICENSE"];
const RULE: &str = "\n----------------------------------------------------------------\n\n";

/// The file: a list of what is linked with the licence of each, then the texts.
pub(super) fn third_party(components: &[Component]) -> Result<String> {
    let mut list = String::from("lb-agent is linked to:\n\n");
    let mut texts: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for component in components {
        let title = format!("{} {}", component.name, component.version);
        let Some(licence) = licence(component).filter(|_| !is_own(component)) else { continue };
        let files = files(&component.licences)?;
        let note = if files.is_empty() { " (the crate has no file of it)" } else { "" };
        writeln!(list, "  {title}: {licence}{note}")?;
        for text in files {
            let titles = texts.entry(text).or_default();
            // A crate may have a text twice.
            if titles.last() != Some(&title) {
                titles.push(title.clone());
            }
        }
    }
    // By the crates: those that come first in the list have the first text.
    let mut texts: Vec<_> = texts.into_iter().map(|(text, titles)| (titles, text)).collect();
    texts.sort();
    let mut all = list;
    for (titles, text) in texts {
        all.push_str(RULE);
        writeln!(all, "{}:\n\n{}", titles.join(", "), text.trim_end())?;
    }
    Ok(all)
}

fn is_own(component: &Component) -> bool {
    matches!(component.origin, Origin::Crate { own: true, .. })
}

/// The texts of licences in a directory, by the names of their files.
fn files(dir: &Path) -> Result<Vec<String>> {
    let shown = || format!("cannot read {}", dir.display());
    let mut paths = Vec::new();
    for entry in fs::read_dir(dir).with_context(shown)? {
        let path = entry.with_context(shown)?.path();
        let name = path.file_name().map(|name| name.to_string_lossy().to_uppercase());
        let is_one = name.is_some_and(|name| NAMES.iter().any(|begin| name.starts_with(begin)));
        if path.is_file() && (is_one || dir.ends_with("licenses")) {
            paths.push(path);
        }
    }
    paths.sort();
    let read = |path: &std::path::PathBuf| {
        let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(String::from_utf8_lossy(&bytes).replace("\r\n", "\n"))
    };
    paths.iter().map(read).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_there_once_with_everything_that_has_it() {
        let root = tempfile::tempdir().expect("a directory");
        let component = |name: &str, own: bool, texts: &[(&str, &str)]| {
            let dir = root.path().join(name);
            fs::create_dir(&dir).expect("a directory");
            for (file, text) in texts {
                fs::write(dir.join(file), text).expect("a file");
            }
            Component {
                name: name.to_owned(),
                version: "1.0.0".to_owned(),
                origin: Origin::Crate { licence: "MIT".to_owned(), own },
                licences: dir,
            }
        };
        let components = [
            component("a", false, &[("LICENSE-MIT", "Text of a and b\n"), ("lib.rs", "code")]),
            component("b", false, &[("license.txt", "Text of a and b\n"), ("NOTICE", "Made by B")]),
            component("c", false, &[]),
            component("own", true, &[("LICENSE", "of lb")]),
        ];
        let text = third_party(&components).expect("a text");
        assert_eq!(text.matches("Text of a and b").count(), 1, "{text}");
        assert!(text.contains("a 1.0.0, b 1.0.0:\n\nText of a and b\n"), "{text}");
        assert!(text.contains("b 1.0.0:\n\nMade by B\n"), "{text}");
        assert!(text.contains("  c 1.0.0: MIT (the crate has no file of it)\n"), "{text}");
        assert!(!text.contains("code") && !text.contains("of lb"), "{text}");
    }
}
