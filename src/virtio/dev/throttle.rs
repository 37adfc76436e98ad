//! A rate limit with its timer, for a device.
//!
//! The arithmetic is [`crate::backend::rate`]'s. This adds the clock and a timerfd: a device that may not go on takes no
//! more requests from its queues until the timer, one of its [`sources`](crate::virtio::VirtioDevice::sources), is
//! readable.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::timer;
use crate::backend::rate::{Limiter, Limits};

/// A rate limit with its timer.
pub struct Throttle {
    limiter: Limiter,
    since: Instant,
    timer: Arc<OwnedFd>,
}

impl Throttle {
    /// `None` when nothing is limited.
    ///
    /// # Errors
    /// When the host gives no timer.
    pub fn new(limits: Limits) -> io::Result<Option<Throttle>> {
        if limits.is_unlimited() {
            return Ok(None);
        }
        Ok(Some(Throttle {
            limiter: Limiter::new(limits, Duration::ZERO),
            since: Instant::now(),
            timer: Arc::new(timer::idle()?),
        }))
    }

    /// The timer, for the event loop to watch.
    pub fn timer(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.timer)
    }

    /// Whether an operation that moves `bytes` bytes may start now, which counts it. If not, the timer will say when to
    /// ask again.
    pub fn admits(&mut self, bytes: u64) -> bool {
        let answer = self.limiter.take(bytes, self.since.elapsed());
        self.or_timer(answer)
    }

    /// Whether an operation may start now whose size is not known yet. If not, the timer will say when to ask again; if
    /// so, [`Throttle::charge`] has to be told what it moved.
    pub fn is_open(&mut self) -> bool {
        let answer = self.limiter.open(self.since.elapsed());
        self.or_timer(answer)
    }

    /// An operation has moved `bytes` bytes.
    pub fn charge(&mut self, bytes: u64) {
        self.limiter.charge(bytes);
    }

    fn or_timer(&self, answer: Result<(), Duration>) -> bool {
        if let Err(wait) = answer {
            timer::once(&self.timer, wait);
        }
        answer.is_ok()
    }

    /// The timer has been seen.
    pub fn acknowledge(&self) {
        timer::acknowledge(&self.timer);
    }

    /// Nobody waits any more.
    pub fn stop(&self) {
        timer::once(&self.timer, Duration::ZERO);
    }
}
