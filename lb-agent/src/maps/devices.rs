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

/// DEVICES, with an index for each device that stays the same for as long as the device
/// is one of ours: flows hold it.
#[derive(Debug)]
pub struct Devices {
    /// Without the epoch.
    pub(crate) entries: Vec<Device>,
    pub(crate) epoch: u32,
    pub(crate) map: MappedArray<Device>,
}

impl Devices {
    /// Opens the map and takes over what it holds.
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

    /// Makes the entries those of `devices`; tells which found no room.
    ///
    /// # Errors
    /// [`DataplaneError`] if the map cannot be written.
    pub fn set(&mut self, devices: &[Device]) -> Result<Vec<Device>, DataplaneError> {
        let wanted = placed(&self.entries, devices);
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

    /// Has every flow ask anew where its packets go: routes or neighbours may have changed.
    /// More often than a hundred times in a second the numbers would come round within the
    /// second that a flow remembers.
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

/// Where the epoch of a device lies in its entry.
pub(crate) const EPOCH: usize = offset_of!(Device, epoch);

/// Where `devices` go, given where devices are: those that are there stay, new ones
/// take free entries. Then those that found none.
pub(crate) fn placed(entries: &[Device], devices: &[Device]) -> (Vec<Device>, Vec<Device>) {
    let mut placed = vec![Device::zeroed(); entries.len()];
    let mut left = Vec::new();
    for device in devices {
        let same = |entry: &Device| entry.ifindex == device.ifindex;
        match entries.iter().position(same) {
            Some(position) => placed[position] = *device,
            None => left.push(*device),
        }
    }
    let mut unplaced = Vec::new();
    for device in left {
        match placed.iter_mut().find(|entry| entry.ifindex == 0) {
            Some(free) => *free = device,
            None => unplaced.push(device),
        }
    }
    (placed, unplaced)
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
        let (first, _) = placed(&none, &[device(5, 1), device(7, 2)]);
        assert_eq!(first, [device(5, 1), device(7, 2), Device::zeroed()]);
        let (second, _) = placed(&first, &[device(7, 9), device(8, 3)]);
        assert_eq!(second, [device(8, 3), device(7, 9), Device::zeroed()]);
        let all = [device(1, 0), device(2, 0), device(7, 9), device(8, 3)];
        let (third, unplaced) = placed(&second, &all);
        assert_eq!(third, [device(8, 3), device(7, 9), device(1, 0)]);
        assert_eq!(unplaced, [device(2, 0)]);
    }
}
