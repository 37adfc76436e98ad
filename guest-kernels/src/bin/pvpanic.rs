//! Lesson 7: telling the host "I have crashed".
//!
//! A kernel that panics usually spins or reboots; from outside both look like a machine that is busy. pvpanic is the
//! smallest paravirtual device there is: one byte. Reading it gives the events that the host wants to hear of,
//! writing it reports one. Linux does so from its panic notifier.
//!
//! On the bus: `in 0x505` and `out 0x505 ← 0x01`. `sarang run` ends with status 80.
//!
//! Manuals: QEMU's "PVPANIC device" specification (bit 0: panicked; bit 1: panicked, and a crash kernel takes over).
//! ACPI names the port in the DSDT, as device `QEMU0001`; without an AML interpreter one has to know it.
//!
//! Run: `sarang run -k target/x86_64-unknown-linux-gnu/release/pvpanic`; `echo $?` says 80.
#![no_std]
#![no_main]

use guest::{boot::StartInfo, exit, port, print, uart::Hex};

const PVPANIC: u16 = 0x505;
const PANICKED: u8 = 1 << 0;

#[unsafe(no_mangle)]
fn kernel_main(_: &'static StartInfo) -> ! {
    let events = port::inb(PVPANIC);
    print!(
        "pvpanic: the host listens to events ",
        Hex(events.into()),
        "\n"
    );
    if events & PANICKED != 0 {
        port::outb(PVPANIC, PANICKED);
    }
    exit::halt()
}
