//! A hostile init at the guest's end of the exec channel, for a property test and for the target in `fuzz/`.
//!
//! A guest is not to be trusted with what it writes to the port either. Here that is made up from arbitrary bytes: raw
//! ones, frames with and without a right header, the same frame a thousand times. In between the VMM does what it does
//! with a channel: runs commands, writes to them, takes their output or not, and reads no more. After each step it is
//! seen that
//!
//! * the VMM's end keeps no more than credit and the longest frame allow;
//! * a command starts and ends once at most, and no other does;
//! * words for a person have nothing in them that a terminal obeys;
//! * after a violation there is nothing but that violation, and nothing is kept of what follows.

use std::collections::BTreeMap;

use super::plan::{Command, WindowSize};
use super::protocol::host::{Event, Host};
use super::protocol::{CommandId, End, MAIN, MAX_DATA, Stream, WINDOW};

/// At most this many steps are taken.
const STEPS_MAX: usize = 512;
/// At most this many commands are run at a time.
const COMMANDS_MAX: usize = 6;
/// Bytes of a header, and of the longest frame with one.
const HEADER: usize = 12;
const FRAME_MAX: usize = (4 << 20) + HEADER;
/// What the VMM may make ready to be sent beside what it was asked to say: some frames, and the data of one.
const OUTPUT_MAX: usize = 128 << 10;
/// Bytes of each frame by which the VMM asks for something.
const ASKED: usize = 512;

// Steps: three of the guest, which writes, and the others of the VMM.
const RAW: u8 = 0;
const FRAME: u8 = 1;
const DATA: u8 = 2;
const EXEC: u8 = 3;
const WRITE: u8 = 4;
const CLOSE: u8 = 5;
const REFUSE: u8 = 6;
const CONSUME: u8 = 7;
const ACKNOWLEDGE: u8 = 8;
const SEND: u8 = 9;
const SIGNAL: u8 = 10;
const RESIZE: u8 = 11;
const SHUT_DOWN: u8 = 12;
const STEPS: u8 = 13;

/// Reads numbers from bytes; what is missing at the end is zeroes.
struct Source<'a>(&'a [u8]);

impl<'a> Source<'a> {
    fn bytes(&mut self, len: usize) -> &'a [u8] {
        let (now, later) = self.0.split_at(len.min(self.0.len()));
        self.0 = later;
        now
    }

    fn u8(&mut self) -> u8 {
        self.bytes(1).first().copied().unwrap_or(0)
    }

    fn u16(&mut self) -> u16 {
        u16::from(self.u8()) | u16::from(self.u8()) << 8
    }

    /// The id of a command that may run, or of none.
    fn id(&mut self) -> CommandId {
        match self.u8() {
            u8::MAX => CommandId(u32::MAX),
            id => CommandId(u32::from(id) % 8),
        }
    }

    fn stream(&mut self) -> Stream {
        match self.u8() % 3 {
            0 => Stream::Stdin,
            1 => Stream::Stdout,
            _ => Stream::Stderr,
        }
    }
}

/// How far a command is, as the events tell.
#[derive(Default)]
struct Progress {
    started: bool,
    ended: bool,
}

/// The VMM's end, and what is known of it.
struct Channel {
    host: Host,
    commands: BTreeMap<CommandId, Progress>,
    /// Bytes that the VMM itself has asked to be sent, at most.
    asked: usize,
    broken: bool,
}

impl Channel {
    fn new(terminal: bool) -> Channel {
        let mut host = Host::new();
        host.expect_main(terminal);
        Channel {
            host,
            commands: BTreeMap::from([(MAIN, Progress::default())]),
            asked: 0,
            broken: false,
        }
    }

    /// The guest writes these bytes.
    fn feed(&mut self, bytes: &[u8]) {
        self.host.feed(bytes);
        // No event comes without a frame.
        for _ in 0..=(FRAME_MAX + bytes.len()) / HEADER {
            match self.host.next_event() {
                Ok(Some(event)) => self.see(event),
                Ok(None) => {
                    assert!(!self.broken, "a violation is for good");
                    return;
                }
                Err(violation) => {
                    self.broken = true;
                    assert!(!is_obeyed(&violation.to_string()), "{violation}");
                    return;
                }
            }
        }
        panic!("events without end");
    }

