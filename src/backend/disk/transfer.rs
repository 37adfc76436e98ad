//! One operation on a raw image, as the system calls that it takes.
//!
//! The kernel may move fewer bytes than it was asked to, be interrupted, or not know how to punch a hole in this
//! file system. Then the operation takes more than one call. This is the state machine that says which call comes next;
//! who makes the calls (the ring, or a thread) is another matter.

use std::io;
use std::ops::Range;
use std::os::fd::RawFd;

use super::Operation;
use crate::mem::{Buffer, GuestMemory, GuestRam};

/// How many pieces of memory one call takes (`UIO_MAXIOV`).
const PIECES_MAX: usize = 1024;

#[repr(align(4096))]
struct Zeroes([u8; 64 << 10]);
/// What is written where zeroes cannot be had by other means. Aligned for `O_DIRECT`.
static ZEROES: Zeroes = Zeroes([0; 64 << 10]);

/// The kind of call that is made now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Read,
    Write,
    Sync,
    /// Punch a hole, for space; a file system without holes leaves the data as it is.
    Discard,
    /// Make zeroes by dropping the data; else `WriteZeroes`.
    PunchHole,
    /// Make zeroes and keep the space; else `PunchHole`.
    ZeroRange,
    WriteZeroes,
}

/// The next system call.
pub(super) enum Call<'a> {
    /// preadv(2)
    Read {
        pieces: &'a [libc::iovec],
        offset: u64,
    },
    /// pwritev(2)
    Write {
        pieces: &'a [libc::iovec],
        offset: u64,
    },
    /// fdatasync(2)
    Sync,
    /// fallocate(2)
    Allocate { mode: i32, offset: u64, len: u64 },
}

/// An operation under way. While it exists, the guest memory that it moves stays mapped.
pub(super) struct Transfer {
    step: Step,
    pieces: Vec<libc::iovec>,
    /// Pieces before this one are done.
    first: usize,
    /// What is still to be done.
    range: Range<u64>,
    /// Keeps mapped what `pieces` points to.
    _ram: GuestRam,
}

// SAFETY: the pointers lead to guest RAM, which is mapped as long as `_ram` lives and may be reached from any thread,
// or to a static.
unsafe impl Send for Transfer {}

impl Transfer {
    /// Fails when a buffer is not guest RAM.
    pub fn new(ram: &GuestRam, operation: &Operation) -> io::Result<Transfer> {
        let (step, buffers): (Step, &[Buffer]) = match operation {
            Operation::Read { buffers, .. } => (Step::Read, buffers),
            Operation::Write { buffers, .. } => (Step::Write, buffers),
            Operation::Flush => (Step::Sync, &[]),
            Operation::Discard { .. } => (Step::Discard, &[]),
            Operation::WriteZeroes { unmap: true, .. } => (Step::PunchHole, &[]),
            Operation::WriteZeroes { unmap: false, .. } => (Step::ZeroRange, &[]),
        };
        let pieces = buffers.iter().map(|buffer| piece(ram, *buffer));
        Ok(Transfer {
            step,
            pieces: pieces.collect::<io::Result<_>>()?,
            first: 0,
            range: operation.range(),
            _ram: ram.clone(),
        })
    }

    fn left(&self) -> u64 {
        self.range.end.saturating_sub(self.range.start)
    }

