//! Event loops on threads of their own, for devices that ask for one.
//!
//! One loop serves all devices well as long as none has much to do: each that is at work keeps the others waiting. A
//! device with a loop of its own works on another processor of the host meanwhile. Such loops are paused and ended
//! together. A loop that is paused stands between two handlers, inside a task that waits for the pause to end, so what
//! its handlers share with the outside is at rest.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use super::{EventLoop, Handle};

/// Called on a loop's thread when the loop has failed, with its name and why.
pub type OnFailure = Arc<dyn Fn(&str, io::Error) + Send + Sync>;

/// Event loops that run.
pub struct Threads {
    pause: Arc<Pause>,
    threads: Vec<(Handle, JoinHandle<()>)>,
}

impl Threads {
    /// Starts a thread for each loop, by the name that is given with it. They inherit which signals are blocked.
    ///
    /// # Errors
    /// When the host gives no thread. Those that run already are ended.
    pub fn start(loops: Vec<(String, EventLoop)>, on_failure: &OnFailure) -> io::Result<Threads> {
        let mut threads = Threads {
            pause: Arc::default(),
            threads: Vec::new(),
        };
        for (name, mut events) in loops {
            let handle = events.handle();
            let (pause, on_failure) = (Arc::clone(&threads.pause), Arc::clone(on_failure));
            // Counted before it runs, so that a pause waits for it.
            threads.pause.lock().alive += 1;
            let thread = std::thread::Builder::new()
                .name(name.clone())
                .spawn(move || {
                    let _alive = Alive(pause);
                    if let Err(error) = events.run() {
                        on_failure(&name, error);
                    }
                })
                .inspect_err(|_| threads.pause.lock().alive -= 1)?;
            threads.threads.push((handle, thread));
        }
        Ok(threads)
    }

    /// Returns when no handler of any loop runs, and none will until [`Threads::resume`].
    pub fn pause(&self) {
        self.pause.lock().paused = true;
        for (handle, _) in &self.threads {
            let pause = Arc::clone(&self.pause);
            handle.post(Box::new(move |_| pause.stand()));
        }
        let all_stand = self.pause.lock();
        drop(
            self.pause
                .wait_while(all_stand, |state| state.standing < state.alive),
        );
    }

    /// Lets the loops go on.
    pub fn resume(&self) {
        self.pause.lock().paused = false;
        self.pause.changed.notify_all();
    }

    /// Ends the loops, after what has been posted to them, and waits for their threads.
    pub fn stop(&mut self) {
        self.resume();
        for (handle, _) in &self.threads {
            handle.stop();
        }
        for (_, thread) in self.threads.drain(..) {
            // A thread that panicked has said so already; there is nothing left to join.
            let _ = thread.join();
        }
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The barrier that all loops share.
#[derive(Default)]
struct Pause {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    paused: bool,
    /// Threads that have not ended.
    alive: usize,
    /// Those of them that wait for the pause to end.
    standing: usize,
}

impl Pause {
    /// Called on a loop's thread.
    fn stand(&self) {
        let mut state = self.lock();
        state.standing += 1;
        self.changed.notify_all();
        state = self.wait_while(state, |state| state.paused);
        state.standing -= 1;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_while<'a>(
        &self,
        state: MutexGuard<'a, State>,
        condition: impl FnMut(&mut State) -> bool,
    ) -> MutexGuard<'a, State> {
        self.changed
            .wait_while(state, condition)
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// One thread, until it ends.
struct Alive(Arc<Pause>);

impl Drop for Alive {
    fn drop(&mut self) {
        self.0.lock().alive -= 1;
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::sync::mpsc::channel;

    fn start(count: usize) -> (Threads, Vec<Handle>) {
        let loops: Vec<(String, EventLoop)> = (0..count)
            .map(|number| (format!("loop{number}"), EventLoop::new().unwrap()))
            .collect();
        let handles = loops.iter().map(|(_, events)| events.handle()).collect();
        let on_failure: OnFailure = Arc::new(|name, error| panic!("{name}: {error}"));
        (Threads::start(loops, &on_failure).unwrap(), handles)
    }

    #[test]
    fn each_loop_has_a_thread_of_its_name() {
        let (mut threads, handles) = start(2);
        let (sender, names) = channel();
        for handle in &handles {
            let sender = sender.clone();
            handle.post(Box::new(move |_| {
                sender
                    .send(std::thread::current().name().map(str::to_owned))
                    .unwrap();
            }));
        }
        let mut names = [names.recv().unwrap(), names.recv().unwrap()];
        names.sort();
        assert_eq!(names, [Some("loop0".to_owned()), Some("loop1".to_owned())]);
        threads.stop();
    }

    #[test]
    fn a_paused_loop_does_nothing_until_it_is_resumed_and_then_all_of_it() {
        let (threads, handles) = start(3);
        let done = Arc::new(AtomicU32::new(0));
        for round in 1..=20 {
            threads.pause();
            let before = done.load(Ordering::SeqCst);
            let (sender, answers) = channel();
            for handle in &handles {
                let (done, sender) = (Arc::clone(&done), sender.clone());
                handle.post(Box::new(move |_| {
                    done.fetch_add(1, Ordering::SeqCst);
                    sender.send(()).unwrap();
                }));
            }
            std::thread::yield_now();
            assert_eq!(done.load(Ordering::SeqCst), before, "nobody may run now");
            threads.resume();
            for _ in &handles {
                answers.recv().unwrap();
            }
            assert_eq!(done.load(Ordering::SeqCst), 3 * round);
        }
    }

    #[test]
    fn what_was_posted_before_the_end_is_done_even_out_of_a_pause() {
        let (mut threads, handles) = start(1);
        threads.pause();
        let (sender, answers) = channel();
        handles[0].post(Box::new(move |_| sender.send(7).unwrap()));
        threads.stop();
        assert_eq!(answers.try_recv(), Ok(7));
        // Nobody is left to wait for.
        threads.pause();
    }

    #[test]
    fn a_pause_does_not_wait_for_a_loop_that_has_ended() {
        let (threads, handles) = start(2);
        handles[0].stop();
        threads.pause();
        threads.resume();
    }
}
