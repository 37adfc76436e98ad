//! COM1: a 16550A serial port between the guest and the console's byte queues.
//!
//! [`core`] is the chip. This file wires it up: bytes that the chip sends go into the output queue, and while that is
//! full the chip's transmitter is busy, as it is on a slow line. Bytes wait in the input queue until the guest's
//! driver raises RTS, which is how a receiver says "send" on an RS-232 line; so nothing that is piped in gets lost
//! while a kernel boots and resets the FIFO.

pub mod core;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use acpi_tables::Aml;
use acpi_tables::aml::{self, Path};

use self::core::Core;
use crate::backend::{ByteQueue, SerialEnd};
use crate::bus::{Action, Device, RestoreError, SavedState};
use crate::irq::{Irq, IrqLine};
use crate::trace::{Direction, Register};

/// I/O ports of the chip.
pub const PORTS: u16 = 8;

/// A serial port.
pub struct Uart {
    // Fixed configuration.
    name: &'static str,
    first_port: u16,
    irq: Irq,
    // Runtime glue.
    line: Arc<dyn IrqLine>,
    output: Arc<ByteQueue>,
    input: Arc<ByteQueue>,
    /// Bytes that the guest wrote although the transmitter was busy.
    dropped: AtomicU64,
    // Volatile state.
    core: Mutex<Core>,
}

impl Uart {
    /// A port at `first_port`, with `line` connected to `irq`.
    pub fn new(
        name: &'static str,
        first_port: u16,
        irq: Irq,
        line: Arc<dyn IrqLine>,
        output: Arc<ByteQueue>,
        input: Arc<ByteQueue>,
    ) -> Uart {
        let (core, dropped) = (Mutex::default(), AtomicU64::default());
        Uart {
            name,
            first_port,
            irq,
            line,
            output,
            input,
            dropped,
            core,
        }
    }

    /// How many bytes the guest wrote without asking whether there was room.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    fn core(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fills the receiver, and raises an edge if the chip wants attention. An edge too many is harmless, as drivers
    /// ask the chip for the cause until there is none; one too few would leave the guest waiting.
    fn settle(&self, core: &mut Core) {
        while core.accepts() {
            match self.input.pop() {
                Some(byte) => core.receive(byte),
                None => break,
            }
        }
        if core.interrupt() {
            self.line.trigger();
        }
    }
}

impl SerialEnd for Uart {
    fn input_arrived(&self) {
        self.settle(&mut self.core());
    }

    fn output_drained(&self) {
        let mut core = self.core();
        core.set_transmitter_busy(false);
        self.settle(&mut core);
    }
}

impl Device for Uart {
    fn name(&self) -> &str {
        self.name
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut core = self.core();
        for (register, byte) in (offset..).zip(data) {
            *byte = core.read(register as u8);
        }
        self.settle(&mut core);
    }

    fn write(&self, offset: u64, data: &[u8]) -> Action {
        let mut core = self.core();
        for (register, &byte) in (offset..).zip(data) {
            if let Some(sent) = core.write(register as u8, byte) {
                if !self.output.push(sent) {
                    self.dropped.fetch_add(1, Ordering::Relaxed);
                }
                if !self.output.has_room() {
                    core.set_transmitter_busy(true);
                }
            }
        }
        self.settle(&mut core);
        Action::Continue
    }

    fn register(&self, offset: u64, direction: Direction) -> Option<&'static Register> {
        self.core().register(u8::try_from(offset).ok()?, direction)
    }

    fn save(&self) -> SavedState {
        SavedState::of(&*self.core())
    }

    fn restore(&self, state: &SavedState) -> Result<(), RestoreError> {
        *self.core() = state.to(self.name)?;
        Ok(())
    }
}

impl Aml for Uart {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        aml::Device::new(
            Path::new(self.name),
            vec![
                &aml::Name::new(Path::new("_HID"), &aml::EISAName::new("PNP0501")),
                &aml::Name::new(Path::new("_UID"), &aml::ZERO),
                &aml::Name::new(
                    Path::new("_CRS"),
                    &aml::ResourceTemplate::new(vec![
                        // Consumer, edge-triggered, active high, exclusive.
                        &aml::Interrupt::new(true, true, false, false, self.irq.0),
                        &aml::IO::new(self.first_port, self.first_port, 1, PORTS as u8),
                    ]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::OUTPUT_CAPACITY;
    use crate::irq::CountingLine;

    struct Bench {
        uart: Uart,
        line: Arc<CountingLine>,
        output: Arc<ByteQueue>,
        input: Arc<ByteQueue>,
    }

    fn bench() -> Bench {
        let line = Arc::new(CountingLine::default());
        let output = Arc::new(ByteQueue::output().unwrap());
        let input = Arc::new(ByteQueue::input().unwrap());
        let uart = Uart::new(
            "COM1",
            0x3f8,
            Irq(4),
            Arc::clone(&line) as Arc<dyn IrqLine>,
            Arc::clone(&output),
            Arc::clone(&input),
        );
        Bench {
            uart,
            line,
            output,
            input,
        }
    }

    fn read(uart: &Uart, offset: u64) -> u8 {
        let mut data = [0];
        uart.read(offset, &mut data);
        data[0]
    }

    #[test]
    fn what_is_piped_in_before_the_driver_is_up_waits_for_it() {
        let Bench {
            uart, line, input, ..
        } = bench();
        input.push_slice(b"hello");
        uart.input_arrived();
        assert_eq!(read(&uart, 5) & 1, 0, "the guest has not raised RTS");
        uart.write(2, &[7]); // FIFOs on and cleared
        uart.write(1, &[1]); // interrupt on received data
        assert_eq!(line.edges(), 0);
        uart.write(4, &[0x0b]);
        assert!(line.edges() > 0);
        let bytes: Vec<u8> = (0..5).map(|_| read(&uart, 0)).collect();
        assert_eq!(bytes, b"hello");
    }

    #[test]
    fn a_reader_that_stalls_makes_the_transmitter_busy_but_stops_nobody() {
        let Bench {
            uart, line, output, ..
        } = bench();
        uart.write(1, &[2]);
        for _ in 0..OUTPUT_CAPACITY {
            uart.write(0, b"x");
        }
        assert_eq!(read(&uart, 5) & 0x20, 0);
        uart.write(0, b"y");
        assert_eq!(uart.dropped(), 1);
        let before = line.edges();
        assert!(output.consume(1));
        uart.output_drained();
        assert_eq!(read(&uart, 5) & 0x20, 0x20);
        assert!(line.edges() > before);
    }

    #[test]
    fn the_chip_survives_save_and_restore() {
        let before = bench().uart;
        before.write(7, &[0x5a]);
        before.write(4, &[0x0b]);
        let after = bench().uart;
        after.restore(&before.save()).unwrap();
        assert_eq!((read(&after, 7), read(&after, 4)), (0x5a, 0x0b));
    }

    #[test]
    fn an_access_of_any_width_is_several_of_one_byte() {
        let Bench { uart, output, .. } = bench();
        uart.write(0, &[b'A', 0x05, 0, 3]);
        let mut data = [0; 8];
        uart.read(0, &mut data);
        assert_eq!((data[1], data[3]), (5, 3));
        assert_eq!(output.pop(), Some(b'A'));
    }
}