    /// The call to make now.
    pub fn next(&self) -> Call<'_> {
        let left = self.pieces.get(self.first..).unwrap_or_default();
        let pieces = left.get(..PIECES_MAX).unwrap_or(left);
        let offset = self.range.start;
        let allocate = |mode| Call::Allocate {
            mode: mode | libc::FALLOC_FL_KEEP_SIZE,
            offset,
            len: self.left(),
        };
        match self.step {
            Step::Read => Call::Read { pieces, offset },
            Step::Write | Step::WriteZeroes => Call::Write { pieces, offset },
            Step::Sync => Call::Sync,
            Step::Discard | Step::PunchHole => allocate(libc::FALLOC_FL_PUNCH_HOLE),
            Step::ZeroRange => allocate(libc::FALLOC_FL_ZERO_RANGE),
        }
    }

    /// Takes what the call returned: a number of bytes, or an errno. `None` when another call is needed.
    pub fn done(&mut self, result: Result<u64, i32>) -> Option<io::Result<()>> {
        match (self.step, result) {
            (_, Err(libc::EINTR | libc::EAGAIN)) => None,
            (Step::Discard, Err(libc::EOPNOTSUPP | libc::ENOSYS)) => Some(Ok(())),
            (Step::ZeroRange, Err(libc::EOPNOTSUPP | libc::ENOSYS)) => {
                self.step = Step::PunchHole;
                None
            }
            (Step::PunchHole, Err(libc::EOPNOTSUPP | libc::ENOSYS)) => {
                self.step = Step::WriteZeroes;
                self.refill();
                None
            }
            (_, Err(errno)) => Some(Err(io::Error::from_raw_os_error(errno))),
            // The file has become shorter than the disk.
            (Step::Read, Ok(0)) if self.left() > 0 => {
                Some(Err(io::ErrorKind::UnexpectedEof.into()))
            }
            (Step::Write | Step::WriteZeroes, Ok(0)) if self.left() > 0 => {
                Some(Err(io::ErrorKind::WriteZero.into()))
            }
            (Step::Read | Step::Write | Step::WriteZeroes, Ok(moved)) => {
                self.advance(moved);
                (self.left() == 0).then_some(Ok(()))
            }
            (_, Ok(_)) => Some(Ok(())),
        }
    }

    fn advance(&mut self, moved: u64) {
        self.range.start = self.range.start.saturating_add(moved);
        let mut moved = usize::try_from(moved).unwrap_or(usize::MAX);
        while let Some(piece) = self.pieces.get_mut(self.first)
            && moved > 0
        {
            let step = moved.min(piece.iov_len);
            // Not dereferenced here, and inside the piece or at its end.
            piece.iov_base = piece.iov_base.wrapping_byte_add(step);
            piece.iov_len -= step;
            moved -= step;
            if piece.iov_len == 0 {
                self.first += 1;
            }
        }
        if self.step == Step::WriteZeroes {
            self.refill();
        }
    }

    /// Pieces of zeroes for what is left, or for one call's worth of it.
    fn refill(&mut self) {
        self.pieces.clear();
        self.first = 0;
        let mut left = self.left();
        while left > 0 && self.pieces.len() < PIECES_MAX {
            let len = left.min(ZEROES.0.len() as u64);
            self.pieces.push(libc::iovec {
                iov_base: ZEROES.0.as_ptr().cast_mut().cast(),
                iov_len: len as usize,
            });
            left -= len;
        }
    }
}

fn piece(ram: &GuestRam, buffer: Buffer) -> io::Result<libc::iovec> {
    let slice = ram
        .get_slice(buffer.address, buffer.len as usize)
        .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    Ok(libc::iovec {
        iov_base: slice.ptr_guard_mut().as_ptr().cast(),
        iov_len: slice.len(),
    })
}

/// Makes all the calls of an operation, one after the other, and waits for each.
pub(super) fn blocking(fd: RawFd, ram: &GuestRam, operation: &Operation) -> io::Result<()> {
    let mut transfer = Transfer::new(ram, operation)?;
    loop {
        let result = call(fd, &transfer.next());
        if let Some(result) = transfer.done(result) {
            return result;
        }
    }
}

