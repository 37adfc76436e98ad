//! Lesson 8: what am I made of?
//!
//! PCI devices can be found by asking each slot; processors, interrupt controllers and the power button cannot. So a
//! board carries tables that describe it, and the VMM writes them before the guest starts. This lesson walks them as
//! a kernel does in its first milliseconds, verifies every checksum, and prints what the MADT says.
//!
//! On the bus: only the letters. Tables are memory, and memory that is mapped never exits.
//!
//! Manuals: ACPI 6.5 §5.2.5 (RSDP), §5.2.8 (XSDT), §5.2.9 (FADT), §5.2.11.1 (DSDT), §5.2.12 (MADT).
//!
//! Run: `sarang run -k target/x86_64-unknown-linux-gnu/release/acpi --cpus 4`; compare with `sarang inspect`.
#![no_std]
#![no_main]

use guest::acpi::{self, MadtEntry, Table};
use guest::{boot::StartInfo, exit, print, uart::Hex};

#[unsafe(no_mangle)]
fn kernel_main(start: &'static StartInfo) -> ! {
    let Some(rsdp) = acpi::rsdp(start) else {
        print!("acpi: there is no RSDP\n");
        exit::exit(1)
    };
    // The first 20 bytes have a checksum since ACPI 1.0; the second one, since 2.0, covers all 36.
    let mut sound = acpi::sum(rsdp, 20) == 0 && acpi::sum(rsdp, 36) == 0;
    print!(
        "RSDP at ",
        Hex(rsdp),
        if sound { "\n" } else { ", wrong checksum\n" }
    );

    let dsdt = acpi::fadt(start).and_then(|fadt| fadt.dsdt());
    for table in acpi::xsdt(start)
        .into_iter()
        .chain(acpi::tables(start))
        .chain(dsdt)
    {
        sound &= show(table);
    }
    for entry in acpi::madt_entries(start) {
        show_entry(&entry);
    }

    if !sound {
        print!("acpi: a checksum is wrong\n");
        exit::exit(1)
    }
    print!("acpi: all checksums are right\n");
    exit::power_off(start)
}

fn show(table: Table) -> bool {
    let sound = table.is_sound();
    print!(
        table.signature(),
        " at ",
        Hex(table.address()),
        ", ",
        table.length() as u64,
        " bytes"
    );
    print!(if sound { "\n" } else { ", wrong checksum\n" });
    sound
}

/// ACPI 6.5 §5.2.12.2 and following: what is at which offset depends on the kind.
fn show_entry(entry: &MadtEntry) {
    let byte = |offset| u64::from(entry.read::<u8>(offset));
    let word = |offset| u64::from(entry.read::<u16>(offset));
    let dword = |offset| u64::from(entry.read::<u32>(offset));
    let state = |flags: u64| {
        if flags & 1 != 0 {
            ", enabled\n"
        } else {
            ", not enabled\n"
        }
    };
    match entry.kind {
        0 => print!(
            "  processor ",
            byte(2),
            ": local APIC id ",
            byte(3),
            state(dword(4))
        ),
        1 => print!(
            "  I/O APIC id ",
            byte(2),
            " at ",
            Hex(dword(4)),
            ", from interrupt ",
            dword(8),
            " on\n"
        ),
        2 => print!(
            "  ISA interrupt ",
            byte(3),
            " arrives as ",
            dword(4),
            ", flags ",
            Hex(word(8)),
            "\n"
        ),
        4 => print!(
            "  NMI at LINT",
            byte(5),
            " of processor ",
            Hex(byte(2)),
            "\n"
        ),
        9 => print!(
            "  processor ",
            dword(12),
            ": x2APIC id ",
            dword(4),
            state(dword(8))
        ),
        kind => print!(
            "  entry of kind ",
            u64::from(kind),
            ", ",
            u64::from(entry.bytes),
            " bytes\n"
        ),
    }
}
