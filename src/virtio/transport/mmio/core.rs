//! The register file of a virtio-mmio device, version 2 (virtio 1.3 §4.2.2), as a pure state machine.
//!
//! A driver works through it in one order (§3.1.1): reset, ACKNOWLEDGE, DRIVER, features, FEATURES_OK and a look whether
//! the bit stayed, queues, DRIVER_OK. Values go in and come out as 32-bit words; what a write asks of the device behind
//! the registers is returned as an [`Effect`]. What comes out of order has no effect, or is a reason for FAILED.
//!
//! `QueueNotify`, `InterruptStatus` and `InterruptACK` have their names here and nothing else. They are no part of the
//! negotiation, and the glue answers them even while the device is at work.

use serde::{Deserialize, Serialize};

use crate::trace::{Field, Register};
use crate::virtio::F_VERSION_1;

/// `MagicValue`: "virt", little-endian.
const MAGIC: u32 = u32::from_le_bytes(*b"virt");
/// `Version`: 1 is the legacy interface, which is not offered.
const VERSION: u32 = 2;
/// `VendorID`, free to choose: "SARA".
const VENDOR: u32 = u32::from_le_bytes(*b"SARA");

/// Device status bits (§2.1).
pub const ACKNOWLEDGE: u32 = 1;
pub const DRIVER: u32 = 2;
pub const DRIVER_OK: u32 = 4;
pub const FEATURES_OK: u32 = 8;
pub const NEEDS_RESET: u32 = 64;
pub const FAILED: u32 = 128;
/// The bits that a driver can set.
const BY_DRIVER: u32 = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED;

/// Byte offsets of the registers (§4.2.2, table 4.1).
pub mod offset {
    pub const MAGIC_VALUE: u64 = 0x000;
    pub const VERSION: u64 = 0x004;
    pub const DEVICE_ID: u64 = 0x008;
    pub const VENDOR_ID: u64 = 0x00c;
    pub const DEVICE_FEATURES: u64 = 0x010;
    pub const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub const QUEUE_SEL: u64 = 0x030;
    pub const QUEUE_SIZE_MAX: u64 = 0x034;
    pub const QUEUE_SIZE: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const INTERRUPT_STATUS: u64 = 0x060;
    pub const INTERRUPT_ACK: u64 = 0x064;
    pub const STATUS: u64 = 0x070;
    pub const QUEUE_DESC_LOW: u64 = 0x080;
    pub const QUEUE_DESC_HIGH: u64 = 0x084;
    pub const QUEUE_DRIVER_LOW: u64 = 0x090;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x094;
    pub const QUEUE_DEVICE_LOW: u64 = 0x0a0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
    pub const SHM_LEN_LOW: u64 = 0x0b0;
    pub const SHM_BASE_HIGH: u64 = 0x0bc;
    pub const CONFIG_GENERATION: u64 = 0x0fc;
    /// The device's own configuration space begins here.
    pub const CONFIG: u64 = 0x100;
}

const fn bit(mask: u64, name: &'static str) -> Field {
    Field { mask, name }
}

const STATUS_REGISTER: Register = Register {
    name: "Status",
    fields: &[
        bit(ACKNOWLEDGE as u64, "ACKNOWLEDGE"),
        bit(DRIVER as u64, "DRIVER"),
        bit(DRIVER_OK as u64, "DRIVER_OK"),
        bit(FEATURES_OK as u64, "FEATURES_OK"),
        bit(NEEDS_RESET as u64, "DEVICE_NEEDS_RESET"),
        bit(FAILED as u64, "FAILED"),
    ],
};
const INTERRUPT_FIELDS: &[Field] = &[bit(1, "USED_BUFFER"), bit(2, "CONFIG_CHANGE")];

