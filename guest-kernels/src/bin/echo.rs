//! Lesson 9: a device interrupts.
//!
//! Asking a device again and again costs an exit each time. So it is the other way round: the guest sleeps in `hlt`,
//! and the serial port raises its interrupt line when a byte has come in. The line is wired to pin 4 of the I/O APIC;
//! its redirection entry says which vector of which processor that is; the IDT says which function.
//!
//! In the VMM the same way is: bytes from your terminal, into the FIFO of the UART model, a write to an *irqfd*, and
//! KVM sets the interrupt pending in the vCPU's local APIC. Nobody polls on either side.
//!
//! On the bus: with each key, `in` LSR, `in` RBR, `out` THR. MCR tells the host that it may send (RTS).
//!
//! Manuals: PC16550D datasheet §8.3–8.7 (LSR, FCR, IER, MCR); 82093AA datasheet §3.2.4 (redirection entries); SDM
//! Vol. 3A 11.8 ("Handling Interrupts"), 11.8.5 (EOI); ACPI 6.5 §5.2.12.5 (an ISA interrupt that is elsewhere).
//!
//! Run: `sarang run -k target/x86_64-unknown-linux-gnu/release/echo`, type, and end it with Ctrl-D. Or let a test type:
//! add `--expect ready --send 'hello\n' --expect '^hello$'`.
#![no_std]
#![no_main]

use core::sync::atomic::{AtomicBool, Ordering::Relaxed};
use guest::uart::{self, FCR, FCR_ENABLE, IER, IER_RDA, MCR, MCR_DTR, MCR_OUT2, MCR_RTS};
use guest::{acpi, apic, boot::StartInfo, exit, interrupt_handler, interrupts, port, print};

/// Any vector from 32 on would do.
const UART_VECTOR: u8 = 0x24;
/// The line that the first serial port of a PC is wired to.
const UART_IRQ: u8 = 4;
const CTRL_D: u8 = 4;

static DONE: AtomicBool = AtomicBool::new(false);

interrupt_handler! {
    /// The port holds its line up while bytes are waiting, and the I/O APIC sees only the edge: take them all.
    fn byte_received() {
        while let Some(byte) = uart::get() {
            match byte {
                CTRL_D => DONE.store(true, Relaxed),
                byte => uart::put(byte),
            }
        }
        apic::write(apic::EOI, 0);
    }
}

#[unsafe(no_mangle)]
fn kernel_main(start: &'static StartInfo) -> ! {
    // The MADT says where the I/O APIC is, and whether it has our line at another pin.
    let (mut io_apic, mut pin) = (0, UART_IRQ.into());
    for entry in acpi::madt_entries(start) {
        match entry.kind {
            1 if io_apic == 0 => io_apic = entry.read::<u32>(4).into(),
            2 if entry.read::<u8>(3) == UART_IRQ => pin = entry.read::<u32>(4),
            _ => {}
        }
    }

    // From the far end to the near one: processor, I/O APIC, device.
    interrupts::mask_pics();
    interrupts::set_gate(UART_VECTOR, byte_received, interrupts::KERNEL);
    apic::enable();
    apic::route(io_apic, pin, UART_VECTOR);
    port::outb(FCR, FCR_ENABLE);
    port::outb(IER, IER_RDA);
    print!("echo: ready\n");
    port::outb(MCR, MCR_DTR | MCR_RTS | MCR_OUT2);

    while !DONE.load(Relaxed) {
        interrupts::wait();
    }
    exit::power_off(start)
}
