//! The parts of a Markdown page that cite other documents or can be cited.

use std::collections::BTreeSet;

use pulldown_cmark::{Event, HeadingLevel, Options, Parser, Tag, TagEnd};

use super::paragraph::Paragraph;

#[derive(Default)]
pub(super) struct Page {
    /// The anchors that GitHub makes from the headings.
    pub(super) anchors: BTreeSet<String>,
    /// The numbers at the start of headings, rows and list items.
    pub(super) labels: BTreeSet<String>,
    /// Links into the repository.
    pub(super) links: Vec<Link>,
    /// Paragraphs, headings, list items and table rows, without code blocks.
    pub(super) paragraphs: Vec<Paragraph>,
}

pub(super) struct Link {
    pub(super) target: String,
    pub(super) line: usize,
}

/// The state of the parser.
#[derive(Default)]
struct State {
    now: Paragraph,
    heading: Option<HeadingLevel>,
    is_code: bool,
    /// The cells of this row so far.
    cells: usize,
    /// The number of the next item of the list.
    items: Vec<Option<u64>>,
    links: Vec<String>,
}

impl Page {
    pub(super) fn parse(text: &str) -> Self {
        let mut page = Self::default();
        let mut state = State::default();
        for (event, range) in Parser::new_ext(text, Options::ENABLE_TABLES).into_offset_iter() {
            let line = text[..range.start].matches('\n').count() + 1;
            match event {
                Event::Start(tag) => page.start(&mut state, &tag, line),
                Event::End(tag) => page.end(&mut state, tag, line),
                Event::Text(words) if !state.is_code => state.now.push(&words, line),
                Event::Code(words) => state.now.push(&format!("`{words}`"), line),
                Event::SoftBreak | Event::HardBreak => state.now.push(" ", line),
                _ => {}
            }
        }
        page
    }

    fn start(&mut self, state: &mut State, tag: &Tag<'_>, line: usize) {
        match tag {
            Tag::Heading { level, .. } => {
                self.next(state);
                state.heading = Some(*level);
            }
            Tag::Paragraph | Tag::TableHead | Tag::TableRow => {
                self.next(state);
                state.cells = 0;
            }
            Tag::List(first) => state.items.push(*first),
            Tag::Item => {
                self.next(state);
                if let Some(Some(number)) = state.items.last_mut() {
                    self.labels.insert(number.to_string());
                    *number += 1;
                }
            }
            Tag::CodeBlock(_) => state.is_code = true,
            Tag::Link { dest_url, .. } => {
                let is_outside = dest_url.contains("://") || dest_url.starts_with("mailto:");
                if !is_outside {
                    self.links.push(Link { target: dest_url.to_string(), line });
                }
                state.links.push(if is_outside { String::new() } else { dest_url.to_string() });
            }
            _ => {}
        }
    }

    fn end(&mut self, state: &mut State, tag: TagEnd, line: usize) {
        match tag {
            TagEnd::Heading(_) => {
                let anchor = self.unused(&anchor(&state.now.text));
                self.anchors.insert(anchor);
                self.labels.extend(label(&state.now.text));
                self.next(state);
                state.heading = None;
            }
            TagEnd::TableCell => {
                if state.cells == 0 {
                    self.labels.extend(label(&state.now.text));
                }
                state.cells += 1;
                state.now.push(" | ", line);
            }
            TagEnd::List(_) => drop(state.items.pop()),
            TagEnd::Paragraph | TagEnd::TableRow | TagEnd::TableHead | TagEnd::Item => {
                self.next(state);
            }
            TagEnd::CodeBlock => state.is_code = false,
            // A citation beside a link then has the page's name in its text.
            TagEnd::Link => match state.links.pop() {
                Some(target) if !target.is_empty() => state.now.push(&format!(" <{target}>"), line),
                _ => {}
            },
            _ => {}
        }
    }

    fn next(&mut self, state: &mut State) {
        let paragraph = std::mem::take(&mut state.now);
        if !paragraph.text.trim().is_empty() {
            self.paragraphs.push(paragraph);
        }
    }

    /// A second heading of the same words gets a number.
    fn unused(&self, anchor: &str) -> String {
        let numbered = (1..).map(|number| format!("{anchor}-{number}"));
        let mut names = std::iter::once(anchor.to_owned()).chain(numbered);
        names.find(|name| !self.anchors.contains(name)).unwrap_or_default()
    }
}

fn anchor(heading: &str) -> String {
    let kept = |c: &char| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_');
    heading
        .trim()
        .to_lowercase()
        .chars()
        .filter(kept)
        .map(|c| if c == ' ' { '-' } else { c })
        .collect()
}

/// The number at the start of a heading or a cell, also after a word such as "Table".
fn label(text: &str) -> Option<String> {
    let mut words = text.split_whitespace().map(|word| word.trim_end_matches(['.', ':', ',']));
    let is_number = |word: &&str| word.starts_with(|c: char| c.is_ascii_digit());
    let first = words.next()?;
    if is_number(&first) {
        return Some(first.to_owned());
    }
    let is_kind = ["row", "section", "table"].contains(&first.to_lowercase().as_str());
    words.next().filter(is_number).filter(|_| is_kind).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: &str = "\
# One: `two` & three
[a](b.md#c) of [x](https://example.org/y.md)

## 7. Same
## 7. Same
| row | what |
|---|---|
| 7.1 | first |

1. item
2. item

```
[no](link.md)
```
";

    #[test]
    fn a_page_has_the_anchors_of_its_headings() {
        let page = Page::parse(PAGE);
        let anchors: Vec<&str> = page.anchors.iter().map(String::as_str).collect();
        assert_eq!(anchors, ["7-same", "7-same-1", "one-two--three"]);
    }

    #[test]
    fn numbers_of_headings_rows_and_items_can_be_cited() {
        let page = Page::parse(PAGE);
        let labels: Vec<&str> = page.labels.iter().map(String::as_str).collect();
        assert_eq!(labels, ["1", "2", "7", "7.1"]);
    }

    #[test]
    fn links_into_the_repository_are_found_with_their_lines() {
        let page = Page::parse(PAGE);
        assert_eq!(page.links.len(), 1);
        assert_eq!((page.links[0].target.as_str(), page.links[0].line), ("b.md#c", 2));
        assert_eq!(page.paragraphs[1].text, "a <b.md#c> of x");
    }
}
