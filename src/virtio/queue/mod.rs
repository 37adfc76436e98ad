//! Split virtqueues (virtio 1.3 §2.7): the rings, and the chains of descriptors that requests are made of.
//!
//! A queue is three tables in guest RAM. The *descriptor table* lists buffers: address, length, whether the device may
//! write, and which buffer follows. The *available ring* has the heads of the chains that the driver hands over, the
//! *used ring* those that the device hands back, each with the number of bytes written. All three can change at any
//! time under the device's eyes, so a chain is read once, checked whole, and only then shown to the device.
//!
//! The rings themselves are walked by the `virtio-queue` crate. What it leaves open, a chain that simply ends when it is
//! broken, is decided here: such a chain is [`Malformed`]. So is what it lacks: handing several requests back at once.

mod chain;

pub use chain::{Chain, Reader, Writer};

pub use crate::mem::Buffer;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering, fence};

use virtio_queue::{Queue, QueueOwnedT, QueueT};

use super::{INTERRUPT_USED, Interrupt, Malformed};
use crate::mem::{Bytes, GuestAddress, GuestRam};

/// `VIRTQ_AVAIL_F_NO_INTERRUPT`: the driver looks for itself (§2.7.6).
const AVAIL_F_NO_INTERRUPT: u16 = 1;

/// How far a queue has got: the next entries of the available and of the used ring. It is shared with the transport,
/// which saves it.
#[derive(Debug, Default)]
pub struct Position(AtomicU32);

impl Position {
    /// The next available and the next used index.
    pub fn get(&self) -> (u16, u16) {
        let both = self.0.load(Ordering::Acquire);
        (both as u16, (both >> 16) as u16)
    }

    fn set(&self, next_avail: u16, next_used: u16) {
        let both = u32::from(next_avail) | u32::from(next_used) << 16;
        self.0.store(both, Ordering::Release);
    }
}

/// One queue of an activated device.
pub struct VirtQueue {
    queue: Queue,
    position: Arc<Position>,
    ram: GuestRam,
    interrupt: Arc<Interrupt>,
    /// By which the driver notifies the device.
    notifier: Option<Arc<OwnedFd>>,
    /// The used index as it stood when the driver was last thought of.
    told: u16,
}

