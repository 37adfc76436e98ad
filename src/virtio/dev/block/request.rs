//! What a request of the driver asks for (virtio 1.3 §5.2.6).
//!
//! A request is one descriptor chain. Its readable part begins with a header of 16 bytes, the type and the sector;
//! what is to be written to the disk follows. Its writable part has room for what is read from the disk, and at its very
//! end one byte for the status. Where one descriptor ends and the next begins means nothing (§2.7.4.3).

use crate::backend::disk::{Operation, SECTOR};
use crate::mem::{Buffer, GuestAddress, GuestRam};
use crate::virtio::Malformed;
use crate::virtio::queue::Chain;

/// `VIRTIO_BLK_T_IN`: read from the disk.
const T_IN: u32 = 0;
/// `VIRTIO_BLK_T_OUT`: write to the disk.
const T_OUT: u32 = 1;
/// `VIRTIO_BLK_T_FLUSH`: make earlier writes last.
const T_FLUSH: u32 = 4;
/// `VIRTIO_BLK_T_GET_ID`: read the serial number.
const T_GET_ID: u32 = 8;
/// `VIRTIO_BLK_T_DISCARD`: a range is not needed any more.
const T_DISCARD: u32 = 11;
/// `VIRTIO_BLK_T_WRITE_ZEROES`: a range shall read as zeroes.
const T_WRITE_ZEROES: u32 = 13;

/// Flag of a write-zeroes segment: its space may be given back.
const FLAG_UNMAP: u32 = 1;

/// Sectors that one DISCARD may name: 2 GiB.
pub(super) const DISCARD_SECTORS_MAX: u32 = 1 << 22;
/// Sectors that one WRITE_ZEROES may name: 128 MiB, as they may have to be written one by one.
pub(super) const WRITE_ZEROES_SECTORS_MAX: u32 = 1 << 18;

/// The status byte that ends a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    /// `VIRTIO_BLK_S_OK`
    Ok = 0,
    /// `VIRTIO_BLK_S_IOERR`
    IoErr = 1,
    /// `VIRTIO_BLK_S_UNSUPP`
    Unsupp = 2,
}

/// What the device has to do for a request.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Work {
    /// An operation on the disk.
    Host(Operation),
    /// Copy the serial number to these buffers.
    GetId(Vec<Buffer>),
    /// Nothing: the answer is known.
    Answer(Status),
}

/// A request that has a header and a place for its status.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub status: GuestAddress,
    pub work: Work,
}

/// The disk as the driver knows it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    /// Bytes.
    pub capacity: u64,
    pub read_only: bool,
    /// Whether the driver accepted DISCARD.
    pub discard: bool,
    /// Whether the driver accepted WRITE_ZEROES.
    pub write_zeroes: bool,
}

impl Request {
    /// Reads a request out of guest memory, once.
    ///
    /// # Errors
    /// When there is no whole header, or no place for the status.
    pub fn parse(chain: &Chain, ram: &GuestRam, shape: Shape) -> Result<Request, Malformed> {
        let mut reader = chain.reader(ram);
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = reader.array::<16>()?;
        let kind = u32::from_le_bytes([t0, t1, t2, t3]);
        let sector = u64::from_le_bytes(sector);
        let mut writer = chain.writer(ram);
        let room = chain
            .writable_len()
            .checked_sub(1)
            .ok_or(Malformed::Request)?;
        let into = writer.take_buffers(room);
        let status = writer
            .take_buffers(1)
            .first()
            .ok_or(Malformed::Request)?
            .address;
        let work = match kind {
            T_IN => move_data(sector, room, shape, |offset| Operation::Read {
                offset,
                buffers: into,
            }),
            T_OUT if shape.read_only => Work::Answer(Status::IoErr),
            T_OUT => {
                let len = reader.left();
                move_data(sector, len, shape, |offset| Operation::Write {
                    offset,
                    buffers: reader.take_buffers(len),
                })
            }
            // Nothing can have been written.
            T_FLUSH if shape.read_only => Work::Answer(Status::Ok),
            T_FLUSH => Work::Host(Operation::Flush),
            T_GET_ID => Work::GetId(into),
            T_DISCARD if shape.discard => {
                // One segment, which is all that the configuration space allows.
                if reader.left() != 16 {
                    return Ok(Request {
                        status,
                        work: Work::Answer(Status::IoErr),
                    });
                }
                discard(reader.array()?, shape)
            }
            T_WRITE_ZEROES if shape.write_zeroes => {
                if reader.left() != 16 {
                    return Ok(Request {
                        status,
                        work: Work::Answer(Status::IoErr),
                    });
                }
                write_zeroes(reader.array()?, shape)
            }
            _ => Work::Answer(Status::Unsupp),
        };
        Ok(Request { status, work })
    }
}

/// The place on the disk of `len` bytes from `sector` on, if it has one.
fn place(sector: u64, len: u64, capacity: u64) -> Option<u64> {
    let offset = sector.checked_mul(SECTOR.into())?;
    let end = offset.checked_add(len)?;
    (len.is_multiple_of(SECTOR.into()) && end <= capacity).then_some(offset)
}

fn move_data(
    sector: u64,
    len: u32,
    shape: Shape,
    operation: impl FnOnce(u64) -> Operation,
) -> Work {
    match place(sector, len.into(), shape.capacity) {
        None => Work::Answer(Status::IoErr),
        Some(_) if len == 0 => Work::Answer(Status::Ok),
        Some(offset) => Work::Host(operation(offset)),
    }
}

/// `struct virtio_blk_discard_write_zeroes`: sector, number of sectors, flags.
struct Segment {
    sector: u64,
    sectors: u32,
    flags: u32,
}

impl Segment {
    fn parse(bytes: [u8; 16]) -> Segment {
        let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = bytes;
        Segment {
            sector: u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]),
            sectors: u32::from_le_bytes([n0, n1, n2, n3]),
            flags: u32::from_le_bytes(flags),
        }
    }

    /// Offset and length in bytes, when it lies on the disk and names no more than `most` sectors.
    fn place(&self, most: u32, shape: Shape) -> Option<(u64, u64)> {
        let len = u64::from(self.sectors) * u64::from(SECTOR);
        let offset = place(self.sector, len, shape.capacity)?;
        (self.sectors <= most).then_some((offset, len))
    }
}

fn discard(bytes: [u8; 16], shape: Shape) -> Work {
    let segment = Segment::parse(bytes);
    // Even UNMAP is not for discards (§5.2.6.2).
    if segment.flags != 0 {
        return Work::Answer(Status::Unsupp);
    }
    match segment.place(DISCARD_SECTORS_MAX, shape) {
        None => Work::Answer(Status::IoErr),
        Some((_, 0)) => Work::Answer(Status::Ok),
        Some((offset, len)) => Work::Host(Operation::Discard { offset, len }),
    }
}

fn write_zeroes(bytes: [u8; 16], shape: Shape) -> Work {
    let segment = Segment::parse(bytes);
    if segment.flags & !FLAG_UNMAP != 0 {
        return Work::Answer(Status::Unsupp);
    }
    match segment.place(WRITE_ZEROES_SECTORS_MAX, shape) {
        None => Work::Answer(Status::IoErr),
        Some((_, 0)) => Work::Answer(Status::Ok),
        Some((offset, len)) => Work::Host(Operation::WriteZeroes {
            offset,
            len,
            unmap: segment.flags & FLAG_UNMAP != 0,
        }),
    }
}
