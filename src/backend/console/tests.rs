//! The console over pipes, files and pseudo-terminals: nothing lost, nobody stalled, every terminal put back.

use super::*;
use crate::backend::INPUT_CAPACITY;
use rustix::pipe::{PipeFlags, pipe_with};
use std::io::{Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

/// A serial port that only notes what it is told.
#[derive(Default)]
struct Noted {
    input: AtomicBool,
    drained: AtomicBool,
}

impl SerialEnd for Noted {
    fn input_arrived(&self) {
        self.input.store(true, Ordering::SeqCst);
    }

    fn output_drained(&self) {
        self.drained.store(true, Ordering::SeqCst);
    }
}

struct Running {
    console: Console,
    serial: Arc<Noted>,
    seen: Arc<Mutex<Vec<u8>>>,
    handle: crate::worker::Handle,
    thread: JoinHandle<()>,
}

/// What a console is attached to: the loop, the serial port, and what the observer has seen.
type Attached = (EventLoop, Arc<Noted>, Arc<Mutex<Vec<u8>>>);

fn attach(console: &mut Console) -> Result<Attached, Error> {
    let serial = Arc::new(Noted::default());
    let seen = Arc::new(Mutex::new(Vec::new()));
    let observed = Arc::clone(&seen);
    let mut events = EventLoop::new().unwrap();
    console.attach(
        &mut events,
        Arc::clone(&serial) as Arc<dyn SerialEnd>,
        Box::new(move |bytes| observed.lock().unwrap().extend(bytes)),
        Box::new(|_| {}),
    )?;
    Ok((events, serial, seen))
}

fn run(mut console: Console) -> Running {
    let (mut events, serial, seen) = attach(&mut console).unwrap();
    let handle = events.handle();
    Running {
        console,
        serial,
        seen,
        handle,
        thread: std::thread::spawn(move || events.run().unwrap()),
    }
}

impl Running {
    fn stop(self) -> (Console, Vec<u8>) {
        self.handle.stop();
        self.thread.join().unwrap();
        let seen = self.seen.lock().unwrap().clone();
        (self.console, seen)
    }
}

fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(20), "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn pipe() -> (OwnedFd, OwnedFd) {
    pipe_with(PipeFlags::CLOEXEC).unwrap()
}

#[test]
fn a_console_that_is_off_takes_everything_and_the_observer_still_sees_it() {
    let running = run(Console::open(&Kind::Off).unwrap());
    let queue = running.console.output();
    let text: Vec<u8> = (0..300_000_u32).map(|i| i as u8).collect();
    assert_eq!(queue.push_slice(&text), text.len());
    wait_until("discarded", || queue.is_empty());
    let (_, seen) = running.stop();
    assert!(seen == text);
}

#[test]
fn a_stalled_reader_holds_up_neither_the_loop_nor_the_observer_and_loses_nothing() {
    let (reader, writer) = pipe();
    let running = run(Console::over(None, Some(writer)).unwrap());
    let queue = running.console.output();
    let text: Vec<u8> = (0..500_000_u32).map(|i| (i % 251) as u8).collect();
    assert_eq!(queue.push_slice(&text), text.len());
    wait_until("observed", || {
        running.seen.lock().unwrap().len() == text.len()
    });
    // The loop still runs, and what is printed now is seen now.
    assert_eq!(queue.push_slice(b"panic"), 5);
    wait_until("observed", || {
        running.seen.lock().unwrap().ends_with(b"panic")
    });
    let (console, _) = running.stop();
    console.finish(Some(Duration::from_millis(30)));
    assert!(!queue.is_empty(), "nobody reads, so the deadline passes");
    let thread = std::thread::spawn(move || {
        let mut got = Vec::new();
        std::fs::File::from(reader).read_to_end(&mut got).unwrap();
        got
    });
    console.finish(None);
    drop(console);
    let got = thread.join().unwrap();
    assert!(got == [&text[..], b"panic"].concat());
}

#[test]
fn a_full_queue_that_drains_is_reported_to_the_serial_port() {
    let (reader, writer) = pipe();
    let running = run(Console::over(None, Some(writer)).unwrap());
    let queue = running.console.output();
    while queue.push_slice(&[b'x'; 4096]) > 0 || queue.has_room() {}
    let thread = std::thread::spawn(move || {
        std::io::copy(&mut std::fs::File::from(reader), &mut std::io::sink()).unwrap();
    });
    wait_until("drained", || running.serial.drained.load(Ordering::SeqCst));
    drop(running.stop());
    drop(thread);
}

#[test]
fn a_reader_that_is_gone_costs_the_output_and_not_the_run() {
    let (reader, writer) = pipe();
    drop(reader);
    let running = run(Console::over(None, Some(writer)).unwrap());
    let queue = running.console.output();
    for _ in 0..3 {
        assert_eq!(queue.push_slice(b"text"), 4);
        wait_until("discarded", || queue.is_empty());
    }
    let (console, seen) = running.stop();
    assert_eq!(seen, b"texttexttext");
    console.finish(None);
}

#[test]
fn a_shared_description_keeps_its_flags() {
    for (reader, writer) in [
        pipe(),
        std::os::unix::net::UnixStream::pair()
            .map(|(a, b)| (a.into(), b.into()))
            .unwrap(),
    ] {
        let shared = rustix::io::fcntl_dupfd_cloexec(&writer, 3).unwrap();
        let running = run(Console::over(None, Some(writer)).unwrap());
        assert_eq!(running.console.output().push_slice(b"hello"), 5);
        let mut got = [0; 5];
        std::fs::File::from(reader).read_exact(&mut got).unwrap();
        assert_eq!(&got, b"hello");
        let flags = rustix::fs::fcntl_getfl(&shared).unwrap();
        assert!(!flags.contains(rustix::fs::OFlags::NONBLOCK));
        drop(running.stop());
    }
}

