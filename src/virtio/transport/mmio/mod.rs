//! virtio over MMIO (virtio 1.3 §4.2): a page of registers in the hole below 4 GiB and one interrupt.
//!
//! [`core`] is the register file. This file wires it up: it owns the device, gives it its queues when the driver says
//! DRIVER_OK and takes them back at a reset, both on the vCPU thread that writes `Status`. Everything else that a device
//! does happens on the event loop (`events.rs`). One lock guards register file and device; the three registers that
//! matter while a device is busy (`QueueNotify`, `InterruptStatus`, `InterruptACK`) do without it, so a vCPU never
//! waits for the host's disk in its interrupt handler.

pub mod core;
mod events;
pub mod registers;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use acpi_tables::Aml;
use acpi_tables::aml::{self, Path};
use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueState};

use self::core::{Core, Effect, Identity, Registers};
use self::events::Notification;
use self::registers::{
    CONFIG, DEVICE_FEATURES, DRIVER_FEATURES, INTERRUPT_ACK, INTERRUPT_STATUS, QUEUE_NOTIFY,
};
use crate::bus::{Action, Device, RestoreError, SavedState};
use crate::hv;
use crate::irq::{Irq, IrqfdLine};
use crate::mem::{GuestAddress, GuestRam};
use crate::trace::{Direction, Register};
use crate::virtio::queue::{Buffer, Position, VirtQueue};
use crate::virtio::{Activation, INTERRUPT_CONFIG, Interrupt, TRANSPORT_FEATURES, VirtioDevice};
use crate::worker::{self, Token};

/// Bytes of address space that a device takes: a page, of which the registers are the first 0x100 bytes and the
/// configuration space the rest.
pub const WINDOW: u32 = 0x1000;

/// Where a device sits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Counts from 0; the device's `_UID`.
    pub number: u8,
    /// Guest physical address of the registers, a multiple of [`WINDOW`].
    pub address: u32,
    pub irq: Irq,
    /// Whether another device has the same interrupt.
    pub shared: bool,
}

/// A virtio device with its registers.
pub struct Mmio {
    // Fixed configuration.
    name: String,
    place: Place,
    // Runtime glue.
    vm: Arc<dyn hv::Vm>,
    ram: GuestRam,
    interrupt: Arc<Interrupt>,
    notifications: Vec<Notification>,
    worker: worker::Handle,
    /// For tasks on the loop, which must not keep the device alive.
    this: Weak<Mmio>,
    /// A task that brings the loop up to date has been posted and has not begun.
    settling: AtomicBool,
    /// How often the driver broke the rules.
    malformed: AtomicU64,
    state: Mutex<State>,
}

struct State {
    // Runtime glue.
    device: Box<dyn VirtioDevice>,
    /// The device's sources on the loop.
    tokens: Vec<Token>,
    // Volatile state.
    core: Core,
    /// From activation to reset, even if the device is stuck in between: where it stands in each queue.
    active: Option<Vec<Option<Arc<Position>>>>,
    /// The queues of an active device have not been looked at yet.
    unstarted: bool,
}

impl State {
    /// Whether the device may be called.
    fn is_running(&self) -> bool {
        self.active.is_some() && !self.core.needs_reset()
    }
}

/// The volatile state as it is saved. That queues are unstarted is not in it: after a restore, all are looked at.
#[derive(Serialize, Deserialize)]
struct Saved {
    registers: Registers,
    interrupt_status: u32,
    config_generation: u32,
    /// Next available and next used index of each queue, if the device is active.
    active: Option<Vec<Option<(u16, u16)>>>,
    device: SavedState,
}

