//! The console: the host's end of the guest's serial line, or of its virtio console.
//!
//! Output moves from the device into a queue, for the serial port on a vCPU thread; from the queue to a terminal, a
//! pipe or a file, on the event loop, never waiting for whoever reads there. A slow reader fills the
//! queue, and then the guest finds its transmitter busy: the back pressure of a real serial line,
//! felt by the guest alone. Input goes the other way, and the host is read only while the guest has
//! room for it; so a file piped in is not lost in a guest that is still booting.
//!
//! The exception is a person's terminal. It is read always, since the [`escape`] keys must work even
//! when the guest does not; up to [`TYPED_AHEAD`] bytes wait, what is typed beyond is dropped.
//! A [`Typist`] goes before both: as long as there is one, the host's input waits.

pub mod escape;
mod host;
mod input;
mod terminal;
mod typist;

pub use escape::Key;
pub use host::{Display, Sink, standard_error, standard_input, standard_output};
pub use terminal::{RawTerminal, restore_terminal};
pub use typist::Typist;

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::termios::isatty;

use super::{ByteQueue, SerialEnd};
use crate::worker::{EventLoop, Interest, Token};
use host::{PIPE_BUF, Pty};
use input::{Input, Source};

/// Bytes that wait for the guest after they were typed at a terminal.
pub const TYPED_AHEAD: usize = 64 << 10;
/// Chunks of output in one turn of the event loop, so that a guest that never stops printing leaves
/// the loop's other handlers their turns.
const CHUNKS_PER_TURN: usize = 16;
/// How long [`Console::finish`] lets the reader of a pseudo-terminal take what is in the kernel's
/// buffer. Nobody may be there, which cannot be told from a slow reader.
const PTY_GRACE: Duration = Duration::from_secs(1);

/// What the guest's serial line is connected to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Nothing: output is discarded, there is no input.
    Off,
    /// Standard input and output.
    Stdio,
    /// A new pseudo-terminal, see [`Console::pty_path`].
    Pty,
    /// Output goes to this file, created or emptied; there is no input.
    File(PathBuf),
}

/// Why there is no console. Each is one sentence for a person.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot open {path} for the console's output: {source}")]
    File { path: PathBuf, source: io::Error },
    #[error("cannot make a pseudo-terminal for the console: {0}")]
    Pty(io::Error),
    #[error("cannot make the console's queues: {0}")]
    Queue(io::Error),
    #[error("cannot switch the terminal to raw mode: {0}")]
    Terminal(io::Error),
    #[error("cannot watch the console's {end}: {source}")]
    Watch {
        end: &'static str,
        source: io::Error,
    },
}

/// Sees every byte that the guest prints, in order, in pieces of any size.
pub type Observer = Box<dyn FnMut(&[u8]) + Send>;
/// Is told of the keys that are for the VMM.
pub type OnKey = Box<dyn FnMut(Key) + Send>;

/// The console. Dropping it puts the terminal back.
pub struct Console {
    // Fixed configuration.
    pty: Option<(OwnedFd, PathBuf)>,
    /// Output goes to this file, which is not opened before the guest is ready to run: what an earlier run printed
    /// there outlives a mistake.
    file: Option<PathBuf>,
    /// Input comes from a terminal that has to be made raw first.
    interactive: bool,

    // Runtime glue.
    source: Option<Source>,
    typist: Option<Typist>,
    output_queue: Arc<ByteQueue>,
    input_queue: Arc<ByteQueue>,
    terminal: Option<RawTerminal>,

    // Volatile state.
    output: Arc<Mutex<Output>>,
}

/// The state of the output side, shared by the event loop and [`Console::finish`].
struct Output {
    queue: Arc<ByteQueue>,
    /// `None`: discard.
    sink: Option<Sink>,
    observer: Option<Observer>,
    /// Our own words to the terminal, ahead of the guest's.
    notice: Vec<u8>,
}

/// What a turn of writing left behind.
#[derive(Clone, Copy, Debug, Default)]
struct Turn {
    /// Bytes are left.
    more: bool,
    /// The reader must take something first.
    blocked: bool,
    /// The queue was full and has room now.
    drained: bool,
}

impl Console {
    /// Opens what `kind` names. A terminal is left as it is until [`Console::attach`], and so is a file.
    ///
    /// # Errors
    /// When the pseudo-terminal cannot be opened, or descriptors have run out.
    pub fn open(kind: &Kind) -> Result<Console, Error> {
        let (mut source, mut pty, mut interactive) = (None, None, false);
        let mut file = None;
        let sink = match kind {
            Kind::Off => None,
            Kind::File(path) => {
                file = Some(path.clone());
                None
            }
            Kind::Stdio => {
                source = host::standard_input().map(|fd| Source {
                    typed: isatty(&fd),
                    fd: Arc::new(fd),
                });
                interactive =
                    source.as_ref().is_some_and(|source| source.typed) && isatty(io::stdout());
                host::standard_output()
            }
            Kind::Pty => {
                let Pty { sink, peer, path } = host::pty()?;
                // A duplicate: epoll tells one descriptor's interests apart only by its number.
                let fd = rustix::io::fcntl_dupfd_cloexec(sink.fd(), 3)
                    .map_err(|errno| Error::Pty(errno.into()))?;
                source = Some(Source {
                    fd: Arc::new(fd),
                    typed: false,
                });
                pty = Some((peer, path));
                Some(sink)
            }
        };
        let mut console = Console::new(sink, source, pty, interactive)?;
        console.file = file;
        Ok(console)
    }

