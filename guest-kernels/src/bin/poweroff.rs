//! Lesson 3: switching a machine off.
//!
//! A PC has no "off" instruction. ACPI's table FADT names a register; writing sleep type S5 and the enable bit to it
//! cuts the power. This board has no older power management (the FADT says "hardware-reduced"), so it is the sleep
//! control register. The lesson prints where it is, so that you find the write in the trace.
//!
//! On the bus: after the letters, one `out` to the sleep control register with the value 0x34 = S5 << 2 | SLP_EN.
//! Then the VMM stops the vCPU, and `sarang run` ends with status 0.
//!
//! Manuals: ACPI 6.5 §4.8.3.7 (SLEEP_CONTROL_REG), §5.2.9 (FADT), §7.4.2.6 (S5); Table 5.1 (address spaces).
//!
//! Run: `sarang run -k target/x86_64-unknown-linux-gnu/release/poweroff`; `echo $?` says 0.
#![no_std]
#![no_main]

use guest::exit::{S5, SLP_EN, SLP_TYP_SHIFT, halt};
use guest::{acpi, boot::StartInfo, print, uart::Hex};

#[unsafe(no_mangle)]
fn kernel_main(start: &'static StartInfo) -> ! {
    let Some(fadt) = acpi::fadt(start) else {
        print!("poweroff: there is no FADT\n");
        halt()
    };
    let register = fadt.sleep_control();
    let space = if register.space == 1 {
        "port "
    } else {
        "memory "
    };
    print!(
        "poweroff: the sleep control register is at ",
        space,
        Hex(register.address),
        "\n"
    );

    // The three bits of SLP_TYP say how deep, SLP_EN says now.
    register.write(S5 << SLP_TYP_SHIFT | SLP_EN);

    // The write was the last exit of this vCPU, if the VMM stops it there and then. Some let it run a little longer.
    halt()
}
