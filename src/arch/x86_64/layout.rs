//! Where things lie in guest physical memory before the guest takes over.
//!
//! The first megabyte keeps the shape of a PC's: conventional memory up to 640 KiB, and above it the
//! video and BIOS area, in whose last 128 KiB an operating system looks for the ACPI root pointer.

use std::ops::Range;

/// The GDT that the vCPU starts with.
pub const GDT: u64 = 0x500;
/// The empty interrupt descriptor table.
pub const IDT: u64 = 0x580;
/// `hvm_start_info` of the PVH boot ABI, its memory map and module list behind it.
pub const PVH_START_INFO: u64 = 0x6000;
/// `boot_params` of the Linux boot protocol, one page ("zero page").
pub const BOOT_PARAMS: u64 = 0x7000;
/// The stack pointer at entry.
pub const BOOT_STACK: u64 = 0x8ff0;
/// PML4, one PDPT, and four page directories: six pages.
pub const PAGE_TABLES: u64 = 0x9000;
/// The kernel command line, at most [`COMMAND_LINE_MAX`] bytes with its NUL.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// Linux's own limit on x86 (`COMMAND_LINE_SIZE`).
pub const COMMAND_LINE_MAX: usize = 2048;
/// Conventional memory ends here; the extended BIOS data area begins.
pub const CONVENTIONAL_END: u64 = 0x9_fc00;
/// The ACPI tables, root pointer first (ACPI 6.5 §5.2.5.1).
pub const ACPI_TABLES: Range<u64> = 0xe_0000..0x10_0000;
/// Where a PC's BIOS begins after a reset, as real mode sees it: F000:FFF0 (SDM Vol. 3A 10.1.4).
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// All the BIOS that there is: `mov al, 0xfe; out 0x64, al; hlt; jmp $-1` pulses the reset line. A kernel that restarts by
/// jumping into the BIOS gets what it wants.
pub const RESET_CODE: [u8; 7] = [0xb0, 0xfe, 0xe6, 0x64, 0xf4, 0xeb, 0xfd];
/// Extended memory: kernels load from here on.
pub const HIGH_MEMORY: u64 = 0x10_0000;
/// The hole between low and high RAM, where MMIO lives.
pub const HOLE: Range<u64> = 0xc000_0000..0x1_0000_0000;
/// The IOAPIC's registers (82093AA §3.0).
pub const IOAPIC: u64 = 0xfec0_0000;
/// Each vCPU's local APIC (SDM Vol. 3A 11.4.1).
pub const LOCAL_APIC: u64 = 0xfee0_0000;
/// Three pages and one more that KVM needs on Intel CPUs to run real-mode code.
pub const KVM_TSS: u64 = 0xfffb_d000;
/// See [`KVM_TSS`].
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;

/// RAM of `bytes` bytes as ranges of guest physical addresses: start and length.
pub fn ram_ranges(bytes: u64) -> Vec<(u64, u64)> {
    let low = bytes.min(HOLE.start);
    let mut ranges = vec![(0, low)];
    if bytes > low {
        ranges.push((HOLE.end, bytes - low));
    }
    ranges
}

/// Persistent memory starts on multiples of this many bytes. Linux maps a device's memory in sections of 128 MiB,
/// none of which may hold RAM too; this leaves room for guests with larger ones, and for 1 GiB pages.
pub const PERSISTENT_ALIGNMENT: u64 = 1 << 30;

/// Where persistent memory of these sizes (bytes) lies in a machine with `ram_bytes` of RAM: above both RAM and the
/// hole, in the order given. The memory map does not mention it. `None` when it would leave the address space.
pub fn persistent_ranges(ram_bytes: u64, sizes: &[u64]) -> Option<Vec<Range<u64>>> {
    let mut end = ram_ranges(ram_bytes)
        .into_iter()
        .map(|(start, len)| start.saturating_add(len))
        .fold(HOLE.end, u64::max);
    let place = |size: &u64| {
        let start = end.checked_next_multiple_of(PERSISTENT_ALIGNMENT)?;
        end = start.checked_add(*size)?;
        Some(start..end)
    };
    sizes.iter().map(place).collect()
}

/// What the BIOS memory map (E820) says of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryKind {
    /// Free for the operating system; E820 type 1.
    Ram,
    /// Leave alone; E820 type 2.
    Reserved,
}

/// One line of the memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryMapEntry {
    pub start: u64,
    pub len: u64,
    pub kind: MemoryKind,
}

/// The memory map of a machine with `bytes` of RAM (ACPI 6.5 §15).
pub fn memory_map(bytes: u64) -> Vec<MemoryMapEntry> {
    let entry = |range: Range<u64>, kind| MemoryMapEntry {
        start: range.start,
        len: range.end - range.start,
        kind,
    };
    let mut map = vec![
        entry(0..CONVENTIONAL_END, MemoryKind::Ram),
        entry(CONVENTIONAL_END..0xa_0000, MemoryKind::Reserved),
        entry(ACPI_TABLES, MemoryKind::Reserved),
    ];
    for (start, len) in ram_ranges(bytes) {
        let from = start.max(HIGH_MEMORY);
        if start + len > from {
            map.push(entry(from..start + len, MemoryKind::Ram));
        }
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_past_three_gigabytes_goes_on_above_the_hole() {
        assert_eq!(ram_ranges(512 << 20), [(0, 512 << 20)]);
        assert_eq!(ram_ranges(4 << 30), [(0, 3 << 30), (4 << 30, 1 << 30)]);
    }

    #[test]
    fn persistent_memory_lies_above_ram_on_boundaries_of_its_own() {
        let (gib, mib) = (1 << 30, 1 << 20);
        let places = |ram, sizes: &[u64]| persistent_ranges(ram, sizes).unwrap();
        assert_eq!(places(512 * mib, &[2 * mib])[0], 4 * gib..4 * gib + 2 * mib);
        assert_eq!(
            places(4 * gib + 2 * mib, &[3 * gib, 2 * mib, 4 * mib]),
            [
                6 * gib..9 * gib,
                9 * gib..9 * gib + 2 * mib,
                10 * gib..10 * gib + 4 * mib
            ]
        );
        assert!(places(mib, &[]).is_empty());
        assert_eq!(persistent_ranges(mib, &[u64::MAX]), None);
        assert_eq!(persistent_ranges(mib, &[u64::MAX - (5 << 30), 1, 1]), None);
    }

    #[test]
    fn the_memory_map_is_sorted_and_keeps_the_acpi_tables_from_the_guest() {
        let map = memory_map(4 << 30);
        assert!(
            map.windows(2)
                .all(|pair| pair[0].start + pair[0].len <= pair[1].start)
        );
        let acpi = map
            .iter()
            .find(|entry| entry.start == ACPI_TABLES.start)
            .unwrap();
        assert_eq!(acpi.kind, MemoryKind::Reserved);
        assert_eq!(map.last().unwrap().start, 4 << 30);
    }
}
