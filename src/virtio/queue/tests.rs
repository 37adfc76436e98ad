//! Chains as drivers of all intentions make them.

use std::io::{Read, Write};
use std::sync::Arc;

use virtio_queue::{Queue, QueueT};

use super::*;
use crate::irq::CountingLine;
use crate::mem::{self, Bytes, GuestAddress};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const TABLE: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
const DATA: u64 = 0x10_0000;
const RAM: u64 = 4 << 20;

/// Address, length, flags, next.
type Descriptor = (u64, u32, u16, u16);

fn write_table(ram: &GuestRam, table: u64, descriptors: &[Descriptor]) {
    for (index, (address, len, flags, next)) in (0_u64..).zip(descriptors) {
        let at = table + index * 16;
        ram.write_obj(*address, GuestAddress(at)).unwrap();
        ram.write_obj(*len, GuestAddress(at + 8)).unwrap();
        ram.write_obj(*flags, GuestAddress(at + 12)).unwrap();
        ram.write_obj(*next, GuestAddress(at + 14)).unwrap();
    }
}

/// A queue of 8 with the given table, whose chain at 0 has been made available.
fn queue(descriptors: &[Descriptor]) -> (VirtQueue, Arc<CountingLine>) {
    let ram = mem::allocate(&[(GuestAddress(0), RAM)]).unwrap();
    write_table(&ram, TABLE, descriptors);
    ram.write_obj(1_u16, GuestAddress(AVAIL + 2)).unwrap();
    let mut queue = Queue::new(8).unwrap();
    queue.set_desc_table_address(Some(TABLE as u32), None);
    queue.set_avail_ring_address(Some(AVAIL as u32), None);
    queue.set_used_ring_address(Some(USED as u32), None);
    queue.set_ready(true);
    assert!(queue.is_valid(&ram));
    let line = Arc::new(CountingLine::default());
    let interrupt = Arc::new(Interrupt::new(Arc::clone(&line) as _));
    (VirtQueue::new(queue, ram, interrupt, None), line)
}

#[test]
fn a_request_has_a_readable_and_a_writable_part_and_is_handed_back_with_an_interrupt() {
    let (mut queue, line) = queue(&[
        (DATA, 4, NEXT, 1),
        (DATA + 0x100, 0, NEXT, 2),
        (DATA + 0x200, 4, NEXT, 3),
        (DATA + 0x300, 3, WRITE | NEXT, 4),
        (DATA + 0x400, 3, WRITE, 0),
    ]);
    let ram = queue.ram().clone();
    ram.write_slice(b"abcd", GuestAddress(DATA)).unwrap();
    ram.write_slice(b"efgh", GuestAddress(DATA + 0x200))
        .unwrap();
    let chain = queue.pop().unwrap().unwrap();
    assert_eq!((chain.readable_len(), chain.writable_len()), (8, 6));
    let mut reader = chain.reader(&ram);
    assert_eq!(&reader.array::<6>().unwrap(), b"abcdef");
    assert_eq!(reader.left(), 2);
    assert_eq!(reader.array::<3>(), Err(Malformed::Request));
    let mut writer = chain.writer(&ram);
    writer.write_all(b"12345").unwrap();
    assert_eq!((writer.written(), writer.left()), (5, 1));
    assert!(writer.write_all(b"67").is_err(), "one byte too many");
    let mut bytes = [0; 3];
    ram.read_slice(&mut bytes, GuestAddress(DATA + 0x400))
        .unwrap();
    assert_eq!(&bytes, b"456");
    assert_eq!(queue.pop(), Ok(None));
    queue.push_used(chain.head(), 5).unwrap();
    queue.notify().unwrap();
    assert_eq!(line.edges(), 1);
    assert_eq!(ram.read_obj::<u32>(GuestAddress(USED + 8)).unwrap(), 5);
}

#[test]
fn direct_pieces_cover_the_same_bytes() {
    let (mut queue, _) = queue(&[(DATA, 16, NEXT, 1), (DATA + 0x100, 600, 0, 0)]);
    let ram = queue.ram().clone();
    let chain = queue.pop().unwrap().unwrap();
    let mut reader = chain.reader(&ram);
    reader.read_exact(&mut [0; 10]).unwrap();
    let piece = |address, len| Buffer {
        address: GuestAddress(address),
        len,
    };
    assert_eq!(
        reader.take_buffers(512),
        [piece(DATA + 10, 6), piece(DATA + 0x100, 506)]
    );
    assert_eq!(reader.take_buffers(512), [piece(DATA + 0x100 + 506, 94)]);
    assert!(reader.take_buffers(1).is_empty());
}

