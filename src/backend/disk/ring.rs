//! The fast way to a raw image: io_uring(7).
//!
//! Two rings are shared with the kernel. System calls to make go onto the submission ring, one `io_uring_enter(2)` tells
//! the kernel of all of them at once, and their results come back on the completion ring, in any order, together with
//! a count on an eventfd for the event loop. The kernel reads and writes guest RAM itself; nothing is copied here.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use io_uring::{IoUring, Probe, opcode, squeue, types};
use rustix::event::{EventfdFlags, eventfd};

use super::transfer::{Call, Transfer};
use super::{Completion, Engine, Operation};
use crate::mem::GuestRam;

/// Entries of the submission ring. It is emptied whenever it is full.
const SUBMISSIONS: u32 = 128;
/// Entries of a completion ring, at most.
const COMPLETIONS_MAX: u32 = 4096;

/// One ring for one image.
pub(super) struct Ring {
    ring: IoUring,
    file: File,
    event: Arc<OwnedFd>,
    /// What the kernel has, or is about to get, by the number that it knows it by.
    transfers: BTreeMap<u64, (u64, Transfer)>,
    next: u64,
    /// Those that the kernel does not have yet.
    waiting: VecDeque<u64>,
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
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        ring.submitter().register_eventfd(event.as_raw_fd())?;
        Ok(Ring {
            ring,
            file,
            event: Arc::new(event),
            transfers: BTreeMap::new(),
            next: 0,
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
            let Some((_, transfer)) = self.transfers.get(&id) else {
                continue;
            };
            let entry = entry(fd, &transfer.next()).user_data(id);
            // SAFETY: the entry points to the transfer's pieces, which lie on the heap and are not touched, and to guest
            // RAM, which the transfer keeps mapped. It stays in `transfers` until the kernel has given it back.
            if unsafe { submissions.push(&entry) }.is_err() {
                self.waiting.push_front(id);
                break;
            }
            running += 1;
        }
    }

    /// Takes what has come back. Operations that need another call go to `waiting` again.
    fn reap(&mut self) -> Vec<Completion> {
        let mut completions = Vec::new();
        for entry in self.ring.completion() {
            let id = entry.user_data();
            let result = u64::try_from(entry.result()).map_err(|_| entry.result().saturating_neg());
            let Some((token, transfer)) = self.transfers.get_mut(&id) else {
                continue;
            };
            match transfer.done(result) {
                None => self.waiting.push_back(id),
                Some(result) => {
                    completions.push(Completion {
                        token: *token,
                        result,
                    });
                    self.transfers.remove(&id);
                }
            }
        }
        completions
    }

    /// Has [`Engine::completed`] called again.
    fn call_again(&self) {
        let _ = rustix::io::write(&self.event, &1_u64.to_ne_bytes());
    }
}

impl Engine for Ring {
    fn event(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.event)
    }

    fn submit(&mut self, token: u64, ram: &GuestRam, operation: Operation) -> io::Result<()> {
        let transfer = Transfer::new(ram, &operation)?;
        let id = self.next;
        self.next = self.next.wrapping_add(1);
        self.transfers.insert(id, (token, transfer));
        self.waiting.push_back(id);
        Ok(())
    }

    fn kick(&mut self) {
        loop {
            self.fill();
            if self.ring.submission().is_empty() {
                return;
            }
            match self.ring.submit() {
                Ok(submitted) if submitted > 0 => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The kernel is short of memory, or has completions for us to take first: the loop comes back to it.
                _ => return self.call_again(),
            }
        }
    }

    fn completed(&mut self) -> Vec<Completion> {
        // Before the ring is looked at, so that nothing is missed.
        let _ = rustix::io::read(&self.event, &mut [0; 8]);
        let completions = self.reap();
        self.kick();
        completions
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
        let _ = rustix::io::read(&self.event, &mut [0; 8]);
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.drain();
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
            ring.submit(token, &ram, operation).unwrap();
        }
        ring.kick();
        let mut ended = BTreeSet::new();
        while ended.len() < 1000 {
            let event = ring.event();
            poll(&mut [PollFd::new(&event, PollFlags::IN)], None).unwrap();
            for completion in ring.completed() {
                completion.result.unwrap();
                assert!(ended.insert(completion.token));
            }
        }
        assert!(ring.transfers.is_empty() && ring.waiting.is_empty());
    }
}
