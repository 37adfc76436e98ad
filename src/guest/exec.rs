//! The exec channel at work: the plan's own command in the guest, on this process's streams.
//!
//! Four things meet here on the event loop: the port that init is at the other end of, and the three standard streams.
//! Whatever is ready, the same is done: take what the port has, pass the command's output on as far as its readers take
//! it, send what comes on standard input as far as the command takes it, and then wait for what is missing. Nothing is
//! read that there is no room for, so a stalled reader at either end stops the writer at the other end, and nobody else.
//!
//! On a terminal, the terminal is raw and every key goes to the guest, whose own terminal makes signals of Ctrl-C and its
//! like; only Ctrl-a is kept back (see [`escape`]). When a command does nothing on Ctrl-C, init tells, since only there
//! it is known whether that key is for a signal or for an editor; pressed again, it ends the run.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::{io, mem};

use rustix::io::Errno;

use super::plan::WindowSize;
use super::protocol::host::{Event, Host};
use super::protocol::{Exit, MAIN, PORT, Phase, Stream};
use crate::backend::console::escape::{self, Escape, Typed};
use crate::backend::console::{Key, RawTerminal, Sink};
use crate::backend::port::{self, Port, PortEnd};
use crate::worker::{EventLoop, Interest, Token};

/// Bytes moved in one piece.
const PIECE: usize = 64 << 10;
/// Pieces moved in one turn; the rest waits until others have had theirs.
const PIECES: usize = 16;

/// What the command reads and writes. `None` is a stream that is closed.
#[derive(Default)]
pub struct Streams {
    pub input: Option<OwnedFd>,
    pub output: Option<Sink>,
    /// Not used with a terminal.
    pub error: Option<Sink>,
    /// The input is a terminal, to be made raw, and the command runs on one.
    pub terminal: bool,
}

/// What has become of the command.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Init has the channel.
    pub connected: bool,
    pub started: bool,
    pub exit: Option<Exit>,
    /// Why init gave up, or what it did that the protocol does not allow.
    pub failure: Option<String>,
    /// What init has done, and when.
    pub phases: Vec<Phase>,
}

/// What the machine is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum News {
    /// The command has ended and all of its output is written, or there will be none: the guest is to power off now.
    Over,
    /// The guest has nothing left to write, and need not be waited for.
    Stopping,
    /// Somebody typed Ctrl-a x, or Ctrl-C twice and the command did not answer.
    Quit,
}

/// Called on the event loop.
pub type OnNews = Box<dyn FnMut(&mut EventLoop, News) + Send>;

/// A command that the guest's plan has.
pub struct Session {
    host: Host,
    end: PortEnd,
    streams: Streams,
}

impl Session {
    /// A session, and the port to put into the machine.
    ///
    /// # Errors
    /// When the host has no file descriptors left.
    pub fn new(streams: Streams) -> Result<(Session, Arc<Port>), port::Error> {
        let (port, end) = Port::channel(PORT)?;
        let mut host = Host::new();
        host.expect_main(streams.terminal);
        Ok((Session { host, end, streams }, port))
    }

    /// Connects everything on the event loop, and makes a terminal raw.
    ///
    /// # Errors
    /// When the terminal refuses, or epoll is out of memory or watches.
    pub fn attach(self, events: &mut EventLoop, on_news: OnNews) -> io::Result<Handle> {
        let raw = match self.streams.terminal {
            true => Some(RawTerminal::of_standard_input()?),
            false => None,
        };
        self.end.open();
        let (readable, writable) = (self.end.readable(), self.end.writable());
        let input = self.streams.input.map(Arc::new);
        let outputs = [
            (Stream::Stdout, self.streams.output),
            (Stream::Stderr, self.streams.error),
        ];
        let mut state = State {
            host: self.host,
            end: self.end,
            input: input.clone(),
            input_token: None,
            typed: self.streams.terminal.then(Escape::default),
            outputs: Vec::new(),
            terminal: self.streams.terminal,
            notice: Vec::new(),
            quit: false,
            stopping: false,
            over: false,
            progress: Progress::default(),
            on_news: Some(on_news),
            _raw: raw,
        };
        if input.is_none() {
            state.host.close(MAIN);
        }
        for (stream, sink) in outputs {
            match sink {
                Some(sink) => state.outputs.push(Output {
                    stream,
                    sink,
                    token: None,
                }),
                None => state.host.refuse(MAIN, stream),
            }
        }
        let watched: Vec<_> = state
            .outputs
            .iter()
            .map(|output| output.sink.fd())
            .collect();
        let handle = Handle(Arc::new(Mutex::new(state)));
        let shared = handle.clone();
        events.add(
            readable,
            Interest::READ,
            Box::new(move |events, _, _| {
                shared.lock().end.clear_readable();
                shared.turn(events);
            }),
        )?;
        let shared = handle.clone();
        events.add(
            writable,
            Interest::READ,
            Box::new(move |events, _, _| {
                shared.lock().end.clear_writable();
                shared.turn(events);
            }),
        )?;
        if let Some(input) = input {
            let shared = handle.clone();
            let token = events.add(
                input,
                Interest::NONE,
                Box::new(move |events, _, _| {
                    shared.lock().read_input();
                    shared.turn(events);
                }),
            )?;
            handle.lock().input_token = Some(token);
        }
        for (index, fd) in watched.into_iter().enumerate() {
            let shared = handle.clone();
            let token = events.add(
                fd,
                Interest::NONE,
                Box::new(move |events, _, _| shared.turn(events)),
            )?;
            if let Some(output) = handle.lock().outputs.get_mut(index) {
                output.token = Some(token);
            }
        }
        Ok(handle)
    }
}

