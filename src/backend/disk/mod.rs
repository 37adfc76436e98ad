//! Disk images: the host's side of a block device.
//!
//! A disk is a row of bytes in a file or on a block device of the host. The device model starts operations on it, each
//! with pieces of guest RAM to move and a token to know it by; they end in any order, and a descriptor tells the event
//! loop that some have. Guest RAM is given to the kernel as it is (scatter/gather), so no byte is copied in this
//! process.
//!
//! * A **raw** image goes through io_uring (`ring`). Where the host refuses that, as containers and hardened hosts do,
//!   a thread makes the same system calls one by one (`thread`), with a warning. Both follow one state machine
//!   (`transfer`). An image that lies in memory anyway, in a tmpfs, is read and written at once: there is no disk to
//!   wait for.
//! * A **qcow2** image is walked by the `imago` crate on such a thread (`qcow2`). It may not build on another file.
//!
//! An image has one writer at a time, by a lock (`image`).

mod error;
mod image;
mod qcow2;
mod ring;
mod thread;
mod transfer;

pub use error::Error;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::task::Poll;

use crate::mem::{Buffer, GuestRam};
use image::Image;
use ring::Ring;
use thread::Thread;

/// Bytes in a sector, in which a disk is measured (virtio 1.3 §5.2.4).
pub const SECTOR: u32 = 512;

/// How an image holds the bytes of its disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// As they are.
    #[default]
    Raw,
    /// In QEMU's format, versions 2 and 3.
    Qcow2,
}

/// Which image to open, and how.
#[derive(Clone, Debug)]
pub struct Options {
    pub path: PathBuf,
    pub read_only: bool,
    /// Past the host's page cache (`O_DIRECT`). Most hosts then want buffers of the guest aligned to sectors, as Linux
    /// aligns them; operations with others fail.
    pub direct: bool,
    pub format: Format,
    /// How many operations may be under way at once, at most.
    pub depth: u32,
}

/// What to do with a disk. Offsets and lengths are in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operation {
    /// From the disk to guest RAM.
    Read { offset: u64, buffers: Vec<Buffer> },
    /// From guest RAM to the disk.
    Write { offset: u64, buffers: Vec<Buffer> },
    /// What writes that have ended wrote shall survive a power cut.
    Flush,
    /// The range is not needed any more.
    Discard { offset: u64, len: u64 },
    /// The range shall read as zeroes; with `unmap`, by giving its space back if possible.
    WriteZeroes { offset: u64, len: u64, unmap: bool },
}

impl Operation {
    /// The bytes of the disk that it is about. One that would leave the address space ends at its end.
    pub fn range(&self) -> Range<u64> {
        let (offset, len) = match self {
            Operation::Read { offset, buffers } | Operation::Write { offset, buffers } => {
                let len = buffers.iter().map(|buffer| u64::from(buffer.len));
                (*offset, len.fold(0, u64::saturating_add))
            }
            Operation::Flush => (0, 0),
            Operation::Discard { offset, len } | Operation::WriteZeroes { offset, len, .. } => {
                (*offset, *len)
            }
        };
        offset..offset.saturating_add(len)
    }
}

/// An operation has ended.
#[derive(Debug)]
pub struct Completion {
    /// What [`Disk::submit`] was given.
    pub token: u64,
    pub result: io::Result<()>,
}

/// What makes an image's system calls. See [`Disk`]'s methods of the same names.
pub(crate) trait Engine: Send {
    fn event(&self) -> Arc<OwnedFd>;
    fn submit(&mut self, token: u64, ram: &GuestRam, operation: Operation) -> Poll<io::Result<()>>;
    fn proceed(&mut self) -> Vec<Completion>;
    fn is_stuck(&mut self) -> bool;
    fn drain(&mut self);
}

/// An open disk image. When it is dropped, it waits for what is under way.
pub struct Disk {
    path: PathBuf,
    capacity: u64,
    sector: u32,
    read_only: bool,
    engine: Box<dyn Engine>,
}

impl Disk {
    /// Opens and locks an image.
    ///
    /// # Errors
    /// When there is none, it cannot be opened so, somebody else has it, it is not of the stated format, or its size
    /// is not one of a disk.
    pub fn open(options: &Options) -> Result<Disk, Error> {
        Ok(Disk::open_with(options, Ring::new)?.0)
    }

    /// Opens and locks an image whose file the caller has another use for. The lock lasts until both are dropped.
    ///
    /// # Errors
    /// As [`Disk::open`].
    pub fn open_with_file(options: &Options) -> Result<(Disk, File), Error> {
        Disk::open_with(options, Ring::new)
    }

