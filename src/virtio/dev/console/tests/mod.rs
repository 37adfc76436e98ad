//! The device between a driver and the host's end of its ports.

mod hostile;

use super::*;
use crate::backend::port::{CAPACITY, PortEnd};
use crate::backend::{ByteQueue, SerialEnd};
use crate::virtio::driver::Driver;
use crate::virtio::{F_EVENT_IDX, F_VERSION_1, INTERRUPT_CONFIG};
use control::{CONSOLE_PORT, DEVICE_ADD, DEVICE_READY, PORT_NAME, PORT_OPEN, PORT_READY, RESIZE};

/// The first port's queues, and the second's.
const RX: usize = 0;
const TX: usize = 1;
const RX1: usize = 4;
const TX1: usize = 5;
const PLAIN: u64 = F_VERSION_1 | VIRTIO_CONSOLE_F_SIZE | VIRTIO_CONSOLE_F_EMERG_WRITE;
const MULTI: u64 = PLAIN | VIRTIO_CONSOLE_F_MULTIPORT;

/// A console and its queues on the host.
struct Terminal {
    port: Arc<Port>,
    output: Arc<ByteQueue>,
    input: Arc<ByteQueue>,
}

fn terminal() -> Terminal {
    let output = Arc::new(ByteQueue::output().unwrap());
    let input = Arc::new(ByteQueue::input().unwrap());
    let port = Port::of_console(Arc::clone(&output), Arc::clone(&input)).unwrap();
    Terminal {
        port: Arc::new(port),
        output,
        input,
    }
}

/// A console and a channel called `agent`.
fn both() -> (VirtioConsole, Terminal, PortEnd) {
    let terminal = terminal();
    let (port, end) = Port::channel("agent").unwrap();
    let console = Some(Arc::clone(&terminal.port));
    let device = VirtioConsole::new(0, console, vec![port]).unwrap();
    (device, terminal, end)
}

fn everything(queue: &ByteQueue) -> Vec<u8> {
    let mut bytes = vec![0; queue.look().len() + 1];
    let count = queue.drain_into(&mut bytes);
    bytes.truncate(count);
    bytes
}

fn all_of(end: &PortEnd) -> Vec<u8> {
    let mut bytes = vec![0; CAPACITY + 1];
    let count = end.read(&mut bytes);
    bytes.truncate(count);
    bytes
}

/// One turn of the event loop: every bell that has been rung. `false` when none was.
fn turn(device: &mut VirtioConsole) -> bool {
    let mut rung = false;
    for (number, bell) in device.sources().iter().enumerate() {
        let mut count = [0; 8];
        if rustix::io::read(bell, &mut count).is_ok() {
            rung = true;
            device.ready(number, Interest::READ).unwrap();
        }
    }
    rung
}

fn say(device: &mut VirtioConsole, driver: &mut Driver, id: u32, event: u16, value: u16) {
    let message = Message { id, event, value }.bytes();
    driver.send(CONTROL_TRANSMIT, &[&message], &[]);
    device.process(CONTROL_TRANSMIT).unwrap();
    assert!(driver.used(CONTROL_TRANSMIT).is_some());
}

/// What the device says when it gets buffers enough: message and what follows it.
fn heard(device: &mut VirtioConsole, driver: &mut Driver) -> Vec<(Message, Vec<u8>)> {
    let mut messages = Vec::new();
    loop {
        let head = driver.send(CONTROL_RECEIVE, &[], &[64]);
        device.process(CONTROL_RECEIVE).unwrap();
        let mut last = None;
        while let Some(used) = driver.used(CONTROL_RECEIVE) {
            let mut bytes = driver.written(CONTROL_RECEIVE, used.head);
            bytes.truncate(used.len as usize);
            let rest = bytes.split_off(8);
            messages.push((Message::parse(bytes.try_into().unwrap()), rest));
            last = Some(used.head);
        }
        // The buffer stays with the device when it has nothing to say.
        if last != Some(head) {
            return messages;
        }
    }
}

fn message(id: u32, event: u16, value: u16, rest: &[u8]) -> (Message, Vec<u8>) {
    (Message { id, event, value }, rest.to_vec())
}

