//! Checks that modules use each other only in the order that ARCHITECTURE.md states.
//!
//! A fenced block of that page, `order NAME`, lists the rooms of a package (its top modules), one
//! layer per line from the top down; `order crates` lists the packages. A module may use only
//! modules of lower layers, and the files of a package must not form a cycle. Test code is
//! ignored.

mod cycle;
mod page;
mod pure;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use anyhow::{Context, Result, bail};

use super::metadata::{Metadata, Package};
use super::source::{Crate, Module, Target, at};
use crate::workspace::Workspace;
use page::Order;

/// The page that states the order.
const PAGE: &str = "ARCHITECTURE.md";
/// The name of the block that orders the packages.
const CRATES: &str = "crates";

/// Packages that must have an `order` block; other packages may have one.
const ORDERED: [&str; 5] = ["lb-agent", "lb-common", "lb-control", "lb-ebpf", "lb-sys"];

/// Packages whose files may form cycles: tests and benchmarks.
const FREE: [&str; 2] = ["lb-bench-ebpf", "lb-tests"];

/// One module uses another, on this line.
struct Arrow {
    from: usize,
    to: usize,
    line: usize,
    path: String,
}

pub(super) fn check(workspace: &Workspace) -> Result<String> {
    let root = workspace.root();
    let text =
        fs::read_to_string(root.join(PAGE)).with_context(|| format!("cannot read {PAGE}"))?;
    let orders = page::orders(&text)?;
    let metadata = Metadata::of(workspace)?;
    let mut findings = packages(&metadata, orders.get(CRATES));
    for package in &metadata.packages {
        let dir = package.dir(root)?;
        let parsed = Crate::read(root, &dir, &package.name)?;
        findings.extend(pure::check(package, &dir, &parsed));
        let arrows = arrows(&parsed);
        findings.extend(rooms(&parsed, &arrows, orders.get(&package.name)));
        if !FREE.contains(&package.name.as_str()) {
            findings.extend(files(&parsed, &arrows));
        }
    }
    let named = |name: &&String| metadata.packages.iter().all(|package| package.name != **name);
    for name in orders.keys().filter(|name| *name != CRATES).filter(named) {
        findings.push(format!(
            "{PAGE}: `order {name}` is not a package of the workspace: remove the block"
        ));
    }
    if findings.is_empty() {
        return Ok(String::new());
    }
    bail!("{}", findings.join("\n"))
}

/// Checks the dependencies between packages. Dev-dependencies may point anywhere.
fn packages(metadata: &Metadata, order: Option<&Order>) -> Vec<String> {
    let members: BTreeSet<&str> =
        metadata.packages.iter().map(|package| package.name.as_str()).collect();
    let Some(order) = order else {
        return vec![format!(
            "{PAGE} has no block ```order {CRATES}: add one that lists the packages"
        )];
    };
    let mut findings = unlisted(CRATES, order, &members);
    let uses = |package: &Package| -> Vec<String> {
        let normal = package.dependencies.iter().filter(|dependency| !dependency.is_for_tests());
        normal.map(|dependency| dependency.name.clone()).collect()
    };
    for package in &metadata.packages {
        for used in uses(package) {
            if let (Some(upper), Some(lower)) = (order.layer(&package.name), order.layer(&used))
                && lower <= upper
            {
                findings.push(format!(
                    "the Cargo.toml of `{}` depends on `{used}`, which is not in a lower layer of \
                     {PAGE}:{}: remove the dependency or change the order",
                    package.name, order.line
                ));
            }
        }
    }
    findings
}

/// Names that the order does not list, and listed names that do not exist.
fn unlisted(name: &str, order: &Order, present: &BTreeSet<&str>) -> Vec<String> {
    let listed: BTreeSet<&str> = order.names().collect();
    let mut findings = Vec::new();
    for unlisted in present.difference(&listed) {
        findings.push(format!(
            "{PAGE}:{}: `order {name}` does not list `{unlisted}`: add it to its layer",
            order.line
        ));
    }
    for unknown in listed.difference(present) {
        findings.push(format!(
            "{PAGE}:{}: `order {name}` lists `{unknown}`, which does not exist: remove it",
            order.line
        ));
    }
    findings
}

