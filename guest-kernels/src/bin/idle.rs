//! Lesson 14: a guest that does nothing.
//!
//! `hlt` stops the processor until an interrupt comes. The exit goes to KVM, which puts the vCPU's thread to sleep:
//! an idle guest is an idle thread. All interrupt sources are masked here, so this one sleeps for ever, and what is
//! left to see is what a VM costs: its memory in `sarang ps`, a few hundred KiB of which are the guest's.
//!
//! On the bus: the letters and the two masks. With an in-kernel APIC the VMM does not even see the `hlt`.
//!
//! Manuals: SDM Vol. 2A "HLT", Vol. 3C 26.1.3 (it exits if "HLT exiting" is set); 8259A datasheet (OCW1).
//!
//! Run: `sarang run --timeout 10s -k target/x86_64-unknown-linux-gnu/release/idle`.
#![no_std]
#![no_main]

use guest::{boot::StartInfo, interrupts, print};

#[unsafe(no_mangle)]
fn kernel_main(_: &'static StartInfo) -> ! {
    interrupts::mask_pics();
    print!("idle: running\n");
    loop {
        interrupts::wait();
    }
}