    /// A console over descriptors of the caller's: pipes, sockets, files. `None` for no input, or for
    /// output that is discarded. Their flags are left as they are.
    ///
    /// # Errors
    /// When a descriptor cannot be examined, or descriptors have run out.
    pub fn over(input: Option<OwnedFd>, output: Option<OwnedFd>) -> Result<Console, Error> {
        let failed = |end| move |errno: Errno| watch(end)(errno.into());
        let input = input
            .map(host::input)
            .transpose()
            .map_err(failed("input"))?;
        let source = input.map(|fd| Source {
            fd: Arc::new(fd),
            typed: false,
        });
        let sink = output
            .map(host::output)
            .transpose()
            .map_err(failed("output"))?;
        Console::new(sink, source, None, false)
    }

    fn new(
        sink: Option<Sink>,
        source: Option<Source>,
        pty: Option<(OwnedFd, PathBuf)>,
        interactive: bool,
    ) -> Result<Console, Error> {
        let output_queue = Arc::new(ByteQueue::output().map_err(Error::Queue)?);
        let output = Output {
            queue: Arc::clone(&output_queue),
            sink,
            observer: None,
            notice: Vec::new(),
        };
        Ok(Console {
            pty,
            file: None,
            interactive,
            source,
            typist: None,
            output_queue,
            input_queue: Arc::new(ByteQueue::input().map_err(Error::Queue)?),
            terminal: None,
            output: Arc::new(Mutex::new(output)),
        })
    }

    /// The terminal that output goes to, if it goes to one: standard output's, or a pseudo-terminal.
    pub fn display(&self) -> Option<Display> {
        let fd = lock(&self.output).sink.as_ref().map(Sink::fd)?;
        isatty(&fd).then_some(Display::new(fd))
    }

    /// The queue that the serial port prints into.
    pub fn output(&self) -> Arc<ByteQueue> {
        Arc::clone(&self.output_queue)
    }

    /// The queue that the serial port receives from.
    pub fn input(&self) -> Arc<ByteQueue> {
        Arc::clone(&self.input_queue)
    }

    /// Somebody who types at this console, also at one that has no input otherwise. Before [`Console::attach`].
    pub fn typist(&mut self) -> Typist {
        let queue = &self.input_queue;
        let typist = self
            .typist
            .get_or_insert_with(|| Typist::new(Arc::clone(queue)));
        typist.clone()
    }

    /// Where the pseudo-terminal is, for [`Kind::Pty`].
    pub fn pty_path(&self) -> Option<&Path> {
        self.pty.as_ref().map(|(_, path)| path.as_path())
    }

    /// Connects the console to `serial` on `events`, and makes an interactive terminal raw. Once.
    ///
    /// # Errors
    /// When the file cannot be opened, the terminal refuses, or epoll is out of memory or watches.
    pub fn attach(
        &mut self,
        events: &mut EventLoop,
        serial: Arc<dyn SerialEnd>,
        observer: Observer,
        on_key: OnKey,
    ) -> Result<(), Error> {
        if let Some(path) = &self.file {
            lock(&self.output).sink = Some(host::file(path)?);
        }
        lock(&self.output).observer = Some(observer);
        if self.interactive {
            self.terminal = Some(
                RawTerminal::enter(STDIN, terminal::Output::Processed).map_err(Error::Terminal)?,
            );
        }
        let pump =
            attach_output(&self.output, events, Arc::clone(&serial)).map_err(watch("output"))?;
        let source = self.source.take();
        if source.is_some() || self.typist.is_some() {
            let input = Input::new(source, self.typist.clone(), self.input(), serial, on_key);
            input.attach(events, pump).map_err(watch("input"))?;
        }
        Ok(())
    }

