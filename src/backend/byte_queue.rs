//! A bounded queue of bytes between a device and its backend.
//!
//! The wire of a serial line, one direction of it. The device's end never waits: it is told that the
//! queue is full, or empty, and makes of it what its hardware would. The backend's end sleeps on an
//! eventfd, which the device's end writes only when there is news that a sleeper cannot know of:
//!
//! * output: the first byte since the loop last looked (not one write for every byte);
//! * input: the first room in a queue that was full (not one write for every byte taken).

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, eventfd};

/// Bytes of console output that wait for a slow reader before the guest finds its transmitter busy.
pub const OUTPUT_CAPACITY: usize = 1 << 20;
/// Bytes of console input that wait for the guest before the host is no longer read.
pub const INPUT_CAPACITY: usize = 4 << 10;

/// What wakes the backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wake {
    Filled,
    Room,
}

#[derive(Debug)]
struct Bytes {
    queue: VecDeque<u8>,
    /// How many, at the back, the consumer has not been shown by [`ByteQueue::look`].
    unseen: usize,
    /// There is no consumer: what comes in is gone.
    discarding: bool,
}

/// A bounded first-in first-out queue of bytes.
#[derive(Debug)]
pub struct ByteQueue {
    bytes: Mutex<Bytes>,
    capacity: usize,
    wake: Wake,
    event: Arc<OwnedFd>,
}

impl ByteQueue {
    /// From the guest to the host: wakes the loop when bytes have come in. Holds
    /// [`OUTPUT_CAPACITY`].
    ///
    /// # Errors
    /// When the host has no file descriptors left.
    pub fn output() -> io::Result<ByteQueue> {
        ByteQueue::output_of(OUTPUT_CAPACITY)
    }

    /// The same, holding `capacity` bytes.
    ///
    /// # Errors
    /// When the host has no file descriptors left.
    pub fn output_of(capacity: usize) -> io::Result<ByteQueue> {
        ByteQueue::new(capacity, Wake::Filled)
    }

    /// From the host to the guest: wakes the loop when a full queue has room again. Holds
    /// [`INPUT_CAPACITY`].
    ///
    /// # Errors
    /// When the host has no file descriptors left.
    pub fn input() -> io::Result<ByteQueue> {
        ByteQueue::input_of(INPUT_CAPACITY)
    }

    /// The same, holding `capacity` bytes.
    ///
    /// # Errors
    /// When the host has no file descriptors left.
    pub fn input_of(capacity: usize) -> io::Result<ByteQueue> {
        ByteQueue::new(capacity, Wake::Room)
    }

