//! Checks that no `match` on a reason has a wildcard, so that a new reason must be handled in each
//! `match` explicitly instead of being dropped or passed by default.
//!
//! The check fails for a `match` with an arm that names a variant of such an enum, `Reason::X`, and
//! an arm that matches the rest of the enum: `_`, a name, `..`. `matches!` is allowed. clippy's
//! `wildcard_enum_match_arm` would demand this of all enums, including those of other crates.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use syn::visit::{self, Visit};
use syn::{ExprMatch, ImplItem, Item, ItemImpl, Pat, Path, Type};

use super::metadata::Metadata;
use super::source::{Crate, at, is_test_item, is_test_member};
use crate::workspace::Workspace;

/// Enums that must not be matched by a wildcard.
const ENUMS: [&str; 2] = ["Reason", "RefusalReason"];
/// Packages that are checked: those that are shipped.
const PACKAGES: [&str; 5] = ["lb-agent", "lb-common", "lb-control", "lb-ebpf", "lb-sys"];

pub(super) fn check(workspace: &Workspace) -> Result<String> {
    let root = workspace.root();
    let mut findings = Vec::new();
    let mut packages = Metadata::of(workspace)?.packages;
    packages.retain(|package| PACKAGES.contains(&package.name.as_str()));
    for package in packages {
        let parsed = Crate::read(root, &package.dir(root)?, &package.name)?;
        let files: BTreeSet<PathBuf> =
            parsed.modules.into_iter().map(|module| module.file).collect();
        for file in files {
            let text = fs::read_to_string(root.join(&file))
                .with_context(|| format!("cannot read {}", file.display()))?;
            for (line, name) in wildcards(&text)? {
                findings.push(format!(
                    "{}: a wildcard matches the remaining variants of {name}: list them, so that a \
                     new variant must be handled here",
                    at(&file, line)
                ));
            }
        }
    }
    if findings.is_empty() {
        return Ok(String::new());
    }
    bail!("{}", findings.join("\n"))
}

/// The lines of wildcard arms, and their enums.
fn wildcards(text: &str) -> Result<Vec<(usize, &'static str)>> {
    let syntax = syn::parse_file(text)?;
    let mut matches = Matches { own: None, found: Vec::new() };
    matches.visit_file(&syntax);
    Ok(matches.found)
}

struct Matches {
    /// The enum that `Self` means, if it is one of them.
    own: Option<&'static str>,
    found: Vec<(usize, &'static str)>,
}

impl Matches {
    /// The enum that this path names a variant of.
    fn variant(&self, path: &Path) -> Option<&'static str> {
        let of = path.segments.iter().rev().nth(1)?.ident.to_string();
        if of == "Self" { self.own } else { name_of_enum(&of) }
    }
}

fn name_of_enum(name: &str) -> Option<&'static str> {
    ENUMS.into_iter().find(|listed| *listed == name)
}

impl<'ast> Visit<'ast> for Matches {
    fn visit_item(&mut self, item: &'ast Item) {
        if !is_test_item(item) {
            visit::visit_item(self, item);
        }
    }

    fn visit_impl_item(&mut self, item: &'ast ImplItem) {
        if !is_test_member(item) {
            visit::visit_impl_item(self, item);
        }
    }

    fn visit_item_impl(&mut self, item: &'ast ItemImpl) {
        let before = self.own;
        self.own = match &*item.self_ty {
            Type::Path(path) => {
                path.path.segments.last().and_then(|last| name_of_enum(&last.ident.to_string()))
            }
            _ => None,
        };
        visit::visit_item_impl(self, item);
        self.own = before;
    }

    fn visit_expr_match(&mut self, expression: &'ast ExprMatch) {
        let mut named = Vec::new();
        let mut rests = Vec::new();
        for arm in &expression.arms {
            let mut places = Places { matches: self, named: Vec::new(), rests: Vec::new() };
            places.walk(&arm.pat, &[]);
            let Places { named: names, rests: wild, .. } = places;
            named.extend(names);
            rests.extend(wild);
        }
        for rest in rests {
            let taken = named.iter().find(|(place, _)| rest.takes(place));
            if let Some((_, name)) = taken {
                self.found.push((rest.line, *name));
            }
        }
        visit::visit_expr_match(self, expression);
    }
}

/// A step from a value to a part of it: the constructor, and the field.
type Step = (String, String);

/// The places where a pattern matches any value.
struct Rest {
    place: Vec<Step>,
    /// With `..`: the constructor, and its fields that are named.
    but: Option<(String, Vec<String>)>,
    line: usize,
}

impl Rest {
    fn takes(&self, place: &[Step]) -> bool {
        let Some(below) = place.strip_prefix(self.place.as_slice()) else { return false };
        match (&self.but, below.first()) {
            (None, _) => true,
            (Some((constructor, fields)), Some((of, field))) => {
                constructor == of && !fields.contains(field)
            }
            (Some(_), None) => false,
        }
    }
}

/// The variants that the pattern of one arm names, and the places where it matches any value.
struct Places<'a> {
    matches: &'a Matches,
    named: Vec<(Vec<Step>, &'static str)>,
    rests: Vec<Rest>,
}

