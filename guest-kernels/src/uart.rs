//! The first serial port (COM1), a 16550A, and printing on it.
//!
//! Eight registers from port 0x3f8 on (National Semiconductor PC16550D datasheet, §8). To send a byte, wait until
//! the line status register says that the transmitter holding register is empty (THRE), and write it to THR. An
//! emulated port has neither a baud rate nor wires, so we leave those registers as reset left them.
//!
//! Two exits a character, one of them for the question "ready?". This is why virtio was invented.

use crate::port::{inb, outb};

/// Where the registers of the first port begin.
pub const COM1: u16 = 0x3f8;
/// Receiver buffer (read) and transmitter holding register (write).
pub const DATA: u16 = COM1;
/// Interrupt enable register.
pub const IER: u16 = COM1 + 1;
/// FIFO control register (write).
pub const FCR: u16 = COM1 + 2;
/// Modem control register.
pub const MCR: u16 = COM1 + 4;
/// Line status register.
pub const LSR: u16 = COM1 + 5;

/// IER: interrupt when a byte has arrived ("received data available").
pub const IER_RDA: u8 = 1 << 0;
/// FCR: buffer up to 16 bytes each way.
pub const FCR_ENABLE: u8 = 1 << 0;
/// MCR: "I am here".
pub const MCR_DTR: u8 = 1 << 0;
/// MCR: "you may send".
pub const MCR_RTS: u8 = 1 << 1;
/// MCR: on a PC this pin lets the interrupt out of the chip.
pub const MCR_OUT2: u8 = 1 << 3;
/// LSR: a received byte waits in DATA.
pub const LSR_DR: u8 = 1 << 0;
/// LSR: DATA takes another byte to send.
pub const LSR_THRE: u8 = 1 << 5;

/// Sends one byte.
pub fn put(byte: u8) {
    while inb(LSR) & LSR_THRE == 0 {}
    outb(DATA, byte);
}

/// Receives one byte if there is one.
pub fn get() -> Option<u8> {
    (inb(LSR) & LSR_DR != 0).then(|| inb(DATA))
}

/// What [`print!`] can print. The formatter of `core` is ten times the size of a lesson, and uses SSE.
pub trait Print {
    /// Sends a readable form.
    fn print(&self);
}

impl Print for str {
    fn print(&self) {
        self.bytes().for_each(put);
    }
}

impl Print for &str {
    fn print(&self) {
        (**self).print();
    }
}

impl Print for u64 {
    fn print(&self) {
        if *self >= 10 {
            (self / 10).print();
        }
        put(b'0' + (self % 10) as u8);
    }
}

/// A number to be printed in hexadecimal.
pub struct Hex(pub u64);

impl Print for Hex {
    fn print(&self) {
        "0x".print();
        let digits = (64 - (self.0 | 1).leading_zeros()).div_ceil(4);
        for digit in (0..digits).rev() {
            let value = (self.0 >> (4 * digit)) as u8 & 15;
            put(if value < 10 {
                b'0' + value
            } else {
                b'a' + value - 10
            });
        }
    }
}

/// Prints its arguments one after the other: `print!("tick ", n, "\n")`.
#[macro_export]
macro_rules! print {
    ($($part:expr),+ $(,)?) => {{ $($crate::uart::Print::print(&$part);)+ }};
}
