//! virtio: devices made for virtual machines (Virtual I/O Device, version 1.3).
//!
//! A PC's device is driven by its registers, and each access to one costs an exit. A virtio device is driven by
//! *queues* in guest RAM: the driver writes a request into memory, puts its place on a ring and notifies the device
//! once for as many requests as it likes; the device answers on a second ring and interrupts once. Only discovery and
//! negotiation go through registers.
//!
//! Three layers, each ignorant of the next:
//!
//! * [`queue`] walks the rings. What a device sees is a request with a readable and a writable part.
//! * [`transport`] is how the driver finds the device, negotiates features and rings the bell.
//! * [`dev`] has the devices, one file each, which implement [`VirtioDevice`] and know no transport.
//!
//! A device runs on an event loop, never on a vCPU thread: the driver's notification arrives there as an eventfd, and
//! so do the device's own host descriptors. Its methods are called one at a time, under a lock.

pub mod dev;
#[cfg(test)]
pub(crate) mod driver;
#[cfg(any(test, fuzzing))]
pub mod hostile;
pub mod queue;
pub mod transport;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::bus::{RestoreError, SavedState};
use crate::irq::IrqLine;
use crate::mem::GuestRam;
use crate::worker::{Interest, Readiness};
use queue::VirtQueue;

/// `VIRTIO_F_INDIRECT_DESC`: a descriptor may point to a table of descriptors (§2.7.7).
pub const F_INDIRECT_DESC: u64 = 1 << 28;
/// `VIRTIO_F_EVENT_IDX`: either side says from which index on it wants to be notified (§2.7.10).
pub const F_EVENT_IDX: u64 = 1 << 29;
/// `VIRTIO_F_VERSION_1`: not a device of before version 1.0 (§6.1).
pub const F_VERSION_1: u64 = 1 << 32;
/// Offered by the transport for every device, in addition to [`VirtioDevice::features`].
pub const TRANSPORT_FEATURES: u64 = F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1;

/// The driver broke the rules of the specification in a way that a device cannot answer. The transport then sets
/// DEVICE_NEEDS_RESET (§2.1.1) and the device does nothing more until it is reset.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Malformed {
    #[error("the available ring says more than the queue holds")]
    Ring,
    #[error("a descriptor chain loops, leaves its table or is cut short")]
    Chain,
    #[error("a descriptor points to memory that the guest does not have")]
    Address,
    #[error("a readable descriptor follows a writable one")]
    Order,
    #[error("a request is too short for its header, or has no place for its answer")]
    Request,
}

/// What a device is given when the driver says DRIVER_OK.
pub struct Activation {
    /// The features that both sides agreed on, the transport's among them.
    pub features: u64,
    pub ram: GuestRam,
    /// One for each of [`VirtioDevice::queue_sizes`]; `None` for those that the driver did not enable.
    pub queues: Vec<Option<VirtQueue>>,
    pub interrupt: Arc<Interrupt>,
}

/// A virtio device, without its transport.
///
/// Methods may be called in any order that a hostile driver can bring about, except that `process` and `ready` are
/// called only between `activate` and `reset`.
pub trait VirtioDevice: Send {
    /// The device's name in traces and messages: `BLK0`, `RNG0`.
    fn name(&self) -> &str;

    /// The device type (§5): 1 is a network card, 2 a block device, …
    fn device_id(&self) -> u32;

    /// The device's own feature bits, 0 to 23 and 50 upwards.
    fn features(&self) -> u64 {
        0
    }

    /// The largest size of each queue, a power of two from 1 to 1024.
    fn queue_sizes(&self) -> &[u16];

    /// Whether the device wants an event loop of its own, on a thread of its own, instead of sharing one with others.
    fn wants_own_worker(&self) -> bool {
        false
    }

    /// Reads the configuration space (§2.5) at a byte offset. Beyond its end, reads give zeroes; `data` is zeroed
    /// when this is called.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let _ = (offset, data);
    }

    /// The driver writes the configuration space.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }

    /// The driver is ready. The device keeps what it is given until `reset`.
    fn activate(&mut self, activation: Activation);

    /// The driver notified queue number `queue`; also called once for each queue right after `activate`.
    ///
    /// # Errors
    /// When the driver broke the rules.
    fn process(&mut self, queue: usize) -> Result<(), Malformed>;

    /// Descriptors of the host that the device waits on, always the same ones. A device whose descriptors come and go
    /// keeps them in an epoll set of its own and gives that.
    fn sources(&self) -> Vec<Arc<OwnedFd>> {
        Vec::new()
    }

    /// What the device waits for on each of `sources` as things stand. Asked after each call to any method.
    fn interests(&self) -> Vec<Interest> {
        Vec::new()
    }

    /// One of `sources` is ready.
    ///
    /// # Errors
    /// When the driver broke the rules.
    fn ready(&mut self, source: usize, readiness: Readiness) -> Result<(), Malformed> {
        let _ = (source, readiness);
        Ok(())
    }

    /// The driver resets the device, which lets go of its queues. When this returns, nothing that is still under way on
    /// the host touches guest memory any more.
    fn reset(&mut self);

    /// The volatile state. May be called only while the device's event loop is quiet and all vCPUs are paused.
    fn save(&self) -> SavedState;

    /// Takes a saved state back, under the same conditions.
    ///
    /// # Errors
    /// When the state was not saved by this version of this device.
    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError>;
}

/// Reads a configuration space at a byte offset, for [`VirtioDevice::read_config`]: `data` keeps what lies beyond its end.
pub fn copy_config(space: impl IntoIterator<Item = u8>, offset: u64, data: &mut [u8]) {
    let offset = usize::try_from(offset).unwrap_or(usize::MAX);
    for (to, from) in data.iter_mut().zip(space.into_iter().skip(offset)) {
        *to = from;
    }
}

/// The interrupt of one device, with the register that says what it is about (§4.2.2, InterruptStatus).
pub struct Interrupt {
    status: AtomicU32,
    generation: AtomicU32,
    line: Arc<dyn IrqLine>,
}

/// `InterruptStatus`: the device used a buffer.
pub const INTERRUPT_USED: u32 = 1 << 0;
/// `InterruptStatus`: the configuration changed, or the device needs a reset.
pub const INTERRUPT_CONFIG: u32 = 1 << 1;

impl Interrupt {
    /// An interrupt that is raised on `line`.
    pub fn new(line: Arc<dyn IrqLine>) -> Interrupt {
        Interrupt {
            status: AtomicU32::new(0),
            generation: AtomicU32::new(0),
            line,
        }
    }

    /// Sets bits of the status and raises the line.
    pub fn raise(&self, bits: u32) {
        self.status.fetch_or(bits, Ordering::SeqCst);
        self.line.trigger();
    }

    /// Tells the driver that the configuration space has changed.
    pub fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.raise(INTERRUPT_CONFIG);
    }

    /// How often the configuration space has changed, by which a driver sees that it read one state of it (§2.5.1).
    pub fn generation(&self) -> u32 {
        self.generation.load(Ordering::SeqCst)
    }

    /// Takes a saved status and generation back.
    pub fn restore(&self, status: u32, generation: u32) {
        self.status.store(status, Ordering::SeqCst);
        self.generation.store(generation, Ordering::SeqCst);
    }

    /// The status register.
    pub fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    /// The driver has seen these bits.
    pub fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }
}
