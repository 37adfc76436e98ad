//! The slow way to an image: a thread that makes one blocking call after the other.
//!
//! It serves raw images where the host has no io_uring, and qcow2 images always. Operations go to it through a channel
//! and come back through another, with a count on an eventfd for the event loop, which therefore never waits for
//! a disk: a guest's console stays alive while its disk is slow.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::task::Poll;
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, eventfd};

use super::{Completion, Engine, Operation};
use crate::mem::GuestRam;
use crate::worker::signals;

/// Does an operation and waits for its end.
pub(super) type Image = Box<dyn FnMut(&GuestRam, &Operation) -> io::Result<()> + Send>;

struct Job {
    token: u64,
    ram: GuestRam,
    operation: Operation,
}

/// One thread for one image.
pub(super) struct Thread {
    jobs: Option<Sender<Job>>,
    done: Receiver<Completion>,
    event: Arc<OwnedFd>,
    in_flight: usize,
    thread: Option<JoinHandle<()>>,
}

impl Thread {
    /// Starts the thread. `image` is dropped on it, after its last operation.
    pub fn new(mut image: Image) -> io::Result<Thread> {
        let event = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let (jobs, queue) = channel::<Job>();
        let (finished, done) = channel();
        let wake = Arc::clone(&event);
        let thread = std::thread::Builder::new()
            .name("disk".to_owned())
            .spawn(move || {
                signals::block_all();
                for job in queue {
                    let result = image(&job.ram, &job.operation);
                    // Guest memory is let go of before anybody hears that the operation has ended.
                    drop(job.ram);
                    let _ = finished.send(Completion {
                        token: job.token,
                        result,
                    });
                    let _ = rustix::io::write(&wake, &1_u64.to_ne_bytes());
                }
            })?;
        Ok(Thread {
            jobs: Some(jobs),
            done,
            event,
            in_flight: 0,
            thread: Some(thread),
        })
    }
}

impl Engine for Thread {
    fn event(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.event)
    }

    fn submit(&mut self, token: u64, ram: &GuestRam, operation: Operation) -> Poll<io::Result<()>> {
        let job = Job {
            token,
            ram: ram.clone(),
            operation,
        };
        let sent = self
            .jobs
            .as_ref()
            .is_some_and(|jobs| jobs.send(job).is_ok());
        if !sent {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        self.in_flight = self.in_flight.saturating_add(1);
        Poll::Pending
    }

    fn proceed(&mut self) -> Vec<Completion> {
        // Before the channel is looked at, so that nothing is missed.
        let _ = rustix::io::read(&self.event, &mut [0; 8]);
        let completions: Vec<Completion> = self.done.try_iter().collect();
        self.in_flight = self.in_flight.saturating_sub(completions.len());
        completions
    }

    fn is_stuck(&mut self) -> bool {
        false
    }

    fn drain(&mut self) {
        while self.in_flight > 0 {
            // A thread that is gone has nothing under way either.
            let gone = self.done.recv().is_err();
            self.in_flight = if gone { 0 } else { self.in_flight - 1 };
        }
        let _ = rustix::io::read(&self.event, &mut [0; 8]);
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            // It ends when its queue is empty. If it panicked, that has been printed already.
            let _ = thread.join();
        }
    }
}
