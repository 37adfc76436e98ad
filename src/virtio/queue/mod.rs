//! Split virtqueues (virtio 1.3 §2.7): the rings, and the chains of descriptors that requests are made of.
//!
//! A queue is three tables in guest RAM. The *descriptor table* lists buffers: address, length, whether the device may
//! write, and which buffer follows. The *available ring* has the heads of the chains that the driver hands over, the
//! *used ring* those that the device hands back, each with the number of bytes written. All three can change at any
//! time under the device's eyes, so a chain is read once, checked whole, and only then shown to the device.
//!
//! The rings themselves are walked by the `virtio-queue` crate. What it leaves open, a chain that simply ends when it is
//! broken, is decided here: such a chain is [`Malformed`].

mod chain;

pub use chain::{Chain, Reader, Writer};

pub use crate::mem::Buffer;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_queue::{Queue, QueueOwnedT, QueueT};

use super::{INTERRUPT_USED, Interrupt, Malformed};
use crate::mem::GuestRam;

/// One queue of an activated device.
pub struct VirtQueue {
    queue: Queue,
    ram: GuestRam,
    interrupt: Arc<Interrupt>,
}

impl VirtQueue {
    /// A queue that the driver has set up. `queue` lies wholly in `ram`, which the transport has checked.
    pub fn new(queue: Queue, ram: GuestRam, interrupt: Arc<Interrupt>) -> VirtQueue {
        VirtQueue {
            queue,
            ram,
            interrupt,
        }
    }

    /// The memory that chains of this queue point into.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// How many descriptors the queue has.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Takes the next request from the available ring.
    ///
    /// # Errors
    /// When the ring or the chain is broken.
    pub fn pop(&mut self) -> Result<Option<Chain>, Malformed> {
        let mut heads = self.queue.iter(&self.ram).map_err(|_| Malformed::Ring)?;
        let Some(descriptors) = heads.next() else {
            return Ok(None);
        };
        Chain::collect(&self.ram, descriptors).map(Some)
    }

    /// Puts the request taken last back, to be popped again.
    pub fn unpop(&mut self) {
        let before = self.queue.next_avail().wrapping_sub(1);
        self.queue.set_next_avail(before);
    }

    /// Hands a request back: `written` bytes of its writable part have been filled.
    ///
    /// # Errors
    /// When the used ring is gone from guest memory.
    pub fn push_used(&mut self, head: u16, written: u32) -> Result<(), Malformed> {
        self.queue
            .add_used(&self.ram, head, written)
            .map_err(|_| Malformed::Ring)
    }

    /// Interrupts the driver if it wants to know of what was handed back since the last call.
    ///
    /// # Errors
    /// When the rings are gone from guest memory.
    pub fn notify(&mut self) -> Result<(), Malformed> {
        if self
            .queue
            .needs_notification(&self.ram)
            .map_err(|_| Malformed::Ring)?
        {
            self.interrupt.raise(INTERRUPT_USED);
        }
        Ok(())
    }

    /// Asks the driver not to notify while the device is at work on the queue anyway.
    ///
    /// # Errors
    /// When the rings are gone from guest memory.
    pub fn disable_notification(&mut self) -> Result<(), Malformed> {
        self.queue
            .disable_notification(&self.ram)
            .map_err(|_| Malformed::Ring)
    }

    /// Asks the driver to notify again; `true` when requests have come in meanwhile, which must be seen to first.
    ///
    /// # Errors
    /// When the rings are gone from guest memory.
    pub fn enable_notification(&mut self) -> Result<bool, Malformed> {
        self.queue
            .enable_notification(&self.ram)
            .map_err(|_| Malformed::Ring)
    }

    /// Whether requests wait.
    pub fn has_requests(&self) -> bool {
        self.queue
            .avail_idx(&self.ram, Ordering::Acquire)
            .is_ok_and(|index| index.0 != self.queue.next_avail())
    }

    /// The addresses, size and positions, to be saved.
    pub fn state(&self) -> virtio_queue::QueueState {
        self.queue.state()
    }
}

#[cfg(test)]
mod tests;
