//! The registers of a 16550A, as a pure state machine: accesses and bytes in, bytes and an interrupt level out.
//!
//! Sections are those of the PC16550D datasheet (National Semiconductor, 1995), §8. Eight ports hold twelve
//! registers: some are read-only or write-only, and two more appear at offsets 0 and 1 while the divisor latch
//! access bit (LCR.DLAB) is set.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::trace::{Direction, Field, Register};

/// Offsets.
const DATA: u8 = 0;
const IER: u8 = 1;
const IIR_FCR: u8 = 2;
const LCR: u8 = 3;
const MCR: u8 = 4;
const LSR: u8 = 5;
const MSR: u8 = 6;

/// Interrupt enable register, §8.6.
const IER_RDA: u8 = 1 << 0;
const IER_THRE: u8 = 1 << 1;
const IER_RLS: u8 = 1 << 2;
const IER_MASK: u8 = 0x0f;
/// Interrupt identification register, §8.5: no interrupt, or which one; and that FIFOs are on.
const IIR_NONE: u8 = 0b0001;
const IIR_THRE: u8 = 0b0010;
const IIR_RDA: u8 = 0b0100;
const IIR_RLS: u8 = 0b0110;
const IIR_FIFOS: u8 = 0xc0;
/// FIFO control register, §8.4.
const FCR_ENABLE: u8 = 1 << 0;
const FCR_CLEAR_RX: u8 = 1 << 1;
/// Line control register, §8.1.
const LCR_DLAB: u8 = 1 << 7;
/// Modem control register, §8.7.
const MCR_DTR: u8 = 1 << 0;
const MCR_RTS: u8 = 1 << 1;
const MCR_OUT1: u8 = 1 << 2;
const MCR_OUT2: u8 = 1 << 3;
const MCR_LOOP: u8 = 1 << 4;
const MCR_MASK: u8 = 0x1f;
/// Line status register, §8.3.
const LSR_DR: u8 = 1 << 0;
const LSR_OE: u8 = 1 << 1;
const LSR_THRE: u8 = 1 << 5;
const LSR_TEMT: u8 = 1 << 6;
/// Modem status register, §8.8.
const MSR_CTS: u8 = 1 << 4;
const MSR_DSR: u8 = 1 << 5;
const MSR_RI: u8 = 1 << 6;
const MSR_DCD: u8 = 1 << 7;

/// Bytes in the receiver FIFO; one when FIFOs are off.
const FIFO: usize = 16;

macro_rules! register {
    ($name:literal $(, $mask:expr => $field:literal)*) => {
        Register { name: $name, fields: &[$(Field { mask: $mask as u64, name: $field }),*] }
    };
}

/// Offset, direction (`None`: both), whether DLAB must be set (`None`: either), register.
type Row = (u8, Option<Direction>, Option<bool>, Register);

static REGISTERS: [Row; 12] = [
    (DATA, None, Some(true), register!("DLL")),
    (IER, None, Some(true), register!("DLM")),
    (DATA, Some(Direction::Read), None, register!("RBR")),
    (DATA, Some(Direction::Write), None, register!("THR")),
    (
        IER,
        None,
        None,
        register!("IER", IER_RDA => "RDA", IER_THRE => "THRE", IER_RLS => "RLS", 8 => "MS"),
    ),
    (
        IIR_FCR,
        Some(Direction::Read),
        None,
        register!("IIR", IIR_NONE => "NONE", 0x0e => "ID", IIR_FIFOS => "FIFOS"),
    ),
    (
        IIR_FCR,
        Some(Direction::Write),
        None,
        register!("FCR", FCR_ENABLE => "ENABLE", FCR_CLEAR_RX => "CLEAR_RX", 4 => "CLEAR_TX", 0xc0 => "TRIGGER"),
    ),
    (
        LCR,
        None,
        None,
        register!("LCR", 3 => "WLS", 4 => "STB", 8 => "PEN", 0x40 => "BREAK", LCR_DLAB => "DLAB"),
    ),
    (
        MCR,
        None,
        None,
        register!("MCR", MCR_DTR => "DTR", MCR_RTS => "RTS", MCR_OUT1 => "OUT1", MCR_OUT2 => "OUT2", MCR_LOOP => "LOOP"),
    ),
    (
        LSR,
        None,
        None,
        register!("LSR", LSR_DR => "DR", LSR_OE => "OE", LSR_THRE => "THRE", LSR_TEMT => "TEMT"),
    ),
    (
        MSR,
        None,
        None,
        register!("MSR", MSR_CTS => "CTS", MSR_DSR => "DSR", MSR_RI => "RI", MSR_DCD => "DCD"),
    ),
    (7, None, None, register!("SCR")),
];

