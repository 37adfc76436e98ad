//! Page tables: mapping more of guest-physical memory at its own address.
//!
//! Four levels turn a 48-bit linear address into a physical one (SDM Vol. 3A 4.5). Each table is a page of 512
//! entries of 8 bytes and consumes 9 bits of the address: PML4 (bits 47–39), PDPT (38–30), PD (29–21). An entry of
//! a PD can point to a page table for the next 9 bits or, with its PS bit set, map 2 MiB at once. We do the latter
//! only: a third of the tables, and no 1 GiB pages, because not every KVM offers them.
//!
//! Under a hypervisor these tables give *guest*-physical addresses. A second set of tables, which the guest never
//! sees (EPT or NPT), or shadow copies of ours, turn those into host addresses: `sarang inspect` walks both.

use core::arch::asm;

/// Bits of an entry (SDM Vol. 3A 4.5.4).
const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const LARGE: u64 = 1 << 7;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// What one entry of a PD maps, in bytes.
pub const LARGE_PAGE: u64 = 2 << 20;

/// Page directories for this many GiB; bss, so unused ones cost nothing.
const SPARE_TABLES: usize = 96;

#[repr(C, align(4096))]
struct Table([u64; 512]);

// boot.rs links these three before it turns paging on.
#[unsafe(no_mangle)]
static mut pml4: Table = Table([0; 512]);
#[unsafe(no_mangle)]
static mut first_pdpt: Table = Table([0; 512]);
#[unsafe(no_mangle)]
static mut first_pd: Table = Table([0; 512]);

static mut SPARE: [Table; SPARE_TABLES] = [const { Table([0; 512]) }; SPARE_TABLES];
static mut USED: usize = 0;

/// Maps the 2 MiB pages that hold these bytes at their own address, for the kernel only.
///
/// Returns false, with a part of it mapped, when there are no more spare tables. An entry that was absent is never
/// cached by the processor, so nothing needs to be flushed.
pub fn identity_map(start: u64, bytes: u64) -> bool {
    map(start, bytes, PRESENT | WRITABLE | LARGE)
}

/// The same, for user mode as well.
pub fn identity_map_for_user(start: u64, bytes: u64) -> bool {
    map(start, bytes, PRESENT | WRITABLE | LARGE | USER)
}

fn map(start: u64, bytes: u64, bits: u64) -> bool {
    let mut page = start & !(LARGE_PAGE - 1);
    while page < start + bytes {
        let pd = match table_below(&raw mut pml4, page >> 39) {
            Some(pdpt) => table_below(pdpt, page >> 30),
            None => None,
        };
        let Some(pd) = pd else { return false };
        // SAFETY: `pd` is one of the tables in this file, and boot.rs mapped the image that holds them.
        unsafe { *entry(pd, page >> 21) |= page | bits };
        page += LARGE_PAGE;
    }
    true
}

/// The table that an entry points to; a new one if the entry is empty.
///
/// The entry lets user mode pass: whether it may use a page is then said in one place, at the page.
fn table_below(table: *mut Table, index: u64) -> Option<*mut Table> {
    // SAFETY: only the first processor maps memory, and it is not interrupted by anything that does.
    unsafe {
        let entry = entry(table, index);
        if *entry & PRESENT == 0 {
            if USED == SPARE_TABLES {
                return None;
            }
            *entry = (&raw mut SPARE).cast::<Table>().add(USED) as u64 | PRESENT | WRITABLE | USER;
            USED += 1;
        }
        Some((*entry & ADDRESS) as *mut Table)
    }
}

fn entry(table: *mut Table, index: u64) -> *mut u64 {
    table.cast::<u64>().wrapping_add(index as usize % 512)
}

/// Forgets all cached translations, as a change of a present entry demands (SDM Vol. 3A 4.10.4).
pub fn flush() {
    // SAFETY: CR3 gets the value it has.
    unsafe { asm!("mov {0}, cr3", "mov cr3, {0}", out(reg) _, options(nostack)) }
}
