//! Attaches programs to interfaces by tcx links or clsact filters. They outlive the agent, and
//! the next agent replaces them in place.
//!
//! It never touches programs of others. [`follow`](crate::network::follow) decides which program
//! belongs on which interface.

use std::{
    collections::{HashMap, HashSet},
    io,
    os::fd::AsFd,
    path::PathBuf,
};

use lb_control::model::network::Interface;
use lb_sys::LinkTarget;
use tracing::debug;

use super::{
    clsact,
    features::has_tcx,
    hook::{AttachPoint, Direction, Role},
    links::{self, PinnedLink},
    load::{LoadError, Programs},
    names::Names,
    order,
};
use crate::{maps::pins::Pins, options::modes::TcAttach};

/// Attaches programs to interfaces, and remembers which it attached.
#[derive(Debug)]
pub struct TcAttacher {
    pins: Pins,
    by_tcx: bool,
    pinned: HashMap<(u32, Direction), PinnedLink>,
    names: Names,
    /// The interfaces that may have filters; `None` if that is unknown.
    with_filters: Option<HashSet<u32>>,
}

impl TcAttacher {
    /// Finds the links that an earlier agent pinned. `names` are the names of their programs.
    ///
    /// # Errors
    /// [`AttachError::Pins`] if they cannot be listed.
    pub fn new(pins: &Pins, attach: TcAttach, names: Names) -> Result<Self, AttachError> {
        let directory = pins.links();
        let by_tcx = match attach {
            TcAttach::Auto => has_tcx(),
            TcAttach::Tcx => true,
            TcAttach::Clsact => false,
        };
        let found = links::pinned(directory, Direction::of_name)
            .map_err(|source| AttachError::Pins { path: directory.to_owned(), source })?;
        let mut pinned = HashMap::new();
        for (index, direction, path) in found {
            let link = PinnedLink::open(pins, path.clone())
                .map_err(|source| AttachError::Pins { path, source })?;
            pinned.insert((index, direction), link);
        }
        Ok(Self { pins: pins.clone(), by_tcx, pinned, names, with_filters: None })
    }

    /// Whether programs are attached by tcx links.
    pub fn is_by_tcx(&self) -> bool {
        self.by_tcx
    }

    /// Finds the interfaces that may have filters, of an earlier agent or of others, by one request:
    /// until the next call no other interface is asked for its filters.
    pub fn find_filters(&mut self) {
        self.with_filters =
            clsact::interfaces().inspect_err(|error| debug!(%error, "cannot list the qdiscs")).ok();
    }

    fn may_have_filters(&self, index: u32) -> bool {
        self.with_filters.as_ref().is_none_or(|with| with.contains(&index))
    }

    /// The interfaces that have links, by index.
    pub fn linked(&self) -> impl Iterator<Item = (u32, Direction)> {
        self.pinned.keys().copied()
    }

    /// The role of the interface that its attached lb programs are for. External if they disagree,
    /// which happens between the two steps of a change.
    pub fn attached_role(&self, index: u32) -> Option<Role> {
        let roles = [Direction::Ingress, Direction::Egress].map(|direction| {
            let program = self.attached_program(index, direction).unwrap_or_else(|error| {
                debug!(%error, index, "cannot read which program is attached");
                None
            });
            program.as_deref().and_then(Role::of_program)
        });
        match roles {
            [Some(Role::External), _] | [_, Some(Role::External)] => Some(Role::External),
            [ingress, egress] => ingress.or(egress),
        }
    }

    /// The name of the lb program on an interface; `None` also for a program of an agent that
    /// did not pin its programs.
    ///
    /// # Errors
    /// The errors of reading a link or a filter from the kernel.
    pub fn attached_program(&self, index: u32, direction: Direction) -> io::Result<Option<String>> {
        let Some(link) = self.pinned.get(&(index, direction)) else {
            return match self.may_have_filters(index) {
                true => clsact::attached_program(index, direction),
                false => Ok(None),
            };
        };
        let info = link.info()?;
        if info.target != [index, direction.tcx()] {
            return Ok(None);
        }
        Ok(self.names.of(info.program).map(str::to_owned))
    }

    /// Whether `program` still sees the packets of an interface.
    pub fn is_attached(
        &self,
        programs: &Programs,
        program: &'static str,
        (index, direction): (u32, Direction),
    ) -> bool {
        if !self.by_tcx {
            return clsact::attached_program(index, direction)
                .is_ok_and(|attached| attached.as_deref() == Some(program));
        }
        let Some(link) = self.pinned.get(&(index, direction)) else { return false };
        link.info().is_ok_and(|info| {
            info.target == [index, direction.tcx()] && programs.is(program, info.program)
        })
    }

    /// The programs of others at an attach point that are on the wrong side of lb's own: they see
    /// other addresses than beside kube-proxy.
    ///
    /// # Errors
    /// The errors of reading links and filters from the kernel.
    pub fn misplaced(&self, (index, direction): AttachPoint) -> io::Result<Vec<String>> {
        let mut found = Vec::new();
        let link = self.pinned.get(&(index, direction));
        if let Some(link) = link {
            let all = lb_sys::tcx_query(index, direction.tcx())?;
            let misplaced = order::misplaced_programs(direction, &all, link.info()?.program);
            found.extend(misplaced.iter().map(|id| format!("tcx program {id}")));
        }
        if !self.may_have_filters(index) {
            return Ok(found);
        }
        let filters = clsact::others(index, direction)?;
        let filters = order::misplaced_filters(direction, filters, link.is_some());
        found.extend(filters.iter().map(ToString::to_string));
        Ok(found)
    }