impl VirtQueue {
    /// A queue that the driver has set up. `queue` lies wholly in `ram`, which the transport has checked; `notifier` is
    /// the eventfd on which the event loop waits for the driver.
    pub fn new(
        queue: Queue,
        ram: GuestRam,
        interrupt: Arc<Interrupt>,
        notifier: Option<Arc<OwnedFd>>,
    ) -> VirtQueue {
        let position = Arc::new(Position::default());
        position.set(queue.next_avail(), queue.next_used());
        VirtQueue {
            told: queue.next_used(),
            queue,
            position,
            ram,
            interrupt,
            notifier,
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

    /// Takes the next request from the available ring. When there is none, the driver has been asked to notify of the
    /// next one.
    ///
    /// # Errors
    /// When the ring or the chain is broken.
    pub fn pop(&mut self) -> Result<Option<Chain>, Malformed> {
        // What the device offers, not what the driver chose of it: some drivers with small rings use longer tables.
        let longest = self.queue.max_size();
        // Twice at most: a driver that takes back what it made available must not keep the device looking.
        // Twice at most: a driver that takes back what it made available must not keep the device looking.
        for _ in 0..2 {
            let mut heads = self.queue.iter(&self.ram).map_err(|_| Malformed::Ring)?;
            if let Some(descriptors) = heads.next() {
                let chain = Chain::collect(&self.ram, descriptors, longest).map(Some);
                self.note_position();
                return chain;
            }
            // A driver that counts by indices (§2.7.10) notifies only of what lies past the one it was told; and what
            // it made available before it was told has to be seen now.
            if !self.enable_notification()? {
                break;
            }
        }
        Ok(None)
    }

    /// Has the event loop call the device for this queue again, after others have had their turn. For a device that stops
    /// before the queue is empty, as each does at some point: a driver may make requests available for ever.
    pub fn call_again(&self) {
        if let Some(notifier) = &self.notifier {
            // Fails only when the counter is at its maximum, and then the loop has been woken already.
            let _ = rustix::io::write(notifier, &1_u64.to_ne_bytes());
        }
    }

    /// Puts the request taken last back, to be popped again.
    pub fn unpop(&mut self) {
        let before = self.queue.next_avail().wrapping_sub(1);
        self.queue.set_next_avail(before);
        self.note_position();
    }

    /// Hands a request back: `written` bytes of its writable part have been filled.
    ///
    /// # Errors
    /// When the used ring is gone from guest memory.
    pub fn push_used(&mut self, head: u16, written: u32) -> Result<(), Malformed> {
        let added = self.queue.add_used(&self.ram, head, written);
        self.note_position();
        added.map_err(|_| Malformed::Ring)
    }

    /// Hands several requests back, each with the bytes written, so that the driver sees all of them or none: the
    /// index of the used ring moves once (§2.7.8.2, and for a frame in several buffers §5.1.6.4.1). There are no more
    /// of them than were popped.
    ///
    /// # Errors
    /// When the used ring is gone from guest memory.
    pub fn push_used_together(&mut self, requests: &[(u16, u32)]) -> Result<(), Malformed> {
        let Some((&(head, written), rest)) = requests.split_last() else {
            return Ok(());
        };
        let mut index = self.queue.next_used();
        for &(head, written) in rest {
            let slot = index.checked_rem(self.queue.size()).unwrap_or(0);
            let at = self.queue.used_ring().checked_add(4 + 8 * u64::from(slot));
            let element = [u32::from(head).to_le(), written.to_le()];
            at.and_then(|at| self.ram.write_obj(element, GuestAddress(at)).ok())
                .ok_or(Malformed::Ring)?;
            index = index.wrapping_add(1);
        }
        self.queue.set_next_used(index);
        self.push_used(head, written)
    }

    /// Interrupts the driver if it wants to know of what was handed back since the last call.
    ///
    /// # Errors
    /// When the rings are gone from guest memory.
    pub fn notify(&mut self) -> Result<(), Malformed> {
        let wanted = self.wants_interrupt()?;
        self.told = self.queue.next_used();
        if wanted {
            self.interrupt.raise(INTERRUPT_USED);
        }
        Ok(())
    }

    /// Whether the driver wants an interrupt for what was handed back since the last [`VirtQueue::notify`]. If
    /// something was, and it wants none, it looks at the used ring itself.
    ///
    /// # Errors
    /// When the rings are gone from guest memory.
    pub fn wants_interrupt(&self) -> Result<bool, Malformed> {
        let new = self.queue.next_used();
        // The used index must be out before the driver's wish is read (§2.7.7.2).
        fence(Ordering::SeqCst);
        let handed_back = new.wrapping_sub(self.told);
        if self.queue.event_idx_enabled() {
            // The driver wants to know when the used index moves past `used_event` (§2.7.10).
            let used_event = self.avail_word(4 + 2 * u64::from(self.queue.size()))?;
            Ok(new.wrapping_sub(used_event).wrapping_sub(1) < handed_back)
        } else {
            Ok(handed_back != 0 && self.avail_word(0)? & AVAIL_F_NO_INTERRUPT == 0)
        }
    }

    /// A word of the available ring: flags, index, `size` heads, `used_event` (§2.7.6).
    fn avail_word(&self, offset: u64) -> Result<u16, Malformed> {
        self.queue
            .avail_ring()
            .checked_add(offset)
            .and_then(|at| self.ram.load(GuestAddress(at), Ordering::Relaxed).ok())
            .map(u16::from_le)
            .ok_or(Malformed::Ring)
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

    /// How far the queue has got, now and later.
    pub fn position(&self) -> Arc<Position> {
        Arc::clone(&self.position)
    }

    fn note_position(&self) {
        let (next_avail, next_used) = (self.queue.next_avail(), self.queue.next_used());
        self.position.set(next_avail, next_used);
    }
}

#[cfg(test)]
mod tests;
