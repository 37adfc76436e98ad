//! Lesson 17: how fast is this KVM?
//!
//! A guest cannot trust its own clock, but the host can: the guest writes a mark to a port, and the host notes when
//! the exit arrives. The difference of two marks is the time of what lies between them.
//!
//! | marks on port 0x80 | between them |
//! | --- | --- |
//! | 1 → 2 | 20,000 turns of a loop of two instructions in kernel mode |
//! | 3 → 4 | 20,000,000 turns of it in user mode |
//! | 5 → 6 | 1000 writes of 0 to the port: the way to the VMM and back |
//!
//! On hardware both loops take a few tenths of a nanosecond a turn. If kernel mode is a thousand times slower, KVM is
//! interpreting it; Linux would take minutes to boot there. `sarang doctor` runs this guest to find out.
//!
//! On the bus: `out 0x80`, and `out 0xf4 ← 0` at the end. Port 0x80 has been the PC's port for such marks since the
//! AT's power-on self-test; writing to it does nothing.
//!
//! Manuals: SDM Vol. 3C ch. 26 (what exits from a guest); IBM PC AT Technical Reference, "POST".
//!
//! Run: `sarang run --trace exits.txt -k target/x86_64-unknown-linux-gnu/release/speed`, or `sarang doctor`.
#![no_std]
#![no_main]

use core::arch::asm;
use guest::{boot::StartInfo, exit, port, user};

const MARK: u16 = 0x80;
const KERNEL_TURNS: u64 = 20_000;
const USER_TURNS: u64 = 20_000_000;
const EXITS: u32 = 1000;

#[unsafe(no_mangle)]
fn kernel_main(_: &'static StartInfo) -> ! {
    user::enable();

    port::outb(MARK, 1);
    turns(KERNEL_TURNS);
    port::outb(MARK, 2);

    port::outb(MARK, 3);
    user::call(turns, USER_TURNS);
    port::outb(MARK, 4);

    port::outb(MARK, 5);
    for _ in 0..EXITS {
        port::outb(MARK, 0);
    }
    port::outb(MARK, 6);

    exit::exit(0)
}

/// In assembly, so that the compiler does not do it at once.
extern "C" fn turns(count: u64) -> u64 {
    // SAFETY: changes a register of its own only.
    unsafe { asm!("2:", "dec {0}", "jnz 2b", inout(reg) count => _, options(nomem, nostack)) };
    0
}
