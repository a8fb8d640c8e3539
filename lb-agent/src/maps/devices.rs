//! The map DEVICES.

use std::{fmt::Debug, mem::offset_of};

use bytemuck::Zeroable;
use lb_common::abi::settings::Device;
use lb_control::dataplane::DataplaneError;

use super::{
    mapped::{MappedArray, word_of},
    pins::{PinError, Pins},
    read::{failed, opened},
};

/// DEVICES. The index of a device never changes while the device has an entry, because flows hold
/// the index.
#[derive(Debug)]
pub struct Devices {
    /// The entries, with epoch 0.
    pub(crate) entries: Vec<Device>,
    pub(crate) epoch: u32,
    pub(crate) map: MappedArray<Device>,
}

impl Devices {
    /// Opens the map and adopts its entries.
    ///
    /// # Errors
    /// [`PinError`] if it is missing or of another layout.
    pub fn open(pins: &Pins) -> Result<Self, PinError> {
        let mut map = opened(pins, "DEVICES", MappedArray::<Device>::writable)?;
        let mut entries = map
            .load_all()
            .map_err(|source| PinError::Open { path: pins.map("DEVICES"), source })?;
        let epoch = entries.iter().map(|entry| entry.epoch).max().unwrap_or_default();
        entries.iter_mut().for_each(|entry| entry.epoch = 0);
        Ok(Self { entries, epoch, map })
    }

    /// Replaces the entries by `devices`. Returns the devices for which no entry is free.
    ///
    /// # Errors
    /// [`DataplaneError`] if the map cannot be written.
    pub fn set(&mut self, devices: &[Device]) -> Result<Vec<Device>, DataplaneError> {
        let wanted = assign(&self.entries, devices);
        if self.entries != wanted.0 {
            self.invalidate_next_hops()?;
        }
        for (index, (entry, next)) in (0..).zip(self.entries.iter_mut().zip(&wanted.0)) {
            if entry != next {
                const MTU: usize = offset_of!(Device, mtu);
                let [_, _, tail, ..] = bytemuck::cast::<Device, [[u8; 4]; 5]>(*next);
                self.map
                    .store_part(index, EPOCH, &self.epoch)
                    .and_then(|()| self.map.store_part(index, MTU, &next.mtu))
                    .and_then(|()| self.map.store_part(index, 8, &tail))
                    .and_then(|()| self.map.publish(index, 0, word_of(next, 0)))
                    .map_err(failed("DEVICES", || format!("store of device {index}")))?;
                *entry = *next;
            }
        }
        Ok(wanted.1)
    }

    /// Invalidates the next hop that each flow has cached, because routes or neighbours may have
    /// changed. At more than a hundred calls a second the epoch would wrap around within the
    /// second for which a flow caches its next hop.
    ///
    /// # Errors
    /// [`DataplaneError`] if the map cannot be written.
    pub fn invalidate_next_hops(&mut self) -> Result<(), DataplaneError> {
        self.epoch = self.epoch % 255 + 1;
        for (index, _) in (0..).zip(&self.entries).filter(|(_, entry)| entry.ifindex != 0) {
            self.map
                .store_part(index, EPOCH, &self.epoch)
                .map_err(failed("DEVICES", || format!("store of the epoch of device {index}")))?;
        }
        Ok(())
    }
}

/// The offset of the epoch in an entry.
pub(crate) const EPOCH: usize = offset_of!(Device, epoch);

/// Assigns `devices` to entries: those that have an entry keep it, new ones get a free one. Also
/// returns the devices for which no entry is free.
pub(crate) fn assign(entries: &[Device], devices: &[Device]) -> (Vec<Device>, Vec<Device>) {
    let mut assigned = vec![Device::zeroed(); entries.len()];
    let mut new = Vec::new();
    for device in devices {
        let same = |entry: &Device| entry.ifindex == device.ifindex;
        match entries.iter().position(same) {
            Some(position) => assigned[position] = *device,
            None => new.push(*device),
        }
    }
    let mut unplaced = Vec::new();
    for device in new {
        match assigned.iter_mut().find(|entry| entry.ifindex == 0) {
            Some(free) => *free = device,
            None => unplaced.push(device),
        }
    }
    (assigned, unplaced)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(ifindex: u32, last: u8) -> Device {
        Device { ifindex, mac: [2, 0, 0, 0, 0, last], ..Device::default() }
    }

    #[test]
    fn a_device_keeps_its_entry_while_others_come_and_go() {
        let none = vec![Device::zeroed(); 3];
        let (first, _) = assign(&none, &[device(5, 1), device(7, 2)]);
        assert_eq!(first, [device(5, 1), device(7, 2), Device::zeroed()]);
        let (second, _) = assign(&first, &[device(7, 9), device(8, 3)]);
        assert_eq!(second, [device(8, 3), device(7, 9), Device::zeroed()]);
        let all = [device(1, 0), device(2, 0), device(7, 9), device(8, 3)];
        let (third, unplaced) = assign(&second, &all);
        assert_eq!(third, [device(8, 3), device(7, 9), device(1, 0)]);
        assert_eq!(unplaced, [device(2, 0)]);
    }
}
