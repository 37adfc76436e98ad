//! Lesson 2: an exit status.
//!
//! A machine can be switched off, but it cannot return 42. Boards for tests have a port for this: the byte written to
//! it becomes the status of the VMM process. QEMU calls it `isa-debug-exit` (and makes it `value << 1 | 1`).
//!
//! On the bus: `out 0xf4 ← 0x2a`, and no more.
//!
//! Manuals: SDM Vol. 1 19.4 (`out`); none for the device, which no real machine has.
//!
//! Run: `sarang run -k target/x86_64-unknown-linux-gnu/release/exit`; `echo $?` says 42.
#![no_std]
#![no_main]

use guest::{boot::StartInfo, exit};

#[unsafe(no_mangle)]
fn kernel_main(_: &'static StartInfo) -> ! {
    exit::exit(42)
}