/// The uses between modules, one for each pair.
fn arrows(parsed: &Crate) -> Vec<Arrow> {
    let mut first: BTreeMap<(usize, usize), Arrow> = BTreeMap::new();
    for (from, module) in parsed.modules.iter().enumerate() {
        for written in &module.written {
            let Target::Module(path) = parsed.target(module, &written.segments) else { continue };
            let Some(to) = parsed.modules.iter().position(|module| module.path == path) else {
                continue;
            };
            // An inline module is part of its file.
            if parsed.modules[to].file != module.file {
                let arrow =
                    Arrow { from, to, line: written.line, path: written.segments.join("::") };
                first.entry((from, to)).or_insert(arrow);
            }
        }
    }
    first.into_values().collect()
}

/// The top module that contains this one; a crate's root is a top module of its own.
fn room(module: &Module) -> &str {
    match module.path.first() {
        Some(name) => name,
        None if module.file.ends_with("main.rs") => "main",
        None => "lib",
    }
}

fn rooms(parsed: &Crate, arrows: &[Arrow], order: Option<&Order>) -> Vec<String> {
    let name = &parsed.name;
    // lib.rs only declares modules, so it needs no place.
    let present: BTreeSet<&str> =
        parsed.modules.iter().map(room).filter(|room| *room != "lib").collect();
    let Some(order) = order else {
        if !ORDERED.contains(&name.as_str()) {
            return Vec::new();
        }
        return vec![format!(
            "{PAGE} has no block ```order {name}: add it, for example as\n{}",
            proposal(parsed, arrows)
        )];
    };
    let mut findings = unlisted(name, order, &present);
    for arrow in arrows {
        let (from, to) = (&parsed.modules[arrow.from], &parsed.modules[arrow.to]);
        let (upper, lower) = (room(from), room(to));
        if upper == lower || upper == "lib" {
            continue;
        }
        let is_downward = match (order.layer(upper), order.layer(lower)) {
            (Some(upper), Some(lower)) => lower > upper,
            _ => lower != "lib",
        };
        if !is_downward {
            findings.push(format!(
                "{}: `{upper}` uses `{lower}` ({}), which is not lower in {PAGE}:{}: move \
                 the used item to a module below both",
                at(&from.file, arrow.line),
                arrow.path,
                order.line
            ));
        }
    }
    findings
}

/// Layers in which each use points down. Uses within a cycle are ignored.
fn proposal(parsed: &Crate, arrows: &[Arrow]) -> String {
    let names: BTreeSet<&str> =
        parsed.modules.iter().map(room).filter(|room| *room != "lib").collect();
    let room_of = |index: usize| room(&parsed.modules[index]);
    let pairs: BTreeSet<(&str, &str)> = arrows
        .iter()
        .map(|arrow| (room_of(arrow.from), room_of(arrow.to)))
        .filter(|(from, to)| from != to)
        .collect();
    let mut heights: BTreeMap<&str, usize> = names.iter().map(|name| (*name, 0)).collect();
    // A path without a cycle is at most as long as the number of modules.
    for _ in 0..names.len() {
        for (from, to) in &pairs {
            let least = heights.get(to).map_or(0, |height| height + 1).min(names.len());
            if let Some(height) = heights.get_mut(from) {
                *height = least.max(*height);
            }
        }
    }
    let mut layers: BTreeMap<usize, Vec<&str>> = BTreeMap::new();
    for (name, height) in heights {
        layers.entry(height).or_default().push(name);
    }
    layers.into_values().rev().map(|names| names.join(" ")).collect::<Vec<_>>().join("\n")
}

/// Cycles among the files of a crate. A child may use items of its parent.
fn files(parsed: &Crate, arrows: &[Arrow]) -> Vec<String> {
    let is_of_child = |arrow: &Arrow| {
        let (from, to) = (&parsed.modules[arrow.from].path, &parsed.modules[arrow.to].path);
        !to.is_empty() && from.len() > to.len() && from.starts_with(to)
    };
    let others: Vec<&Arrow> = arrows.iter().filter(|arrow| !is_of_child(arrow)).collect();
    let mut findings = Vec::new();
    let pairs: Vec<(usize, usize)> = others.iter().map(|arrow| (arrow.from, arrow.to)).collect();
    for cycle in cycle::shortest(parsed.modules.len(), &pairs) {
        let mut lines = Vec::new();
        for (from, to) in cycle {
            let arrow = others.iter().find(|arrow| (arrow.from, arrow.to) == (from, to));
            if let Some(arrow) = arrow {
                let file = &parsed.modules[from].file;
                lines.push(format!("    {}: {}", at(file, arrow.line), arrow.path));
            }
        }
        findings.push(format!(
            "{}: these modules form a cycle: move the used item to a module below both\n{}",
            parsed.name,
            lines.join("\n")
        ));
    }
    findings
}

#[cfg(test)]
mod tests;