/// A driver that has set up all ports and opened them, and has heard everything.
fn ready(device: &mut VirtioConsole, features: u64) -> Driver {
    let mut driver = Driver::start(device, features);
    say(device, &mut driver, u32::MAX, DEVICE_READY, 1);
    for id in 0..device.ports.len() as u32 {
        say(device, &mut driver, id, PORT_READY, 1);
        say(device, &mut driver, id, PORT_OPEN, 1);
    }
    heard(device, &mut driver);
    driver
}

#[test]
fn a_console_alone_has_two_queues_and_needs_no_negotiation() {
    let Terminal {
        port,
        output,
        input,
    } = terminal();
    let mut device = VirtioConsole::new(0, Some(Arc::clone(&port)), vec![]).unwrap();
    assert_eq!(device.queue_sizes().len(), 2);
    assert_eq!(device.features() & VIRTIO_CONSOLE_F_MULTIPORT, 0);
    let mut driver = Driver::start(&mut device, PLAIN);
    driver.send(TX, &[b"hello ", b"world"], &[]);
    driver.send(RX, &[], &[3, 4]);
    driver.send(RX, &[], &[16]);
    device.process(RX).unwrap();
    device.process(TX).unwrap();
    assert_eq!(everything(&output), b"hello world");
    assert_eq!(driver.used(TX).unwrap().len, 0);
    assert!(driver.used(RX).is_none(), "nothing has been typed");
    input.push_slice(b"typed keys");
    port.input_arrived();
    assert!(turn(&mut device));
    let (first, second) = (driver.used(RX).unwrap(), driver.used(RX).unwrap());
    assert_eq!((first.len, second.len), (7, 3));
    assert_eq!(driver.written(RX, first.head), b"typed k");
    assert_eq!(&driver.written(RX, second.head)[..3], b"eys");
    assert_eq!(driver.line.edges(), 2, "one for all input, one for output");
}

#[test]
fn what_is_typed_before_the_driver_is_there_waits_for_it() {
    let Terminal { port, input, .. } = terminal();
    input.push_slice(b"early");
    port.input_arrived();
    let mut device = VirtioConsole::new(0, Some(port), vec![]).unwrap();
    let mut driver = Driver::start(&mut device, PLAIN);
    device.process(RX).unwrap();
    let head = driver.send(RX, &[], &[64]);
    device.process(RX).unwrap();
    assert_eq!(driver.used(RX).unwrap().len, 5);
    assert_eq!(&driver.written(RX, head)[..5], b"early");
}

#[test]
fn each_port_is_added_and_introduced_and_told_of_the_host() {
    let (mut device, terminal, end) = both();
    let size = Size {
        columns: 80,
        rows: 25,
    };
    terminal.port.resize(size);
    assert_eq!(device.queue_sizes().len(), 6);
    let mut driver = Driver::start(&mut device, MULTI);
    assert_eq!(heard(&mut device, &mut driver), [], "nobody has asked");
    say(&mut device, &mut driver, 0, DEVICE_READY, 0);
    assert_eq!(heard(&mut device, &mut driver), [], "the driver has failed");
    say(&mut device, &mut driver, u32::MAX, DEVICE_READY, 1);
    let added = [
        message(0, DEVICE_ADD, 0, b""),
        message(1, DEVICE_ADD, 0, b""),
    ];
    assert_eq!(heard(&mut device, &mut driver), added);
    say(&mut device, &mut driver, 1, PORT_READY, 1);
    let named = [message(1, PORT_NAME, 1, b"agent")];
    assert_eq!(heard(&mut device, &mut driver), named);
    say(&mut device, &mut driver, 0, PORT_READY, 1);
    let console = [
        message(0, CONSOLE_PORT, 1, b""),
        message(0, RESIZE, 0, &[80, 0, 25, 0]),
        message(0, PORT_OPEN, 1, b""),
    ];
    assert_eq!(heard(&mut device, &mut driver), console);
    for (open, value) in [(true, 1), (false, 0), (true, 1)] {
        if open {
            end.open();
        } else {
            end.close();
        }
        assert!(turn(&mut device));
        let told = [message(1, PORT_OPEN, value, b"")];
        assert_eq!(heard(&mut device, &mut driver), told);
    }
    drop(end);
    assert!(turn(&mut device));
    let told = [message(1, PORT_OPEN, 0, b"")];
    assert_eq!(heard(&mut device, &mut driver), told);
}

