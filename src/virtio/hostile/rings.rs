//! The guest memory of a hostile driver, and what it keeps there: rings, chains and data.
//!
//! ```text
//! 0x0_0000             tables of queue 0: descriptors, 0x4000 available, 0x5000 used
//! 0x0_8000 …           tables of queue 1 and so on
//! 0xf_0000             one table for INDIRECT
//! 0x10_0000            memory for whatever a step names
//! 0x18_0000            buffers of requests as they should be, around and around
//! 0x20_0000            the hole, with the device's registers at 0xd000_0000
//! 0x1_0000_0000        2 MiB more
//! ```

use super::operation::{Anchor, Descriptor, INDIRECT, NEXT, Operation, Place, WRITE};
use crate::mem::{self, Bytes, GuestAddress, GuestRam};

/// Tables of a queue are this far from those of the next.
const STRIDE: u64 = 0x8000;
const AVAILABLE: u64 = 0x4000;
const USED: u64 = 0x5000;
/// Where the device's registers are.
pub(super) const REGISTERS: u64 = 0xd000_0000;
const TABLE: u64 = 0xf_0000;
/// Descriptors in the table for INDIRECT.
const TABLE_LEN: u16 = 0x1000;
const DATA: u64 = 0x10_0000;
const BUFFERS: u64 = 0x18_0000;
const LOW_END: u64 = 0x20_0000;
const HIGH: u64 = 1 << 32;
const HIGH_LEN: u64 = 0x20_0000;

/// A queue as its driver sees it.
pub(super) struct Ring {
    /// The largest size that the device allows.
    pub max: u16,
    /// Descriptors, a power of two unless the driver errs.
    pub size: u16,
    /// Guest physical addresses of descriptors, available and used ring.
    pub tables: [u64; 3],
    next_slot: u16,
    next_available: u16,
    seen: u16,
}

/// All queues of a driver.
pub(super) struct Rings {
    pub ram: GuestRam,
    pub queues: Vec<Ring>,
    next_buffer: u64,
}

/// A buffer: address, length in bytes, flags.
type Piece = (u64, u32, u16);

impl Rings {
    /// Fresh memory, and queues of up to these sizes.
    pub fn new(sizes: &[u16]) -> Rings {
        let ram = mem::allocate(&[(GuestAddress(0), LOW_END), (GuestAddress(HIGH), HIGH_LEN)]);
        let mut rings = Rings {
            ram: ram.expect("8 MiB of address space"),
            queues: Vec::new(),
            next_buffer: BUFFERS,
        };
        for max in sizes {
            rings.queues.push(Ring {
                max: *max,
                size: *max,
                tables: [0; 3],
                next_slot: 0,
                next_available: 0,
                seen: 0,
            });
        }
        rings.lay_out(u8::MAX);
        rings
    }

    /// Puts all tables where they belong, with 2^`log` descriptors or as many as there may be, and empties the rings.
    pub fn lay_out(&mut self, log: u8) {
        for (queue, base) in (0..self.queues.len()).zip((0..).step_by(STRIDE as usize)) {
            let size = 1_u16.checked_shl(log.into()).unwrap_or(u16::MAX);
            let tables = [base, base + AVAILABLE, base + USED];
            self.place(queue, size.min(self.queues[queue].max), tables);
            let size = u64::from(self.queues[queue].size);
            self.poke(tables[1], &vec![0; 6 + 2 * size as usize]);
            self.poke(tables[2], &vec![0; 6 + 8 * size as usize]);
        }
    }

    /// Says where a queue's tables are; what is there stays.
    pub fn place(&mut self, queue: usize, size: u16, tables: [u64; 3]) {
        let ring = &mut self.queues[queue];
        (ring.size, ring.tables) = (size, tables);
        (ring.next_slot, ring.next_available, ring.seen) = (0, 0, 0);
    }

    /// The address of a place, for a queue.
    pub fn address(&self, queue: usize, place: Place) -> u64 {
        let tables = self.queues[queue].tables;
        let from = match place.from {
            Anchor::Zero | Anchor::Top => 0,
            Anchor::Data => DATA,
            Anchor::Table => TABLE,
            Anchor::LowEnd => LOW_END,
            Anchor::Hole => REGISTERS,
            Anchor::High => HIGH,
            Anchor::HighEnd => HIGH + HIGH_LEN,
            Anchor::Descriptors => tables[0],
            Anchor::Available => tables[1],
            Anchor::Used => tables[2],
        };
        from.wrapping_add_signed(place.offset.into())
    }

