//! The names of attached programs: the kernel reports only their ids.
//!
//! To open a program by its id takes CAP_SYS_ADMIN, which the agent does not have. Therefore it
//! pins the programs that it attaches to interfaces, and finds an earlier agent's ids by its pins.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd, BorrowedFd},
    sync::Arc,
};

use super::hook::Role;
use crate::maps::pins::Pins;

/// The names of the programs that are or were pinned, by the kernel's ids.
#[derive(Clone, Debug, Default)]
pub struct Names(HashMap<u32, String>);

impl Names {
    /// The ids of the programs that are pinned now.
    ///
    /// # Errors
    /// If a pin cannot be read.
    pub fn pinned(pins: &Pins) -> io::Result<Self> {
        let mut names = HashMap::new();
        for name in Role::PROGRAMS {
            let program = match lb_sys::obj_get(&pins.program(name)) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                result => result?,
            };
            names.insert(lb_sys::program_info(program.as_fd())?.id, name.to_owned());
        }
        Ok(Self(names))
    }

    /// The name of the program with this id.
    pub fn of(&self, id: u32) -> Option<&str> {
        self.0.get(&id).map(String::as_str)
    }
}

/// Pins the programs of interfaces, which `program` finds, in place of those of an earlier agent.
/// Returns the names of both.
pub(super) fn replace<'a>(
    pins: &Pins,
    program: impl Fn(&'static str) -> io::Result<BorrowedFd<'a>>,
) -> io::Result<Names> {
    let mut names = Names::pinned(pins)?;
    for name in Role::PROGRAMS {
        let program = program(name)?;
        pins.kept().pin(&pins.program(name), Arc::new(program.try_clone_to_owned()?))?;
        names.0.insert(lb_sys::program_info(program)?.id, name.to_owned());
    }
    Ok(names)
}
