//! The registers of virtio over MMIO by offset and name (virtio 1.3 §4.2.2, table 4.1), and the bits of the device
//! status (§2.1).

use crate::trace::{Direction, Field, Register};

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
pub const SHM_SEL: u64 = 0x0ac;
pub const SHM_LEN_LOW: u64 = 0x0b0;
pub const SHM_LEN_HIGH: u64 = 0x0b4;
pub const SHM_BASE_LOW: u64 = 0x0b8;
pub const SHM_BASE_HIGH: u64 = 0x0bc;
pub const QUEUE_RESET: u64 = 0x0c0;
pub const CONFIG_GENERATION: u64 = 0x0fc;
/// The device's own configuration space begins here.
pub const CONFIG: u64 = 0x100;

/// `MagicValue`: "virt".
pub const MAGIC: u32 = u32::from_le_bytes(*b"virt");
/// `Version`: not the one of before virtio 1.0, which is 1.
pub const VERSION_2: u32 = 2;
/// `VendorID`, which nobody assigns.
pub const VENDOR: u32 = u32::from_le_bytes(*b"SRNG");

/// `Status`: the driver has found the device.
pub const ACKNOWLEDGE: u32 = 1 << 0;
/// `Status`: the driver knows how to drive it.
pub const DRIVER: u32 = 1 << 1;
/// `Status`: the driver is set up, and the device is live.
pub const DRIVER_OK: u32 = 1 << 2;
/// `Status`: both sides agree on the features.
pub const FEATURES_OK: u32 = 1 << 3;
/// `Status`: the device cannot go on until it is reset.
pub const DEVICE_NEEDS_RESET: u32 = 1 << 6;
/// `Status`: the driver has given up.
pub const FAILED: u32 = 1 << 7;

macro_rules! register {
    ($name:literal $(, $mask:expr => $field:literal)*) => {
        Register { name: $name, fields: &[$(Field { mask: $mask as u64, name: $field }),*] }
    };
}

const fn plain(offset: u64, name: &'static str) -> (u64, Register) {
    (offset, Register::plain(name))
}

static REGISTERS: [(u64, Register); 29] = [
    plain(MAGIC_VALUE, "MagicValue"),
    plain(VERSION, "Version"),
    plain(DEVICE_ID, "DeviceID"),
    plain(VENDOR_ID, "VendorID"),
    plain(DEVICE_FEATURES, "DeviceFeatures"),
    plain(DEVICE_FEATURES_SEL, "DeviceFeaturesSel"),
    plain(DRIVER_FEATURES, "DriverFeatures"),
    plain(DRIVER_FEATURES_SEL, "DriverFeaturesSel"),
    plain(QUEUE_SEL, "QueueSel"),
    plain(QUEUE_SIZE_MAX, "QueueSizeMax"),
    plain(QUEUE_SIZE, "QueueSize"),
    plain(QUEUE_READY, "QueueReady"),
    plain(QUEUE_NOTIFY, "QueueNotify"),
    (
        INTERRUPT_STATUS,
        register!("InterruptStatus", 1 => "USED", 2 => "CONFIG"),
    ),
    (
        INTERRUPT_ACK,
        register!("InterruptACK", 1 => "USED", 2 => "CONFIG"),
    ),
    (
        STATUS,
        register!(
            "Status",
            ACKNOWLEDGE => "ACKNOWLEDGE",
            DRIVER => "DRIVER",
            FEATURES_OK => "FEATURES_OK",
            DRIVER_OK => "DRIVER_OK",
            DEVICE_NEEDS_RESET => "DEVICE_NEEDS_RESET",
            FAILED => "FAILED"
        ),
    ),
    plain(QUEUE_DESC_LOW, "QueueDescLow"),
    plain(QUEUE_DESC_HIGH, "QueueDescHigh"),
    plain(QUEUE_DRIVER_LOW, "QueueDriverLow"),
    plain(QUEUE_DRIVER_HIGH, "QueueDriverHigh"),
    plain(QUEUE_DEVICE_LOW, "QueueDeviceLow"),
    plain(QUEUE_DEVICE_HIGH, "QueueDeviceHigh"),
    plain(SHM_SEL, "SHMSel"),
    plain(SHM_LEN_LOW, "SHMLenLow"),
    plain(SHM_LEN_HIGH, "SHMLenHigh"),
    plain(SHM_BASE_LOW, "SHMBaseLow"),
    plain(SHM_BASE_HIGH, "SHMBaseHigh"),
    plain(QUEUE_RESET, "QueueReset"),
    plain(CONFIG_GENERATION, "ConfigGeneration"),
];

/// The feature bits that belong to the transport, by the half of the 64 that is selected (§6).
static FEATURES: [(Direction, u32, Register); 4] = [
    (
        Direction::Read,
        0,
        register!("DeviceFeatures", 1_u64 << 28 => "INDIRECT_DESC", 1_u64 << 29 => "EVENT_IDX"),
    ),
    (
        Direction::Write,
        0,
        register!("DriverFeatures", 1_u64 << 28 => "INDIRECT_DESC", 1_u64 << 29 => "EVENT_IDX"),
    ),
    (
        Direction::Read,
        1,
        register!("DeviceFeatures", 1 => "VERSION_1"),
    ),
    (
        Direction::Write,
        1,
        register!("DriverFeatures", 1 => "VERSION_1"),
    ),
];

static CONFIG_SPACE: Register = Register::plain("CONFIG");

/// The register at `offset`.
pub fn at(offset: u64) -> Option<&'static Register> {
    if offset >= CONFIG {
        return Some(&CONFIG_SPACE);
    }
    REGISTERS
        .iter()
        .find(|(at, _)| *at == offset)
        .map(|(_, register)| register)
}

/// `DeviceFeatures` or `DriverFeatures` with the names of the bits in the half `select`, if they have any.
pub fn features(direction: Direction, select: u32) -> Option<&'static Register> {
    FEATURES
        .iter()
        .find(|(of, half, _)| *of == direction && *half == select)
        .map(|(_, _, register)| register)
}
