//! Finds citations in a paragraph.

use std::path::Path;
use std::sync::LazyLock;

use regex_lite::Regex;

/// Words for documents that are not in the repository, the files where the words mean something
/// else, and what to write instead.
const NOWHERE: [(&str, &[&str], &str); 2] = [
    (r"(?i)\bdesign (page|document|note)s?\b", &[], "cite a page of docs/"),
    (
        r"(?i)\b(in|of|by|from|than) the plan\b|\bthe plan('s|’s| says| names| wants| asks| reckon)",
        // In these files, a plan is a list of writes.
        &["lb-agent", "lb-control", "docs/contract.md"],
        "a target is in docs/performance.md",
    ),
];

/// The document that has a cited number.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// A page, by its name in the text.
    Page(String),
    /// An RFC or a KEP.
    Outside,
    /// No document is named in the paragraph.
    None,
}

/// "row 3.4", "tables 3 and 4", "sections 1 to 3".
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Number {
    pub(super) offset: usize,
    pub(super) text: String,
    pub(super) labels: Vec<String>,
    pub(super) source: Source,
}

fn regex(pattern: &str) -> Regex {
    // The patterns are constants, which the tests of this file compile.
    #[expect(clippy::unwrap_used, reason = "a constant")]
    Regex::new(pattern).unwrap()
}

static NUMBERS: LazyLock<Regex> = LazyLock::new(|| {
    regex(
        r"(?i)\b(?:row|section|table)s? (\d+(?:\.\d+)*[a-z]?\b(?:(?:,| and| to| or|, and)? \d+(?:\.\d+)*[a-z]?\b)*)",
    )
});
static LABEL: LazyLock<Regex> = LazyLock::new(|| regex(r"\d+(?:\.\d+)*[a-z]?"));
static CITED: LazyLock<Regex> =
    LazyLock::new(|| regex(r"\bRFC \d+|\bKEP-\d+|[A-Za-z0-9_./-]*[A-Za-z0-9_-]\.md\b"));
static OF: LazyLock<Regex> = LazyLock::new(|| regex(r"^\W*(?:of|in)\b[^.;]*$"));
static NOWHERE_FOUND: LazyLock<Vec<Regex>> =
    LazyLock::new(|| NOWHERE.iter().map(|(pattern, ..)| regex(pattern)).collect());

/// Names of files with the suffix `end`, with their offsets. Patterns, parts of URLs, and files
/// that are followed by the name of a test are left out.
pub(super) fn files(text: &str, end: &'static str) -> impl Iterator<Item = (usize, String)> {
    let is_of_name = |c: char| c.is_alphanumeric() || "_./-*{}<>$…:".contains(c);
    let mut found = Vec::new();
    for (offset, _) in text.match_indices(end) {
        let after = &text[offset + end.len()..];
        if after.starts_with(|c: char| c.is_alphanumeric() || c == '_') || after.starts_with("::") {
            continue;
        }
        let start = text[..offset].rfind(|c| !is_of_name(c));
        let start = start.map_or(0, |at| at + text[at..].chars().next().map_or(1, char::len_utf8));
        let before = &text[start..offset];
        let name = before.trim_start_matches(['<', ':']);
        let is_pattern = name.is_empty() || name.contains(['*', '{', '}', '<', '>', '$', '…', ':']);
        if !is_pattern && !name.ends_with('/') {
            let start = offset - name.len();
            found.push((start, format!("{name}{end}")));
        }
    }
    found.into_iter()
}

/// Words for documents that are not in the repository: offset, words, and what to write instead.
pub(super) fn nowhere(from: &Path, text: &str) -> Vec<(usize, String, &'static str)> {
    let mut found = Vec::new();
    for ((_, exempt, instead), regex) in NOWHERE.iter().zip(NOWHERE_FOUND.iter()) {
        if exempt.iter().any(|path| from.starts_with(path)) {
            continue;
        }
        let all = regex.find_iter(text).filter(|words| !is_code(text, words.start()));
        found.extend(all.map(|words| (words.start(), words.as_str().to_owned(), *instead)));
    }
    found
}

/// Numbers of rows, sections and tables, each with the document that has it: the one after "of",
/// else the last one before the number, else the next one.
pub(super) fn numbers(text: &str) -> Vec<Number> {
    let cited: Vec<_> = CITED.find_iter(text).collect();
    let mut numbers = Vec::new();
    for words in NUMBERS.captures_iter(text) {
        let (Some(all), Some(list)) = (words.get(0), words.get(1)) else { continue };
        if is_code(text, all.start()) {
            continue;
        }
        let next = cited.iter().find(|cited| cited.start() >= all.end());
        let before = cited.iter().rev().find(|cited| cited.end() <= all.start());
        let of = next.filter(|next| OF.is_match(&text[all.end()..next.start()]));
        let source = match of.or(before).or(next).map(|cited| cited.as_str()) {
            None => Source::None,
            Some(page) if page.ends_with(".md") => Source::Page(page.to_owned()),
            Some(_) => Source::Outside,
        };
        numbers.push(Number {
            offset: all.start(),
            text: all.as_str().to_owned(),
            labels: LABEL.find_iter(list.as_str()).map(|label| label.as_str().to_owned()).collect(),
            source,
        });
    }
    numbers
}

/// Whether this is between backticks.
fn is_code(text: &str, offset: usize) -> bool {
    text[..offset].matches('`').count() % 2 == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Vec<(Vec<String>, Source)> {
        numbers(text).into_iter().map(|number| (number.labels, number.source)).collect()
    }

    #[test]
    fn a_number_belongs_to_the_document_beside_it() {
        let page = |name: &str| Source::Page(name.to_owned());
        let labels = |list: &[&str]| list.iter().map(|label| (*label).to_owned()).collect();
        let cases = [
            ("docs/a.md, row 3.4b: yes.", labels(&["3.4b"]), page("docs/a.md")),
            ("Rows 3.4 to 3.9 of `a.md`, by b.md.", labels(&["3.4", "3.9"]), page("a.md")),
            ("See x.md. Tables 1, 2 and 3 of [y](y.md)", labels(&["1", "2", "3"]), page("y.md")),
            ("The sum (RFC 9293 section 3.1).", labels(&["3.1"]), Source::Outside),
            ("KEP-1880, section 2", labels(&["2"]), Source::Outside),
            ("Row 7: what a packet costs.", labels(&["7"]), Source::None),
        ];
        for (text, labels, source) in cases {
            assert_eq!(of(text), [(labels, source)], "{text}");
        }
        assert_eq!(of("`ip route table 7` and 3 rows"), []);
    }

    #[test]
    fn names_of_files_are_found_and_patterns_are_not() {
        let text = "(docs/a.md), `b/c.md` <../d.md#e>: https://x.org/f.md docs/*.md {g}.md h.mdx .md i.md::j";
        let names: Vec<String> = files(text, ".md").map(|(_, name)| name).collect();
        assert_eq!(names, ["docs/a.md", "b/c.md", "../d.md"]);
    }

    #[test]
    fn documents_that_are_nowhere_have_no_name() {
        let words = |from: &str, text| nowhere(Path::new(from), text).len();
        assert_eq!(words("tests/a.rs", "limits of the plan, as the design page says"), 2);
        assert_eq!(words("lb-agent/src/a.rs", "the writes of the plan"), 0);
        assert_eq!(words("README.md", "`the plan's` name; a plan is made"), 0);
    }
}
