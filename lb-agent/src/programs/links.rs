//! Pinned links; links of interfaces are named `<ifindex>-<ifname>-<site>`.
//!
//! The agent keeps a descriptor of each: if another process removes a pin, the program stays
//! attached while the agent runs, and [`Kept`] pins the link again.

use std::{
    fs, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
};

use lb_sys::{LinkInfo, LinkTarget};

use lb_control::model::network::Interface;
use tracing::debug;

use crate::maps::{kept::Kept, pins::Pins};

/// A link and the path of its pin.
#[derive(Debug)]
pub(crate) struct PinnedLink {
    link: Arc<OwnedFd>,
    path: PathBuf,
    kept: Kept,
}

impl PinnedLink {
    /// Opens the link that is pinned at `path`, and keeps it pinned.
    pub(crate) fn open(pins: &Pins, path: PathBuf) -> io::Result<Self> {
        let link = Arc::new(lb_sys::obj_get(&path)?);
        pins.kept().keep(&path, Arc::clone(&link));
        Ok(Self { link, path, kept: pins.kept().clone() })
    }

    /// Attaches `program` and pins its link at `path`. A link that cannot be pinned stays attached,
    /// and is pinned as soon as that is possible.
    pub(crate) fn create(
        pins: &Pins,
        program: BorrowedFd<'_>,
        target: LinkTarget<'_>,
        attach_type: u32,
        path: PathBuf,
    ) -> io::Result<Self> {
        let link = Arc::new(lb_sys::link_create(program, target, attach_type)?);
        if let Err(error) = pins.kept().pin(&path, Arc::clone(&link)) {
            debug!(path = %path.display(), %error, "cannot pin a link: it is tried again");
        }
        Ok(Self { link, path, kept: pins.kept().clone() })
    }

    /// The kernel's information on the link.
    pub(crate) fn info(&self) -> io::Result<LinkInfo> {
        lb_sys::link_info(self.link.as_fd())
    }

    /// Where it is pinned.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Replaces its program by `program`.
    pub(crate) fn update(&self, program: BorrowedFd<'_>) -> io::Result<()> {
        lb_sys::link_update(self.link.as_fd(), program)
    }

    /// Detaches and unpins it. What another process has pinned at its path stays.
    pub(crate) fn remove(self) -> io::Result<()> {
        detach(self.link.as_fd())?;
        self.kept.unpin(&self.path)
    }
}

/// Detaches and unpins the link at `path`.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    detach(lb_sys::obj_get(path)?.as_fd())?;
    fs::remove_file(path)
}

fn detach(link: BorrowedFd<'_>) -> io::Result<()> {
    match lb_sys::link_detach(link) {
        Err(error) if !is_detached(&error) => Err(error),
        _ => Ok(()),
    }
}

/// Whether the link is detached already because its interface or cgroup is gone.
fn is_detached(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOLINK | libc::ENODEV | libc::ENOENT))
}

/// The name of the pin of the link at `site` of an interface. A bpffs allows no dots in names.
pub(crate) fn name(interface: &Interface, site: &str) -> String {
    format!("{}-{}-{site}", interface.index, interface.name.replace('.', "_"))
}

/// The index of the interface and the site in the name of a pin.
pub(crate) fn parse(name: &str) -> Option<(u32, &str)> {
    let (index, rest) = name.split_once('-')?;
    let (_, site) = rest.rsplit_once('-')?;
    Some((index.parse().ok()?, site))
}

/// The pinned links whose site `site` accepts, with the index of their interface.
pub(crate) fn pinned<S>(
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
    fn the_name_of_a_pin_has_its_interface_and_site() {
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
