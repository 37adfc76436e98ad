//! What every lesson stands on: the way from the loader's jump to 64-bit Rust, and the few devices of the board.
//!
//! A lesson is one file in `src/bin/`. It holds one function, [`kernel_main`](boot), that runs in 64-bit kernel
//! mode with interrupts off, a stack, the first 2 MiB of memory mapped at their own addresses, and a reference to
//! what the loader left behind ([`boot::StartInfo`]). There is no heap, no operating system and no one to return to.
//!
//! Modules, in the order in which a reader meets them:
//!
//! | module | hardware |
//! | --- | --- |
//! | [`boot`] | PVH entry, page tables, GDT: 32-bit protected mode → 64-bit long mode |
//! | [`port`] | the `in` and `out` instructions |
//! | [`uart`] | the first serial port, and printing on it |
//! | [`exit`] | power off, reset, the debug exit port |
//! | [`acpi`] | the tables in which the board describes itself |
//! | [`paging`] | mapping more memory |
//! | [`interrupts`] | the IDT and the legacy interrupt controllers |
//! | [`apic`] | the local APIC of each processor and the I/O APIC of the board |
//! | [`virtio`] | registers and queues of devices made for virtual machines |
//! | [`user`] | user mode: privilege level 3 and the way back |
//! | [`mem`] | the five functions that compiled code expects of a C library |
#![no_std]

pub mod acpi;
pub mod apic;
pub mod boot;
pub mod exit;
pub mod interrupts;
pub mod mem;
pub mod paging;
pub mod port;
pub mod uart;
pub mod user;
pub mod virtio;

// Makes Cargo link again after a change of the linker script.
const _: &[u8] = include_bytes!("../kernel.ld");

/// A bug in a lesson: say so on the serial port, and end the run with the exit code of a Rust panic.
///
/// The message is left out on purpose: formatting it would pull in more code than any lesson has.
#[panic_handler]
fn panic(info: &core::panic::PanicInfo) -> ! {
    if let Some(place) = info.location() {
        print!(
            "panic at ",
            place.file(),
            ":",
            u64::from(place.line()),
            "\n"
        );
    }
    exit::exit(101)
}
