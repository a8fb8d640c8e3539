//! Checks that docs/get.md lists exactly the columns that `lb-agent get` prints, in their order.
//!
//! The columns are the fields of the structs that `get` serialises, read from the source. The page
//! lists them between backticks in the first cells of the first table of each section.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use syn::visit::{self, Visit};
use syn::{Attribute, Field, ItemStruct};

use super::source::at;
use crate::workspace::Workspace;

const PAGE: &str = "docs/get.md";
/// The name of the agent's file and directory that define the rows.
const ROOM: &str = "get";
const AGENT: &str = "lb-agent/src";
/// The struct of a row, and the section of the page that lists its fields.
const ROWS: [(&str, &str); 6] = [
    ("ServiceRow", "services"),
    ("FrontendRow", "frontends"),
    ("BackendRow", "backends"),
    ("FlowRow", "flows"),
    ("AffinityRow", "affinity"),
    ("CounterRow", "counters"),
];

/// What is printed of one row.
struct Row {
    file: PathBuf,
    line: usize,
    columns: Vec<Column>,
}

/// The name of a column, and the line that it is on.
type Column = (String, usize);

pub(super) fn check(workspace: &Workspace) -> Result<String> {
    let root = workspace.root();
    let page =
        fs::read_to_string(root.join(PAGE)).with_context(|| format!("cannot read {PAGE}"))?;
    let mut files = Vec::new();
    sources(root, Path::new(AGENT), false, &mut files)?;
    let mut rows = BTreeMap::new();
    for file in files {
        let text = fs::read_to_string(root.join(&file))
            .with_context(|| format!("cannot read {}", file.display()))?;
        rows.extend(read(&file, &text)?);
    }
    let findings = findings(&page, &rows);
    if findings.is_empty() {
        return Ok(String::new());
    }
    bail!("{}", findings.join("\n"))
}

/// The source files of `get`, wherever it is in the agent.
fn sources(root: &Path, dir: &Path, is_inside: bool, found: &mut Vec<PathBuf>) -> Result<()> {
    let list = || format!("cannot list {}", dir.display());
    for entry in fs::read_dir(root.join(dir)).with_context(list)? {
        let entry = entry.with_context(list)?;
        let path = dir.join(entry.file_name());
        let is_get = is_inside || path.file_stem().is_some_and(|name| name == ROOM);
        if entry.file_type().with_context(list)?.is_dir() {
            sources(root, &path, is_get, found)?;
        } else if is_get && path.extension().is_some_and(|end| end == "rs") {
            found.push(path);
        }
    }
    Ok(())
}

fn read(file: &Path, text: &str) -> Result<BTreeMap<String, Row>> {
    let syntax =
        syn::parse_file(text).with_context(|| format!("cannot read {}", file.display()))?;
    let mut structs = Structs { file, rows: BTreeMap::new() };
    structs.visit_file(&syntax);
    Ok(structs.rows)
}

fn findings(page: &str, rows: &BTreeMap<String, Row>) -> Vec<String> {
    let mut findings = Vec::new();
    for (name, section) in ROWS {
        let Some(row) = rows.get(name) else {
            findings.push(format!("{AGENT}: `get` has no struct {name} for {PAGE}#{section}"));
            continue;
        };
        let listed = fields(page, section);
        for (column, line) in &row.columns {
            if !listed.contains(column) {
                let at = at(&row.file, *line);
                findings
                    .push(format!("{at}: {PAGE} has no `{column}` under \"{section}\": add it"));
            }
        }
        let columns: Vec<&String> = row.columns.iter().map(|(column, _)| column).collect();
        for field in listed.iter().filter(|field| !columns.contains(field)) {
            findings.push(format!(
                "{PAGE}: `{field}` under \"{section}\" is not a column of {name}: remove it"
            ));
        }
        if findings.is_empty() && !listed.iter().eq(columns) {
            let at = at(&row.file, row.line);
            findings.push(format!("{at}: {PAGE} lists the fields of {name} in another order"));
        }
    }
    let known = |name: &String| ROWS.iter().any(|(listed, _)| listed == name);
    for (name, row) in rows.iter().filter(|(name, _)| name.ends_with("Row") && !known(name)) {
        let at = at(&row.file, row.line);
        findings.push(format!(
            "{at}: {name} has no section in {PAGE}: add it to the table in xtask's columns.rs"
        ));
    }
    findings
}