#[test]
fn input_is_read_only_as_far_as_the_guest_has_room() {
    let (reader, writer) = pipe();
    let running = run(Console::over(Some(reader), None).unwrap());
    let queue = running.console.input();
    let text: Vec<u8> = (0..200_000_u32).map(|i| (i % 253) as u8).collect();
    let sent = text.clone();
    let thread = std::thread::spawn(move || std::fs::File::from(writer).write_all(&sent).unwrap());
    wait_until("the queue is full", || !queue.has_room());
    assert!(running.serial.input.load(Ordering::SeqCst));
    assert!(!thread.is_finished(), "the rest is still on the host");
    let mut got = Vec::new();
    while got.len() < text.len() {
        match queue.pop() {
            Some(byte) => got.push(byte),
            None => std::thread::yield_now(),
        }
    }
    assert!(got == text);
    thread.join().unwrap();
    // The end of the input does not end anything else.
    assert_eq!(running.console.output().push_slice(b"on"), 2);
    wait_until("still running", || running.console.output().is_empty());
    drop(running.stop());
}

#[test]
fn a_file_gets_the_output_and_starts_empty() {
    let path = std::env::temp_dir().join(format!("sarang-console-{}", std::process::id()));
    std::fs::write(&path, "old").unwrap();
    let running = run(Console::open(&Kind::File(path.clone())).unwrap());
    assert_eq!(running.console.output().push_slice(b"new"), 3);
    let (console, _) = running.stop();
    console.finish(None);
    assert_eq!(std::fs::read(&path).unwrap(), b"new");
    std::fs::remove_file(&path).unwrap();
    let mut console = Console::open(&Kind::File("/nonexistent/log".into())).unwrap();
    let error = attach(&mut console).err().unwrap();
    assert_eq!(
        error.to_string(),
        "cannot open /nonexistent/log for the console's output: No such file or directory (os error 2)"
    );
}

#[test]
fn a_pseudo_terminal_keeps_what_was_printed_before_anyone_came() {
    let running = run(Console::open(&Kind::Pty).unwrap());
    let output = running.console.output();
    assert_eq!(output.push_slice(b"early\r\n"), 7);
    wait_until("written", || output.is_empty());
    for round in 0..2 {
        let mut peer = std::fs::File::options()
            .read(true)
            .write(true)
            .open(running.console.pty_path().unwrap())
            .unwrap();
        if round == 0 {
            let mut got = [0; 7];
            peer.read_exact(&mut got).unwrap();
            assert_eq!(&got, b"early\r\n");
        }
        peer.write_all(b"k").unwrap();
        let input = running.console.input();
        wait_until("typed", || input.pop() == Some(b'k'));
    }
    drop(running.stop());
}

#[test]
fn a_typist_goes_before_the_host_and_loses_nothing_to_a_slow_guest() {
    let (reader, writer) = pipe();
    let mut console = Console::over(Some(reader), None).unwrap();
    let typist = console.typist();
    let text: Vec<u8> = (0..20_000_u32).map(|i| (i % 253) as u8).collect();
    typist.write(&text[..7]);
    let running = run(console);
    let queue = running.console.input();
    std::fs::File::from(writer).write_all(b"host").unwrap();
    typist.write(&text[7..]);
    let take = |count: usize| {
        let mut got = Vec::new();
        wait_until("typed", || !queue.is_empty());
        while got.len() < count {
            match queue.pop() {
                Some(byte) => got.push(byte),
                None => std::thread::yield_now(),
            }
        }
        got
    };
    assert!(take(text.len()) == text);
    assert!(running.serial.input.load(Ordering::SeqCst));
    // The pipe has been ready all the time.
    typist.write(b"last ");
    typist.leave();
    assert_eq!(take(9), b"last host");
    drop(running.stop());
}

#[test]
fn a_console_without_input_can_be_typed_at() {
    let mut console = Console::open(&Kind::Off).unwrap();
    let typist = console.typist();
    let running = run(console);
    typist.write(b"x");
    typist.leave();
    let queue = running.console.input();
    wait_until("typed", || queue.pop() == Some(b'x'));
    drop(running.stop());
}

#[test]
fn keys_wait_for_a_typist_to_leave() {
    let (reader, writer) = pipe();
    let unread = rustix::io::fcntl_dupfd_cloexec(&reader, 3).unwrap();
    let source = Source {
        fd: Arc::new(reader),
        typed: true,
    };
    let mut console = Console::new(None, Some(source), None, false).unwrap();
    let typist = console.typist();
    let running = run(console);
    let queue = running.console.input();
    std::fs::File::from(writer).write_all(b"keys").unwrap();
    wait_until("read, for the keys of the VMM", || {
        rustix::io::ioctl_fionread(&unread).unwrap() == 0
    });
    typist.write(b"first ");
    typist.leave();
    wait_until("typed", || queue.room() == INPUT_CAPACITY - 10);
    let got: Vec<u8> = std::iter::from_fn(|| queue.pop()).collect();
    assert_eq!(got, b"first keys");
    drop(running.stop());
}
