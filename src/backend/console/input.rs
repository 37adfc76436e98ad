//! The console's input: from a typist and from the host to the guest's queue, no faster than the guest takes it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::io::Errno;

use super::escape::{self, Escape, Key, Typed};
use super::host::PIPE_BUF;
use super::{OnKey, Pump, TYPED_AHEAD, Typist, lock};
use crate::backend::{ByteQueue, SerialEnd};
use crate::worker::{EventLoop, Handler, Interest};

/// Where input comes from.
#[derive(Clone)]
pub(super) struct Source {
    pub fd: Arc<OwnedFd>,
    /// A person's terminal, where the escape keys work.
    pub typed: bool,
}

/// The state of the input side, owned by the event loop.
pub(super) struct Input {
    source: Option<Source>,
    typist: Option<Typist>,
    queue: Arc<ByteQueue>,
    serial: Arc<dyn SerialEnd>,
    escape: Escape,
    on_key: OnKey,
    /// From the host, but the guest's queue is full, or a typist goes first.
    waiting: VecDeque<u8>,
    ended: bool,
}

impl Input {
    pub(super) fn new(
        source: Option<Source>,
        typist: Option<Typist>,
        queue: Arc<ByteQueue>,
        serial: Arc<dyn SerialEnd>,
        on_key: OnKey,
    ) -> Input {
        Input {
            source,
            typist,
            queue,
            serial,
            escape: Escape::default(),
            on_key,
            waiting: VecDeque::new(),
            ended: false,
        }
    }

    /// Connects it on `events`.
    pub(super) fn attach(self, events: &mut EventLoop, pump: Pump) -> io::Result<()> {
        let queue = Arc::clone(&self.queue);
        let source = self.source.as_ref().map(|source| Arc::clone(&source.fd));
        let interest = self.interest();
        let input = Arc::new(Mutex::new(self));
        let token = source
            .map(|fd| {
                let on_readable = on_readable(Arc::clone(&input), pump);
                events.add(fd, interest, on_readable)
            })
            .transpose()?;
        events.add(
            queue.event(),
            Interest::READ,
            Box::new(move |events, _, _| {
                queue.acknowledge();
                let mut input = input.lock().unwrap_or_else(PoisonError::into_inner);
                input.deliver();
                let interest = input.interest();
                drop(input);
                let Some(token) = token else {
                    return;
                };
                if let Err(error) = events.set_interest(token, interest) {
                    log::warn!("the console takes no more input: {error}");
                }
            }),
        )?;
        Ok(())
    }

    /// Whether the host's input has to wait for a typist.
    fn is_held(&self) -> bool {
        self.typist.as_ref().is_some_and(Typist::is_typing)
    }

    /// Moves what waits into the guest's queue.
    fn deliver(&mut self) {
        let mut count = self.typist.as_ref().map_or(0, Typist::deliver);
        if !self.is_held() {
            let taken = self.queue.push_slice(self.waiting.make_contiguous());
            self.waiting.drain(..taken);
            count = count.saturating_add(taken);
        }
        if count > 0 {
            self.serial.input_arrived();
        }
    }

    /// Whether the host is to be read.
    fn interest(&self) -> Interest {
        let typed = self.source.as_ref().is_some_and(|source| source.typed);
        let wanted = !self.is_held() && self.waiting.is_empty() && self.queue.has_room();
        if !self.ended && (typed || wanted) {
            Interest::READ
        } else {
            Interest::NONE
        }
    }

    /// Reads once. Keys are reported; whether help is wanted is the answer.
    fn read(&mut self) -> bool {
        let Some(source) = &self.source else {
            return false;
        };
        let mut buffer = [0; PIPE_BUF];
        let limit = if source.typed {
            buffer.len()
        } else {
            self.queue.room().min(buffer.len())
        };
        let room = buffer.get_mut(..limit).unwrap_or_default();
        if room.is_empty() {
            return false;
        }
        let count = match rustix::io::read(&source.fd, room) {
            Ok(count) => count,
            Err(Errno::AGAIN | Errno::INTR) => return false,
            Err(error) => {
                // A terminal that hung up says EIO; there is no more to be said about it.
                if error != Errno::IO {
                    log::warn!("the console takes no more input: {error}");
                }
                0
            }
        };
        self.ended = count == 0;
        let mut help = false;
        for byte in buffer.iter().take(count) {
            let typed = if source.typed {
                self.escape.next(*byte)
            } else {
                Typed::Guest(*byte)
            };
            match typed {
                Typed::Guest(byte) if self.waiting.len() < TYPED_AHEAD => {
                    self.waiting.push_back(byte);
                }
                Typed::Guest(_) | Typed::Nothing => {}
                Typed::Key(key) => {
                    help |= key == Key::Help;
                    (self.on_key)(key);
                }
            }
        }
        self.deliver();
        help
    }
}

fn on_readable(input: Arc<Mutex<Input>>, pump: Pump) -> Handler {
    Box::new(move |events, token, _| {
        let (help, interest, ended) = {
            let mut input = input.lock().unwrap_or_else(PoisonError::into_inner);
            (input.read(), input.interest(), input.ended)
        };
        if help {
            lock(&pump.output).notice.extend(escape::HELP.bytes());
            pump.run(events);
        }
        if ended {
            events.remove(token);
        } else if let Err(error) = events.set_interest(token, interest) {
            log::warn!("the console takes no more input: {error}");
        }
    })
}
