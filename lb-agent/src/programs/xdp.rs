//! XDP on external devices. The tc programs are attached in any case and take what XDP
//! leaves, so that a device without XDP only is slower.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, io,
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use aya_obj::generated::{XDP_FLAGS_DRV_MODE, XDP_FLAGS_SKB_MODE, bpf_attach_type::BPF_XDP};
use lb_control::model::network::Interface;
use lb_sys::LinkTarget;
use tracing::{debug, info, warn};

use super::{
    links::{self, PinnedLink},
    load::Programs,
    tc::AttachError,
};
use crate::{maps::pins::Pins, options::modes::XdpMode};

/// The program.
const PROGRAM: &str = "xdp_device";
/// Why a device with another's program is left to tc.
pub(crate) const OCCUPIED: &str = "another XDP program is attached";

/// How a device's packets are taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Taken {
    /// By XDP in the driver.
    Native,
    /// By XDP in the stack.
    Generic,
    /// By tc alone, and why.
    Tc(String),
}

impl Taken {
    /// What a pin's name ends in, and the flag of XDP.
    fn mode(&self) -> Option<(&'static str, u32)> {
        match self {
            Self::Native => Some(("xdp_native", XDP_FLAGS_DRV_MODE)),
            Self::Generic => Some(("xdp_generic", XDP_FLAGS_SKB_MODE)),
            Self::Tc(_) => None,
        }
    }

    /// What a pin says by its name.
    pub(crate) fn of_pin(path: &Path) -> Option<Self> {
        let name = path.file_name()?.to_str()?;
        let ends = |taken: &Self| taken.mode().is_some_and(|(suffix, _)| name.ends_with(suffix));
        [Self::Native, Self::Generic].into_iter().find(ends)
    }
}

impl fmt::Display for Taken {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Native => formatter.write_str("XDP in the driver"),
            Self::Generic => formatter.write_str("XDP in the stack"),
            Self::Tc(reason) => write!(formatter, "tc: {reason}"),
        }
    }
}

/// What is tried on a device.
pub fn wanted(mode: XdpMode, is_veth: bool) -> Taken {
    match mode {
        XdpMode::Off => Taken::Tc("--xdp off".to_owned()),
        XdpMode::Generic => Taken::Generic,
        XdpMode::Native => Taken::Native,
        // A veth hands over what another namespace sent, checksums yet to be filled in by a
        // device that never comes; XDP can't tell, and would make them wrong.
        XdpMode::Auto if is_veth => {
            Taken::Tc("a veth's checksums may be unfinished (--xdp native if they are not)".into())
        }
        XdpMode::Auto => Taken::Native,
    }
}

/// Attaches the program to devices, and remembers how each is taken.
#[derive(Debug)]
pub struct XdpAttacher {
    directory: PathBuf,
    mode: XdpMode,
    pinned: BTreeMap<u32, PinnedLink>,
    /// How each device is taken, as was said.
    taken: BTreeMap<u32, Taken>,
    settled: BTreeSet<u32>,
}

impl XdpAttacher {
    /// Finds the links that an earlier agent pinned.
    ///
    /// # Errors
    /// [`AttachError::Pins`] if they cannot be listed.
    pub fn new(pins: &Pins, mode: XdpMode) -> Result<Self, AttachError> {
        let directory = pins.links();
        let found = pinned_links(&directory)
            .map_err(|source| AttachError::Pins { path: directory.clone(), source })?;
        let mut pinned = BTreeMap::new();
        for (index, path) in found {
            let link = PinnedLink::open(path.clone())
                .map_err(|source| AttachError::Pins { path, source })?;
            pinned.insert(index, link);
        }
        Ok(Self { directory, mode, pinned, taken: BTreeMap::new(), settled: BTreeSet::new() })
    }