/// Each register's name, by offset.
const NAMES: &[(u64, Register)] = &[
    (offset::MAGIC_VALUE, Register::plain("MagicValue")),
    (offset::VERSION, Register::plain("Version")),
    (offset::DEVICE_ID, Register::plain("DeviceID")),
    (offset::VENDOR_ID, Register::plain("VendorID")),
    (offset::DEVICE_FEATURES, Register::plain("DeviceFeatures")),
    (
        offset::DEVICE_FEATURES_SEL,
        Register::plain("DeviceFeaturesSel"),
    ),
    (offset::DRIVER_FEATURES, Register::plain("DriverFeatures")),
    (
        offset::DRIVER_FEATURES_SEL,
        Register::plain("DriverFeaturesSel"),
    ),
    (offset::QUEUE_SEL, Register::plain("QueueSel")),
    (offset::QUEUE_SIZE_MAX, Register::plain("QueueSizeMax")),
    (offset::QUEUE_SIZE, Register::plain("QueueSize")),
    (offset::QUEUE_READY, Register::plain("QueueReady")),
    (offset::QUEUE_NOTIFY, Register::plain("QueueNotify")),
    (
        offset::INTERRUPT_STATUS,
        Register {
            name: "InterruptStatus",
            fields: INTERRUPT_FIELDS,
        },
    ),
    (
        offset::INTERRUPT_ACK,
        Register {
            name: "InterruptACK",
            fields: INTERRUPT_FIELDS,
        },
    ),
    (offset::STATUS, STATUS_REGISTER),
    (offset::QUEUE_DESC_LOW, Register::plain("QueueDescLow")),
    (offset::QUEUE_DESC_HIGH, Register::plain("QueueDescHigh")),
    (offset::QUEUE_DRIVER_LOW, Register::plain("QueueDriverLow")),
    (
        offset::QUEUE_DRIVER_HIGH,
        Register::plain("QueueDriverHigh"),
    ),
    (offset::QUEUE_DEVICE_LOW, Register::plain("QueueDeviceLow")),
    (
        offset::QUEUE_DEVICE_HIGH,
        Register::plain("QueueDeviceHigh"),
    ),
    (
        offset::CONFIG_GENERATION,
        Register::plain("ConfigGeneration"),
    ),
];
const CONFIG: Register = Register::plain("Config");

/// The register at a byte offset.
pub fn name(at: u64) -> Option<&'static Register> {
    if at >= offset::CONFIG {
        return Some(&CONFIG);
    }
    NAMES
        .iter()
        .find(|(offset, _)| *offset == at)
        .map(|(_, register)| register)
}

/// What a write to a register asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    Nothing,
    /// Let go of everything; the registers are as at power-on already.
    Reset,
    /// The driver is ready: check the queues and start the device.
    Activate,
    /// The driver broke the order of initialization.
    Broken,
}

/// What one queue's registers hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueRegisters {
    pub max: u16,
    pub size: u16,
    pub ready: bool,
    /// Guest physical addresses of the descriptor table, the available ring and the used ring.
    pub descriptors: u64,
    pub driver: u64,
    pub device: u64,
}

/// The registers of one device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registers {
    device_id: u32,
    offered: u64,
    pub status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    pub accepted: u64,
    queue_sel: u32,
    pub queues: Vec<QueueRegisters>,
}

/// The half of a 64-bit value that a `…Sel` register selects.
fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn set_low(value: &mut u64, low: u32) {
    *value = *value & !0xffff_ffff | u64::from(low);
}

fn set_high(value: &mut u64, high: u32) {
    *value = *value & 0xffff_ffff | u64::from(high) << 32;
}

impl Registers {
    /// Registers as at power-on, for a device that offers `features` and has queues of up to these sizes.
    pub fn new(device_id: u32, features: u64, queue_sizes: &[u16]) -> Registers {
        let queues = queue_sizes
            .iter()
            .map(|max| QueueRegisters {
                max: *max,
                size: *max,
                ..QueueRegisters::default()
            })
            .collect();
        Registers {
            device_id,
            offered: features,
            status: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            accepted: 0,
            queue_sel: 0,
            queues,
        }
    }

    fn reset(&mut self) {
        let sizes: Vec<u16> = self.queues.iter().map(|queue| queue.max).collect();
        *self = Registers::new(self.device_id, self.offered, &sizes);
    }

    /// Whether a device that is behind these registers runs.
    pub fn is_live(&self) -> bool {
        self.status & (DRIVER_OK | NEEDS_RESET) == DRIVER_OK
    }

    /// Whether the device behind `other` can go on with these registers.
    pub fn fits(&self, other: &Registers) -> bool {
        let shape = |registers: &Registers| -> Vec<u16> {
            registers.queues.iter().map(|queue| queue.max).collect()
        };
        self.device_id == other.device_id
            && self.offered == other.offered
            && shape(self) == shape(other)
    }

    fn queue(&self) -> Option<&QueueRegisters> {
        self.queues.get(self.queue_sel as usize)
    }

