//! qcow2: an image that has only what was written to it.
//!
//! The disk is cut into clusters, usually of 64 KiB, and a two-level table says where in the file each one lies, if
//! anywhere. The format itself is the `imago` crate's work, used in its synchronous form on the disk's thread (see
//! [`super::thread`]): one operation often takes several dependent accesses to the tables, for which a plain sequence of
//! calls is the simplest correct form, and this form brings no asynchronous runtime along.
//!
//! An image can name other files: a *backing file*, which has what the image has not, and an external data file. A
//! guest's image is not trusted to choose files of the host, so nothing is opened on its word; an image that needs
//! another file is refused.

use std::io;

use imago::file::File;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::qcow2::Qcow2;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder};
use vm_memory::VolatileSlice;

use super::image::Image;
use super::{Error, Operation, Options};
use crate::mem::{Buffer, GuestMemory, GuestRam};

/// How many pieces of memory go into one call.
const PIECES_MAX: usize = 1024;
/// Zeroes that are written at once, in bytes, where the format has no shorter way to say so.
const ZEROES: u64 = 64 << 10;

/// An open image.
pub(super) struct Disk(FormatAccess<File>);

impl Disk {
    pub fn open(image: Image, options: &Options) -> Result<Disk, Error> {
        let path = &options.path;
        let unusable = |source| Error::NotQcow2 {
            path: path.clone(),
            source,
        };
        let file = File::try_from(image.file).map_err(|source| Error::Host {
            path: path.clone(),
            source,
        })?;
        let qcow2 = Qcow2::<File>::builder(file)
            .write(!options.read_only)
            .backing(None)
            .data_file(None)
            .open(DenyImplicitOpenGate::default())
            .map_err(unusable)?;
        let other = match (
            qcow2.implicit_backing_file(),
            qcow2.requires_external_data_file(),
        ) {
            (Some(other), _) => Some(other.clone()),
            (None, true) => Some(
                qcow2
                    .implicit_external_data_file()
                    .map_or_else(|| "its data file".to_owned(), Clone::clone),
            ),
            (None, false) => None,
        };
        if let Some(other) = other {
            return Err(Error::BackingFile {
                path: path.clone(),
                other,
            });
        }
        Ok(Disk(FormatAccess::new(qcow2)))
    }

    /// Bytes that the guest sees.
    pub fn capacity(&self) -> u64 {
        self.0.size()
    }

    /// Does an operation and waits for its end.
    pub fn run(&mut self, ram: &GuestRam, operation: &Operation) -> io::Result<()> {
        match operation {
            Operation::Read { offset, buffers } => self.read(ram, *offset, buffers),
            Operation::Write { offset, buffers } => self.write(ram, *offset, buffers),
            Operation::Flush => {
                // First the tables to the host, then the host's cache to the disk.
                self.0.flush()?;
                self.0.sync()
            }
            Operation::Discard { offset, len } => match self.0.discard_to_any(*offset, *len) {
                Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
                result => result,
            },
            Operation::WriteZeroes { offset, len, unmap } => {
                let result = if *unmap {
                    self.0.discard_to_zero(*offset, *len)
                } else {
                    self.0.write_zeroes(*offset, *len)
                };
                match result {
                    // Version 2 of the format cannot mark clusters as zero.
                    Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                        self.fill(*offset, *len)
                    }
                    result => result,
                }
            }
        }
    }

    fn read(&self, ram: &GuestRam, mut offset: u64, buffers: &[Buffer]) -> io::Result<()> {
        for buffers in buffers.chunks(PIECES_MAX) {
            let slices = slices(ram, buffers)?;
            let (pieces, _guard) = IoVectorMut::from_volatile_slice(&slices);
            let len = pieces.len();
            self.0.readv(pieces, offset)?;
            offset = offset.saturating_add(len);
        }
        Ok(())
    }

    fn write(&self, ram: &GuestRam, mut offset: u64, buffers: &[Buffer]) -> io::Result<()> {
        for buffers in buffers.chunks(PIECES_MAX) {
            let slices = slices(ram, buffers)?;
            let (pieces, _guard) = IoVector::from_volatile_slice(&slices);
            let len = pieces.len();
            self.0.writev(pieces, offset)?;
            offset = offset.saturating_add(len);
        }
        Ok(())
    }

    fn fill(&self, mut offset: u64, len: u64) -> io::Result<()> {
        let zeroes = [0; ZEROES as usize];
        let end = offset.saturating_add(len);
        while offset < end {
            let len = ZEROES.min(end.saturating_sub(offset));
            let zeroes = zeroes.get(..len as usize).unwrap_or_default();
            self.0.write(zeroes, offset)?;
            offset = offset.saturating_add(len);
        }
        Ok(())
    }
}

fn slices<'a>(ram: &'a GuestRam, buffers: &[Buffer]) -> io::Result<Vec<VolatileSlice<'a>>> {
    buffers
        .iter()
        .map(|buffer| ram.get_slice(buffer.address, buffer.len as usize))
        .collect::<Result<_, _>>()
        .map_err(|_| io::ErrorKind::InvalidInput.into())
}
