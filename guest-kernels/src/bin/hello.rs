//! Lesson 1: a guest with no operating system.
//!
//! A virtual machine runs whatever bytes lie where its instruction pointer points. These print a line on the serial
//! port and switch the machine off. Look at `src/boot.rs` for the way to this function.
//!
//! On the bus: for every letter, `in 0x3fd` (LSR: may I send?) and `out 0x3f8` (THR: send this). Then no exit for a
//! while, as reading ACPI tables is plain memory access, and a last `out` to the sleep control register.
//!
//! Manuals: PVH boot ABI (the entry); PC16550D datasheet §8 (the serial port); SDM Vol. 1 ch. 19 (`in`, `out`);
//! ACPI 6.5 §4.8.3.7 (the sleep control register).
//!
//! Run: `sarang run -k target/x86_64-unknown-linux-gnu/release/hello`, then `sarang run --trace exits.txt -k target/x86_64-unknown-linux-gnu/release/hello`.
#![no_std]
#![no_main]

use guest::{boot::StartInfo, exit, print};

#[unsafe(no_mangle)]
fn kernel_main(start: &'static StartInfo) -> ! {
    print!("Hello from a guest with no operating system!\n");
    exit::power_off(start)
}
