//! ACPI tables: how a board without a plug-and-play bus says what it is made of.
//!
//! One pointer leads to all (ACPI 6.5 §5.2): the RSDP holds the address of the XSDT, the XSDT those of all other
//! tables, and the FADT that of the DSDT. Each table begins with the same 36 bytes ([`Table`]): four letters, the
//! length, and a byte that makes the sum of all bytes zero. Nothing in them is aligned.

use crate::boot::StartInfo;
use crate::paging::identity_map;
use crate::port;

/// Bytes of the header that all tables share (ACPI 6.5 §5.2.6).
pub const HEADER: usize = 36;

/// A table, mapped, by its guest-physical address.
#[derive(Clone, Copy)]
pub struct Table(u64);

impl Table {
    fn at(address: u64) -> Option<Table> {
        if address == 0 {
            return None;
        }
        identity_map(address, HEADER as u64);
        let table = Table(address);
        identity_map(address, table.length() as u64);
        Some(table)
    }

    /// Its guest-physical address.
    pub fn address(self) -> u64 {
        self.0
    }

    /// The four letters that say which table it is.
    pub fn signature(self) -> &'static str {
        // SAFETY: the header is mapped and never changes. The specification allows ASCII only.
        unsafe {
            core::str::from_utf8_unchecked(core::slice::from_raw_parts(self.0 as *const u8, 4))
        }
    }

    /// Bytes in the whole table.
    pub fn length(self) -> usize {
        self.read::<u32>(4) as usize
    }

    /// Whether all bytes add up to zero.
    pub fn is_sound(self) -> bool {
        sum(self.0, self.length()) == 0
    }

    /// The value at an offset.
    pub fn read<T: Copy>(self, offset: usize) -> T {
        // SAFETY: the caller stays within `length`, which is mapped; `T` is a plain integer or a struct of them.
        unsafe { core::ptr::read_unaligned((self.0 as usize + offset) as *const T) }
    }
}

/// The sum of some mapped bytes, modulo 256. Zero in every table, by choice of its checksum byte.
pub fn sum(address: u64, bytes: usize) -> u8 {
    // SAFETY: the caller has mapped them.
    let bytes = unsafe { core::slice::from_raw_parts(address as *const u8, bytes) };
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

/// The address of the RSDP: from the loader if it says so, or else from a search for its eight letters in the last
/// 128 KiB below 1 MiB, on 16-byte boundaries (ACPI 6.5 §5.2.5.1).
pub fn rsdp(start: &StartInfo) -> Option<u64> {
    const SIGNATURE: u64 = u64::from_le_bytes(*b"RSD PTR ");
    if start.rsdp != 0 {
        identity_map(start.rsdp, HEADER as u64);
        return Some(start.rsdp);
    }
    // SAFETY: boot.rs mapped the first 2 MiB.
    (0xe_0000..0x10_0000)
        .step_by(16)
        .find(|at| unsafe { *(*at as *const u64) } == SIGNATURE)
}

/// The table that lists all others. Its address is at offset 24 of the RSDP (ACPI 6.5 Table 5.3).
pub fn xsdt(start: &StartInfo) -> Option<Table> {
    rsdp(start).and_then(|rsdp| Table::at(Table(rsdp).read(24)))
}

/// The tables that the XSDT lists.
pub fn tables(start: &StartInfo) -> impl Iterator<Item = Table> + use<> {
    let xsdt = xsdt(start);
    let count = xsdt.map_or(0, |xsdt| (xsdt.length() - HEADER) / 8);
    (0..count).filter_map(move |index| Table::at(xsdt?.read(HEADER + 8 * index)))
}

/// The first table with this signature.
pub fn table(start: &StartInfo, signature: &[u8; 4]) -> Option<Table> {
    tables(start).find(|table| table.read::<[u8; 4]>(0) == *signature)
}

/// The fixed hardware of the board: the table "FACP" (ACPI 6.5 Table 5.9).
pub struct Fadt(Table);

/// Finds the FADT.
pub fn fadt(start: &StartInfo) -> Option<Fadt> {
    table(start, b"FACP").map(Fadt)
}

impl Fadt {
    /// The table of byte code that describes the rest of the board.
    pub fn dsdt(&self) -> Option<Table> {
        let wide = if self.0.length() >= 148 {
            self.0.read::<u64>(140)
        } else {
            0
        };
        Table::at(if wide != 0 {
            wide
        } else {
            self.0.read::<u32>(40).into()
        })
    }

    /// The register that resets the board, and the value to write.
    pub fn reset(&self) -> (GenericAddress, u8) {
        (self.0.read(116), self.0.read(128))
    }

    /// The register that switches a board without the older PM1 registers off ("hardware-reduced ACPI").
    pub fn sleep_control(&self) -> GenericAddress {
        self.0.read(244)
    }
}

/// A register anywhere: the Generic Address Structure (ACPI 6.5 §5.2.3.2).
#[derive(Clone, Copy)]
#[repr(C, packed)]
pub struct GenericAddress {
    /// 0: memory. 1: ports.
    pub space: u8,
    bits: u8,
    bit_offset: u8,
    access_size: u8,
    /// The address in that space, or 0 for "there is none".
    pub address: u64,
}

impl GenericAddress {
    /// Writes a byte to it.
    pub fn write(&self, value: u8) {
        let address = self.address;
        if self.space == 1 {
            return port::outb(address as u16, value);
        }
        identity_map(address, 1);
        // SAFETY: it is mapped, and no memory of ours.
        unsafe { (address as *mut u8).write_volatile(value) };
    }
}

/// One line of the MADT, the table "APIC": a processor or an interrupt controller (ACPI 6.5 §5.2.12).
pub struct MadtEntry {
    /// 0: a processor's local APIC. 1: an I/O APIC. 2: an ISA interrupt that is wired differently. 9: an x2APIC …
    pub kind: u8,
    /// Bytes in the entry.
    pub bytes: u8,
    table: Table,
    offset: usize,
}

impl MadtEntry {
    /// The value at an offset in this entry.
    pub fn read<T: Copy>(&self, offset: usize) -> T {
        self.table.read(self.offset + offset)
    }
}

/// The lines of the MADT.
pub fn madt_entries(start: &StartInfo) -> impl Iterator<Item = MadtEntry> + use<> {
    let madt = table(start, b"APIC");
    // The header, the address of the local APICs and a word of flags come first.
    let mut offset = HEADER + 8;
    core::iter::from_fn(move || {
        let table = madt.filter(|table| offset + 2 <= table.length())?;
        let entry = MadtEntry {
            kind: table.read(offset),
            bytes: table.read(offset + 1),
            table,
            offset,
        };
        offset += usize::from(entry.bytes);
        (entry.bytes >= 2).then_some(entry)
    })
}