struct Output {
    stream: Stream,
    sink: Sink,
    token: Option<Token>,
}

struct State {
    host: Host,
    end: PortEnd,
    /// `None` once it has ended.
    input: Option<Arc<OwnedFd>>,
    input_token: Option<Token>,
    /// The keys of a terminal.
    typed: Option<Escape>,
    /// Those that still have a reader.
    outputs: Vec<Output>,
    terminal: bool,
    /// Words of our own for the terminal.
    notice: Vec<u8>,
    /// Somebody wants an end, and the machine has not been told.
    quit: bool,
    /// Init has said so, and the machine has not been told.
    stopping: bool,
    /// The machine has been told.
    over: bool,
    progress: Progress,
    /// Out of here while it is called.
    on_news: Option<OnNews>,
    _raw: Option<RawTerminal>,
}

/// Reaches a session that runs.
#[derive(Clone)]
pub struct Handle(Arc<Mutex<State>>);

impl Handle {
    /// Sends a signal to the command's process group; `false` when there is no command to send it to.
    pub fn signal(&self, events: &mut EventLoop, signal: i32) -> bool {
        let runs = {
            let mut state = self.lock();
            let runs = state.progress.started && state.progress.exit.is_none();
            if let (true, Ok(signal)) = (runs, u32::try_from(signal)) {
                state.host.signal(MAIN, signal);
            }
            runs
        };
        self.turn(events);
        runs
    }

    /// Tells the command that its terminal has another size.
    pub fn resize(&self, events: &mut EventLoop, size: WindowSize) {
        if self.lock().terminal {
            self.lock().host.resize(MAIN, size);
            self.turn(events);
        }
    }

    /// What has become of the command so far.
    pub fn progress(&self) -> Progress {
        self.lock().progress.clone()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Moves what can be moved, and waits for the rest.
    fn turn(&self, events: &mut EventLoop) {
        let (news, on_news) = {
            let mut state = self.lock();
            let mut news = state.move_bytes();
            if state.progress.failure.is_some() && !state.over {
                news.push(News::Over);
            }
            state.over |= news.contains(&News::Over);
            if std::mem::take(&mut state.stopping) {
                news.push(News::Stopping);
            }
            if let Err(error) = state.wait(events) {
                log::warn!("the command's streams may stall: {error}");
            }
            let on_news = match news.is_empty() {
                true => None,
                false => state.on_news.take(),
            };
            (news, on_news)
        };
        if let Some(mut on_news) = on_news {
            news.into_iter().for_each(|news| on_news(events, news));
            self.lock().on_news = Some(on_news);
        }
    }
}

impl State {
    fn move_bytes(&mut self) -> Vec<News> {
        let mut news = Vec::new();
        let mut piece = vec![0; PIECE];
        for _ in 0..PIECES {
            let count = self.end.read(&mut piece);
            self.host.feed(piece.get(..count).unwrap_or_default());
            self.take_events();
            self.write_outputs();
            let written = self.send();
            if count == 0 && written == 0 {
                break;
            }
        }
        if let (Some(_), false) = (&self.progress.exit, self.over)
            && [Stream::Stdout, Stream::Stderr]
                .into_iter()
                .all(|stream| self.host.is_over(MAIN, stream))
        {
            self.host.acknowledge(MAIN);
            self.send();
            news.push(News::Over);
        }
        // What is left is for the next turn.
        if self.end.peek(&mut [0]) > 0 {
            let _ = rustix::io::write(self.end.readable(), &1_u64.to_ne_bytes());
        }
        if mem::take(&mut self.quit) {
            news.push(News::Quit);
        }
        news
    }

