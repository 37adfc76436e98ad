//! virtio devices: registers in memory, and queues.
//!
//! A device made for virtual machines has a window of registers (virtio 1.3 §4.2.2) that are only for finding it and
//! agreeing with it. The work goes through *queues* in memory (§2.7), three tables each: *descriptors* say where
//! buffers are; the *available ring* has the numbers of those that the driver hands over; the *used ring* has those
//! that the device hands back, with the number of bytes that it wrote. Both rings have an index that only ever grows:
//! entry `index % size` is the next to be written, and whoever reads has an index of its own to compare.
//!
//! Each table ends with the *event index* of its reader's wishes (§2.7.10): "notify me when your index goes past this".
//! A device at work moves its wish ahead only when it runs out of requests, so that a busy queue needs no notifications
//! at all; a driver that looks for itself never moves its own, and is not interrupted.

use core::mem::offset_of;
use core::sync::atomic::{Ordering, fence};

/// Registers, §4.2.2.
pub const MAGIC_VALUE: u64 = 0x000;
/// 2 for all devices since virtio 1.0.
pub const VERSION: u64 = 0x004;
/// The type of device, §5; 0 where a window is empty.
pub const DEVICE_ID: u64 = 0x008;
/// 32 of the features that the device has; which, is said by the next register.
pub const DEVICE_FEATURES: u64 = 0x010;
/// 0 for features 0 to 31, 1 for 32 to 63.
pub const DEVICE_FEATURES_SEL: u64 = 0x014;
/// The same for what the driver accepts.
pub const DRIVER_FEATURES: u64 = 0x020;
/// See [`DEVICE_FEATURES_SEL`].
pub const DRIVER_FEATURES_SEL: u64 = 0x024;
/// Which queue the registers from here to [`QUEUE_DEVICE`] are about.
pub const QUEUE_SEL: u64 = 0x030;
/// How many descriptors it may have.
pub const QUEUE_SIZE_MAX: u64 = 0x034;
/// How many it has.
pub const QUEUE_SIZE: u64 = 0x038;
/// 1 when its addresses are in place.
pub const QUEUE_READY: u64 = 0x044;
/// Tells the device to look at a queue.
pub const QUEUE_NOTIFY: u64 = 0x050;
/// Why there was an interrupt.
pub const INTERRUPT_STATUS: u64 = 0x060;
/// The driver has seen it.
pub const INTERRUPT_ACK: u64 = 0x064;
/// How far the two have got: the bits below.
pub const STATUS: u64 = 0x070;
/// Address of the descriptors, in two halves.
pub const QUEUE_DESC: u64 = 0x080;
/// Address of the available ring.
pub const QUEUE_DRIVER: u64 = 0x090;
/// Address of the used ring.
pub const QUEUE_DEVICE: u64 = 0x0a0;
/// From here on, the configuration space, which each type of device has its own of.
pub const CONFIG: u64 = 0x100;

/// Bits of [`STATUS`], §2.1.
const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;

/// "virt"
const MAGIC: u32 = 0x7472_6976;

/// `VIRTIO_F_EVENT_IDX`: there are event indices.
pub const F_EVENT_IDX: u64 = 1 << 29;
/// `VIRTIO_F_VERSION_1`: not a device of before virtio 1.0.
pub const F_VERSION_1: u64 = 1 << 32;

/// The registers of one device, by their guest-physical address, which must be mapped.
#[derive(Clone, Copy)]
pub struct Window(pub u64);

impl Window {
    /// Reads a register.
    pub fn read(self, register: u64) -> u32 {
        // SAFETY: mapped, as whoever made this promised; what lies there are registers, not memory.
        unsafe { ((self.0 + register) as *const u32).read_volatile() }
    }

    /// Writes a register.
    pub fn write(self, register: u64, value: u32) {
        // SAFETY: as above.
        unsafe { ((self.0 + register) as *mut u32).write_volatile(value) }
    }

    /// Whether these are registers of a virtio device at all.
    pub fn is_virtio(self) -> bool {
        self.read(MAGIC_VALUE) == MAGIC && self.read(VERSION) == 2
    }

    /// §3.1.1, steps 1 to 6: resets the device and agrees on features with it, which are those of `wanted` that it has.
    /// `None` when they cannot agree.
    pub fn start(self, wanted: u64) -> Option<u64> {
        self.write(STATUS, 0);
        self.write(STATUS, ACKNOWLEDGE);
        self.write(STATUS, ACKNOWLEDGE | DRIVER);
        let mut features = 0;
        for half in [0, 1] {
            self.write(DEVICE_FEATURES_SEL, half);
            self.write(DRIVER_FEATURES_SEL, half);
            let both = self.read(DEVICE_FEATURES) & (wanted >> (32 * half)) as u32;
            self.write(DRIVER_FEATURES, both);
            features |= u64::from(both) << (32 * half);
        }
        self.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        (features & F_VERSION_1 != 0 && self.read(STATUS) & FEATURES_OK != 0).then_some(features)
    }

    /// Step 7: gives the device a queue. False when it has none of this number and size.
    pub fn set_queue<const SIZE: usize>(self, number: u32, queue: *mut Queue<SIZE>) -> bool {
        self.write(QUEUE_SEL, number);
        if self.read(QUEUE_READY) != 0 || self.read(QUEUE_SIZE_MAX) < SIZE as u32 {
            return false;
        }
        self.write(QUEUE_SIZE, SIZE as u32);
        for (register, table) in [
            (QUEUE_DESC, offset_of!(Queue<SIZE>, descriptors)),
            (QUEUE_DRIVER, offset_of!(Queue<SIZE>, available)),
            (QUEUE_DEVICE, offset_of!(Queue<SIZE>, used)),
        ] {
            let address = queue as u64 + table as u64;
            self.write(register, address as u32);
            self.write(register + 4, (address >> 32) as u32);
        }
        self.write(QUEUE_READY, 1);
        true
    }

