//! The other side, for tests of devices: a driver with rings of its own in a small guest's RAM.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};
use virtio_queue::{Queue, QueueT};

use super::queue::VirtQueue;
use super::{Activation, Interrupt, VirtioDevice};
use crate::irq::CountingLine;
use crate::mem::{self, Bytes, GuestAddress, GuestRam};

/// Each queue has this many descriptors here, or fewer if the device allows fewer.
const SIZE: u16 = 64;
/// A queue's tables start at its number times this: descriptors, then at 0x1000 and 0x2000 the rings.
const STRIDE: u64 = 0x4000;
/// Buffers are laid out from here on, one after the other.
const DATA: u64 = 0x10_0000;
const RAM: u64 = 32 << 20;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

#[derive(Default)]
struct Ring {
    size: u16,
    next_descriptor: u16,
    next_avail: u16,
    next_used: u16,
}

/// A request that the device has handed back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Used {
    pub head: u16,
    /// How many bytes the device says it wrote.
    pub len: u32,
}

/// A driver whose device is active.
pub struct Driver {
    pub ram: GuestRam,
    pub line: Arc<CountingLine>,
    /// By queue, where the device asks to be called again.
    notifiers: Vec<Arc<OwnedFd>>,
    rings: Vec<Ring>,
    next_data: u64,
    /// By queue and head: where the writable part lies, piece by piece.
    writable: std::collections::BTreeMap<(usize, u16), Vec<(u64, u32)>>,
}

impl Driver {
    /// Sets up all queues of `device` and activates it with `features`.
    pub fn start(device: &mut dyn VirtioDevice, features: u64) -> Driver {
        let ram = mem::allocate(&[(GuestAddress(0), RAM)]).unwrap();
        let line = Arc::new(CountingLine::default());
        let interrupt = Arc::new(Interrupt::new(Arc::clone(&line) as _));
        let (mut rings, mut notifiers) = (Vec::new(), Vec::new());
        let mut queues = Vec::new();
        for (index, max) in (0_u64..).zip(device.queue_sizes()) {
            let size = SIZE.min(*max);
            let at = (index * STRIDE) as u32;
            let mut queue = Queue::new(*max).unwrap();
            queue.set_size(size);
            queue.set_desc_table_address(Some(at), Some(0));
            queue.set_avail_ring_address(Some(at + 0x1000), Some(0));
            queue.set_used_ring_address(Some(at + 0x2000), Some(0));
            queue.set_event_idx(features & super::F_EVENT_IDX != 0);
            queue.set_ready(true);
            assert!(queue.is_valid(&ram));
            let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
            let notifier = Arc::new(eventfd(0, flags).unwrap());
            queues.push(Some(VirtQueue::new(
                queue,
                ram.clone(),
                Arc::clone(&interrupt),
                Some(Arc::clone(&notifier)),
            )));
            notifiers.push(notifier);
            rings.push(Ring {
                size,
                ..Ring::default()
            });
        }
        device.activate(Activation {
            features,
            ram: ram.clone(),
            queues,
            interrupt,
        });
        Driver {
            ram,
            line,
            notifiers,
            rings,
            next_data: DATA,
            writable: Default::default(),
        }
    }

    /// Makes a request available, with one descriptor for each readable piece and one for each writable length. The
    /// result is its head. The device is not notified; that is [`VirtioDevice::process`].
    pub fn send(&mut self, queue: usize, readable: &[&[u8]], writable: &[u32]) -> u16 {
        let mut pieces = Vec::new();
        for bytes in readable {
            let at = self.place(bytes.len() as u64);
            self.ram.write_slice(bytes, GuestAddress(at)).unwrap();
            pieces.push((at, bytes.len() as u32, 0));
        }
        let mut places = Vec::new();
        for len in writable {
            let at = self.place(u64::from(*len));
            places.push((at, *len));
            pieces.push((at, *len, WRITE));
        }
        let head = self.send_raw(queue, &pieces);
        self.writable.insert((queue, head), places);
        head
    }

    /// Makes a chain of any addresses, lengths and flags (`NEXT` is set by itself) available.
    pub fn send_raw(&mut self, queue: usize, pieces: &[(u64, u32, u16)]) -> u16 {
        let base = queue as u64 * STRIDE;
        let ring = &mut self.rings[queue];
        let head = ring.next_descriptor;
        for (index, (address, len, flags)) in pieces.iter().enumerate() {
            let slot = ring.next_descriptor;
            ring.next_descriptor = (slot + 1) % ring.size;
            let last = index + 1 == pieces.len();
            let flags = if last { *flags } else { flags | NEXT };
            let at = base + u64::from(slot) * 16;
            self.ram.write_obj(*address, GuestAddress(at)).unwrap();
            self.ram.write_obj(*len, GuestAddress(at + 8)).unwrap();
            self.ram.write_obj(flags, GuestAddress(at + 12)).unwrap();
            self.ram
                .write_obj(ring.next_descriptor, GuestAddress(at + 14))
                .unwrap();
        }
        let avail = base + 0x1000;
        let slot = u64::from(ring.next_avail % ring.size);
        self.ram
            .write_obj(head, GuestAddress(avail + 4 + slot * 2))
            .unwrap();
        ring.next_avail = ring.next_avail.wrapping_add(1);
        self.ram
            .write_obj(ring.next_avail, GuestAddress(avail + 2))
            .unwrap();
        head
    }

    /// The next request that the device has handed back.
    pub fn used(&mut self, queue: usize) -> Option<Used> {
        let used = queue as u64 * STRIDE + 0x2000;
        let ring = &mut self.rings[queue];
        let index: u16 = self.ram.read_obj(GuestAddress(used + 2)).unwrap();
        if index == ring.next_used {
            return None;
        }
        let at = used + 4 + u64::from(ring.next_used % ring.size) * 8;
        ring.next_used = ring.next_used.wrapping_add(1);
        let head: u32 = self.ram.read_obj(GuestAddress(at)).unwrap();
        Some(Used {
            head: head as u16,
            len: self.ram.read_obj(GuestAddress(at + 4)).unwrap(),
        })
    }

    /// Whether the device has asked to be called again for a queue, since this was asked last.
    pub fn wants_another_call(&self, queue: usize) -> bool {
        rustix::io::read(&self.notifiers[queue], &mut [0; 8]).is_ok()
    }

    /// All bytes of a request's writable part as they stand.
    pub fn written(&self, queue: usize, head: u16) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (at, len) in &self.writable[&(queue, head)] {
            let mut piece = vec![0; *len as usize];
            self.ram.read_slice(&mut piece, GuestAddress(*at)).unwrap();
            bytes.extend(piece);
        }
        bytes
    }

    fn place(&mut self, len: u64) -> u64 {
        let at = self.next_data;
        self.next_data += len.next_multiple_of(64);
        assert!(self.next_data <= RAM, "the test needs more RAM");
        at
    }
}
