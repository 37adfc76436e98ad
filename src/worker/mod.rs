//! The event loop that devices run on.
//!
//! A vCPU thread must get back to its guest at once, so a device never waits in it for the host.
//! What may have to wait (a terminal, a file, a timer) is a handler on this loop instead: one
//! thread, asleep in `epoll_wait(2)` until a file descriptor is ready, a timer is due, or another
//! thread wakes it through an eventfd. Data moves from vCPU to worker and back through queues that
//! the two sides share; the loop itself carries only the news that there is something to do.
//!
//! Readiness is *level-triggered*: a handler is called again and again while its descriptor is
//! ready. A handler with nothing to do must therefore drop its interest ([`EventLoop::set_interest`]
//! with [`Interest::NONE`]), or the loop would spin. A descriptor without interest is taken out of the
//! epoll set altogether, because epoll reports hang-ups and errors even to those who asked for nothing.

#[cfg(test)]
pub(crate) mod children;
pub mod signals;
pub mod threads;

use std::collections::BTreeMap;
use std::io;
use std::ops::BitOr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};
use rustix::io::Errno;

/// What a handler waits for, and what it is told of: reading, writing, both or nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Interest(u8);

/// Which of the interests are ready: a read or write now will not block. It may fail: a hang-up
/// or an error makes every interest ready, so that the system call can say what happened.
pub type Readiness = Interest;

impl Interest {
    /// Leave the descriptor alone until asked again.
    pub const NONE: Interest = Interest(0);
    /// Reading will not block.
    pub const READ: Interest = Interest(1);
    /// Writing will not block; for a pipe, at least `PIPE_BUF` (4096) bytes.
    pub const WRITE: Interest = Interest(2);

    /// Whether nothing is in it.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether all of `other` is in it.
    pub fn contains(self, other: Interest) -> bool {
        self.0 & other.0 == other.0
    }

    fn flags(self) -> epoll::EventFlags {
        let mut flags = epoll::EventFlags::empty();
        flags.set(epoll::EventFlags::IN, self.contains(Interest::READ));
        flags.set(epoll::EventFlags::OUT, self.contains(Interest::WRITE));
        flags
    }

    /// The part of this interest that epoll's answer makes ready.
    fn met_by(self, flags: epoll::EventFlags) -> Readiness {
        if flags.intersects(epoll::EventFlags::HUP | epoll::EventFlags::ERR) {
            return self;
        }
        let mut ready = 0;
        if flags.contains(epoll::EventFlags::IN) {
            ready |= Interest::READ.0;
        }
        if flags.contains(epoll::EventFlags::OUT) {
            ready |= Interest::WRITE.0;
        }
        Interest(self.0 & ready)
    }
}

impl BitOr for Interest {
    type Output = Interest;

    fn bitor(self, other: Interest) -> Interest {
        Interest(self.0 | other.0)
    }
}

/// One registered descriptor. Never reused within a loop, so a stale token is harmless.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Token(u64);

/// One pending timer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timer {
    due: Instant,
    serial: u64,
}

/// Called with the loop, so that it may register and remove, with its own token and what is ready.
pub type Handler = Box<dyn FnMut(&mut EventLoop, Token, Readiness) + Send>;
/// Called once on the loop's thread.
pub type Task = Box<dyn FnOnce(&mut EventLoop) + Send>;

struct Source {
    fd: Box<dyn AsFd + Send>,
    interest: Interest,
    /// Out of the epoll set, because epoll cannot watch it: it is always ready.
    always_ready: bool,
    /// Out of the loop's hands while it runs.
    handler: Option<Handler>,
}

struct Shared {
    wake: OwnedFd,
    tasks: Mutex<Vec<Task>>,
    stop: AtomicBool,
}

/// The event loop. Runs on whichever thread calls [`EventLoop::run`].
pub struct EventLoop {
    epoll: OwnedFd,
    sources: BTreeMap<Token, Source>,
    timers: BTreeMap<Timer, Task>,
    next: u64,
    shared: Arc<Shared>,
}

/// A way for other threads to reach the loop.
#[derive(Clone)]
pub struct Handle(Arc<Shared>);

impl Handle {
    /// Has `task` run on the loop's thread, in the order of posting. Never blocks. If the loop has
    /// stopped, the task waits for the next run, or is dropped with the loop.
    pub fn post(&self, task: Task) {
        self.0
            .tasks
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(task);
        self.wake();
    }

    /// Makes [`EventLoop::run`] return after the handlers of the present round.
    pub fn stop(&self) {
        self.0.stop.store(true, Ordering::Release);
        self.wake();
    }