    fn take_events(&mut self) {
        loop {
            match self.host.next_event() {
                Ok(Some(Event::Started { .. })) => self.progress.started = true,
                Ok(Some(Event::Exit { exit, .. })) => self.progress.exit = Some(exit),
                Ok(Some(Event::Phase(phase))) => self.progress.phases.push(phase),
                Ok(Some(Event::Error(words))) => self.progress.failure = Some(words),
                Ok(Some(Event::Stopping)) => self.stopping = true,
                // Only keys that were typed here can have had such an end.
                Ok(Some(Event::Interrupted { .. })) => self.quit |= self.terminal,
                Ok(None) => break,
                Err(violation) => {
                    self.progress.failure.get_or_insert(violation.to_string());
                    break;
                }
            }
        }
        self.progress.connected |= self.host.version().is_some();
    }

    /// Sends the guest what is for it, and says how much that was.
    fn send(&mut self) -> usize {
        let mut sent = 0;
        loop {
            let count = self.end.write(self.host.output());
            if count == 0 {
                return sent;
            }
            self.host.sent(count);
            sent += count;
        }
    }

    fn write_outputs(&mut self) {
        let host = &mut self.host;
        let notice = &mut self.notice;
        self.outputs.retain(|output| {
            let stream = output.stream;
            loop {
                let own = stream == Stream::Stdout && !notice.is_empty();
                let bytes = match own {
                    true => &notice[..],
                    false => host.bytes(MAIN, stream),
                };
                if bytes.is_empty() {
                    return true;
                }
                match output.sink.write(bytes) {
                    Ok(count) if own => {
                        notice.drain(..count.min(notice.len()));
                    }
                    Ok(count) => host.consume(MAIN, stream, count),
                    Err(Errno::INTR) => {}
                    Err(Errno::AGAIN) => return true,
                    Err(error) => {
                        // A reader who has seen enough is the most ordinary thing.
                        if error != Errno::PIPE {
                            log::warn!("{stream} of the command is lost from here on: {error}");
                        }
                        host.refuse(MAIN, stream);
                        return false;
                    }
                }
            }
        });
    }

    /// Reads standard input once, as much as the command takes.
    fn read_input(&mut self) {
        let Some(input) = &self.input else {
            return;
        };
        let mut piece = vec![0; self.host.room(MAIN).min(PIECE)];
        if piece.is_empty() {
            return;
        }
        let count = match rustix::io::read(input, &mut piece) {
            Ok(count) => count,
            Err(Errno::AGAIN | Errno::INTR) => return,
            Err(error) => {
                // A terminal that hung up says EIO.
                if error != Errno::IO {
                    log::warn!("the command gets no more input: {error}");
                }
                0
            }
        };
        if count == 0 {
            self.input = None;
            self.host.close(MAIN);
            return;
        }
        piece.truncate(count);
        if let Some(escape) = &mut self.typed {
            let mut keys = Vec::with_capacity(count);
            for byte in piece.drain(..) {
                match escape.next(byte) {
                    Typed::Guest(byte) => keys.push(byte),
                    Typed::Key(Key::Quit) => self.quit = true,
                    Typed::Key(Key::Help) => self.notice.extend(escape::HELP.bytes()),
                    Typed::Nothing => {}
                }
            }
            piece = keys;
        }
        // There is room, or it would not have been read.
        self.host.write(MAIN, &piece);
    }

    /// Has the event loop wait for what is missing.
    fn wait(&mut self, events: &mut EventLoop) -> io::Result<()> {
        for output in &self.outputs {
            let waits = !self.host.bytes(MAIN, output.stream).is_empty()
                || (output.stream == Stream::Stdout && !self.notice.is_empty());
            let interest = if waits {
                Interest::WRITE
            } else {
                Interest::NONE
            };
            if let Some(token) = output.token {
                events.set_interest(token, interest)?;
            }
        }
        // Input is left where it is until a command is there for it; but a terminal has keys that end the run.
        let wanted = self.progress.started || self.terminal;
        let taken = self.host.room(MAIN) > 0 && !self.host.is_refused(MAIN);
        if let Some(token) = self.input_token {
            let interest = if self.input.is_some() && wanted && taken {
                Interest::READ
            } else {
                Interest::NONE
            };
            events.set_interest(token, interest)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
