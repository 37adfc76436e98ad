//! The queue walker alone: whatever lies in a queue's tables, it finds what the specification says.
//!
//! The steps write tables and rings; at each [`Operation::Turn`] the queue is emptied, and each request compared with
//! what [`Rings::walk`] makes of it. The first byte says how large the queue is, and whether its sides count by
//! indices.

use std::io::{Read, Write};
use std::sync::Arc;

use virtio_queue::{Queue, QueueState};

use super::STEPS_MAX;
use super::operation::{self, Operation};
use super::rings::Rings;
use crate::irq::CountingLine;
use crate::mem::{Buffer, Bytes, GuestAddress};
use crate::virtio::queue::{Chain, Reader, VirtQueue, Writer};
use crate::virtio::{Interrupt, Malformed};

/// The largest size of the queue: so small that short inputs get past it.
pub const MAX: u16 = 16;
/// At most so many bytes of a request are moved.
const MOVED_MAX: u64 = 0x1_0000;

/// Walks a queue that `bytes` describe.
///
/// # Panics
/// When the walker finds something else than there is.
pub fn walk(bytes: &[u8]) {
    let (first, steps) = bytes.split_first().unwrap_or((&0, &[]));
    let mut rings = Rings::new(&[MAX]);
    rings.lay_out(first % 5);
    let mut queue = make(&rings, first & 0x80 != 0);
    let mut next = 0_u16;
    for step in operation::decode(steps).take(STEPS_MAX) {
        match step {
            Operation::Turn => {
                if empty(&rings, &mut queue, &mut next).is_err() {
                    // What a device does then: it lets go, and starts anew.
                    rings.lay_out(first % 5);
                    (queue, next) = (make(&rings, first & 0x80 != 0), 0);
                }
            }
            step => rings.apply(&step),
        }
    }
}

fn make(rings: &Rings, by_index: bool) -> VirtQueue {
    let ring = &rings.queues[0];
    let queue = Queue::try_from(QueueState {
        max_size: MAX,
        next_avail: 0,
        next_used: 0,
        event_idx_enabled: by_index,
        size: ring.size,
        ready: true,
        desc_table: ring.tables[0],
        avail_ring: ring.tables[1],
        used_ring: ring.tables[2],
    });
    let line = Arc::new(CountingLine::default());
    let interrupt = Arc::new(Interrupt::new(line));
    VirtQueue::new(queue.expect("valid"), rings.ram.clone(), interrupt, None)
}

/// Takes all requests out of the queue, as a device does.
fn empty(rings: &Rings, queue: &mut VirtQueue, next: &mut u16) -> Result<(), Malformed> {
    let size = queue.size();
    for _ in 0..size {
        let available = rings.queues[0].tables[1];
        let read = |offset: u64| -> u16 {
            let word = rings.ram.read_obj(GuestAddress(available + offset));
            word.expect("the ring lies in RAM")
        };
        let waiting = read(2).wrapping_sub(*next);
        let head = read(4 + 2 * u64::from(*next % size));
        let expected = rings.walk(0, head, MAX);
        let chain = match queue.pop() {
            Ok(None) => {
                assert_eq!(waiting, 0);
                break;
            }
            Err(Malformed::Ring) => {
                assert!(waiting > size, "{waiting} requests");
                return Err(Malformed::Ring);
            }
            Err(broken) => {
                assert_eq!(expected, None, "{broken}");
                return Err(broken);
            }
            Ok(Some(chain)) => chain,
        };
        assert!((1..=size).contains(&waiting), "{waiting} requests");
        assert_eq!(chain.head(), head);
        let buffers = |buffers: &[Buffer]| -> Vec<(u64, u32)> {
            buffers
                .iter()
                .map(|buffer| (buffer.address.0, buffer.len))
                .collect()
        };
        let found = (buffers(chain.readable()), buffers(chain.writable()));
        assert_eq!(Some(&found), expected.as_ref());

        queue.unpop();
        // Same memory, same request.
        assert_eq!(queue.pop().as_ref(), Ok(&Some(chain.clone())));
        *next = next.wrapping_add(1);
        let written = move_bytes(rings, &chain);
        queue.push_used(chain.head(), written)?;
    }
    queue.notify()
}

/// Reads and writes a request's buffers; the result is how many bytes were written.
fn move_bytes(rings: &Rings, chain: &Chain) -> u32 {
    let ram = &rings.ram;
    let total =
        |buffers: &[Buffer]| -> u64 { buffers.iter().map(|buffer| u64::from(buffer.len)).sum() };
    let readable = total(chain.readable());
    assert_eq!(u64::from(chain.readable_len()), readable);
    let mut reader: Reader<'_> = chain.reader(ram);
    let mut bytes = Vec::new();
    let read = reader.by_ref().take(MOVED_MAX).read_to_end(&mut bytes);
    assert_eq!(read.ok(), Some(readable.min(MOVED_MAX) as usize));
    assert_eq!(u64::from(reader.left()), readable - bytes.len() as u64);
    assert_eq!(
        total(&reader.take_buffers(u32::MAX)),
        readable - bytes.len() as u64
    );
    let mut left = bytes.as_slice();
    for buffer in chain.readable() {
        let mut piece = vec![0; left.len().min(buffer.len as usize)];
        ram.read_slice(&mut piece, buffer.address).expect("checked");
        let (now, later) = left.split_at(piece.len());
        assert_eq!(now, piece);
        left = later;
    }

    let writable = total(chain.writable());
    let mut writer: Writer<'_> = chain.writer(ram);
    let bytes = vec![0x5a; writable.min(MOVED_MAX) as usize];
    writer.write_all(&bytes).expect("there is room");
    assert_eq!(u64::from(writer.written()), bytes.len() as u64);
    let rest = total(&writer.take_buffers(u32::MAX));
    assert_eq!(rest, writable - bytes.len() as u64);
    assert_eq!(writer.left(), 0);
    assert!(writer.write_all(&[1]).is_err(), "one byte too many");
    bytes.len() as u32
}
