//! Two ends back to back, and bytes that no end should send.

use std::collections::VecDeque;

use super::super::plan::{Command, WindowSize};
use super::frame::{self, HEADER, Kind};
use super::guest::{self, Guest};
use super::host::{self, Host};
use super::*;

/// Numbers without a pattern: xorshift.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit.max(1) as u64) as usize
    }
}

/// Two ends and what is on its way between them.
struct Pair {
    host: Host,
    guest: Guest,
    to_guest: VecDeque<u8>,
    to_host: VecDeque<u8>,
    random: Random,
    host_events: Vec<host::Event>,
    guest_events: Vec<guest::Event>,
}

impl Pair {
    fn new() -> Pair {
        let mut pair = Pair {
            host: Host::new(),
            guest: Guest::new(),
            to_guest: VecDeque::new(),
            to_host: VecDeque::new(),
            random: Random(0x5eed),
            host_events: Vec::new(),
            guest_events: Vec::new(),
        };
        pair.host.expect_main(false);
        pair.guest.open(MAIN, false);
        pair
    }

    /// Moves some bytes one step in each direction.
    fn step(&mut self) {
        let count = self.random.below(100_000);
        let out = self.host.output();
        let out = out.get(..count).unwrap_or(out).to_vec();
        self.host.sent(out.len());
        self.to_guest.extend(out);
        let count = self.random.below(100_000);
        let out = self.guest.output();
        let out = out.get(..count).unwrap_or(out).to_vec();
        self.guest.sent(out.len());
        self.to_host.extend(out);

        let count = self.random.below(50_000).min(self.to_guest.len());
        let bytes: Vec<u8> = self.to_guest.drain(..count).collect();
        self.guest.feed(&bytes);
        while let Some(event) = self.guest.next_event().unwrap() {
            self.guest_events.push(event);
        }
        let count = self.random.below(50_000).min(self.to_host.len());
        let bytes: Vec<u8> = self.to_host.drain(..count).collect();
        self.host.feed(&bytes);
        while let Some(event) = self.host.next_event().unwrap() {
            self.host_events.push(event);
        }
    }

    fn settle(&mut self) {
        for _ in 0..200 {
            self.step();
        }
        assert!(self.to_guest.is_empty() && self.to_host.is_empty());
    }
}

fn command(name: &str) -> Command {
    Command {
        arguments: vec![name.into()],
        ..Command::default()
    }
}

/// The byte at `at` of the stream numbered `seed`.
fn byte(seed: usize, at: usize) -> u8 {
    (at ^ at >> 8 ^ at >> 16)
        .wrapping_mul(31)
        .wrapping_add(seed) as u8
}

#[test]
fn what_each_end_says_arrives() {
    let mut pair = Pair::new();
    assert_eq!(pair.host.version(), None);
    let make = Command {
        terminal: Some(WindowSize {
            rows: 24,
            columns: 80,
        }),
        ..command("make")
    };
    let id = pair.host.exec(&make).unwrap();
    pair.host.signal(id, 15);
    let size = WindowSize {
        rows: 300,
        columns: 2,
    };
    pair.host.resize(id, size);
    pair.host.shut_down();
    let phase = Phase {
        microseconds: u64::MAX,
        name: "root".into(),
    };
    pair.guest.phase(&phase);
    pair.guest.started(MAIN, 77);
    pair.guest.error("no \u{1b}[31mroot");
    pair.guest.interrupted(MAIN);
    pair.guest.stopping();
    pair.settle();
    assert_eq!(
        (pair.host.version(), pair.guest.version()),
        (Some(1), Some(1))
    );
    assert_eq!(
        pair.guest_events,
        [
            guest::Event::Exec {
                id,
                command: Ok(make)
            },
            guest::Event::Signal { id, signal: 15 },
            guest::Event::Resize { id, size },
            guest::Event::Shutdown,
            guest::Event::ErrorSeen,
        ]
    );
    assert_eq!(
        pair.host_events,
        [
            host::Event::Phase(phase),
            host::Event::Started { id: MAIN, pid: 77 },
            host::Event::Error("no  [31mroot".into()),
            host::Event::Interrupted { id: MAIN },
            host::Event::Stopping,
        ]
    );
}

#[test]
fn every_way_to_end_arrives() {
    let why = || "no such thing".to_owned();
    let exits = [
        (End::Exited(3), false, 3),
        (End::Exited(255), false, 255),
        (End::Killed(9), true, 137),
        (End::NotFound(why()), false, 127),
        (End::NotExecutable(why()), false, 126),
        (End::CouldNotStart(why()), false, 125),
    ];
    let mut pair = Pair::new();
    for (end, out_of_memory, code) in exits {
        assert_eq!(end.exit_code(), code);
        let exit = Exit { end, out_of_memory };
        let id = pair.host.exec(&command("x")).unwrap();
        pair.settle();
        pair.guest.exit(id, &exit);
        pair.settle();
        assert_eq!(pair.host_events.pop(), Some(host::Event::Exit { id, exit }));
        assert!(pair.host.is_over(id, Stream::Stdout));
        pair.host.acknowledge(id);
        pair.settle();
        let acknowledged = guest::Event::Acknowledged { id };
        assert_eq!(pair.guest_events.pop(), Some(acknowledged));
    }
}

