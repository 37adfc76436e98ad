//! One request: the buffers of a descriptor chain, checked, and readers and writers that move bytes through them.

use std::io;

use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress};

use crate::mem::{Buffer, GuestRam};
use crate::virtio::Malformed;

/// A request that a driver has made available. Its buffers lie wholly inside one region of RAM each; buffers of length
/// zero are left out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chain {
    head: u16,
    readable: Vec<Buffer>,
    writable: Vec<Buffer>,
}

impl Chain {
    /// Reads a chain to its end and checks it: it ends (no loop, §2.7.5.2), stays in its table and in RAM, is at most
    /// 2^32 - 1 bytes and `most` descriptors long, and has its readable buffers before its writable ones (§2.7.4.2).
    ///
    /// A table of its own could hold 65535 descriptors, which would take as many reads of guest memory for one request.
    /// But no chain may be longer than the queue (§2.7.5.3.1).
    pub(super) fn collect(
        ram: &GuestRam,
        mut descriptors: DescriptorChain<&GuestRam>,
        most: u16,
    ) -> Result<Chain, Malformed> {
        let mut chain = Chain {
            head: descriptors.head_index(),
            ..Chain::default()
        };
        let mut complete = false;
        for descriptor in descriptors.by_ref().take(most.into()) {
            complete = !descriptor.has_next();
            let buffer = Buffer {
                address: descriptor.addr(),
                len: descriptor.len(),
            };
            if !descriptor.is_write_only() && !chain.writable.is_empty() {
                return Err(Malformed::Order);
            }
            if buffer.len == 0 {
                continue;
            }
            if !buffer.is_in(ram) {
                return Err(Malformed::Address);
            }
            if descriptor.is_write_only() {
                chain.writable.push(buffer);
            } else {
                chain.readable.push(buffer);
            }
        }
        // The iterator stops in silence where a chain is broken or too long; then the last descriptor promised another.
        if complete {
            Ok(chain)
        } else {
            Err(Malformed::Chain)
        }
    }

    /// Index of the first descriptor, by which the driver knows the request.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// The buffers that the device reads, in order.
    pub fn readable(&self) -> &[Buffer] {
        &self.readable
    }

    /// The buffers that the device writes, in order.
    pub fn writable(&self) -> &[Buffer] {
        &self.writable
    }

    /// Bytes to read.
    pub fn readable_len(&self) -> u32 {
        total(&self.readable)
    }

    /// Bytes that can be written.
    pub fn writable_len(&self) -> u32 {
        total(&self.writable)
    }

    /// Reads the readable part from its start.
    pub fn reader<'a>(&'a self, ram: &'a GuestRam) -> Reader<'a> {
        Reader(Cursor::new(ram, &self.readable))
    }

    /// Writes the writable part from its start.
    pub fn writer<'a>(&'a self, ram: &'a GuestRam) -> Writer<'a> {
        Writer(Cursor::new(ram, &self.writable))
    }
}

/// The iterator of the crate never yields more than 2^32 - 1 bytes, so the sum saturates only in theory.
fn total(buffers: &[Buffer]) -> u32 {
    buffers
        .iter()
        .fold(0, |sum: u32, buffer| sum.saturating_add(buffer.len))
}

/// The part of a list of buffers that is still to come.
#[derive(Clone)]
struct Cursor<'a> {
    ram: &'a GuestRam,
    buffers: &'a [Buffer],
    /// Bytes of the first buffer that are done.
    done: u32,
    /// Bytes done altogether.
    moved: u32,
}

impl<'a> Cursor<'a> {
    fn new(ram: &'a GuestRam, buffers: &'a [Buffer]) -> Cursor<'a> {
        Cursor {
            ram,
            buffers,
            done: 0,
            moved: 0,
        }
    }

    fn left(&self) -> u32 {
        total(self.buffers).saturating_sub(self.done)
    }

    /// The next piece, at most `most` bytes long.
    fn piece(&self, most: usize) -> Option<Buffer> {
        let first = self.buffers.first()?;
        let len = first.len.saturating_sub(self.done);
        Some(Buffer {
            address: GuestAddress(first.address.0.saturating_add(self.done.into())),
            len: len.min(u32::try_from(most).unwrap_or(u32::MAX)),
        })
    }

    fn advance(&mut self, len: u32) {
        self.moved = self.moved.saturating_add(len);
        self.done = self.done.saturating_add(len);
        if let Some((first, rest)) = self.buffers.split_first()
            && self.done >= first.len
        {
            (self.buffers, self.done) = (rest, 0);
        }
    }

    /// The next `len` bytes, or what there is of them, as pieces of guest memory.
    fn take(&mut self, len: u32) -> Vec<Buffer> {
        let mut pieces = Vec::new();
        let mut left = len;
        while left > 0 {
            let Some(piece) = self.piece(left as usize) else {
                break;
            };
            self.advance(piece.len);
            left -= piece.len;
            pieces.push(piece);
        }
        pieces
    }
}

fn gone(_: vm_memory::GuestMemoryError) -> io::Error {
    io::ErrorKind::InvalidInput.into()
}

/// Reads a request's readable part; see [`io::Read`]. At its end, reads give 0.
#[derive(Clone)]
pub struct Reader<'a>(Cursor<'a>);

impl Reader<'_> {
    /// Bytes still to be read.
    pub fn left(&self) -> u32 {
        self.0.left()
    }

    /// Reads exactly `N` bytes, such as a header.
    ///
    /// # Errors
    /// When the request is shorter.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let mut bytes = [0; N];
        io::Read::read_exact(self, &mut bytes).map_err(|_| Malformed::Request)?;
        Ok(bytes)
    }

    /// The next `len` bytes, or what there is of them, as pieces of guest memory to read from directly.
    pub fn take_buffers(&mut self, len: u32) -> Vec<Buffer> {
        self.0.take(len)
    }
}

impl io::Read for Reader<'_> {
    fn read(&mut self, data: &mut [u8]) -> io::Result<usize> {
        let Some(piece) = self.0.piece(data.len()) else {
            return Ok(0);
        };
        let (data, _) = data.split_at_mut(piece.len as usize);
        self.0.ram.read_slice(data, piece.address).map_err(gone)?;
        self.0.advance(piece.len);
        Ok(data.len())
    }
}

/// Writes a request's writable part; see [`io::Write`]. At its end, writes give 0.
#[derive(Clone)]
pub struct Writer<'a>(Cursor<'a>);

impl Writer<'_> {
    /// Bytes that can still be written.
    pub fn left(&self) -> u32 {
        self.0.left()
    }

    /// Bytes written so far, for the used ring.
    pub fn written(&self) -> u32 {
        self.0.moved
    }

    /// The next `len` bytes, or what there is of them, as pieces of guest memory to write to directly. They count as
    /// written.
    pub fn take_buffers(&mut self, len: u32) -> Vec<Buffer> {
        self.0.take(len)
    }
}

impl io::Write for Writer<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let Some(piece) = self.0.piece(data.len()) else {
            return Ok(0);
        };
        let (data, _) = data.split_at(piece.len as usize);
        self.0.ram.write_slice(data, piece.address).map_err(gone)?;
        self.0.advance(piece.len);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