#[test]
fn broken_chains_are_malformed_and_never_shown_to_a_device() {
    let cases: &[(&str, &[Descriptor], Malformed)] = &[
        ("a loop of one", &[(DATA, 4, NEXT, 0)], Malformed::Chain),
        (
            "a loop of two",
            &[(DATA, 4, NEXT, 1), (DATA, 4, NEXT, 0)],
            Malformed::Chain,
        ),
        (
            "next out of the table",
            &[(DATA, 4, NEXT, 8)],
            Malformed::Chain,
        ),
        ("past RAM", &[(RAM - 4, 8, 0, 0)], Malformed::Address),
        ("in the hole", &[(0xd000_0000, 8, 0, 0)], Malformed::Address),
        (
            "a length that overflows",
            &[(u64::MAX - 3, 8, 0, 0)],
            Malformed::Address,
        ),
        (
            "lengths that add up past 2^32",
            &[(DATA, 0x1000, NEXT, 1), (DATA, u32::MAX, 0, 0)],
            Malformed::Chain,
        ),
        (
            "readable after writable",
            &[(DATA, 4, WRITE | NEXT, 1), (DATA, 4, 0, 0)],
            Malformed::Order,
        ),
        (
            "an indirect table of odd length",
            &[(DATA, 17, INDIRECT, 0)],
            Malformed::Chain,
        ),
        (
            "an indirect table past RAM",
            &[(RAM - 8, 16, INDIRECT, 0)],
            Malformed::Chain,
        ),
    ];
    for (what, descriptors, expected) in cases {
        let (mut queue, _) = queue(descriptors);
        assert_eq!(queue.pop().as_ref(), Err(expected), "{what}");
    }
}

#[test]
fn an_indirect_table_serves_as_a_chain_but_not_inside_another() {
    let table = DATA + 0x1000;
    let (mut plain, _) = queue(&[(table, 32, INDIRECT, 0)]);
    write_table(
        plain.ram(),
        table,
        &[(DATA, 4, NEXT, 1), (DATA, 8, WRITE, 0)],
    );
    let chain = plain.pop().unwrap().unwrap();
    assert_eq!((chain.readable_len(), chain.writable_len()), (4, 8));

    let (mut nested, _) = queue(&[(table, 16, INDIRECT, 0)]);
    write_table(nested.ram(), table, &[(table, 16, INDIRECT, 0)]);
    assert_eq!(nested.pop(), Err(Malformed::Chain));
}

#[test]
fn a_chain_longer_than_the_queue_is_malformed_wherever_its_table_lies() {
    let table = DATA + 0x1000;
    // The table has room for many more than the queue of 8.
    for (count, whole) in [(8_u16, true), (9, false), (600, false)] {
        let (mut queue, _) = queue(&[(table, 16 * 1000, INDIRECT, 0)]);
        let mut descriptors: Vec<Descriptor> = (1..=count).map(|i| (DATA, 4, NEXT, i)).collect();
        descriptors[usize::from(count) - 1].2 = 0;
        write_table(queue.ram(), table, &descriptors);
        let chain = queue.pop();
        if whole {
            assert_eq!(chain.unwrap().unwrap().readable_len(), 32);
        } else {
            assert_eq!(chain, Err(Malformed::Chain), "{count}");
        }
    }
}

#[test]
fn an_available_index_far_ahead_is_malformed() {
    let (mut queue, _) = queue(&[(DATA, 4, 0, 0)]);
    queue
        .ram()
        .write_obj(100_u16, GuestAddress(AVAIL + 2))
        .unwrap();
    assert_eq!(queue.pop(), Err(Malformed::Ring));
}

#[test]
fn requests_handed_back_together_appear_at_once_and_interrupt_by_the_event_index() {
    let (mut queue, line) = queue(&[(DATA, 4, WRITE, 0), (DATA, 4, WRITE, 0)]);
    let ram = queue.ram().clone();
    let used = |slot: u64| -> [u32; 2] { ram.read_obj(GuestAddress(USED + 4 + slot * 8)).unwrap() };
    queue.push_used_together(&[]).unwrap();
    queue.notify().unwrap();
    assert_eq!(line.edges(), 0, "nothing was handed back");
    queue.push_used_together(&[(0, 4), (1, 3), (2, 2)]).unwrap();
    assert_eq!(ram.read_obj::<u16>(GuestAddress(USED + 2)).unwrap(), 3);
    assert_eq!([used(0), used(1), used(2)], [[0, 4], [1, 3], [2, 2]]);
    queue.notify().unwrap();
    assert_eq!(line.edges(), 1);

    queue.queue.set_event_idx(true);
    let used_event = GuestAddress(AVAIL + 4 + 8 * 2);
    ram.write_obj(6_u16, used_event).unwrap();
    queue.push_used_together(&[(3, 0), (4, 0)]).unwrap();
    queue.notify().unwrap();
    assert_eq!(line.edges(), 1, "the driver asked for later ones");
    queue.push_used_together(&[(5, 0), (6, 0), (7, 0)]).unwrap();
    queue.push_used(0, 9).unwrap();
    assert_eq!(used(0), [0, 9], "the ring wraps");
    queue.notify().unwrap();
    assert_eq!(line.edges(), 2);
}