    fn wake(&self) {
        // Fails only when the counter is at its maximum, and then the loop has been woken already.
        let _ = rustix::io::write(&self.0.wake, &1_u64.to_ne_bytes());
    }
}

/// The token under which epoll knows the loop's own eventfd.
const WAKE: u64 = 0;
/// How many ready descriptors one `epoll_wait` reports; the others are reported by the next.
const EVENTS_PER_ROUND: usize = 32;

impl EventLoop {
    /// An empty loop.
    ///
    /// # Errors
    /// When the host has no file descriptors left.
    pub fn new() -> io::Result<EventLoop> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        epoll::add(
            &epoll,
            &wake,
            epoll::EventData::new_u64(WAKE),
            epoll::EventFlags::IN,
        )?;
        let shared = Arc::new(Shared {
            wake,
            tasks: Mutex::default(),
            stop: AtomicBool::new(false),
        });
        Ok(EventLoop {
            epoll,
            sources: BTreeMap::new(),
            timers: BTreeMap::new(),
            next: WAKE + 1,
            shared,
        })
    }

    /// A handle for other threads.
    pub fn handle(&self) -> Handle {
        Handle(Arc::clone(&self.shared))
    }

    /// Has `handler` called whenever `fd` is ready for one of `interest`. The loop keeps `fd` (an
    /// owned descriptor, or an `Arc` of one) until [`EventLoop::remove`].
    ///
    /// Regular files and a few devices such as `/dev/null` cannot be watched by epoll (`EPERM`),
    /// since they never make anyone wait. They count as ready at all times.
    ///
    /// # Errors
    /// When epoll refuses: out of memory or watches, or `fd` is registered already.
    pub fn add(
        &mut self,
        fd: impl AsFd + Send + 'static,
        interest: Interest,
        handler: Handler,
    ) -> io::Result<Token> {
        let token = Token(self.next);
        // An interest of both finds out whether epoll takes this kind of file at all.
        let always_ready = match watch(
            &self.epoll,
            fd.as_fd(),
            token,
            Interest::READ | Interest::WRITE,
        ) {
            Ok(()) => {
                match interest {
                    Interest::NONE => epoll::delete(&self.epoll, &fd)?,
                    _ => rewatch(&self.epoll, fd.as_fd(), token, interest)?,
                }
                false
            }
            Err(Errno::PERM) => true,
            Err(error) => return Err(error.into()),
        };
        self.next = self.next.saturating_add(1);
        self.sources.insert(
            token,
            Source {
                fd: Box::new(fd),
                interest,
                always_ready,
                handler: Some(handler),
            },
        );
        Ok(token)
    }

    /// Changes what the handler of `token` waits for. A token that was removed is ignored.
    ///
    /// # Errors
    /// When epoll is out of memory or watches.
    pub fn set_interest(&mut self, token: Token, interest: Interest) -> io::Result<()> {
        let Some(source) = self.sources.get_mut(&token) else {
            return Ok(());
        };
        let before = std::mem::replace(&mut source.interest, interest);
        if source.always_ready || before == interest {
            return Ok(());
        }
        let fd = source.fd.as_fd();
        match (before, interest) {
            (Interest::NONE, _) => watch(&self.epoll, fd, token, interest),
            (_, Interest::NONE) => epoll::delete(&self.epoll, fd),
            _ => rewatch(&self.epoll, fd, token, interest),
        }
        .map_err(io::Error::from)
    }

    /// Forgets a descriptor and its handler, and lets go of both. May be called by that handler.
    pub fn remove(&mut self, token: Token) {
        if let Some(source) = self.sources.remove(&token)
            && !source.always_ready
            && !source.interest.is_empty()
        {
            // Cannot fail for a descriptor that is in the set.
            let _ = epoll::delete(&self.epoll, source.fd.as_fd());
        }
    }

    /// Runs `task` once, `delay` from now.
    pub fn after(&mut self, delay: Duration, task: Task) -> Timer {
        let now = Instant::now();
        let timer = Timer {
            // A delay past the end of time is as good as a hundred years.
            due: now
                .checked_add(delay)
                .unwrap_or(now + Duration::from_secs(100 * 365 * 86_400)),
            serial: self.next,
        };
        self.next = self.next.saturating_add(1);
        self.timers.insert(timer, task);
        timer
    }

    /// Forgets a timer. One that has fired already is ignored.
    pub fn cancel(&mut self, timer: Timer) {
        self.timers.remove(&timer);
    }

    /// Makes [`EventLoop::run`] return after the handlers of the present round.
    pub fn stop(&self) {
        self.shared.stop.store(true, Ordering::Release);
    }

    /// Serves descriptors, timers and posted tasks until somebody calls `stop`. Tasks that were
    /// posted before the stop have run when this returns. May be called again afterwards.
    ///
    /// # Errors
    /// When `epoll_wait` fails, which it does only if its own descriptor is broken.
    pub fn run(&mut self) -> io::Result<()> {
        loop {
            let stopping = self.shared.stop.swap(false, Ordering::Acquire);
            self.run_tasks();
            if stopping {
                return Ok(());
            }
            // A task may have asked to stop, which is not to be slept over.
            if !self.shared.stop.load(Ordering::Acquire) {
                self.round(None)?;
            }
        }
    }

    /// One turn of the loop, for tests that drive it themselves: serves what there is, and waits for it for `most` at
    /// most. The result is whether there was anything.
    ///
    /// # Errors
    /// As for [`EventLoop::run`].
    #[cfg(any(test, fuzzing))]
    pub(crate) fn turn(&mut self, most: Duration) -> io::Result<bool> {
        self.run_tasks();
        self.round(Some(most))
    }

    /// Waits until something is ready or due, for `most` at most, and serves it; `false` when there was nothing.
    fn round(&mut self, most: Option<Duration>) -> io::Result<bool> {
        let mut events = Vec::with_capacity(EVENTS_PER_ROUND);
        let timeout = self.timeout(most);
        match epoll::wait(
            &self.epoll,
            rustix::buffer::spare_capacity(&mut events),
            timeout.as_ref(),
        ) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let always: Vec<Token> = self
            .sources
            .iter()
            .filter(|(_, source)| source.always_ready && !source.interest.is_empty())
            .map(|(token, _)| *token)
            .collect();
        let mut served = !events.is_empty() || !always.is_empty();
        for event in &events {
            // `Event` is a packed structure: its fields are copied out, not borrowed.
            let (data, flags) = (event.data, event.flags);
            match data.u64() {
                WAKE => {
                    let _ = rustix::io::read(&self.shared.wake, &mut [0; 8]);
                }
                token => self.call(Token(token), flags),
            }
        }
        for token in always {
            self.call(token, epoll::EventFlags::IN | epoll::EventFlags::OUT);
        }
        served |= self.fire_timers();
        Ok(served)
    }

    /// How long to sleep, `most` at most, rounded up to whole milliseconds so that no timer is woken up for early.
    fn timeout(&self, most: Option<Duration>) -> Option<Timespec> {
        let busy = self
            .sources
            .values()
            .any(|source| source.always_ready && !source.interest.is_empty());
        let wait = if busy {
            Duration::ZERO
        } else {
            let next = self.timers.first_key_value();
            let due = next.map(|(timer, _)| timer.due.saturating_duration_since(Instant::now()));
            due.into_iter().chain(most).min()?
        };
        let millis = wait.as_nanos().div_ceil(1_000_000);
        Some(Timespec {
            tv_sec: i64::try_from(millis / 1000).unwrap_or(i64::MAX),
            tv_nsec: i64::try_from(millis % 1000 * 1_000_000).unwrap_or(0),
        })
    }

    fn run_tasks(&mut self) {
        let tasks = std::mem::take(
            &mut *self
                .shared
                .tasks
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        );
        for task in tasks {
            task(self);
        }
    }

    fn call(&mut self, token: Token, flags: epoll::EventFlags) {
        // An earlier handler of this round may have removed this one or changed its interest.
        let Some(source) = self.sources.get_mut(&token) else {
            return;
        };
        let ready = source.interest.met_by(flags);
        if ready.is_empty() {
            return;
        }
        if let Some(mut handler) = source.handler.take() {
            handler(self, token, ready);
            if let Some(source) = self.sources.get_mut(&token) {
                source.handler = Some(handler);
            }
        }
    }

    /// Runs what is due; `false` when nothing is.
    fn fire_timers(&mut self) -> bool {
        let now = Instant::now();
        let mut fired = false;
        while let Some(entry) = self.timers.first_entry() {
            if entry.key().due > now {
                break;
            }
            let task = entry.remove();
            task(self);
            fired = true;
        }
        fired
    }
}