    fn see(&mut self, event: Event) {
        assert!(!self.broken, "{event:?} after a violation");
        match event {
            Event::Started { id, .. } => {
                let command = self.commands.get_mut(&id).expect("a command that runs");
                assert!(!command.ended && !command.started, "{id} starts once");
                command.started = true;
            }
            Event::Exit { id, exit } => {
                let command = self.commands.get_mut(&id).expect("a command that runs");
                assert!(!command.ended, "{id} ends once");
                command.ended = true;
                if let End::NotFound(why) | End::NotExecutable(why) | End::CouldNotStart(why) =
                    exit.end
                {
                    assert!(!is_obeyed(&why), "{why:?}");
                }
            }
            Event::Phase(phase) => assert!(!is_obeyed(&phase.name), "{:?}", phase.name),
            Event::Error(words) => assert!(!is_obeyed(&words), "{words:?}"),
            Event::Stopping | Event::Interrupted { .. } => {}
        }
    }

    fn step(&mut self, source: &mut Source<'_>) {
        match source.u8() % STEPS {
            RAW => {
                let len = source.u8();
                let bytes = source.bytes(len.into());
                self.feed(bytes);
            }
            FRAME => {
                let (kind, stream, id) = (source.u8(), source.u8(), source.id());
                let times = source.u16() % 1024;
                let len = source.u8();
                let frame = frame(kind, stream, id, source.bytes(len.into()));
                for _ in 0..=times {
                    self.feed(&frame);
                }
            }
            DATA => {
                let (stream, id) = (source.stream(), source.id());
                let (len, times) = (usize::from(source.u16()), source.u8() % 32);
                let frame = frame(6, stream as u8, id, &vec![b'x'; len.min(MAX_DATA)]);
                for _ in 0..=times {
                    self.feed(&frame);
                }
            }
            EXEC => self.exec(source.u8() % 2 == 1),
            WRITE => {
                let (id, len) = (source.id(), usize::from(source.u16()));
                let room = self.host.room(id);
                let taken = self.host.write(id, &vec![b'y'; 16 * len]);
                assert!(taken == room.min(16 * len) && room <= WINDOW as usize);
            }
            CLOSE => self.host.close(source.id()),
            REFUSE => {
                let (id, stream) = (source.id(), source.stream());
                self.host.refuse(id, stream);
                assert!(self.host.is_over(id, stream));
            }
            CONSUME => {
                let (id, stream, len) = (source.id(), source.stream(), source.u16());
                let there = self.host.bytes(id, stream).len();
                assert!(there <= WINDOW as usize, "{there} bytes of one stream");
                self.host.consume(id, stream, usize::from(len) * 16);
            }
            ACKNOWLEDGE => {
                let id = source.id();
                if self.commands.get(&id).is_some_and(|command| command.ended) {
                    self.commands.remove(&id);
                    self.asked += ASKED;
                }
                self.host.acknowledge(id);
            }
            SEND => {
                let most = 16 * usize::from(source.u16());
                let count = self.host.output().len().min(most);
                self.host.sent(count);
            }
            SIGNAL => {
                self.asked += ASKED;
                self.host.signal(source.id(), 15);
            }
            RESIZE => {
                self.asked += ASKED;
                let (rows, columns) = (source.u16(), source.u16());
                self.host.resize(source.id(), WindowSize { rows, columns });
            }
            SHUT_DOWN => {
                self.asked += ASKED;
                self.host.shut_down();
            }
            _ => {}
        }
        self.check();
    }

    fn exec(&mut self, terminal: bool) {
        if self.commands.len() >= COMMANDS_MAX {
            return;
        }
        self.asked += ASKED;
        let id = self.host.exec(&Command {
            arguments: vec!["true".into()],
            environment: Vec::new(),
            directory: "/".into(),
            user: 0,
            group: 0,
            groups: Vec::new(),
            terminal: terminal.then(WindowSize::default),
        });
        let id = id.expect("a short command");
        let before = self.commands.insert(id, Progress::default());
        assert!(before.is_none(), "{id} runs already");
    }