impl Mmio {
    /// Puts `device` at `place` of `vm`, which has `ram`. It does nothing before it is on an event loop
    /// ([`attach`](Mmio::attach)), that of `worker`.
    ///
    /// # Errors
    /// When the host has no eventfd left, or KVM gives no interrupt line.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        place: Place,
        vm: &Arc<dyn hv::Vm>,
        ram: &GuestRam,
        worker: worker::Handle,
    ) -> Result<Arc<Mmio>, hv::Error> {
        let line = Arc::new(IrqfdLine::new(&**vm, place.irq)?);
        let queue_sizes = device.queue_sizes().to_vec();
        let notifications: Result<Vec<Notification>, hv::Error> =
            queue_sizes.iter().map(|_| Notification::new()).collect();
        let notifications = notifications?;
        let core = Core::new(Identity {
            device_id: device.device_id(),
            features: device.features() | TRANSPORT_FEATURES,
            queue_sizes,
        });
        Ok(Arc::new_cyclic(|this| Mmio {
            name: device.name().to_owned(),
            place,
            vm: Arc::clone(vm),
            ram: ram.clone(),
            interrupt: Arc::new(Interrupt::new(line)),
            notifications,
            worker,
            this: this.clone(),
            settling: AtomicBool::default(),
            malformed: AtomicU64::default(),
            state: Mutex::new(State {
                device,
                tokens: Vec::new(),
                core,
                active: None,
                unstarted: false,
            }),
        }))
    }

    /// How often the driver broke the rules in a way that only a reset mends.
    pub fn malformed(&self) -> u64 {
        self.malformed.load(Ordering::Relaxed)
    }

    /// Has the device let go of the guest's memory, for good. To be called when no vCPU runs any more.
    pub fn stop(&self) {
        self.deactivate(&mut self.state());
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_register(&self, offset: u64, value: u32) {
        match offset {
            QUEUE_NOTIFY => return self.notify(value),
            INTERRUPT_ACK => return self.interrupt.acknowledge(value),
            _ => {}
        }
        let state = &mut *self.state();
        match state.core.write(offset, value) {
            Effect::Nothing => return,
            Effect::Activate => {
                let queues = state.core.queues();
                if !self.activate(state, queues) {
                    self.stall(state, "a queue has no valid size or does not lie in memory");
                }
            }
            Effect::Reset => self.deactivate(state),
        }
        self.post_settle();
    }

    /// Gives the device its queues. `false` if one of them is not valid.
    fn activate(&self, state: &mut State, queues: Vec<Option<QueueState>>) -> bool {
        let queues: Option<Vec<Option<VirtQueue>>> = queues
            .into_iter()
            .map(|queue| match queue {
                Some(queue) => self.queue(queue).map(Some),
                None => Some(None),
            })
            .collect();
        let Some(queues) = queues else { return false };
        let positions = queues.iter();
        let positions = positions.map(|queue| queue.as_ref().map(VirtQueue::position));
        state.active = Some(positions.collect());
        state.unstarted = true;
        state.device.activate(Activation {
            features: state.core.features(),
            ram: self.ram.clone(),
            queues,
            interrupt: Arc::clone(&self.interrupt),
        });
        true
    }

    /// A queue whose size and alignment are as they must be and whose three tables lie in RAM, each in one region.
    fn queue(&self, state: QueueState) -> Option<VirtQueue> {
        let queue = Queue::try_from(state).ok()?;
        let size = u32::from(state.size);
        // §2.7: 16 bytes a descriptor; two words, the heads and an index; two words, 8 bytes an element and an index.
        let tables = [
            (state.desc_table, 16 * size),
            (state.avail_ring, 6 + 2 * size),
            (state.used_ring, 6 + 8 * size),
        ];
        let in_ram = tables.into_iter().all(|(address, len)| {
            let address = GuestAddress(address);
            Buffer { address, len }.is_in(&self.ram)
        });
        in_ram.then(|| VirtQueue::new(queue, self.ram.clone(), Arc::clone(&self.interrupt)))
    }

    /// Takes the queues back.
    fn deactivate(&self, state: &mut State) {
        if state.active.take().is_some() {
            state.device.reset();
        }
        state.unstarted = false;
        self.interrupt.acknowledge(u32::MAX);
    }

    /// The device does nothing more until it is reset, and the driver is told so (§2.1.1).
    fn stall(&self, state: &mut State, why: impl std::fmt::Display) {
        log::warn!("{}: the guest's driver must reset it: {why}", self.name);
        self.malformed.fetch_add(1, Ordering::Relaxed);
        state.core.set_needs_reset();
        self.interrupt.raise(INTERRUPT_CONFIG);
    }

    fn refusal(&self, reason: &str) -> RestoreError {
        RestoreError {
            device: self.name.clone(),
            reason: reason.to_owned(),
        }
    }
}

