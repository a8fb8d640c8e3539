//! XDP on external devices. The tc programs are always attached and handle what XDP passes on, so
//! a device without XDP is only slower.

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
    hook::LinkHeader,
    links::{self, PinnedLink},
    load::Programs,
    tc::AttachError,
};
use crate::{maps::pins::Pins, options::modes::XdpMode};

/// The program.
const PROGRAM: &str = "xdp_device";
/// Why a device with an XDP program of others is left to tc.
pub(crate) const OCCUPIED: &str = "another XDP program is attached";

/// How the packets of a device are handled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Handler {
    /// By XDP in the driver.
    Native,
    /// By XDP in the stack.
    Generic,
    /// By tc alone, and why.
    Tc(String),
}

impl Handler {
    /// The suffix of the pin's name, and the XDP flag.
    fn mode(&self) -> Option<(&'static str, u32)> {
        match self {
            Self::Native => Some(("xdp_native", XDP_FLAGS_DRV_MODE)),
            Self::Generic => Some(("xdp_generic", XDP_FLAGS_SKB_MODE)),
            Self::Tc(_) => None,
        }
    }

    /// The mode that the name of a pin states.
    pub(crate) fn of_pin(path: &Path) -> Option<Self> {
        let name = path.file_name()?.to_str()?;
        let ends =
            |handler: &Self| handler.mode().is_some_and(|(suffix, _)| name.ends_with(suffix));
        [Self::Native, Self::Generic].into_iter().find(ends)
    }
}

impl fmt::Display for Handler {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Native => formatter.write_str("XDP in the driver"),
            Self::Generic => formatter.write_str("XDP in the stack"),
            Self::Tc(reason) => write!(formatter, "tc: {reason}"),
        }
    }
}

/// The mode that is tried on a device.
pub fn wanted(mode: XdpMode, header: LinkHeader) -> Handler {
    if header != LinkHeader::Ethernet {
        return Handler::Tc("its packets have no Ethernet header".to_owned());
    }
    match mode {
        // Drivers rebuild their queues or give up offloads when XDP is attached, which an operator
        // must want.
        XdpMode::Auto => Handler::Tc("--xdp auto".to_owned()),
        XdpMode::Off => Handler::Tc("--xdp off".to_owned()),
        XdpMode::Generic => Handler::Generic,
        XdpMode::Native => Handler::Native,
    }
}

/// Attaches the program to devices, and remembers how each is handled.
#[derive(Debug)]
pub struct XdpAttacher {
    pins: Pins,
    mode: XdpMode,
    pinned: BTreeMap<u32, PinnedLink>,
    /// How each device is handled, as logged.
    handlers: BTreeMap<u32, Handler>,
    /// Devices that need no new attempt.
    up_to_date: BTreeSet<u32>,
}

impl XdpAttacher {
    /// Finds the links that an earlier agent pinned.
    ///
    /// # Errors
    /// [`AttachError::Pins`] if they cannot be listed.
    pub fn new(pins: &Pins, mode: XdpMode) -> Result<Self, AttachError> {
        let directory = pins.links();
        let found = pinned_links(directory)
            .map_err(|source| AttachError::Pins { path: directory.to_owned(), source })?;
        let mut pinned = BTreeMap::new();
        for (index, path) in found {
            let link = PinnedLink::open(pins, path.clone())
                .map_err(|source| AttachError::Pins { path, source })?;
            pinned.insert(index, link);
        }
        Ok(Self {
            pins: pins.clone(),
            mode,
            pinned,
            handlers: BTreeMap::new(),
            up_to_date: BTreeSet::new(),
        })
    }

    /// Attaches XDP to a device in the wanted mode if the driver and other programs allow it, and
    /// logs a change. An attached program of lb is replaced in place; other programs stay.
    pub fn attach(&mut self, programs: &Programs, interface: &Interface, header: LinkHeader) {
        self.up_to_date.insert(interface.index);
        let wanted = wanted(self.mode, header);
        let handler = match self.try_attach(programs, interface, &wanted) {
            Ok(()) => wanted,
            Err(error) => {
                self.detach(interface.index);
                Handler::Tc(explained(&error))
            }
        };
        if self.handlers.get(&interface.index) != Some(&handler) {
            let asked = matches!(self.mode, XdpMode::Native | XdpMode::Generic);
            if asked && matches!(handler, Handler::Tc(_)) {
                warn!(device = interface.name, "packets are handled by {handler}");
            } else {
                info!(device = interface.name, "packets are handled by {handler}");
            }
            self.handlers.insert(interface.index, handler);
        }
    }

    /// Whether the device needs no new attempt.
    pub fn is_up_to_date(&self, index: u32) -> bool {
        self.up_to_date.contains(&index)
    }

    /// Finds devices whose program is no longer attached, and marks them for a new
    /// attempt. Returns whether there are any.
    pub fn find_detached(&mut self, programs: &Programs) -> bool {
        let mut lost = false;
        for (index, link) in &self.pinned {
            let is_here = link
                .info()
                .is_ok_and(|info| info.target[0] == *index && programs.is(PROGRAM, info.program));
            if !is_here {
                lost |= self.up_to_date.remove(index);
            }
        }
        lost
    }

    /// Marks every device for a new attempt.
    pub fn recheck_all(&mut self) {
        self.up_to_date.clear();
    }

    /// Detaches the program from every other device, and forgets devices that are gone.
    pub fn retain(&mut self, devices: impl Fn(u32) -> bool) {
        let others: Vec<u32> = self
            .pinned
            .keys()
            .chain(self.handlers.keys())
            .copied()
            .filter(|i| !devices(*i))
            .collect();
        for index in others {
            self.handlers.remove(&index);
            self.up_to_date.remove(&index);
            self.detach(index);
        }
    }

    fn try_attach(
        &mut self,
        programs: &Programs,
        interface: &Interface,
        wanted: &Handler,
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
            debug!(path = %link.path().display(), "another device or mode: attaching a new link");
            self.detach(interface.index);
        }
        let target = LinkTarget::Xdp { interface: interface.index, flags };
        let path = self.pins.links().join(links::name(interface, suffix));
        let link = PinnedLink::create(&self.pins, program.as_fd(), target, BPF_XDP as u32, path)?;
        self.pinned.insert(interface.index, link);
        Ok(())
    }

    fn detach(&mut self, index: u32) {
        if let Some(link) = self.pinned.remove(&index)
            && let Err(error) = link.remove()
        {
            warn!(
                %error,
                index,
                "cannot detach XDP: its program still handles packets of this device; run \
                 `lb-agent cleanup` to detach it"
            );
        }
    }
}

/// Why a device is left to tc.
fn explained(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EBUSY | libc::EEXIST) => OCCUPIED.to_owned(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS) => "its driver does not support XDP".to_owned(),
        Some(libc::EINVAL | libc::ERANGE) => {
            "its driver rejects XDP, for example because of a large MTU".to_owned()
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
    fn a_device_gets_xdp_only_when_asked() {
        let rows = [
            (XdpMode::Auto, None),
            (XdpMode::Native, Some("xdp_native")),
            (XdpMode::Generic, Some("xdp_generic")),
            (XdpMode::Off, None),
        ];
        for (mode, expected) in rows {
            let suffix = wanted(mode, LinkHeader::Ethernet).mode().map(|(suffix, _)| suffix);
            assert_eq!(suffix, expected, "{mode:?}");
        }
    }
}