    fn new(capacity: usize, wake: Wake) -> io::Result<ByteQueue> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(ByteQueue {
            bytes: Mutex::new(Bytes {
                queue: VecDeque::new(),
                unseen: 0,
                discarding: false,
            }),
            capacity,
            wake,
            event: Arc::new(event),
        })
    }

    /// Appends a byte; `false` when the queue is full and the byte was not taken.
    pub fn push(&self, byte: u8) -> bool {
        self.push_slice(&[byte]) == 1
    }

    /// Appends as many of `bytes` as there is room for, and says how many.
    pub fn push_slice(&self, bytes: &[u8]) -> usize {
        let mut inner = self.lock();
        if inner.discarding {
            return bytes.len();
        }
        let taken = bytes
            .len()
            .min(self.capacity.saturating_sub(inner.queue.len()));
        inner.queue.extend(bytes.get(..taken).unwrap_or_default());
        let news = inner.unseen == 0 && taken > 0;
        inner.unseen = inner.unseen.saturating_add(taken);
        drop(inner);
        if news && self.wake == Wake::Filled {
            self.signal();
        }
        taken
    }

    /// Takes the oldest byte.
    pub fn pop(&self) -> Option<u8> {
        let mut inner = self.lock();
        let byte = inner.queue.pop_front();
        self.taken(inner, usize::from(byte.is_some()));
        byte
    }

    /// Moves the oldest bytes to `buffer`, as many as fit, and says how many.
    pub fn drain_into(&self, buffer: &mut [u8]) -> usize {
        let mut inner = self.lock();
        let count = copy_front(&inner.queue, buffer);
        inner.queue.drain(..count);
        self.taken(inner, count);
        count
    }

    /// The same for a consumer that does not [`look`](ByteQueue::look) first: whatever is left, the next byte wakes it
    /// again. Also says whether the queue was full and has room now.
    pub fn take(&self, buffer: &mut [u8]) -> (usize, bool) {
        let mut inner = self.lock();
        inner.unseen = 0;
        let count = copy_front(&inner.queue, buffer);
        inner.queue.drain(..count);
        (count, self.taken(inner, count))
    }

    /// Copies the oldest bytes to `buffer`, as many as fit, and leaves them in the queue. Only bytes that
    /// [`ByteQueue::look`] has shown are there to be copied, so that none is consumed unseen.
    pub fn peek(&self, buffer: &mut [u8]) -> usize {
        let inner = self.lock();
        let seen = inner.queue.len().saturating_sub(inner.unseen);
        let (buffer, _) = buffer.split_at_mut(seen.min(buffer.len()));
        copy_front(&inner.queue, buffer)
    }

    /// Drops the `count` oldest bytes; `true` when the queue was full and has room now.
    pub fn consume(&self, count: usize) -> bool {
        let mut inner = self.lock();
        let count = count.min(inner.queue.len());
        inner.queue.drain(..count);
        self.taken(inner, count)
    }

    /// The bytes that came in since the last call, left in the queue. The next byte after this call
    /// wakes the loop again, whether or not these have been consumed by then.
    pub fn look(&self) -> Vec<u8> {
        let mut inner = self.lock();
        let seen = inner.queue.len().saturating_sub(inner.unseen);
        inner.unseen = 0;
        let (front, back) = inner.queue.as_slices();
        let mut new = front.get(seen..).unwrap_or_default().to_vec();
        new.extend_from_slice(
            back.get(seen.saturating_sub(front.len())..)
                .unwrap_or_default(),
        );
        new
    }

    /// Has the next byte wake the loop again, as [`ByteQueue::look`] does, for a consumer that peeks at everything.
    pub fn see_all(&self) {
        self.lock().unseen = 0;
    }

    /// Throws away what waits and all that comes in from now on, as if somebody read it at once; or keeps it again.
    /// `true` when the queue was full.
    pub fn discard(&self, discarding: bool) -> bool {
        let mut inner = self.lock();
        let was_full = inner.queue.len() >= self.capacity;
        inner.queue.clear();
        inner.unseen = 0;
        inner.discarding = discarding;
        was_full
    }

    /// How many more bytes fit.
    pub fn room(&self) -> usize {
        self.capacity.saturating_sub(self.lock().queue.len())
    }

    /// Whether another byte fits.
    pub fn has_room(&self) -> bool {
        self.room() > 0
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.lock().queue.is_empty()
    }

    /// Writes the eventfd for news that is not about bytes.
    pub fn wake(&self) {
        self.signal();
    }

    /// The eventfd for the event loop to watch.
    pub fn event(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.event)
    }

    /// Clears the eventfd. To be called *before* looking at the queue, so that no news is missed.
    pub fn acknowledge(&self) {
        let _ = rustix::io::read(&self.event, &mut [0; 8]);
    }

    /// After `count` bytes left the front. Wakes the loop if that is what it sleeps for.
    fn taken(&self, mut inner: MutexGuard<'_, Bytes>, count: usize) -> bool {
        let left = inner.queue.len();
        inner.unseen = inner.unseen.min(left);
        drop(inner);
        let was_full = count > 0 && left.saturating_add(count) >= self.capacity;
        if was_full && self.wake == Wake::Room {
            self.signal();
        }
        was_full
    }

    fn signal(&self) {
        // Fails only when the counter is at its maximum, and then the loop has been woken already.
        let _ = rustix::io::write(&self.event, &1_u64.to_ne_bytes());
    }

    fn lock(&self) -> MutexGuard<'_, Bytes> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Copies the oldest bytes, as many as there are and fit, and says how many.
