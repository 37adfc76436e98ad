//! The record of what a guest made the VMM do: one event for every exit to userspace.
//!
//! This room is a leaf. It knows nothing of KVM, buses or devices; it owns the words in which they
//! report: which vCPU, at which instruction, accessed which register, in which direction, with which
//! value. [`Register`] is how a device gives a bare number the name that its manual gives it.

mod register;
mod text;

pub use register::{Field, Register};
pub use text::TextFile;

use std::fmt;
use std::time::Duration;

/// Which way the data of an access moves, seen from the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The guest reads: data moves from the device to the vCPU.
    Read,
    /// The guest writes: data moves from the vCPU to the device.
    Write,
}

/// One of the two address spaces of an x86 machine (SDM Vol. 1, chapter 19).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// The 64 KiB of I/O ports, reached with `in` and `out`.
    Io,
    /// Physical memory addresses with no RAM behind them.
    Mmio,
}

/// The vCPU and the instruction that caused an exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// Index of the vCPU, from 0.
    pub vcpu: u32,
    /// The instruction pointer, known only while a trace is being written: reading it has a cost.
    pub rip: Option<u64>,
}

/// What an exit was about.
#[derive(Clone, Copy, Debug)]
pub enum Kind<'a> {
    /// An access to a port or an MMIO address.
    Access {
        space: Space,
        direction: Direction,
        /// Port number or guest physical address.
        address: u64,
        /// The bytes, little-endian, 1 to 8 of them: what was written, or what the guest got.
        data: &'a [u8],
        /// Name of the device that answered; `None` when no device owns the address.
        device: Option<&'a str>,
        /// The device's register at that address.
        register: Option<&'static Register>,
    },
    /// An exit that is not an access: `hlt`, `shutdown`, `interrupted`, …
    Other {
        /// KVM's name of the exit, in lower case.
        name: &'a str,
    },
}

/// One exit of one vCPU.
#[derive(Clone, Copy, Debug)]
pub struct Event<'a> {
    /// Time since the machine was created.
    pub at: Duration,
    pub origin: Origin,
    pub kind: Kind<'a>,
}

/// Where events go. An implementation must not fail towards the guest: it counts what it loses.
pub trait Sink: Send + Sync {
    fn emit(&self, event: &Event<'_>);
    /// Makes everything emitted so far visible to other processes.
    fn flush(&self);
}

/// The value of an access as one number; accesses are at most 8 bytes wide.
fn value(data: &[u8]) -> u64 {
    data.iter()
        .take(8)
        .rev()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}

impl fmt::Display for Event<'_> {
    /// The line format of `--trace`, for example
    /// `0.001873 vcpu0 rip=0x100236 io out 0x3f9 ← 0x05 COM1.IER{RDA,RLS}`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}.{:06} vcpu{}",
            self.at.as_secs(),
            self.at.subsec_micros(),
            self.origin.vcpu
        )?;
        if let Some(rip) = self.origin.rip {
            write!(f, " rip={rip:#x}")?;
        }
        match self.kind {
            Kind::Other { name } => write!(f, " {name}"),
            Kind::Access {
                space,
                direction,
                address,
                data,
                device,
                register,
            } => {
                let (verb, arrow) = match (space, direction) {
                    (Space::Io, Direction::Read) => ("io in", '→'),
                    (Space::Io, Direction::Write) => ("io out", '←'),
                    (Space::Mmio, Direction::Read) => ("mmio read", '→'),
                    (Space::Mmio, Direction::Write) => ("mmio write", '←'),
                };
                let value = value(data);
                let digits = data.len() * 2 + 2;
                write!(f, " {verb} {address:#x} {arrow} {value:#0digits$x}")?;
                match (device, register) {
                    (Some(device), Some(register)) => {
                        write!(f, " {device}.{}", register.with_value(value))
                    }
                    (Some(device), None) => write!(f, " {device}"),
                    (None, _) => write!(f, " no device"),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IER: Register = Register {
        name: "IER",
        fields: &[
            Field {
                mask: 0x01,
                name: "RDA",
            },
            Field {
                mask: 0x04,
                name: "RLS",
            },
        ],
    };

    fn line(kind: Kind<'_>, rip: Option<u64>) -> String {
        Event {
            at: Duration::from_micros(1_000_873),
            origin: Origin { vcpu: 3, rip },
            kind,
        }
        .to_string()
    }

    #[test]
    fn an_access_is_printed_with_the_names_of_its_register_and_bits() {
        let kind = Kind::Access {
            space: Space::Io,
            direction: Direction::Write,
            address: 0x3f9,
            data: &[5],
            device: Some("COM1"),
            register: Some(&IER),
        };
        assert_eq!(
            line(kind, Some(0x10_0236)),
            "1.000873 vcpu3 rip=0x100236 io out 0x3f9 ← 0x05 COM1.IER{RDA,RLS}"
        );
    }

    #[test]
    fn a_wide_access_is_one_little_endian_number() {
        let kind = Kind::Access {
            space: Space::Mmio,
            direction: Direction::Read,
            address: 0xd000_0000,
            data: &[0x76, 0x69, 0x72, 0x74],
            device: None,
            register: None,
        };
        assert_eq!(
            line(kind, None),
            "1.000873 vcpu3 mmio read 0xd0000000 → 0x74726976 no device"
        );
    }

    #[test]
    fn an_exit_that_is_no_access_is_its_name() {
        assert_eq!(
            line(Kind::Other { name: "hlt" }, None),
            "1.000873 vcpu3 hlt"
        );
    }
}