fn watch(
    epoll: &OwnedFd,
    fd: BorrowedFd<'_>,
    token: Token,
    interest: Interest,
) -> Result<(), Errno> {
    epoll::add(
        epoll,
        fd,
        epoll::EventData::new_u64(token.0),
        interest.flags(),
    )
}

fn rewatch(
    epoll: &OwnedFd,
    fd: BorrowedFd<'_>,
    token: Token,
    interest: Interest,
) -> Result<(), Errno> {
    epoll::modify(
        epoll,
        fd,
        epoll::EventData::new_u64(token.0),
        interest.flags(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::pipe::{PipeFlags, pipe_with};
    use std::sync::mpsc;

    fn pipe() -> (OwnedFd, OwnedFd) {
        pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).unwrap()
    }

    #[test]
    fn a_handler_gets_what_was_written_to_its_pipe_until_it_hangs_up() {
        let (reader, writer) = pipe();
        let reader = Arc::new(reader);
        let mut events = EventLoop::new().unwrap();
        let (got, seen) = mpsc::channel();
        let fd = Arc::clone(&reader);
        events
            .add(
                reader,
                Interest::READ,
                Box::new(move |events, token, ready| {
                    assert_eq!(ready, Interest::READ);
                    let mut bytes = [0; 16];
                    let n = rustix::io::read(&fd, &mut bytes).unwrap();
                    got.send(bytes[..n].to_vec()).unwrap();
                    if n == 0 {
                        events.remove(token);
                        events.stop();
                    }
                }),
            )
            .unwrap();
        let thread = std::thread::spawn(move || events.run().unwrap());
        rustix::io::write(&writer, b"sarang").unwrap();
        assert_eq!(seen.recv().unwrap(), b"sarang");
        drop(writer);
        assert_eq!(seen.recv().unwrap(), b"");
        thread.join().unwrap();
    }

    #[test]
    fn a_descriptor_without_interest_is_silent_even_when_its_peer_is_gone() {
        let (reader, writer) = pipe();
        drop(reader);
        let mut events = EventLoop::new().unwrap();
        let (called, calls) = mpsc::channel();
        let token = events
            .add(
                writer,
                Interest::WRITE,
                Box::new(move |events, token, ready| {
                    called.send(ready).unwrap();
                    events.set_interest(token, Interest::NONE).unwrap();
                }),
            )
            .unwrap();
        events.after(
            Duration::from_millis(20),
            Box::new(|events: &mut EventLoop| events.stop()),
        );
        events.run().unwrap();
        events.remove(token);
        assert_eq!(
            calls.try_iter().collect::<Vec<_>>(),
            [Interest::WRITE],
            "once, not in a spin"
        );
    }

    #[test]
    fn a_regular_file_is_always_ready_while_it_is_wanted() {
        let mut events = EventLoop::new().unwrap();
        let file = std::fs::File::open(std::env::current_exe().unwrap()).unwrap();
        let mut rounds = 0;
        events
            .add(
                file,
                Interest::READ,
                Box::new(move |events, token, _| {
                    rounds += 1;
                    if rounds == 3 {
                        events.set_interest(token, Interest::NONE).unwrap();
                        events.stop();
                    }
                }),
            )
            .unwrap();
        events.run().unwrap();
    }

    #[test]
    fn timers_fire_in_order_and_a_cancelled_one_never() {
        let mut events = EventLoop::new().unwrap();
        let (fired, order) = mpsc::channel();
        for (millis, name) in [(20, "second"), (1, "first"), (10, "cancelled")] {
            let fired = fired.clone();
            let timer = events.after(
                Duration::from_millis(millis),
                Box::new(move |events: &mut EventLoop| {
                    fired.send(name).unwrap();
                    if name == "second" {
                        events.stop();
                    }
                }),
            );
            if name == "cancelled" {
                events.cancel(timer);
            }
        }
        events.run().unwrap();
        assert_eq!(order.try_iter().collect::<Vec<_>>(), ["first", "second"]);
    }

    #[test]
    fn a_posted_task_runs_on_the_loop_and_may_stop_it() {
        let mut events = EventLoop::new().unwrap();
        let handle = events.handle();
        let thread = std::thread::spawn(move || events.run().unwrap());
        let (done, ran_on) = mpsc::channel();
        handle.post(Box::new(move |events: &mut EventLoop| {
            done.send(std::thread::current().id()).unwrap();
            events.stop();
        }));
        assert_eq!(ran_on.recv().unwrap(), thread.thread().id());
        thread.join().unwrap();
    }

    #[test]
    fn tasks_posted_before_a_stop_have_run_when_the_loop_ends() {
        let mut events = EventLoop::new().unwrap();
        let handle = events.handle();
        let (done, ran) = mpsc::channel();
        handle.post(Box::new(move |_: &mut EventLoop| done.send(()).unwrap()));
        handle.stop();
        events.run().unwrap();
        assert!(ran.try_recv().is_ok());
    }
}