    /// Step 8: the device may begin.
    pub fn driver_ok(self) {
        self.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }
}

/// [`Descriptor::flags`]: another buffer of the same request follows.
pub const NEXT: u16 = 1;
/// [`Descriptor::flags`]: the device writes into this buffer, instead of reading it.
pub const WRITE: u16 = 2;

/// §2.7.5: one buffer.
#[repr(C)]
pub struct Descriptor {
    /// Guest-physical.
    pub address: u64,
    /// In bytes.
    pub len: u32,
    /// [`NEXT`] and [`WRITE`].
    pub flags: u16,
    /// The number of the descriptor that follows.
    pub next: u16,
}

/// Flag of the used ring, where there are no event indices: no notifications, please.
const NO_NOTIFY: u16 = 1;
/// Flag of the available ring, likewise: no interrupts, please.
const NO_INTERRUPT: u16 = 1;

/// §2.7.6: what the driver hands over.
#[repr(C, align(2))]
struct Available<const SIZE: usize> {
    flags: u16,
    index: u16,
    ring: [u16; SIZE],
    /// The driver wants an interrupt when the used index goes past this.
    used_event: u16,
}

/// §2.7.8: what the device hands back, number and length.
#[repr(C, align(4))]
struct Used<const SIZE: usize> {
    flags: u16,
    index: u16,
    ring: [[u32; 2]; SIZE],
    /// The device wants a notification when the available index goes past this.
    available_event: u16,
}

/// A queue of `SIZE` descriptors, a power of two. All zeroes are one with nothing in it.
///
/// The device reads and writes it at any time, so it is a `static mut` that is only reached through pointers, by
/// volatile accesses.
#[repr(C, align(16))]
pub struct Queue<const SIZE: usize> {
    descriptors: [Descriptor; SIZE],
    available: Available<SIZE>,
    used: Used<SIZE>,
}

/// The driver's side of a queue.
pub struct Driver<const SIZE: usize> {
    queue: *mut Queue<SIZE>,
    /// As told to the device.
    available: u16,
    /// With what has been put on the ring since.
    next: u16,
    /// As far as it has been looked at.
    used: u16,
    event_index: bool,
}

impl<const SIZE: usize> Driver<SIZE> {
    /// A driver of a queue that has not been used yet. `event_index` says that the device agreed to [`F_EVENT_IDX`].
    ///
    /// # Safety
    /// Nobody else may drive it, and it must be there for ever.
    pub const unsafe fn new(queue: *mut Queue<SIZE>, event_index: bool) -> Driver<SIZE> {
        Driver {
            queue,
            available: 0,
            next: 0,
            used: 0,
            event_index,
        }
    }

    /// Writes a descriptor. The device must not have it.
    pub fn set_descriptor(&mut self, number: u16, descriptor: Descriptor) {
        // SAFETY: the queue is there, and the number stays inside it.
        unsafe {
            (&raw mut (*self.queue).descriptors[number as usize % SIZE]).write_volatile(descriptor)
        }
    }

    /// Hands over the request that begins with descriptor `head`; the device learns of it by [`Driver::publish`].
    pub fn push(&mut self, head: u16) {
        // SAFETY: as above.
        unsafe {
            (&raw mut (*self.queue).available.ring[self.next as usize % SIZE]).write_volatile(head)
        }
        self.next = self.next.wrapping_add(1);
    }

    /// Shows the device all that has been pushed. True when it wants to be notified of that.
    pub fn publish(&mut self) -> bool {
        let before = self.available;
        self.available = self.next;
        // What was written must be seen before the index, and the index before we look at the device's wish (§2.7.13).
        fence(Ordering::Release);
        // SAFETY: the queue is there.
        let (event, flags) = unsafe {
            (&raw mut (*self.queue).available.index).write_volatile(self.available);
            fence(Ordering::SeqCst);
            (
                (&raw const (*self.queue).used.available_event).read_volatile(),
                (&raw const (*self.queue).used.flags).read_volatile(),
            )
        };
        let new = self.available.wrapping_sub(before);
        if self.event_index {
            // Whether the index went past the event, however often both have wrapped (§2.7.10.1).
            self.available.wrapping_sub(event).wrapping_sub(1) < new
        } else {
            new > 0 && flags & NO_NOTIFY == 0
        }
    }

    /// The request that the device handed back next, by its first descriptor, and how many bytes it wrote.
    pub fn pop(&mut self) -> Option<(u16, u32)> {
        // SAFETY: the queue is there.
        unsafe {
            if (&raw const (*self.queue).used.index).read_volatile() == self.used {
                return None;
            }
            // The index is seen before what it counts.
            fence(Ordering::Acquire);
            let slot = self.used as usize % SIZE;
            let [head, len] = (&raw const (*self.queue).used.ring[slot]).read_volatile();
            self.used = self.used.wrapping_add(1);
            Some((head as u16, len))
        }
    }

    /// The driver looks for itself: it wants no interrupts. (By event index, this puts the next one 65536 requests away.)
    pub fn want_no_interrupts(&mut self) {
        // SAFETY: the queue is there.
        unsafe {
            if self.event_index {
                let behind = self.used.wrapping_sub(1);
                (&raw mut (*self.queue).available.used_event).write_volatile(behind);
            } else {
                (&raw mut (*self.queue).available.flags).write_volatile(NO_INTERRUPT);
            }
        }
    }
}