    /// After the guest has ended: writes what is left in the output queue, waiting for the reader,
    /// but not past `deadline` from now (`None`: as long as it takes), and not for a reader that is
    /// gone. Call it when the event loop has stopped or may stop; then drop the console.
    pub fn finish(&self, deadline: Option<Duration>) {
        let end = deadline.and_then(|deadline| Instant::now().checked_add(deadline));
        let left = || end.map(|end| end.saturating_duration_since(Instant::now()));
        loop {
            let (turn, fd) = {
                let mut output = lock(&self.output);
                let turn = output.turn();
                (turn, output.sink.as_ref().map(Sink::fd))
            };
            let (true, Some(fd)) = (turn.more, fd) else {
                break;
            };
            let left = left();
            if left == Some(Duration::ZERO) {
                log::warn!("the console's reader did not take all of the output in time");
                return;
            }
            if turn.blocked {
                // An error shows in the next write.
                let mut fds = [PollFd::new(&*fd, PollFlags::OUT)];
                let _ = poll(&mut fds, left.map(timespec).as_ref());
            }
        }
        if let Some((peer, _)) = &self.pty {
            // Closing our end would throw away what the other end has not read yet.
            let grace = left().unwrap_or(PTY_GRACE).min(PTY_GRACE);
            let start = Instant::now();
            while start.elapsed() < grace {
                // First, since the kernel hands bytes from end to end a moment after the write.
                std::thread::sleep(Duration::from_millis(5));
                if !rustix::io::ioctl_fionread(peer).is_ok_and(|unread| unread > 0) {
                    break;
                }
            }
        }
    }
}

/// Standard input's number names an open file from start to end of the process: Rust's runtime opens
/// `/dev/null` in its place when it was closed, and nothing here closes it.
// SAFETY: as above.
const STDIN: BorrowedFd<'static> = unsafe { BorrowedFd::borrow_raw(libc::STDIN_FILENO) };

fn watch(end: &'static str) -> impl Fn(io::Error) -> Error {
    move |source| Error::Watch { end, source }
}

fn lock(output: &Mutex<Output>) -> MutexGuard<'_, Output> {
    output.lock().unwrap_or_else(PoisonError::into_inner)
}

fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(duration.subsec_nanos()),
    }
}

impl Output {
    /// Shows the observer what is new, and writes as much as may be written without waiting.
    fn turn(&mut self) -> Turn {
        let new = self.queue.look();
        if let Some(observer) = &mut self.observer
            && !new.is_empty()
        {
            observer(&new);
        }
        let mut turn = Turn::default();
        let mut buffer = [0; PIPE_BUF];
        for _ in 0..CHUNKS_PER_TURN {
            let from_notice = !self.notice.is_empty();
            let chunk = if from_notice {
                &self.notice
            } else {
                let count = self.queue.peek(&mut buffer);
                buffer.get(..count).unwrap_or_default()
            };
            if chunk.is_empty() {
                return turn;
            }
            let written = match &self.sink {
                None => Ok(chunk.len()),
                Some(sink) => sink.write(chunk),
            };
            match written {
                Ok(count) if from_notice => {
                    self.notice.drain(..count.min(self.notice.len()));
                }
                Ok(count) => turn.drained |= self.queue.consume(count),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    turn.blocked = true;
                    break;
                }
                Err(error) => {
                    log::warn!("the console's output is lost from here on: {error}");
                    self.sink = None;
                }
            }
        }
        turn.more = !(self.notice.is_empty() && self.queue.is_empty());
        turn
    }
}

/// Runs a turn of output and registers for the next. Shared by the handlers of one event loop.
#[derive(Clone)]
struct Pump {
    output: Arc<Mutex<Output>>,
    serial: Arc<dyn SerialEnd>,
    /// The sink's registration.
    token: Option<Token>,
}

impl Pump {
    fn run(&self, events: &mut EventLoop) {
        let (turn, gone) = {
            let mut output = lock(&self.output);
            let turn = output.turn();
            (turn, output.sink.is_none())
        };
        if turn.drained {
            self.serial.output_drained();
        }
        match self.token {
            Some(token) if !gone => {
                let interest = if turn.more {
                    Interest::WRITE
                } else {
                    Interest::NONE
                };
                if let Err(error) = events.set_interest(token, interest) {
                    log::warn!("the console's output may be late: {error}");
                }
            }
            token => {
                if let Some(token) = token {
                    events.remove(token);
                }
                // Nothing to wait for, but a turn is bounded: the rest takes another one.
                if turn.more {
                    let pump = self.clone();
                    events.after(
                        Duration::ZERO,
                        Box::new(move |events: &mut EventLoop| pump.run(events)),
                    );
                }
            }
        }
    }
}

fn attach_output(
    output: &Arc<Mutex<Output>>,
    events: &mut EventLoop,
    serial: Arc<dyn SerialEnd>,
) -> io::Result<Pump> {
    let (sink, queue) = {
        let output = lock(output);
        (output.sink.clone(), Arc::clone(&output.queue))
    };
    let mut pump = Pump {
        output: Arc::clone(output),
        serial,
        token: None,
    };
    if let Some(sink) = sink {
        let writer = pump.clone();
        let on_writable = move |events: &mut EventLoop, token: Token, _| {
            let token = Some(token);
            Pump {
                token,
                ..writer.clone()
            }
            .run(events);
        };
        // Wanted at once: something may have been printed already.
        pump.token = Some(events.add(sink.fd(), Interest::WRITE, Box::new(on_writable))?);
    }
    let reader = pump.clone();
    events.add(
        queue.event(),
        Interest::READ,
        Box::new(move |events, _, _| {
            queue.acknowledge();
            reader.run(events);
        }),
    )?;
    Ok(pump)
}

#[cfg(test)]
mod tests;
