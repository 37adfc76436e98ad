//! The fast way to a raw image: io_uring(7).
//!
//! Two rings are shared with the kernel. System calls to make go onto the submission ring, one `io_uring_enter(2)` tells
//! the kernel of all of them at once, and their results come back on the completion ring, in any order. What the page
//! cache has is there when `io_uring_enter` returns, so the ring is looked at then; for the rest, the event loop watches
//! the ring's descriptor, which is readable while the completion ring is not empty. The kernel reads and writes guest
//! RAM itself; nothing is copied here.
//!
//! A file in a tmpfs is a special case. Its file system cannot promise that a call will not wait (for memory), so
//! io_uring leaves each to a worker thread of the kernel, which takes longer to wake up than a page takes to copy. But
//! there is no disk to wait for: such a call is made right here, unless it moves so much that the event loop would
//! be missed.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use io_uring::{IoUring, Probe, opcode, squeue, types};
use rustix::fs::fstatfs;
use slab::Slab;

use super::transfer::{self, Call, Transfer};
use super::{Completion, Engine, Operation};
use crate::mem::GuestRam;

/// Entries of the submission ring. It is emptied whenever it is full.
const SUBMISSIONS: u32 = 128;
/// Entries of a completion ring, at most.
const COMPLETIONS_MAX: u32 = 4096;
/// Bytes that are moved right here, if the image is in memory, at most: some 50 µs.
const AT_ONCE_MAX: u64 = 256 << 10;

/// File systems that keep files in memory: `f_type` of statfs(2).
const TMPFS_MAGIC: i64 = 0x0102_1994;
const RAMFS_MAGIC: i64 = 0x8584_58f6;

/// One ring for one image.
pub(super) struct Ring {
    ring: IoUring,
    file: File,
    /// The file lies in memory.
    in_memory: bool,
    event: Arc<OwnedFd>,
    /// What the kernel has, or is about to get, with its token, by the number that the kernel knows it by.
    transfers: Slab<(u64, Transfer)>,
    /// Those that the kernel does not have yet.
    waiting: VecDeque<usize>,
    /// How many the kernel may have without losing a completion.
    most: usize,
}

impl Ring {
    /// A ring for `file` with room for `depth` operations. Fails where the host has no io_uring, refuses it to this
    /// process, or does not know an operation that a disk needs.
    pub fn new(file: File, depth: u32) -> io::Result<Ring> {
        let completions = depth
            .checked_next_power_of_two()
            .unwrap_or(COMPLETIONS_MAX)
            .clamp(2 * SUBMISSIONS, COMPLETIONS_MAX);
        let ring = IoUring::builder()
            .dontfork()
            .setup_cqsize(completions)
            .build(SUBMISSIONS)?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let codes = [
            opcode::Readv::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
            opcode::Fallocate::CODE,
        ];
        if !codes.iter().all(|code| probe.is_supported(*code)) {
            return Err(io::Error::from_raw_os_error(libc::ENOSYS));
        }
        // SAFETY: the ring keeps its descriptor open for as long as it lives, and it outlives this line.
        let descriptor = unsafe { BorrowedFd::borrow_raw(ring.as_raw_fd()) };
        let event = Arc::new(descriptor.try_clone_to_owned()?);
        Ok(Ring {
            ring,
            in_memory: is_in_memory(&file),
            file,
            event,
            transfers: Slab::new(),
            waiting: VecDeque::new(),
            most: completions as usize,
        })
    }

    /// Moves what waits onto the submission ring, as far as it goes.
    fn fill(&mut self) {
        let fd = self.file.as_raw_fd();
        let mut running = self.transfers.len().saturating_sub(self.waiting.len());
        let mut submissions = self.ring.submission();
        while running < self.most
            && !submissions.is_full()
            && let Some(id) = self.waiting.pop_front()
        {
            let Some((_, transfer)) = self.transfers.get(id) else {
                continue;
            };
            let entry = entry(fd, &transfer.next()).user_data(id as u64);
            // SAFETY: the entry points to the transfer's pieces, which lie on the heap and are not touched, and to guest
            // RAM, which the transfer keeps mapped. It stays in `transfers` until the kernel has given it back.
            if unsafe { submissions.push(&entry) }.is_err() {
                self.waiting.push_front(id);
                break;
            }
            running += 1;
        }
    }

    /// Tells the kernel of what waits, as far as it will have it. When it is short of memory, or has completions to be
    /// taken first, the rest goes on waiting.
    fn kick(&mut self) {
        loop {
            self.fill();
            if self.ring.submission().is_empty() {
                return;
            }
            match self.ring.submit() {
                Ok(submitted) if submitted > 0 => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                _ => return,
            }
        }
    }

