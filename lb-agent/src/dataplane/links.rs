//! Links on interfaces, as they are pinned: `<ifindex>-<ifname>-<site>`.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::attach::Interface;

/// The name that the link of a program at `site` of an interface is pinned by; a bpffs has no
/// dots in names.
pub(super) fn name(interface: &Interface, site: &str) -> String {
    format!("{}-{}-{site}", interface.index, interface.name.replace('.', "_"))
}

/// The index of the interface and the site that a pin's name says.
pub(super) fn parse(name: &str) -> Option<(u32, &str)> {
    let (index, rest) = name.split_once('-')?;
    let (_, site) = rest.rsplit_once('-')?;
    Some((index.parse().ok()?, site))
}

/// The links that are pinned at sites that `site` knows, with the index of their interface.
pub(super) fn pinned<S>(
    directory: &Path,
    site: impl Fn(&str) -> Option<S>,
) -> io::Result<Vec<(u32, S, PathBuf)>> {
    let mut links = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        if let Some((index, text)) = name.to_str().and_then(parse)
            && let Some(site) = site(text)
        {
            links.push((index, site, entry.path()));
        }
    }
    Ok(links)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pin_tells_its_interface_and_its_site() {
        for (index, text) in [(3, "eth0"), (12, "bond0.100"), (7, "veth-a-b")] {
            let interface = Interface { index, name: text.to_owned() };
            let pin = name(&interface, "ingress");
            assert!(!pin.contains('.'), "{pin}");
            assert_eq!(parse(&pin), Some((index, "ingress")));
        }
        assert_eq!(parse("cgroup-connect4"), None);
        assert_eq!(parse("7"), None);
    }
}
