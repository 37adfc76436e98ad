//! Lesson 4: resetting a machine.
//!
//! The FADT names a register and a value that reset the board, as it does for switching it off. What a reset means is
//! the VMM's choice: start the vCPU over at the reset vector, load the kernel again, or end the run. sarang ends it,
//! because a kernel that was loaded directly leaves no firmware to reboot into.
//!
//! On the bus: one `out` to the reset register. The trace says `Reset` where `poweroff` has `PowerOff`.
//!
//! Manuals: ACPI 6.5 §4.8.3.6 (RESET_REG), Table 5.9 (where the FADT has it and RESET_VALUE).
//!
//! Run: `sarang run -k target/x86_64-unknown-linux-gnu/release/reset`.
#![no_std]
#![no_main]

use guest::exit::halt;
use guest::{acpi, boot::StartInfo, print, uart::Hex};

#[unsafe(no_mangle)]
fn kernel_main(start: &'static StartInfo) -> ! {
    let Some(fadt) = acpi::fadt(start) else {
        print!("reset: there is no FADT\n");
        halt()
    };
    let (register, value) = fadt.reset();
    let space = if register.space == 1 {
        "port "
    } else {
        "memory "
    };
    print!(
        "reset: writing ",
        Hex(value.into()),
        " to ",
        space,
        Hex(register.address),
        "\n"
    );

    register.write(value);
    halt()
}