    /// The selected queue, if its registers can be written now: before DRIVER_OK, and `size` and addresses only while
    /// the queue is not ready (§4.2.2.2).
    fn queue_to_set_up(&mut self) -> Option<&mut QueueRegisters> {
        let now = self.status & (FEATURES_OK | DRIVER_OK) == FEATURES_OK;
        self.queues
            .get_mut(self.queue_sel as usize)
            .filter(|queue| now && !queue.ready)
    }

    /// The word at `at`, a multiple of 4 below [`offset::CONFIG`]. What is not readable, or not there, reads as 0.
    /// `generation` is that of the configuration space.
    pub fn read(&self, at: u64, generation: u32) -> u32 {
        match at {
            offset::MAGIC_VALUE => MAGIC,
            offset::VERSION => VERSION,
            offset::DEVICE_ID => self.device_id,
            offset::VENDOR_ID => VENDOR,
            offset::DEVICE_FEATURES => half(self.offered, self.device_features_sel),
            offset::QUEUE_SIZE_MAX => self.queue().map_or(0, |queue| queue.max.into()),
            offset::QUEUE_READY => self.queue().is_some_and(|queue| queue.ready).into(),
            offset::STATUS => self.status,
            // No shared memory: length and base are all ones (§4.2.2).
            offset::SHM_LEN_LOW..=offset::SHM_BASE_HIGH => u32::MAX,
            offset::CONFIG_GENERATION => generation,
            _ => 0,
        }
    }

    /// Writes the word at `at`.
    pub fn write(&mut self, at: u64, value: u32) -> Effect {
        match at {
            offset::DEVICE_FEATURES_SEL => self.device_features_sel = value,
            offset::DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            offset::DRIVER_FEATURES => self.accept_features(value),
            offset::QUEUE_SEL => self.queue_sel = value,
            offset::STATUS => return self.write_status(value),
            offset::QUEUE_READY => self.write_ready(value),
            _ => {
                if let Some(queue) = self.queue_to_set_up() {
                    match at {
                        offset::QUEUE_SIZE => queue.size = u16::try_from(value).unwrap_or(0),
                        offset::QUEUE_DESC_LOW => set_low(&mut queue.descriptors, value),
                        offset::QUEUE_DESC_HIGH => set_high(&mut queue.descriptors, value),
                        offset::QUEUE_DRIVER_LOW => set_low(&mut queue.driver, value),
                        offset::QUEUE_DRIVER_HIGH => set_high(&mut queue.driver, value),
                        offset::QUEUE_DEVICE_LOW => set_low(&mut queue.device, value),
                        offset::QUEUE_DEVICE_HIGH => set_high(&mut queue.device, value),
                        _ => {}
                    }
                }
            }
        }
        Effect::Nothing
    }

    fn accept_features(&mut self, value: u32) {
        if self.status & (DRIVER | FEATURES_OK) != DRIVER {
            return;
        }
        match self.driver_features_sel {
            0 => set_low(&mut self.accepted, value),
            1 => set_high(&mut self.accepted, value),
            _ => {}
        }
    }

    fn write_ready(&mut self, value: u32) {
        if value == 1 {
            if let Some(queue) = self.queue_to_set_up() {
                // A size that the queue cannot have leaves it not ready, which the driver can read.
                queue.ready = queue.size.is_power_of_two() && queue.size <= queue.max;
            }
        } else if self.status & DRIVER_OK == 0
            && let Some(queue) = self.queues.get_mut(self.queue_sel as usize)
        {
            queue.ready = false;
        }
    }

    fn write_status(&mut self, value: u32) -> Effect {
        if value == 0 {
            self.reset();
            return Effect::Reset;
        }
        // A driver must not clear a bit (§2.1.1); one that tries changes nothing by it.
        let new = value & BY_DRIVER & !self.status;
        self.status |= new & (ACKNOWLEDGE | DRIVER | FAILED);
        if new & FEATURES_OK != 0 && self.status & DRIVER != 0 {
            let offered_only = self.accepted & !self.offered == 0;
            if offered_only && self.accepted & F_VERSION_1 != 0 {
                self.status |= FEATURES_OK;
            }
        }
        if new & DRIVER_OK == 0 {
            return Effect::Nothing;
        }
        if self.status & (FEATURES_OK | FAILED | NEEDS_RESET) != FEATURES_OK {
            return Effect::Broken;
        }
        self.status |= DRIVER_OK;
        Effect::Activate
    }
}

#[cfg(test)]
mod tests {
    use super::offset::*;
    use super::*;

    const OFFERED: u64 = F_VERSION_1 | 1 << 5;