/// Configuration space is read and written in the widths of its fields; registers are 32 bits wide (§4.2.2.2).
fn is_field(data: &[u8]) -> bool {
    matches!(data.len(), 1 | 2 | 4 | 8)
}

impl Device for Mmio {
    fn name(&self) -> &str {
        &self.name
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(at) = offset.checked_sub(CONFIG) {
            if is_field(data) {
                self.state().device.read_config(at, data);
            }
            return;
        }
        let Ok(word) = <&mut [u8; 4]>::try_from(data) else {
            return;
        };
        let value = match offset {
            INTERRUPT_STATUS => self.interrupt.status(),
            _ => {
                // The lock comes first: the generation must not be that of before a change.
                let state = self.state();
                state.core.read(offset, self.interrupt.generation())
            }
        };
        *word = value.to_le_bytes();
    }

    fn write(&self, offset: u64, data: &[u8]) -> Action {
        if let Some(at) = offset.checked_sub(CONFIG) {
            let mut state = self.state();
            if is_field(data) && !state.core.needs_reset() {
                state.device.write_config(at, data);
                self.post_settle();
            }
        } else if let Ok(word) = <[u8; 4]>::try_from(data) {
            self.write_register(offset, u32::from_le_bytes(word));
        }
        Action::Continue
    }

    fn register(&self, offset: u64, direction: Direction) -> Option<&'static Register> {
        match offset {
            DEVICE_FEATURES | DRIVER_FEATURES => self.state().core.register(offset, direction),
            _ => registers::at(offset),
        }
    }

    fn save(&self) -> SavedState {
        let State {
            device,
            tokens: _,
            core,
            active,
            unstarted: _,
        } = &*self.state();
        let positions = active.as_ref().map(|positions| {
            let positions = positions.iter();
            positions
                .map(|position| position.as_ref().map(|position| position.get()))
                .collect()
        });
        SavedState::of(&Saved {
            registers: core.registers().clone(),
            interrupt_status: self.interrupt.status(),
            config_generation: self.interrupt.generation(),
            active: positions,
            device: device.save(),
        })
    }

    fn restore(&self, saved: &SavedState) -> Result<(), RestoreError> {
        let Saved {
            registers,
            interrupt_status,
            config_generation,
            active,
            device,
        } = saved.to(&self.name)?;
        let state = &mut *self.state();
        self.deactivate(state);
        if !state.core.restore(registers) {
            return Err(self.refusal("it has other queues or features"));
        }
        if let Some(positions) = active {
            if positions.len() != self.notifications.len() {
                return Err(self.refusal("it has other queues"));
            }
            let queues = state.core.queues().into_iter().zip(positions);
            let queues = queues.map(|(queue, position)| {
                let (next_avail, next_used) = position?;
                Some(QueueState {
                    next_avail,
                    next_used,
                    ..queue?
                })
            });
            if !self.activate(state, queues.collect()) {
                return Err(self.refusal("its queues are not valid"));
            }
        }
        self.interrupt.restore(interrupt_status, config_generation);
        state.device.restore(&device)?;
        self.post_settle();
        Ok(())
    }
}

/// Linux's driver `virtio_mmio` binds to the hardware id LNRO0005.
impl Aml for Mmio {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let Place {
            number,
            address,
            irq,
            shared,
        } = self.place;
        aml::Device::new(
            Path::new(&format!("V{number:03X}")),
            vec![
                &aml::Name::new(Path::new("_HID"), &"LNRO0005"),
                &aml::Name::new(Path::new("_UID"), &number),
                // The device sees memory as the processors' caches do.
                &aml::Name::new(Path::new("_CCA"), &aml::ONE),
                &aml::Name::new(
                    Path::new("_CRS"),
                    &aml::ResourceTemplate::new(vec![
                        &aml::Memory32Fixed::new(true, address, WINDOW),
                        // Consumer, edge-triggered, active high.
                        &aml::Interrupt::new(true, true, false, shared, irq.0),
                    ]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

#[cfg(test)]
mod tests;
