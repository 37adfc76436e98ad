//! Lesson 6: a fault on the way to a fault handler on the way to a fault handler.
//!
//! An instruction faults; the processor looks for the gate in the IDT. If that faults as well, it is a double fault
//! (vector 8); if that cannot be delivered either, the processor shuts down. On a PC this resets the machine, and
//! kernels use it as the last resort for a reboot. It is also how most early boot bugs look from outside.
//!
//! Nothing is on the bus. The exit is `KVM_EXIT_SHUTDOWN`, and `sarang run` ends with status 81. The registers that
//! `sarang report` shows still point at the culprit: RIP is at the `ud2`.
//!
//! Manuals: SDM Vol. 3A 6.15 (interrupt 8, "Double Fault Exception"), Vol. 3C 26.2 (triple fault as an exit reason).
//!
//! Run: `sarang run -k target/x86_64-unknown-linux-gnu/release/triplefault`; `echo $?` says 81.
#![no_std]
#![no_main]

use core::arch::asm;
use guest::{boot::StartInfo, exit, interrupts, print};

#[unsafe(no_mangle)]
fn kernel_main(_: &'static StartInfo) -> ! {
    print!("triplefault: jumping off\n");
    interrupts::use_no_gates();
    // SAFETY: #UD with an empty IDT: nothing behind this runs.
    unsafe { asm!("ud2") };
    exit::halt()
}
