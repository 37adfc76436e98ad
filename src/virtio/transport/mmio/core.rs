//! The register file of virtio over MMIO, as a pure state machine: accesses in, values and effects out.
//!
//! A driver brings a device up in a fixed order (virtio 1.3 §3.1.1), and says in `Status` how far it has come:
//! ACKNOWLEDGE, DRIVER, then the features, FEATURES_OK, then the queues, DRIVER_OK. What comes out of order is either
//! dropped, where the specification lets a device do that, or ends the negotiation with DEVICE_NEEDS_RESET. Writing 0
//! to `Status` starts it anew from any state.
//!
//! `InterruptStatus`, `InterruptACK` and `QueueNotify` are not here: they must answer while the device is at work, so
//! the glue answers them without a lock.

use serde::{Deserialize, Serialize};
use virtio_queue::QueueState;

use super::registers::*;
use crate::trace::{Direction, Register};
use crate::virtio::{F_EVENT_IDX, F_VERSION_1};

/// What never changes about a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    pub device_id: u32,
    /// All that is offered, the transport's features among them.
    pub features: u64,
    /// The largest size of each queue.
    pub queue_sizes: Vec<u16>,
}

/// What a write asks of the glue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    Nothing,
    /// The driver said DRIVER_OK.
    Activate,
    /// The driver reset the device.
    Reset,
}

/// One queue as its registers describe it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct QueueRegisters {
    size: u32,
    ready: bool,
    desc: u64,
    driver: u64,
    device: u64,
}

/// The volatile state of the register file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registers {
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    /// The driver accepted features that have no number yet.
    beyond_features: bool,
    queue_sel: u32,
    queues: Vec<QueueRegisters>,
}

/// The register file of one device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Core {
    identity: Identity,
    registers: Registers,
}

impl Core {
    /// The registers of a device that has just been reset.
    pub fn new(identity: Identity) -> Core {
        let registers = Registers::default();
        let mut core = Core {
            identity,
            registers,
        };
        core.reset();
        core
    }

    /// The driver reads a register. `generation` is that of the configuration space.
    pub fn read(&self, offset: u64, generation: u32) -> u32 {
        let registers = &self.registers;
        match offset {
            MAGIC_VALUE => MAGIC,
            VERSION => VERSION_2,
            DEVICE_ID => self.identity.device_id,
            VENDOR_ID => VENDOR,
            DEVICE_FEATURES => match registers.device_features_sel {
                0 => self.identity.features as u32,
                1 => (self.identity.features >> 32) as u32,
                _ => 0,
            },
            QUEUE_SIZE_MAX => self.max_size().into(),
            QUEUE_READY => self.queue().is_some_and(|queue| queue.ready).into(),
            STATUS => registers.status,
            // No shared memory: every region is as long as no region can be (§4.2.2).
            SHM_LEN_LOW | SHM_LEN_HIGH | SHM_BASE_LOW | SHM_BASE_HIGH => u32::MAX,
            CONFIG_GENERATION => generation,
            _ => 0,
        }
    }

    /// The driver writes a register.
    pub fn write(&mut self, offset: u64, value: u32) -> Effect {
        match offset {
            DEVICE_FEATURES_SEL => self.registers.device_features_sel = value,
            DRIVER_FEATURES_SEL => self.registers.driver_features_sel = value,
            DRIVER_FEATURES => self.accept_features(value),
            QUEUE_SEL => self.registers.queue_sel = value,
            QUEUE_READY => self.set_queue_ready(value),
            STATUS => return self.set_status(value),
            _ => self.set_up_queue(offset, value),
        }
        Effect::Nothing
    }

