//! pvpanic: a guest kernel's last words, one bit of them.
//!
//! The driver writes to the port from the kernel's panic notifier, so the host learns of a panic even when the
//! kernel then halts for ever. The interface is QEMU's (docs/specs/pvpanic): ACPI device QEMU0001, one port.

use acpi_tables::Aml;
use acpi_tables::aml::{self, Path};

use crate::bus::{Action, Device, RestoreError, SavedState};
use crate::trace::{Direction, Field, Register};

/// The guest panicked.
const PANICKED: u8 = 1 << 0;
/// The guest panicked, and a crash kernel takes over: not the end.
const CRASH_LOADED: u8 = 1 << 1;

const EVENT: Register = Register {
    name: "EVENT",
    fields: &[
        Field {
            mask: PANICKED as u64,
            name: "PANICKED",
        },
        Field {
            mask: CRASH_LOADED as u64,
            name: "CRASH_LOADED",
        },
    ],
};

/// The port. It has no state.
pub struct PvPanic {
    port: u16,
}

impl PvPanic {
    /// The device at I/O port `port`.
    pub fn new(port: u16) -> PvPanic {
        PvPanic { port }
    }
}

impl Device for PvPanic {
    fn name(&self) -> &str {
        "PVPANIC"
    }

    /// Reads as the events that the device understands.
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(PANICKED | CRASH_LOADED);
    }

    fn write(&self, _offset: u64, data: &[u8]) -> Action {
        match data.first() {
            Some(event) if event & PANICKED != 0 => Action::Panic,
            _ => Action::Continue,
        }
    }

    fn register(&self, _offset: u64, _direction: Direction) -> Option<&'static Register> {
        Some(&EVENT)
    }

    fn save(&self) -> SavedState {
        SavedState::of(&())
    }

    fn restore(&self, state: &SavedState) -> Result<(), RestoreError> {
        state.to::<()>(self.name())
    }
}

impl Aml for PvPanic {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        aml::Device::new(
            Path::new("PEVT"),
            vec![
                &aml::Name::new(Path::new("_HID"), &"QEMU0001"),
                &aml::Name::new(
                    Path::new("_CRS"),
                    &aml::ResourceTemplate::new(vec![&aml::IO::new(self.port, self.port, 1, 1)]),
                ),
                &aml::Name::new(Path::new("_STA"), &0xf_u8),
            ],
        )
        .to_aml_bytes(sink);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_ends_the_run_but_a_crash_kernel_does_not() {
        let device = PvPanic::new(0x505);
        assert_eq!(device.write(0, &[PANICKED]), Action::Panic);
        assert_eq!(device.write(0, &[CRASH_LOADED]), Action::Continue);
        let mut data = [0];
        device.read(0, &mut data);
        assert_eq!(data, [3]);
    }
}
