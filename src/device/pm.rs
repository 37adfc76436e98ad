//! Power management: sleep, reset, and the power button.
//!
//! A hardware-reduced ACPI machine (ACPI 6.5 §4.1) has no PM1 registers and no SCI. Instead the FADT points to
//! three byte registers, which are these: sleep control (§4.8.3.7), sleep status (§4.8.3.8) and reset (§4.8.3.6).
//! The power button is an event of a Generic Event Device (§5.6.9): an interrupt tells the guest to run the
//! method `_EVT`, which reads which events are pending and notifies the device that they belong to.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use acpi_tables::Aml;
use acpi_tables::aml::{self, Path};
use serde::{Deserialize, Serialize};

use crate::bus::{Action, Device, RestoreError, SavedState};
use crate::irq::{Irq, IrqLine};
use crate::trace::{Direction, Field, Register};

/// Offsets of the registers from the device's first port.
pub const SLEEP_CONTROL: u16 = 0;
pub const SLEEP_STATUS: u16 = 1;
pub const RESET: u16 = 2;
/// Events that wait to be seen; reading clears them. This one is ours, not ACPI's.
pub const EVENTS: u16 = 4;
/// Ports that the device takes.
pub const PORTS: u16 = 16;

/// What the FADT says must be written to the reset register.
pub const RESET_VALUE: u8 = 1;
/// The sleep type that means "off", as the package `_S5` in the DSDT says.
const SLP_TYP_S5: u8 = 5;
/// Sleep control: bits 2 to 4 are the type, bit 5 makes it happen.
const SLP_TYP: u8 = 0b111 << 2;
const SLP_EN: u8 = 1 << 5;
/// Event: the power button was pressed.
const POWER_BUTTON: u8 = 1 << 0;

static REGISTERS: [Option<Register>; 5] = [
    Some(Register {
        name: "SLEEP_CONTROL",
        fields: &[
            Field {
                mask: SLP_TYP as u64,
                name: "SLP_TYP",
            },
            Field {
                mask: SLP_EN as u64,
                name: "SLP_EN",
            },
        ],
    }),
    Some(Register {
        name: "SLEEP_STATUS",
        fields: &[Field {
            mask: 1 << 7,
            name: "WAK_STS",
        }],
    }),
    Some(Register::plain("RESET")),
    None,
    Some(Register {
        name: "EVENTS",
        fields: &[Field {
            mask: POWER_BUTTON as u64,
            name: "POWER_BUTTON",
        }],
    }),
];

/// The registers, and the interrupt of the event device.
pub struct PowerManagement {
    // Fixed configuration.
    first_port: u16,
    irq: Irq,
    // Runtime glue.
    line: Arc<dyn IrqLine>,
    // Volatile state.
    state: Mutex<State>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    events: u8,
}

impl PowerManagement {
    /// Registers from `first_port` on, with `line` connected to `irq`.
    pub fn new(first_port: u16, irq: Irq, line: Arc<dyn IrqLine>) -> PowerManagement {
        PowerManagement {
            first_port,
            irq,
            line,
            state: Mutex::default(),
        }
    }