    /// The register at `offset`, with the names of those feature bits that are selected.
    pub fn register(&self, offset: u64, direction: Direction) -> Option<&'static Register> {
        let select = match (offset, direction) {
            (DEVICE_FEATURES, Direction::Read) => self.registers.device_features_sel,
            (DRIVER_FEATURES, Direction::Write) => self.registers.driver_features_sel,
            _ => return at(offset),
        };
        features(direction, select).or_else(|| at(offset))
    }

    /// The features that both sides agreed on.
    pub fn features(&self) -> u64 {
        self.registers.driver_features
    }

    /// Whether the driver has said DRIVER_OK.
    pub fn is_live(&self) -> bool {
        self.has(DRIVER_OK)
    }

    /// The device cannot go on. The glue tells the driver by an interrupt if [`is_live`](Self::is_live).
    pub fn set_needs_reset(&mut self) {
        self.registers.status |= DEVICE_NEEDS_RESET;
    }

    /// Whether the device waits to be reset.
    pub fn needs_reset(&self) -> bool {
        self.has(DEVICE_NEEDS_RESET)
    }

    /// The queues as the driver has set them up, `None` for those that it has not; nothing is checked yet.
    pub fn queues(&self) -> Vec<Option<QueueState>> {
        let sizes = self.identity.queue_sizes.iter();
        let event_idx_enabled = self.features() & F_EVENT_IDX != 0;
        sizes
            .zip(&self.registers.queues)
            .map(|(&max_size, queue)| {
                queue.ready.then_some(QueueState {
                    max_size,
                    next_avail: 0,
                    next_used: 0,
                    event_idx_enabled,
                    // A size that is no 16-bit number is no power of two within the limit either.
                    size: u16::try_from(queue.size).unwrap_or(0),
                    ready: true,
                    desc_table: queue.desc,
                    avail_ring: queue.driver,
                    used_ring: queue.device,
                })
            })
            .collect()
    }

    /// The volatile state, to be saved.
    pub fn registers(&self) -> &Registers {
        &self.registers
    }

    /// Takes saved registers back. `false` if they are those of another device.
    pub fn restore(&mut self, registers: Registers) -> bool {
        let beyond = registers.driver_features & !self.identity.features;
        let agreed = registers.status & FEATURES_OK != 0;
        let fits =
            registers.queues.len() == self.identity.queue_sizes.len() && !(agreed && beyond != 0);
        if fits {
            self.registers = registers;
        }
        fits
    }

    fn reset(&mut self) {
        let sizes = self.identity.queue_sizes.iter();
        let queues = sizes.map(|&size| QueueRegisters {
            size: size.into(),
            ..QueueRegisters::default()
        });
        self.registers = Registers {
            queues: queues.collect(),
            ..Registers::default()
        };
    }

    fn has(&self, bits: u32) -> bool {
        self.registers.status & bits == bits
    }

    /// Features are accepted half by half, after DRIVER and until FEATURES_OK (§3.1.1).
    fn accept_features(&mut self, value: u32) {
        if !self.has(DRIVER) || self.has(FEATURES_OK) {
            return;
        }
        let registers = &mut self.registers;
        let (low, high) = (
            registers.driver_features as u32,
            (registers.driver_features >> 32) as u32,
        );
        let (low, high) = match registers.driver_features_sel {
            0 => (value, high),
            1 => (low, value),
            _ => {
                registers.beyond_features |= value != 0;
                return;
            }
        };
        registers.driver_features = u64::from(high) << 32 | u64::from(low);
    }

    fn features_are_acceptable(&self) -> bool {
        let Registers {
            driver_features,
            beyond_features,
            ..
        } = &self.registers;
        driver_features & !self.identity.features == 0
            && driver_features & F_VERSION_1 != 0
            && !beyond_features
    }

    /// The driver adds to the status, or clears all of it. Bits that it leaves out stay set, and DEVICE_NEEDS_RESET is
    /// the device's own.
    fn set_status(&mut self, value: u32) -> Effect {
        if value == 0 {
            self.reset();
            return Effect::Reset;
        }
        self.registers.status |= value & FAILED;
        let was_live = self.is_live();
        for (bit, after) in [
            (ACKNOWLEDGE, 0),
            (DRIVER, ACKNOWLEDGE),
            (FEATURES_OK, ACKNOWLEDGE | DRIVER),
            (DRIVER_OK, ACKNOWLEDGE | DRIVER | FEATURES_OK),
        ] {
            if value & bit == 0 || self.has(bit) {
                continue;
            }
            if self.registers.status & (FAILED | DEVICE_NEEDS_RESET) != 0 {
                break;
            }
            if bit == FEATURES_OK && self.has(after) && !self.features_are_acceptable() {
                // The driver reads the bit back and sees that it was refused.
                break;
            }
            if self.has(after) {
                self.registers.status |= bit;
            } else {
                self.set_needs_reset();
            }
        }
        if self.is_live() && !was_live {
            Effect::Activate
        } else {
            Effect::Nothing
        }
    }

    fn index(&self) -> usize {
        usize::try_from(self.registers.queue_sel).unwrap_or(usize::MAX)
    }

    /// The selected queue; `None` if there is no such queue.
    fn queue(&self) -> Option<&QueueRegisters> {
        self.registers.queues.get(self.index())
    }

    fn max_size(&self) -> u16 {
        let sizes = &self.identity.queue_sizes;
        sizes.get(self.index()).copied().unwrap_or(0)
    }

    /// The selected queue, as long as the device is not live. Afterwards the device has the queues, and they change
    /// only by a reset.
    fn queue_mut(&mut self) -> Option<&mut QueueRegisters> {
        if self.is_live() {
            return None;
        }
        let index = self.index();
        self.registers.queues.get_mut(index)
    }

    fn set_queue_ready(&mut self, value: u32) {
        if let Some(queue) = self.queue_mut() {
            queue.ready = value & 1 != 0;
        }
    }

    /// Size and addresses, as long as the queue is not ready (§4.2.2.2).
    fn set_up_queue(&mut self, offset: u64, value: u32) {
        let Some(queue) = self.queue_mut().filter(|queue| !queue.ready) else {
            return;
        };
        match offset {
            QUEUE_SIZE => queue.size = value,
            QUEUE_DESC_LOW => set_low(&mut queue.desc, value),
            QUEUE_DESC_HIGH => set_high(&mut queue.desc, value),
            QUEUE_DRIVER_LOW => set_low(&mut queue.driver, value),
            QUEUE_DRIVER_HIGH => set_high(&mut queue.driver, value),
            QUEUE_DEVICE_LOW => set_low(&mut queue.device, value),
            QUEUE_DEVICE_HIGH => set_high(&mut queue.device, value),
            _ => {}
        }
    }
}