    /// Takes a device as well as it can be taken, and says so where that is news. A program
    /// of ours that is attached is replaced in place; another's is left alone.
    pub fn settle(&mut self, programs: &Programs, interface: &Interface, is_veth: bool) {
        self.settled.insert(interface.index);
        let wanted = wanted(self.mode, is_veth);
        let taken = match self.attach(programs, interface, &wanted) {
            Ok(()) => wanted,
            Err(error) => {
                self.detach(interface.index);
                Taken::Tc(explained(&error))
            }
        };
        if self.taken.get(&interface.index) != Some(&taken) {
            let asked = matches!(self.mode, XdpMode::Native | XdpMode::Generic);
            if asked && matches!(taken, Taken::Tc(_)) {
                warn!(device = interface.name, "packets are taken by {taken}");
            } else {
                info!(device = interface.name, "packets are taken by {taken}");
            }
            self.taken.insert(interface.index, taken);
        }
    }

    /// Whether it is settled how the device is taken.
    pub fn is_settled(&self, index: u32) -> bool {
        self.settled.contains(&index)
    }

    /// Looks whether devices are taken as they were; those that are not are to be settled
    /// again. Whether there are any.
    pub fn notice(&mut self, programs: &Programs) -> bool {
        let mut lost = false;
        for (index, link) in &self.pinned {
            let is_here = link
                .info()
                .is_ok_and(|info| info.target[0] == *index && programs.is(PROGRAM, info.program));
            if !is_here || !link.is_pinned() {
                lost |= self.settled.remove(index);
            }
        }
        lost
    }

    /// Lets every device be looked at again.
    pub fn unsettle(&mut self) {
        self.settled.clear();
    }

    /// Takes our program off every device but these, and forgets devices that are gone.
    pub fn retain(&mut self, devices: impl Fn(u32) -> bool) {
        let others: Vec<u32> =
            self.pinned.keys().chain(self.taken.keys()).copied().filter(|i| !devices(*i)).collect();
        for index in others {
            self.taken.remove(&index);
            self.settled.remove(&index);
            self.detach(index);
        }
    }

    fn attach(
        &mut self,
        programs: &Programs,
        interface: &Interface,
        wanted: &Taken,
    ) -> io::Result<()> {
        let Some((suffix, flags)) = wanted.mode() else {
            self.detach(interface.index);
            return Ok(());
        };
        let program = programs.get(PROGRAM).map_err(io::Error::other)?;
        if let Some(link) = self.pinned.get(&interface.index) {
            let is_here = link.info()?.target[0] == interface.index;
            if is_here && link.path().to_string_lossy().ends_with(suffix) {
                return link.update(program.as_fd());
            }
            debug!(path = %link.path().display(), "the link is of another device or mode");
            self.detach(interface.index);
        }
        let target = LinkTarget::Xdp { interface: interface.index, flags };
        let path = self.directory.join(links::name(interface, suffix));
        let link = PinnedLink::create(program.as_fd(), target, BPF_XDP as u32, path)?;
        self.pinned.insert(interface.index, link);
        Ok(())
    }

    fn detach(&mut self, index: u32) {
        if let Some(link) = self.pinned.remove(&index)
            && let Err(error) = link.remove()
        {
            warn!(%error, index, "XDP could not be taken off");
        }
    }
}

/// Why a device is left to tc.
fn explained(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EBUSY | libc::EEXIST) => OCCUPIED.to_owned(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS) => "its driver has no XDP".to_owned(),
        Some(libc::EINVAL | libc::ERANGE) => {
            "its driver refuses XDP, as for a large MTU".to_owned()
        }
        _ => format!("XDP cannot be attached: {error}"),
    }
}

/// The links that are pinned, by the index of their device.
pub(crate) fn pinned_links(directory: &Path) -> io::Result<BTreeMap<u32, PathBuf>> {
    let of_xdp = |site: &str| site.starts_with("xdp_").then_some(());
    let pinned = links::pinned(directory, of_xdp)?;
    Ok(pinned.into_iter().map(|(index, (), path)| (index, path)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_veth_is_taken_by_xdp_only_when_asked() {
        let rows = [
            (XdpMode::Auto, false, Some("xdp_native")),
            (XdpMode::Auto, true, None),
            (XdpMode::Native, true, Some("xdp_native")),
            (XdpMode::Generic, true, Some("xdp_generic")),
            (XdpMode::Off, false, None),
        ];
        for (mode, is_veth, expected) in rows {
            let suffix = wanted(mode, is_veth).mode().map(|(suffix, _)| suffix);
            assert_eq!(suffix, expected, "{mode:?} {is_veth}");
        }
    }
}
