//! virtio over memory-mapped registers (virtio 1.3 §4.2): one page of addresses and one interrupt a device.
//!
//! The registers themselves are in [`core`]. Here they meet the machine: the bus on one side, the device on the other.
//! Negotiation happens on the vCPU thread that accesses a register. Requests do not: the driver's write to `QueueNotify`
//! ends in an *ioeventfd*, an eventfd that KVM signals without leaving the host kernel, and the event loop that watches
//! it calls the device. A vCPU waits for nothing but the lock of the one device that it talks to, and not even for that where it matters: the
//! registers of notification and interrupt need no lock, so an interrupt handler never waits for the host's disk.

pub mod core;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::{io, mem};

use acpi_tables::Aml;
use acpi_tables::aml::{self, Path};
use rustix::event::{EventfdFlags, eventfd};
use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueState};

use self::core::{Effect, NEEDS_RESET, Registers, offset};
use crate::bus::{Action, Device, RestoreError, SavedState};
use crate::hv;
use crate::irq::{Irq, IrqLine};
use crate::mem::{GuestAddress, GuestRam};
use crate::trace::{Direction, Register};
use crate::virtio::queue::{Buffer, Position, VirtQueue};
use crate::virtio::{
    Activation, F_EVENT_IDX, INTERRUPT_CONFIG, Interrupt, Malformed, TRANSPORT_FEATURES,
    VirtioDevice,
};
use crate::worker::{EventLoop, Interest, Token};

/// Bytes of address space for one device: a page, so that a hypervisor could hand it out alone.
pub const WINDOW: u64 = 0x1000;

/// A device behind memory-mapped registers.
pub struct MmioTransport {
    // Fixed configuration.
    name: String,
    index: u32,
    /// Guest physical address of the registers.
    base: u64,
    irq: Irq,

    // Runtime glue.
    vm: Arc<dyn hv::Vm>,
    ram: GuestRam,
    interrupt: Arc<Interrupt>,
    /// One for each queue; the event loop waits for them.
    notifiers: Vec<Arc<OwnedFd>>,

    state: Mutex<State>,
}

struct State {
    // Runtime glue.
    device: Box<dyn VirtioDevice>,
    /// The device's own descriptors on the event loop.
    sources: Vec<Token>,
    /// KVM signals the notifiers; done once, when the device is first used.
    wired: bool,
    /// Between `activate` and `reset`, and the driver has kept the rules.
    active: bool,
    /// How often drivers have broken the rules.
    malformed: u64,

    // Volatile state.
    registers: Registers,
    /// How far each live queue has got, written by the queue.
    positions: Vec<Option<Arc<Position>>>,
}

/// A device with its transport, as it is saved.
#[derive(Serialize, Deserialize)]
struct Saved {
    registers: Registers,
    interrupt_status: u32,
    generation: u32,
    /// Next available and next used index of each live queue.
    positions: Vec<Option<(u16, u16)>>,
    device: SavedState,
}

impl MmioTransport {
    /// Puts `device`, the machine's `index`th, behind registers at `base`. It interrupts by `line`, which is `irq`.
    ///
    /// # Errors
    /// When the host has no file descriptors left.
    pub fn new(
        vm: Arc<dyn hv::Vm>,
        ram: GuestRam,
        device: Box<dyn VirtioDevice>,
        (index, base): (u32, u64),
        (irq, line): (Irq, Arc<dyn IrqLine>),
    ) -> io::Result<MmioTransport> {
        let sizes = device.queue_sizes().to_vec();
        let features = device.features() | TRANSPORT_FEATURES;
        let notifiers: io::Result<Vec<Arc<OwnedFd>>> = sizes
            .iter()
            .map(|_| {
                Ok(Arc::new(eventfd(
                    0,
                    EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK,
                )?))
            })
            .collect();
        Ok(MmioTransport {
            name: device.name().to_owned(),
            index,
            base,
            irq,
            vm,
            ram,
            interrupt: Arc::new(Interrupt::new(line)),
            notifiers: notifiers?,
            state: Mutex::new(State {
                registers: Registers::new(device.device_id(), features, &sizes),
                positions: vec![None; sizes.len()],
                sources: Vec::new(),
                wired: false,
                active: false,
                malformed: 0,
                device,
            }),
        })
    }

