//! Scattered reads and writes between a descriptor and guest memory (readv(2), writev(2), sendmsg(2)).
//!
//! The kernel copies between a socket and guest RAM directly. The guest may change the bytes meanwhile; nothing here
//! looks at them, so that is the guest's own affair.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::Piece;
use crate::mem::{GuestMemory, GuestRam};

/// What a descriptor is read into or written from: ranges of this process's memory that live for `'a`, none of which
/// is held as a Rust reference that the kernel's or the guest's access would break.
pub(super) struct Vectors<'a> {
    list: Vec<libc::iovec>,
    len: usize,
    lifetime: PhantomData<&'a ()>,
}

impl<'a> Vectors<'a> {
    pub(super) fn new() -> Vectors<'a> {
        Vectors {
            list: Vec::new(),
            len: 0,
            lifetime: PhantomData,
        }
    }

    /// Appends ranges of guest memory, without their first `skip` bytes.
    ///
    /// # Errors
    /// When a range is not inside one region of RAM.
    pub(super) fn guest(
        mut self,
        ram: &'a GuestRam,
        pieces: &[Piece],
        mut skip: usize,
    ) -> io::Result<Vectors<'a>> {
        for &(address, len) in pieces {
            let slice = ram
                .get_slice(address, len as usize)
                .and_then(|slice| {
                    let here = skip.min(slice.len());
                    skip = skip.saturating_sub(here);
                    Ok(slice.offset(here)?)
                })
                .map_err(|_| io::ErrorKind::InvalidInput)?;
            self.push(slice.ptr_guard_mut().as_ptr(), slice.len());
        }
        Ok(self)
    }

    /// Appends bytes to be read from. Not for [`Vectors::read`].
    fn bytes(mut self, bytes: &'a [u8]) -> Vectors<'a> {
        self.push(bytes.as_ptr().cast_mut(), bytes.len());
        self
    }

    fn push(&mut self, base: *mut u8, len: usize) {
        if len > 0 {
            self.list.push(libc::iovec {
                iov_base: base.cast(),
                iov_len: len,
            });
            self.len = self.len.saturating_add(len);
        }
    }

    fn count(&self) -> libc::c_int {
        libc::c_int::try_from(self.list.len()).unwrap_or(libc::c_int::MAX)
    }
}

/// Reads once from `fd` into guest memory and, where that ends, into `spill`.
pub(in crate::backend) fn read(
    fd: BorrowedFd<'_>,
    ram: &GuestRam,
    pieces: &[Piece],
    spill: &mut [u8],
) -> io::Result<usize> {
    let mut vectors = Vectors::new().guest(ram, pieces, 0)?;
    vectors.push(spill.as_mut_ptr(), spill.len());
    // SAFETY: each vector is a live range: of guest RAM, which `ram` keeps mapped and which is only ever reached through
    // raw pointers and volatile accesses, or of `spill`, which is borrowed mutably for this call.
    let count = unsafe { libc::readv(fd.as_raw_fd(), vectors.list.as_ptr(), vectors.count()) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

/// Writes guest memory to `fd` in one call.
pub(super) fn write(fd: BorrowedFd<'_>, ram: &GuestRam, pieces: &[Piece]) -> io::Result<usize> {
    let vectors = Vectors::new().guest(ram, pieces, 0)?;
    // SAFETY: each vector is a live range of guest RAM, which `ram` keeps mapped.
    let count = unsafe { libc::writev(fd.as_raw_fd(), vectors.list.as_ptr(), vectors.count()) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

/// Sends `prefix`, then guest memory without its first `skip` bytes, to the socket `fd`, as much as there is room for.
pub(in crate::backend) fn send(
    fd: BorrowedFd<'_>,
    prefix: &[u8],
    ram: &GuestRam,
    pieces: &[Piece],
    skip: usize,
) -> io::Result<usize> {
    let mut vectors = Vectors::new().bytes(prefix).guest(ram, pieces, skip)?;
    // SAFETY: a message header is plain data, for which zeroes mean: no address, no vectors, no control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = vectors.list.as_mut_ptr();
    message.msg_iovlen = vectors.list.len() as _;
    // SAFETY: `message` points to live vectors, each of which is a live range of `prefix` or of guest RAM, and is only
    // read from.
    let count = unsafe {
        libc::sendmsg(
            fd.as_raw_fd(),
            &message,
            libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
        )
    };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mem::{self, Bytes, GuestAddress};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn bytes_go_from_pieces_of_guest_memory_to_others_and_the_rest_is_spilled() {
        let ram = mem::allocate(&[(GuestAddress(0), 2 << 20)]).unwrap();
        ram.write_slice(b"..hello", GuestAddress(100)).unwrap();
        ram.write_slice(b", guest", GuestAddress(200)).unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let pieces = [(GuestAddress(100), 7), (GuestAddress(200), 7)];
        assert_eq!(send(ours.as_fd(), b">", &ram, &pieces, 2).unwrap(), 13);
        assert_eq!(write(ours.as_fd(), &ram, &pieces).unwrap(), 14);
        let mut spill = [0; 64];
        let target = [(GuestAddress(300), 3), (GuestAddress(400), 1)];
        assert_eq!(read(theirs.as_fd(), &ram, &target, &mut spill).unwrap(), 27);
        assert_eq!(&spill[..23], b"lo, guest..hello, guest");
        let mut three = [0; 3];
        ram.read_slice(&mut three, GuestAddress(300)).unwrap();
        assert_eq!(&three, b">he");
    }

    #[test]
    fn a_piece_outside_ram_is_refused_before_any_call() {
        let ram = mem::allocate(&[(GuestAddress(0), 2 << 20)]).unwrap();
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let pieces = [(GuestAddress((2 << 20) - 4), 8)];
        assert!(write(ours.as_fd(), &ram, &pieces).is_err());
        assert!(send(ours.as_fd(), b"", &ram, &pieces, 8).is_err());
        assert!(read(ours.as_fd(), &ram, &pieces, &mut []).is_err());
    }
}
