//! Paragraphs, with the line of each part.

use std::path::Path;

use super::super::source::at;

/// A paragraph as one line of text, with the offset and the source line of each part.
#[derive(Default)]
pub(super) struct Paragraph {
    pub(super) text: String,
    pieces: Vec<(usize, usize)>,
}

impl Paragraph {
    /// Adds text that starts on this line.
    pub(super) fn push(&mut self, text: &str, line: usize) {
        for (index, piece) in text.split('\n').enumerate() {
            self.pieces.push((self.text.len(), line + index));
            self.text.push_str(piece);
        }
    }

    /// `FILE:LINE` of the text at this offset.
    pub(super) fn at(&self, file: &Path, offset: usize) -> String {
        let before = self.pieces.iter().rev().find(|(start, _)| *start <= offset);
        at(file, before.map_or(1, |(_, line)| *line))
    }
}

/// The comments of a source file: each run of comment lines is one paragraph.
pub(super) fn of_comments(text: &str, marker: &str) -> Vec<Paragraph> {
    let mut paragraphs = vec![Paragraph::default()];
    for (index, line) in text.lines().enumerate() {
        let comment = split(line, marker).1;
        let words = comment.trim_start_matches(['/', '!', '#']).trim();
        if words.is_empty() {
            paragraphs.push(Paragraph::default());
        } else if let Some(paragraph) = paragraphs.last_mut() {
            paragraph.push(words, index + 1);
            paragraph.text.push(' ');
        }
    }
    paragraphs.retain(|paragraph| !paragraph.text.is_empty());
    paragraphs
}

/// Each line without its comment.
pub(super) fn of_code(text: &str, marker: &str) -> Vec<Paragraph> {
    let lines = text.lines().enumerate();
    lines
        .map(|(index, line)| {
            let mut paragraph = Paragraph::default();
            paragraph.push(split(line, marker).0, index + 1);
            paragraph
        })
        .collect()
}

/// The code and the comment of a line. A comment marker between quotes is ignored.
fn split<'a>(line: &'a str, marker: &str) -> (&'a str, &'a str) {
    let begins = |&(offset, _): &(usize, &str)| {
        let before = &line[..offset];
        (before.trim().is_empty() || before.ends_with(' '))
            && before.matches('"').count().is_multiple_of(2)
    };
    match line.match_indices(marker).find(begins) {
        Some((offset, _)) => line.split_at(offset),
        None => (line, ""),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_are_joined_and_know_their_lines() {
        let text = "//! One\n//! two.\n//!\n//! Three.\nfn f() {} // four\nlet a = \"// no\";\n";
        let paragraphs = of_comments(text, "//");
        let texts: Vec<&str> = paragraphs.iter().map(|found| found.text.trim()).collect();
        assert_eq!(texts, ["One two.", "Three. four"]);
        let two = paragraphs[0].text.find("two").expect("it is there");
        assert_eq!(paragraphs[0].at(Path::new("a.rs"), two), "a.rs:2");
        assert_eq!(of_code(text, "//")[5].text, "let a = \"// no\";");
    }
}