fn set_low(address: &mut u64, value: u32) {
    *address = *address >> 32 << 32 | u64::from(value);
}

fn set_high(address: &mut u64, value: u32) {
    *address = u64::from(value) << 32 | u64::from(*address as u32);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::{F_INDIRECT_DESC, TRANSPORT_FEATURES};

    const OWN: u64 = 1 << 5;

    fn core() -> Core {
        Core::new(Identity {
            device_id: 4,
            features: TRANSPORT_FEATURES | OWN,
            queue_sizes: vec![64, 1024],
        })
    }

    /// Writes registers in order and gives the last effect.
    fn play(core: &mut Core, writes: &[(u64, u32)]) -> Effect {
        let mut last = Effect::Nothing;
        for &(offset, value) in writes {
            last = core.write(offset, value);
        }
        last
    }

    const NEGOTIATE: &[(u64, u32)] = &[
        (STATUS, ACKNOWLEDGE),
        (STATUS, ACKNOWLEDGE | DRIVER),
        (DRIVER_FEATURES_SEL, 1),
        (DRIVER_FEATURES, 1),
        (STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK),
    ];
    const ALL: u32 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;

    fn negotiated() -> Core {
        let mut core = core();
        play(&mut core, NEGOTIATE);
        assert_eq!(core.read(STATUS, 0), ALL & !DRIVER_OK);
        core
    }

    #[test]
    fn a_driver_finds_out_what_the_device_is() {
        let mut core = core();
        for (select, offset, expected) in [
            (0, MAGIC_VALUE, 0x7472_6976),
            (0, VERSION, 2),
            (0, DEVICE_ID, 4),
            (
                0,
                DEVICE_FEATURES,
                (F_INDIRECT_DESC | F_EVENT_IDX | OWN) as u32,
            ),
            (1, DEVICE_FEATURES, 1),
            (2, DEVICE_FEATURES, 0),
            (u32::MAX, DEVICE_FEATURES, 0),
            (0, QUEUE_SIZE_MAX, 64),
            (1, QUEUE_SIZE_MAX, 1024),
            (2, QUEUE_SIZE_MAX, 0),
            (u32::MAX, QUEUE_SIZE_MAX, 0),
            (u32::MAX, QUEUE_READY, 0),
            (0, SHM_LEN_LOW, u32::MAX),
            (0, SHM_BASE_HIGH, u32::MAX),
            (0, QUEUE_RESET, 0),
            (0, CONFIG_GENERATION, 7),
            (0, 0x0f0, 0),
        ] {
            core.write(DEVICE_FEATURES_SEL, select);
            core.write(QUEUE_SEL, select);
            assert_eq!(core.read(offset, 7), expected, "{offset:#x} of {select}");
        }
    }

    #[test]
    fn the_status_goes_up_in_order_or_not_at_all() {
        // What is written to Status after the features were accepted, and what it then reads.
        let cases: &[(&str, &[u32], u32)] = &[
            ("step by step", &[1, 3, 11, 15], 15),
            ("bits left out stay", &[1, 2, 8, 4], 15),
            ("all at once", &[15], 15),
            ("no ACKNOWLEDGE", &[2], DEVICE_NEEDS_RESET),
            ("no FEATURES_OK", &[1, 3, 7], 3 | DEVICE_NEEDS_RESET),
            ("only DRIVER_OK", &[4], DEVICE_NEEDS_RESET),
            ("nothing goes on after that", &[4, 15], DEVICE_NEEDS_RESET),
            ("the driver gives up", &[1, 3, FAILED, 15], 3 | FAILED),
            ("bits that are not the driver's", &[1, 1 | 0xffff_ff70], 1),
            ("reset from anywhere", &[4, 0, 1], 1),
        ];
        for (what, writes, expected) in cases {
            let mut core = core();
            core.registers.driver_features = F_VERSION_1;
            for value in *writes {
                core.write(STATUS, *value);
            }
            assert_eq!(core.read(STATUS, 0), *expected, "{what}");
        }
    }

    #[test]
    fn features_are_refused_when_they_were_not_offered_or_are_of_before_version_1() {
        /// What is written to each half, and whether FEATURES_OK is.
        type Case = (&'static str, &'static [(u32, u32)], bool);
        let cases: &[Case] = &[
            ("version 1", &[(1, 1)], true),
            (
                "all",
                &[(0, (TRANSPORT_FEATURES | OWN) as u32), (1, 1)],
                true,
            ),
            ("nothing", &[], false),
            ("not version 1", &[(0, OWN as u32)], false),
            ("one that is not offered", &[(1, 1), (0, 1)], false),
            ("one that is not offered, high", &[(1, 3)], false),
            ("taken back", &[(1, 3), (1, 1)], true),
            ("past all that exist", &[(1, 1), (2, 1)], false),
        ];
        for (what, writes, accepted) in cases {
            let mut core = core();
            play(&mut core, &[(STATUS, 1), (STATUS, 3)]);
            for (select, value) in *writes {
                play(
                    &mut core,
                    &[(DRIVER_FEATURES_SEL, *select), (DRIVER_FEATURES, *value)],
                );
            }
            core.write(STATUS, 11);
            let expected = if *accepted { 11 } else { 3 };
            assert_eq!(core.read(STATUS, 0), expected, "{what}");
        }
    }

    #[test]
    fn features_can_be_written_only_between_driver_and_features_ok() {
        let mut core = core();
        let write = [(DRIVER_FEATURES_SEL, 0), (DRIVER_FEATURES, OWN as u32)];
        play(&mut core, &write);
        assert_eq!(core.features(), 0);
        play(&mut core, NEGOTIATE);
        play(&mut core, &write);
        assert_eq!(core.features(), F_VERSION_1);
    }

    #[test]
    fn a_queue_is_set_up_while_it_is_not_ready_and_kept_once_the_device_is_live() {
        let set_up = |base: u32| {
            [
                (QUEUE_SEL, 1),
                (QUEUE_SIZE, base),
                (QUEUE_DESC_LOW, base),
                (QUEUE_DESC_HIGH, 1),
                (QUEUE_DRIVER_LOW, base + 1),
                (QUEUE_DRIVER_HIGH, 2),
                (QUEUE_DEVICE_LOW, base + 2),
                (QUEUE_DEVICE_HIGH, 3),
                (QUEUE_READY, 1),
            ]
        };
        let mut core = negotiated();
        play(&mut core, &set_up(16));
        play(&mut core, &set_up(32));
        let queues = core.queues();
        assert_eq!(queues[0], None);
        let queue = queues[1].unwrap();
        assert_eq!((queue.size, queue.max_size), (16, 1024));
        assert_eq!(queue.desc_table, 0x1_0000_0010);
        assert_eq!(queue.avail_ring, 0x2_0000_0011);
        assert_eq!(queue.used_ring, 0x3_0000_0012);
        play(&mut core, &[(QUEUE_READY, 0)]);
        assert_eq!(core.read(QUEUE_READY, 0), 0);
        play(&mut core, &set_up(64));
        assert_eq!(core.queues()[1].unwrap().size, 64);
        assert_eq!(core.write(STATUS, ALL), Effect::Activate);
        play(&mut core, &[(QUEUE_READY, 0)]);
        play(&mut core, &set_up(128));
        assert_eq!(core.queues()[1].unwrap().size, 64);
        assert_eq!(core.write(STATUS, ALL), Effect::Nothing, "live already");
    }

    #[test]
    fn a_size_past_16_bits_is_never_cut_short_to_a_fitting_one() {
        let mut core = negotiated();
        play(&mut core, &[(QUEUE_SIZE, 0x1_0010), (QUEUE_READY, 1)]);
        assert_eq!(core.queues()[0].unwrap().size, 0);
    }

    #[test]
    fn a_reset_brings_back_the_registers_of_a_new_device() {
        let mut used = negotiated();
        play(
            &mut used,
            &[
                (QUEUE_SEL, 1),
                (QUEUE_SIZE, 8),
                (QUEUE_READY, 1),
                (STATUS, ALL),
            ],
        );
        used.set_needs_reset();
        assert_eq!(used.write(STATUS, 0), Effect::Reset);
        assert_eq!(used, core());
    }

    #[test]
    fn a_queue_that_does_not_exist_swallows_what_is_written_to_it() {
        let mut core = negotiated();
        let before = core.clone();
        play(
            &mut core,
            &[
                (QUEUE_SEL, 2),
                (QUEUE_SIZE, 8),
                (QUEUE_READY, 1),
                (QUEUE_SEL, 0),
            ],
        );
        assert_eq!(core, before);
    }

    #[test]
    fn a_trace_names_the_feature_bits_that_are_selected() {
        let mut core = core();
        core.write(DEVICE_FEATURES_SEL, 1);
        let name = |core: &Core, offset, direction, value| {
            core.register(offset, direction)
                .unwrap()
                .with_value(value)
                .to_string()
        };
        assert_eq!(
            name(&core, DEVICE_FEATURES, Direction::Read, 1),
            "DeviceFeatures{VERSION_1}"
        );
        assert_eq!(
            name(&core, DRIVER_FEATURES, Direction::Write, 1 << 29),
            "DriverFeatures{EVENT_IDX}"
        );
        assert_eq!(
            name(&core, STATUS, Direction::Write, 0xb),
            "Status{ACKNOWLEDGE,DRIVER,FEATURES_OK}"
        );
        assert_eq!(name(&core, CONFIG + 8, Direction::Read, 0), "CONFIG");
        assert_eq!(core.register(0x0f8, Direction::Read), None);
    }
}