    /// The queue that a step means.
    pub fn queue(&self, number: u8) -> usize {
        usize::from(number) % self.queues.len()
    }

    /// Writes to memory where there is some.
    fn poke(&self, address: u64, bytes: &[u8]) {
        let _ = self.ram.write_slice(bytes, GuestAddress(address));
    }

    fn describe(&self, table: u64, slot: u16, (address, len, flags): Piece, next: u16) {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.poke(table.wrapping_add(16 * u64::from(slot)), &bytes);
    }

    fn piece(&self, queue: usize, descriptor: &Descriptor) -> Piece {
        let address = self.address(queue, descriptor.at);
        (address, descriptor.len, descriptor.flags)
    }

    fn offer(&mut self, queue: usize, head: u16) {
        let ring = &mut self.queues[queue];
        let available = ring.tables[1];
        let slot = u64::from(ring.next_available % ring.size.max(1));
        ring.next_available = ring.next_available.wrapping_add(1);
        let index = ring.next_available.to_le_bytes();
        self.poke(available.wrapping_add(4 + 2 * slot), &head.to_le_bytes());
        self.poke(available.wrapping_add(2), &index);
    }

    /// Offers a chain of buffers; the result is its head.
    fn chain(&mut self, queue: usize, pieces: &[Piece]) -> u16 {
        let head = self.queues[queue].next_slot;
        for (index, (address, len, flags)) in pieces.iter().enumerate() {
            let ring = &mut self.queues[queue];
            let (table, slot) = (ring.tables[0], ring.next_slot);
            let next = slot.wrapping_add(1) % ring.size.max(1);
            ring.next_slot = next;
            let linked = if index + 1 < pieces.len() { NEXT } else { 0 };
            self.describe(table, slot, (*address, *len, flags | linked), next);
        }
        self.offer(queue, head);
        head
    }

    /// `len` bytes of memory for a buffer.
    fn buffer(&mut self, len: u32) -> u64 {
        if self.next_buffer + u64::from(len) > LOW_END {
            self.next_buffer = BUFFERS;
        }
        let at = self.next_buffer;
        self.next_buffer += u64::from(len);
        at
    }

    /// Offers a request as it should be. The result is its head, and where its writable buffers are.
    pub fn request(
        &mut self,
        queue: usize,
        readable: &[u8],
        writable: &[u32],
    ) -> (u16, Vec<(u64, u32)>) {
        let mut pieces = Vec::new();
        if !readable.is_empty() {
            let len = u32::try_from(readable.len()).expect("a short request");
            let at = self.buffer(len);
            self.poke(at, readable);
            pieces.push((at, len, 0));
        }
        let mut places = Vec::new();
        for len in writable {
            let at = self.buffer(*len);
            places.push((at, *len));
            pieces.push((at, *len, WRITE));
        }
        (self.chain(queue, &pieces), places)
    }

    /// What the device has handed back: head, and the bytes that it says it wrote.
    pub fn used(&mut self, queue: usize) -> Option<(u32, u32)> {
        let ring = &mut self.queues[queue];
        let used = ring.tables[2];
        let index: u16 = self.ram.read_obj(GuestAddress(used + 2)).ok()?;
        if index == ring.seen {
            return None;
        }
        let slot = u64::from(ring.seen % ring.size.max(1));
        ring.seen = ring.seen.wrapping_add(1);
        let [head, len]: [u32; 2] = self.ram.read_obj(GuestAddress(used + 4 + 8 * slot)).ok()?;
        Some((head, len))
    }

