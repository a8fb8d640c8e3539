//! How long ago something was.

use std::{io, os::fd::AsFd};

use lb_common::{abi::settings::Settings, flow_table::age};

use super::GetError;
use crate::maps::{flow_table, pins::Pins, read::read_settings};

/// Computes how long ago something was.
pub(super) struct Clock {
    pub(super) now: Option<u32>,
    pub(super) settings: Settings,
}

impl Clock {
    pub(super) fn open(pins: &Pins) -> Result<Self, GetError> {
        let now =
            || -> io::Result<u32> { lb_sys::ticks_now(lb_sys::obj_get(&pins.clock())?.as_fd()) };
        Ok(Self { now: now().ok(), settings: read_settings(pins)? })
    }

    /// The seconds since `last_seen`, in ticks.
    pub(super) fn seconds_since(&self, last_seen: u32) -> Option<u32> {
        let ticks = self.now?.wrapping_sub(last_seen);
        // The entry was updated after the clock was read.
        let ticks = if ticks > u32::MAX / 2 { 0 } else { ticks };
        ticks.checked_div(self.settings.ticks_per_second)
    }

    /// The seconds since `time`, a flow's.
    pub(super) fn seconds_idle(&self, time: u32) -> Option<u32> {
        let idle = age(time, self.settings.time(self.now?));
        flow_table::seconds(idle, &self.settings)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_time_is_not_made_up() {
        let settings = Settings { ticks_per_second: 100, time_shift: 3, ..Settings::default() };
        let clock = Clock { now: Some(1000), settings };
        assert_eq!(clock.seconds_since(500), Some(5));
        assert_eq!(clock.seconds_since(1003), Some(0));
        assert_eq!(clock.seconds_idle(settings.time(480)), Some(5));
        assert_eq!(clock.seconds_idle(settings.time(1016)), Some(0));
        let unknown = Clock { now: None, settings };
        assert_eq!((unknown.seconds_since(500), unknown.seconds_idle(9)), (None, None));
        let unset = Clock { now: Some(1000), settings: Settings::default() };
        assert_eq!((unset.seconds_since(500), unset.seconds_idle(9)), (None, None));
    }
}
