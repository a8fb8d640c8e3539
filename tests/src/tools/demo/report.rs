//! The printed form: titles, aligned tables, and the number of broken promises.

use std::io::{IsTerminal, Write};

use comfy_table::{Attribute, Cell, Color, ContentArrangement, presets};

/// Prints the demo and counts its checks.
#[derive(Debug, Default)]
pub struct Report {
    rows: usize,
    failed: usize,
}

/// Rows that each end in `ok` or `FAILED`.
#[derive(Debug)]
pub(super) struct Table {
    table: comfy_table::Table,
    rows: usize,
    failed: usize,
}

impl Table {
    pub(super) fn new(columns: &[&str]) -> Self {
        let mut table = comfy_table::Table::new();
        table.load_style(presets::NOTHING);
        table.set_content_arrangement(ContentArrangement::Disabled);
        let bold = |title: &&str| Cell::new(title).add_attribute(Attribute::Bold);
        table.set_header(columns.iter().map(bold).chain([Cell::new("")]));
        Self { table, rows: 0, failed: 0 }
    }

    pub(super) fn row(&mut self, cells: &[&str], is_as_promised: bool) {
        let verdict = if is_as_promised {
            Cell::new("ok").fg(Color::Green)
        } else {
            Cell::new("FAILED").fg(Color::Red)
        };
        self.table.add_row(cells.iter().map(Cell::new).chain([verdict]));
        self.rows += 1;
        self.failed += usize::from(!is_as_promised);
    }
}

impl Report {
    /// Prints text.
    pub fn line(&mut self, text: &str) {
        // Cleaning up must not depend on whether the output is still read.
        let mut output = std::io::stdout().lock();
        writeln!(output, "{}", text.trim_end()).and_then(|()| output.flush()).ok();
    }

    pub(super) fn title(&mut self, text: &str) {
        if std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none() {
            self.line(&format!("\n\x1b[1m{text}\x1b[0m"));
        } else {
            self.line(&format!("\n{text}"));
        }
    }

    pub(super) fn table(&mut self, mut table: Table) {
        for column in table.table.column_iter_mut() {
            column.set_padding((0, 2));
        }
        self.line(&table.table.trim_fmt());
        self.rows += table.rows;
        self.failed += table.failed;
    }

    /// The last line.
    pub fn summary(&mut self) {
        let (rows, failed) = (self.rows, self.failed);
        match failed {
            0 => self.line(&format!("\nall {rows} checks as promised")),
            _ => self.line(&format!("\n{failed} of {rows} checks FAILED")),
        }
    }

    /// Whether every row so far was as promised.
    pub fn is_as_promised(&self) -> bool {
        self.failed == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_row_that_is_not_as_promised_spoils_the_report() {
        let mut report = Report::default();
        for (is_as_promised, is_good) in [(true, true), (false, false), (true, false)] {
            let mut table = Table::new(&["called"]);
            table.row(&["near"], is_as_promised);
            report.table(table);
            assert_eq!(report.is_as_promised(), is_good, "after {is_as_promised}");
        }
        assert_eq!((report.rows, report.failed), (3, 1));
    }
}