    /// Takes a step, if it is one that only writes to memory.
    pub fn apply(&mut self, operation: &Operation) {
        match operation {
            Operation::Describe {
                queue,
                slot,
                descriptor,
            } => {
                let queue = self.queue(*queue);
                let ring = &self.queues[queue];
                let slot = slot % ring.size.max(1);
                let piece = self.piece(queue, descriptor);
                self.describe(ring.tables[0], slot, piece, descriptor.next);
            }
            Operation::DescribeIndirect { slot, descriptor } => {
                let piece = self.piece(0, descriptor);
                self.describe(TABLE, slot % TABLE_LEN, piece, descriptor.next);
            }
            Operation::Offer { queue, head } => self.offer(self.queue(*queue), *head),
            Operation::Skip { queue, by } => {
                let queue = self.queue(*queue);
                let ring = &mut self.queues[queue];
                ring.next_available = ring.next_available.wrapping_add(*by);
                let (at, index) = (ring.tables[1].wrapping_add(2), ring.next_available);
                self.poke(at, &index.to_le_bytes());
            }
            Operation::Suppress {
                queue,
                flags,
                event,
            } => {
                let ring = &self.queues[self.queue(*queue)];
                let behind = 4 + 2 * u64::from(ring.size);
                self.poke(ring.tables[1], &flags.to_le_bytes());
                self.poke(ring.tables[1].wrapping_add(behind), &event.to_le_bytes());
            }
            Operation::Poke { at, bytes } => self.poke(self.address(0, *at), bytes),
            Operation::Chain { queue, descriptors } => {
                let queue = self.queue(*queue);
                let pieces: Vec<Piece> = descriptors
                    .iter()
                    .map(|descriptor| self.piece(queue, descriptor))
                    .collect();
                self.chain(queue, &pieces);
            }
            Operation::Request {
                queue,
                readable,
                writable,
            } => {
                let writable: Vec<u32> = writable.iter().copied().map(u32::from).collect();
                self.request(self.queue(*queue), readable, &writable);
            }
            _ => {}
        }
    }

    /// Reads a chain as the specification describes it, and says what its buffers are: readable and writable ones,
    /// address and length. `None` when it breaks a rule, or has more than `most` descriptors.
    #[allow(clippy::type_complexity)]
    pub fn walk(
        &self,
        queue: usize,
        head: u16,
        most: u16,
    ) -> Option<(Vec<(u64, u32)>, Vec<(u64, u32)>)> {
        let ring = &self.queues[queue];
        let (mut table, mut entries, mut index) = (ring.tables[0], u32::from(ring.size), head);
        let mut indirect = false;
        let mut bytes = 0_u64;
        let (mut readable, mut writable) = (Vec::new(), Vec::new());
        let mut count = 0;
        while count < most {
            if u32::from(index) >= entries {
                return None;
            }
            let at = table.checked_add(16 * u64::from(index))?;
            let at = GuestAddress(at);
            let [address, rest]: [u64; 2] = self.ram.read_obj(at).ok()?;
            let (len, flags, next) = (rest as u32, (rest >> 32) as u16, (rest >> 48) as u16);
            if flags & INDIRECT != 0 {
                if indirect || !len.is_multiple_of(16) || len / 16 > u32::from(u16::MAX) {
                    return None;
                }
                (table, entries, index, indirect) = (address, len / 16, 0, true);
                continue;
            }
            count += 1;
            bytes += u64::from(len);
            if bytes > u64::from(u32::MAX) || (flags & WRITE == 0 && !writable.is_empty()) {
                return None;
            }
            if len > 0 {
                let end = address.checked_add(len.into())?;
                if !(end <= LOW_END || (address >= HIGH && end <= HIGH + HIGH_LEN)) {
                    return None;
                }
                if flags & WRITE == 0 {
                    readable.push((address, len));
                } else {
                    writable.push((address, len));
                }
            }
            if flags & NEXT == 0 {
                return Some((readable, writable));
            }
            index = next;
        }
        None
    }
}

/// Writes something to the tables of one of the first two queues, such as another processor of the guest might at any
/// time. `random` gives numbers below its argument.
#[cfg(test)]
pub(super) fn scribble(ram: &GuestRam, random: &mut impl FnMut(u64) -> u64) {
    let base = random(2) * STRIDE;
    let poke = |offset: u64, bytes: &[u8]| {
        let _ = ram.write_slice(bytes, GuestAddress(base + offset));
    };
    match random(4) {
        0 => {
            let used: u16 = ram.read_obj(GuestAddress(base + USED + 2)).unwrap_or(0);
            let ahead = used.wrapping_add(random(10) as u16);
            poke(AVAILABLE + 2, &ahead.to_le_bytes());
        }
        1 => poke(AVAILABLE + 4 + 2 * random(16), &[random(17) as u8, 0]),
        _ => {
            let address = [DATA, TABLE, base, LOW_END - 0x100][random(4) as usize] + random(0x200);
            let len = [16_u32, 64, 513, u32::MAX][random(4) as usize];
            let mut bytes = address.to_le_bytes().to_vec();
            bytes.extend(len.to_le_bytes());
            bytes.extend([random(8) as u8, 0, random(17) as u8, 0]);
            // Sometimes a whole descriptor, sometimes a part of one.
            let from = random(16) & random(16);
            let table = [0, TABLE - base][random(2) as usize];
            poke(table + 16 * random(16) + from, &bytes[from as usize..]);
        }
    }
}