fn copy_front(queue: &VecDeque<u8>, buffer: &mut [u8]) -> usize {
    let mut copied = 0;
    let (front, back) = queue.as_slices();
    for slice in [front, back] {
        let (_, room) = buffer.split_at_mut(copied);
        let count = slice.len().min(room.len());
        let (to, _) = room.split_at_mut(count);
        to.copy_from_slice(slice.get(..count).unwrap_or_default());
        copied = copied.saturating_add(count);
    }
    copied
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How often the eventfd was written since the last call.
    fn wakes(queue: &ByteQueue) -> u64 {
        let mut count = [0; 8];
        match rustix::io::read(&queue.event, &mut count) {
            Ok(_) => u64::from_ne_bytes(count),
            Err(_) => 0,
        }
    }

    #[test]
    fn a_full_output_queue_refuses_and_keeps_the_order_of_what_it_has() {
        let queue = ByteQueue::output().unwrap();
        assert_eq!(
            queue.push_slice(&vec![b'a'; OUTPUT_CAPACITY - 1]),
            OUTPUT_CAPACITY - 1
        );
        assert_eq!(queue.push_slice(b"bc"), 1);
        assert!(!queue.push(b'c') && !queue.has_room());
        assert!(queue.consume(1), "it was full");
        assert!(!queue.consume(OUTPUT_CAPACITY - 2), "it was not");
        assert_eq!((queue.pop(), queue.pop()), (Some(b'b'), None));
    }

    #[test]
    fn output_wakes_the_loop_once_for_all_that_it_has_not_seen() {
        let queue = ByteQueue::output().unwrap();
        assert_eq!((queue.push_slice(b"one"), queue.push(b'!')), (3, true));
        assert_eq!(wakes(&queue), 1);
        let mut buffer = [0; 8];
        assert_eq!(queue.peek(&mut buffer), 0, "nothing has been looked at");
        assert_eq!(queue.look(), b"one!");
        assert!(queue.push(b'?'));
        assert_eq!(queue.peek(&mut buffer), 4, "the last has not");
        assert_eq!(wakes(&queue), 1, "even though the rest was not consumed");
        assert_eq!(queue.look(), b"?");
        assert_eq!(queue.peek(&mut buffer), 5);
        assert_eq!(queue.drain_into(&mut buffer), 5);
        assert_eq!(buffer.get(..5), Some(&b"one!?"[..]));
        assert_eq!(queue.look(), b"");
    }

    #[test]
    fn input_wakes_the_loop_only_when_a_full_queue_gets_room() {
        let queue = ByteQueue::input().unwrap();
        assert_eq!(queue.push_slice(&[7; INPUT_CAPACITY + 1]), INPUT_CAPACITY);
        assert_eq!(wakes(&queue), 0);
        assert_eq!((queue.pop(), queue.pop()), (Some(7), Some(7)));
        assert_eq!(wakes(&queue), 1);
    }

    #[test]
    fn a_queue_that_wraps_around_keeps_the_order_in_each_way_of_reading() {
        let queue = ByteQueue::output_of(8).unwrap();
        let mut buffer = [0; 16];
        assert_eq!(queue.push_slice(b"abcdef"), 6);
        assert_eq!(queue.drain_into(buffer.get_mut(..5).unwrap()), 5);
        assert_eq!(queue.push_slice(b"ghijklmnop"), 7);
        assert_eq!(queue.look(), b"fghijklm");
        assert_eq!(queue.peek(&mut buffer), 8);
        assert_eq!(buffer.get(..8), Some(&b"fghijklm"[..]));
        assert_eq!(queue.peek(buffer.get_mut(..3).unwrap()), 3);
        assert_eq!(queue.drain_into(&mut buffer), 8);
        assert_eq!(buffer.get(..8), Some(&b"fghijklm"[..]));
    }

    #[test]
    fn a_queue_without_a_consumer_takes_everything_and_keeps_nothing() {
        let queue = ByteQueue::output_of(4).unwrap();
        assert_eq!(queue.push_slice(b"abcd"), 4);
        assert!(queue.discard(true));
        assert_eq!(wakes(&queue), 1);
        assert_eq!(queue.push_slice(b"abcdef"), 6);
        assert!(queue.is_empty() && queue.has_room());
        assert_eq!(wakes(&queue), 0);
        assert!(!queue.discard(false));
        assert_eq!(queue.push_slice(b"abcdef"), 4);
        assert_eq!(wakes(&queue), 1);
    }
}
