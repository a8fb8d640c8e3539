//! Checks the licences of lb's own crates. `deny.toml` has the rules for dependencies.

use std::fs;

use anyhow::{Result, bail};

use super::metadata::{Metadata, Package};
use crate::workspace::Workspace;

/// The licence of crates that run in user space.
const OURS: &str = "Apache-2.0";
/// The licence of crates in the eBPF object: the kernel reserves some helpers for GPL
/// programs.
const OBJECT: &str = "Apache-2.0 OR GPL-2.0-only";
const OBJECT_CRATES: [&str; 3] = ["lb-common", "lb-ebpf", "lb-bench-ebpf"];
const TEXTS: [&str; 2] = ["LICENSE-APACHE", "LICENSE-GPL-2.0"];

pub(super) fn check(workspace: &Workspace) -> Result<String> {
    let mut findings = findings(&Metadata::of(workspace)?.packages);
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

fn findings(packages: &[Package]) -> Vec<String> {
    let finding = |package: &Package| {
        let is_in_object = OBJECT_CRATES.contains(&package.name.as_str());
        let wanted = if is_in_object { OBJECT } else { OURS };
        let licence = package.license.as_deref().unwrap_or("none");
        let name = &package.name;
        (licence != wanted).then(|| format!("{name}: licence is {licence}, should be {wanted}"))
    };
    packages.iter().filter_map(finding).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_object_is_made_of_must_be_dual_licensed() {
        let package = |name: &str, licence: Option<&str>| Package {
            name: name.to_owned(),
            license: licence.map(str::to_owned),
            manifest_path: format!("/lb/{name}/Cargo.toml").into(),
            dependencies: Vec::new(),
        };
        let packages = [
            package("lb-ebpf", Some(OURS)),
            package("lb-common", Some(OBJECT)),
            package("lb-agent", Some(OURS)),
            package("xtask", None),
        ];
        assert_eq!(
            findings(&packages),
            [
                "lb-ebpf: licence is Apache-2.0, should be Apache-2.0 OR GPL-2.0-only",
                "xtask: licence is none, should be Apache-2.0",
            ]
        );
    }
}
