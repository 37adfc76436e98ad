//! The real-time clock and its CMOS RAM, a Motorola MC146818.
//!
//! Two ports: one selects a register, the other reads or writes it. The first ten registers are a calendar, then
//! come four control registers, and the rest is battery-backed memory; a PC keeps the century in byte 0x32. This
//! clock always shows the host's time in UTC. Setting it shifts this guest's view only.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use acpi_tables::Aml;
use acpi_tables::aml::{self, Path};
use serde::{Deserialize, Serialize};

use crate::bus::{Action, Device, RestoreError, SavedState};
use crate::trace::{Direction, Field, Register};

/// Registers (MC146818 datasheet, "Address map").
const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const REGISTER_A: u8 = 0x0a;
const REGISTER_B: u8 = 0x0b;
const REGISTER_C: u8 = 0x0c;
const REGISTER_D: u8 = 0x0d;
const CENTURY: u8 = 0x32;

/// Register A: the 32.768 kHz time base and the 1024 Hz rate that a PC's BIOS sets; no update in progress.
const A_AT_RESET: u8 = 0x26;
/// Register B: values are binary rather than BCD.
const B_BINARY: u8 = 1 << 2;
/// Register B: hours count to 24.
const B_24_HOURS: u8 = 1 << 1;
/// Register D: the battery is good.
const D_VALID: u8 = 1 << 7;
/// Index port: the top bit masks NMIs on a PC, the rest is the address.
const INDEX: u8 = 0x7f;
/// Hours register in 12-hour mode: afternoon.
const PM: u8 = 1 << 7;

static REGISTERS: [Register; 2] = [
    Register {
        name: "INDEX",
        fields: &[
            Field {
                mask: 0x80,
                name: "NMI_OFF",
            },
            Field {
                mask: 0x7f,
                name: "REG",
            },
        ],
    },
    Register::plain("DATA"),
];

/// Time since 1970-01-01, UTC.
pub type Clock = Arc<dyn Fn() -> Duration + Send + Sync>;

/// The clock.
pub struct Rtc {
    // Fixed configuration.
    first_port: u16,
    // Runtime glue.
    clock: Clock,
    // Volatile state.
    state: Mutex<State>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    index: u8,
    /// All 128 bytes; those of the calendar are unused.
    memory: Vec<u8>,
}