    /// Has the event loop call the device. Once, before the guest runs.
    ///
    /// # Errors
    /// When epoll is out of memory or watches.
    pub fn attach(self: &Arc<Self>, events: &mut EventLoop) -> io::Result<()> {
        for (queue, notifier) in self.notifiers.iter().enumerate() {
            let (transport, event) = (Arc::clone(self), Arc::clone(notifier));
            events.add(
                Arc::clone(notifier),
                Interest::READ,
                Box::new(move |events, _, _| {
                    // Before the queue is looked at, so that no notification is missed.
                    let _ = rustix::io::read(&event, &mut [0; 8]);
                    transport.serve(events, |device| device.process(queue));
                }),
            )?;
        }
        let sources = self.lock().device.sources();
        for (number, source) in sources.into_iter().enumerate() {
            let transport = Arc::clone(self);
            let token = events.add(
                source,
                Interest::NONE,
                Box::new(move |events, _, readiness| {
                    transport.serve(events, |device| device.ready(number, readiness));
                }),
            )?;
            self.lock().sources.push(token);
        }
        Ok(())
    }

    /// Whether the device wants an event loop of its own.
    pub fn wants_own_worker(&self) -> bool {
        self.lock().device.wants_own_worker()
    }

    /// Ends whatever the device has under way. To be called when no vCPU runs any more.
    pub fn stop(&self) {
        let mut state = self.lock();
        if mem::take(&mut state.active) {
            state.device.reset();
        }
    }

    /// How often the guest's drivers have broken the rules of the specification.
    pub fn malformed(&self) -> u64 {
        self.lock().malformed
    }

    /// Calls an active device on the event loop, and waits from then on for what it waits for.
    fn serve(
        &self,
        events: &mut EventLoop,
        call: impl FnOnce(&mut dyn VirtioDevice) -> Result<(), Malformed>,
    ) {
        let mut state = self.lock();
        if state.active
            && let Err(broken) = call(&mut *state.device)
        {
            self.break_off(&mut state, &broken.to_string());
        }
        let interests = match state.active {
            true => state.device.interests(),
            false => Vec::new(),
        };
        let interests = interests
            .into_iter()
            .chain(std::iter::repeat(Interest::NONE));
        for (token, interest) in state.sources.iter().zip(interests) {
            if let Err(error) = events.set_interest(*token, interest) {
                log::warn!("{}: the event loop cannot watch it: {error}", self.name);
            }
        }
    }

    /// The driver broke the rules: the device asks for a reset (§2.1.2) and is left alone until then.
    fn break_off(&self, state: &mut State, why: &str) {
        // Once: a guest must not be able to fill the host's log.
        let level = match state.malformed {
            0 => log::Level::Warn,
            _ => log::Level::Debug,
        };
        log::log!(
            level,
            "{}: the guest's driver must reset it: {why}",
            self.name
        );
        state.malformed = state.malformed.saturating_add(1);
        state.registers.status |= NEEDS_RESET;
        if mem::take(&mut state.active) {
            state.device.reset();
        }
        self.interrupt.raise(INTERRUPT_CONFIG);
    }

    fn read_register(&self, at: u64) -> u32 {
        if at == offset::INTERRUPT_STATUS {
            return self.interrupt.status();
        }
        // The lock comes first: the generation must not be that of before a change.
        let state = self.lock();
        state.registers.read(at, self.interrupt.generation())
    }