/// The volatile state of the chip.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Core {
    ier: u8,
    fcr: u8,
    lcr: u8,
    mcr: u8,
    scr: u8,
    divisor: [u8; 2],
    received: VecDeque<u8>,
    overrun: bool,
    /// The transmitter has become empty, and the guest has not been told yet.
    thre_pending: bool,
    /// There is no room for another byte: the wire is slower than the guest.
    transmitter_busy: bool,
}

impl Default for Core {
    /// The state after reset, §8 table III: 9600 baud.
    fn default() -> Core {
        Core {
            ier: 0,
            fcr: 0,
            lcr: 3,
            mcr: 0,
            scr: 0,
            divisor: [12, 0],
            received: VecDeque::new(),
            overrun: false,
            thre_pending: false,
            transmitter_busy: false,
        }
    }
}

impl Core {
    /// The guest reads a register.
    pub fn read(&mut self, offset: u8) -> u8 {
        match (offset, self.dlab()) {
            (DATA, true) => self.divisor[0],
            (IER, true) => self.divisor[1],
            (DATA, false) => self.received.pop_front().unwrap_or(0),
            (IER, false) => self.ier,
            (IIR_FCR, _) => {
                let cause = self.cause();
                // Reading the cause "transmitter empty" is taking note of it.
                self.thre_pending &= cause != IIR_THRE;
                cause
                    | if self.fcr & FCR_ENABLE != 0 {
                        IIR_FIFOS
                    } else {
                        0
                    }
            }
            (LCR, _) => self.lcr,
            (MCR, _) => self.mcr,
            (LSR, _) => {
                let status = self.line_status();
                self.overrun = false;
                status
            }
            (MSR, _) => self.modem_status(),
            _ => self.scr,
        }
    }

    /// The guest writes a register. The result is a byte for the wire.
    pub fn write(&mut self, offset: u8, value: u8) -> Option<u8> {
        match (offset, self.dlab()) {
            (DATA, true) => self.divisor[0] = value,
            (IER, true) => self.divisor[1] = value,
            (DATA, false) if self.mcr & MCR_LOOP != 0 => {
                self.receive(value);
                self.thre_pending = true;
            }
            (DATA, false) => {
                // The byte is on its way at once, so the transmitter is empty again.
                self.thre_pending = true;
                return Some(value);
            }
            (IER, false) => {
                let newly = value & !self.ier;
                self.ier = value & IER_MASK;
                // Enabling the interrupt while the transmitter is empty raises it, §8.6.
                if newly & IER_THRE != 0 && !self.transmitter_busy {
                    self.thre_pending = true;
                }
            }
            (IIR_FCR, _) => {
                // Switching the FIFOs on or off empties them, §8.4.
                if value & FCR_CLEAR_RX != 0 || (value ^ self.fcr) & FCR_ENABLE != 0 {
                    self.received.clear();
                }
                self.fcr = value;
            }
            (LCR, _) => self.lcr = value,
            (MCR, _) => self.mcr = value & MCR_MASK,
            // LSR and MSR are read-only.
            (LSR | MSR, _) => {}
            _ => self.scr = value,
        }
        None
    }

    /// A byte arrives on the wire.
    pub fn receive(&mut self, byte: u8) {
        if self.received.len() < self.capacity() {
            self.received.push_back(byte);
        } else {
            self.overrun = true;
        }
    }

    /// Whether the far end may send: the guest is ready (RTS), not talking to itself, and has room.
    pub fn accepts(&self) -> bool {
        self.mcr & (MCR_RTS | MCR_LOOP) == MCR_RTS && self.received.len() < self.capacity()
    }

    /// Tells the chip whether its transmitter can take another byte.
    pub fn set_transmitter_busy(&mut self, busy: bool) {
        self.thre_pending = (self.thre_pending || self.transmitter_busy) && !busy;
        self.transmitter_busy = busy;
    }

    /// The level of the interrupt pin.
    pub fn interrupt(&self) -> bool {
        self.cause() != IIR_NONE
    }

