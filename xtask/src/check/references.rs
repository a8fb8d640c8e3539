//! Checks that each cited document exists, and has the cited heading or row.
//!
//! - A link of a Markdown page leads to a file, and to a heading of it.
//! - A page named in the source or in a page (`docs/get.md`) is a file, seen from the root of the
//!   repository or from where it is named. So is a source file that a page names; there the end
//!   of its path will do (`balance/open.rs`).
//! - "row 3.4", "table 4" and "section 7" are in the same paragraph as the page, RFC or KEP that
//!   has them. A page of this repository has what is cited of it. A page that cites no other
//!   document means itself.
//! - No words are used for documents that nobody can read ("the design page").

mod page;
mod paragraph;
mod prose;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::workspace::Workspace;
use page::Page;
use paragraph::Paragraph;

/// Directories that are not part of this repository.
const SKIPPED: [&str; 3] = ["target", ".git", "node_modules"];
/// Files whose text is read, by the end of their names.
const SOURCES: [&str; 5] = ["rs", "toml", "yaml", "yml", "sh"];
/// This check, which has examples that break its rules.
const OWN: [&str; 2] = ["xtask/src/check/references", "xtask/src/check/references.rs"];

pub(super) fn check(workspace: &Workspace) -> Result<String> {
    let findings = Repository::read(workspace.root())?.findings();
    if findings.is_empty() {
        return Ok(String::new());
    }
    bail!("{}", findings.join("\n"))
}

/// The paths of all files, and the content of pages and sources.
struct Repository {
    files: Vec<PathBuf>,
    pages: BTreeMap<PathBuf, Page>,
    sources: BTreeMap<PathBuf, String>,
}

impl Repository {
    fn read(root: &Path) -> Result<Self> {
        let mut repository =
            Self { files: Vec::new(), pages: BTreeMap::new(), sources: BTreeMap::new() };
        repository.walk(root, Path::new(""))?;
        Ok(repository)
    }

    fn walk(&mut self, root: &Path, dir: &Path) -> Result<()> {
        let list = || format!("cannot list {}", dir.display());
        for entry in fs::read_dir(root.join(dir)).with_context(list)? {
            let entry = entry.with_context(list)?;
            let path = dir.join(entry.file_name());
            if entry.file_type().with_context(list)?.is_dir() {
                if !SKIPPED.iter().any(|skipped| entry.file_name() == *skipped) {
                    self.walk(root, &path)?;
                }
                continue;
            }
            let extension = path.extension().and_then(|end| end.to_str()).unwrap_or_default();
            let is_page = extension == "md";
            if is_page
                || (SOURCES.contains(&extension) && !OWN.iter().any(|own| path.starts_with(own)))
            {
                let text = fs::read_to_string(root.join(&path))
                    .with_context(|| format!("cannot read {}", path.display()))?;
                if is_page {
                    self.pages.insert(path.clone(), Page::parse(&text));
                } else {
                    self.sources.insert(path.clone(), text);
                }
            }
            self.files.push(path);
        }
        Ok(())
    }

    fn findings(&self) -> Vec<String> {
        let mut findings = Vec::new();
        for (path, page) in &self.pages {
            for link in &page.links {
                findings.extend(self.link(path, link));
            }
            for paragraph in &page.paragraphs {
                findings.extend(self.paragraph(path, paragraph, Some(page)));
            }
        }
        for (path, text) in &self.sources {
            let comment = if path.extension().is_some_and(|end| end == "rs") { "//" } else { "#" };
            for paragraph in paragraph::of_comments(text, comment) {
                findings.extend(self.paragraph(path, &paragraph, None));
            }
            for paragraph in paragraph::of_code(text, comment) {
                findings.extend(self.pages_named(path, &paragraph));
            }
        }
        findings
    }

