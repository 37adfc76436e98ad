//! How other threads reach a machine: messages in a queue, which the machine's own thread sees to between two rounds of its
//! event loop.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex};

use super::{StoppedBy, lock};
use crate::cpu::VcpuEnd;
use crate::worker;

/// What other threads ask of a machine.
pub(super) enum Message {
    VcpuEnded(u32, VcpuEnd),
    PowerButton,
    Stop(StoppedBy),
    Pause,
    Resume,
    TimeoutPassed,
    /// A file that the guest has as memory is not whole any more.
    FileCut,
    CommandOver,
    /// The last of the steps was to wait for something, and it came.
    Expected,
    WorkerFailed(String, io::Error),
}

/// Reaches a machine from other threads.
#[derive(Clone)]
pub struct MachineHandle {
    messages: Arc<Mutex<VecDeque<Message>>>,
    worker: worker::Handle,
}

impl MachineHandle {
    /// Reaches the machine whose event loop `worker` stops.
    pub(super) fn new(worker: worker::Handle) -> MachineHandle {
        MachineHandle {
            messages: Arc::default(),
            worker,
        }
    }

    /// Presses the power button. What follows is up to the guest.
    pub fn power_button(&self) {
        self.send(Message::PowerButton);
    }

    /// Ends the run with [`Outcome::Stopped`](super::Outcome::Stopped), whatever the guest is doing.
    pub fn stop(&self, by: StoppedBy) {
        self.send(Message::Stop(by));
    }

    /// Stops all vCPUs between two instructions.
    pub fn pause(&self) {
        self.send(Message::Pause);
    }

    /// Lets a paused machine run on.
    pub fn resume(&self) {
        self.send(Message::Resume);
    }

    pub(super) fn send(&self, message: Message) {
        lock(&self.messages).push_back(message);
        // The event loop returns, and the machine's thread sees to its messages.
        self.worker.stop();
    }

    pub(super) fn next(&self) -> Option<Message> {
        lock(&self.messages).pop_front()
    }
}
