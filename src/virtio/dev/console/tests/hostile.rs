//! Drivers that break the rules.

use super::*;

/// A control message as it may be: any bytes.
fn raw(device: &mut VirtioConsole, driver: &mut Driver, bytes: &[u8]) {
    driver.send(CONTROL_TRANSMIT, &[bytes], &[]);
    device.process(CONTROL_TRANSMIT).unwrap();
    assert_eq!(driver.used(CONTROL_TRANSMIT).unwrap().len, 0);
}

#[test]
fn control_messages_that_mean_nothing_change_nothing() {
    let (mut device, _terminal, end) = both();
    end.open();
    let mut driver = ready(&mut device, MULTI);
    let before = device.state.clone();
    let message = |id, event, value| Message { id, event, value }.bytes();
    for bytes in [
        vec![],
        vec![1],
        message(0, PORT_OPEN, 0)[..7].to_vec(),
        message(2, PORT_OPEN, 0),
        message(2, PORT_READY, 1),
        message(0x100, PORT_READY, 1),
        message(u32::MAX, PORT_OPEN, 0),
        message(u32::MAX, DEVICE_READY, 1),
        message(0, DEVICE_READY, 0),
        message(0, DEVICE_ADD, 1),
        message(1, 2, 1),
        message(1, CONSOLE_PORT, 1),
        message(1, RESIZE, 1),
        message(1, PORT_NAME, 1),
        message(1, 8, 1),
        message(1, u16::MAX, u16::MAX),
        message(1, PORT_READY, 0),
        message(1, PORT_READY, 7),
        message(1, PORT_OPEN, 2),
        [message(1, PORT_OPEN, 1), vec![0xff; 5000]].concat(),
    ] {
        raw(&mut device, &mut driver, &bytes);
        assert_eq!(device.state, before, "{bytes:?}");
    }
    assert_eq!(heard(&mut device, &mut driver), []);
    // And a message with nothing to read at all, but something to write.
    driver.send(CONTROL_TRANSMIT, &[], &[64]);
    device.process(CONTROL_TRANSMIT).unwrap();
    assert_eq!(driver.used(CONTROL_TRANSMIT).unwrap().len, 0);
    assert_eq!(device.state, before);
}

#[test]
fn a_driver_that_never_listens_is_told_once_what_matters_when_it_does() {
    let (mut device, terminal, end) = both();
    let mut driver = Driver::start(&mut device, MULTI);
    let state_len = |device: &VirtioConsole| postcard::to_stdvec(&device.state).unwrap().len();
    let mut longest = 0;
    for round in 0..20_000_u16 {
        let id = u32::from(round % 2);
        for (event, value) in [
            (DEVICE_READY, 1),
            (PORT_READY, 1),
            (PORT_OPEN, round % 3),
            (PORT_OPEN, 1),
        ] {
            say(&mut device, &mut driver, id, event, value);
        }
        if round % 100 == 0 {
            terminal.port.resize(Size {
                columns: round,
                rows: 1,
            });
            end.open();
            turn(&mut device);
            end.close();
            turn(&mut device);
        }
        longest = longest.max(state_len(&device));
    }
    assert!(longest < 100, "{longest} bytes of state");
    let told = heard(&mut device, &mut driver);
    let expected = [
        message(0, CONSOLE_PORT, 1, b""),
        message(0, RESIZE, 0, &[0xbc, 0x4d, 1, 0]),
        message(0, PORT_OPEN, 1, b""),
        message(1, PORT_NAME, 1, b"agent"),
    ];
    assert_eq!(told, expected);
}

#[test]
fn a_buffer_that_is_too_short_for_a_message_comes_back_empty_and_the_message_waits() {
    let (mut device, _terminal, _end) = both();
    let mut driver = Driver::start(&mut device, MULTI);
    say(&mut device, &mut driver, 0, DEVICE_READY, 1);
    say(&mut device, &mut driver, 1, PORT_READY, 1);
    for (readable, writable) in [
        (&[][..], &[][..]),
        (&[&b"readable"[..]], &[]),
        (&[], &[7]),
        (&[], &[3, 4]),
        (&[b"both"], &[7]),
    ] {
        driver.send(CONTROL_RECEIVE, readable, writable);
        if readable.is_empty() && writable.is_empty() {
            driver.send_raw(CONTROL_RECEIVE, &[(0x10_0000, 0, 2)]);
        }
        device.process(CONTROL_RECEIVE).unwrap();
        assert_eq!(driver.used(CONTROL_RECEIVE).unwrap().len, 0);
        while driver.used(CONTROL_RECEIVE).is_some() {}
    }
    driver.send(CONTROL_RECEIVE, &[], &[3, 4, 1]);
    device.process(CONTROL_RECEIVE).unwrap();
    let used = driver.used(CONTROL_RECEIVE).unwrap();
    let expected = message(0, DEVICE_ADD, 0, b"").0.bytes();
    assert_eq!(driver.written(CONTROL_RECEIVE, used.head), expected);
}

