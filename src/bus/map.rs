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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::{Action, RestoreError, SavedState};

    struct Named(&'static str);

    impl Device for Named {
        fn name(&self) -> &str {
            self.0
        }

        fn read(&self, _offset: u64, data: &mut [u8]) {
            data.fill(0);
        }

        fn write(&self, _offset: u64, _data: &[u8]) -> Action {
            Action::Continue
        }

        fn save(&self) -> SavedState {
            SavedState::of(&())
        }

        fn restore(&self, _state: &SavedState) -> Result<(), RestoreError> {
            Ok(())
        }
    }

    fn map() -> AddressMap {
        let mut map = AddressMap::new();
        for (start, len, name) in [(0x3f8, 8, "COM1"), (0x60, 1, "I8042"), (u64::MAX, 1, "TOP")] {
            map.insert(start, len, Arc::new(Named(name))).unwrap();
        }
        map
    }

    #[test]
    fn an_access_finds_its_owner_only_when_it_lies_wholly_inside() {
        let map = map();
        let found = |address, len| {
            map.find(address, len)
                .map(|(device, at)| (device.name().to_owned(), at))
        };
        assert_eq!(found(0x3f8, 1), Some(("COM1".to_owned(), 0)));
        assert_eq!(found(0x3ff, 1), Some(("COM1".to_owned(), 7)));
        assert_eq!(found(0x3ff, 2), None);
        assert_eq!(found(0x3f7, 1), None);
        assert_eq!(found(u64::MAX, 1), Some(("TOP".to_owned(), 0)));
        assert_eq!(found(u64::MAX, 8), None);
        assert_eq!(found(0x60, 0), None);
    }

    #[test]
    fn two_devices_cannot_have_the_same_address() {
        let mut map = map();
        let overlap = map.insert(0x3f0, 9, Arc::new(Named("FDC"))).unwrap_err();
        assert_eq!(overlap.to_string(), "FDC at 0x3f0 overlaps COM1");
        assert!(map.insert(0x3f0, 8, Arc::new(Named("FDC"))).is_ok());
        let order: Vec<u64> = map.iter().map(|(start, _, _)| start).collect();
        assert_eq!(order, [0x60, 0x3f0, 0x3f8, u64::MAX]);
    }
}
