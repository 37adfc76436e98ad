//! Lesson 13: a guest that never gives the processor back.
//!
//! No exit, no `hlt`, interrupts off: from inside, nothing can end this loop. The host can. Its scheduler's timer
//! interrupts the processor, which exits from the guest whatever the guest's IF says, and a signal that is pending
//! then ends `KVM_RUN` with EINTR. Timeouts, pause, snapshots and Ctrl-C of every VMM are built on that.
//!
//! On the bus: the letters, then nothing for ever.
//!
//! Manuals: SDM Vol. 3C 25.6.1 ("Pin-Based VM-Execution Controls": external-interrupt exiting); the KVM API document,
//! `KVM_RUN`, `immediate_exit` and `KVM_SET_SIGNAL_MASK`.
//!
//! Run: `sarang run --timeout 2s -k target/x86_64-unknown-linux-gnu/release/spin`; `echo $?` says 124.
#![no_std]
#![no_main]

use guest::{boot::StartInfo, exit, print, user};

#[unsafe(no_mangle)]
fn kernel_main(_: &'static StartInfo) -> ! {
    user::enable();
    print!("spin: running\n");
    user::call(for_ever, 0);
    exit::halt()
}

/// In user mode, where the loop runs at full speed on every KVM.
extern "C" fn for_ever(_: u64) -> u64 {
    loop {
        core::hint::spin_loop();
    }
}