#[test]
fn data_buffers_that_are_empty_or_the_wrong_way_round_come_back() {
    let (mut device, terminal, _end) = both();
    let mut driver = ready(&mut device, MULTI);
    terminal.input.push_slice(b"input");
    terminal.port.input_arrived();
    turn(&mut device);
    driver.send_raw(RX, &[(0x10_0000, 0, 2)]);
    driver.send_raw(RX, &[(0x10_0000, 64, 0)]);
    driver.send(RX, &[b"not to be read"], &[2]);
    driver.send_raw(TX, &[(0x10_0000, 0, 0)]);
    driver.send_raw(TX, &[(0x10_0000, 64, 2)]);
    driver.send(TX, &[b"text"], &[64]);
    device.process(RX).unwrap();
    device.process(TX).unwrap();
    let lens = |driver: &mut Driver, queue| -> Vec<u32> {
        std::iter::from_fn(|| driver.used(queue))
            .map(|used| used.len)
            .collect()
    };
    assert_eq!(lens(&mut driver, RX), [0, 0, 2]);
    assert_eq!(lens(&mut driver, TX), [0, 0, 0]);
    assert_eq!(everything(&terminal.output), b"text");
    let head = driver.send(RX, &[], &[64]);
    device.process(RX).unwrap();
    assert_eq!(&driver.written(RX, head)[..3], b"put", "nothing is lost");
}

#[test]
fn broken_chains_are_reported_and_nothing_more_is_looked_at() {
    const OUTSIDE: (u64, u32, u16) = (u64::MAX - 8, 64, 0);
    for (queue, pieces, expected) in [
        (TX, &[OUTSIDE][..], Malformed::Address),
        (
            TX1,
            &[(0x10_0000, 8, 2), (0x10_0000, 8, 0)],
            Malformed::Order,
        ),
        (CONTROL_TRANSMIT, &[OUTSIDE], Malformed::Address),
        (CONTROL_RECEIVE, &[OUTSIDE], Malformed::Address),
        (RX, &[OUTSIDE], Malformed::Address),
    ] {
        let (mut device, terminal, end) = both();
        end.open();
        terminal.input.push_slice(b"key");
        let mut driver = Driver::start(&mut device, MULTI);
        say(&mut device, &mut driver, 0, DEVICE_READY, 1);
        say(&mut device, &mut driver, 0, PORT_READY, 1);
        say(&mut device, &mut driver, 0, PORT_OPEN, 1);
        driver.send_raw(queue, pieces);
        assert_eq!(device.process(queue), Err(expected), "queue {queue}");
        driver.send(TX, &[b"later"], &[]);
        device.process(TX).unwrap();
        device.reset();
        assert_eq!(everything(&terminal.output), b"", "queue {queue}");
        // A driver that starts anew is served.
        let mut driver = ready(&mut device, MULTI);
        driver.send(TX, &[b"better"], &[]);
        device.process(TX).unwrap();
        assert_eq!(everything(&terminal.output), b"better");
    }
}

#[test]
fn one_turn_moves_a_mebibyte_at_most() {
    let (mut device, _terminal, _end) = both();
    let mut driver = ready(&mut device, MULTI);
    // 60 times the same 1 MiB, to an end that is closed and takes all of it.
    for _ in 0..60 {
        driver.send_raw(TX1, &[(0x10_0000, 1 << 20, 0)]);
    }
    let mut turns = 0;
    let mut done = 0;
    while done < 60 {
        device.process(TX1).unwrap();
        done += std::iter::from_fn(|| driver.used(TX1)).count();
        turns += 1;
        assert!(done <= turns, "{done} MiB in {turns} turns");
    }
}

#[test]
fn the_configuration_space_has_an_end_in_both_directions() {
    let (mut device, _terminal, _end) = both();
    let before = device.state.clone();
    for offset in [0, 1, 3, 7, 11, 12, 4096, u64::MAX] {
        let mut data = [0; 8];
        device.read_config(offset, &mut data);
        if offset > 7 {
            assert_eq!(data, [0; 8]);
        }
        device.write_config(offset, &[0xff; 8]);
    }
    assert_eq!(device.state, before);
}

#[test]
fn queues_that_the_driver_left_out_are_not_missed() {
    let (mut device, terminal, end) = both();
    end.open();
    terminal.input.push_slice(b"key");
    let ram = crate::mem::allocate(&[(crate::mem::GuestAddress(0), 2 << 20)]).unwrap();
    let line = Arc::new(crate::irq::CountingLine::default());
    for queues in [0, 3, 6, 9] {
        device.activate(Activation {
            features: MULTI,
            ram: ram.clone(),
            queues: (0..queues).map(|_| None).collect(),
            interrupt: Arc::new(Interrupt::new(Arc::clone(&line) as _)),
        });
        for queue in 0..10 {
            device.process(queue).unwrap();
        }
        for source in 0..4 {
            device.ready(source, Interest::READ).unwrap();
        }
        device.reset();
    }
}
