//! A device on the event loop: the driver's notifications and the host's descriptors come in here.
//!
//! The driver notifies a queue by writing its number to `QueueNotify`. That write exits to userspace, and the vCPU
//! thread posts the queue's event. When that has happened once, KVM is asked to do the same by itself: the register
//! becomes an *ioeventfd* for this one value, and further notifications never leave the kernel. (Not from the start:
//! registering one makes KVM wait for all vCPUs, which a guest that never uses the queue need not pay for.)

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::registers::QUEUE_NOTIFY;
use super::{Mmio, State};
use crate::hv;
use crate::virtio::{Malformed, VirtioDevice};
use crate::worker::{Event, EventLoop, Interest, Readiness};

/// The news that the driver has made requests available in one queue.
pub(super) struct Notification {
    event: Arc<Event>,
    /// KVM has been asked to post the event.
    offloaded: AtomicBool,
}

impl Notification {
    pub(super) fn new() -> Result<Notification, hv::Error> {
        let event = Event::new()
            .map_err(|error| hv::Error::new("make an eventfd for a virtio queue", error))?;
        Ok(Notification {
            event: Arc::new(event),
            offloaded: AtomicBool::default(),
        })
    }
}

impl Mmio {
    /// Puts the device on the loop, whose handle it was made with.
    ///
    /// # Errors
    /// When epoll refuses one of its descriptors.
    pub fn attach(self: &Arc<Self>, events: &mut EventLoop) -> io::Result<()> {
        for (queue, notification) in self.notifications.iter().enumerate() {
            let this = Arc::clone(self);
            events.add(
                Arc::clone(&notification.event),
                Interest::READ,
                Box::new(move |events, _, _| this.notified(events, queue)),
            )?;
        }
        let state = &mut *self.state();
        for (source, fd) in state.device.sources().into_iter().enumerate() {
            let this = Arc::clone(self);
            let token = events.add(
                fd,
                Interest::NONE,
                Box::new(move |events, _, readiness| this.ready(events, source, readiness)),
            )?;
            state.tokens.push(token);
        }
        Ok(())
    }

    /// The driver wrote `QueueNotify`, and KVM did not take it.
    pub(super) fn notify(&self, queue: u32) {
        let queue = usize::try_from(queue).unwrap_or(usize::MAX);
        if let Some(notification) = self.notifications.get(queue) {
            notification.event.post();
        }
    }

    /// Has the loop bring itself up to date with a device that was activated, reset or configured on a vCPU's thread.
    /// However often a guest does that, at most one task waits.
    pub(super) fn post_settle(&self) {
        if self.settling.swap(true, Ordering::SeqCst) {
            return;
        }
        let this = self.this.clone();
        self.worker.post(Box::new(move |events| {
            if let Some(this) = this.upgrade() {
                this.settle(events);
            }
        }));
    }

    fn settle(&self, events: &mut EventLoop) {
        self.settling.store(false, Ordering::SeqCst);
        let state = &mut *self.state();
        if std::mem::take(&mut state.unstarted) {
            for queue in 0..self.notifications.len() {
                self.call(state, |device| device.process(queue));
            }
        }
        set_interests(events, state);
    }

    pub(super) fn notified(&self, events: &mut EventLoop, queue: usize) {
        let Some(notification) = self.notifications.get(queue) else {
            return;
        };
        // Taken before the queue is looked at: what comes in from now on is another event.
        if !notification.event.take() {
            return;
        }
        let mut state = self.state();
        self.call(&mut state, |device| device.process(queue));
        set_interests(events, &state);
        let running = state.is_running();
        drop(state);
        if running && !notification.offloaded.swap(true, Ordering::Relaxed) {
            self.offload(&notification.event, queue);
        }
    }

    fn offload(&self, event: &Event, queue: usize) {
        let address = u64::from(self.place.address) + QUEUE_NOTIFY;
        let queue = u32::try_from(queue).unwrap_or(u32::MAX);
        if let Err(error) = self.vm.register_ioeventfd(event.eventfd(), address, queue) {
            log::warn!("{}: notifications stay slow: {error}", self.name);
        }
    }

    fn ready(&self, events: &mut EventLoop, source: usize, readiness: Readiness) {
        let state = &mut *self.state();
        self.call(state, |device| device.ready(source, readiness));
        set_interests(events, state);
    }

    /// Calls a device that is running.
    fn call(
        &self,
        state: &mut State,
        method: impl FnOnce(&mut dyn VirtioDevice) -> Result<(), Malformed>,
    ) {
        if state.is_running()
            && let Err(malformed) = method(&mut *state.device)
        {
            self.stall(state, malformed);
        }
    }
}

/// Has the loop wait for what the device waits for: for nothing, while it is not running.
fn set_interests(events: &mut EventLoop, state: &State) {
    let interests = if state.is_running() {
        state.device.interests()
    } else {
        Vec::new()
    };
    let interests = interests
        .into_iter()
        .chain(std::iter::repeat(Interest::NONE));
    for (token, interest) in state.tokens.iter().zip(interests) {
        if let Err(error) = events.set_interest(*token, interest) {
            log::warn!(
                "{}: the host cannot wait for it: {error}",
                state.device.name()
            );
        }
    }
}