impl Rtc {
    /// A clock at two ports from `first_port` on, which shows what `clock` says.
    pub fn new(first_port: u16, clock: Clock) -> Rtc {
        let mut memory = vec![0; 128];
        for (register, value) in [
            (REGISTER_A, A_AT_RESET),
            (REGISTER_B, B_24_HOURS),
            (REGISTER_D, D_VALID),
        ] {
            if let Some(byte) = memory.get_mut(usize::from(register)) {
                *byte = value;
            }
        }
        Rtc {
            first_port,
            clock,
            state: Mutex::new(State { index: 0, memory }),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_selected(&self) -> u8 {
        let state = self.state();
        let stored = |register: u8| {
            state
                .memory
                .get(usize::from(register))
                .copied()
                .unwrap_or(0)
        };
        let mode = stored(REGISTER_B);
        let encode = |value: u8| {
            if mode & B_BINARY != 0 {
                value
            } else {
                bcd(value)
            }
        };
        let now = Calendar::at((self.clock)().as_secs());
        match state.index {
            SECONDS => encode(now.second),
            MINUTES => encode(now.minute),
            HOURS if mode & B_24_HOURS != 0 => encode(now.hour),
            HOURS => encode((now.hour + 11) % 12 + 1) | if now.hour >= 12 { PM } else { 0 },
            WEEKDAY => encode(now.weekday),
            DAY => encode(now.day),
            MONTH => encode(now.month),
            YEAR => encode((now.year % 100) as u8),
            CENTURY => encode((now.year / 100 % 100) as u8),
            // No interrupt was ever raised, and the battery is always good.
            REGISTER_C => 0,
            REGISTER_D => D_VALID,
            register => stored(register),
        }
    }

    fn write_selected(&self, value: u8) {
        let mut state = self.state();
        let index = state.index;
        // The calendar is the host's: what a guest writes into it is dropped.
        let calendar = index <= YEAR || matches!(index, REGISTER_C | REGISTER_D | CENTURY);
        if let Some(byte) = state.memory.get_mut(usize::from(index))
            && !calendar
        {
            *byte = value;
        }
    }
}

/// A number below 100 as two decimal digits of four bits each.
fn bcd(value: u8) -> u8 {
    ((value / 10) << 4) | (value % 10)
}

/// A moment in the Gregorian calendar.
#[derive(Debug, PartialEq, Eq)]
struct Calendar {
    year: u64,
    /// 1 to 12.
    month: u8,
    /// 1 to 31.
    day: u8,
    /// 1 is Sunday.
    weekday: u8,
    hour: u8,
    minute: u8,
    second: u8,
}

impl Calendar {
    /// The moment `seconds` after 1970-01-01, a Thursday.
    fn at(seconds: u64) -> Calendar {
        let (mut days, second_of_day) = (seconds / 86_400, seconds % 86_400);
        let weekday = ((days + 4) % 7 + 1) as u8;
        // 400 years have always the same number of days; the rest is few enough to count.
        let mut year = 1970 + days / 146_097 * 400;
        days %= 146_097;
        let leap = |year: u64| {
            year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
        };
        while days >= 365 + u64::from(leap(year)) {
            days -= 365 + u64::from(leap(year));
            year += 1;
        }
        let february = 28 + u64::from(leap(year));
        let mut month = 1;
        for len in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30] {
            if days < len {
                break;
            }
            days -= len;
            month += 1;
        }
        Calendar {
            year,
            month,
            day: days as u8 + 1,
            weekday,
            hour: (second_of_day / 3600) as u8,
            minute: (second_of_day / 60 % 60) as u8,
            second: (second_of_day % 60) as u8,
        }
    }
}

impl Device for Rtc {
    fn name(&self) -> &str {
        "RTC"
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        for (port, byte) in (offset..).zip(data) {
            // The index cannot be read back.
            *byte = if port == 1 {
                self.read_selected()
            } else {
                0xff
            };
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Action {
        for (port, &byte) in (offset..).zip(data) {
            match port {
                0 => self.state().index = byte & INDEX,
                1 => self.write_selected(byte),
                _ => {}
            }
        }
        Action::Continue
    }

    fn register(&self, offset: u64, _direction: Direction) -> Option<&'static Register> {
        REGISTERS.get(usize::try_from(offset).ok()?)
    }

    fn save(&self) -> SavedState {
        let State { index, memory } = self.state().clone();
        SavedState::of(&State { index, memory })
    }

    fn restore(&self, state: &SavedState) -> Result<(), RestoreError> {
        *self.state() = state.to(self.name())?;
        Ok(())
    }
}

impl Aml for Rtc {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        aml::Device::new(
            Path::new("RTC_"),
            vec![
                &aml::Name::new(Path::new("_HID"), &aml::EISAName::new("PNP0B00")),
                &aml::Name::new(
                    Path::new("_CRS"),
                    &aml::ResourceTemplate::new(vec![&aml::IO::new(
                        self.first_port,
                        self.first_port,
                        1,
                        2,
                    )]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rtc(seconds: u64) -> Rtc {
        Rtc::new(0x70, Arc::new(move || Duration::from_secs(seconds)))
    }

    fn get(rtc: &Rtc, register: u8) -> u8 {
        rtc.write(0, &[register]);
        let mut data = [0];
        rtc.read(1, &mut data);
        data[0]
    }

    /// 2024-02-29 23:59:58, a Thursday.
    const LEAP_DAY: u64 = 1_709_251_198;

    #[test]
    fn the_calendar_is_right_at_its_corners() {
        for (seconds, text) in [
            (0, "1970-1-1 5 0:0:0"),
            (LEAP_DAY, "2024-2-29 5 23:59:58"),
            (LEAP_DAY + 2, "2024-3-1 6 0:0:0"),
            (951_782_400, "2000-2-29 3 0:0:0"),
            (4_107_542_400, "2100-3-1 2 0:0:0"),
            (253_402_300_799, "9999-12-31 6 23:59:59"),
        ] {
            let Calendar {
                year,
                month,
                day,
                weekday,
                hour,
                minute,
                second,
            } = Calendar::at(seconds);
            let shown = format!("{year}-{month}-{day} {weekday} {hour}:{minute}:{second}");
            assert_eq!(shown, text);
        }
    }

    #[test]
    fn a_guest_reads_the_time_in_the_form_it_chose() {
        let rtc = rtc(LEAP_DAY);
        let registers = [SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY];
        let read = |rtc: &Rtc| registers.map(|register| get(rtc, register));
        assert_eq!(read(&rtc), [0x58, 0x59, 0x23, 5, 0x29, 2, 0x24, 0x20]);
        rtc.write(0, &[REGISTER_B]);
        rtc.write(1, &[B_BINARY]);
        assert_eq!(read(&rtc), [58, 59, 11 | PM, 5, 29, 2, 24, 20]);
    }

    #[test]
    fn the_nmi_bit_of_the_index_is_no_part_of_the_address() {
        let rtc = rtc(0);
        rtc.write(0, &[0x80 | 0x40]);
        rtc.write(1, &[0x5a]);
        assert_eq!(get(&rtc, 0x40), 0x5a);
        assert_eq!(get(&rtc, REGISTER_D), D_VALID);
        assert_eq!(
            get(&rtc, REGISTER_A) & 0x80,
            0,
            "no update is ever in progress"
        );
    }

    #[test]
    fn memory_survives_save_and_restore() {
        let before = rtc(0);
        before.write(0, &[0x41, 7]);
        let after = rtc(0);
        after.restore(&before.save()).unwrap();
        assert_eq!(get(&after, 0x41), 7);
    }
}
