//! The APICs: one local APIC in each processor, and an I/O APIC between them and the devices.
//!
//! The local APIC (SDM Vol. 3A ch. 11) is a page of registers at 0xfee00000 that every processor sees as its own. It
//! accepts interrupts, has a timer, and sends interrupts to other processors (IPIs). The I/O APIC (82093AA datasheet)
//! has a pair of registers, index and data, and one redirection entry for each device pin.
//!
//! KVM answers for both within the host kernel: these accesses exit from the guest, but never reach the VMM.

use crate::paging::identity_map;

/// Where the local APIC is after reset (SDM Vol. 3A 11.4.4).
pub const LOCAL: u64 = 0xfee0_0000;

/// Local APIC ID, in bits 24–31.
pub const ID: u64 = 0x20;
/// End of interrupt: write 0 when a handler is done.
pub const EOI: u64 = 0xb0;
/// Spurious-interrupt vector register; bit 8 switches the APIC on.
pub const SVR: u64 = 0xf0;
/// Interrupt command register, low half: writing it sends an IPI.
pub const ICR_LOW: u64 = 0x300;
/// Interrupt command register, high half: the receiver's APIC ID in bits 24–31.
pub const ICR_HIGH: u64 = 0x310;
/// The timer's vector and mode.
pub const LVT_TIMER: u64 = 0x320;
/// Writing it starts the timer.
pub const TIMER_INITIAL_COUNT: u64 = 0x380;
/// How much slower than its clock the timer counts.
pub const TIMER_DIVIDE: u64 = 0x3e0;

/// ICR: the INIT message, level "assert".
pub const ICR_INIT: u32 = 0b101 << 8 | 1 << 14;
/// ICR: the start-up message; the vector is the page number where the receiver begins.
pub const ICR_STARTUP: u32 = 0b110 << 8 | 1 << 14;
/// ICR: the message is still being sent.
pub const ICR_PENDING: u32 = 1 << 12;
/// LVT_TIMER: begin again at zero.
pub const TIMER_PERIODIC: u32 = 1 << 17;

/// Maps the local APIC and switches it on.
pub fn enable() {
    identity_map(LOCAL, 4096);
    write(SVR, 1 << 8 | 0xff);
}

/// Reads a register of this processor's local APIC.
pub fn read(register: u64) -> u32 {
    // SAFETY: `enable` has mapped it.
    unsafe { ((LOCAL + register) as *const u32).read_volatile() }
}

/// Writes a register of this processor's local APIC.
pub fn write(register: u64, value: u32) {
    // SAFETY: as above.
    unsafe { ((LOCAL + register) as *mut u32).write_volatile(value) };
}

/// Sends a message to one processor, and waits until it is on its way.
pub fn send(receiver: u32, message: u32) {
    write(ICR_HIGH, receiver << 24);
    write(ICR_LOW, message);
    while read(ICR_LOW) & ICR_PENDING != 0 {}
}

/// Lets a pin of the I/O APIC at `base` interrupt this processor: edge-triggered, active high, unmasked.
pub fn route(base: u64, pin: u32, vector: u8) {
    identity_map(base, 4096);
    let set = |register: u32, value: u32| {
        // SAFETY: mapped above; IOREGSEL selects, IOWIN at offset 0x10 writes.
        unsafe {
            (base as *mut u32).write_volatile(register);
            ((base + 0x10) as *mut u32).write_volatile(value);
        }
    };
    set(0x10 + 2 * pin + 1, read(ID)); // the receiver, in bits 24–31 of both
    set(0x10 + 2 * pin, vector.into());
}
