//! The transmit queue: the driver's frames to the host (virtio 1.3 §5.1.6.2).
//!
//! A request is a header and a frame, in one buffer or several. They go to the backend from where they lie. When the
//! backend has no room, the request stays in the queue until it has; when a rate limit has been reached, until its timer
//! goes off.

use super::{Counters, Failure};
use crate::backend::net::{FRAME_MAX, FRAME_MIN, HEADER_LEN, NetBackend, Piece, Sent};
use crate::virtio::Malformed;
use crate::virtio::dev::throttle::Throttle;
use crate::virtio::queue::{Chain, VirtQueue};

/// Frames sent in one turn of the event loop, so that a flood leaves other devices their turns.
const FRAMES_PER_TURN: u32 = 256;

/// The transmit queue of one pair.
pub(super) struct Transmit {
    pub(super) queue: VirtQueue,
    /// The queue is not done, and goes on when the backend's descriptor is ready for writing.
    waiting: bool,
}

impl Transmit {
    pub(super) fn new(queue: VirtQueue) -> Transmit {
        Transmit {
            queue,
            waiting: false,
        }
    }

    /// Whether to go on as soon as the backend can be written to.
    pub(super) fn waits_for_room(&self) -> bool {
        self.waiting
    }

    /// Sends what frames there are. Without a backend they are dropped.
    pub(super) fn run(
        &mut self,
        mut backend: Option<&mut (dyn NetBackend + 'static)>,
        pair: u16,
        counters: &mut Counters,
        mut throttle: Option<&mut Throttle>,
    ) -> Result<(), Failure> {
        self.waiting = false;
        self.queue.disable_notification()?;
        let mut frames = 0_u32;
        let result = loop {
            if frames >= FRAMES_PER_TURN {
                // A host that has room calls at once; where there is no host, nobody does.
                self.waiting = backend.is_some();
                if !self.waiting {
                    self.queue.call_again();
                }
                break Ok(());
            }
            frames = frames.saturating_add(1);
            let Some(chain) = self.queue.pop()? else {
                self.queue.notify()?;
                if self.queue.enable_notification()? {
                    self.queue.disable_notification()?;
                    continue;
                }
                break Ok(());
            };
            // Without a backend, there is nothing to limit.
            let limit = throttle.as_mut().filter(|_| backend.is_some());
            if limit.is_some_and(|limit| !limit.is_open()) {
                self.queue.unpop();
                break Ok(());
            }
            match send(&mut backend, pair, &self.queue, &chain) {
                Ok(Sent::NoRoom) => {
                    self.queue.unpop();
                    self.waiting = true;
                    break Ok(());
                }
                Ok(Sent::Whole) => {
                    counters.sent = counters.sent.saturating_add(1);
                    if let Some(throttle) = &mut throttle {
                        let len = chain.readable_len() as usize;
                        throttle.charge(len.saturating_sub(HEADER_LEN) as u64);
                    }
                }
                Ok(Sent::Refused) => {
                    counters.transmit_dropped = counters.transmit_dropped.saturating_add(1);
                }
                Err(failure) => {
                    self.queue.unpop();
                    break Err(failure);
                }
            }
            self.queue.push_used(chain.head(), 0)?;
        };
        self.queue.notify()?;
        result
    }
}

fn send(
    backend: &mut Option<&mut (dyn NetBackend + 'static)>,
    pair: u16,
    queue: &VirtQueue,
    chain: &Chain,
) -> Result<Sent, Failure> {
    if chain.readable().len() > usize::from(queue.size()) {
        return Err(Malformed::Chain.into());
    }
    let len = chain.readable_len() as usize;
    if len < HEADER_LEN {
        return Err(Malformed::Request.into());
    }
    let Some(backend) = backend else {
        return Ok(Sent::Refused);
    };
    if !(FRAME_MIN..=FRAME_MAX).contains(&len) {
        return Ok(Sent::Refused);
    }
    let pieces: Vec<Piece> = chain
        .readable()
        .iter()
        .map(|buffer| (buffer.address, buffer.len))
        .collect();
    Ok(backend.send(pair, queue.ram(), &pieces)?)
}
