//! An eventfd: the smallest thing that one thread, or the kernel, can wake an event loop with (eventfd(2)).
//!
//! A 64-bit counter behind a file descriptor. A post adds one; while it is not zero, the descriptor is readable; taking
//! it reads it back to zero, so that many posts are one wake-up. KVM posts one in the guest's stead when the guest
//! writes a register that is an ioeventfd.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// An event that a loop waits for with [`Interest::READ`](super::Interest::READ), and whose handler takes it.
#[derive(Debug)]
pub struct Event(EventFd);

impl Event {
    /// An event that has not been posted.
    ///
    /// # Errors
    /// When the host has no file descriptors left.
    pub fn new() -> io::Result<Event> {
        EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map(Event)
    }

    /// Wakes the loop. Never blocks.
    pub fn post(&self) {
        // Fails only when 2^64 - 2 posts wait to be taken, and then the loop has been woken already.
        let _ = self.0.write(1);
    }

    /// Whether it has been posted since it was last taken.
    pub fn take(&self) -> bool {
        self.0.read().is_ok()
    }

    /// The descriptor in the form in which the hypervisor takes it.
    pub fn eventfd(&self) -> &EventFd {
        &self.0
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open for as long as `self` is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_posts_are_one_event() {
        let event = Event::new().unwrap();
        assert!(!event.take());
        event.post();
        event.post();
        assert!(event.take());
        assert!(!event.take());
    }
}
