//! Waits for devices, which appear some time after their drivers.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use crate::sys::{self, PollFd};

/// The kernel tells when a device appears, but not when it gets a name or a size; so a waiter looks again after this.
const TICK: Duration = Duration::from_millis(20);

/// Calls `look` until it finds something, whenever there is news of devices; `None` after `longest`.
pub fn wait_until<T>(longest: Duration, mut look: impl FnMut() -> Option<T>) -> Option<T> {
    // Listen before looking, so that no news is missed.
    let news: Option<OwnedFd> = sys::device_news().ok();
    let start = Instant::now();
    loop {
        if let Some(found) = look() {
            return Some(found);
        }
        let left = longest.checked_sub(start.elapsed())?;
        let mut fds: Vec<PollFd> = news
            .iter()
            .map(|news| PollFd::new(news.as_fd(), sys::POLLIN))
            .collect();
        let _ = sys::wait_for(&mut fds, Some(left.min(TICK)));
        if let Some(news) = &news {
            while sys::receive(news, &mut [0; 4096]).is_ok() {}
        }
    }
}