    fn write_register(&self, at: u64, value: u32) {
        match at {
            offset::QUEUE_NOTIFY => {
                let queue = usize::try_from(value).unwrap_or(usize::MAX);
                self.notifiers.get(queue).into_iter().for_each(notify);
            }
            offset::INTERRUPT_ACK => self.interrupt.acknowledge(value),
            _ => {
                let mut state = self.lock();
                let effect = state.registers.write(at, value);
                self.apply(&mut state, effect);
            }
        }
    }

    fn apply(&self, state: &mut State, effect: Effect) {
        match effect {
            Effect::Nothing => {}
            Effect::Reset => {
                if mem::take(&mut state.active) {
                    state.device.reset();
                }
                state.positions.fill(None);
                self.interrupt.acknowledge(u32::MAX);
                // The event loop finds the device inactive and waits for nothing of it any more.
                self.notify_all();
            }
            Effect::Activate => {
                let start = vec![(0, 0); state.registers.queues.len()];
                self.activate(state, &start);
            }
            Effect::Broken => self.break_off(state, "it says DRIVER_OK out of order"),
        }
    }

    /// Gives the device its queues, whose indices go on from `positions`.
    fn activate(&self, state: &mut State, positions: &[(u16, u16)]) {
        let features = state.registers.accepted;
        let mut queues = Vec::new();
        let registers = state.registers.queues.iter().zip(&self.notifiers);
        for ((registers, notifier), position) in registers.zip(positions) {
            if !registers.ready {
                queues.push(None);
                continue;
            }
            let Some(queue) = make_queue(&self.ram, registers, *position, features) else {
                self.break_off(state, "a queue has no valid size or address");
                return;
            };
            queues.push(Some(VirtQueue::new(
                queue,
                self.ram.clone(),
                Arc::clone(&self.interrupt),
                Some(Arc::clone(notifier)),
            )));
        }
        if let Err(error) = self.wire(state) {
            // Notifications then cost an exit to userspace each, and arrive all the same.
            log::warn!("{}: {error}", self.name);
        }
        state.positions = queues
            .iter()
            .map(|queue| queue.as_ref().map(VirtQueue::position))
            .collect();
        state.active = true;
        state.device.activate(Activation {
            features,
            ram: self.ram.clone(),
            queues,
            interrupt: Arc::clone(&self.interrupt),
        });
        self.notify_all();
    }

    /// Has KVM signal the notifiers. Not before the device is used: each costs KVM a rebuild of its bus.
    fn wire(&self, state: &mut State) -> hv::Result<()> {
        if mem::replace(&mut state.wired, true) {
            return Ok(());
        }
        for (queue, notifier) in (0..).zip(&self.notifiers) {
            self.vm.register_ioeventfd(
                notifier.as_fd(),
                self.base.saturating_add(offset::QUEUE_NOTIFY),
                queue,
            )?;
        }
        Ok(())
    }

