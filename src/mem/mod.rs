//! Guest RAM: host memory that the guest sees as its physical memory.
//!
//! RAM is anonymous private memory of this process, reserved but not committed: the host gives a page
//! the first time the guest touches it (EPT/NPT violation, then an ordinary page fault of ours), so a
//! 4 GiB guest that touches 50 MiB costs 50 MiB. Regions start on 2 MiB boundaries in the host's address
//! space too, so that the host can back them with huge pages.

mod file;
mod region;

pub use file::FileRegion;
pub use region::RamRegion;
pub use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryRegion};

use std::sync::Arc;

use vm_memory::GuestRegionCollection;

use crate::hv::{self, MemorySlot};

/// Bytes in a huge page of the second paging level (SDM Vol. 3A 4.5).
const HUGE_PAGE: usize = 2 << 20;

/// All RAM of one guest. Clones share the memory.
pub type GuestRam = GuestRegionCollection<RamRegion>;

/// A range of guest RAM, as a device's request names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    pub address: GuestAddress,
    /// Length in bytes.
    pub len: u32,
}

impl Buffer {
    /// Whether all of it is RAM, in one region.
    pub fn is_in(self, ram: &GuestRam) -> bool {
        ram.find_region(self.address).is_some_and(|region| {
            let offset = self.address.0 - region.start_addr().0;
            u64::from(self.len) <= region.len() - offset
        })
    }
}

/// Why guest RAM could not be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot reserve {mib} MiB of memory for the guest: {source}; ask for less with --mem")]
    Map { mib: u64, source: std::io::Error },
    #[error("the guest's memory ranges overlap")]
    Overlap,
}

/// Reserves host memory for each range: guest physical address and length in bytes, ascending.
///
/// # Errors
/// When the host has not enough address space, or ranges overlap.
pub fn allocate(ranges: &[(GuestAddress, u64)]) -> Result<GuestRam, Error> {
    let regions: Result<Vec<RamRegion>, Error> = ranges
        .iter()
        .map(|&(start, len)| {
            RamRegion::new(start, len).map_err(|source| Error::Map {
                mib: len >> 20,
                source,
            })
        })
        .collect();
    GuestRam::from_regions(regions?).map_err(|_| Error::Overlap)
}

/// Gives `ram` to `vm`, which keeps it mapped for as long as its vCPUs exist.
///
/// # Errors
/// When the hypervisor refuses a range.
pub fn attach(ram: &GuestRam, vm: &dyn hv::Vm) -> hv::Result<()> {
    for (index, region) in (0..).zip(ram.iter()) {
        let slot = MemorySlot {
            index,
            guest: region.start_addr().0,
            host: region.host_address(),
            len: region.len(),
            read_only: false,
        };
        // SAFETY: the clone shares the mapping and keeps it, and both sides reach the bytes only through
        // vm-memory's volatile accesses.
        unsafe { vm.add_memory(slot, Arc::new(ram.clone()))? };
    }
    Ok(())
}

/// Gives the host pages that lie wholly in a range of RAM back to the host: they read as zeroes from then on, and take
/// memory again when somebody touches them. What is not RAM is left out.
///
/// A device may have just such a page in its hands for an operation that is under way. That is the guest's loss alone: the
/// operation keeps the old page until it ends, or finds a new one full of zeroes.
///
/// # Errors
/// What `madvise(2)` says.
pub fn discard(ram: &GuestRam, start: GuestAddress, len: u64) -> std::io::Result<()> {
    let end = start.0.saturating_add(len);
    for region in ram.iter() {
        let first = region.start_addr().0;
        let (from, to) = (
            start.0.max(first),
            end.min(first.saturating_add(region.len())),
        );
        if from < to {
            region.discard(from - first, to - from)?;
        }
    }
    Ok(())
}

