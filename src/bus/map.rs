//! Which device owns which addresses: a sorted table of ranges that do not overlap.

use std::sync::Arc;

use super::Device;

/// Two devices were given the same address.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{name} at {start:#x} overlaps {other}")]
pub struct Overlap {
    pub name: String,
    pub start: u64,
    pub other: String,
}

#[derive(Clone)]
struct Entry {
    start: u64,
    /// Inclusive, so that a range may touch the end of the address space.
    last: u64,
    device: Arc<dyn Device>,
}

/// The address map of one bus.
#[derive(Clone, Default)]
pub struct AddressMap {
    entries: Vec<Entry>,
}

impl AddressMap {
    /// An empty map.
    pub fn new() -> AddressMap {
        AddressMap::default()
    }

    /// Puts `device` at `start`, `len` bytes or ports long. The same device may be put at several places.
    ///
    /// # Errors
    /// When a part of the range has an owner already.
    pub fn insert(&mut self, start: u64, len: u64, device: Arc<dyn Device>) -> Result<(), Overlap> {
        let last = start.saturating_add(len.saturating_sub(1));
        let index = self.entries.partition_point(|entry| entry.last < start);
        if let Some(other) = self.entries.get(index).filter(|entry| entry.start <= last) {
            let (name, other) = (device.name().to_owned(), other.device.name().to_owned());
            return Err(Overlap { name, start, other });
        }
        self.entries.insert(
            index,
            Entry {
                start,
                last,
                device,
            },
        );
        Ok(())
    }

    /// The owner of all `len` bytes at `address`, and the offset of `address` in its range.
    pub fn find(&self, address: u64, len: usize) -> Option<(&dyn Device, u64)> {
        let index = self.entries.partition_point(|entry| entry.last < address);
        let entry = self
            .entries
            .get(index)
            .filter(|entry| entry.start <= address)?;
        let last = address.checked_add((len as u64).checked_sub(1)?)?;
        (last <= entry.last).then(|| (&*entry.device, address - entry.start))
    }

    /// All ranges in ascending order: first address, last address, device.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64, &Arc<dyn Device>)> {
        self.entries
            .iter()
            .map(|entry| (entry.start, entry.last, &entry.device))
    }
}
