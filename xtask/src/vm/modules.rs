//! Kernel modules that the tests need, each after the modules that it depends on.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

/// The modules, without their dependencies. A kernel may have some of them built in.
/// No module depends on `crc32c_generic` by name, because its users ask for the sum `crc32c`.
pub(super) const WANTED: [&str; 11] = [
    "crc32c_generic",
    "veth",
    "bridge",
    "br_netfilter",
    "sch_ingress",
    "cls_bpf",
    "nf_tables",
    "nft_counter",
    "nft_objref",
    "nf_conntrack",
    "nft_ct",
];

/// What the parts `devices` and `ipvs` need beside them: kinds of devices, drivers of the machine's
/// NICs, IPVS with ipsets, masquerading. Kernels that have netkit have it built in.
pub(super) const MORE: [&str; 14] = [
    "8021q",
    "bonding",
    "dummy",
    "ipip",
    "wireguard",
    "virtio_pci",
    "virtio_net",
    "e1000e",
    "igb",
    "ip_vs",
    "ip_vs_rr",
    "ip_set_bitmap_port",
    "nft_chain_nat",
    "nft_masq",
];

/// A module, uncompressed.
pub(crate) struct Module {
    pub(crate) name: String,
    pub(crate) content: Vec<u8>,
}

/// Reads modules and their dependencies from a directory of modules.
pub(crate) fn collect(directory: &Path, wanted: &[&str]) -> Result<Vec<Module>> {
    let mut files = BTreeMap::new();
    find(directory, &mut files)?;
    ensure!(files.contains_key("veth"), "no module veth below {}", directory.display());
    let mut modules = Vec::new();
    for name in wanted {
        add(name, &files, &mut modules)?;
    }
    Ok(modules)
}

fn find(directory: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    let entries =
        fs::read_dir(directory).with_context(|| format!("cannot list {}", directory.display()))?;
    for entry in entries {
        let path = entry?.path();
        if path.is_dir() {
            find(&path, files)?;
        } else if let Some(file) = path.file_name().and_then(|name| name.to_str())
            && let Some((name, _)) = file.split_once(".ko")
        {
            files.insert(name.replace('-', "_"), path);
        }
    }
    Ok(())
}

/// Adds a module after its dependencies. A module without a file is built in.
fn add(name: &str, files: &BTreeMap<String, PathBuf>, modules: &mut Vec<Module>) -> Result<()> {
    let name = name.replace('-', "_");
    let Some(path) = files.get(&name) else { return Ok(()) };
    if modules.iter().any(|module| module.name == name) {
        return Ok(());
    }
    let content = read(path)?;
    for other in dependencies(&content) {
        add(&other, files, modules)?;
    }
    modules.push(Module { name, content });
    Ok(())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    if path.extension().is_none_or(|extension| extension != "xz") {
        return fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    }
    let output = Command::new("xz")
        .args(["--decompress", "--stdout"])
        .arg(path)
        .stdin(Stdio::null())
        .output()
        .context("cannot start xz")?;
    ensure!(output.status.success(), "xz cannot read {}", path.display());
    Ok(output.stdout)
}

/// The dependencies that the module declares: `depends=` and names with commas.
fn dependencies(content: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"depends=";
    let words = content.split(|byte| *byte == 0);
    let named = words.filter_map(|word| word.strip_prefix(KEY)).next().unwrap_or_default();
    let names = String::from_utf8_lossy(named);
    names.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_names_what_it_depends_on() {
        let module = b"\x7fELF\0license=GPL\0depends=stp,llc\0retpoline=Y\0";
        assert_eq!(dependencies(module), ["stp", "llc"]);
        assert!(dependencies(b"\0depends=\0name=x\0").is_empty());
        assert!(dependencies(b"").is_empty());
    }
}