#[test]
fn a_size_that_changes_is_in_the_configuration_space_with_an_interrupt_and_a_message() {
    let (mut device, terminal, _end) = both();
    let read = |device: &VirtioConsole| {
        let mut space = [0; 12];
        device.read_config(0, &mut space);
        space
    };
    assert_eq!(read(&device), [0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    let line = Arc::new(crate::irq::CountingLine::default());
    for (features, config_interrupt) in [
        (MULTI, true),
        (PLAIN, true),
        (MULTI & !VIRTIO_CONSOLE_F_SIZE, false),
    ] {
        let columns = device.state.size.columns + 1;
        let mut driver = Driver::start(&mut device, features);
        let interrupt = Arc::new(Interrupt::new(Arc::clone(&line) as _));
        device.active.as_mut().unwrap().interrupt = Arc::clone(&interrupt);
        if features & VIRTIO_CONSOLE_F_MULTIPORT != 0 {
            say(&mut device, &mut driver, 0, DEVICE_READY, 1);
            say(&mut device, &mut driver, 0, PORT_READY, 1);
            heard(&mut device, &mut driver);
        }
        assert_eq!(interrupt.generation(), 0);
        terminal.port.resize(Size { columns, rows: 50 });
        assert!(turn(&mut device));
        assert_eq!(read(&device)[..4], [columns as u8, 0, 50, 0]);
        assert_eq!(interrupt.generation(), u32::from(config_interrupt));
        assert_eq!(interrupt.status() & INTERRUPT_CONFIG != 0, config_interrupt);
        if features & VIRTIO_CONSOLE_F_MULTIPORT != 0 {
            let resized = [message(0, RESIZE, 0, &[columns as u8, 0, 50, 0])];
            assert_eq!(heard(&mut device, &mut driver), resized);
        }
        // The same size is no news.
        terminal.port.resize(Size { columns, rows: 50 });
        assert!(!turn(&mut device));
        device.reset();
    }
}

#[test]
fn a_size_that_changes_before_the_driver_is_there_is_told_to_it() {
    let terminal = terminal();
    let mut device = VirtioConsole::new(0, Some(Arc::clone(&terminal.port)), vec![]).unwrap();
    terminal.port.resize(Size {
        columns: 100,
        rows: 40,
    });
    let driver = Driver::start(&mut device, PLAIN);
    device.process(RX).unwrap();
    assert_eq!(driver.line.edges(), 1);
    let mut space = [0; 2];
    device.read_config(0, &mut space);
    assert_eq!(space, [100, 0]);
}

#[test]
fn the_size_follows_a_pseudo_terminal() {
    use crate::backend::console::Console;
    use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let peer = ioctl_tiocgptpeer(&master, flags).unwrap();
    let console = Console::over(None, Some(peer)).unwrap();
    let display = console.display().unwrap();
    assert_eq!(display.size(), Size::default());
    let port = Port::of_console(console.output(), console.input()).unwrap();
    let port = Arc::new(port);
    let mut device = VirtioConsole::new(0, Some(Arc::clone(&port)), vec![]).unwrap();
    let driver = Driver::start(&mut device, PLAIN);
    for (columns, rows) in [(132, 43), (65_535, 1)] {
        let size = rustix::termios::Winsize {
            ws_col: columns,
            ws_row: rows,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        rustix::termios::tcsetwinsize(&master, size).unwrap();
        port.resize(display.size());
        assert!(turn(&mut device));
        let mut space = [0; 4];
        device.read_config(0, &mut space);
        let [a, b, c, d] = space;
        assert_eq!(u16::from_le_bytes([a, b]), columns);
        assert_eq!(u16::from_le_bytes([c, d]), rows);
    }
    assert_eq!(driver.line.edges(), 2);
    let (pipe, _reader) = rustix::pipe::pipe().map(|(r, w)| (w, r)).unwrap();
    let console = Console::over(None, Some(pipe)).unwrap();
    assert!(console.display().is_none(), "a pipe has no size");
}

#[test]
fn an_emergency_write_is_printed_whatever_state_the_device_is_in() {
    let (mut device, terminal, _end) = both();
    device.write_config(8, b"a");
    let _driver = Driver::start(&mut device, F_VERSION_1);
    device.write_config(8, &[b'b', 1, 2, 3]);
    device.reset();
    device.write_config(8, b"c");
    for (offset, data) in [
        (0, &b"x"[..]),
        (4, b"yyyyyyyy"),
        (9, b"z"),
        (12, b"z"),
        (u64::MAX, b"z"),
        (8, b""),
    ] {
        device.write_config(offset, data);
    }
    assert_eq!(everything(&terminal.output), b"abc");
    let (port, end) = Port::channel("agent").unwrap();
    end.open();
    let mut device = VirtioConsole::new(0, None, vec![port]).unwrap();
    assert_eq!(device.features(), VIRTIO_CONSOLE_F_MULTIPORT);
    device.write_config(8, b"a");
    assert_eq!(all_of(&end), b"", "a channel is no place for emergencies");
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len as u32)
        .map(|i| (i ^ i >> 7 ^ i >> 13) as u8)
        .collect()
}

#[test]
fn a_mebibyte_reaches_a_slow_reader_byte_for_byte() {
    for features in [MULTI, MULTI | F_EVENT_IDX] {
        let (mut device, _terminal, end) = both();
        end.open();
        let mut driver = ready(&mut device, features);
        let sent = pattern(1 << 20);
        let mut got: Vec<u8> = Vec::new();
        let mut chunks = sent.chunks(40_000);
        let mut unanswered = 0;
        let mut waited = false;
        // Reads of a size that fits neither the requests nor the queues.
        let mut buffer = vec![0; 7919];
        while got.len() < sent.len() {
            // As many requests as the ring takes, all in two pieces.
            while unanswered < 20
                && let Some(chunk) = chunks.next()
            {
                let (one, other) = chunk.split_at(chunk.len() / 3);
                driver.send(TX1, &[one, other], &[]);
                unanswered += 1;
                device.process(TX1).unwrap();
            }
            let count = end.read(&mut buffer);
            got.extend(&buffer[..count]);
            waited |= device.state.ports[1].done > 0;
            let rung = turn(&mut device);
            let mut answered = false;
            while let Some(used) = driver.used(TX1) {
                assert_eq!(used.len, 0);
                unanswered -= 1;
                answered = true;
            }
            assert!(count > 0 || rung || answered, "it goes on by itself");
        }
        assert!(got == sent);
        assert!(waited, "a request has been taken in parts");
        assert_eq!(unanswered, 0);
        assert_eq!(device.state.ports[1].done, 0);
    }
}

#[test]
fn a_mebibyte_reaches_a_guest_that_gives_few_buffers_byte_for_byte() {
    for features in [MULTI, MULTI | F_EVENT_IDX] {
        let (mut device, _terminal, end) = both();
        end.open();
        let mut driver = ready(&mut device, features);
        let sent = pattern(1 << 20);
        let (mut left, mut got) = (&sent[..], Vec::<u8>::new());
        let mut full = false;
        while got.len() < sent.len() {
            let count = end.write(left);
            full |= count < left.len();
            left = &left[count..];
            turn(&mut device);
            driver.send(RX1, &[], &[1000, 3096]);
            device.process(RX1).unwrap();
            let used = driver.used(RX1).expect("there is input for the buffer");
            let mut bytes = driver.written(RX1, used.head);
            bytes.truncate(used.len as usize);
            got.extend(bytes);
        }
        assert!(got == sent);
        assert!(full, "the writer has had to wait");
        assert!(driver.used(RX1).is_none());
    }
}

#[test]
fn a_full_buffer_is_one_turn_and_one_interrupt() {
    let (mut device, _terminal, end) = both();
    end.open();
    let mut driver = ready(&mut device, MULTI);
    let sent = pattern(CAPACITY);
    for chunk in sent.chunks(8192) {
        driver.send(TX1, &[chunk], &[]);
    }
    for _ in 0..60 {
        driver.send(RX1, &[], &[4096]);
    }
    let before = driver.line.edges();
    device.process(TX1).unwrap();
    assert_eq!(driver.line.edges(), before + 1);
    let got = all_of(&end);
    assert!(got == sent);
    end.write(&sent);
    turn(&mut device);
    assert_eq!(driver.line.edges(), before + 2);
    let count = std::iter::from_fn(|| driver.used(RX1)).count();
    assert_eq!(count, 60);
}

#[test]
fn what_a_guest_sends_to_a_closed_end_is_discarded_and_so_is_what_waits_when_it_closes() {
    let (mut device, _terminal, end) = both();
    let mut driver = ready(&mut device, MULTI);
    for _ in 0..3 {
        driver.send(TX1, &[&[b'x'; 200_000]], &[]);
    }
    device.process(TX1).unwrap();
    let used = std::iter::from_fn(|| driver.used(TX1)).count();
    assert_eq!(used, 3, "nobody waits for a reader who is not there");
    end.open();
    assert_eq!(all_of(&end), b"");
    for _ in 0..3 {
        driver.send(TX1, &[&[b'y'; 200_000]], &[]);
    }
    device.process(TX1).unwrap();
    assert_eq!(std::iter::from_fn(|| driver.used(TX1)).count(), 1);
    end.close();
    turn(&mut device);
    assert_eq!(std::iter::from_fn(|| driver.used(TX1)).count(), 2);
    end.open();
    driver.send(TX1, &[b"new"], &[]);
    device.process(TX1).unwrap();
    assert_eq!(all_of(&end), b"new");
}

#[test]
fn a_closed_port_of_the_guest_gets_nothing_until_it_is_opened() {
    let (mut device, _terminal, end) = both();
    end.open();
    let mut driver = ready(&mut device, MULTI);
    assert!(end.is_guest_open());
    say(&mut device, &mut driver, 1, PORT_OPEN, 0);
    assert!(!end.is_guest_open());
    end.clear_readable();
    driver.send(RX1, &[], &[64]);
    end.write(b"wait");
    turn(&mut device);
    device.process(RX1).unwrap();
    assert!(driver.used(RX1).is_none());
    say(&mut device, &mut driver, 1, PORT_OPEN, 1);
    assert_eq!(driver.used(RX1).unwrap().len, 4);
    assert!(end.is_guest_open());
    let readable = end.readable();
    assert!(rustix::io::read(&readable, &mut [0; 8]).is_ok());
}

#[test]
fn the_host_learns_that_the_guest_has_closed_after_the_last_byte() {
    let (mut device, _terminal, end) = both();
    end.open();
    let mut driver = ready(&mut device, MULTI);
    driver.send(TX1, &[&vec![b'x'; CAPACITY], b"the end"], &[]);
    // Before the device has seen the request.
    say(&mut device, &mut driver, 1, PORT_OPEN, 0);
    assert!(end.is_guest_open(), "there are bytes to come");
    assert_eq!(all_of(&end).len(), CAPACITY);
    assert!(turn(&mut device));
    assert!(!end.is_guest_open());
    assert_eq!(all_of(&end), b"the end");
}

#[test]
fn the_guest_learns_that_the_host_has_closed_after_the_last_byte() {
    let (mut device, _terminal, end) = both();
    end.open();
    let mut driver = ready(&mut device, MULTI);
    end.write(b"the end");
    end.close();
    assert_eq!(end.write(b"more"), 0);
    turn(&mut device);
    assert_eq!(heard(&mut device, &mut driver), []);
    driver.send(RX1, &[], &[64]);
    device.process(RX1).unwrap();
    assert_eq!(driver.used(RX1).unwrap().len, 7);
    device.process(RX1).unwrap();
    let mut told = Vec::new();
    while let Some(used) = driver.used(CONTROL_RECEIVE) {
        told.push(driver.written(CONTROL_RECEIVE, used.head)[..8].to_vec());
    }
    assert_eq!(told, [message(1, PORT_OPEN, 0, b"").0.bytes()]);
}

#[test]
fn without_multiport_only_the_first_port_works() {
    let (mut device, terminal, end) = both();
    end.open();
    let mut driver = Driver::start(&mut device, PLAIN);
    for queue in [TX, 3, TX1] {
        driver.send(
            queue,
            &[&Message {
                id: 0,
                event: DEVICE_READY,
                value: 1,
            }
            .bytes()],
            &[],
        );
    }
    for queue in [RX, 2, RX1] {
        driver.send(queue, &[], &[64]);
    }
    terminal.input.push_slice(b"key");
    terminal.port.input_arrived();
    end.write(b"lost");
    turn(&mut device);
    for queue in 0..device.queue_sizes().len() {
        device.process(queue).unwrap();
    }
    assert_eq!(driver.used(RX).unwrap().len, 3);
    assert!(driver.used(TX).is_some());
    for queue in [2, 3, RX1, TX1] {
        assert!(driver.used(queue).is_none(), "{queue}");
    }
    assert!(!end.is_guest_open());
}

#[test]
fn a_serial_port_on_the_same_wire_costs_neither_of_them_a_byte() {
    let Terminal { port, output, .. } = terminal();
    let mut device = VirtioConsole::new(0, Some(port), vec![]).unwrap();
    let mut driver = Driver::start(&mut device, PLAIN);
    let other = Arc::clone(&output);
    let serial = std::thread::spawn(move || {
        let mut printed = 0;
        while printed < 300_000 {
            printed += usize::from(other.push(b's'));
        }
    });
    let (mut sent, mut got) = (0, Vec::new());
    while got.len() < 300_000 + 40 * 50_000 {
        if sent < 40 && driver.used(TX).is_some() == (sent > 0) {
            driver.send(TX, &[&[b'v'; 50_000]], &[]);
            sent += 1;
        }
        device.process(TX).unwrap();
        got.extend(everything(&output));
    }
    serial.join().unwrap();
    assert_eq!(got.iter().filter(|byte| **byte == b's').count(), 300_000);
    assert_eq!(got.iter().filter(|byte| **byte == b'v').count(), 2_000_000);
}

#[test]
fn the_last_words_before_a_reset_reach_the_host() {
    let (mut device, terminal, end) = both();
    end.open();
    let mut driver = ready(&mut device, MULTI);
    driver.send(TX, &[b"power down\n"], &[]);
    driver.send(TX1, &[b"status 0"], &[]);
    device.reset();
    assert_eq!(everything(&terminal.output), b"power down\n");
    assert_eq!(all_of(&end), b"status 0");
    assert!(!end.is_guest_open());
}

#[test]
fn a_snapshot_keeps_what_both_sides_know_of_each_other() {
    let (mut device, terminal, end) = both();
    end.open();
    let size = Size {
        columns: 80,
        rows: 25,
    };
    terminal.port.resize(size);
    let mut driver = ready(&mut device, MULTI);
    driver.send(TX1, &[&[b'x'; CAPACITY + 100]], &[]);
    device.process(TX1).unwrap();
    assert_eq!(device.state.ports[1].done, CAPACITY as u32);
    // A message that there is no buffer for yet, while `heard` has left one for the first.
    end.close();
    terminal.port.resize(Size {
        columns: 81,
        ..size
    });
    turn(&mut device);
    let saved = device.save();

    let (mut other, terminal, end) = both();
    terminal.port.resize(Size {
        columns: 82,
        ..size
    });
    other.restore(&saved).unwrap();
    assert_eq!(other.state, device.state);
    assert!(!end.is_guest_open());
    let mut driver = Driver::start(&mut other, MULTI);
    end.open();
    turn(&mut other);
    for queue in 0..other.queue_sizes().len() {
        other.process(queue).unwrap();
    }
    assert!(end.is_guest_open());
    // The new terminal's size is news to the driver, and so is the end that is open again.
    let told = heard(&mut other, &mut driver);
    assert!(
        told.contains(&message(0, RESIZE, 0, &[82, 0, 25, 0])),
        "{told:?}"
    );
    assert!(!told.iter().any(|(message, _)| message.event == PORT_NAME));
    // The rest of the request that had been taken in part; here it is the first on a new queue.
    other.state.ports[1].done = CAPACITY as u32;
    driver.send(TX1, &[&[b'x'; CAPACITY], b"the rest"], &[]);
    other.process(TX1).unwrap();
    assert_eq!(all_of(&end), b"the rest");

    let mut alone = VirtioConsole::new(0, Some(terminal.port), vec![]).unwrap();
    let error = alone.restore(&saved).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the saved state of CON0 does not fit this version of it: it had 2 ports, not 1"
    );
}

#[test]
fn ports_that_make_no_device_are_refused_with_a_sentence() {
    let port = |name: &str| Port::channel(name).unwrap().0;
    assert_eq!(
        VirtioConsole::new(0, None, vec![]).err(),
        Some(Error::Count(0))
    );
    let many = (0..=PORTS_MAX).map(|i| port(&i.to_string())).collect();
    assert_eq!(
        VirtioConsole::new(0, None, many).err(),
        Some(Error::Count(PORTS_MAX + 1))
    );
    let same = vec![port("a"), port("b"), port("a")];
    assert_eq!(
        VirtioConsole::new(0, None, same).err(),
        Some(Error::SameName("a".to_owned()))
    );
    for name in ["", ".", "..", "a/b", "a b", "é", "a\0", &"x".repeat(65)] {
        let error = Port::channel(name).err().unwrap();
        assert!(error.to_string().contains("1 to 64 letters"), "{error}");
    }
    assert!(Port::channel("org.example.agent-1_x").is_ok());
}