    /// Opens an image as on a host that refuses io_uring.
    #[cfg(test)]
    pub(crate) fn open_without_ring(options: &Options) -> Result<Disk, Error> {
        let refused = |_, _| Err(io::Error::from_raw_os_error(libc::EPERM));
        Ok(Disk::open_with(options, refused)?.0)
    }

    /// A disk of `capacity` bytes whose operations go to `engine`.
    #[cfg(test)]
    pub(crate) fn of(engine: Box<dyn Engine>, capacity: u64) -> Disk {
        Disk {
            path: PathBuf::new(),
            capacity,
            sector: SECTOR,
            read_only: false,
            engine,
        }
    }

    fn open_with(
        options: &Options,
        ring: impl FnOnce(File, u32) -> io::Result<Ring>,
    ) -> Result<(Disk, File), Error> {
        let path = &options.path;
        let host = |source| Error::Host {
            path: path.clone(),
            source,
        };
        let image = Image::open(options)?;
        let sector = image.sector;
        let file = image.file.try_clone().map_err(host)?;
        let (capacity, engine): (u64, Box<dyn Engine>) = match options.format {
            Format::Raw => {
                let len = image.len;
                let spare = image.file.try_clone().map_err(host)?;
                match ring(image.file, options.depth) {
                    Ok(ring) => (len, Box::new(ring)),
                    Err(error) => {
                        log::warn!(
                            "the disk image {} is used without io_uring, which is slower: {error}",
                            path.display()
                        );
                        let run = move |ram: &GuestRam, operation: &Operation| {
                            transfer::blocking(spare.as_raw_fd(), ram, operation)
                        };
                        (len, Box::new(Thread::new(Box::new(run)).map_err(host)?))
                    }
                }
            }
            Format::Qcow2 => {
                let mut disk = qcow2::Disk::open(image, options)?;
                let capacity = disk.capacity();
                let run = move |ram: &GuestRam, operation: &Operation| disk.run(ram, operation);
                (
                    capacity,
                    Box::new(Thread::new(Box::new(run)).map_err(host)?),
                )
            }
        };
        if capacity == 0 {
            return Err(Error::Empty { path: path.clone() });
        }
        if !capacity.is_multiple_of(SECTOR.into()) {
            return Err(Error::OddSize {
                path: path.clone(),
                bytes: capacity,
            });
        }
        let disk = Disk {
            path: path.clone(),
            capacity,
            sector,
            read_only: options.read_only,
            engine,
        };
        Ok((disk, file))
    }

    /// The image's path, for messages.
    pub fn path(&self) -> &std::path::Path {
        &self.path
    }

    /// Size of the disk in bytes, a multiple of 512.
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// The smallest unit that is written without reading first, in bytes.
    pub fn sector(&self) -> u32 {
        self.sector
    }

    /// Whether writes are refused.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Readable when operations have ended, for the event loop to watch, until [`Disk::proceed`] has told of all.
    pub fn event(&self) -> Arc<OwnedFd> {
        self.engine.event()
    }

    /// Starts an operation, at the latest with the next [`Disk::proceed`]. It may have ended when this returns; else, its
    /// end is told there.
    ///
    /// An operation that is out of the disk or of guest RAM, or writes a disk that is read-only, has failed at once.
    pub fn submit(
        &mut self,
        token: u64,
        ram: &GuestRam,
        operation: Operation,
    ) -> Poll<io::Result<()>> {
        let reads = matches!(operation, Operation::Read { .. } | Operation::Flush);
        if self.read_only && !reads {
            return Poll::Ready(Err(io::ErrorKind::ReadOnlyFilesystem.into()));
        }
        if operation.range().end > self.capacity {
            return Poll::Ready(Err(io::ErrorKind::InvalidInput.into()));
        }
        self.engine.submit(token, ram, operation)
    }

    /// Tells the host of all operations submitted so far, and takes those that have ended since the last call.
    pub fn proceed(&mut self) -> Vec<Completion> {
        self.engine.proceed()
    }

    /// Whether the host is too short of memory to take any operation, so that no end of one will make
    /// [`Disk::event`] readable. [`Disk::proceed`] has to be called again then.
    pub fn is_stuck(&mut self) -> bool {
        self.engine.is_stuck()
    }

    /// Waits for all operations under way and forgets their ends. Nothing touches guest RAM any more then.
    pub fn drain(&mut self) {
        self.engine.drain();
    }
}

#[cfg(test)]
mod tests;