    /// Presses the power button. What follows is up to the guest.
    pub fn press_power_button(&self) {
        self.state().events |= POWER_BUTTON;
        self.line.trigger();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Device for PowerManagement {
    fn name(&self) -> &str {
        "PM"
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        for (register, byte) in (offset..).zip(data) {
            *byte = match register {
                register if register == u64::from(EVENTS) => {
                    std::mem::take(&mut self.state().events)
                }
                _ => 0,
            };
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Action {
        for (register, &byte) in (offset..).zip(data) {
            match u16::try_from(register) {
                Ok(SLEEP_CONTROL) if byte & (SLP_TYP | SLP_EN) == SLP_TYP_S5 << 2 | SLP_EN => {
                    return Action::PowerOff;
                }
                Ok(RESET) if byte == RESET_VALUE => return Action::Reset,
                _ => {}
            }
        }
        Action::Continue
    }

    fn register(&self, offset: u64, _direction: Direction) -> Option<&'static Register> {
        REGISTERS.get(usize::try_from(offset).ok()?)?.as_ref()
    }

    fn save(&self) -> SavedState {
        let State { events } = self.state().clone();
        SavedState::of(&State { events })
    }

    fn restore(&self, state: &SavedState) -> Result<(), RestoreError> {
        *self.state() = state.to(self.name())?;
        Ok(())
    }
}

impl Aml for PowerManagement {
    /// The event device, the power button, and `_S5`.
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        aml::Device::new(
            Path::new("GED_"),
            vec![
                &aml::Name::new(Path::new("_HID"), &"ACPI0013"),
                &aml::Name::new(Path::new("_UID"), &aml::ZERO),
                &aml::Name::new(
                    Path::new("_CRS"),
                    // Consumer, edge-triggered, active high, exclusive.
                    &aml::ResourceTemplate::new(vec![&aml::Interrupt::new(
                        true, true, false, false, self.irq.0,
                    )]),
                ),
                &aml::OpRegion::new(
                    Path::new("EVTS"),
                    aml::OpRegionSpace::SystemIO,
                    &(self.first_port + EVENTS),
                    &aml::ONE,
                ),
                &aml::Field::new(
                    Path::new("EVTS"),
                    aml::FieldAccessType::Byte,
                    aml::FieldLockRule::NoLock,
                    aml::FieldUpdateRule::WriteAsZeroes,
                    vec![aml::FieldEntry::Named(*b"PEND", 8)],
                ),
                &aml::Method::new(
                    Path::new("_EVT"),
                    1,
                    true,
                    vec![
                        &aml::Store::new(&aml::Local(0), &Path::new("PEND")),
                        &aml::And::new(&aml::Local(1), &aml::Local(0), &POWER_BUTTON),
                        &aml::If::new(
                            &aml::Equal::new(&aml::Local(1), &POWER_BUTTON),
                            vec![&aml::Notify::new(&Path::new("\\_SB_.PWRB"), &0x80_u8)],
                        ),
                    ],
                ),
            ],
        )
        .to_aml_bytes(sink);
        aml::Device::new(
            Path::new("PWRB"),
            vec![
                &aml::Name::new(Path::new("_HID"), &aml::EISAName::new("PNP0C0C")),
                &aml::Name::new(Path::new("_UID"), &aml::ZERO),
            ],
        )
        .to_aml_bytes(sink);
        aml::Name::new(
            Path::new("\\_S5_"),
            &aml::Package::new(vec![&SLP_TYP_S5, &aml::ZERO, &aml::ZERO, &aml::ZERO]),
        )
        .to_aml_bytes(sink);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::irq::CountingLine;

    fn device() -> (PowerManagement, Arc<CountingLine>) {
        let line = Arc::new(CountingLine::default());
        (
            PowerManagement::new(0x600, Irq(5), Arc::clone(&line) as Arc<dyn IrqLine>),
            line,
        )
    }

    #[test]
    fn only_the_values_of_the_tables_switch_off_or_reset() {
        for (register, value, action) in [
            (SLEEP_CONTROL, 5 << 2 | SLP_EN, Action::PowerOff),
            (SLEEP_CONTROL, 5 << 2, Action::Continue),
            (SLEEP_CONTROL, 3 << 2 | SLP_EN, Action::Continue),
            (RESET, 1, Action::Reset),
            (RESET, 0, Action::Continue),
            (SLEEP_STATUS, 0xff, Action::Continue),
            (9, 0xff, Action::Continue),
        ] {
            assert_eq!(
                device().0.write(register.into(), &[value]),
                action,
                "{register} {value:#x}"
            );
        }
    }

    #[test]
    fn the_power_button_interrupts_and_is_seen_once() {
        let (device, line) = device();
        device.press_power_button();
        assert_eq!(line.edges(), 1);
        let mut data = [0];
        device.read(EVENTS.into(), &mut data);
        assert_eq!(data, [POWER_BUTTON]);
        device.read(EVENTS.into(), &mut data);
        assert_eq!(data, [0]);
    }

    #[test]
    fn a_pending_event_survives_save_and_restore() {
        let (before, _) = device();
        before.press_power_button();
        let (after, _) = device();
        after.restore(&before.save()).unwrap();
        let mut data = [0];
        after.read(EVENTS.into(), &mut data);
        assert_eq!(data, [POWER_BUTTON]);
    }
}
