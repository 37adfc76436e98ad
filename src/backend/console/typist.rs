//! A program that types at the console, ahead of the host's own input.
//!
//! What it types goes into a buffer here, and from there into the guest's queue as that has room, so that nothing is
//! lost to a slow guest. As long as it sits there, what comes from the host waits: a pipe is not read, keys at a
//! terminal are kept for afterwards; only the keys for the VMM work.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::backend::ByteQueue;

/// Types at a console, from any thread.
#[derive(Clone, Debug)]
pub struct Typist {
    desk: Arc<Mutex<Desk>>,
    /// The guest's queue, whose eventfd wakes the loop.
    queue: Arc<ByteQueue>,
}

#[derive(Debug, Default)]
struct Desk {
    /// Typed, but the guest's queue is full.
    text: VecDeque<u8>,
    left: bool,
}

impl Typist {
    pub(super) fn new(queue: Arc<ByteQueue>) -> Typist {
        Typist {
            desk: Arc::default(),
            queue,
        }
    }

    /// Types `text` after what was typed before.
    pub fn write(&self, text: &[u8]) {
        self.lock().text.extend(text);
        self.queue.wake();
    }

    /// Types no more: after what was typed, the host's input is the guest's.
    pub fn leave(&self) {
        self.lock().left = true;
        self.queue.wake();
    }

    /// Whether the host's input has to wait.
    pub(super) fn is_typing(&self) -> bool {
        let desk = self.lock();
        !desk.left || !desk.text.is_empty()
    }

    /// Moves text into the guest's queue, as much as there is room for, and says how much.
    pub(super) fn deliver(&self) -> usize {
        let mut desk = self.lock();
        let count = self.queue.push_slice(desk.text.make_contiguous());
        desk.text.drain(..count);
        count
    }

    fn lock(&self) -> MutexGuard<'_, Desk> {
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
