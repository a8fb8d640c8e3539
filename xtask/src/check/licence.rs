//! Licences: ours are what the project promises, those of the dependencies can
//! be met by it.

use std::fs;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::workspace::Workspace;

/// Of what runs in user space.
const OURS: &str = "Apache-2.0";
/// Of what the eBPF object is made of: the kernel reserves helpers for GPL
/// programs.
const OBJECT: &str = "Apache-2.0 OR GPL-2.0-only";
const OBJECT_CRATES: [&str; 3] = ["lb-common", "lb-ebpf", "lb-bench-ebpf"];
const TEXTS: [&str; 2] = ["LICENSE-APACHE", "LICENSE-GPL-2.0"];

/// Licences that a dependency may be used under.
const ALLOWED: [&str; 12] = [
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "CDLA-Permissive-2.0",
    "ISC",
    "MIT",
    "Unicode-3.0",
    "Zlib",
];

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
    workspace_members: Vec<String>,
}

#[derive(Deserialize)]
struct Package {
    id: String,
    name: String,
    version: String,
    license: Option<String>,
}

pub(super) fn check(workspace: &Workspace) -> Result<String> {
    let output = workspace
        .cargo("metadata")
        .args(["--format-version", "1"])
        .output()
        .context("cannot start cargo metadata")?;
    if !output.status.success() {
        bail!("{}", String::from_utf8_lossy(&output.stderr).trim_end());
    }
    let metadata: Metadata =
        serde_json::from_slice(&output.stdout).context("cannot read cargo's metadata")?;
    let mut findings = findings(&metadata);
    for text in TEXTS {
        if fs::metadata(workspace.root().join(text)).is_err() {
            findings.push(format!("{text} is missing"));
        }
    }
    if findings.is_empty() {
        return Ok(String::new());
    }
    bail!("{}", findings.join("\n"))
}

fn findings(metadata: &Metadata) -> Vec<String> {
    let mut findings = Vec::new();
    for package in &metadata.packages {
        let Package { name, version, .. } = package;
        let licence = package.license.as_deref().unwrap_or("none");
        if metadata.workspace_members.contains(&package.id) {
            let wanted = if OBJECT_CRATES.contains(&name.as_str()) { OBJECT } else { OURS };
            if licence != wanted {
                findings.push(format!("{name}: licence is {licence}, should be {wanted}"));
            }
        } else if !is_allowed(licence) {
            findings.push(format!(
                "{name} {version}: licence {licence} is not one that the project accepts"
            ));
        }
    }
    findings
}

/// Whether an SPDX expression can be met with allowed licences alone.
fn is_allowed(expression: &str) -> bool {
    // Crates of before SPDX expressions write "MIT/Apache-2.0" for OR.
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let tokens: Vec<&str> = spaced.split_whitespace().collect();
    let mut parser = Expression { tokens: &tokens };
    parser.any() == Some(true) && parser.tokens.is_empty()
}

/// The rest of an expression: `any = all {OR all}`, `all = one {AND one}`,
/// `one = "(" any ")" | ID [WITH ID]`. `None` is a syntax error.
struct Expression<'a> {
    tokens: &'a [&'a str],
}

impl<'a> Expression<'a> {
    fn any(&mut self) -> Option<bool> {
        let mut allowed = self.all()?;
        while self.accept("OR") {
            allowed |= self.all()?;
        }
        Some(allowed)
    }

    fn all(&mut self) -> Option<bool> {
        let mut allowed = self.one()?;
        while self.accept("AND") {
            allowed &= self.one()?;
        }
        Some(allowed)
    }

    fn one(&mut self) -> Option<bool> {
        if self.accept("(") {
            let allowed = self.any()?;
            return self.accept(")").then_some(allowed);
        }
        let id = self.next()?;
        if self.accept("WITH") {
            let licence = format!("{id} WITH {}", self.next()?);
            return Some(ALLOWED.contains(&licence.as_str()));
        }
        Some(ALLOWED.contains(&id))
    }

    fn accept(&mut self, token: &str) -> bool {
        let found = self.tokens.first() == Some(&token);
        if found {
            self.tokens = &self.tokens[1..];
        }
        found
    }

    fn next(&mut self) -> Option<&'a str> {
        let (first, rest) = self.tokens.split_first()?;
        self.tokens = rest;
        Some(first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_expression_is_met_by_allowed_licences_alone() {
        let rows = [
            ("MIT", true),
            ("GPL-3.0-only", false),
            ("MIT OR GPL-3.0-only", true),
            ("MIT AND GPL-3.0-only", false),
            ("MIT/Apache-2.0", true),
            ("(MIT OR Apache-2.0) AND Unicode-3.0", true),
            ("(MIT OR Apache-2.0) AND LGPL-2.1-or-later", false),
            ("LGPL-2.1-or-later AND MIT OR ISC", true),
            ("Apache-2.0 WITH LLVM-exception", true),
            ("GPL-2.0-only WITH LLVM-exception", false),
            ("none", false),
            ("", false),
            ("MIT OR", false),
            ("(MIT", false),
            ("MIT MIT", false),
        ];
        for (expression, expected) in rows {
            assert_eq!(is_allowed(expression), expected, "{expression}");
        }
    }

    #[test]
    fn what_the_object_is_made_of_must_be_dual_licensed() {
        let package = |name: &str, licence: Option<&str>| Package {
            id: name.to_owned(),
            name: name.to_owned(),
            version: "1.0.0".to_owned(),
            license: licence.map(str::to_owned),
        };
        let metadata = Metadata {
            packages: vec![
                package("lb-ebpf", Some("Apache-2.0")),
                package("lb-common", Some(OBJECT)),
                package("lb-agent", Some(OURS)),
                package("good", Some("MIT")),
                package("bad", None),
            ],
            workspace_members: ["lb-ebpf", "lb-common", "lb-agent"].map(str::to_owned).to_vec(),
        };
        assert_eq!(
            findings(&metadata),
            [
                "lb-ebpf: licence is Apache-2.0, should be Apache-2.0 OR GPL-2.0-only",
                "bad 1.0.0: licence none is not one that the project accepts",
            ]
        );
    }
}