    /// The register at `offset` as DLAB stands.
    pub fn register(&self, offset: u8, direction: Direction) -> Option<&'static Register> {
        REGISTERS
            .iter()
            .find(|(at, only, dlab, _)| {
                *at == offset
                    && only.is_none_or(|only| only == direction)
                    && dlab.is_none_or(|dlab| dlab == self.dlab())
            })
            .map(|(.., register)| register)
    }

    fn dlab(&self) -> bool {
        self.lcr & LCR_DLAB != 0
    }

    fn capacity(&self) -> usize {
        if self.fcr & FCR_ENABLE != 0 { FIFO } else { 1 }
    }

    /// The pending interrupt of the highest priority, §8.5 table IV. The trigger level is not waited for: a byte
    /// that has arrived would time out and interrupt four characters later anyway.
    fn cause(&self) -> u8 {
        if self.ier & IER_RLS != 0 && self.overrun {
            IIR_RLS
        } else if self.ier & IER_RDA != 0 && !self.received.is_empty() {
            IIR_RDA
        } else if self.ier & IER_THRE != 0 && self.thre_pending {
            IIR_THRE
        } else {
            IIR_NONE
        }
    }

    fn line_status(&self) -> u8 {
        let bit = |on: bool, bits: u8| if on { bits } else { 0 };
        bit(!self.received.is_empty(), LSR_DR)
            | bit(self.overrun, LSR_OE)
            | bit(!self.transmitter_busy, LSR_THRE | LSR_TEMT)
    }

    /// The far end is always ready; in loopback the modem outputs are wired to the inputs, §8.7.
    fn modem_status(&self) -> u8 {
        if self.mcr & MCR_LOOP == 0 {
            return MSR_CTS | MSR_DSR | MSR_DCD;
        }
        [
            (MCR_DTR, MSR_DSR),
            (MCR_RTS, MSR_CTS),
            (MCR_OUT1, MSR_RI),
            (MCR_OUT2, MSR_DCD),
        ]
        .iter()
        .filter(|(output, _)| self.mcr & output != 0)
        .fold(0, |status, (_, input)| status | input)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_fifos() -> Core {
        let mut core = Core::default();
        core.write(IIR_FCR, FCR_ENABLE);
        core
    }

    #[test]
    fn the_divisor_latch_hides_data_and_interrupt_enable() {
        let mut core = Core::default();
        core.write(IER, 5);
        core.write(LCR, LCR_DLAB);
        assert_eq!((core.write(DATA, 1), core.write(IER, 2)), (None, None));
        assert_eq!((core.read(DATA), core.read(IER)), (1, 2));
        assert_eq!(core.register(DATA, Direction::Write).unwrap().name, "DLL");
        core.write(LCR, 3);
        assert_eq!(core.read(IER), 5);
        assert_eq!(core.register(DATA, Direction::Write).unwrap().name, "THR");
        assert_eq!(core.register(DATA, Direction::Read).unwrap().name, "RBR");
    }

    #[test]
    fn a_byte_written_is_a_byte_on_the_wire_and_the_transmitter_is_empty_again() {
        let mut core = Core::default();
        core.write(IER, IER_THRE);
        assert_eq!(core.read(IIR_FCR), IIR_THRE, "enabling it raises it");
        assert_eq!(core.read(IIR_FCR), IIR_NONE, "reading it clears it");
        assert_eq!(core.write(DATA, b'x'), Some(b'x'));
        assert!(core.interrupt());
        assert_eq!(core.read(LSR), LSR_THRE | LSR_TEMT);
    }

    #[test]
    fn a_slow_wire_shows_as_a_busy_transmitter_and_interrupts_when_it_is_free() {
        let mut core = Core::default();
        core.write(IER, IER_THRE);
        core.set_transmitter_busy(true);
        assert!(!core.interrupt());
        assert_eq!(core.read(LSR) & LSR_THRE, 0);
        core.set_transmitter_busy(false);
        assert_eq!(core.read(IIR_FCR), IIR_THRE);
    }

    #[test]
    fn received_bytes_come_in_order_and_outrank_the_transmitter() {
        let mut core = with_fifos();
        core.write(IER, IER_RDA | IER_THRE);
        (b'a'..=b'p').for_each(|byte| core.receive(byte));
        assert_eq!(core.read(IIR_FCR), IIR_RDA | IIR_FIFOS);
        let read: Vec<u8> = (0..16).map(|_| core.read(DATA)).collect();
        assert_eq!(read, b"abcdefghijklmnop");
        assert_eq!(core.read(LSR) & LSR_DR, 0);
        assert_eq!(core.read(IIR_FCR), IIR_THRE | IIR_FIFOS);
    }

    #[test]
    fn a_byte_too_many_is_an_overrun() {
        let mut core = Core::default();
        core.write(IER, IER_RLS);
        core.receive(1);
        core.receive(2);
        assert_eq!(core.read(IIR_FCR), IIR_RLS);
        assert_eq!(core.read(LSR) & LSR_OE, LSR_OE);
        assert_eq!(core.read(LSR) & LSR_OE, 0, "reading the status clears it");
        assert_eq!(core.read(DATA), 1);
    }

    #[test]
    fn the_far_end_waits_until_the_guest_raises_rts() {
        let mut core = with_fifos();
        assert!(!core.accepts());
        core.write(MCR, MCR_RTS | MCR_LOOP);
        assert!(!core.accepts());
        core.write(MCR, MCR_RTS);
        assert!(core.accepts());
        (0..16).for_each(|byte| core.receive(byte));
        assert!(!core.accepts());
    }

    #[test]
    fn loopback_returns_bytes_and_modem_lines() {
        let mut core = with_fifos();
        core.write(MCR, MCR_LOOP | MCR_OUT2 | MCR_RTS);
        assert_eq!(core.read(MSR), MSR_DCD | MSR_CTS);
        assert_eq!(core.write(DATA, 0x5a), None);
        assert_eq!(core.read(DATA), 0x5a);
    }
}
