//! Port I/O: the 64 KiB address space that only `in` and `out` reach.
//!
//! To a guest these are instructions; to a hypervisor each one is an exit (SDM Vol. 3C 26.1.3 and the exit
//! qualification in Table 28-5; AMD APM Vol. 2 15.10.2). KVM hands it on as `KVM_EXIT_IO` with port, size, direction
//! and data. Nearly all that `sarang run --trace` shows of these guests are such exits.

use core::arch::asm;

/// Reads a byte from a port.
pub fn inb(port: u16) -> u8 {
    let value;
    // SAFETY: touches no memory of ours; what the device does is the lesson's business.
    unsafe {
        asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags))
    };
    value
}

/// Writes a byte to a port.
pub fn outb(port: u16, value: u8) {
    // SAFETY: as above.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nostack, preserves_flags)) }
}

/// Reads 16 bits from a port.
pub fn inw(port: u16) -> u16 {
    let value;
    // SAFETY: as above.
    unsafe {
        asm!("in ax, dx", in("dx") port, out("ax") value, options(nomem, nostack, preserves_flags))
    };
    value
}

/// Writes 16 bits to a port.
pub fn outw(port: u16, value: u16) {
    // SAFETY: as above.
    unsafe { asm!("out dx, ax", in("dx") port, in("ax") value, options(nostack, preserves_flags)) }
}

/// Writes 32 bits to a port.
pub fn outl(port: u16, value: u32) {
    // SAFETY: as above.
    unsafe {
        asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack, preserves_flags))
    }
}