    /// Takes what has come back. Operations that need another call go to `waiting` again.
    fn reap(&mut self) -> Vec<Completion> {
        let mut completions = Vec::new();
        for entry in self.ring.completion() {
            let id = usize::try_from(entry.user_data()).unwrap_or(usize::MAX);
            let result = u64::try_from(entry.result()).map_err(|_| entry.result().saturating_neg());
            let Some((_, transfer)) = self.transfers.get_mut(id) else {
                continue;
            };
            match transfer.done(result) {
                None => self.waiting.push_back(id),
                Some(result) => {
                    let (token, _) = self.transfers.remove(id);
                    completions.push(Completion { token, result });
                }
            }
        }
        completions
    }
}

impl Engine for Ring {
    fn event(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.event)
    }

    fn submit(&mut self, token: u64, ram: &GuestRam, operation: Operation) -> Poll<io::Result<()>> {
        if self.in_memory && is_short(&operation) {
            return Poll::Ready(transfer::blocking(self.file.as_raw_fd(), ram, &operation));
        }
        match Transfer::new(ram, &operation) {
            Ok(transfer) => {
                let id = self.transfers.insert((token, transfer));
                self.waiting.push_back(id);
                Poll::Pending
            }
            Err(error) => Poll::Ready(Err(error)),
        }
    }

    fn proceed(&mut self) -> Vec<Completion> {
        self.kick();
        let completions = self.reap();
        // What takes another call.
        self.kick();
        completions
    }

    fn is_stuck(&mut self) -> bool {
        let untold = self
            .waiting
            .len()
            .saturating_add(self.ring.submission().len());
        untold > 0 && untold == self.transfers.len()
    }

    fn drain(&mut self) {
        while !self.transfers.is_empty() {
            self.fill();
            if let Err(error) = self.ring.submit_and_wait(1)
                && error.kind() != io::ErrorKind::Interrupted
            {
                // Short of memory. The kernel has guest RAM in its hands, so there is no way but to wait.
                std::thread::sleep(Duration::from_millis(1));
            }
            self.reap();
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.drain();
    }
}

/// Whether the calls that this file takes never wait for a disk.
fn is_in_memory(file: impl AsFd) -> bool {
    fstatfs(file).is_ok_and(|system| matches!(system.f_type, TMPFS_MAGIC | RAMFS_MAGIC))
}

/// Whether an operation on an image in memory takes so little time that nobody else need do it.
fn is_short(operation: &Operation) -> bool {
    match operation {
        Operation::Read { .. } | Operation::Write { .. } => {
            let range = operation.range();
            range.end.saturating_sub(range.start) <= AT_ONCE_MAX
        }
        Operation::Flush => true,
        // These look for memory to give back in all of their range.
        Operation::Discard { .. } | Operation::WriteZeroes { .. } => false,
    }
}

fn entry(fd: RawFd, call: &Call<'_>) -> squeue::Entry {
    let fd = types::Fd(fd);
    match call {
        Call::Read { pieces, offset } => {
            opcode::Readv::new(fd, pieces.as_ptr(), pieces.len() as u32)
                .offset(*offset)
                .build()
        }
        Call::Write { pieces, offset } => {
            opcode::Writev::new(fd, pieces.as_ptr(), pieces.len() as u32)
                .offset(*offset)
                .build()
        }
        Call::Sync => opcode::Fsync::new(fd)
            .flags(types::FsyncFlags::DATASYNC)
            .build(),
        Call::Allocate { mode, offset, len } => opcode::Fallocate::new(fd, *len)
            .offset(*offset)
            .mode(*mode)
            .build(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mem::{self, Buffer, GuestAddress};
    use rustix::event::{PollFd, PollFlags, poll};
    use std::collections::BTreeSet;

    #[test]
    fn more_operations_than_the_rings_hold_all_end_once() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let mut ring = match Ring::new(file, 1) {
            Ok(ring) => ring,
            Err(error) => return eprintln!("this host has no io_uring to test with: {error}"),
        };
        let ram = mem::allocate(&[(GuestAddress(0), 2 << 20)]).unwrap();
        for token in 0..1000 {
            let operation = match token % 3 {
                0 => Operation::Flush,
                _ => Operation::Write {
                    offset: token * 512,
                    buffers: vec![Buffer {
                        address: GuestAddress(0),
                        len: 512,
                    }],
                },
            };
            assert!(ring.submit(token, &ram, operation).is_pending());
        }
        let mut ended = BTreeSet::new();
        while ended.len() < 1000 {
            for completion in ring.proceed() {
                completion.result.unwrap();
                assert!(ended.insert(completion.token));
            }
            assert!(!ring.is_stuck());
            if ended.len() < 1000 {
                let event = ring.event();
                poll(&mut [PollFd::new(&event, PollFlags::IN)], None).unwrap();
            }
        }
        assert!(ring.transfers.is_empty() && ring.waiting.is_empty());
    }
}
