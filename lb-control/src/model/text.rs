//! Text that a tenant wrote, made fit for a log, an Event and a terminal.

use std::fmt;

/// The most bytes of such a text that are kept or shown.
pub const MAX_SHOWN: usize = 128;

/// A text between quotation marks, [cut](Cut).
#[derive(Clone, Copy, Debug)]
pub struct Quoted<'a>(pub &'a str);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "\"{}\"", Cut(self.0))
    }
}

/// A text that is [clean](Clean) and cut to [`MAX_SHOWN`] bytes.
#[derive(Clone, Copy, Debug)]
pub struct Cut<'a>(pub &'a str);

impl fmt::Display for Cut<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cut = &self.0[..self.0.floor_char_boundary(MAX_SHOWN)];
        let more = if cut.len() < self.0.len() { "…" } else { "" };
        write!(formatter, "{}{more}", Clean(cut))
    }
}

/// A text whose control characters, and characters that change the direction of what follows, are
/// written as escapes: it cannot move the cursor, colour a terminal, or end a line.
#[derive(Clone, Copy, Debug)]
pub struct Clean<'a>(pub &'a str);

impl fmt::Display for Clean<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = self.0;
        while let Some(at) = rest.find(is_unsafe) {
            let (clean, from) = rest.split_at(at);
            formatter.write_str(clean)?;
            let mut characters = from.chars();
            if let Some(character) = characters.next() {
                write!(formatter, "{}", character.escape_default())?;
            }
            rest = characters.as_str();
        }
        formatter.write_str(rest)
    }
}

/// Whether a character does something to a terminal instead of being shown.
fn is_unsafe(character: char) -> bool {
    character.is_control()
        || matches!(character,
            '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_become_escapes_and_long_texts_are_cut() {
        for (text, shown) in [
            ("web", "\"web\""),
            ("grün 100 %", "\"grün 100 %\""),
            ("\x1b[2J\x07", r#""\u{1b}[2J\u{7}""#),
            ("a\r\nlb-agent: all is well", r#""a\r\nlb-agent: all is well""#),
            ("a\u{9b}31m\u{202e}b", r#""a\u{9b}31m\u{202e}b""#),
            ("", "\"\""),
        ] {
            assert_eq!(Quoted(text).to_string(), shown);
        }
        let long = format!("{}é{}", "x".repeat(127), "y".repeat(100_000));
        assert_eq!(Quoted(&long).to_string(), format!("\"{}…\"", "x".repeat(127)));
    }
}
