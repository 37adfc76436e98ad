//! Lesson 16: an instruction that KVM cannot execute.
//!
//! On hardware nearly all instructions run on the processor itself. KVM's emulator takes over only where the hardware
//! cannot go on: at device registers in memory, in real mode on old processors, or for the whole kernel mode where
//! there is no virtualization hardware at all. It knows the instructions that kernels use in such places, and `fldpi`,
//! "push π", is not one of them.
//!
//! On the bus: the letters. Then the guest powers off; or KVM gives up: `KVM_EXIT_INTERNAL_ERROR` with suberror 1,
//! emulation failure, and `sarang run` ends with status 82 and shows the bytes at RIP, d9 eb.
//!
//! Manuals: SDM Vol. 2A "FLD1/…/FLDPI/…"; the KVM API document, `KVM_EXIT_INTERNAL_ERROR`.
//!
//! Run: `sarang run -k target/x86_64-unknown-linux-gnu/release/badinsn`; `sarang doctor` says beforehand which of the two it will be.
#![no_std]
#![no_main]

use core::arch::asm;
use guest::{boot::StartInfo, exit, print};

#[unsafe(no_mangle)]
fn kernel_main(start: &'static StartInfo) -> ! {
    print!("badinsn: loading pi\n");
    // SAFETY: the loader clears CR0.EM and CR0.TS, and nobody else uses the floating-point unit.
    unsafe { asm!("fninit", "fldpi", "fstp st(0)") };
    print!("badinsn: it worked, so the hardware did it\n");
    exit::power_off(start)
}