    fn check(&mut self) {
        let streams = 3 * self.commands.len() * WINDOW as usize;
        let input = if self.broken { 0 } else { FRAME_MAX };
        let most = streams + input + OUTPUT_MAX + self.asked;
        let held = self.host.held();
        assert!(held <= most, "{held} bytes are held, {most} at most");
    }
}

/// Whether words have something in them that a terminal does not just show.
fn is_obeyed(words: &str) -> bool {
    words.chars().any(char::is_control)
}

/// A frame with this payload.
fn frame(kind: u8, stream: u8, id: CommandId, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![kind, stream, 0, 0];
    frame.extend(id.0.to_le_bytes());
    frame.extend((payload.len() as u32).to_le_bytes());
    frame.extend(payload);
    frame
}

/// Does to the VMM's end of an exec channel what `bytes` say.
///
/// # Panics
/// When it does not stand it.
pub fn attack(bytes: &[u8]) {
    let mut source = Source(bytes);
    let mut channel = Channel::new(source.u8() % 2 == 1);
    for _ in 0..STEPS_MAX {
        if source.0.is_empty() {
            break;
        }
        channel.step(&mut source);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A step of the guest: a frame, so many times.
    fn sends(kind: u8, stream: Stream, id: u8, payload: &[u8], times: u16) -> Vec<u8> {
        let mut step = vec![FRAME, kind, stream as u8, id];
        step.extend((times - 1).to_le_bytes());
        step.push(payload.len() as u8);
        step.extend(payload);
        step
    }

    fn hello() -> Vec<u8> {
        sends(1, Stream::Stdin, 0, b"sarangX\n\x01\x00\x01\x00", 1)
    }

    fn data(id: u8, len: u16, times: u8) -> Vec<u8> {
        let [low, high] = len.to_le_bytes();
        vec![DATA, Stream::Stdout as u8, id, low, high, times - 1]
    }

    /// Attacks with a name, and whether the channel is broken afterwards.
    fn seeds() -> Vec<(&'static str, Vec<u8>, bool)> {
        let stdout = Stream::Stdout;
        let main = |kind, payload: &[u8]| sends(kind, Stream::Stdin, 0, payload, 1);
        let started = || main(3, &[7, 0, 0, 0]);
        let exits = || main(4, &[1, 0, 0]);
        let send = || vec![SEND, 0xff, 0xff];
        let attack = |steps: &[Vec<u8>]| [&[0][..], &hello(), &steps.concat()].concat();
        let without_hello = |steps: &[Vec<u8>]| [&[0][..], &steps.concat()].concat();
        let raw = |bytes: &[u8]| [&[RAW, bytes.len() as u8], bytes].concat();
        vec![
            (
                "a-command-that-ends",
                attack(&[
                    started(),
                    data(0, 100, 3),
                    vec![CONSUME, 1, 0, 0xff, 0],
                    exits(),
                    vec![ACKNOWLEDGE, 0],
                    send(),
                ]),
                false,
            ),
            (
                "two-commands",
                attack(&[
                    vec![EXEC, 0],
                    sends(3, Stream::Stdin, 1, &[9, 0, 0, 0], 1),
                    data(1, 9, 1),
                    vec![SIGNAL, 1],
                    vec![RESIZE, 24, 0, 80, 0, 1],
                    sends(4, Stream::Stdin, 1, &[2, 9, 1], 1),
                    vec![ACKNOWLEDGE, 1],
                    vec![SHUT_DOWN],
                ]),
                false,
            ),
            (
                "standard-input",
                attack(&[
                    vec![WRITE, 0, 0xff, 0xff],
                    send(),
                    sends(8, Stream::Stdin, 0, &[0xff; 4], 900),
                    vec![WRITE, 0, 0xff, 0xff],
                    vec![CLOSE, 0],
                    send(),
                    sends(9, Stream::Stdin, 0, &[], 1),
                ]),
                false,
            ),
            (
                "all-credit-and-no-reader",
                attack(&[data(0, 32756, 8)]),
                false,
            ),
            ("more-than-its-credit", attack(&[data(0, 32756, 9)]), true),
            (
                "data-that-nobody-wants",
                attack(&[vec![REFUSE, 0, 1], data(0, 32756, 8), send()]),
                false,
            ),
            (
                "data-behind-the-end",
                attack(&[sends(7, stdout, 0, &[], 1), data(0, 1, 1)]),
                true,
            ),
            ("no-hello", without_hello(&[started()]), true),
            ("two-hellos", attack(&[hello()]), true),
            (
                "hello-of-another-version",
                without_hello(&[main(1, b"sarangX\n\x02\x00\x09\x00")]),
                true,
            ),
            (
                "news-of-nobody",
                attack(&[sends(3, Stream::Stdin, 5, &[7, 0, 0, 0], 1)]),
                true,
            ),
            ("started-twice", attack(&[started(), started()]), true),
            ("ended-twice", attack(&[exits(), exits()]), true),
            ("killed-by-no-signal", attack(&[main(4, &[2, 65, 0])]), true),
            (
                "phases-without-end",
                attack(&[sends(
                    12,
                    Stream::Stdin,
                    0,
                    b"\x01\0\0\0\0\0\0\0\x1b[2Jinit",
                    1000,
                )]),
                false,
            ),
            (
                "words-for-a-terminal",
                attack(&[main(13, b"\x1b]0;title\x07\r\n\xff")]),
                false,
            ),
            (
                "error-twice",
                attack(&[main(13, b"no"), main(13, b"no")]),
                true,
            ),
            (
                "half-a-long-frame",
                attack(&[
                    raw(&[2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 64, 0]),
                    data(0, 32756, 32),
                ]),
                false,
            ),
            (
                "a-frame-that-is-too-long",
                attack(&[raw(&[6, 1, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff])]),
                true,
            ),
            (
                "a-frame-that-only-the-host-sends",
                attack(&[main(14, &[])]),
                true,
            ),
            ("reserved-bytes", attack(&[raw(&[15, 0, 1, 0])]), false),
            (
                "after-a-violation",
                attack(&[main(99, &[]), data(0, 32756, 32), hello()]),
                true,
            ),
        ]
    }

    #[test]
    fn the_seeds_do_what_they_are_named_for_and_the_vmm_does_not_fall_over_them() {
        for (name, bytes, broken) in seeds() {
            let mut source = Source(&bytes);
            let mut channel = Channel::new(source.u8() % 2 == 1);
            while !source.0.is_empty() {
                channel.step(&mut source);
            }
            assert_eq!(channel.broken, broken, "{name}");
        }
    }

    /// With `SARANG_SEEDS=write` in the environment, writes `fuzz/corpus/exec`; otherwise sees that it is up to date.
    #[test]
    fn the_seeds_in_the_corpus_are_these() {
        let corpus = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
        if !corpus.exists() {
            // A published package has no fuzz targets.
            return;
        }
        let corpus = corpus.join("exec");
        let write = std::env::var_os("SARANG_SEEDS").is_some_and(|value| value == "write");
        for (name, bytes, _) in seeds() {
            let path = corpus.join(name);
            if write {
                std::fs::create_dir_all(&corpus).unwrap();
                std::fs::write(&path, &bytes).unwrap();
            }
            let kept = std::fs::read(&path).unwrap_or_default();
            assert!(
                kept == bytes,
                "{} is out of date; SARANG_SEEDS=write cargo test --lib in_the_corpus",
                path.display()
            );
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn no_guest_brings_the_exec_channel_down(steps in prop::collection::vec(any::<[u8; 12]>(), 0..60)) {
            // Otherwise most would be over before they had begun.
            attack(&[&[0][..], &hello(), &steps.concat()].concat());
        }
    }
}
