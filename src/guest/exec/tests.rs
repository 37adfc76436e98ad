//! A session with pipes for streams, and for a guest the other end of the protocol on a thread of its own.

use std::fs::File;
use std::io::{Read, Write};
use std::sync::mpsc;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::pipe::{PipeFlags, pipe_with};

use super::*;
use crate::backend::console;
use crate::guest::protocol::guest::Guest;
use crate::guest::protocol::{End, MAIN};

/// The guest's end of the port.
struct Other {
    port: Arc<Port>,
    guest: Guest,
}

impl Other {
    /// Moves bytes until `done`, waiting for more in between.
    fn until(&mut self, mut done: impl FnMut(&mut Guest) -> bool) {
        let mut piece = vec![0; 10_000];
        loop {
            let count = self.port.input().drain_into(&mut piece);
            self.guest.feed(&piece[..count]);
            while self.guest.next_event().unwrap().is_some() {}
            let finished = done(&mut self.guest);
            loop {
                let sent = self.port.output().push_slice(self.guest.output());
                if sent == 0 {
                    break;
                }
                self.guest.sent(sent);
            }
            if finished {
                return;
            }
            if count == 0 {
                let bell = self.port.bell();
                poll(&mut [PollFd::new(&bell, PollFlags::IN)], None).unwrap();
                self.port.acknowledge();
            }
        }
    }
}

fn pipe() -> (File, OwnedFd) {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    (read.into(), write)
}

/// Runs a session on the event loop until its command is over, with `guest` for the guest.
fn session(streams: Streams, guest: impl FnOnce(&mut Other) + Send + 'static) -> Progress {
    let (progress, news) = session_until(News::Over, streams, guest);
    assert_eq!(news, [News::Over]);
    progress
}

/// Runs a session on the event loop until the machine is told `last`.
fn session_until(
    last: News,
    streams: Streams,
    guest: impl FnOnce(&mut Other) + Send + 'static,
) -> (Progress, Vec<News>) {
    let (session, port) = Session::new(streams).unwrap();
    port.set_guest_open(true);
    let mut events = EventLoop::new().unwrap();
    let (tell, news) = mpsc::channel();
    let on_news = move |events: &mut EventLoop, what| {
        tell.send(what).unwrap();
        if what == last {
            events.stop();
        }
    };
    let handle = session.attach(&mut events, Box::new(on_news)).unwrap();
    let other = std::thread::spawn(move || {
        let mut other = Other {
            port,
            guest: Guest::new(),
        };
        other.guest.open(MAIN, false);
        guest(&mut other);
    });
    events.run().unwrap();
    other.join().unwrap();
    (handle.progress(), news.try_iter().collect())
}

fn exit(guest: &mut Guest, status: u8) {
    guest.close(MAIN, Stream::Stdout);
    guest.close(MAIN, Stream::Stderr);
    guest.exit(MAIN, &End::Exited(status).into());
}

#[test]
fn the_machine_is_told_once_the_guest_has_nothing_left_to_write() {
    let (_, news) = session_until(News::Stopping, Streams::default(), |other| {
        other.guest.started(MAIN, 2);
        exit(&mut other.guest, 0);
        other.until(|guest| guest.output().is_empty());
        other.guest.stopping();
        other.until(|guest| guest.output().is_empty());
    });
    assert_eq!(news, [News::Over, News::Stopping]);
}

#[test]
fn what_comes_in_goes_out_and_the_status_comes_last() {
    let (mut out, sink) = pipe();
    let (source, input) = pipe();
    let sent: Vec<u8> = (0..2_000_000_u32).map(|i| (i % 251) as u8).collect();
    let expected = sent.clone();
    let writer = std::thread::spawn(move || File::from(input).write_all(&sent));
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        out.read_to_end(&mut all).unwrap();
        all
    });
    let streams = Streams {
        input: Some(source.into()),
        output: Some(console::Sink::of(sink).unwrap()),
        error: None,
        terminal: false,
    };
    let progress = session(streams, |other| {
        other.guest.started(MAIN, 2);
        // As `cat` does it.
        other.until(|guest| {
            let bytes = guest.bytes(MAIN).to_vec();
            let count = guest.write(MAIN, Stream::Stdout, &bytes);
            guest.consume(MAIN, count);
            guest.is_over(MAIN)
        });
        exit(&mut other.guest, 3);
        let mut turns = 0;
        other.until(|guest| {
            turns += 1;
            guest.output().is_empty() && turns > 1
        });
    });
    writer.join().unwrap().unwrap();
    assert_eq!(progress.exit.unwrap().end, End::Exited(3));
    assert!(progress.started && progress.connected);
    assert!(reader.join().unwrap() == expected);
}

#[test]
fn a_reader_that_is_gone_is_told_to_the_command() {
    let (out, sink) = pipe();
    drop(out);
    let streams = Streams {
        output: Some(console::Sink::of(sink).unwrap()),
        ..Streams::default()
    };
    let progress = session(streams, |other| {
        other.guest.started(MAIN, 2);
        other.until(|guest| {
            guest.write(MAIN, Stream::Stdout, b"y\n");
            guest.is_refused(MAIN, Stream::Stdout)
        });
        other.guest.exit(MAIN, &End::Killed(13).into());
        other.until(|guest| guest.output().is_empty());
    });
    assert_eq!(progress.exit.unwrap().end, End::Killed(13));
}

#[test]
fn a_guest_that_breaks_the_protocol_is_not_waited_for() {
    let progress = session(Streams::default(), |other| {
        other.port.output().push_slice(b"this is no frame at all");
    });
    assert!(progress.failure.unwrap().contains("exec channel broke"));
    assert_eq!(progress.exit, None);
}