#[test]
fn streams_arrive_whole_and_an_exit_comes_behind_the_last_byte() {
    const LEN: usize = 3 << 20;
    let mut pair = Pair::new();
    let second = pair.host.exec(&command("cat")).unwrap();
    let ids = [MAIN, second];
    // The guest's ends are `cat`: what comes in goes out, and some of it to standard error as well.
    let (mut written, mut read, mut errors) = ([0; 2], [0; 2], [0; 2]);
    let (mut gone, mut ended) = ([false; 2], [false; 2]);
    let mut echoed_errors = [0; 2];
    while !ended.iter().all(|ended| *ended) {
        pair.step();
        for (at, id) in ids.into_iter().enumerate() {
            // The host writes.
            let most = pair.random.below(70_000).min(LEN - written[at]);
            let bytes: Vec<u8> = (written[at]..written[at] + most)
                .map(|i| byte(at, i))
                .collect();
            written[at] += pair.host.write(id, &bytes);
            if written[at] == LEN {
                pair.host.close(id);
            }
            // The guest echoes.
            let input = pair.guest.bytes(id).to_vec();
            let count = pair.guest.write(id, Stream::Stdout, &input);
            let input = input.get(..count).unwrap_or(&[]);
            let noise = input.len().min(pair.guest.room(id, Stream::Stderr));
            echoed_errors[at] += pair.guest.write(id, Stream::Stderr, &vec![b'!'; noise]);
            pair.guest.consume(id, count);
            let asked = id == MAIN || !pair.guest_events.is_empty();
            if asked && !gone[at] && pair.guest.is_over(id) {
                pair.guest.exit(id, &End::Exited(0).into());
                gone[at] = true;
            }
            // The host reads, now and then.
            if pair.random.below(3) == 0 {
                let bytes = pair.host.bytes(id, Stream::Stdout).to_vec();
                let bytes = bytes.get(..pair.random.below(90_000)).unwrap_or(&bytes);
                assert!(
                    bytes
                        .iter()
                        .enumerate()
                        .all(|(i, b)| *b == byte(at, read[at] + i))
                );
                read[at] += bytes.len();
                pair.host.consume(id, Stream::Stdout, bytes.len());
                let count = pair.host.bytes(id, Stream::Stderr).len();
                errors[at] += count;
                pair.host.consume(id, Stream::Stderr, count);
            }
            let exited = pair
                .host_events
                .iter()
                .any(|event| matches!(event, host::Event::Exit { id: of, .. } if *of == id));
            ended[at] = exited
                && pair.host.is_over(id, Stream::Stdout)
                && pair.host.is_over(id, Stream::Stderr);
        }
    }
    assert_eq!(read, [LEN; 2]);
    assert_eq!(errors, echoed_errors);
}

#[test]
fn a_reader_that_sleeps_holds_up_only_its_own_stream() {
    let mut pair = Pair::new();
    let id = pair.host.exec(&command("yes")).unwrap();
    pair.settle();
    // Nobody reads the first command's output: it stops at its credit.
    let mut stuck = 0;
    for _ in 0..100 {
        stuck += pair.guest.write(MAIN, Stream::Stdout, &[b'y'; 50_000]);
        pair.step();
    }
    pair.settle();
    assert_eq!(stuck, WINDOW as usize);
    assert_eq!(pair.guest.room(MAIN, Stream::Stdout), 0);
    // Standard error of the same, and everything of the other, goes on for longer than any credit lasts.
    let mut passed = [0; 2];
    for _ in 0..400 {
        for (at, (id, stream)) in [(MAIN, Stream::Stderr), (id, Stream::Stdout)]
            .into_iter()
            .enumerate()
        {
            pair.guest.write(id, stream, &[b'e'; 30_000]);
            let count = pair.host.bytes(id, stream).len();
            passed[at] += count;
            pair.host.consume(id, stream, count);
        }
        pair.step();
    }
    assert!(
        passed.iter().all(|bytes| *bytes > 4 * WINDOW as usize),
        "{passed:?}"
    );
    pair.guest.exit(id, &End::Exited(0).into());
    pair.settle();
    assert!(matches!(
        pair.host_events.last(),
        Some(host::Event::Exit { .. })
    ));
    // And when the reader wakes up, its stream goes on.
    let mut count = 0;
    while !pair.host.bytes(MAIN, Stream::Stdout).is_empty() {
        let len = pair.host.bytes(MAIN, Stream::Stdout).len();
        pair.host.consume(MAIN, Stream::Stdout, len);
        count += len;
    }
    pair.settle();
    assert_eq!(count, stuck);
    assert_eq!(pair.guest.room(MAIN, Stream::Stdout), WINDOW as usize);
}

