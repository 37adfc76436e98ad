//! Lesson 5: the reset line of the keyboard controller.
//!
//! In the PC AT one output pin of the keyboard controller was wired to the processor's RESET, as the 80286 had no
//! other way back to real mode. Forty years later a kernel still tries it when ACPI names no reset register, and it is
//! the one register of the i8042 that small VMMs emulate.
//!
//! On the bus: `out 0x64 ← 0xfe`: command 0xf0 "pulse output pins" with the mask 0b1110, which leaves out pin 0.
//!
//! Manuals: IBM PC AT Technical Reference, "Keyboard Controller", command F0–FF.
//!
//! Run: `sarang run -k target/x86_64-unknown-linux-gnu/release/reset-i8042`.
#![no_std]
#![no_main]

use guest::{boot::StartInfo, exit, port, print};

/// Status (read) and command (write).
const COMMAND: u16 = 0x64;
/// Status: the last command has not been taken yet.
const INPUT_FULL: u8 = 1 << 1;
const PULSE_RESET: u8 = 0xfe;

#[unsafe(no_mangle)]
fn kernel_main(_: &'static StartInfo) -> ! {
    print!("reset-i8042: pulsing the reset line\n");
    // A port without a device reads as 0xff: do not wait for ever.
    for _ in 0..100 {
        if port::inb(COMMAND) & INPUT_FULL == 0 {
            break;
        }
    }
    port::outb(COMMAND, PULSE_RESET);
    exit::halt()
}