    /// Attaches `program` to `interface`. An lb program that is attached already is replaced in
    /// place: every packet sees exactly one of the two.
    ///
    /// # Errors
    /// [`AttachError`].
    pub fn attach(
        &mut self,
        programs: &Programs,
        program: &'static str,
        interface: &Interface,
        direction: Direction,
    ) -> Result<(), AttachError> {
        let descriptor = programs.get(program)?;
        let failed = |source| AttachError::Interface {
            program,
            interface: interface.name.clone(),
            direction: direction.name(),
            source,
        };
        if self.by_tcx {
            self.attach_tcx(descriptor.as_fd(), interface, direction).map_err(failed)?;
            return match self.may_have_filters(interface.index) {
                true => clsact::remove(interface.index, direction).map_err(failed),
                false => Ok(()),
            };
        }
        clsact::replace(interface.index, direction, descriptor.as_fd(), program).map_err(failed)?;
        if let Some(with) = &mut self.with_filters {
            with.insert(interface.index);
        }
        self.unlink(interface.index, direction).map_err(failed)
    }

    fn attach_tcx(
        &mut self,
        program: std::os::fd::BorrowedFd<'_>,
        interface: &Interface,
        direction: Direction,
    ) -> io::Result<()> {
        if let Some(link) = self.pinned.get(&(interface.index, direction)) {
            if link.info()?.target == [interface.index, direction.tcx()] {
                return link.update(program);
            }
            debug!(path = %link.path().display(), "the link is detached: attaching a new one");
            self.unlink(interface.index, direction)?;
        }
        // See `order`: what others see of a packet depends on it.
        let target = match direction {
            Direction::Ingress => LinkTarget::Interface(interface.index),
            Direction::Egress => LinkTarget::InterfaceFirst(interface.index),
        };
        let path = self.pins.links().join(links::name(interface, direction.name()));
        let link = PinnedLink::create(&self.pins, program, target, direction.tcx(), path)?;
        self.pinned.insert((interface.index, direction), link);
        Ok(())
    }

    /// Detaches the lb program from an interface, or forgets an interface that is gone.
    ///
    /// # Errors
    /// [`AttachError::Detach`].
    pub fn detach(&mut self, index: u32, direction: Direction) -> Result<(), AttachError> {
        self.unlink(index, direction).and_then(|()| clsact::remove(index, direction)).map_err(
            |source| AttachError::Detach { interface: index, direction: direction.name(), source },
        )
    }

    fn unlink(&mut self, index: u32, direction: Direction) -> io::Result<()> {
        match self.pinned.remove(&(index, direction)) {
            Some(link) => link.remove(),
            None => Ok(()),
        }
    }
}

/// A program could not be attached or detached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The program is missing.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The links that are pinned cannot be listed.
    #[error("cannot list the links in {}", path.display())]
    Pins {
        /// Where they are.
        path: PathBuf,
        /// The error of the kernel.
        #[source]
        source: io::Error,
    },
    /// A program could not be attached to an interface.
    #[error("cannot attach {program} to {direction} of {interface}")]
    Interface {
        /// The program.
        program: &'static str,
        /// The interface.
        interface: String,
        /// `ingress` or `egress`.
        direction: &'static str,
        /// The error of the kernel.
        #[source]
        source: io::Error,
    },
    /// The directory is no cgroup.
    #[error("{} is no cgroup v2 directory: correct --cgroup", .0.display())]
    NoCgroup(PathBuf),
    /// A program could not be attached to a cgroup.
    #[error("cannot attach {program} to the cgroup {}", cgroup.display())]
    Cgroup {
        /// The program.
        program: &'static str,
        /// The directory of the cgroup.
        cgroup: PathBuf,
        /// The error of the kernel.
        #[source]
        source: io::Error,
    },
    /// A program could not be detached from an interface.
    #[error("cannot detach a program from {direction} of the interface with index {interface}")]
    Detach {
        /// The index of the interface.
        interface: u32,
        /// `ingress` or `egress`.
        direction: &'static str,
        /// The error of the kernel.
        #[source]
        source: io::Error,
    },
    /// A program could not be detached from a cgroup.
    #[error("cannot detach {program}, whose link is pinned at {}", link.display())]
    DetachCgroup {
        /// The program.
        program: &'static str,
        /// The pin of its link.
        link: PathBuf,
        /// The error of the kernel.
        #[source]
        source: io::Error,
    },
}

/// Whether the interface was removed in the meantime.
pub fn is_gone(error: &AttachError) -> bool {
    match error {
        AttachError::Interface { source, .. } | AttachError::Detach { source, .. } => {
            matches!(source.raw_os_error(), Some(libc::ENODEV | libc::ENOLINK))
        }
        AttachError::Load(_)
        | AttachError::Pins { .. }
        | AttachError::NoCgroup(_)
        | AttachError::Cgroup { .. }
        | AttachError::DetachCgroup { .. } => false,
    }
}
