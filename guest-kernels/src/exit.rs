//! The ways to end a run, all of them a write to a register that the host listens to.
//!
//! A hypervisor has no "the guest called exit". A machine is switched off by writing the sleep type of state S5 to
//! a register that the ACPI table FADT names (ACPI 6.5 §4.8.3.7, §5.2.9) and reset through another (§4.8.3.6).
//! Test machines add a port whose value becomes the exit status, here and in QEMU's `isa-debug-exit`.

use crate::acpi::{self, GenericAddress};
use crate::boot::StartInfo;
use crate::port::outb;
use crate::print;
use core::arch::asm;

/// The debug exit port.
pub const EXIT_PORT: u16 = 0xf4;

/// SLEEP_CONTROL_REG: where the sleep type begins, three bits wide.
pub const SLP_TYP_SHIFT: u8 = 2;
/// SLEEP_CONTROL_REG: go to sleep now.
pub const SLP_EN: u8 = 1 << 5;
/// The sleep type of S5, "soft off". An operating system evaluates `\_S5` in the DSDT to learn it; that needs an
/// interpreter of ACPI's byte code. On sarang's boards and QEMU's microvm it is 5.
pub const S5: u8 = 5;

/// Switches the machine off.
pub fn power_off(start: &StartInfo) -> ! {
    match acpi::fadt(start).map(|fadt| fadt.sleep_control()) {
        Some(register) if register.address != 0 => register.write(S5 << SLP_TYP_SHIFT | SLP_EN),
        _ => print!("this board has no register to switch it off\n"),
    }
    halt()
}

/// Resets the machine through the register that the FADT names.
pub fn reset(start: &StartInfo) -> ! {
    match acpi::fadt(start).map(|fadt| fadt.reset()) {
        Some((GenericAddress { address: 0, .. }, _)) | None => {
            print!("this board has no reset register\n")
        }
        Some((register, value)) => register.write(value),
    }
    halt()
}

/// Ends the run with an exit status.
pub fn exit(status: u8) -> ! {
    outb(EXIT_PORT, status);
    halt()
}

/// Stops this processor for good: with interrupts off, nothing ordinary wakes it from `hlt`.
pub fn halt() -> ! {
    loop {
        // SAFETY: nothing runs on this processor afterwards.
        unsafe { asm!("cli", "hlt", options(nomem, nostack)) }
    }
}
