//! The threads that serve a share.
//!
//! A request may have to wait for a disk or a network of the host, so it runs on a thread of its own kind and not on the event
//! loop. A message comes with its bytes copied out of guest memory and goes back as bytes, so that these threads
//! never touch guest memory at all: a reset of the device need not wait for a request that the host does not finish. It
//! forgets it, and what comes of it later is dropped.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use rustix::event::{EventfdFlags, eventfd};

use super::server::Server;
use super::session::{Session, lock};
use crate::worker::signals;

/// How many requests of a share are worked on at once: some more than one, so that a slow one holds up few others.
const THREADS: usize = 4;

/// A request is done.
#[derive(Debug, PartialEq, Eq)]
pub struct Completion {
    /// What [`super::Share::submit`] was given.
    pub token: u64,
    /// What goes into the request's writable part; nothing for a request without an answer.
    pub answer: Vec<u8>,
}

struct Job {
    token: u64,
    generation: u64,
    session: Arc<Session>,
    message: Vec<u8>,
    /// Bytes that the answer may have.
    room: u32,
}

enum Work {
    Serve(Job),
    /// Many descriptors may have to be closed, which takes a while.
    Discard(Arc<Session>),
    End,
}

#[derive(Default)]
struct Done {
    /// Counts resets. What was started before the last one is of no interest any more.
    generation: u64,
    completions: Vec<Completion>,
}

struct Shared {
    work: Mutex<VecDeque<Work>>,
    arrived: Condvar,
    done: Mutex<Done>,
    event: Arc<OwnedFd>,
}

/// The threads, which end when this is dropped, each after what it is at.
pub(super) struct Pool(Arc<Shared>);

impl Pool {
    /// Starts the threads.
    pub fn start(server: &Server) -> io::Result<Pool> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let pool = Pool(Arc::new(Shared {
            work: Mutex::default(),
            arrived: Condvar::new(),
            done: Mutex::default(),
            event: Arc::new(event),
        }));
        for _ in 0..THREADS {
            let (shared, server) = (Arc::clone(&pool.0), server.clone());
            std::thread::Builder::new()
                .name("share".to_owned())
                .spawn(move || {
                    // A file that grows past the host's limit must fail, and not end the process by SIGXFSZ.
                    signals::block_all();
                    shared.run(&server);
                })?;
        }
        Ok(pool)
    }

    pub fn event(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.0.event)
    }

    /// Has a thread serve a message, whose answer comes with `completed`.
    pub fn submit(&self, token: u64, session: &Arc<Session>, message: Vec<u8>, room: u32) {
        let generation = lock(&self.0.done).generation;
        self.0.push(Work::Serve(Job {
            token,
            generation,
            session: Arc::clone(session),
            message,
            room,
        }));
    }

    pub fn completed(&self) -> Vec<Completion> {
        // Before the list is looked at, so that nothing is missed.
        let _ = rustix::io::read(&self.0.event, &mut [0; 8]);
        std::mem::take(&mut lock(&self.0.done).completions)
    }

    /// Drops all requests, those that are being worked on as well, and closes what `session` holds.
    pub fn reset(&self, session: Arc<Session>) {
        lock(&self.0.work).retain(|work| !matches!(work, Work::Serve(_)));
        let mut done = lock(&self.0.done);
        done.generation = done.generation.wrapping_add(1);
        done.completions = Vec::new();
        drop(done);
        let _ = rustix::io::read(&self.0.event, &mut [0; 8]);
        if !session.is_empty() {
            self.0.push(Work::Discard(session));
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        lock(&self.0.work).clear();
        for _ in 0..THREADS {
            self.0.push(Work::End);
        }
        // Not waited for: one may be stuck in the host.
    }
}

impl Shared {
    fn push(&self, work: Work) {
        lock(&self.work).push_back(work);
        self.arrived.notify_one();
    }

    fn next(&self) -> Work {
        let mut work = lock(&self.work);
        loop {
            if let Some(next) = work.pop_front() {
                return next;
            }
            work = self
                .arrived
                .wait(work)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn run(&self, server: &Server) {
        loop {
            let job = match self.next() {
                Work::Serve(job) => job,
                Work::Discard(session) => {
                    drop(session);
                    continue;
                }
                Work::End => return,
            };
            let answer = server.serve(&job.session, &job.message, job.room);
            // Its descriptors are closed before anybody hears of the end.
            drop((job.session, job.message));
            let mut done = lock(&self.done);
            if done.generation == job.generation {
                done.completions.push(Completion {
                    token: job.token,
                    answer,
                });
                let _ = rustix::io::write(&self.event, &1_u64.to_ne_bytes());
            }
        }
    }
}