/// The fields in the first table of a section.
fn fields(page: &str, section: &str) -> Vec<String> {
    let heading = format!("## {section}");
    let lines = page.lines().skip_while(|line| line.trim_end() != heading).skip(1);
    let table = lines
        .take_while(|line| !line.starts_with("## "))
        .skip_while(|line| !line.starts_with('|'))
        .take_while(|line| line.starts_with('|'));
    let first_cells = table.filter_map(|line| line.split('|').nth(1));
    first_cells.flat_map(|cell| cell.split('`').skip(1).step_by(2)).map(str::to_owned).collect()
}

/// Structs that are serialised, by their names.
struct Structs<'a> {
    file: &'a Path,
    rows: BTreeMap<String, Row>,
}

impl<'ast> Visit<'ast> for Structs<'_> {
    fn visit_item_struct(&mut self, item: &'ast ItemStruct) {
        if words(&item.attrs, "derive").any(|word| word == "Serialize") {
            let row = Row {
                file: self.file.to_path_buf(),
                line: item.ident.span().start().line,
                columns: item.fields.iter().filter_map(column).collect(),
            };
            self.rows.insert(item.ident.to_string(), row);
        }
        visit::visit_item_struct(self, item);
    }

    /// Rows of tests are not printed.
    fn visit_item_mod(&mut self, _: &'ast syn::ItemMod) {}
}

/// What serde calls a field; nothing if it leaves it out.
fn column(field: &Field) -> Option<Column> {
    let ident = field.ident.as_ref()?;
    let serde: Vec<String> = words(&field.attrs, "serde").collect();
    if serde.iter().any(|word| word == "skip") {
        return None;
    }
    let renamed = serde.iter().position(|word| word == "rename").and_then(|at| serde.get(at + 1));
    Some((renamed.cloned().unwrap_or_else(|| ident.to_string()), ident.span().start().line))
}

/// The words of an attribute's arguments.
fn words<'a>(attributes: &'a [Attribute], name: &'a str) -> impl Iterator<Item = String> + 'a {
    let lists = attributes.iter().filter_map(move |attribute| match &attribute.meta {
        syn::Meta::List(list) if list.path.is_ident(name) => Some(list.tokens.to_string()),
        _ => None,
    });
    lists.flat_map(|tokens| {
        let words = tokens.split(|c: char| !c.is_alphanumeric() && c != '_');
        words.filter(|word| !word.is_empty()).map(str::to_owned).collect::<Vec<_>>()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A page and a source that agree on this section, with one row for each of the others.
    fn agreeing() -> (String, String) {
        let mut page = "# Page\n".to_owned();
        let mut source = String::new();
        for (name, section) in ROWS {
            page += &format!("\n## {section}\n| field | |\n|---|---|\n| `a`, `b` | |\n| `c` | |\n");
            source +=
                &format!("#[derive(Serialize)]\npub struct {name} {{ a: u8, b: u8,\nc: u8 }}\n");
        }
        (page, source)
    }

    fn judged(page: &str, source: &str) -> Vec<String> {
        let rows = read(Path::new("get.rs"), source).expect("it parses");
        findings(page, &rows)
    }

    #[test]
    fn a_page_with_all_columns_in_order_is_fine() {
        let (page, source) = agreeing();
        assert!(judged(&page, &source).is_empty());
        let renamed = source.replacen("c: u8", "#[serde(rename = \"c\")] x: u8", 1);
        assert!(judged(&page, &renamed).is_empty());
    }

    #[test]
    fn a_column_that_the_page_lacks_is_named() {
        let (page, source) = agreeing();
        let source = source.replacen("c: u8", "c: u8, d: u8", 1);
        let expected = "get.rs:3: docs/get.md has no `d` under \"services\": add it";
        assert_eq!(judged(&page, &source), [expected]);
    }

    #[test]
    fn fields_that_are_no_columns_and_another_order_are_found() {
        let (page, source) = agreeing();
        let more = page.replacen("| `c` | |", "| `c` | |\n| `e` | |", 1);
        assert_eq!(
            judged(&more, &source),
            ["docs/get.md: `e` under \"services\" is not a column of ServiceRow: remove it"]
        );
        let turned = page.replacen("`a`, `b`", "`b`, `a`", 1);
        assert_eq!(
            judged(&turned, &source),
            ["get.rs:2: docs/get.md lists the fields of ServiceRow in another order"]
        );
    }

    #[test]
    fn rows_without_a_section_are_found() {
        let (page, source) = agreeing();
        let source = source + "#[derive(Serialize)] struct NodeRow { a: u8 }";
        assert_eq!(judged(&page, &source).len(), 1);
        assert_eq!(judged(&page, "").len(), ROWS.len());
    }
}