    fn link(&self, from: &Path, link: &page::Link) -> Option<String> {
        let (file, anchor) = match link.target.split_once('#') {
            Some((file, anchor)) => (file, Some(anchor)),
            None => (link.target.as_str(), None),
        };
        let at = format!("{}:{}", from.display(), link.line);
        let target = if file.is_empty() {
            Some(from.to_path_buf())
        } else {
            let path = normal(&from.parent().unwrap_or(Path::new("")).join(file));
            let is_there = |path: &PathBuf| self.files.iter().any(|there| there.starts_with(path));
            path.filter(is_there)
        };
        let Some(target) = target else {
            return Some(format!("{at}: the target of the link `{}` does not exist", link.target));
        };
        let page = self.pages.get(&target)?;
        let anchor = anchor?;
        (!page.anchors.contains(anchor)).then(|| {
            format!("{at}: {} has no heading `#{anchor}`: correct the anchor", target.display())
        })
    }

    fn paragraph(&self, from: &Path, paragraph: &Paragraph, own: Option<&Page>) -> Vec<String> {
        let mut findings = self.pages_named(from, paragraph);
        if own.is_some() {
            findings.extend(self.sources_named(from, paragraph));
        }
        for (offset, phrase, instead) in prose::nowhere(from, &paragraph.text) {
            let at = paragraph.at(from, offset);
            findings.push(format!(
                "{at}: \"{phrase}\" is not a document of this repository: {instead}"
            ));
        }
        for number in prose::numbers(&paragraph.text) {
            let at = paragraph.at(from, number.offset);
            let page = match &number.source {
                prose::Source::Outside => continue,
                prose::Source::Page(name) => {
                    self.resolve(from, name).and_then(|path| self.pages.get(&path))
                }
                prose::Source::None if own.is_none() => {
                    findings.push(format!(
                        "{at}: \"{}\" does not say of which page: name it in the same paragraph",
                        number.text
                    ));
                    continue;
                }
                prose::Source::None => own,
            };
            // A page that is not there is a finding of its own.
            let Some(page) = page else { continue };
            for label in number.labels.iter().filter(|label| !page.labels.contains(*label)) {
                findings.push(format!(
                    "{at}: \"{}\": that page has no heading or row {label}",
                    number.text
                ));
            }
        }
        findings
    }

    fn pages_named(&self, from: &Path, paragraph: &Paragraph) -> Vec<String> {
        // What a link leads to is looked at as a link.
        let is_link = |offset: usize| paragraph.text[..offset].ends_with('<');
        let named = prose::files(&paragraph.text, ".md").filter(|(offset, _)| !is_link(*offset));
        let lost = named.filter(|(_, name)| self.resolve(from, name).is_none());
        lost.map(|(offset, name)| {
            let at = paragraph.at(from, offset);
            format!("{at}: {name} does not exist: give the path from the repository's root")
        })
        .collect()
    }

    fn sources_named(&self, from: &Path, paragraph: &Paragraph) -> Vec<String> {
        let named = prose::files(&paragraph.text, ".rs");
        let lost = named.filter(|(_, name)| !self.files.iter().any(|file| file.ends_with(name)));
        lost.map(|(offset, name)| {
            let at = paragraph.at(from, offset);
            format!("{at}: no source file has a path that ends in {name}")
        })
        .collect()
    }

    /// The page that a name means, from the root or from the file that names it.
    fn resolve(&self, from: &Path, name: &str) -> Option<PathBuf> {
        let beside = from.parent().unwrap_or(Path::new("")).join(name);
        [PathBuf::from(name), beside]
            .iter()
            .filter_map(|path| normal(path))
            .find(|path| self.pages.contains_key(path))
    }
}

/// Without `.` and `..`; none where it leaves the repository.
fn normal(path: &Path) -> Option<PathBuf> {
    let mut normal = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => normal.push(name),
            Component::CurDir => {}
            Component::ParentDir if normal.pop() => {}
            _ => return None,
        }
    }
    Some(normal)
}

#[cfg(test)]
mod tests;
