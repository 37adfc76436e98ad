//! The page tables that a 64-bit kernel is entered with: an identity map of the first 4 GiB.
//!
//! Long mode knows no life without paging, so whoever enters a kernel in 64-bit mode must bring page
//! tables along. Three levels do: one PML4, one page-directory-pointer table, and a page directory for
//! each GiB whose 512 entries map 2 MiB each (SDM Vol. 3A 4.5). 1 GiB pages would save the last level,
//! but not every CPU has them.

/// Bit 0: present.
const P: u64 = 1 << 0;
/// Bit 1: writable.
const RW: u64 = 1 << 1;
/// Bit 7: the entry maps a page rather than pointing to a table.
const PS: u64 = 1 << 7;

const ENTRIES: u64 = 512;
const TABLE_BYTES: u64 = 4096;
/// GiB that are mapped.
const DIRECTORIES: u64 = 4;

/// The six tables as they lie in memory from `address` on: PML4, PDPT, four page directories.
pub fn identity_map(address: u64) -> Vec<u8> {
    let pdpt = address + TABLE_BYTES;
    let directories = pdpt + TABLE_BYTES;
    let table = |entries: u64, entry: &dyn Fn(u64) -> u64| -> Vec<u8> {
        (0..ENTRIES)
            .flat_map(|i| if i < entries { entry(i) } else { 0 }.to_le_bytes())
            .collect()
    };
    let mut bytes = table(1, &|_| pdpt | P | RW);
    bytes.extend(table(DIRECTORIES, &|i| {
        (directories + i * TABLE_BYTES) | P | RW
    }));
    for directory in 0..DIRECTORIES {
        bytes.extend(table(ENTRIES, &|i| {
            ((directory * ENTRIES + i) << 21) | P | RW | PS
        }));
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Walks the tables as the CPU does.
    fn translate(tables: &[u8], base: u64, virtual_address: u64) -> Option<u64> {
        let mut table = base;
        for shift in [39, 30, 21] {
            let index = (virtual_address >> shift) % 512;
            let at = (table - base + index * 8) as usize;
            let entry = u64::from_le_bytes(tables[at..at + 8].try_into().unwrap());
            if entry & P == 0 {
                return None;
            }
            if entry & PS != 0 {
                return Some((entry & !0x1f_ffff) | (virtual_address & 0x1f_ffff));
            }
            table = entry & !0xfff;
        }
        None
    }

    #[test]
    fn every_address_below_four_gigabytes_means_itself() {
        let tables = identity_map(0x9000);
        assert_eq!(tables.len(), 6 * 4096);
        for address in [
            0,
            0x10_0000,
            0x3fff_ffff,
            0x4000_0000,
            0xfee0_0020,
            0xffff_ffff,
        ] {
            assert_eq!(
                translate(&tables, 0x9000, address),
                Some(address),
                "{address:#x}"
            );
        }
        assert_eq!(translate(&tables, 0x9000, 1 << 32), None);
    }
}