impl Places<'_> {
    fn walk(&mut self, pattern: &Pat, place: &[Step]) {
        match pattern {
            Pat::Wild(wild) => self.rest(place, None, wild.underscore_token.spans[0]),
            Pat::Ident(ident) => match &ident.subpat {
                Some((_, pattern)) => self.walk(pattern, place),
                // A name in capitals is a constant or a variant.
                None if ident.ident.to_string().starts_with(char::is_uppercase) => {}
                None => self.rest(place, None, ident.ident.span()),
            },
            Pat::Or(or) => or.cases.iter().for_each(|pattern| self.walk(pattern, place)),
            Pat::Guard(guarded) => {
                // An arm with a guard does not match all remaining variants.
                let rests = self.rests.len();
                self.walk(&guarded.pat, place);
                self.rests.truncate(rests);
            }
            Pat::Paren(inner) => self.walk(&inner.pat, place),
            Pat::Reference(inner) => self.walk(&inner.pat, place),
            Pat::Path(path) => {
                let of = self.matches.variant(&path.path);
                self.named.extend(of.map(|of| (place.to_vec(), of)));
            }
            Pat::Tuple(tuple) => self.elements(tuple.elems.iter(), place, String::new()),
            Pat::TupleStruct(tuple) => {
                self.elements(tuple.elems.iter(), place, constructor(&tuple.path));
            }
            Pat::Struct(pattern) => {
                let name = constructor(&pattern.path);
                let mut fields = Vec::new();
                for field in &pattern.fields {
                    let member = match &field.member {
                        syn::Member::Named(name) => name.to_string(),
                        syn::Member::Unnamed(index) => index.index.to_string(),
                    };
                    self.walk(&field.pat, &extended(place, &name, &member));
                    fields.push(member);
                }
                if let Some(rest) = &pattern.rest {
                    self.rest(place, Some((name, fields)), rest.dot2_token.spans[0]);
                }
            }
            _ => {}
        }
    }

    fn elements<'b>(
        &mut self,
        elements: impl DoubleEndedIterator<Item = &'b Pat>,
        place: &[Step],
        name: String,
    ) {
        let mut fields = Vec::new();
        for (index, element) in elements.enumerate() {
            if let Pat::Rest(rest) = element {
                // What follows it is counted from the end, which no place here is.
                return self.rest(place, Some((name, fields)), rest.dot2_token.spans[0]);
            }
            self.walk(element, &extended(place, &name, &index.to_string()));
            fields.push(index.to_string());
        }
    }

    fn rest(
        &mut self,
        place: &[Step],
        but: Option<(String, Vec<String>)>,
        span: proc_macro2::Span,
    ) {
        self.rests.push(Rest { place: place.to_vec(), but, line: span.start().line });
    }
}

/// The last name of a constructor's path, which imports do not change.
fn constructor(path: &Path) -> String {
    path.segments.last().map(|last| last.ident.to_string()).unwrap_or_default()
}

fn extended(place: &[Step], constructor: &str, field: &str) -> Vec<Step> {
    let mut place = place.to_vec();
    place.push((constructor.to_owned(), field.to_owned()));
    place
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(arms: &str) -> Vec<usize> {
        let text = format!("fn f() {{\nmatch x {{\n{arms}\n}}\n}}");
        wildcards(&text).expect("it parses").into_iter().map(|(line, _)| line).collect()
    }

    #[test]
    fn what_takes_the_rest_of_an_enum_is_found() {
        let bad = [
            "Reason::A => 1,\n_ => 2,",
            "Reason::A => 1,\nother => 2,",
            "abi::Reason::A | Reason::B => 1,\n_ => 2,",
            "Verdict::Drop(Reason::A) => 1,\nVerdict::Drop(_) | Verdict::Pass(_) => 2,",
            "Verdict::Drop(Reason::A) => 1,\nVerdict::Drop(..) => 2,",
            "Some(Verdict::Drop(Reason::A)) => 1,\n_ => 2,",
            "(Reason::A, Kind::B) => 1,\n(_, Kind::C) => 2,",
            "V { reason: Reason::A, .. } => 1,\nV { why, .. } => 2,",
            "Err(Reason::A) => 1,\nErr(reason) => 2,\nOk(_) => 3,",
        ];
        for arms in bad {
            assert_eq!(lines(arms), [4], "{arms}");
        }
    }

    #[test]
    fn what_takes_something_else_is_not() {
        let good = [
            "Reason::A => 1,\nReason::B | Reason::C => 2,",
            "Verdict::Drop(Reason::A) => 1,\nVerdict::Drop(Reason::B) => 2,\nVerdict::Pass(_) => 3,",
            "(Reason::A, _) => 1,\n(Reason::B, kind) => 2,",
            "V { reason: Reason::A, .. } => 1,\nV { reason: Reason::B, .. } => 2,",
            "Kind::A => Reason::A,\n_ => Reason::B,",
            "why @ (Reason::A | Reason::B) => why,\nReason::C => Reason::D,",
            "Reason::A => 1,\nother if x => 2,\nReason::B => 3,",
        ];
        for arms in good {
            assert!(lines(arms).is_empty(), "{arms}");
        }
    }

    #[test]
    fn self_is_the_enum_within_it_and_tests_are_free() {
        let inside = "{ fn f(self) { match self { Self::A => 1, _ => 2 } } }";
        let of = |text: &str| wildcards(text).expect("it parses").len();
        assert_eq!(of(&format!("impl Reason {inside}")), 1);
        assert_eq!(of(&format!("impl Kind {inside}")), 0);
        assert_eq!(of(&format!("#[cfg(test)] mod tests {{ impl Reason {inside} }}")), 0);
        assert_eq!(of("fn f() -> bool { matches!(x, Reason::A) }"), 0);
    }
}