fn call(fd: RawFd, call: &Call<'_>) -> Result<u64, i32> {
    let at = |offset: u64| libc::off64_t::try_from(offset).map_err(|_| libc::EINVAL);
    let result = match call {
        Call::Read { pieces, offset } => {
            let offset = at(*offset)?;
            // SAFETY: the pieces are at most 1024 and lie in guest RAM that the transfer keeps mapped.
            unsafe { libc::preadv64(fd, pieces.as_ptr(), pieces.len() as i32, offset) }
        }
        Call::Write { pieces, offset } => {
            let offset = at(*offset)?;
            // SAFETY: as above, or they are the static zeroes, which are only read.
            unsafe { libc::pwritev64(fd, pieces.as_ptr(), pieces.len() as i32, offset) }
        }
        // SAFETY: takes no memory.
        Call::Sync => unsafe { libc::fdatasync(fd) as isize },
        Call::Allocate { mode, offset, len } => {
            let (offset, len) = (at(*offset)?, at(*len)?);
            // SAFETY: takes no memory.
            unsafe { libc::fallocate64(fd, *mode, offset, len) as isize }
        }
    };
    u64::try_from(result).map_err(|_| {
        io::Error::last_os_error()
            .raw_os_error()
            .unwrap_or(libc::EIO)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mem::{self, GuestAddress};

    fn ram() -> GuestRam {
        mem::allocate(&[(GuestAddress(0), 2 << 20)]).unwrap()
    }

    fn lengths(call: &Call<'_>) -> (u64, Vec<usize>) {
        match call {
            Call::Read { pieces, offset } | Call::Write { pieces, offset } => {
                (*offset, pieces.iter().map(|piece| piece.iov_len).collect())
            }
            _ => panic!("no read or write"),
        }
    }

    fn allocates(transfer: &Transfer) -> Option<i32> {
        match transfer.next() {
            Call::Allocate { mode, .. } => Some(mode & !libc::FALLOC_FL_KEEP_SIZE),
            _ => None,
        }
    }

    #[test]
    fn a_short_read_is_followed_by_one_for_the_rest() {
        let buffers = [(0, 512), (0x1000, 1024)].map(|(address, len)| Buffer {
            address: GuestAddress(address),
            len,
        });
        let read = Operation::Read {
            offset: 4096,
            buffers: buffers.to_vec(),
        };
        let mut transfer = Transfer::new(&ram(), &read).unwrap();
        assert_eq!(lengths(&transfer.next()), (4096, vec![512, 1024]));
        assert!(transfer.done(Ok(700)).is_none());
        assert_eq!(lengths(&transfer.next()), (4796, vec![836]));
        assert!(transfer.done(Err(libc::EINTR)).is_none());
        assert_eq!(lengths(&transfer.next()), (4796, vec![836]));
        assert!(matches!(transfer.done(Ok(836)), Some(Ok(()))));
    }

    #[test]
    fn a_read_at_the_end_of_the_file_is_an_error() {
        let read = Operation::Read {
            offset: 0,
            buffers: vec![Buffer {
                address: GuestAddress(0),
                len: 512,
            }],
        };
        let mut transfer = Transfer::new(&ram(), &read).unwrap();
        assert!(transfer.done(Ok(100)).is_none());
        assert!(matches!(transfer.done(Ok(0)), Some(Err(_))));
    }

    #[test]
    fn zeroes_are_written_where_the_file_system_knows_no_better_way() {
        let len = (100 << 20) + 512;
        let zeroes = Operation::WriteZeroes {
            offset: 512,
            len,
            unmap: false,
        };
        let mut transfer = Transfer::new(&ram(), &zeroes).unwrap();
        assert_eq!(allocates(&transfer), Some(libc::FALLOC_FL_ZERO_RANGE));
        assert!(transfer.done(Err(libc::EOPNOTSUPP)).is_none());
        assert_eq!(allocates(&transfer), Some(libc::FALLOC_FL_PUNCH_HOLE));
        assert!(transfer.done(Err(libc::EOPNOTSUPP)).is_none());
        let mut written = 0;
        loop {
            let (offset, lengths) = lengths(&transfer.next());
            assert_eq!(offset, 512 + written);
            let moved = lengths.iter().sum::<usize>() as u64;
            written += moved;
            if transfer.done(Ok(moved)).is_some() {
                break;
            }
        }
        assert_eq!(written, len);
    }

    #[test]
    fn a_discard_that_the_file_system_cannot_do_is_no_error() {
        let discard = Operation::Discard {
            offset: 0,
            len: 512,
        };
        let mut transfer = Transfer::new(&ram(), &discard).unwrap();
        assert!(matches!(transfer.done(Err(libc::EOPNOTSUPP)), Some(Ok(()))));
    }

    #[test]
    fn buffers_that_are_not_ram_are_refused() {
        let write = Operation::Write {
            offset: 0,
            buffers: vec![Buffer {
                address: GuestAddress((2 << 20) - 256),
                len: 512,
            }],
        };
        assert!(Transfer::new(&ram(), &write).is_err());
    }
}
