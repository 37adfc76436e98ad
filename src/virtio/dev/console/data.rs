//! The data path: bytes between the queues of a port and its channel to the host.
//!
//! The device takes from the driver only what the host has room for. A request that is taken in part is put back on the
//! queue, and only the number of bytes that are done is kept: there is nothing else to save in a snapshot.

use std::io::{Read, Write};

use crate::backend::ByteQueue;
use crate::virtio::Malformed;
use crate::virtio::queue::VirtQueue;

/// Bytes moved in one turn of the event loop, so that a guest that never stops leaves other devices their turns.
const MOST: usize = 1 << 20;
/// Bytes copied at once.
pub(super) const PIECE: usize = 64 << 10;

/// Moves input of the host into the driver's buffers, as far as there are bytes and buffers.
pub(super) fn receive(
    queue: &mut VirtQueue,
    input: &ByteQueue,
    piece: &mut [u8],
) -> Result<(), Malformed> {
    let ram = queue.ram().clone();
    let mut moved = 0_usize;
    for _ in 0..queue.size() {
        if input.is_empty() || moved >= MOST {
            break;
        }
        let Some(chain) = queue.pop()? else {
            return queue.notify();
        };
        let mut writer = chain.writer(&ram);
        while writer.left() > 0 && moved < MOST {
            let len = piece.len().min(writer.left() as usize);
            let (bytes, _) = piece.split_at_mut(len);
            let count = input.drain_into(bytes);
            let bytes = bytes.get(..count).unwrap_or_default();
            // The buffers have been checked to lie in RAM, which does not go away.
            if count == 0 || writer.write_all(bytes).is_err() {
                break;
            }
            moved = moved.saturating_add(count);
        }
        queue.push_used(chain.head(), writer.written())?;
    }
    if !input.is_empty() {
        queue.call_again();
    }
    queue.notify()
}

/// Moves what the driver sends to the host, as far as there is room. `done` counts the bytes of the first request on
/// the queue that have been moved before. `true` when nothing is left on the queue.
pub(super) fn transmit(
    queue: &mut VirtQueue,
    output: &ByteQueue,
    done: &mut u32,
    piece: &mut [u8],
) -> Result<bool, Malformed> {
    let ram = queue.ram().clone();
    let mut moved = 0_usize;
    for _ in 0..queue.size() {
        let Some(chain) = queue.pop()? else {
            queue.notify()?;
            return Ok(true);
        };
        let mut reader = chain.reader(&ram);
        reader.take_buffers(*done);
        while reader.left() > 0 {
            let room = output.room().min(MOST.saturating_sub(moved));
            let len = piece.len().min(reader.left() as usize).min(room);
            if len == 0 {
                queue.unpop();
                if moved >= MOST {
                    queue.call_again();
                }
                queue.notify()?;
                return Ok(false);
            }
            let (bytes, _) = piece.split_at_mut(len);
            // As in `receive`, this does not fail. The serial port may have taken the room meanwhile.
            let mut ahead = reader.clone();
            let taken = match ahead.read_exact(bytes) {
                Ok(()) => output.push_slice(bytes),
                Err(_) => break,
            };
            reader.take_buffers(u32::try_from(taken).unwrap_or(u32::MAX));
            *done = done.saturating_add(u32::try_from(taken).unwrap_or(u32::MAX));
            moved = moved.saturating_add(taken);
        }
        *done = 0;
        queue.push_used(chain.head(), 0)?;
    }
    queue.call_again();
    queue.notify()?;
    Ok(false)
}