/// Gives a file to `vm` as its memory slot number `index`, at a guest physical address; `vm` keeps it mapped for as
/// long as its vCPUs exist.
///
/// # Errors
/// When the hypervisor refuses the range.
pub fn attach_file(
    region: &Arc<FileRegion>,
    guest: GuestAddress,
    index: u32,
    vm: &dyn hv::Vm,
) -> hv::Result<()> {
    let slot = MemorySlot {
        index,
        guest: guest.0,
        host: region.host_address(),
        len: region.size(),
        read_only: region.is_read_only(),
    };
    // SAFETY: the clone keeps the mapping, whose bytes nothing but the guest accesses.
    unsafe { vm.add_memory(slot, Arc::clone(region) as hv::MemoryOwner) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_reads_back_what_was_written_and_ends_where_it_ends() {
        let ram =
            allocate(&[(GuestAddress(0), 4 << 20), (GuestAddress(1 << 32), 2 << 20)]).unwrap();
        ram.write_obj(0x1234_5678_u32, GuestAddress((1 << 32) + 16))
            .unwrap();
        assert_eq!(
            ram.read_obj::<u32>(GuestAddress((1 << 32) + 16)).unwrap(),
            0x1234_5678
        );
        assert!(ram.write_obj(1_u8, GuestAddress(4 << 20)).is_err());
        assert!(
            ram.write_slice(&[0; 16], GuestAddress((4 << 20) - 8))
                .is_err()
        );
        for region in ram.iter() {
            assert_eq!(region.host_address() % (2 << 20), 0);
        }
    }

    #[test]
    fn what_lies_next_to_ram_in_this_process_cannot_be_accessed() {
        let len = 4 << 20;
        let ram = allocate(&[(GuestAddress(0), len)]).unwrap();
        let host = ram.iter().next().unwrap().host_address();
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let access = |address: u64| {
            maps.lines().find_map(|line| {
                let (range, rest) = line.split_once(' ')?;
                let (start, end) = range.split_once('-')?;
                let number = |text| u64::from_str_radix(text, 16).unwrap();
                (number(start)..number(end))
                    .contains(&address)
                    .then(|| rest[..2].to_owned())
            })
        };
        for (address, expected) in [
            (host - 1, "--"),
            (host, "rw"),
            (host + len - 1, "rw"),
            (host + len, "--"),
            (host + len + (1 << 20), "--"),
        ] {
            assert_eq!(access(address).as_deref(), Some(expected), "{address:#x}");
        }
    }

    #[test]
    fn memory_that_the_host_cannot_address_is_an_error() {
        assert!(matches!(
            allocate(&[(GuestAddress(0), 1 << 52)]),
            Err(Error::Map { .. })
        ));
    }

    #[test]
    fn discarded_pages_are_zero_and_their_neighbours_are_not() {
        let ram =
            allocate(&[(GuestAddress(0), 2 << 20), (GuestAddress(8 << 20), 2 << 20)]).unwrap();
        let ones = vec![1; 2 << 20];
        for start in [0, 8 << 20] {
            ram.write_slice(&ones, GuestAddress(start)).unwrap();
        }
        let zeroes = |start: u64| {
            let mut bytes = vec![0; 2 << 20];
            ram.read_slice(&mut bytes, GuestAddress(start)).unwrap();
            bytes.iter().filter(|byte| **byte == 0).count()
        };
        // Only whole pages of the host go: the second of the three that this touches.
        discard(&ram, GuestAddress(4095), 4098).unwrap();
        assert_eq!(zeroes(0), 4096);
        discard(&ram, GuestAddress(4096), 4095).unwrap();
        discard(&ram, GuestAddress(0), 0).unwrap();
        discard(&ram, GuestAddress(3 << 20), 2 << 20).unwrap();
        discard(&ram, GuestAddress(u64::MAX), u64::MAX).unwrap();
        assert_eq!((zeroes(0), zeroes(8 << 20)), (4096, 0));
        // From inside one region over the hole into the next.
        discard(&ram, GuestAddress(1 << 20), 8 << 20).unwrap();
        assert_eq!((zeroes(0), zeroes(8 << 20)), (4096 + (1 << 20), 1 << 20));
    }
}