    fn notify_all(&self) {
        self.notifiers.iter().for_each(notify);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn notify(notifier: &Arc<OwnedFd>) {
    // Fails only when the counter is at its maximum, and then the loop has been woken already.
    let _ = rustix::io::write(notifier, &1_u64.to_ne_bytes());
}

/// The configuration space is accessed in the widths of its fields (§4.2.2.2).
fn is_field(data: &[u8]) -> bool {
    matches!(data.len(), 1 | 2 | 4 | 8)
}

/// The queue that the registers describe, if its size and alignment are as they must be and its three tables lie in RAM,
/// each in one region. (The queue's own setters leave a wrong value out and go on, and its own check looks only at where
/// a table ends.)
fn make_queue(
    ram: &GuestRam,
    registers: &core::QueueRegisters,
    (next_avail, next_used): (u16, u16),
    features: u64,
) -> Option<Queue> {
    let queue = Queue::try_from(QueueState {
        max_size: registers.max,
        next_avail,
        next_used,
        event_idx_enabled: features & F_EVENT_IDX != 0,
        size: registers.size,
        ready: true,
        desc_table: registers.descriptors,
        avail_ring: registers.driver,
        used_ring: registers.device,
    })
    .ok()?;
    let size = u32::from(registers.size);
    // §2.7: 16 bytes a descriptor; two words, a head each and an index; two words, 8 bytes an element and an index.
    let tables = [
        (registers.descriptors, 16 * size),
        (registers.driver, 6 + 2 * size),
        (registers.device, 6 + 8 * size),
    ];
    let in_ram = tables.into_iter().all(|(address, len)| {
        let address = GuestAddress(address);
        Buffer { address, len }.is_in(ram)
    });
    in_ram.then_some(queue)
}

impl Device for MmioTransport {
    fn name(&self) -> &str {
        &self.name
    }

    fn read(&self, at: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(at) = at.checked_sub(offset::CONFIG) {
            if is_field(data) {
                self.lock().device.read_config(at, data);
            }
        } else if let Ok(word) = <&mut [u8; 4]>::try_from(data)
            && at.is_multiple_of(4)
        {
            *word = self.read_register(at).to_le_bytes();
        }
    }

    fn write(&self, at: u64, data: &[u8]) -> Action {
        if let Some(at) = at.checked_sub(offset::CONFIG) {
            let mut state = self.lock();
            if is_field(data) && state.registers.status & NEEDS_RESET == 0 {
                state.device.write_config(at, data);
                // The event loop asks an active device anew what it waits for.
                if state.active {
                    self.notify_all();
                }
            }
        } else if let Ok(word) = <[u8; 4]>::try_from(data)
            && at.is_multiple_of(4)
        {
            self.write_register(at, u32::from_le_bytes(word));
        }
        Action::Continue
    }

    fn register(&self, at: u64, _direction: Direction) -> Option<&'static Register> {
        core::name(at)
    }

    fn save(&self) -> SavedState {
        let state = self.lock();
        let State {
            device,
            sources: _,
            wired: _,
            active: _,
            malformed: _,
            registers,
            positions,
        } = &*state;
        SavedState::of(&Saved {
            registers: registers.clone(),
            interrupt_status: self.interrupt.status(),
            generation: self.interrupt.generation(),
            positions: positions
                .iter()
                .map(|position| position.as_ref().map(|position| position.get()))
                .collect(),
            device: device.save(),
        })
    }

    fn restore(&self, saved: &SavedState) -> Result<(), RestoreError> {
        let saved: Saved = saved.to(&self.name)?;
        let mut state = self.lock();
        let same = saved.registers.fits(&state.registers);
        if !same || saved.positions.len() != state.positions.len() {
            return Err(RestoreError {
                device: self.name.clone(),
                reason: "it is a device of another kind".to_owned(),
            });
        }
        if mem::take(&mut state.active) {
            state.device.reset();
        }
        state.device.restore(&saved.device)?;
        state.registers = saved.registers;
        self.interrupt
            .restore(saved.interrupt_status, saved.generation);
        if state.registers.is_live() {
            let positions: Vec<(u16, u16)> = saved
                .positions
                .into_iter()
                .map(Option::unwrap_or_default)
                .collect();
            self.activate(&mut state, &positions);
        }
        Ok(())
    }
}

impl Aml for MmioTransport {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        // All addresses lie below 4 GiB, which `Board` sees to.
        let base = u32::try_from(self.base).unwrap_or(u32::MAX);
        aml::Device::new(
            Path::new(&format!("VR{:02X}", self.index & 0xff)),
            vec![
                &aml::Name::new(Path::new("_HID"), &"LNRO0005"),
                &aml::Name::new(Path::new("_UID"), &self.index),
                &aml::Name::new(Path::new("_CCA"), &1_u8),
                &aml::Name::new(
                    Path::new("_CRS"),
                    &aml::ResourceTemplate::new(vec![
                        &aml::Memory32Fixed::new(true, base, WINDOW as u32),
                        // Edge-triggered, active high, and shared where there are more devices than lines.
                        &aml::Interrupt::new(true, true, false, true, self.irq.0),
                    ]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

#[cfg(test)]
mod tests;
