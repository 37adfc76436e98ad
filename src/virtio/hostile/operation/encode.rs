//! Writes steps as the bytes from which they are read: for seeds, and to shrink what chance found.

use super::*;

fn list<T>(bytes: &mut Vec<u8>, list: &[T], element: impl Fn(&mut Vec<u8>, &T)) {
    bytes.push(u8::try_from(list.len()).expect("a short list"));
    list.iter().for_each(|item| element(bytes, item));
}

fn place(bytes: &mut Vec<u8>, place: &Place) {
    let from = ANCHORS.iter().position(|anchor| *anchor == place.from);
    bytes.push(from.expect("all are listed") as u8);
    bytes.extend(place.offset.to_le_bytes());
}

fn descriptor(bytes: &mut Vec<u8>, descriptor: &Descriptor) {
    place(bytes, &descriptor.at);
    bytes.extend(descriptor.len.to_le_bytes());
    bytes.extend(descriptor.flags.to_le_bytes());
    bytes.extend(descriptor.next.to_le_bytes());
}

fn operation(bytes: &mut Vec<u8>, operation: &Operation) {
    match operation {
        Operation::Start { features, log } => {
            bytes.push(0);
            bytes.extend(features.to_le_bytes());
            bytes.push(*log);
        }
        Operation::StartAt {
            queue,
            size,
            tables,
        } => {
            bytes.extend([1, *queue]);
            bytes.extend(size.to_le_bytes());
            tables.iter().for_each(|table| place(bytes, table));
        }
        Operation::Reset => bytes.push(2),
        Operation::Read { at, width } => {
            bytes.push(3);
            bytes.extend(at.to_le_bytes());
            bytes.push(*width);
        }
        Operation::Write { at, width, value } => {
            bytes.push(4);
            bytes.extend(at.to_le_bytes());
            bytes.push(*width);
            bytes.extend(value.to_le_bytes());
        }
        Operation::Describe {
            queue,
            slot,
            descriptor: written,
        } => {
            bytes.extend([5, *queue]);
            bytes.extend(slot.to_le_bytes());
            descriptor(bytes, written);
        }
        Operation::DescribeIndirect {
            slot,
            descriptor: written,
        } => {
            bytes.push(6);
            bytes.extend(slot.to_le_bytes());
            descriptor(bytes, written);
        }
        Operation::Offer { queue, head } => {
            bytes.extend([7, *queue]);
            bytes.extend(head.to_le_bytes());
        }
        Operation::Skip { queue, by } => {
            bytes.extend([8, *queue]);
            bytes.extend(by.to_le_bytes());
        }
        Operation::Suppress {
            queue,
            flags,
            event,
        } => {
            bytes.extend([9, *queue]);
            bytes.extend(flags.to_le_bytes());
            bytes.extend(event.to_le_bytes());
        }
        Operation::Poke { at, bytes: poked } => {
            bytes.push(10);
            place(bytes, at);
            list(bytes, poked, |bytes, byte| bytes.push(*byte));
        }
        Operation::Chain { queue, descriptors } => {
            bytes.extend([11, *queue]);
            list(bytes, descriptors, descriptor);
        }
        Operation::Request {
            queue,
            readable,
            writable,
        } => {
            bytes.extend([12, *queue]);
            list(bytes, readable, |bytes, byte| bytes.push(*byte));
            list(bytes, writable, |bytes, len| {
                bytes.extend(len.to_le_bytes());
            });
        }
        Operation::Notify { queue } => {
            bytes.push(13);
            bytes.extend(queue.to_le_bytes());
        }
        Operation::Turn => bytes.push(14),
        Operation::Host { bytes: given } => {
            bytes.push(15);
            list(bytes, given, |bytes, byte| bytes.push(*byte));
        }
        Operation::SaveAndRestore => bytes.push(16),
    }
}

/// Bytes that stand for these steps.
pub(in crate::virtio::hostile) fn encode(operations: &[Operation]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for step in operations {
        operation(&mut bytes, step);
    }
    bytes
}
