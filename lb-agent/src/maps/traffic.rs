//! Traffic and rejected packets of each service port: TRAFFIC and DROPS.
//!
//! The programs count by index. The counts of an index are reset before it is used for another
//! service port.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    io,
};

use lb_common::abi::{
    counter::Reason,
    traffic::{DropKey, Traffic},
};
use lb_sys::PerCpuMap;

use super::{
    pins::{PinError, Pins},
    read::opened,
};

/// Traffic and rejected packets of service ports, by index.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Carried {
    /// How many indices are counted.
    pub counted: u32,
    /// The traffic; without the indices that have none.
    pub traffic: HashMap<u32, Traffic>,
    /// The rejected packets, by the name of the reason.
    pub drops: HashMap<u32, BTreeMap<&'static str, u64>>,
}

/// Reads the counts; none if the agent that pinned the maps had no such maps.
///
/// # Errors
/// [`PinError`] if a map has another layout or cannot be read.
pub fn carried(pins: &Pins) -> Result<Carried, PinError> {
    let counts = match Counts::open(pins) {
        Err(PinError::Missing { .. }) => return Ok(Carried::default()),
        result => result?,
    };
    counts.read().map_err(|source| PinError::Open { path: pins.map("TRAFFIC"), source })
}

/// The maps.
#[derive(Debug)]
pub struct Counts {
    traffic: PerCpuMap<u32, Traffic>,
    drops: PerCpuMap<DropKey, u64>,
    /// Indices that may have counts.
    used: HashSet<u32>,
}

impl Counts {
    /// Opens the maps.
    ///
    /// # Errors
    /// [`PinError`] if one is missing or of another layout.
    pub fn open(pins: &Pins) -> Result<Self, PinError> {
        Ok(Self {
            traffic: opened(pins, "TRAFFIC", PerCpuMap::new)?,
            drops: opened(pins, "DROPS", PerCpuMap::new)?,
            used: HashSet::new(),
        })
    }

    /// Adopts the counts of an earlier agent's programs.
    ///
    /// # Errors
    /// The errors of reading the maps.
    pub fn adopt(&mut self) -> io::Result<()> {
        let carried = self.read()?;
        self.used.extend(carried.traffic.keys().chain(carried.drops.keys()));
        Ok(())
    }

    /// An index goes out of use: its counts have to be reset.
    pub fn retire(&mut self, index: u32) {
        self.used.insert(index);
    }

    /// An index is used for a service port: resets its counts.
    ///
    /// # Errors
    /// The errors of writing the maps.
    pub fn begin(&mut self, index: u32) -> io::Result<()> {
        if !self.used.contains(&index) {
            return Ok(());
        }
        if index < self.traffic.max_entries() {
            self.traffic.set_all(&index, Traffic::default())?;
        }
        for reason in rejections() {
            self.drops.remove(&DropKey { service: index, reason: reason as u32 })?;
        }
        self.used.remove(&index);
        Ok(())
    }

    fn read(&self) -> io::Result<Carried> {
        let counted = self.traffic.max_entries();
        let mut carried = Carried { counted, ..Carried::default() };
        self.traffic.visit(|index, values| {
            let mut sum = Traffic::default();
            for value in values {
                sum.packets = sum.packets.wrapping_add(value.packets);
                sum.bytes = sum.bytes.wrapping_add(value.bytes);
            }
            if sum != Traffic::default() {
                carried.traffic.insert(index, sum);
            }
        })?;
        self.drops.visit(|DropKey { service, reason }, values| {
            let sum = values.iter().fold(0, |sum: u64, value| sum.wrapping_add(*value));
            if let Some(reason) = rejections().find(|known| *known as u32 == reason) {
                carried.drops.entry(service).or_default().insert(reason.name(), sum);
            }
        })?;
        Ok(carried)
    }
}

/// The reasons that DROPS may hold.
fn rejections() -> impl Iterator<Item = Reason> {
    let all = Reason::ALL.iter().copied();
    all.filter(|reason| Reason::REJECTED >> *reason as u32 & 1 != 0)
}