#[test]
fn control_goes_ahead_of_data_that_waits() {
    let mut pair = Pair::new();
    pair.settle();
    assert_eq!(
        pair.host.write(MAIN, &vec![b'x'; WINDOW as usize]),
        WINDOW as usize
    );
    assert!(pair.host.output().len() >= 64 << 10, "data is made ready");
    pair.host.signal(MAIN, 2);
    let mut before = 0;
    while pair.guest_events.is_empty() {
        let out = pair.host.output();
        let piece = out.get(..1000).unwrap_or(out).to_vec();
        pair.host.sent(piece.len());
        before += piece.len();
        pair.guest.feed(&piece);
        pair.guest_events.extend(pair.guest.next_event().unwrap());
    }
    assert!(before < WINDOW as usize / 2, "{before}");
}

#[test]
fn a_stream_that_nobody_reads_any_more_ends() {
    let mut pair = Pair::new();
    pair.guest.write(MAIN, Stream::Stdout, b"lost");
    pair.settle();
    pair.host.refuse(MAIN, Stream::Stdout);
    pair.guest.refuse(MAIN);
    assert_eq!(pair.host.bytes(MAIN, Stream::Stdout), b"");
    pair.settle();
    assert!(pair.guest.is_refused(MAIN, Stream::Stdout) && pair.host.is_refused(MAIN));
    assert!(!pair.guest.is_refused(MAIN, Stream::Stderr));
    assert_eq!(pair.guest.write(MAIN, Stream::Stdout, b"more"), 0);
    assert_eq!(pair.host.write(MAIN, b"more"), 0);
    pair.guest.exit(MAIN, &End::Killed(13).into());
    pair.settle();
    assert!(matches!(
        pair.host_events.last(),
        Some(host::Event::Exit { .. })
    ));
}

#[test]
fn what_crosses_an_exit_is_dropped() {
    let mut pair = Pair::new();
    pair.settle();
    pair.guest.exit(MAIN, &End::Exited(0).into());
    pair.host.signal(MAIN, 9);
    pair.host.write(MAIN, b"too late");
    pair.settle();
    pair.host.acknowledge(MAIN);
    pair.host.signal(MAIN, 9);
    pair.settle();
    let acknowledged = guest::Event::Acknowledged { id: MAIN };
    assert_eq!(pair.guest_events.last(), Some(&acknowledged));
    assert_eq!(pair.host.write(MAIN, b"later"), 0);
}

/// A frame as a hostile end may write it.
fn raw(kind: u8, stream: u8, id: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![kind, stream, 0, 0];
    bytes.extend(id.to_le_bytes());
    bytes.extend((payload.len() as u32).to_le_bytes());
    bytes.extend(payload);
    bytes
}

/// Why the host breaks off after a HELLO and `bytes`.
fn complaint(bytes: &[u8]) -> String {
    let mut host = Host::new();
    host.expect_main(false);
    host.feed(&frame::hello());
    host.feed(bytes);
    let why = loop {
        match host.next_event() {
            Ok(Some(_)) => {}
            Ok(None) => panic!("{bytes:?} is taken"),
            Err(why) => break why,
        }
    };
    host.feed(&frame::control(Kind::Stopping, MAIN, &[]));
    assert_eq!(host.next_event(), Err(why.clone()), "and stays broken");
    why.to_string()
}