    fn registers() -> Registers {
        Registers::new(4, OFFERED, &[256, 64])
    }

    /// Brings a device to FEATURES_OK with these features.
    fn negotiate(registers: &mut Registers, features: u64) {
        registers.write(STATUS, ACKNOWLEDGE);
        registers.write(STATUS, ACKNOWLEDGE | DRIVER);
        for select in 0..2 {
            registers.write(DRIVER_FEATURES_SEL, select);
            registers.write(DRIVER_FEATURES, half(features, select));
        }
        registers.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    }

    fn read(registers: &Registers, at: u64) -> u32 {
        registers.read(at, 0)
    }

    #[test]
    fn a_driver_that_keeps_the_order_gets_to_driver_ok() {
        let mut registers = registers();
        assert_eq!(read(&registers, MAGIC_VALUE), 0x7472_6976);
        assert_eq!(
            (
                read(&registers, super::offset::VERSION),
                read(&registers, DEVICE_ID)
            ),
            (2, 4)
        );
        registers.write(DEVICE_FEATURES_SEL, 1);
        assert_eq!(read(&registers, DEVICE_FEATURES), 1);
        negotiate(&mut registers, F_VERSION_1);
        assert_eq!(read(&registers, STATUS), 11);
        registers.write(QUEUE_SEL, 1);
        assert_eq!(read(&registers, QUEUE_SIZE_MAX), 64);
        registers.write(QUEUE_SIZE, 32);
        registers.write(QUEUE_DESC_LOW, 0x1000);
        registers.write(QUEUE_DESC_HIGH, 1);
        registers.write(QUEUE_READY, 1);
        assert_eq!(read(&registers, QUEUE_READY), 1);
        assert_eq!(registers.write(STATUS, 15), Effect::Activate);
        let queue = &registers.queues[1];
        assert_eq!((queue.size, queue.descriptors), (32, 0x1_0000_1000));
        assert_eq!(registers.write(STATUS, 0), Effect::Reset);
        assert_eq!(registers, self::registers());
    }

    #[test]
    fn features_that_were_not_offered_or_lack_version_1_are_refused() {
        for features in [0, 1 << 5, F_VERSION_1 | 1 << 6] {
            let mut registers = registers();
            negotiate(&mut registers, features);
            assert_eq!(read(&registers, STATUS) & FEATURES_OK, 0, "{features:#x}");
            assert_eq!(registers.write(STATUS, 15), Effect::Broken);
        }
    }

    #[test]
    fn features_stay_as_they_are_once_agreed_on() {
        let mut registers = registers();
        negotiate(&mut registers, F_VERSION_1);
        registers.write(DRIVER_FEATURES_SEL, 0);
        registers.write(DRIVER_FEATURES, 1 << 5);
        assert_eq!(registers.accepted, F_VERSION_1);
    }

    #[test]
    fn queues_cannot_be_changed_out_of_order() {
        let mut registers = registers();
        registers.write(QUEUE_SIZE, 8);
        assert_eq!(registers.queues[0].size, 256, "before FEATURES_OK");
        negotiate(&mut registers, F_VERSION_1);
        for bad in [0, 3, 512, 0x1_0000] {
            registers.write(QUEUE_SIZE, bad);
            registers.write(QUEUE_READY, 1);
            assert_eq!(read(&registers, QUEUE_READY), 0, "size {bad}");
        }
        registers.write(QUEUE_SIZE, 8);
        registers.write(QUEUE_READY, 1);
        registers.write(QUEUE_SIZE, 16);
        assert_eq!(registers.queues[0].size, 8, "while ready");
        registers.write(STATUS, 15);
        registers.write(QUEUE_READY, 0);
        assert_eq!(read(&registers, QUEUE_READY), 1, "while live");
        registers.write(QUEUE_SEL, 2);
        assert_eq!(
            read(&registers, QUEUE_SIZE_MAX),
            0,
            "there is no third queue"
        );
    }

    #[test]
    fn a_status_bit_cannot_be_cleared_but_by_a_reset() {
        let mut registers = registers();
        registers.write(STATUS, ACKNOWLEDGE | DRIVER | FAILED);
        registers.write(STATUS, ACKNOWLEDGE);
        assert_eq!(read(&registers, STATUS), ACKNOWLEDGE | DRIVER | FAILED);
        assert_eq!(registers.write(STATUS, DRIVER_OK), Effect::Broken);
    }
}
