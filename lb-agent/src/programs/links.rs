//! Pinned links; those of interfaces are named `<ifindex>-<ifname>-<site>`.
//!
//! The agent keeps a descriptor of each: if another process removes a pin, the program stays
//! attached while the agent runs, and the agent pins the link again.

use std::{
    fs, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use lb_sys::{LinkInfo, LinkTarget};

use lb_control::model::network::Interface;

/// A link and the path of its pin.
#[derive(Debug)]
pub(crate) struct PinnedLink {
    link: OwnedFd,
    path: PathBuf,
}

impl PinnedLink {
    /// Opens the link that is pinned at `path`.
    pub(crate) fn open(path: PathBuf) -> io::Result<Self> {
        Ok(Self { link: lb_sys::obj_get(&path)?, path })
    }

    /// Attaches `program` and pins its link at `path`. Attaches nothing if the directory is
    /// missing, because `cleanup` has removed it.
    pub(crate) fn create(
        program: BorrowedFd<'_>,
        target: LinkTarget<'_>,
        attach_type: u32,
        path: PathBuf,
    ) -> io::Result<Self> {
        if !path.parent().is_some_and(Path::is_dir) {
            let text = format!("the directory of {} is gone: restart the agent", path.display());
            return Err(io::Error::other(text));
        }
        let link = Self { link: lb_sys::link_create(program, target, attach_type)?, path };
        link.pin()?;
        Ok(link)
    }

    /// The kernel's information on the link.
    pub(crate) fn info(&self) -> io::Result<LinkInfo> {
        lb_sys::link_info(self.link.as_fd())
    }

    /// Where it is pinned.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it is still pinned.
    pub(crate) fn is_pinned(&self) -> bool {
        self.path.exists()
    }

    /// Replaces its program by `program`, and pins the link again if the pin is gone.
    pub(crate) fn update(&self, program: BorrowedFd<'_>) -> io::Result<()> {
        lb_sys::link_update(self.link.as_fd(), program)?;
        if self.is_pinned() { Ok(()) } else { self.pin() }
    }

    /// Detaches and unpins it.
    pub(crate) fn remove(self) -> io::Result<()> {
        detach(self.link.as_fd())?;
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn pin(&self) -> io::Result<()> {
        lb_sys::obj_pin(self.link.as_fd(), &self.path)
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