#[test]
fn a_hostile_guest_gets_one_sentence() {
    let exit = raw(4, 0, 0, &[1, 0, 0]);
    let twice = |frame: Vec<u8>| frame.repeat(2);
    for (bytes, why) in [
        (raw(0, 0, 0, b""), "unknown kind 0"),
        (raw(17, 0, 0, b""), "unknown kind 17"),
        (raw(16, 0, 9, b""), "Interrupted frame out of turn"),
        (raw(6, 3, 0, b"x"), "unknown stream 3"),
        ([6, 1, 1, 0].into_iter().chain([0; 8]).collect(), "0 bytes"),
        (vec![7, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0], "reserved"),
        (
            vec![6, 1, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff],
            "4294967295 bytes",
        ),
        (raw(6, 1, 0, b""), "a Data frame of 0 bytes"),
        (raw(8, 0, 0, b"123"), "a Credit frame of 3 bytes"),
        (frame::hello(), "second HELLO"),
        (raw(6, 1, 5, b"x"), "command 5, which does not run"),
        (raw(3, 0, 5, &[0; 4]), "command 5, which does not run"),
        (raw(4, 0, 5, &[1, 0, 0]), "command 5, which does not run"),
        (raw(6, 0, 0, b"x"), "for the standard input of command 0"),
        (
            raw(8, 1, 0, &[1; 4]),
            "for the standard output of command 0",
        ),
        (raw(9, 2, 0, b""), "for the standard error of command 0"),
        (raw(2, 0, 9, b""), "Exec frame out of turn"),
        (raw(5, 0, 0, b""), "Ack frame out of turn"),
        (raw(10, 0, 0, &[9, 0, 0, 0]), "Signal frame out of turn"),
        (twice(raw(3, 0, 0, &[1; 4])), "twice"),
        (twice(exit.clone()), "twice"),
        ([exit.clone(), raw(3, 0, 0, &[1; 4])].concat(), "twice"),
        ([exit, raw(6, 1, 0, b"x")].concat(), "behind the end"),
        (twice(raw(7, 1, 0, b"")), "two ends"),
        (
            [raw(7, 1, 0, b""), raw(6, 1, 0, b"x")].concat(),
            "behind the end",
        ),
        (raw(4, 0, 0, &[9, 0, 0]), "says 9 0"),
        (raw(4, 0, 0, &[2, 0, 0]), "says 2 0"),
        (raw(4, 0, 0, &[2, 99, 0]), "says 2 99"),
        (twice(raw(13, 0, 0, b"a")), "Error frame out of turn"),
        (raw(6, 1, 0, &[0; 32_000]).repeat(9), "credit"),
    ] {
        let said = complaint(&bytes);
        assert!(said.contains(why), "{why}: {said}");
    }
}

#[test]
fn a_stranger_is_told_from_an_init() {
    let versions = |oldest: u16, newest: u16| {
        let numbers = [oldest.to_le_bytes(), newest.to_le_bytes()].concat();
        raw(1, 0, 0, &[b"sarangX\n".as_slice(), &numbers].concat())
    };
    for (bytes, why) in [
        (b"login: root\nPassword:".to_vec(), "kind 108"),
        (raw(15, 0, 0, b""), "not HELLO"),
        (raw(1, 0, 0, b"somebodyelse"), "not that of an exec channel"),
        (versions(2, 3), "versions 2 to 3, this end 1 to 1"),
        (versions(0, 0), "versions 0 to 0"),
        (versions(1, 0), "versions 1 to 0"),
    ] {
        let mut host = Host::new();
        host.feed(&bytes);
        let said = host.next_event().unwrap_err().to_string();
        assert!(said.contains(why), "{why}: {said}");
    }
    let mut host = Host::new();
    host.feed(&versions(0, 9));
    assert_eq!(host.next_event(), Ok(None));
    assert_eq!(host.version(), Some(1), "the newest that both know");
}

#[test]
fn credit_without_end_does_not_make_the_host_hold_more() {
    let mut host = Host::new();
    host.expect_main(false);
    host.feed(&frame::hello());
    host.feed(&raw(8, 0, 0, &[0xff; 4]).repeat(1000));
    assert_eq!(host.next_event(), Ok(None));
    assert_eq!(
        host.write(MAIN, &vec![0; 4 * WINDOW as usize]),
        WINDOW as usize
    );
}

#[test]
fn noise_in_a_conversation_never_panics() {
    let mut random = Random(7);
    for _ in 0..2000 {
        let mut bytes = frame::hello();
        for _ in 0..random.below(6) {
            let payload = vec![1; random.below(14)];
            let kind = random.below(17) as u8;
            bytes.extend(raw(
                kind,
                random.below(4) as u8,
                random.below(2) as u32,
                &payload,
            ));
        }
        let flip = random.below(bytes.len());
        bytes[flip] ^= random.below(256) as u8;
        let mut host = Host::new();
        host.expect_main(random.below(2) == 0);
        let mut guest = Guest::new();
        guest.open(MAIN, false);
        for piece in bytes.chunks(1 + random.below(HEADER * 2)) {
            host.feed(piece);
            guest.feed(piece);
            while let Ok(Some(_)) = host.next_event() {}
            while let Ok(Some(_)) = guest.next_event() {}
            let count = host.output().len();
            host.sent(count);
            let count = guest.output().len();
            guest.sent(count);
        }
    }
}

#[test]
fn a_command_that_is_too_large_is_refused_by_the_host() {
    let mut host = Host::new();
    let large = Command {
        arguments: vec!["x".repeat(5 << 20).into()],
        ..Command::default()
    };
    assert!(host.exec(&large).unwrap_err().0.contains("4 MiB"));
}
